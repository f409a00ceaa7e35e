"""Modules known by what they do, not by their names: they are tried out on a few numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Bounds = tuple[float, float]  # of a clamp: what lies between is left as it is; the upper one may be infinite


def elementwise_modules(model: nn.Module) -> dict[nn.Module, Bounds | None]:
    """Modules without parameters, children or buffers that act on every entry alone, found by trying them out.

    With the bounds of those that are clamps, such as ReLU; None for others.
    """
    found = {}
    for module in model.modules():
        if _any(module.children()) or _any(module.parameters()) or _any(module.buffers()):
            continue
        if not isinstance(module, nn.Identity | nn.Dropout) and _is_elementwise(module):
            found[module] = _bounds(module)
    return found


def _bounds(module: nn.Module) -> Bounds | None:
    x = torch.cat([torch.linspace(-9.37, 9.31, 94), torch.tensor([-1e4, 1e4])]).reshape(2, 3, 4, 4)
    with torch.no_grad():
        value = module(x.clone())
    low, high = value.flatten()[-2:].tolist()
    high = high if high < 1e4 else float("inf")
    return (low, high) if low > -1e4 and torch.equal(value, x.clamp(low, high)) else None


def _is_elementwise(module: nn.Module) -> bool:
    """Whether entries in another order come out in that order, and one that is moved far moves no other one."""
    x = torch.linspace(-2.1, 2.3, 96).reshape(2, 3, 4, 4)
    order = torch.arange(x.numel()).mul(41).add(17) % x.numel()  # 41 and 96 have no common divisor
    # Both ways: what takes the largest of several (a pooling that keeps the size) hears of one of them only.
    moved = [x.clone(), x.clone()]
    for one, end in zip(moved, (-9.0, 9.0), strict=True):
        one[1, 2, 0, 1] = end
    try:
        with torch.no_grad():
            value, shuffled = module(x.clone()), module(x.flatten()[order].reshape(x.shape))
            others = [module(one.clone()) for one in moved]
    except Exception:  # whatever a module that wants another input may raise
        return False
    if not isinstance(value, Tensor) or value.shape != x.shape or torch.equal(value, x):
        return False
    same_everywhere = torch.allclose(shuffled.flatten(), value.flatten()[order], atol=1e-6)
    differing = [place.tolist() for other in others for place in (other != value).nonzero()]
    return same_everywhere and all(place == [1, 2, 0, 1] for place in differing)


def normalising_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that normalise the last axis by what they are given, such as every library's RMSNorm.

    They have vectors of one length for parameters, if any module has them, and neither children nor buffers.
    """
    found = []
    for module in model.modules():
        sizes = {tuple(value.shape) for value in module.parameters()}
        if len(sizes) == 1 and not _any(module.children()) and not _any(module.buffers()):
            (shape,) = sizes
            if len(shape) == 1 and shape[0] > 1 and _is_normalising(module, shape[0]):
                found.append(module)
    return found


def _any(values: Iterable[object]) -> bool:
    return any(True for _ in values)


def _is_normalising(module: nn.Module, width: int) -> bool:
    parameter = next(module.parameters())
    if parameter.device.type == "meta":
        return False
    x = torch.arange(6 * width, device=parameter.device).mul(0.7).sin().add(0.1).reshape(2, 3, width)
    x = x.to(parameter.dtype)
    changed = x.clone()
    changed[1, 2] = x[0, 0]
    try:
        with torch.no_grad():
            value, larger, moved = module(x.clone()), module(3 * x), module(changed)
    except Exception:  # whatever a module that wants another input may raise
        return False
    if not isinstance(value, Tensor) or value.shape != x.shape or not bool(value.isfinite().all()):
        return False
    close = 0.05 * float(value.abs().max())  # of half precision and of a small number below the root
    apart = torch.equal(moved[0], value[0]) and torch.equal(moved[1, :2], value[1, :2])
    return apart and close > 0 and bool((larger - value).abs().max() < close)
