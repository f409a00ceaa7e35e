"""Shrinkage: noisy reads of many components and examples, improved by what the noise and its neighbours tell.

Soft reads are right on average and noisy, hard reads (the same component read while it is in place) are steady and
biased. Layer by layer the soft reads are pulled towards calibrated hard reads, in two ways whose errors differ, so that
their mean beats either:

- empirical Bayes by component: how much a component's effects vary over the examples beyond their noise says how far
  its soft reads are to be believed (Efron, Morris 1973);
- a Wiener filter across examples: the covariance of the examples' corrections, learnt from all components of the layer,
  says which examples tell about each other.

Examples are treated in blocks of fixed indices, so that the batch size moves nothing.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 64  # examples that are shrunk together; more bring nothing
_TINY = 1e-20


def shrink(soft: Tensor, hard: Tensor, variance: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Shrunk reads and their standard errors.

    Args:
        soft: float32 [examples, components], mean over the rounds.
        hard: float32 [examples, components], mean over the rounds.
        variance: float32 [examples, components], of `soft`.
        sizes: components of every layer, in order.

    Returns:
        weights and standard errors, float32 [examples, components].
    """
    weights, errors = torch.empty_like(soft), torch.empty_like(soft)
    for rows, columns in _blocks(soft.shape[0], sizes):
        weights[rows, columns], spread = _shrink_layer(
            soft[rows, columns].double(), hard[rows, columns].double(), variance[rows, columns].double()
        )
        errors[rows, columns] = spread.sqrt().float()
    return weights, errors


def _blocks(n_examples: int, sizes: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    for first in range(0, n_examples, BLOCK):
        start = 0
        for size in sizes:
            yield slice(first, first + BLOCK), slice(start, start + size)
            start += size


def _shrink_layer(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    # A handful of rounds says little about one read's noise; its component's mean over the examples says more.
    variance = (variance + variance.mean(0)) / 2 + _TINY
    by_component, variance_a = _empirical_bayes(soft, hard, variance)
    by_example, variance_b = _wiener(soft, hard, variance)
    return (by_component + by_example) / 2, (variance_a + variance_b) / 2


def _empirical_bayes(soft: Tensor, hard: Tensor, variance: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Towards the calibrated hard reads, one prior variance a component; weights and posterior variances."""
    prior = torch.zeros(soft.shape[1], dtype=soft.dtype)
    for _ in range(iterations):
        precision = 1 / (variance + prior)
        slope = (precision * soft * hard).sum() / (precision * hard.square()).sum().clamp_min(_TINY)
        correction = soft - slope * hard
        excess = (correction.square() - variance).mean(0).clamp_min(0)
        prior = (excess + excess.mean()) / 2
    return slope * hard + correction * prior / (prior + variance), variance * prior / (prior + variance)


def _wiener(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The linear filter across examples of least expected error; weights and posterior variances."""
    slope = (soft * hard).sum() / hard.square().sum().clamp_min(_TINY)
    correction = soft - slope * hard
    noise = variance.mean(1)
    values, vectors = torch.linalg.eigh(correction @ correction.T / soft.shape[1] - noise.diag())
    signal = (vectors * values.clamp_min(0)) @ vectors.T
    gain = torch.linalg.solve(signal + noise.diag(), signal, left=False)
    posterior = (signal - gain @ signal).diagonal().clamp_min(0)
    # The filter knows one noise an example; a component's own noise scales what is left of it.
    return slope * hard + gain @ correction, posterior[:, None] * variance / noise[:, None]
