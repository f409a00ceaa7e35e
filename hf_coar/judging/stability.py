"""Stability: how far attributions would come out the same from other draws of masks or gates.

From one run with standard errors, `reliability` says what correlation to expect between two such runs; from two runs of
different seeds, `agreement` measures it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions import Attributions
from hf_coar.errors import CoarError, check_count
from hf_coar.runs.fidelity import correlation


def reliability(attributions: Attributions) -> Tensor:
    """The share of an example's variance over components that is not noise of the estimate, float32 [examples].

    1 - mean squared noise / variance of the weights over the components, where noise is what of the standard errors
    another seed would change. It is the correlation to be expected between these weights and those of another seed (the
    reliability of classical test theory; Lord, Novick 1968), and its square root the one with the weights that endless
    computing would give. 1 = no noise; 0 or below = nothing but
    noise. NaN where an example's weights are all the same.

    Raises:
        CoarError: there are no standard errors.
    """
    errors = attributions.standard_errors
    if errors is None:
        raise CoarError(
            f"attributions by {attributions.provenance.method_name} have no standard errors, so one run does not tell "
            "how stable they are; attribute again with another seed, and use hf_coar.stability.agreement(first, second)"
        )
    weights = attributions.weights
    variance = weights.double().var(dim=1, correction=0)
    noise = attributions.provenance.of_this_seed(weights, errors).double().square().mean(1)
    return torch.where(variance > 0, 1 - noise / variance, torch.nan).float()


def longer(reliability: Tensor, factor: float) -> Tensor:
    """The reliability of a run with `factor` times as many rounds (Spearman 1910, Brown 1910), in the shape given.

    Raises:
        CoarError: the factor is not above 0.
    """
    if not factor > 0:
        raise CoarError(f"factor={factor!r}; must be above 0, such as 2 for twice as many rounds")
    return factor * reliability / (1 + (factor - 1) * reliability)


@dataclass(frozen=True)
class Agreement:
    """How well two attributions of the same examples agree.

    Attributes:
        pearson: float32 [examples], correlation of the weights over the components; NaN where one side does not vary.
        spearman: float32 [examples], correlation of their ranks (ties share their mean rank).
        top: float32 [examples], of the `n_top` components with the largest absolute weights on one side, the fraction
            that is among those of the other side.
        n_top: how many components are compared at the top.
    """

    pearson: Tensor
    spearman: Tensor
    top: Tensor
    n_top: int

    def to_json(self) -> dict[str, Any]:
        """Means over the examples, as JSON values; NaN entries are left out of the means."""
        figures = {name: getattr(self, name) for name in ("pearson", "spearman", "top")}
        return {
            "n_examples": len(self.pearson),
            "n_top": self.n_top,
            **{name: _mean(values) for name, values in figures.items()},
        }

    def __str__(self) -> str:
        """One line."""
        figures = self.to_json()
        return (
            f"over {figures['n_examples']} examples: Pearson {figures['pearson'] or float('nan'):.3f}, Spearman "
            f"{figures['spearman'] or float('nan'):.3f}, top {self.n_top} shared {figures['top'] or 0.0:.0%}"
        )


def agreement(first: Attributions, second: Attributions, n_top: int = 20) -> Agreement:
    """Compare two attributions of the same examples and components, such as those of two seeds.

    Args:
        first: by one seed or method.
        second: by another.
        n_top: components compared at the top, or all if there are fewer.

    Raises:
        CoarError: other components, or the same seed and method (which agree by construction).
        DataError: other examples.
    """
    if first.components.groups != second.components.groups:
        raise CoarError(
            f"the attributions are of different components ({len(first.components)} and {len(second.components)}); "
            "compare attributions of the same ones"
        )
    first.identity.check(second.identity)
    if first.provenance.alike(second.provenance):
        raise CoarError(
            f"both attributions have seed {first.provenance.seed} and the same settings, so that they agree by "
            "construction; attribute again with another seed"
        )
    check_count(n_top, "n_top")
    a, b = first.weights.double(), second.weights.double()
    n_top = min(n_top, a.shape[1])
    return Agreement(correlation(a, b, 1), correlation(ranks(a), ranks(b), 1), _shared_top(a, b, n_top), n_top)


def ranks(values: Tensor) -> Tensor:
    """Ranks within each row from 0 on, ties at their mean, float64 [rows, columns]."""
    ordered = values.sort(dim=1).values
    # The first and last place of every value among its row's.
    first = torch.searchsorted(ordered, values.contiguous(), side="left")
    last = torch.searchsorted(ordered, values.contiguous(), side="right") - 1
    return (first + last).double() / 2


def _shared_top(a: Tensor, b: Tensor, n_top: int) -> Tensor:
    tops = [torch.zeros_like(x).scatter(1, x.abs().topk(n_top, dim=1).indices, 1.0) for x in (a, b)]
    return ((tops[0] * tops[1]).sum(1) / n_top).float()


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return mean if mean == mean else None
