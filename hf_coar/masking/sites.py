"""Where gates enter a forward pass: the output or input of a module, its weight while it runs, or an attention inside.

`output = end + gate * (output - end)`, where the end is what an ablated component leaves: the bias, which stays when
the slice of the weight is zero, or what stands in for it. A gate of 1 leaves the value bit for bit, a gate of 0 leaves
the end bit for bit (both are ends of `torch.lerp`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hf_coar.components import Group
from hf_coar.errors import CoarError
from hf_coar.masking.passing import Pass, cannot_tell
from hf_coar.masking.places import Layout
from hf_coar.models import offloading
from hf_coar.models.ragged import Packing

Pairs = Sequence[tuple[Group, Tensor]]
Install = Callable[[str, nn.Module, Pairs, Pass], Callable[[], None]]


def replace_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Put `make(forward)` in the place of a module's forward; returns what puts the original back."""
    own = module.__dict__.get("forward")  # there where accelerate, say, has wrapped it before
    original = module.forward
    wrapped = make(original)
    # Libraries look at a forward's signature.
    wrapped.__wrapped__ = original
    module.__dict__["forward"] = wrapped

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    return restore


def gate_outputs(name: str, module: nn.Module, pairs: Pairs, state: Pass) -> Callable[[], None]:
    """A forward hook."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if state.idle:
            return None
        run, bias = state.run(f"{name}:output"), offloading.of_module(module, "bias")
        for group, gate in pairs:
            output = state.gated(group, gate, output, lambda: state.place(name, run, "outputs"), bias, told=True)
        return output

    # Before the user's hooks: what they return is not what the weight produced.
    return module.register_forward_hook(hook, prepend=True).remove


def gate_inputs(name: str, module: nn.Module, pairs: Pairs, state: Pass) -> Callable[[], None]:
    """A forward pre-hook."""

    def hook(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict] | None:
        if state.idle:
            return None
        run = state.run(f"{name}:input")
        key = None if inputs else next(iter(named))
        activation = inputs[0] if key is None else named[key]
        for group, gate in pairs:
            activation = state.gated(group, gate, activation, lambda: state.place(name, run, "inputs"))
        return ((activation, *inputs[1:]), named) if key is None else (inputs, {**named, key: activation})

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def gate_weights(name: str, module: nn.Module, pairs: Pairs, state: Pass) -> Callable[[], None]:
    """The module runs with its weight scaled; where every example has its own gates, inside a loop over examples."""
    return replace_forward(module, lambda forward: with_scaled_weights(module, forward, pairs, state))


def with_scaled_weights(
    module: nn.Module, forward: Callable[..., Any], pairs: Pairs, state: Pass
) -> Callable[..., Any]:
    """A module's forward with weights inside it, wherever they are, scaled by their gates while it runs."""
    holders = {group.parameter: _holders(module, state.weights[group.parameter]) for group, _ in pairs}

    def gated_forward(*args: Any, **kwargs: Any) -> Any:
        if state.idle:
            return forward(*args, **kwargs)
        swaps = []
        for group, gate in pairs:
            shared = state.shared(gate)
            if shared is None:
                raise cannot_tell(group)
            swaps.append((holders[group.parameter], group.scaled(state.weights[group.parameter], shared)))
            state.fired(group)
        with _swapped(swaps):
            return forward(*args, **kwargs)

    return gated_forward


Holder = tuple[Any, Any]  # a mapping or list, and the key of the weight in it


def _holders(module: nn.Module, weight: Tensor) -> list[Holder]:
    """All the places inside a module where it keeps this very weight."""
    found: list[Holder] = []
    for inner in module.modules():
        found += [(inner._parameters, key) for key, value in inner._parameters.items() if value is weight]
        # Recurrent layers read a list of their own.
        flat = inner.__dict__.get("_flat_weights", ())
        found += [(flat, index) for index, value in enumerate(flat) if value is weight]
    return found


@contextmanager
def _swapped(swaps: Sequence[tuple[list[Holder], Tensor]]) -> Iterator[None]:
    """Other tensors stand where the weights were."""
    undo = [(holder, key, holder[key]) for places, _ in swaps for holder, key in places]
    try:
        for places, tensor in swaps:
            for holder, key in places:
                holder[key] = tensor
        yield
    finally:
        for holder, key, original in undo:
            holder[key] = original


class _Intercept(TorchFunctionMode):
    """While this is on, the library's attention function is ours."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every torch function comes by here."""
        attends = func is F.multi_head_attention_forward
        return (self._attend if attends else func)(*args, **(kwargs or {}))


