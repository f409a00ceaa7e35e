"""Graphs: what a pass does, written down as one flat graph of tensor operations, and what runs that fast.

Hooks, trackers and the tape cost host time in every pass and keep what the graph lets go of as early as it can, and the
operations are the same for other values. So a pass is run on tensors without values and what it does is written down
(`torch.fx.experimental.proxy_tensor.make_fx`), forward and backward. Where a model looks at values, that fails: a graph
depends on nothing but shapes. Weights are the model's own, read in every call, and so may change in place.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from hf_coar.models import calling, checked, fused, launched
from hf_coar.models.holding import state_kept
from hf_coar.models.launched import Operations


def captured(run: Operations, inputs: Sequence[Tensor], model: nn.Module) -> fx.GraphModule:
    """The graph of what is done to inputs of these shapes.

    Args:
        run: a pass.
        inputs: all that it depends on beside the model's weights.
        model: what runs.

    Raises:
        Exception: whatever a model's own code does with tensors that hold no values.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    if not all(isinstance(one, Tensor) for one in inputs):
        raise TypeError("the batch has entries that are no tensors")

    def apart(*values: Tensor) -> tuple[Tensor, ...]:
        # What autograd saves would, as fakes that know their operations, hold the model for good.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            return run(*values)

    with state_kept(model), checked.passed(), calling.unheard(), _torch_quiet():
        graph = make_fx(apart, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    _simplify(graph)
    return graph


def _simplify(graph: fx.GraphModule) -> None:
    """Takes out what does nothing where no gradient is kept."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


@contextmanager
def _torch_quiet() -> Iterator[None]:
    """Torch logs a traceback where an operation cannot be captured; the reason is told in a line of ours."""
    theirs = logging.getLogger("torch._subclasses.fake_tensor")
    before = theirs.level
    theirs.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.setLevel(before)


def quick(graph: fx.GraphModule, inputs: Sequence[Tensor], backend: bool | str, level: int) -> Operations:
    """What runs a graph: on a CUDA device in one launch.

    Args:
        graph: from `captured`.
        inputs: of the shapes that they will always have.
        backend: of `torch.compile`, which gets the whole graph; True: what lies between products is fused, which
            changes numbers by rounding; False: with the same bits.
        level: of the line that says why it is not fused.
    """
    if isinstance(backend, str):
        return _alone(torch.compile(graph, backend=backend))
    run = _alone(fused.fused(graph, inputs, level) if backend else graph)
    return launched.recorded(run, inputs, held(graph)) if launched.are_launched(inputs) else run


def _alone(operations: Operations) -> Operations:
    """Operations by themselves: casts are among them, and are not to be made twice."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            return operations(*inputs)

    return run


def held(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that a graph holds by itself: weights and constants."""
    found = [attrgetter(node.target)(graph) for node in graph.graph.find_nodes(op="get_attr")]
    return [value for value in found if isinstance(value, Tensor)]
