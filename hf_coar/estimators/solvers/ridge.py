"""Ridge regression, its strength chosen for every example by exact leave-one-out error."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.estimators.solvers import systems
from hf_coar.estimators.solvers.base import check, register
from hf_coar.estimators.solvers.design import Design
from hf_coar.estimators.solvers.systems import Factored, Spectral

_STEP = 3.0  # ratio of neighbouring strengths that are tried where each costs a factorisation
_STEPS = (-11, 3)  # how far they may go, from the mean eigenvalue
_FIRST = (-1, 0, -2)  # where the search begins


@register("ridge")
@dataclass(frozen=True)
class Ridge:
    """Ridge regression with an intercept, its strength chosen for every example by exact leave-one-out error.

    One Gram matrix, of masks or of components, whichever is smaller, serves all examples. Up to 1,200 rows it is
    decomposed once for all strengths. Above, every strength that is tried costs a Cholesky factorisation: the search
    goes downhill in steps of a factor 3 from the mean eigenvalue, until for every example the errors are least inside,
    or bend so that they will not fall beyond the end, which takes three of them as a rule. Of more than 4,096 masks, so
    many are left out in turn.

    Attributes:
        strength: λ in the scale of 0/1 masks; None chooses it. 0 is least squares, of least norm where there are fewer
            masks than components.
        n_strengths: how many values are tried where trying costs little, evenly in log λ between 1e-6 and 10 times the
            largest eigenvalue.
    """

    strength: float | None = None
    n_strengths: int = 40
    takes_prior = True

    def __post_init__(self) -> None:
        """Check the strength."""
        if self.strength is not None and not self.strength >= 0:
            raise CoarError(f"Ridge(strength={self.strength}): must be at least 0, or None to choose it")
        if isinstance(self.n_strengths, bool) or not isinstance(self.n_strengths, int) or self.n_strengths < 1:
            raise CoarError(f"Ridge(n_strengths={self.n_strengths!r}): must be a whole number, at least 1")

    def fit(self, masks: Tensor, outputs: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fits the weights of all examples at once, see `Solver.fit`.

        Args:
            masks: bool [masks, components], True = left in place.
            outputs: float [masks, examples].
            prior: float [examples, components], weights known beforehand, or None. What they leave over is regressed;
                they enter with a factor of their own for every example, 0 or more, of least leave-one-out error.
        """
        check(masks, outputs, prior)
        design = Design(masks)
        return with_bias(design, outputs, self.weights(design, outputs, prior))

    def weights(self, design: Design, outputs: Tensor, prior: Tensor | None = None) -> Tensor:
        """Weights float64 [examples, components] for a design of any scale; see `fit`."""
        system, search = self._searched(design, outputs, prior)
        found = search.weights(system, self.strength)
        found = found if design.scale is None else found * design.scale[:, None]
        return found.T if prior is None else found.T + search.factor[:, None] * prior.double()

    def prior_factors(self, design: Design, outputs: Tensor, prior: Tensor) -> Tensor:
        """How much of the prior is taken, float64 [examples]."""
        return self._searched(design, outputs, prior)[1].factor

    def _searched(self, design: Design, outputs: Tensor, prior: Tensor | None) -> "tuple[Spectral | Factored, _Search]":
        search = _Search(
            outputs.double() - outputs.double().mean(0), None if prior is None else _predictions(design, prior)
        )
        system = systems.system(design)
        if self.strength is None:
            _try_strengths(system, search, self.n_strengths)
        elif prior is not None:
            search.note(system, max(self.strength, 1e-8 * system.mean_eigenvalue()))
        return system, search


