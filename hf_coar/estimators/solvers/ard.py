"""Automatic relevance determination: one prior variance a component, learnt from all examples together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.estimators.solvers.base import check, register
from hf_coar.estimators.solvers.design import Design, diagonal_of_inverse
from hf_coar.estimators.solvers.ridge import Ridge, with_bias

_FLOOR = 1e-6  # smallest prior variance, of the mean one at the start
_COLUMNS = 2048  # columns that are solved for at a time


@register("ard")
@dataclass(frozen=True)
class ARD:
    """Multi-task automatic relevance determination: components that matter to no example are shrunk for all of them.

    Weight i of example e has the prior variance v_i s_e², where s_e² is the variance of the example's outputs, and the
    outputs have the noise variance σ² s_e². Every iteration moves v and σ² by factors that never lower the evidence
    (Wipf, Nagarajan, A New View of Automatic Relevance Determination, NeurIPS 2007; the square root of MacKay's):

        v_i ← v_i sqrt((Σ_e u_ei² + a v / v_i) / (E γ_i + a)),   σ² ← σ² sqrt(mean_e |r_e|² / (σ² (m - 1 - Σγ)))

    where sqrt(v_i) u_ei is the posterior mean, γ_i the share of its prior variance that the data take away, r the
    residual, and E the number of examples. The variances have an inverse gamma prior themselves, worth a =
    `pseudo_examples`, around their harmonic mean v: of a single example nobody can tell which variances are large. It
    is solved in the space of components or of masks, whichever is smaller. At the end, ridge regression with these
    variances chooses the noise of every example by exact leave-one-out error.

    Unlike for other solvers, an example's weights depend on the other examples.

    Attributes:
        n_iterations: at most so many.
        tolerance: stop when an iteration gains less than this in log evidence, a mask and example.
        pseudo_examples: as many examples as the belief in equal variances is worth; 0 is plain evidence.
    """

    n_iterations: int = 40
    tolerance: float = 1e-4
    pseudo_examples: float = 4.0
    takes_prior = True

    def __post_init__(self) -> None:
        """Check the iterations."""
        if isinstance(self.n_iterations, bool) or not isinstance(self.n_iterations, int) or self.n_iterations < 1:
            raise CoarError(f"ARD(n_iterations={self.n_iterations!r}): must be a whole number, at least 1")
        for name in ("tolerance", "pseudo_examples"):
            if not getattr(self, name) >= 0:
                raise CoarError(f"ARD({name}={getattr(self, name)!r}): must be at least 0")

    def fit(self, masks: Tensor, outputs: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fits the weights of all examples at once, see `Solver.fit`; `prior` as for `Ridge.fit`."""
        check(masks, outputs, prior)
        design = Design(masks)
        left_over = outputs.double()
        if prior is not None:  # the variances are those of what the prior leaves over
            factors = Ridge().prior_factors(design, outputs, prior)
            left_over = left_over - factors * design.times(prior.T).double()
        variances = list(self.variances(design, left_over))[-1].variances
        return with_bias(design, outputs, Ridge().weights(design.scaled(variances.sqrt()), outputs, prior))

    def variances(self, design: Design, outputs: Tensor) -> "Iterator[_State]":
        """The prior variances float64 [components] and the log evidence, iteration by iteration."""
        centred = outputs.double() - outputs.double().mean(0)
        spread = centred.square().mean(0).sqrt()
        live = spread > 1e-9 * outputs.double().abs().amax(0).clamp_min(1e-300)
        centred = centred[:, live] / spread[live]
        power = design.ablated_mean * (1 - design.ablated_mean)
        start = 0.5 / power.sum().clamp_min(1e-12)
        state = _State(torch.full_like(power, float(start)), 0.5, float("-inf"))
        if not centred.shape[1]:
            yield state
            return
        step = _in_masks if design.shape[1] >= design.shape[0] else _InComponents(design, centred)
        for _ in range(self.n_iterations):
            before = state.evidence
            state = step(design, centred, state, self.pseudo_examples)
            state = state._replace(variances=state.variances.clamp_min(_FLOOR * float(start)))
            yield state
            if state.evidence - before < self.tolerance:
                return


class _State(NamedTuple):
    """Variances float64 [components], noise variance, and log evidence a mask and example before this step.

    The evidence includes the prior of the variances, up to a constant.
    """

    variances: Tensor
    noise: float
    evidence: float


def _moved(state: _State, u: Tensor, gamma: Tensor, residual: Tensor, evidence: float, pseudo: float) -> _State:
    """The update that the class describes; u [components, examples], γ [components], residual [masks, examples]."""
    n_masks, n_examples = residual.shape
    inverse = 1 / state.variances
    centre = 1 / inverse.mean()
    ratio = u.double().square().sum(1) + pseudo * centre * inverse
    ratio = ratio / (n_examples * gamma.double() + pseudo).clamp_min(1e-12)
    evidence += 0.5 * pseudo * float((centre.log() - state.variances.log()).sum()) / (n_masks * n_examples)
    free = max(n_masks - 1 - float(gamma.double().sum()), 1e-3 * n_masks)
    noise = (state.noise * float(residual.double().square().sum(0).mean()) / free) ** 0.5
    # A component that no mask ablates has nothing to go by, and γ = 0: it stays as it is.
    moved = torch.where(gamma.double() > 1e-12, state.variances * ratio.sqrt(), state.variances)
    return _State(moved, max(noise, 1e-9), evidence)


def _factor(matrix: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.cholesky(matrix.double()).to(matrix.dtype) if failed else lower


def _in_masks(design: Design, centred: Tensor, state: _State, pseudo: float) -> _State:
    """A step in the space of masks: C = σ² + X diag(v) Xᵀ."""
    scaled = design.scaled(state.variances.sqrt())
    n_masks, n_components = design.shape
    gram = scaled.gram_of_masks(design.dtype)
    gram.diagonal().add_(state.noise)
    lower = _factor(gram)
    half = torch.linalg.solve_triangular(lower, centred.to(lower.dtype), upper=False)
    solved = torch.linalg.solve_triangular(lower.T, half, upper=True)
    gamma = centred.new_empty(n_components)
    for start in range(0, n_components, _COLUMNS):
        columns = scaled.columns(start, start + _COLUMNS)
        whitened = torch.linalg.solve_triangular(lower, columns, upper=False)
        gamma[start : start + _COLUMNS] = whitened.square().sum(0).double()
    # With an intercept there are m - 1 directions; the one left out has the noise alone.
    log_determinant = 2 * float(lower.diagonal().double().log().sum()) - math.log(state.noise)
    evidence = -0.5 * (log_determinant + float(half.double().square().sum(0).mean())) / n_masks
    return _moved(state, scaled.transposed(solved), gamma, state.noise * solved, evidence, pseudo)


class _InComponents:
    """Steps in the space of components, all from one Gram matrix: A = 1 + diag(√v) XᵀX diag(√v) / σ²."""

    def __init__(self, design: Design, centred: Tensor) -> None:
        self.gram = design.gram_of_components(torch.float64)
        self.projected = design.transposed(centred).double()
        self.power = centred.square().sum(0)

    def __call__(self, design: Design, centred: Tensor, state: _State, pseudo: float) -> _State:
        scale = state.variances.sqrt()
        matrix = scale[:, None] * self.gram * scale / state.noise
        matrix.diagonal().add_(1.0)
        lower = torch.linalg.cholesky(matrix)
        target = scale[:, None] * self.projected
        u = torch.cholesky_solve(target, lower) / state.noise
        gamma = 1 - diagonal_of_inverse(lower)
        n_masks = design.shape[0]
        log_determinant = (n_masks - 1) * math.log(state.noise) + 2 * lower.diagonal().log().sum()
        fit = (self.power - (target * u).sum(0)) / state.noise
        evidence = -0.5 * float(log_determinant + fit.mean()) / n_masks
        residual = centred - design.times(scale[:, None] * u).double()
        return _moved(state, u, gamma, residual, evidence, pseudo)
