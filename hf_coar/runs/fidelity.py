"""Fidelity: how far predictions agree with what was measured, by one correlation and one slope for all who ask."""

import torch
from torch import Tensor

_RESAMPLES = 400


def correlation(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Pearson correlations along an axis, float32 of the other axes; NaN where one side does not vary."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    scale = (a.square().sum(dim) * b.square().sum(dim)).sqrt()
    return torch.where(scale > 0, (a * b).sum(dim) / scale, torch.nan).float()


def pooled(predicted: Tensor, measured: Tensor) -> float:
    """Correlation of predicted and measured outputs [masks, examples] within examples, pooled after centring each.

    NaN where one side does not vary.
    """
    return float(correlation(*(_within(values).flatten() for values in (predicted, measured))))


def pooled_at_most(predicted: Tensor, measured: Tensor, level: float = 0.975) -> float:
    """What `pooled` is below with a certainty, by resampling the values (Efron 1979).

    Of few values of heavy tails one that is missed may be all there is to it: 32 gave .43, a hundred masks .94.
    """
    p, m = (_within(values).flatten() for values in (predicted, measured))
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(p), (len(p),), generator=generator) for _ in range(_RESAMPLES))
    found = torch.stack([correlation(p[rows], m[rows]) for rows in drawn])
    return float(found[~found.isnan()].quantile(level))


def _within(values: Tensor) -> Tensor:
    return values.double() - values.double().mean(0)


def slope(predicted: Tensor, measured: Tensor) -> float:
    """Slope of measured on predicted outputs [masks, examples], pooled over the examples after centring each.

    1 = the scale is right; 0 where nothing is predicted to vary.
    """
    p, m = _within(predicted), _within(measured)
    return float((p * m).sum() / p.square().sum().clamp_min(1e-300))
