"""Detached shares: what modules do on ways that no gradient takes, while it arrives at their gates by others.

A branch that is computed under `no_grad`, or a gate that is detached, leaves everything before it with a part of its
gradient, or some components of a module with none: nothing is blocked, nothing is faint, and weights are of another
model. So all gates go a little up and down at random, and outputs must go as far as the gradient says.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.components import Group
from hf_coar.errors import ModelError, NonFiniteOutputError
from hf_coar.masking import MaskedModel
from hf_coar.models.outputs import Output
from hf_coar.runs.checks import Seen, largest, rounding

_LEVEL = 0.95  # of all gates
# Steps of theirs, of which the second is to say what the first one does: what is detached stays, curvature goes, and
# rounding grows. On 287 tiny random architectures two misses of a thirtieth and more differed by a third at least, and
# where something was detached by a thousandth.
_STEPS = (0.005, 0.001)
# Of what the gradient says, in norms over components and examples: of all groups together, and of one by itself.
_LOOK, _MISSED = 0.05, 0.2
_ALIKE = 0.1
_DIGITS = 5e-7  # of outputs and logits, which are of float32
_PRECISE = 1e-3  # rounding, beyond which steps tell nothing


def found(masked: MaskedModel, output: Output, batch: data_module.Batch) -> list[Group]:
    """The groups whose gradient leaves out part of what their gates do; as a rule after three passes.

    Args:
        masked: the model with its components, frozen.
        output: that is differentiated.
        batch: a few examples, on the model's device.
    """
    if rounding(masked.model) > _PRECISE:
        return []
    try:
        return _Steps(masked, output, batch).missed()
    except (ModelError, NonFiniteOutputError):  # a run has other gates, and says what is wrong
        return []


class _Steps:
    """Small steps of the gates of a model on a few examples, beside what the gradient says of them."""

    def __init__(self, masked: MaskedModel, output: Output, batch: data_module.Batch) -> None:
        """One pass forward and backward."""
        self.masked, self.output, self.batch = masked, output, batch
        device, generator = data_module.device_of(batch), torch.Generator().manual_seed(0)
        shapes = [(data_module.size(batch), size) for size in masked.components.sizes()]
        self.ways = [(2 * torch.randint(2, shape, generator=generator) - 1).to(device) for shape in shapes]
        self.gates = [torch.full(shape, _LEVEL, device=device, requires_grad=True) for shape in shapes]
        seen = Seen(output)
        with torch.enable_grad():
            values = self._outputs(self.gates, seen.noting)
            if not values.requires_grad:
                raise ModelError("no gradient")
            slopes = torch.autograd.grad(values.sum(), self.gates, allow_unused=True)
        pairs = zip(self.gates, slopes, strict=True)
        self.slopes = [torch.zeros_like(gate) if slope is None else slope for gate, slope in pairs]
        with torch.no_grad():
            self.rounding = max(_DIGITS * largest(values), seen.moved(_DIGITS) if seen.logits else 0.0)

    def _outputs(self, gates: Sequence[Tensor], output: Output | None = None) -> Tensor:
        with self.masked.gated(gates):
            return (output or self.output).of(self.masked.model, self.batch)

    def missed(self) -> list[Group]:
        """The groups of which enough is missed; each is looked at by itself only if all together miss something."""
        everywhere = range(len(self.gates))
        if not self._misses(everywhere, _LOOK * self._size(everywhere)):
            return []
        least = self._size(everywhere) / len(self.gates)  # those that do next to nothing may be off by anything
        bounds = ((number, _MISSED * max(least, self._size([number]))) for number in everywhere)
        return [self.masked.components.groups[number] for number, bound in bounds if self._misses([number], bound)]

    def _size(self, numbers: Sequence[int]) -> float:
        """How far the gradient says that a step of some groups' gates goes at random."""
        return float(sum(self.slopes[number].double().square().sum() for number in numbers)) ** 0.5

    def _misses(self, numbers: Sequence[int], bound: float) -> bool:
        """Whether steps of some groups' gates go further off than a bound, and two lengths of steps alike."""
        off = self._off(numbers)
        first = next(off)
        if not float(first.norm()) > max(bound, len(first) * self.rounding / _STEPS[0]):
            return False
        second = next(off)
        return float((first - second).norm()) < _ALIKE * min(float(first.norm()), float(second.norm()))

    def _off(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        """What the gradient misses of the slope along the way of some groups, float64 [examples], by a step each."""
        said = sum((self.slopes[number] * self.ways[number]).double().sum(1) for number in numbers)
        for step in _STEPS:
            ends = [self._stepped(numbers, sign * step) for sign in (1, -1)]
            yield (ends[0] - ends[1]) / (2 * step) - said

    @torch.no_grad()
    def _stepped(self, numbers: Sequence[int], step: float) -> Tensor:
        gates = list(self.gates)
        for number in numbers:
            gates[number] = (gates[number] + step * self.ways[number]).requires_grad_()
        return self._outputs(gates).double()


def warning(groups: Sequence[Group], n_groups: int) -> str:
    """What a person must know, and do."""
    names = ", ".join(group.module or group.parameter for group in groups[:4]) + (" …" if len(groups) > 4 else "")
    return (
        f"the gradient leaves out part of what {len(groups)} of {n_groups} modules do ({names}): closing their gates a "
        "little changes the output by something else than it says, as where a branch behind them is detached or under "
        "no_grad; let the gradient through, or take method=hf_coar.Regression() or hf_coar.baselines.LeaveOneOut(), "
        "which need none"
    )
