"""Rules: which components to ablate first. A rule takes the weights of both sides and returns all components in order.

A new rule takes four lines, and is then known to `edit(rule=…)`, to `rank_components` and to `RULES`::

    from hf_coar import editing

    @editing.rule("largest_gain")
    def largest_gain(sides):
        return editing.best_first(sides.gain)

Notation: T = targets, R = references, w = weights; *gain* = by how much the targets' outputs are expected to move the
way they should, -s · mean_T w with s = +1 to raise and -1 to lower; *harm* = by how much those of the references are
expected to fall, mean_R w. Ablating component i changes an output by -w_i.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_coar.storage.registry import Registry

# A component without any effect has neither difference nor spread.
_TINY = torch.finfo(torch.float32).tiny

_FORWARD_STEPS = 200  # components that a forward selection chooses one by one; the others follow by their own worth


@dataclass(frozen=True)
class Sides:
    """What a rule sees.

    Attributes:
        targets: sets of targets, (+1 to raise or -1 to lower their outputs, float64 weights [examples, components]).
            Every set counts alike, however many examples it holds.
        reference: float64 weights [examples, components] of the examples to spare.
        reference_outputs: float64 [examples], what the attributions expect with nothing ablated.
        boundary: the output at which right turns into wrong; None where no value does, as of log-probabilities.
        goal: how far the gain is to go; None = as far as the references allow.
    """

    targets: Sequence[tuple[int, Tensor]]
    reference: Tensor
    reference_outputs: Tensor
    boundary: float | None = 0.0
    goal: float | None = None

    @cached_property
    def gain(self) -> Tensor:
        """Float64 [components]: how far ablating each moves the targets the right way; mean over the sets."""
        return torch.stack([-sign * weights.mean(0) for sign, weights in self.targets]).mean(0)

    @cached_property
    def harm(self) -> Tensor:
        """Float64 [components]: by how much ablating each lowers the references' outputs, on average."""
        return self.reference.mean(0)

    def until_goal(self, order: Tensor) -> Tensor:
        """The first components of an order that are expected to reach the goal; none where all of them don't."""
        reached = self.gain[order].cumsum(0) >= (self.goal or 0.0)
        return order[: int(reached.long().argmax()) + 1 if bool(reached.any()) else 0]


Rule = Callable[[Sides], Tensor]

RULES: Registry[Rule] = Registry("rule")


