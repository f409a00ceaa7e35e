"""Shrinkage: noisy reads of many components and examples, improved by what the noise and its neighbours tell.

Soft reads are right on average and noisy, hard reads (the same component read while it is in place) are steady and
biased. Layer by layer the soft reads are pulled towards calibrated hard reads, in two ways whose errors differ, so that
their mean beats either:

- empirical Bayes by component, at two levels: a component's mean over the examples, and each example's deviation from
  it; how much they vary beyond their noise says how far they are to be believed (Efron, Morris 1973). Many effects,
  above all in language models, are much the same for all examples, and their mean has the least noise;
- a Wiener filter across examples: the covariance of the examples' corrections, learnt from all components of the layer,
  says which examples tell about each other. It takes all components of a layer as equally noisy. Where few of them have
  nearly all of the noise, it would be learnt from those, and has no say.

Examples are treated in blocks of fixed indices, so that the batch size moves nothing.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 64  # examples that are shrunk together; more bring nothing
_TINY = 1e-20
_NOTHING = 1e-10  # of the squared size of the largest reads of a layer: next to float32's rounding of these
_ROUNDING = 1e-12  # of reads in units of their size, the least noise there is: without any, filters may be singular


def shrink(
    soft: Tensor, hard: Tensor, variance: Tensor, sizes: Sequence[int], block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Shrunk reads and their standard errors.

    Args:
        soft: float32 [examples, components], mean over the rounds.
        hard: float32 [examples, components], mean over the rounds.
        variance: float32 [examples, components], of `soft`.
        sizes: components of every layer, in order.
        block: examples that are shrunk together; 1: each by itself.

    Returns:
        weights and standard errors, float32 [examples, components].
    """
    weights, errors = torch.empty_like(soft), torch.empty_like(soft)
    for rows, columns in _blocks(soft.shape[0], sizes, block):
        weights[rows, columns], spread = _shrink_layer(
            soft[rows, columns].double(), hard[rows, columns].double(), variance[rows, columns].double()
        )
        errors[rows, columns] = spread.sqrt().float()
    return weights, errors


def _blocks(n_examples: int, sizes: Sequence[int], block: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, n_examples, block):
        start = 0
        for size in sizes:
            yield slice(first, first + block), slice(start, start + size)
            start += size


def _shrink_layer(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """One layer; examples on which it does nothing, such as an expert that is not asked, say nothing of the others."""
    size = soft.square().mean(1)
    there = size > _NOTHING * size.max()
    weights, spread = soft.clone(), variance.clone()
    if bool(there.any()):
        weights[there], spread[there] = _shrink_together(soft[there], hard[there], variance[there])
    return weights, spread


def _shrink_together(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """One layer of examples on which it does something, every one in units of the size of its own reads.

    Effects on a sentence that a regression takes for neutral, or on a mail of which a classifier is sure, are a
    hundredth of those on others. In common units such examples were pulled to others' means and told others' noise.
    """
    unit = soft.square().mean(1, keepdim=True).sqrt()
    soft, hard, variance = soft / unit, hard / unit, _steadied(variance / unit.square())
    by_component, variance_a = _empirical_bayes(soft, hard, variance)
    by_example, variance_b = _wiener(soft, hard, variance)
    share = 0.5 * min(1.0, _participation(variance.mean(0)) / _EVEN)
    weights = torch.lerp(by_component, by_example, share)
    return weights * unit, torch.lerp(variance_a, variance_b, share) * unit.square()


_PRIOR_EXAMPLES = 2  # for how many examples the mean of the layer speaks where a component's noise is estimated


def _steadied(variance: Tensor) -> Tensor:
    """Better estimates of the noise: a handful of rounds says little about one read's, its component and layer more.

    What other examples say of a component is relative to the noise that each has in the layer, which all of its
    components tell.
    """
    count = len(variance)
    trust = count / (count + _PRIOR_EXAMPLES)
    of_example = variance.mean(1, keepdim=True)
    relative = variance / of_example.clamp_min(_TINY)
    of_component = torch.lerp(relative.mean(), relative.mean(0), trust) * of_example
    return (trust * variance + (2 - trust) * of_component) / 2 + _ROUNDING


_EVEN = 0.1  # participation from which the noise counts as evenly spread; between .05 and .2 nothing much changes


def _participation(noise: Tensor) -> float:
    """The fraction of the components among which noise [components] is spread, by the participation ratio."""
    return float(noise.sum().square() / (len(noise) * noise.square().sum()).clamp_min(_TINY**2))


def _empirical_bayes(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the examples, and deviations from them, each shrunk by component; weights and posterior variances."""
    count = soft.shape[0]
    mean_soft, mean_hard = soft.mean(0, keepdim=True), hard.mean(0, keepdim=True)
    mean, left = _towards(mean_soft, mean_hard, variance.mean(0, keepdim=True) / count)
    if count == 1:
        return mean, left
    # Deviations from a mean of the same reads have lost a little of their variance.
    whole = count / (count - 1)
    deviation, rest = _towards(soft - mean_soft, hard - mean_hard, variance, whole)
    return mean + deviation, left + rest / whole


def _towards(soft: Tensor, hard: Tensor, variance: Tensor, whole: float = 1.0) -> tuple[Tensor, Tensor]:
    """Soft reads shrunk towards the calibrated hard reads, with one prior variance a component."""
    prior = torch.zeros(soft.shape[1], dtype=soft.dtype)
    for _ in range(3):
        precision = 1 / (variance + prior)
        slope = (precision * soft * hard).sum() / (precision * hard.square()).sum().clamp_min(_TINY)
        correction = soft - slope * hard
        excess = (whole * correction.square() - variance).mean(0).clamp_min(0)
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
