"""Checks of a model before the first pass, on a few examples: that it repeats itself, and that gradients arrive."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Group
from hf_coar.errors import ModelError
from hf_coar.masking import MaskedModel
from hf_coar.models import failing, is_out_of_memory
from hf_coar.models.outputs import Output

logger = logging.getLogger(__name__)

N_EXAMPLES = 4  # enough that a layer of a few ReLUs, all of them off for one example, is on for another
# Of the largest output; scripts/measure_identity.py shows how far two forwards are apart. Kernels of a GPU that add up
# in any order move the last bits, dropout or a random mask the first ones.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}
_ROUNDING_OF_HALF = 3e-2
_LEVELS = (0.8, 0.4)  # of all gates: a group is blocked only if it has no gradient at either
_NAMED = 8
_DRAWS = 8  # of rounding: one alone may move both sides of a difference alike


def check_repeats(model: nn.Module, output: Output, batch: data_module.Batch) -> None:
    """Two equal forwards.

    Args:
        model: frozen.
        output: that is attributed.
        batch: a few examples, on the model's device.

    Raises:
        ModelError: they differ.
    """
    seen = Seen(output)
    with torch.no_grad():
        first, second = (seen.noting.of(model, batch) for _ in range(2))
    tolerance = rounding(model)
    if first.shape == second.shape:
        first, second = first.double(), second.double()
        difference = float((first - second).abs().nan_to_num(0).max())
        if difference <= tolerance * largest(first) or difference <= seen.allowed(first, tolerance):
            return
        found = f"output {output.name!r} differs by {difference:.3g}, where the largest is {largest(first):.3g}"
    else:
        found = f"output {output.name!r} has the shapes {list(first.shape)} and {list(second.shape)}"
    raise ModelError(
        f"stochastic forward: {type(model).__name__} gives two results for the same examples in evaluation mode "
        f"({found}); it draws random numbers (F.dropout without training=self.training, a random mask) or keeps a "
        "state: make its forward repeatable, or have it seed itself"
    )


def blocked(masked: MaskedModel, output: Output, batch: data_module.Batch) -> list[Group]:
    """The groups that matter to the output although no gradient of it reaches their gates.

    Args:
        masked: the model, frozen, with its components.
        output: what is differentiated.
        batch: some examples, on the model's device.
    """
    suspects, tolerance = list(masked.components.groups), rounding(masked.model)
    for level in _LEVELS:
        reached = _reached(masked, output, batch, level)
        if reached is None:
            break
        suspects = [group for group in suspects if group.parameter not in reached]
        if not suspects:
            return []
    seen = Seen(output)
    with torch.no_grad():
        plain = seen.noting.of(masked.model, batch)
        allowed = seen.allowed(plain, tolerance)
        # As a rule none of them matters (modules that do not run for these examples), and one pass says so.
        if _same(plain, _ablated(masked, output, suspects, batch), allowed):
            return []
        suspects = [one for one in suspects if not _same(plain, _ablated(masked, output, [one], batch), allowed)]
        if masked.components.stand_in is not None:
            # What stands in may be what is there: partners with one decoder prompt have the same first decoder layer.
            suspects = [one for one in suspects if not _same(plain, _replaced(masked, output, one, batch), allowed)]
    return suspects


def check_reached(masked: MaskedModel, output: Output, batch: data_module.Batch) -> None:
    """Raises `ModelError` if a gradient of the output does not reach some groups, see `blocked`."""
    groups = blocked(masked, output, batch)
    if groups:
        names = ", ".join(group.module for group in groups[:_NAMED]) + (" …" if len(groups) > _NAMED else "")
        raise ModelError(
            f"no gradient reaches the gates of {len(groups)} of {len(masked.components.groups)} modules of "
            f"{type(masked.model).__name__}: {names}; its forward blocks it (detach, "
            "no_grad, rounding, integer kernels or numpy inside), or its backward fails. Use a method that needs none, "
            "such as hf_coar.Regression(), or exclude these modules"
        )


def _reached(masked: MaskedModel, output: Output, batch: data_module.Batch, level: float) -> set[str] | None:
    """Parameters of the groups at whose gates a gradient arrives; None, and a warning, where the backward fails."""
    device = data_module.device_of(batch)
    sizes = [(data_module.size(batch), size) for size in masked.components.sizes()]  # as in the passes of a run
    gates = [torch.full(size, level, device=device, requires_grad=True) for size in sizes]
    with torch.enable_grad():
        with masked.gated(gates):
            values = output.of(masked.model, batch)
        if not values.requires_grad:
            return set()
        # Of every example alone: what it moves up may move another one down.
        signs = torch.linspace(1, 2, len(values), device=values.device)
        try:
            gradients = torch.autograd.grad((values * signs).sum(), gates, allow_unused=True)
        except failing.RAISED as error:
            if is_out_of_memory(error):
                raise
            logger.warning(
                "the backward of %s fails (%s), as it does through a kernel of one's own without a derivative, or "
                "torch.utils.checkpoint, which the model had better not call in evaluation mode",
                type(masked.model).__name__, failing.first_line(error),
            )  # fmt: skip
            return None
    found = zip(masked.components.groups, gradients, strict=True)
    return {group.parameter for group, gradient in found if gradient is not None and bool((gradient != 0).any())}


def _ablated(masked: MaskedModel, output: Output, groups: Sequence[Group], batch: data_module.Batch) -> Tensor:
    """Outputs with zero in the place of whole groups, whatever stands in: whether they matter at all."""
    with masked.zeroing.ablated(_without(masked, groups)):
        return output.of(masked.model, batch)


def _replaced(masked: MaskedModel, output: Output, group: Group, batch: data_module.Batch) -> Tensor:
    """Outputs with what stands in for a group in its place."""
    with masked.ablated(_without(masked, [group]), how="hooks"):
        return output.of(masked.model, batch)


def _without(masked: MaskedModel, groups: Sequence[Group]) -> Tensor:
    """The mask that ablates whole groups, bool [components]."""
    names = {group.parameter for group in groups}
    return torch.cat([torch.full((group.size,), group.parameter not in names) for group in masked.components.groups])


def _same(one: Tensor, other: Tensor, allowed: float) -> bool:
    """Equal but for rounding: a weight of zeros may be multiplied by another kernel."""
    return float((one.double() - other.double()).abs().nan_to_num(torch.inf).max()) <= allowed


def noting(output: Output, logits: list[Tensor], rest: "list[Callable[[Tensor], Tensor]] | None" = None) -> Output:
    """The output, which puts the logits that it is given into a list, and what it makes of others into another."""
    if output.takes != "logits":
        return output

    def function(found: Tensor, *args: Any, **options: Any) -> Tensor:
        logits.append(found)
        if rest is not None:
            rest.append(lambda others: output.function(others, *args, **options))
        return output.function(found, *args, **options)

    return replace(output, function=function)


class Seen:
    """An output with the logits that it was made of, which tell what rounding may move it by.

    Attributes:
        noting: the output, which notes them whenever the model runs.
        logits: so far.
    """

    def __init__(self, output: Output) -> None:
        """Nothing has run yet."""
        self.logits: list[Tensor] = []
        self._rest: list[Callable[[Tensor], Tensor]] = []
        self.noting = noting(output, self.logits, self._rest)

    def allowed(self, values: Tensor, tolerance: float) -> float:
        """What rounding may move outputs by: a share of the largest, and of small ones what rounded logits make of it.

        Small ones may be differences of logits, and may be probabilities, of which it moves the last digits alone. No
        more than a share of 1, or of smaller logits: they may hold what masks a class out. Where there are none, of 1.
        """
        unit = min([1.0, *map(largest, self.logits[:1])])
        small = largest(values) < unit and self.logits
        return max(tolerance * largest(values), min(tolerance * unit, self.moved(tolerance) if small else torch.inf))

    def moved(self, tolerance: float) -> float:
        """How far the outputs go where the first logits, of which there must be some, are off by so much of them."""
        logits, generator = self.logits[0], torch.Generator().manual_seed(0)
        noise = tolerance * logits.nan_to_num(0, 0, 0).abs().clamp_min(min(1.0, largest(logits)))
        whole, width = self._rest[0](logits), logits.shape[-1]
        steps = (torch.randn(width, generator=generator).to(logits.device) for _ in range(_DRAWS))
        return max(largest(self._rest[0](logits + noise * step) - whole) for step in steps)


def largest(values: Tensor) -> float:
    """The largest absolute value that is a number."""
    return float(values.double().abs().nan_to_num(0, 0, 0).max())


def rounding(model: nn.Module) -> float:
    """What rounding may move, by the least precise of the weights."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max((_ROUNDING.get(dtype, _ROUNDING_OF_HALF) for dtype in dtypes), default=_ROUNDING_OF_HALF)
