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
from torch.utils.weak import WeakTensorKeyDictionary

from hf_coar import models
from hf_coar.errors import CoarError, ModelError
from hf_coar.masking.outside import Reads
from hf_coar.masking.places import PLAIN, SHARED, UNKNOWN, Call, Layout, Layouts, Packed, Place
from hf_coar.models import calling, failing
from hf_coar.models.ragged import Packing

_PAIR, _TRIPLE = (0, 1), (0, 1, 0)
_LIMIT = 1e4  # larger values in a sketch are masks
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, nn.Module)


@dataclass(frozen=True)
class _Sketch:
    """A small trace of a tensor: its shape and, for every axis that may hold the examples, one number an entry."""

    shape: tuple[int, ...]
    is_float: bool
    entries: Mapping[int, Tensor]
    owners: Mapping[str, Tensor] = field(default_factory=dict)  # of the packing, where the inputs were packed


@dataclass(frozen=True)
class _Plain:
    """A number, a flag, nothing: as it was."""

    value: Any


class _Sketcher:
    """Makes the sketches of one run of a model on `n` examples."""

    def __init__(self, n: int, owners: Mapping[str, Tensor]) -> None:
        self._n, self._owners, self._sizes = n, owners, {len(one) for one in owners.values()}
        self._factors: dict[torch.device, Tensor] = {}
        # What one module gives and others take, such as a mask for every layer, is looked at once.
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, value: Any) -> "_Sketch | _Plain | str":
        if not isinstance(value, Tensor):
            return _Plain(value) if isinstance(value, _PLAIN) else UNKNOWN
        if value.is_inference():  # does not count how often it was written
            return self._sketch(value.detach())
        version, known = self._known.get(value, (-1, None))
        if version != value._version:
            known = self._sketch(value.detach())
            self._known[value] = (value._version, known)
        return known

    def _sketch(self, x: Tensor) -> _Sketch:
        axes = [axis for axis, size in enumerate(x.shape) if size and (size % self._n == 0 or size in self._sizes)]
        entries = {}
        if axes:
            values = x.float().nan_to_num(0.0, _LIMIT, -_LIMIT).clamp_(-_LIMIT, _LIMIT)
            entries = {axis: self._entries(values, axis) for axis in axes}
        return _Sketch(tuple(x.shape), x.is_floating_point(), entries, self._owners)

    def _entries(self, x: Tensor, axis: int) -> Tensor:
        """A weighted sum over all other axes, without moving any, [size of the axis]."""
        before, after = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
        x, factors = x.reshape(before, x.shape[axis], after), self._factors_of(before * after, x.device)
        if before == 1:
            return x[0] @ factors
        if after == 1:
            return factors @ x[:, :, 0]
        return torch.bmm(x, factors.view(before, after, 1)).sum((0, 2))

    def _factors_of(self, count: int, device: torch.device) -> Tensor:
        known = self._factors.get(device)
        if known is None or len(known) < count:
            steps = torch.arange(count, dtype=torch.float32, device=device)
            known = self._factors[device] = torch.cos(steps * 1.7 + 0.3)
        return known[:count]


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
    packed = _packed(pair, triple, axis)
    if packed is not None:
        # Integers among what was packed number the entries of the whole batch, and would be wrong of one example.
        return (packed if pair.is_float else UNKNOWN), _SINGLE
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