class _Attention:
    """The forward of one `nn.MultiheadAttention` while its projections are gated, by one block or several around it.

    Attributes:
        layers: of every block, the outermost first: groups and gates by (parameter inside the module, side); its pass.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.layers: list[tuple[dict[tuple[str, str], tuple[Group, Tensor]], Pass]] = []

    def intercepting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward, in which the library's attention function is `attend`."""

        def intercepted(*args: Any, **kwargs: Any) -> Any:
            if all(passing.idle for _, passing in self.layers):
                return original(*args, **kwargs)
            with _Intercept(self.attend):
                return original(*args, **kwargs)

        intercepted.gate_layers = self.layers
        return intercepted

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, n_heads: int, weight: Tensor | None,
        bias: Tensor | None, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout: float, out_weight: Tensor,
        out_bias: Tensor | None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """`F.multi_head_attention_forward` with gated projections."""
        runs = [passing.run(f"{self.name}:attention") for _, passing in self.layers]
        inputs = (query, key, value)
        if kwargs.pop("use_separate_proj_weight", False):
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            biases = (None,) * 3 if bias is None else bias.split(width)
            rows = zip(names, inputs, biases, range(3), strict=True)
            projected = [self._project(n, x, kwargs[n], b, runs, leaf) for n, x, b, leaf in rows]
        elif query is key and key is value:
            projected = self._project("in_proj_weight", query, weight, bias, runs, 0).split(width, dim=-1)
        else:
            thirds = [slice(width * leaf, width * (leaf + 1)) for leaf in range(3)]
            whole = enumerate(zip(inputs, thirds, strict=True))
            projected = [self._project("in_proj_weight", x, weight, bias, runs, i, of)[..., of] for i, (x, of) in whole]
        identity = torch.eye(width, dtype=query.dtype, device=query.device)
        kwargs.update(dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), identity))
        mixed, attention = F.multi_head_attention_forward(
            *projected, width, n_heads, None, None, bias_k, bias_v, add_zero_attn, dropout, identity, None,
            use_separate_proj_weight=True, **kwargs,
        )  # fmt: skip
        return self._project("out_proj.weight", mixed, out_weight, out_bias, runs, 0), attention

    def _project(
        self, part: str, x: Tensor, weight: Tensor, bias: Tensor | None, runs: Sequence[int], leaf: int,
        of: slice = slice(None),
    ) -> Tensor:  # fmt: skip
        active = [(*layer, run) for layer, run in zip(self.layers, runs, strict=True) if not layer[1].idle]
        for by_place, passing, run in active:
            if (part, "input") in by_place:
                x = passing.gated(*by_place[part, "input"], x, self._where(passing, run, leaf))
        y = F.linear(x, weight, bias)
        for by_place, passing, run in active:
            if (part, "output") in by_place:
                y = passing.gated(*by_place[part, "output"], y, self._where(passing, run, leaf), bias, of=of)
        return y

    def _where(self, passing: Pass, run: int, leaf: int) -> Callable[[], Layout | None]:
        return partial(_positions_first, self.module, self.name, passing, run, leaf)


def gate_attention(name: str, module: nn.Module, pairs: Pairs, state: Pass) -> Callable[[], None]:
    """`nn.MultiheadAttention` computes all four projections inside one function, out of every hook's reach.

    While the module runs, that function is ours: the projections are made here and gated, and the library's own
    function does the rest with the identity in their place, so that masks, extra keys and returned weights stay its
    business, and the module's forward (or what a user put in its place) stays what it is.
    """
    layer = ({_projection(group): (group, gate) for group, gate in pairs}, state)
    current = module.__dict__.get("forward")
    if hasattr(current, "gate_layers"):  # a block inside a block: both are to act
        current.gate_layers.append(layer)
        return lambda: current.gate_layers.pop()  # blocks end in the reverse order
    attention = _Attention(name, module)
    attention.layers.append(layer)
    # A fused kernel of the layer around it would pass the module by.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    undo = replace_forward(module, attention.intercepting)

    def restore() -> None:
        undo()
        torch.backends.mha.set_fastpath_enabled(fused)

    return restore


def _positions_first(module: nn.Module, name: str, state: Pass, run: int, leaf: int) -> Layout | None:
    """Where the examples are inside the library's attention function, which wants positions first."""
    place = state.place(name, run, "inputs", leaf)
    if place is None or not module.batch_first or place.axis > 1:
        return place
    return Layout(1 - place.axis, place.example_major)


def _projection(group: Group) -> tuple[str, str]:
    """(parameter inside the module, side) of a group of attention projections."""
    return group.parameter.removeprefix(f"{group.module}.") if group.module else group.parameter, group.site.split()[1]


SITES: dict[str, Install] = {
    "output": gate_outputs,
    "input": gate_inputs,
    "attention": gate_attention,
    "weight": gate_weights,
}


def loop_over_examples(name: str, module: nn.Module, state: Pass) -> Callable[[], None]:
    """The module runs once an example, so that each has the gates of its own however the inside is laid out."""

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def looped(*args: Any, **kwargs: Any) -> Any:
            if state.idle or state.example is not None:
                return forward(*args, **kwargs)
            return one_by_one(name, forward, args, kwargs, state)

        return looped

    return replace_forward(module, make)


def one_by_one(
    name: str, forward: Callable[..., Any], args: tuple, kwargs: dict, state: Pass, packing: Packing | None = None
) -> Any:
    """Run a forward once an example and join what it returns; what was packed is packed anew of each by itself.

    Raises:
        CoarError: what goes in or comes out is not laid out as the probe saw it.
    """
    calls = state.layouts.get(name, [])
    run = state.run(f"{name}:loop")
    call = calls[run] if run < len(calls) else calls[-1]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if len(leaves) != len(call.inputs):
        raise CoarError(f"{name!r} ran on {len(call.inputs)} inputs at first and now on {len(leaves)}; ablate again")
    results = []
    try:
        for example in range(state.n_examples or 0):
            state.example = example
            part = [
                place.take(leaf, state.n_examples, example) if isinstance(place, Layout) else leaf
                for leaf, place in zip(leaves, call.inputs, strict=True)
            ]
            inputs, named = pytree.tree_unflatten(part, spec)
            if packing is not None:
                own = packing.some([example]).inputs
                named = {key: own.get(key, value) for key, value in named.items()}
            results.append(pytree.tree_flatten(forward(*inputs, **named)))
    finally:
        state.example = None
    parts = list(zip(*(result for result, _ in results), strict=True))
    if len(parts) != len(call.outputs):
        raise CoarError(f"{name!r} returned {len(call.outputs)} values at first and now {len(parts)}; ablate again")
    joined = [
        place.join(values) if isinstance(place, Layout) else values[0]
        for values, place in zip(parts, call.outputs, strict=True)
    ]
    return pytree.tree_unflatten(joined, results[0][1])
