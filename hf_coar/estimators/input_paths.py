"""Gradients to the activations of components along a path of inputs, which baselines need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import Components, Group
from hf_coar.errors import CoarError
from hf_coar.estimators.gates import check_differentiable
from hf_coar.masking import MaskedModel
from hf_coar.models.outputs import Output

Watched = list[list[Tensor]]  # the activations of every group, one a run of its module


def check_watchable(components: Components) -> None:
    """Raises `CoarError` if the activations of some components never pass through a module's input or output."""
    hidden = [group.parameter for group in components.groups if group.site not in ("output", "input")]
    if hidden:
        raise CoarError(
            f"the activations of {', '.join(hidden[:8])} are made inside one function and cannot be watched; leave "
            "these modules out with find_components(model, exclude=[…]), or use another method"
        )


@contextmanager
def watching(model: nn.Module, components: Components, differentiable: bool) -> Iterator[Watched]:
    """Inside the block, forward passes note the activations that the components produce (or read)."""
    seen: Watched = [[] for _ in components.groups]
    handles: list[Any] = []
    try:
        for index, group in enumerate(components.groups):
            for name in (group.module, *group.shared_by):
                handles.append(_watch(model.get_submodule(name), group, seen[index], differentiable))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, group: Group, into: list[Tensor], differentiable: bool) -> Any:
    def note(activation: Tensor) -> Tensor:
        if differentiable and not activation.requires_grad:
            activation = activation.detach().requires_grad_()
        into.append(activation)
        return activation.clone()  # what follows may work in place

    if group.site == "output":
        return module.register_forward_hook(lambda module, inputs, output: note(output), prepend=True)

    def before(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        if inputs:
            return (note(inputs[0]), *inputs[1:]), named
        first = next(iter(named))
        return inputs, {**named, first: note(named[first])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


class InputPath:
    """One example at points on the straight line from an all-zero input to it, all points in one batch."""

    def __init__(self, masked: MaskedModel, output: Output, example: data_module.Batch, n_steps: int) -> None:
        """With a batch that holds one example."""
        self.model, self.components, self.output = masked.model, masked.components, output
        self.example, self.n_steps = example, n_steps

    def complete(self) -> Tensor:
        """The output of the example itself, float32 [1]."""
        with torch.no_grad():
            return self.output.of(self.model, self.example)

    def activations(self, offset: float) -> Watched:
        """Activations in the middle of every step (0.5), or at its start (0.0) or end (1.0)."""
        with torch.no_grad(), watching(self.model, self.components, False) as seen:
            self._run(offset)
        return seen

    def gradients(self) -> Watched:
        """Gradients of the output to the activations in the middle of every step, each point's of its own output.

        Raises:
            ModelError: the forward blocks all gradients.
        """
        with torch.enable_grad(), watching(self.model, self.components, True) as seen:
            values = self._run(0.5)
            check_differentiable(values, self.model)
            flat = [activation for of_group in seen for activation in of_group]
            found = iter(torch.autograd.grad(values.sum(), flat, allow_unused=True))
        pairs = [[(activation, next(found)) for activation in of_group] for of_group in seen]
        return [[torch.zeros_like(a) if g is None else g for a, g in of_group] for of_group in pairs]

    def _run(self, offset: float) -> Tensor:
        """Outputs [points]."""
        device = data_module.device_of(self.example)
        points = (torch.arange(self.n_steps, device=device) + offset) / self.n_steps
        batch = data_module.take(self.example, [0] * self.n_steps)
        with _scaled(self.model, batch, points) as inputs:
            return self.output.of(self.model, inputs)


@contextmanager
def _scaled(model: nn.Module, batch: data_module.Batch, points: Tensor) -> Iterator[data_module.Batch]:
    """The batch with its floating-point inputs scaled by the points, or else the token embeddings inside the block."""
    held_back = ("labels", *models.tasks.of(model).targets)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in held_back}
    inputs = [name for name, value in tensors.items() if value.is_floating_point()]
    if inputs:
        scaled = {name: batch[name] * _along(points, batch[name]) for name in inputs}
        yield {**batch, **scaled}
        return
    handle = _embedding(model).register_forward_hook(_scaling(points))
    try:
        yield batch
    finally:
        handle.remove()


def _scaling(points: Tensor) -> Callable[..., Tensor]:
    return lambda module, inputs, output: output * _along(points, output)


def _along(points: Tensor, values: Tensor) -> Tensor:
    return points.to(values.dtype).view(-1, *[1] * (values.dim() - 1))


def _embedding(model: nn.Module) -> nn.Module:
    embedding = models.word_embeddings(model)
    if embedding is None:
        raise CoarError(
            f"{type(model).__name__} has whole-number inputs and no get_input_embeddings(), so that there is no path "
            "from zero to them; use another method"
        )
    return embedding


def total(activations: Sequence[Tensor], group: Group) -> Tensor:
    """Sums over everything but the components, float32 [size]."""
    found = torch.zeros(group.size, device=activations[0].device if activations else None)
    for values in activations:
        features = values.float().movedim(group.feature_axis, 0).flatten(1).sum(1)
        if len(features) != group.size * group.block:
            raise CoarError(
                f"{group.module!r} has {len(features)} features where {group.size} × {group.block} are expected; leave "
                "it out with find_components(model, exclude=[…])"
            )
        found += features.view(group.size, -1).sum(1)
    return found
