"""Where the examples are: along which axis of an activation, and in which order where other entries share that axis.

A gate for every example has to meet that example's part of an activation. Most modules see [examples, …], but some see
positions first ([positions, examples, …]), some see several windows an example folded into the first axis, and some
fold the examples behind the positions; nothing in a module says which. So the model is asked: it runs on two of its
examples, a and b, and on a, b, a. The axis that grows from 2 to 3 parts holds the examples, and where the values
of a come back tells the order. Modules that see no examples (tables of positions) or a mixture of them (tokens routed
to experts) show neither; what happens to those is `masking`'s business.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_coar import models
from hf_coar.errors import CoarError, ModelError

_PAIR, _TRIPLE = (0, 1), (0, 1, 0)
_LIMIT = 1e4  # larger values in a sketch are masks
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, nn.Module)


@dataclass(frozen=True)
class Layout:
    """Examples along `axis`: one after the other with all their entries (`example_major`), or taking turns."""

    axis: int
    example_major: bool = True

    def take(self, x: Tensor, n_examples: int, example: int) -> Tensor:
        """The part of one example, the axis kept."""
        entries = x.shape[self.axis] // n_examples
        if self.example_major:
            return x.narrow(self.axis, example * entries, entries)
        return x.unflatten(self.axis, (entries, n_examples)).select(self.axis + 1, example)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `take` over all examples."""
        if self.example_major:
            return torch.cat(list(parts), dim=self.axis)
        return torch.stack(list(parts), dim=self.axis + 1).flatten(self.axis, self.axis + 1)

    def spread(self, rows: Tensor, entries: int) -> Tensor:
        """Rows [examples, …] as [entries, …], one for every entry of the axis."""
        each = entries // rows.shape[0]
        if each == 1:
            return rows
        return rows.repeat_interleave(each, 0) if self.example_major else rows.repeat(each, *[1] * (rows.dim() - 1))


SHARED = "shared"  # a tensor that does not grow with the examples
UNKNOWN = "unknown"  # a tensor whose layout cannot be told, or something that is no tensor and cannot be divided
PLAIN = "plain"  # a number, a flag, nothing
Place = Layout | str


