"""LASSO: least squares with a penalty on the sum of absolute weights, for few components that matter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.estimators.solvers.base import check, register
from hf_coar.estimators.solvers.design import Design
from hf_coar.estimators.solvers.ridge import with_bias

_LOWEST = 1e-3  # smallest strength on the path, of the one at which all weights are zero
_SATURATED = 0.8  # more nonzero weights than this fraction of the masks are not trusted


@register("lasso")
@dataclass(frozen=True)
class Lasso:
    """Minimises |y - X w - b|² / (2 m) + strength · |w|₁ by accelerated proximal gradients (FISTA with restarts; Beck,
    Teboulle 2009; O'Donoghue, Candès 2015), all examples at once.

    Without a strength, the path from the strength at which all weights vanish down to a thousandth of it is followed,
    and every example takes the strength of least generalised cross-validation error, |r|² / (1 - (k + 1) / m)², where k
    is the number of nonzero weights, the lasso's degrees of freedom (Zou, Hastie, Tibshirani 2007); for random designs
    that is the prediction error on new masks (Miolane, Montanari 2021).

    Attributes:
        strength: in the unit of the outputs; None chooses it.
        n_strengths: points of the path.
        n_iterations: at most so many at each.
        tolerance: the optimality conditions are met to this fraction of the largest correlation.
    """

    strength: float | None = None
    n_strengths: int = 20
    n_iterations: int = 2000
    tolerance: float = 1e-6
    takes_prior = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.strength is not None and not self.strength >= 0:
            raise CoarError(f"Lasso(strength={self.strength}): must be at least 0, or None to choose it")
        for name in ("n_strengths", "n_iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CoarError(f"Lasso({name}={value!r}): must be a whole number, at least 1")

    def fit(self, masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Fits the weights of all examples at once, see `Solver.fit`."""
        check(masks, outputs)
        design, n_masks = Design(masks), masks.shape[0]
        centred = (outputs.double() - outputs.double().mean(0)).to(design.dtype)
        correlations = design.transposed(centred) / n_masks
        largest = correlations.abs().amax(0)
        slope = _curvature(design)
        weights = torch.zeros_like(correlations)
        if self.strength is not None:
            weights = self._descend(slope, correlations, weights, torch.full_like(largest, self.strength), largest)
            return with_bias(design, outputs, weights.double().T)
        best, least = weights, torch.full_like(largest, torch.inf)
        for fraction in torch.logspace(0, torch.tensor(_LOWEST).log10().item(), self.n_strengths).tolist():
            weights = self._descend(slope, correlations, weights, fraction * largest, largest)
            used = (weights != 0).sum(0)
            free = 1 - (used + 1) / n_masks
            residual = centred - design.times(weights)
            error = residual.square().mean(0) / free.clamp_min(1e-6).square()
            error = torch.where(used <= _SATURATED * n_masks, error, torch.inf)
            best = torch.where(error < least, weights, best)
            least = torch.minimum(error, least)
            if bool((error > 2 * least).all()):
                break
        return with_bias(design, outputs, best.double().T)

    def _descend(
        self, slope: "_Curvature", correlations: Tensor, start: Tensor, strength: Tensor, largest: Tensor
    ) -> Tensor:
        """Weights [components, examples] at one strength an example, from a start nearby."""
        weights, ahead, momentum = start.clone(), start.clone(), torch.ones_like(strength)
        # Examples that are done take no part any more, so that none changes with the company it is in.
        active = torch.arange(len(strength), device=strength.device)[largest > 0]
        for _ in range(self.n_iterations):
            if not len(active):
                break
            at = ahead[:, active]
            gradient = slope.times(at) - correlations[:, active]
            stepped = at - gradient / slope.bound
            moved = stepped.sign() * (stepped.abs() - strength[active] / slope.bound).clamp_min(0)
            change = moved - weights[:, active]
            # Momentum that points uphill starts afresh.
            uphill = ((at - moved) * change).sum(0) > 0
            old = torch.where(uphill, 1.0, momentum[active])
            new = (1 + (1 + 4 * old * old).sqrt()) / 2
            done = (slope.bound * (at - moved).abs().amax(0)) <= self.tolerance * largest[active]
            weights[:, active] = moved
            ahead[:, active] = moved + torch.where(uphill, 0.0, (old - 1) / new) * change
            momentum[active] = new
            active = active[~done]
        return weights


@dataclass(frozen=True)
class _Curvature:
    """XᵀX / m as a product, and a bound on its largest eigenvalue."""

    times: Callable[[Tensor], Tensor]
    bound: float


def _curvature(design: Design) -> _Curvature:
    n_masks, n_components = design.shape
    if n_components <= 2 * n_masks:
        gram = design.gram_of_components(design.dtype) / n_masks

        def times(columns: Tensor) -> Tensor:
            return gram @ columns
    else:

        def times(columns: Tensor) -> Tensor:
            return design.transposed(design.times(columns)) / n_masks

    vector = torch.ones(n_components, 1, dtype=design.dtype, device=design.masks.device)
    vector += 0.1 * torch.linspace(-1, 1, n_components, dtype=design.dtype, device=vector.device)[:, None]
    norm = torch.ones(())
    for _ in range(60):
        vector = times(vector)
        norm = vector.norm()
        vector = vector / norm.clamp_min(1e-30)
    return _Curvature(times, max(1.1 * float(norm), 1e-12))