def with_bias(design: Design, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias, float32; the bias makes predictions right on average over the masks."""
    bias = outputs.double().mean(0) - weights @ (1 - design.ablated_mean)
    return weights.float(), bias.float()


def _predictions(design: Design, prior: Tensor) -> Tensor:
    """What the prior weights say of the masks, centred, float64 [masks, examples]."""
    predicted = design.scaled(None).times(prior.T).double()
    return predicted - predicted.mean(0)


class _Search:
    """For every example the strength, and the factor of the prior, of least leave-one-out error so far.

    Where r and p are the leave-one-out residuals of the outputs and of the prior's predictions, those of
    outputs - factor · predictions are r - factor · p, so that the best factor is <r, p> / <p, p>.
    """

    def __init__(self, centred: Tensor, predicted: Tensor | None) -> None:
        self.centred, self.predicted = centred, predicted
        self.columns = centred if predicted is None else torch.cat([centred, predicted], dim=1)
        n_examples = centred.shape[1]
        self.error = centred.new_full((n_examples,), torch.inf)
        self.strength, self.factor = torch.zeros_like(self.error), torch.zeros_like(self.error)
        self.solution: Tensor | None = None
        self.complete = True  # whether all that was tried came with its solution

    def note(self, system: Spectral | Factored, strength: float) -> Tensor:
        """Try a strength; returns the errors float64 [examples]."""
        residuals, solution = system.left_out(self.columns, strength)
        return self.note_residuals(residuals, strength, solution)

    def note_residuals(self, residuals: Tensor, strength: float, solution: Tensor | None = None) -> Tensor:
        """Try a strength by leave-one-out residuals that are there."""
        n_examples = len(self.error)
        factor = torch.zeros_like(self.error)
        if self.predicted is not None:
            residuals, of_prior = residuals[:, :n_examples], residuals[:, n_examples:]
            power = of_prior.square().sum(0).double()
            factor = ((residuals * of_prior).sum(0).double() / power.clamp_min(1e-300)).clamp_min(0)
            residuals = residuals - factor.to(residuals.dtype) * of_prior
        errors = residuals.square().mean(0, dtype=torch.float64)
        better = errors < self.error
        self.error = torch.where(better, errors, self.error)
        self.strength = torch.where(better, strength, self.strength)
        self.factor = torch.where(better, factor, self.factor)
        self.complete = self.complete and solution is not None
        if solution is not None:
            fitted = solution[:, :n_examples]
            if self.predicted is not None:
                fitted = fitted - factor.to(solution.dtype) * solution[:, n_examples:]
            self.solution = fitted if self.solution is None else torch.where(better, fitted, self.solution)
        return errors

    def weights(self, system: Spectral | Factored, strength: float | None) -> Tensor:
        """Weights [components, examples] of what the prior leaves over, at the best strengths or at the one given."""
        if strength is None and self.complete and self.solution is not None and isinstance(system, Factored):
            return system.weights(self.solution).double()
        left_over = self.centred
        if self.predicted is not None:
            left_over = left_over - self.factor * self.predicted
        return system.solve(left_over, self.strength if strength is None else strength).double()


def _try_strengths(system: Spectral | Factored, search: _Search, n_strengths: int) -> None:
    if isinstance(system, Spectral):
        candidates = torch.logspace(-6, 1, n_strengths, dtype=torch.float64) * system.largest()
        residuals: Iterator[Tensor] = system.left_out_all(search.columns, candidates.tolist())
        for strength, of_strength in zip(candidates.tolist(), residuals, strict=True):
            search.note_residuals(of_strength, strength)
        return
    scale, tried = system.mean_eigenvalue(), {}
    wanted = list(_FIRST)
    while wanted:
        for step in wanted:
            tried[step] = search.note(system, scale * _STEP**step)
        steps = sorted(tried)
        ends = {steps[0] - 1: steps[:3], steps[-1] + 1: steps[:-4:-1]}
        wanted = [s for s, of in ends.items() if _STEPS[0] <= s <= _STEPS[1] and _falls(*(tried[i] for i in of))]


def _falls(end: Tensor, inner: Tensor, third: Tensor) -> bool:
    """Whether any example's log error would fall on beyond the end, as a parabola with half the bend says."""
    end, inner, third = (errors.clamp_min(1e-300).log() for errors in (end, inner, third))
    bend = (third - 2 * inner + end).clamp_min(0)
    return bool((inner - end > bend / 2).any())
