"""Fidelity: how far predictions agree with what was measured, by one correlation and one slope for all who ask."""

import torch
from torch import Tensor


def correlation(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Pearson correlations along an axis, float32 of the other axes; NaN where one side does not vary."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    scale = (a.square().sum(dim) * b.square().sum(dim)).sqrt()
    return torch.where(scale > 0, (a * b).sum(dim) / scale, torch.nan).float()


def slope(predicted: Tensor, measured: Tensor) -> float:
    """Slope of measured on predicted outputs [masks, examples], pooled over the examples after centring each.

    1 = the scale is right; 0 where nothing is predicted to vary.
    """
    p, m = predicted.double() - predicted.double().mean(0), measured.double() - measured.double().mean(0)
    return float((p * m).sum() / p.square().sum().clamp_min(1e-300))
