"""Solvers: from masks and outputs to weights. One method on two arrays; all examples share one factorisation."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_coar.errors import CoarError

_CHUNK = 4096  # columns of the mask matrix that are converted to floats at a time


class Solver(Protocol):
    """Fits outputs ≈ masks · weights + bias for every example at once."""

    def fit(self, masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Fit.

        Args:
            masks: bool [masks, components], True = left in place.
            outputs: float [masks, examples].

        Returns:
            weights float32 [examples, components], bias float32 [examples].
        """
        ...


@dataclass(frozen=True)
class Ridge:
    """Ridge regression with an intercept, its strength chosen for every example by exact leave-one-out error.

    One eigendecomposition of the smaller Gram matrix (masks × masks or components × components) serves all examples
    and all strengths. With the eigenvectors Q and eigenvalues s of the centred Gram matrix K of the masks, the
    leave-one-out residual of mask i is r_i / (1 - h_ii), where r = λ (K + λ)⁻¹ (y - ȳ) and
    1 - h_ii = λ ((K + λ)⁻¹)_ii - 1/m (Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, §7.10).

    Attributes:
        strength: λ in the scale of 0/1 masks; None chooses it from `n_strengths` values spread evenly in log λ between
            1e-6 and 10 times the largest eigenvalue. 0 is least squares, of least norm where there are fewer masks
            than components.
        n_strengths: how many values are tried.
    """

    strength: float | None = None
    n_strengths: int = 40

    def __post_init__(self) -> None:
        """Check the strength."""
        if self.strength is not None and not self.strength >= 0:
            raise CoarError(f"Ridge(strength={self.strength}): must be at least 0, or None to choose it")

    def fit(self, masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """See `Solver.fit`."""
        n_masks, n_components = masks.shape
        if outputs.shape[0] != n_masks:
            raise CoarError(f"{n_masks} masks and {outputs.shape[0]} rows of outputs; they must be as many")
        if n_masks < 3:
            raise CoarError(f"a regression needs at least 3 masks; got {n_masks}")
        mean = masks.double().mean(0) if n_masks * n_components < 2**24 else _column_means(masks)
        centred = outputs.double() - outputs.double().mean(0)
        if n_components < n_masks:
            weights = self._fit_primal(masks, mean, centred)
        else:
            weights = self._fit_dual(masks, mean, centred)
        bias = outputs.double().mean(0) - weights @ mean
        return weights.float(), bias.float()

    def _fit_dual(self, masks: Tensor, mean: Tensor, centred: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(_gram_of_masks(masks, mean))
        values = _clean(values)
        projected = vectors.T @ centred
        strengths = self._choose(values, vectors, projected)
        scores = vectors @ (projected * _inverse(values[:, None] + strengths, values))
        return _back_project(masks, mean, scores)

    def _fit_primal(self, masks: Tensor, mean: Tensor, centred: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(_gram_of_components(masks, mean))
        values = _clean(values)
        # The left singular vectors of the centred masks, those with eigenvalue zero left out.
        held = values > 0
        left = _multiply(masks, mean, vectors[:, held]) / values[held].sqrt()
        projected = left.T @ centred
        strengths = self._choose(values[held], left, projected, rest=centred - left @ projected)
        scale = values[held].sqrt()[:, None] / (values[held][:, None] + strengths)
        return (vectors[:, held] @ (scale * projected)).T

    def _choose(self, values: Tensor, vectors: Tensor, projected: Tensor, rest: Tensor | None = None) -> Tensor:
        """The strength for every example, float64 [examples]."""
        n_examples = projected.shape[1]
        if self.strength is not None:
            return projected.new_full((n_examples,), self.strength)
        largest = float(values.max().clamp_min(1e-12))
        candidates = torch.logspace(-6, 1, self.n_strengths, dtype=torch.float64) * largest
        errors = [self._leave_one_out(values, vectors, projected, rest, float(strength)) for strength in candidates]
        return candidates[torch.stack(errors).argmin(0)]

    @staticmethod
    def _leave_one_out(
        values: Tensor, vectors: Tensor, projected: Tensor, rest: Tensor | None, strength: float
    ) -> Tensor:
        """Mean squared leave-one-out error of every example, float64 [examples]."""
        shrunk = strength / (values + strength)
        residual = vectors @ (shrunk[:, None] * projected)
        free = (vectors * vectors) @ shrunk - 1.0 / vectors.shape[0]
        if rest is not None:  # what lies outside the span of the masks is residual whatever the strength
            residual = residual + rest
            free = free + 1.0 - (vectors * vectors).sum(1)
        return (residual / free.clamp_min(1e-12)[:, None]).square().mean(0)


def _clean(values: Tensor) -> Tensor:
    """Eigenvalues that are zero but for rounding are set to zero."""
    return torch.where(values > values.max() * values.shape[0] * 2e-16, values, 0.0)


def _inverse(shifted: Tensor, values: Tensor) -> Tensor:
    return torch.where(values[:, None] > 0, 1.0 / shifted.clamp_min(1e-300), 0.0)


def _column_means(masks: Tensor) -> Tensor:
    return torch.stack([chunk.double().sum(0) for chunk in masks.split(_CHUNK)]).sum(0) / masks.shape[0]


def _gram_of_masks(masks: Tensor, mean: Tensor) -> Tensor:
    """Centred masks · centred masksᵀ, float64 [masks, masks]; sums of 0/1 products are exact in float32 chunks."""
    gram = torch.zeros(masks.shape[0], masks.shape[0], dtype=torch.float64, device=masks.device)
    for chunk in masks.split(_CHUNK, dim=1):
        chunk = chunk.float()
        gram += (chunk @ chunk.T).double()
    with_mean = torch.cat([chunk.double() @ mean for chunk in masks.split(_CHUNK)])
    return gram - with_mean[:, None] - with_mean[None, :] + mean @ mean


def _gram_of_components(masks: Tensor, mean: Tensor) -> Tensor:
    """Centred masksᵀ · centred masks, float64 [components, components]."""
    gram = torch.zeros(masks.shape[1], masks.shape[1], dtype=torch.float64, device=masks.device)
    for chunk in masks.split(_CHUNK):
        chunk = chunk.float()
        gram += (chunk.T @ chunk).double()
    return gram - masks.shape[0] * torch.outer(mean, mean)


def _multiply(masks: Tensor, mean: Tensor, columns: Tensor) -> Tensor:
    """(masks - mean) · columns."""
    return torch.cat([(chunk.double() - mean) @ columns for chunk in masks.split(_CHUNK)])


def _back_project(masks: Tensor, mean: Tensor, scores: Tensor) -> Tensor:
    """((masks - mean)ᵀ · scores)ᵀ, float64 [examples, components]."""
    total = sum(part.T @ chunk.double() for part, chunk in zip(scores.split(_CHUNK), masks.split(_CHUNK), strict=True))
    return total - torch.outer(scores.sum(0), mean)
