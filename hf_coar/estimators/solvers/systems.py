"""Leave-one-out errors of a ridge regression at any strength: two ways to the same numbers.

With K the Gram matrix of the centred masks, α = (K + λ)⁻¹ (y - ȳ) and 1 - h_ii = λ ((K + λ)⁻¹)_ii - 1/m, the residual
of mask i, were it left out of the fit, is λ α_i / (1 - h_ii) (Hastie, Tibshirani, Friedman, The Elements of Statistical
Learning, §7.10). `Spectral` has one eigendecomposition for all strengths; `Factored` has one Cholesky factorisation a
strength, which is far cheaper where few strengths are needed and the matrices are large.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_coar.estimators.solvers.design import Design, diagonal_of_inverse

SPECTRAL_UP_TO = 1200  # rows of the smaller Gram matrix
_LEFT_OUT = 4096  # masks, at most, that are left out in turn where each of them costs a solve
_ILL_CONDITIONED = 30.0  # ratio of the pivots above which float32 is not enough


class System(Protocol):
    """Ridge regressions of centred columns [masks, k] on a design, at any strength."""

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of the smaller Gram matrix: the scale of the strengths."""
        ...

    def solve(self, columns: Tensor, strength: Tensor | float) -> Tensor:
        """Weights [components, k], in the scale of the design; one strength, or one a column."""
        ...

    def left_out(self, columns: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        """Leave-one-out residuals [left out, k] at one strength, and the solution if it came with them."""
        ...


class Spectral:
    """One eigendecomposition of the smaller Gram matrix."""

    def __init__(self, design: Design) -> None:
        """Decompose."""
        n_masks, n_components = design.shape
        self.design, self.dual = design, n_components >= n_masks
        gram = design.gram_of_masks(torch.float64) if self.dual else design.gram_of_components(torch.float64)
        values, vectors = torch.linalg.eigh(gram)
        held = values > values.max() * values.shape[0] * 4e-16
        self.values, vectors = values[held], vectors[:, held]
        # The left singular vectors of the design; those with eigenvalue zero are left out.
        self.left = vectors if self.dual else design.times(vectors).double() / self.values.sqrt()
        self.right = None if self.dual else vectors
        self.squared = self.left.square()
        self.outside = (1.0 - self.squared.sum(1)).clamp_min(0) - 1.0 / n_masks

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of the smaller Gram matrix."""
        return float(self.values.mean()) if len(self.values) else 1.0

    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.values.max()) if len(self.values) else 1.0

    def solve(self, columns: Tensor, strength: Tensor | float) -> Tensor:
        """Weights [components, k]; strength 0 gives the least norm."""
        projected = self.left.T @ columns
        shifted = self.values[:, None] + strength
        if self.right is None:
            return self.design.transposed(self.left @ (projected / shifted))
        return self.right @ (self.values.sqrt()[:, None] / shifted * projected)

    def left_out(self, columns: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        """Leave-one-out residuals [masks, k] at one strength."""
        return next(self.left_out_all(columns, [strength])), None

    def left_out_all(self, columns: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
        """Leave-one-out residuals [masks, k] at one strength after the other."""
        projected = self.left.T @ columns
        rest = columns - self.left @ projected  # residual whatever the strength
        for strength in strengths:
            shrunk = strength / (self.values + strength)
            free = self.squared @ shrunk + self.outside
            yield (rest + self.left @ (shrunk[:, None] * projected)) / free.clamp_min(1e-12)[:, None]


class Factored:
    """One Cholesky factorisation a strength; `Spectral` takes over where the matrix is too nearly singular."""

    def __init__(self, design: Design) -> None:
        """Make the smaller Gram matrix."""
        n_masks, n_components = design.shape
        self.design, self.dual = design, n_components >= n_masks
        self._mean = 0.0
        self._grams: dict[torch.dtype, Tensor] = {}
        self._mean = float(self._gram(torch.float32).diagonal().double().mean()) or 1.0
        if self.dual:
            # The vector of ones is its null vector. Lifted, it does not spoil the condition, and changes nothing else.
            self._grams[torch.float32] += self._mean / n_masks

    def _gram(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._grams:
            make = self.design.gram_of_masks if self.dual else self.design.gram_of_components
            self._grams[dtype] = make(dtype) + (self._mean / self.design.shape[0] if self.dual else 0.0)
        return self._grams[dtype]

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of the smaller Gram matrix."""
        return self._mean

    def factor(self, strength: float) -> Tensor | None:
        """The lower triangular factor, in float32 where that is precise enough; None if there is none."""
        for dtype in (torch.float32, torch.float64):
            shifted = self._gram(dtype).clone()
            shifted.diagonal().add_(strength)
            lower, failed = torch.linalg.cholesky_ex(shifted)
            pivots = lower.diagonal()
            if not failed and (dtype == torch.float64 or pivots.max() < _ILL_CONDITIONED * pivots.min()):
                return lower
        return None

    def solve(self, columns: Tensor, strength: Tensor | float) -> Tensor:
        """Weights [components, k]; one factorisation for every distinct strength."""
        strengths = torch.as_tensor(strength, dtype=torch.float64).expand(columns.shape[1])
        weights = columns.new_empty(self.design.shape[1], columns.shape[1])
        for value in strengths.unique().tolist():
            chosen = strengths == value
            lower = self.factor(value)
            if lower is None:
                return Spectral(self.design).solve(columns, strengths.to(columns.device))
            weights[:, chosen] = self.weights(self._solution(lower, columns[:, chosen])).to(columns.dtype)
        return weights

    def weights(self, solution: Tensor) -> Tensor:
        """Weights [components, k] from what `left_out` returns as the solution."""
        return self.design.transposed(solution) if self.dual else solution

    def _solution(self, lower: Tensor, columns: Tensor) -> Tensor:
        if not self.dual:
            columns = self.design.transposed(columns)
        half = torch.linalg.solve_triangular(lower, columns.to(lower.dtype), upper=False)
        return torch.linalg.solve_triangular(lower.T, half, upper=True)

    def left_out(self, columns: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        """Leave-one-out residuals, and the solution; of more than 4,096 masks, so many are left out in turn."""
        lower = self.factor(strength)
        if lower is None:
            return Spectral(self.design).left_out(columns, strength)
        solution = self._solution(lower, columns)
        if self.dual:
            # The trailing block of L is the factor of the trailing block of the inverse's inverse.
            some = max(0, len(lower) - _LEFT_OUT)
            free = diagonal_of_inverse(lower[some:, some:]).double()
            # Of the lifted null vector, 1 / (m (λ + lift)) is in the diagonal; with the intercept there is none of it.
            free -= 1.0 / (len(lower) * (strength + self._mean))
            return solution[some:] / free.clamp_min(1e-30)[:, None].to(solution.dtype), solution
        return self._left_out_primal(lower, solution, columns), solution

    def _left_out_primal(self, lower: Tensor, solution: Tensor, columns: Tensor) -> Tensor:
        n_masks, residuals = self.design.shape[0], []
        for start in range(max(0, n_masks - _LEFT_OUT), n_masks, 1024):
            stop = min(start + 1024, n_masks)
            rows = self.design.rows(start, stop).to(lower.dtype)
            leverage = torch.linalg.solve_triangular(lower, rows.T, upper=False).square().sum(0)
            free = (1.0 - leverage - 1.0 / n_masks).clamp_min(1e-12)
            residuals.append((columns[start:stop].to(lower.dtype) - rows @ solution) / free[:, None])
        return torch.cat(residuals)


def system(design: Design) -> Spectral | Factored:
    """The cheaper of the two."""
    return Spectral(design) if min(design.shape) <= SPECTRAL_UP_TO else Factored(design)