def _packed(pair: _Sketch, triple: _Sketch, axis: int) -> Packed | None:
    """The count of the packing that says which entry is whose; of several the one whose values come back."""
    best, least = None, torch.inf
    for name, two in pair.owners.items():
        three = triple.owners[name]
        if (len(two), len(three)) != (pair.shape[axis], triple.shape[axis]) or len(two) == 2:
            continue  # one each is what any batch has
        if axis not in pair.entries or axis not in triple.entries:
            continue
        was, now = pair.entries[axis], triple.entries[axis]
        a, b = was[two == 0], was[two == 1]
        back = ((a, now[three == 0]), (b, now[three == 1]), (a, now[three == 2]))
        if any(len(x) != len(y) for x, y in back):
            continue
        off = max(float((x - y).abs().max()) if len(x) else 0.0 for x, y in back)
        if off <= max(0.05 * float(now.std()), 1e-5 * float(now.abs().max())) and off < least:
            best, least = Packed(axis, of=name), off
    return best


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

    def __init__(self, n: int, packing: Packing | None = None) -> None:
        self._sketch = _Sketcher(n, {} if packing is None else packing.owners)
        self.calls: dict[str, list[list]] = {}

    def inputs(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, dict(kwargs)))
        self.calls.setdefault(name, []).append([[self._sketch(leaf) for leaf in leaves], None])

    def outputs(self, name: str, output: Any) -> None:
        # Of a module that runs inside itself the innermost run ends first.
        for call in reversed(self.calls[name]):
            if call[1] is None:
                call[1] = [self._sketch(leaf) for leaf in pytree.tree_leaves(output)]
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
        outside: names of parameters that are read outside of their modules as well.
    """

    layouts: Layouts
    inert: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)


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
    reads: Reads,
    packing: Packing | None = None,
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
        reads: finds `Probe.outside`.
        packing: how the inputs were packed, if they were.

    Raises:
        CoarError: no input has so many examples; an input that cannot be divided into examples.
        ModelError: the model does not run on a part of the batch.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    divided = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n_examples for leaf in leaves]
    _check_inputs(model, leaves, divided, n_examples, packing)
    two = None if packing is None or n_examples == 1 else _two_packed(packing)
    signature = tuple((tuple(x.shape[1:]), x.dtype) if d else None for x, d in zip(leaves, divided, strict=True))
    signature = (n_examples == 1, _unlike(packing, two), *signature)
    known = _CACHE.setdefault(model, OrderedDict())
    if (key, spec, signature) in known:
        known.move_to_end((key, spec, signature))
        return known[key, spec, signature]
    rows = _two_rows(leaves, divided, n_examples) if n_examples > 1 and two is None else {}

    def some(order: Sequence[int]) -> tuple[tuple, Mapping[str, Any]]:
        if two is not None:
            again = packing.some([two[place] for place in order]).inputs
            return args, {name: again.get(name, value) for name, value in kwargs.items()}
        part = [rows[i][list(order)] if d else leaf for i, (leaf, d) in enumerate(zip(leaves, divided, strict=True))]
        return pytree.tree_unflatten(part, spec)

    def run(order: Sequence[int], recorder: _Recorder | None = None) -> Any:
        inputs, named = some(order)
        if recorder is None:
            return forward(*inputs, **named)
        with recorder.watching(watched):
            recorder.inputs("", inputs, named)
            output = forward(*inputs, **named)
            recorder.outputs("", output)
        return output

    if n_examples == 1:  # one example is everywhere; all that there is to see is which modules run
        with undisturbed(model, leaves), (only := _Recorder(1)).watching(watched), reads.watching(model):
            forward(*args, **kwargs)
        found = Probe(_compare(only, only))
        with undisturbed(model, leaves):
            found.inert = inert(found.layouts, lambda: forward(*args, **kwargs))
            found.outside = reads.outside(lambda: forward(*args, **kwargs))
        return _remember(known, (key, spec, signature), found)
    pair, triple = (
        _Recorder(len(order), None if two is None else packing.some([two[place] for place in order]))
        for order in (_PAIR, _TRIPLE)
    )
    with undisturbed(model, leaves):
        try:
            with reads.watching(model):
                run(_PAIR, pair)
            run(_TRIPLE, triple)
        except failing.RAISED as error:
            if models.is_out_of_memory(error):
                raise  # whoever runs it may try with fewer examples
            _check_runs(model, lambda: forward(*args, **kwargs), {**dict(enumerate(args)), **kwargs})
            raise ModelError(
                f"{type(model).__name__} does not run on two or three examples of the batch, so that gates cannot be "
                f"told apart by example ({type(error).__name__}: {str(error)[:200]}); use one mask for all of them, "
                "[components]"
            ) from error
        found = Probe(_compare(pair, triple))
        found.inert = inert(found.layouts, lambda: run(_PAIR))
        found.outside = reads.outside(lambda: run(_PAIR))
    return _remember(known, (key, spec, signature), found)


def _check_runs(model: nn.Module, forward: Callable[[], Any], inputs: Mapping[Any, Any]) -> None:
    """Raises `ModelError` where the model does not run on the whole batch either, which no mask can mend."""
    try:
        forward()
    except failing.RAISED as error:
        if models.is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run on the batch, whatever is ablated {failing.failure(error, inputs)}"
        ) from error


def _remember(known: OrderedDict[Any, Probe], key: Any, found: Probe) -> Probe:
    known[key] = found
    if len(known) > _KEEP:
        known.popitem(last=False)
    return found


def _two_packed(packing: Packing) -> tuple[int, int]:
    """Two examples with as many different counts as the batch has, by which the counts are told apart."""
    counts = [[int(n) for n in one.bincount(minlength=packing.count)] for one in packing.owners.values()]
    unlike = [sum(of[example] != of[0] for of in counts) for example in range(packing.count)]
    return 0, max(range(1, packing.count), key=unlike.__getitem__)


def _unlike(packing: Packing | None, two: tuple[int, int] | None) -> tuple[bool, ...] | None:
    """Which counts of the two differ."""
    if packing is None or two is None:
        return None
    return tuple(bool((one == two[0]).sum() != (one == two[1]).sum()) for one in packing.owners.values())


def _check_inputs(
    model: nn.Module, leaves: Sequence[Any], divided: Sequence[bool], n_examples: int, packing: Packing | None
) -> None:
    if packing is not None and packing.count != n_examples:
        raise CoarError(f"kept has {n_examples} rows, and {type(model).__name__} sees {packing.count} examples")
    if not any(divided) and packing is None and models.example_alone() is None:
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
def undisturbed(model: nn.Module, leaves: Sequence[Any]) -> Iterator[None]:
    """Evaluation mode, no gradients; state and random numbers afterwards as if nothing had run."""
    devices = list({leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"})
    with calling.probing(), models.state_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        yield
