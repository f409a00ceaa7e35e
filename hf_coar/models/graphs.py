"""Graphs: what a pass does, written down as one flat graph of tensor operations, and what runs that fast.

Hooks, trackers and the tape cost host time in every pass and keep what the graph lets go of as early as it can, and the
operations are the same for other values. So a pass is run and what it does is written down (`written`), forward and
backward. Where a model looks at values, that fails: a graph depends on nothing but shapes. Weights are the model's own,
read in every call, and so may change in place.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from hf_coar.models import calling, checked, fused, launched, written
from hf_coar.models.holding import state_kept
from hf_coar.models.launched import Operations


def captured(run: Operations, inputs: Sequence[Tensor], model: nn.Module, n_given: int = 0) -> fx.GraphModule:
    """The graph of what is done to inputs of these shapes.

    Args:
        run: a pass.
        inputs: all that it depends on beside the model's weights.
        model: what runs.
        n_given: how many inputs may be looked at, see `written`.

    Raises:
        ModelError: it looks at values of others.
        Exception: whatever stands against it in a model's own code.
    """
    if not all(isinstance(one, Tensor) for one in inputs):
        raise TypeError("the batch has entries that are no tensors")

    with state_kept(model), checked.passed(), calling.unheard():
        graph = written.written(run, inputs, n_given)
    _simplify(graph)
    return graph


def _simplify(graph: fx.GraphModule) -> None:
    """Takes out what does nothing where no gradient is kept."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def compiled(graph: fx.GraphModule, inputs: Sequence[Tensor], backend: bool | str, level: int) -> nn.Module:
    """The graph, compiled.

    Args:
        graph: from `captured`.
        inputs: of the shapes that they will always have.
        backend: of `torch.compile`, which gets the whole graph; True: what lies between products is fused, which
            changes numbers by rounding; False: as it is, with the same bits.
        level: of the line that says why it is not fused.
    """
    if isinstance(backend, str):
        return torch.compile(graph, backend=backend)
    return fused.fused(graph, inputs, level) if backend else graph


def replay(graph: nn.Module, inputs: Sequence[Tensor]) -> Operations:
    """What runs a graph, compiled or not: on a CUDA device in one launch, unless a backend of one's own compiled it."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Casts are part of the graph, and are not to be made twice.
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            return graph(*inputs)

    if not isinstance(graph, fx.GraphModule) or not launched.are_launched(inputs):
        return run
    return launched.recorded(run, inputs, held(graph))


def held(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that a graph holds by itself: weights and constants."""
    found = [attrgetter(node.target)(graph) for node in graph.graph.find_nodes(op="get_attr")]
    return [value for value in found if isinstance(value, Tensor)]


# --------------------------------------------------------------------------------------------------- for other runs

_MOST = 8  # graphs of a model that are kept, of some thousand operations each; weights and shapes are not theirs


@dataclass(frozen=True)
class _Known:
    """A graph, and the tensors of its model when it was made: what they held then is not in it, but where they are."""

    graph: nn.Module
    state: list[tuple[Tensor, Hashable]]


# A graph holds weights of its model and not the model, so that it goes with the model.
_KNOWN: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Known]] = WeakKeyDictionary()


def keep(model: nn.Module, key: Hashable, graph: nn.Module) -> None:
    """Keep a graph for other runs of the same model object; `key` is all that it depends on beside the model."""
    known = _KNOWN.setdefault(model, OrderedDict())
    known[key] = _Known(graph, _state(model))
    while len(known) > _MOST:
        known.popitem(last=False)


def known(model: nn.Module, key: Hashable) -> nn.Module | None:
    """The graph that was kept; None where there is none, or one of other tensors than the model has now."""
    found = _KNOWN.get(model, {}).get(key)
    if found is None:
        return None
    now = _state(model)
    same = len(now) == len(found.state) and all(
        one is other and described == was for (one, described), (other, was) in zip(now, found.state, strict=True)
    )
    if not same:
        forget(model, key)  # it holds tensors that the model has no more
    return found.graph if same else None


def forget(model: nn.Module, key: Hashable) -> None:
    """Keep a graph no longer."""
    _KNOWN.get(model, {}).pop(key, None)


def described(value: Any) -> Hashable:
    """What a graph knows of a tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = value.stride() if value.layout is torch.strided else value.layout
    return tuple(value.shape), layout, value.dtype, value.device


def _state(model: nn.Module) -> list[tuple[Tensor, Hashable]]:
    return [(one, described(one)) for one in (*model.parameters(), *model.buffers())]
