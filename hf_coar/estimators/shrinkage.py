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

import itertools
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
    weights, errors = torch.empty_like(soft), torch.empty_like(soft)  # where the reads are
    for first in range(0, soft.shape[0], block):
        rows = slice(first, first + block)
        for columns in _alike(sizes, soft.device):
            # [layers, examples, components]
            reads = [torch.stack([reads[rows, one] for one in columns]).double() for reads in (soft, hard, variance)]
            for one, shrunk, spread in zip(columns, *_shrink_layers(*reads), strict=True):
                weights[rows, one], errors[rows, one] = shrunk.float(), spread.sqrt().float()
    return weights, errors


_AT_ONCE = 2**12  # components: as much as the caches of a CPU hold
_AT_ONCE_BY_GPU = 2**16  # it is done with a layer before it is told of the next: .20 s for a ViT-B/16's (H200)


def _alike(sizes: Sequence[int], device: torch.device) -> Iterator[Sequence[slice]]:
    """The columns of some layers of one size, which are shrunk at once."""
    most = _AT_ONCE if device.type == "cpu" else _AT_ONCE_BY_GPU
    places = [slice(stop - size, stop) for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)]
    for size in sorted(set(sizes)):
        alike, step = [one for one in places if one.stop - one.start == size], max(1, most // size)
        yield from (alike[first : first + step] for first in range(0, len(alike), step))


def _shrink_layers(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Some layers; examples on which one does nothing, such as an unasked expert, say nothing of the others."""
    size = soft.square().mean(2)
    there = size > _NOTHING * size.amax(1, keepdim=True)
    if bool(there.all()):
        return _shrink_together(soft, hard, variance)
    weights, spread = soft.clone(), variance.clone()
    for layer, some in enumerate(there):
        if bool(some.any()):
            of_layer = _shrink_together(*(reads[layer, some][None] for reads in (soft, hard, variance)))
            weights[layer, some], spread[layer, some] = of_layer[0][0], of_layer[1][0]
    return weights, spread


def _shrink_together(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Layers of examples on which they do something, every one in units of the size of its own reads.

    Effects on a sentence that a regression takes for neutral, or on a mail of which a classifier is sure, are a
    hundredth of those on others. In common units such examples were pulled to others' means and told others' noise.
    """
    unit = soft.square().mean(2, keepdim=True).sqrt()
    soft, hard, variance = soft / unit, hard / unit, _steadied(variance / unit.square())
    by_component, variance_a = _empirical_bayes(soft, hard, variance)
    by_example, variance_b = _wiener(soft, hard, variance)
    share = 0.5 * (_participation(_mean(variance)) / _EVEN).clamp_max(1.0)
    weights = torch.lerp(by_component, by_example, share)
    return weights * unit, torch.lerp(variance_a, variance_b, share) * unit.square()


_PRIOR_EXAMPLES = 2  # for how many examples the mean of the layer speaks where a component's noise is estimated


def _steadied(variance: Tensor) -> Tensor:
    """Better estimates of the noise: a handful of rounds says little about one read's, its component and layer more.

    What other examples say of a component is relative to the noise that each has in the layer, which all of its
    components tell.
    """
    count = variance.shape[1]
    trust = count / (count + _PRIOR_EXAMPLES)
    of_example = variance.mean(2, keepdim=True)
    relative = variance / of_example.clamp_min(_TINY)
    of_component = torch.lerp(relative.mean((1, 2), keepdim=True), _mean(relative), trust) * of_example
    return (trust * variance + (2 - trust) * of_component) / 2 + _ROUNDING


_EVEN = 0.1  # participation from which the noise counts as evenly spread; between .05 and .2 nothing much changes


def _participation(noise: Tensor) -> Tensor:
    """The fraction of a layer's components among which noise [layers, 1, components] is spread, [layers, 1, 1]."""
    return _sum(noise).square() / (noise.shape[2] * _sum(noise.square())).clamp_min(_TINY**2)


def _mean(values: Tensor) -> Tensor:
    """Over the examples, [layers, 1, components]."""
    return values.mean(1, keepdim=True)


def _sum(values: Tensor) -> Tensor:
    """Over examples and components, [layers, 1, 1]."""
    return values.sum((1, 2), keepdim=True)


def _empirical_bayes(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the examples, and deviations from them, each shrunk by component; weights and posterior variances."""
    count = soft.shape[1]
    mean_soft, mean_hard = _mean(soft), _mean(hard)
    mean, left = _towards(mean_soft, mean_hard, _mean(variance) / count)
    if count == 1:
        return mean, left
    # Deviations from a mean of the same reads have lost a little of their variance.
    whole = count / (count - 1)
    deviation, rest = _towards(soft - mean_soft, hard - mean_hard, variance, whole)
    return mean + deviation, left + rest / whole


def _towards(soft: Tensor, hard: Tensor, variance: Tensor, whole: float = 1.0) -> tuple[Tensor, Tensor]:
    """Soft reads shrunk towards the calibrated hard reads, with one prior variance a component."""
    prior = torch.zeros_like(soft[:, :1])
    for _ in range(3):
        precision = 1 / (variance + prior)
        slope = _sum(precision * soft * hard) / _sum(precision * hard.square()).clamp_min(_TINY)
        correction = soft - slope * hard
        excess = _mean(whole * correction.square() - variance).clamp_min(0)
        prior = (excess + excess.mean(2, keepdim=True)) / 2
    return slope * hard + correction * prior / (prior + variance), variance * prior / (prior + variance)


def _wiener(soft: Tensor, hard: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The linear filter across examples of least expected error; weights and posterior variances."""
    slope = _sum(soft * hard) / _sum(hard.square()).clamp_min(_TINY)
    correction = soft - slope * hard
    noise = variance.mean(2)
    signal = _positive_part(correction @ correction.mT / soft.shape[2] - noise.diag_embed())
    gain = torch.linalg.solve(signal + noise.diag_embed(), signal, left=False)
    posterior = (signal - gain @ signal).diagonal(dim1=1, dim2=2).clamp_min(0)
    # The filter knows one noise an example; a component's own noise scales what is left of it.
    return slope * hard + gain @ correction, posterior[..., None] * variance / noise[..., None]


def _positive_part(matrix: Tensor) -> Tensor:
    """Symmetric matrices without their negative eigenvalues; by the CPU, as GPUs are slow at so few examples."""
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return ((vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT).to(matrix.device)