@dataclass(frozen=True)
class Call:
    """One run of a module: where the examples are in each of its inputs and outputs, in the order of the tree."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]

    def divisible(self) -> bool:
        """Whether the module can run once an example instead."""
        return (
            any(isinstance(place, Layout) for place in self.inputs)
            and UNKNOWN not in self.inputs
            and all(isinstance(place, Layout) or place == PLAIN for place in self.outputs)
        )


Layouts = dict[str, list[Call]]


@dataclass(frozen=True)
class _Sketch:
    """A small trace of a tensor: its shape and, for every axis that may hold the examples, one number an entry."""

    shape: tuple[int, ...]
    is_float: bool
    entries: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Plain:
    """A number, a flag, nothing: as it was."""

    value: Any


def _sketch(value: Any, n: int) -> "_Sketch | _Plain | str":
    if not isinstance(value, Tensor):
        return _Plain(value) if isinstance(value, _PLAIN) else UNKNOWN
    entries = {}
    x = value.detach()
    for axis, size in enumerate(x.shape):
        if size and size % n == 0:
            rows = x.movedim(axis, 0).reshape(size, -1).float().nan_to_num(0.0, _LIMIT, -_LIMIT).clamp(-_LIMIT, _LIMIT)
            weights = torch.cos(torch.arange(rows.shape[1], device=x.device) * 1.7 + 0.3)
            entries[axis] = rows @ weights
    return _Sketch(tuple(x.shape), x.is_floating_point(), entries)


_SEEN, _SINGLE, _GUESS = "seen", "single", "guess"


def _place(pair: _Sketch | _Plain | str, triple: _Sketch | _Plain | str) -> tuple[Place, str]:
    """Where the examples are, and how sure the order is: seen, of no matter (one entry each), or a guess (both fit)."""
    if not isinstance(pair, _Sketch) or not isinstance(triple, _Sketch):
        # A number that changes with the examples (tokens an expert) would be wrong for each of them alone.
        return (PLAIN if isinstance(pair, _Plain) and pair == triple else UNKNOWN), _SINGLE
    if pair.shape == triple.shape:
        return SHARED, _SINGLE
    grown = [axis for axis, (a, b) in enumerate(zip(pair.shape, triple.shape, strict=False)) if a != b]
    if len(pair.shape) != len(triple.shape) or len(grown) != 1:
        return UNKNOWN, _SINGLE
    axis = grown[0]
    if pair.shape[axis] * 3 != triple.shape[axis] * 2 or axis not in pair.entries or axis not in triple.entries:
        return UNKNOWN, _SINGLE
    seen, entries = triple.entries[axis], pair.entries[axis]
    each = len(entries) // 2
    major = entries.view(2, each)
    minor = entries.view(each, 2).T
    off_major = float((major[list(_TRIPLE)].flatten() - seen).abs().max())
    off_minor = float((minor[list(_TRIPLE)].T.flatten() - seen).abs().max())
    example_major = off_major <= off_minor
    a, b = major if example_major else minor
    rounding = 1e-5 * float(seen.abs().max())
    # What is off must be little beside what sets the two examples apart.
    if min(off_major, off_minor) > max(0.05 * float((a - b).abs().max()), rounding):
        return UNKNOWN, _SINGLE
    if each == 1:
        return Layout(axis), _SINGLE
    if min(off_major, off_minor) < 0.2 * max(off_major, off_minor) and max(off_major, off_minor) > rounding:
        return Layout(axis, example_major), _SEEN
    return Layout(axis), _GUESS


def _settle(found: Sequence[tuple[Place, str]], others: Sequence[tuple[Place, str]]) -> tuple[Place, ...]:
    """Guessed orders follow the ones that were seen in the same call; with nothing to follow they are unknown."""
    seen = {place.example_major for place, how in (*found, *others) if how == _SEEN}
    order = seen.pop() if len(seen) == 1 else None
    settled = []
    for place, how in found:
        if how == _GUESS:
            place = UNKNOWN if order is None else Layout(place.axis, order)
        settled.append(place)
    return tuple(settled)


class _Recorder:
    """Sketches of the inputs and outputs of watched modules, run by run."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.calls: dict[str, list[list]] = {}

    def inputs(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        self.calls.setdefault(name, []).append([[_sketch(leaf, self.n) for leaf in leaves], None])

    def outputs(self, name: str, output: Any) -> None:
        # Of a module that runs inside itself the innermost run ends first.
        for call in reversed(self.calls[name]):
            if call[1] is None:
                call[1] = [_sketch(leaf, self.n) for leaf in pytree.tree_leaves(output)]
                return

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        hooks = []
        try:
            for name, module in modules.items():
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: self.inputs(name, args, kwargs), with_kwargs=True
                    )
                )
                hooks.append(
                    module.register_forward_hook(lambda m, args, output, name=name: self.outputs(name, output))
                )
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _compare(pair: _Recorder, triple: _Recorder) -> Layouts:
    layouts: Layouts = {}
    for name, calls in pair.calls.items():
        others = triple.calls.get(name, [])
        if len(others) != len(calls):
            continue
        layouts[name] = []
        for (inputs2, outputs2), (inputs3, outputs3) in zip(calls, others, strict=True):
            if outputs2 is None or outputs3 is None or len(inputs2) != len(inputs3) or len(outputs2) != len(outputs3):
                layouts[name].append(Call((UNKNOWN,), (UNKNOWN,)))
                continue
            inputs = [_place(a, b) for a, b in zip(inputs2, inputs3, strict=True)]
            outputs = [_place(a, b) for a, b in zip(outputs2, outputs3, strict=True)]
            layouts[name].append(Call(_settle(inputs, outputs), _settle(outputs, inputs)))
    return layouts


@dataclass
class Probe:
    """What running the model on a few of its examples showed.

    Attributes:
        layouts: the runs of every watched module.
        inert: names of parameters whose modules did not run and whose values do not matter either.
    """

    layouts: Layouts
    inert: set[str] = field(default_factory=set)


_CACHE: WeakKeyDictionary[nn.Module, OrderedDict[Any, Probe]] = WeakKeyDictionary()
_KEEP = 32  # probes kept a model