def rule(name: str, replace: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: makes a function (sides) -> int64 [components], the best to ablate first, known as `rule=name`.

    A name that is taken is an error, unless the same function is defined again (a cell of a notebook that runs again)
    or `replace=True` puts this one in its place.
    """
    return RULES.register(name, replace=replace)


def best_first(score: Tensor) -> Tensor:
    """Components by falling score [components], of equals the first one first; int64 [components]."""
    return score.argsort(descending=True, stable=True)


def welch_scores(weights: Tensor, targets: Sequence[int], reference: Sequence[int]) -> Tensor:
    """Welch's t of every component, targets against references (Shah, Ilyas, Mądry 2024, section 5).

    Args:
        weights: float32 [examples, components].
        targets: indices of examples; a single one is allowed.
        reference: indices of examples.

    Returns:
        float64 [components]; ablating the lowest raises the targets' outputs, ablating the highest lowers them.
    """
    return _welch(weights[list(targets)].double(), weights[list(reference)].double())


def _welch(targets: Tensor, reference: Tensor) -> Tensor:
    return (targets.mean(0) - reference.mean(0)) / _standard_error(targets, reference)


def _standard_error(targets: Tensor, reference: Tensor) -> Tensor:
    """Standard error of the difference of the means, with population variances as in the paper."""
    variance = targets.var(0, correction=0) / len(targets) + reference.var(0, correction=0) / len(reference)
    return variance.sqrt().clamp_min(_TINY)


@rule("welch")
def welch(sides: Sides) -> Tensor:
    """The paper's: Welch's t between targets and references.

    To raise outputs, its numerator adds the harm to the gain: it likes what damages the references, as long as it does
    so evenly.
    """
    return best_first(sum(-sign * _welch(weights, sides.reference) for sign, weights in sides.targets))


@rule("penalised")
def penalised(sides: Sides) -> Tensor:
    """Gain - mean_R |w|: bolder than `covariance`, for a handful of targets such as the pairs of `match`."""
    return best_first(sides.gain - sides.reference.abs().mean(0))


@rule("covariance")
def covariance(sides: Sides) -> Tensor:
    """Forward selection of the best ratio of gain and drift of the references, `forward_selection`.

    With rho .02, or towards a goal with that rho under which reaching it is expected to move the references least.
    """
    orders = [forward_selection(sides, rho) for rho in ((0.02,) if sides.goal is None else _NOISES)]
    return orders[0] if len(orders) == 1 else min(orders, key=lambda order: _drift_at_goal(sides, order))


# Little noise takes many components that gain little, which got few examples of a text classifier right; much takes few
# that cost a ViT's other images. What the forecast chooses among them is what scripts/edit_rivals.py fix tabulates.
_NOISES = (0.02, 0.1, 0.5, 2.0)


def _drift_at_goal(sides: Sides, order: Tensor) -> float:
    chosen = sides.until_goal(order)
    moved = sides.reference[:, chosen].sum(1)
    return float(mean_square(moved, _importance(sides))) if len(chosen) else torch.inf


# What `rule="auto"` tries: the two that won most. Nine of them on 120 validation examples once cost 6.4 points where
# two cost 3.6, and Welch's score alone 4.3: the best of many looks better than it is.
AUTO = ("covariance", "welch")


def mean_square(changes: Tensor, importance: Tensor) -> Tensor:
    """Weighted mean square over the references, [references, …] -> [any]."""
    return importance @ changes.square() / len(changes)


def forward_selection(sides: Sides, rho: float, drift: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Adds one component after the other, so that components that harm the same references do not come together.

    Every step takes the one that makes (sum of gains) / sqrt(drift + rho · noise) largest. The drift is the mean square
    of the references' expected changes, in which references near the boundary between right and wrong count more;
    the noise grows with the number of components, as their weights are estimates.

    Args:
        sides: targets and references.
        rho: how much noise; larger = closer to the plain order by gain and spread.
        drift: (changes [references, any], importance [references]) -> how far the references move [any], positive
            changes being falls of their outputs; by default the mean square.

    Returns:
        int64 [components]; components that are not expected to help come last.
    """
    reference, gain = sides.reference, sides.gain
    importance = _importance(sides)
    alone = mean_square(reference, importance)
    noise = rho * float(alone.mean())

    def drift_with_each(moved: Tensor) -> Tensor:
        if drift is not None:
            return drift(moved[:, None] + reference, importance)
        # The square of the sum by its parts: nothing as large as all references times all components is made.
        together = mean_square(moved, importance) + 2 * (importance * moved) @ reference / len(reference) + alone
        return together.clamp_min(0)

    moved, total = torch.zeros(len(reference), dtype=torch.float64), 0.0
    allowed = gain > 0
    chosen: list[int] = []
    for step in range(1, min(_FORWARD_STEPS, int(allowed.sum())) + 1):
        ratio = (total + gain) / (drift_with_each(moved) + noise * step).sqrt().clamp_min(_TINY)
        best = int(torch.where(allowed, ratio, -torch.inf).argmax())
        chosen.append(best)
        allowed[best] = False
        moved, total = moved + reference[:, best], total + float(gain[best])
    at_first = drift_with_each(torch.zeros_like(moved))
    order = best_first(gain / (at_first + noise).sqrt().clamp_min(_TINY))
    left = torch.ones(len(gain), dtype=torch.bool)
    left[chosen] = False
    return torch.cat([torch.tensor(chosen, dtype=torch.long), order[left[order]]])


def _importance(sides: Sides) -> Tensor:
    """How much every reference counts, mean 1: the more the nearer it is to the boundary between right and wrong.

    The scale is half the typical distance. Without a boundary all count alike: slopes of log-probabilities, say, are
    small by themselves where an example is safe.
    """
    if sides.boundary is None:
        return torch.ones_like(sides.reference_outputs)
    distance = (sides.reference_outputs - sides.boundary).abs()
    scale = distance.median().clamp_min(_TINY) / 2
    importance = torch.sigmoid(-distance / scale).clamp_min(1e-6)
    return importance / importance.mean()