def probe(
    model: nn.Module,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    n_examples: int,
    watched: Mapping[str, nn.Module],
    key: Any,
    inert: Callable[[Layouts, Callable[[], Any]], set[str]],
) -> Probe:
    """Layouts of the watched modules for inputs of this kind; runs the model on five examples the first time.

    Args:
        model: by which the answer is remembered.
        forward: its own forward.
        args: its inputs.
        kwargs: its inputs by name.
        n_examples: how many examples they hold, along their first axis.
        watched: modules by name.
        key: what else the answer depends on.
        inert: finds, from the layouts and a function that runs the model on two examples, `Probe.inert`.

    Raises:
        CoarError: no input has so many examples; an input that cannot be divided into examples.
        ModelError: the model does not run on a part of the batch.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    divided = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n_examples for leaf in leaves]
    _check_inputs(model, leaves, divided, n_examples)
    signature = tuple((tuple(x.shape[1:]), x.dtype) if d else None for x, d in zip(leaves, divided, strict=True))
    signature = (n_examples == 1, *signature)
    known = _CACHE.setdefault(model, OrderedDict())
    if (key, spec, signature) in known:
        known.move_to_end((key, spec, signature))
        return known[key, spec, signature]
    rows = _two_rows(leaves, divided, n_examples) if n_examples > 1 else {}

    def run(order: Sequence[int], recorder: _Recorder | None = None) -> Any:
        part = [rows[i][list(order)] if d else leaf for i, (leaf, d) in enumerate(zip(leaves, divided, strict=True))]
        inputs, named = pytree.tree_unflatten(part, spec)
        if recorder is None:
            return forward(*inputs, **named)
        with recorder.watching(watched):
            recorder.inputs("", inputs, named)
            output = forward(*inputs, **named)
            recorder.outputs("", output)
        return output

    if n_examples == 1:  # one example is everywhere; all that there is to see is which modules run
        with _undisturbed(model, leaves), (only := _Recorder(1)).watching(watched):
            forward(*args, **kwargs)
        found = Probe(_compare(only, only))
        with _undisturbed(model, leaves):
            found.inert = inert(found.layouts, lambda: forward(*args, **kwargs))
        return _remember(known, (key, spec, signature), found)
    pair, triple = _Recorder(2), _Recorder(3)
    with _undisturbed(model, leaves):
        try:
            run(_PAIR, pair)
            run(_TRIPLE, triple)
        except (RuntimeError, ValueError, IndexError) as error:
            if models.is_out_of_memory(error):
                raise  # whoever runs it may try with fewer examples
            raise ModelError(
                f"{type(model).__name__} does not run on two or three examples of the batch, so that gates cannot be "
                f"told apart by example ({type(error).__name__}: {str(error)[:200]}); use one mask for all of them, "
                "[components]"
            ) from error
        found = Probe(_compare(pair, triple))
        found.inert = inert(found.layouts, lambda: run(_PAIR))
    return _remember(known, (key, spec, signature), found)


def _remember(known: OrderedDict[Any, Probe], key: Any, found: Probe) -> Probe:
    known[key] = found
    if len(known) > _KEEP:
        known.popitem(last=False)
    return found


def _check_inputs(model: nn.Module, leaves: Sequence[Any], divided: Sequence[bool], n_examples: int) -> None:
    if not any(divided):
        sizes = sorted({leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()})
        raise CoarError(
            f"kept has {n_examples} rows, and {type(model).__name__} sees a batch of "
            f"{' or '.join(map(str, sizes)) or 'no tensors'}; "
            "give one row an example of the batch"
        )
    opaque = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
    if opaque:
        raise CoarError(
            f"{type(model).__name__} gets a {opaque[0]} as input, which cannot be divided into examples; "
            "without a cache (use_cache=False) or with one mask for all examples, [components], it can"
        )


def _two_rows(leaves: Sequence[Any], divided: Sequence[bool], n_examples: int) -> dict[int, Tensor]:
    """Two examples by input, as unlike as the batch has; if all are alike, the second one turned round."""
    tensors = {i: leaf for i, (leaf, d) in enumerate(zip(leaves, divided, strict=True)) if d}
    unlike = torch.zeros(n_examples)
    for x in tensors.values():
        differs = (x != x[:1]).reshape(n_examples, -1)
        unlike += differs.float().mean(1).cpu() if differs.shape[1] else 0
    other = int(unlike.argmax())
    if float(unlike[other]) > 0:
        return {i: x[[0, other]] for i, x in tensors.items()}
    return {i: torch.stack([x[0], x[0].flip(-1) if x.dim() > 1 else x[0]]) for i, x in tensors.items()}


@contextmanager
def _undisturbed(model: nn.Module, leaves: Sequence[Any]) -> Iterator[None]:
    """Evaluation mode, no gradients; state and random numbers afterwards as if nothing had run."""
    devices = list({leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"})
    with models.state_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        yield
