"""The design of a regression: random 0/1 masks with their means taken off, and the matrix products that it needs.

The masks stay one byte an entry; they become floats a stretch at a time. Counts of components that two masks both
ablate are whole numbers, so that Gram matrices of unscaled masks are exact in whatever arithmetic makes them.
"""

import torch
from torch import Tensor

_ELEMENTS = 2**26  # entries of the masks that are floats at a time
_BLOCK = 2048  # rows of a Gram matrix that are made at a time
_EXACT = 2**26  # entries up to which products are float64


class Design:
    """X = (masks - their means) · diag(scale).

    Attributes:
        ablated_mean: float64 [components], the fraction of masks that ablate a component.
        dtype: of the products.
    """

    def __init__(self, masks: Tensor, scale: Tensor | None = None) -> None:
        """Made of masks, bool [masks, components]; scale, float [components], is 1 by default."""
        self.masks, self.scale = masks, scale
        self.shape = masks.shape
        self.dtype = torch.float64 if masks.numel() <= _EXACT else torch.float32
        counts = [(~chunk).sum(0) for chunk in masks.split(_rows_at_once(masks.shape[1]))]
        self.ablated_mean = torch.stack(counts).sum(0).double() / masks.shape[0]

    def scaled(self, scale: Tensor) -> "Design":
        """These masks with another scale."""
        other = object.__new__(Design)
        other.__dict__.update(self.__dict__, scale=scale)
        return other

    def times(self, columns: Tensor) -> Tensor:
        """X · columns: [components, k] -> [masks, k]."""
        columns = self._by_scale(columns.to(self.dtype))
        means = self.ablated_mean.to(self.dtype) @ columns
        chunks = self.masks.split(_rows_at_once(self.shape[1]))
        return torch.cat([means - (~chunk).to(self.dtype) @ columns for chunk in chunks])

    def transposed(self, columns: Tensor) -> Tensor:
        """Xᵀ · columns: [masks, k] -> [components, k]."""
        columns = columns.to(self.dtype)
        total = torch.outer(self.ablated_mean.to(self.dtype), columns.sum(0))
        step = _rows_at_once(self.shape[1])
        for chunk, part in zip(self.masks.split(step), columns.split(step), strict=True):
            total -= (~chunk).to(self.dtype).T @ part
        return self._by_scale(total)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 of X."""
        rows = self.ablated_mean.to(self.dtype) - (~self.masks[start:stop]).to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(self.dtype)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns start … stop - 1 of X."""
        columns = self.ablated_mean[start:stop].to(self.dtype) - (~self.masks[:, start:stop]).to(self.dtype)
        return columns if self.scale is None else columns * self.scale[start:stop].to(self.dtype)

    def gram_of_masks(self, dtype: torch.dtype) -> Tensor:
        """X · Xᵀ, [masks, masks]."""
        mean = self.ablated_mean
        if self.scale is None:
            gram, weighted = counts(self.masks, dtype), mean
        else:
            variance = self.scale.double().square()
            gram, weighted = weighted_counts(self.masks, variance, dtype), variance * mean
        step = _rows_at_once(self.shape[1])
        with_mean = torch.cat(
            [((~c).to(self.dtype) @ weighted.to(self.dtype)).double() for c in self.masks.split(step)]
        )
        for i in range(0, len(gram), _BLOCK):
            offset = with_mean[i : i + _BLOCK, None] + with_mean - weighted @ mean
            gram[i : i + _BLOCK] -= offset.to(dtype)
        return gram

    def gram_of_components(self, dtype: torch.dtype) -> Tensor:
        """Xᵀ · X, [components, components]."""
        gram, mean = counts(self.masks.T, dtype), self.ablated_mean
        for i in range(0, len(gram), _BLOCK):
            gram[i : i + _BLOCK] -= (self.shape[0] * torch.outer(mean[i : i + _BLOCK], mean)).to(dtype)
        if self.scale is not None:
            scale = self.scale.to(dtype)
            gram *= scale
            gram *= scale[:, None]
        return gram

    def _by_scale(self, columns: Tensor) -> Tensor:
        return columns if self.scale is None else columns * self.scale.to(columns.dtype)[:, None]


def _rows_at_once(width: int) -> int:
    return max(1, _ELEMENTS // max(1, width))


def counts(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """How many entries are False in both of two rows, exact [rows, rows]."""
    n_rows = masks.shape[0]
    gram = torch.empty(n_rows, n_rows, dtype=dtype, device=masks.device)
    multiply = _count_in_bytes if _multiplies_bytes(masks) else _count_in_floats
    for i in range(0, n_rows, _BLOCK):
        first = (~masks[i : i + _BLOCK]).contiguous()
        for j in range(0, i + 1, _BLOCK):
            second = first if i == j else (~masks[j : j + _BLOCK]).contiguous()
            block = multiply(first, second).to(dtype)
            gram[i : i + _BLOCK, j : j + _BLOCK] = block
            if i != j:
                gram[j : j + _BLOCK, i : i + _BLOCK] = block.T
    return gram


def _multiplies_bytes(masks: Tensor) -> bool:
    """Whether the processor has instructions for products of bytes, many times as fast as floats."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return masks.device.type == "cpu" and hasattr(torch, "_int_mm") and supported is not None and supported()


def _count_in_bytes(first: Tensor, second: Tensor) -> Tensor:
    return torch._int_mm(first.view(torch.int8), second.view(torch.int8).T.contiguous())


def _count_in_floats(first: Tensor, second: Tensor) -> Tensor:
    total = torch.zeros(first.shape[0], second.shape[0], device=first.device)
    step = max(1, _ELEMENTS // (2 * _BLOCK))
    for a, b in zip(first.split(step, dim=1), second.split(step, dim=1), strict=True):
        total += a.float() @ b.float().T
    return total


def weighted_counts(masks: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the weights of the entries that are False in both of two rows, [rows, rows]."""
    n_rows, n_columns = masks.shape
    gram = torch.zeros(n_rows, n_rows, dtype=dtype, device=masks.device)
    step = max(1, _ELEMENTS // max(1, n_rows))
    for start in range(0, n_columns, step):
        part = (~masks[:, start : start + step]).to(dtype)
        heavy = part * weights[start : start + step].to(dtype)
        for i in range(0, n_rows, _BLOCK):
            gram[i : i + _BLOCK, : i + _BLOCK] += heavy[i : i + _BLOCK] @ part[: i + _BLOCK].T
    for i in range(0, n_rows, _BLOCK):
        gram[:i, i : i + _BLOCK] = gram[i : i + _BLOCK, :i].T
    return gram


def diagonal_of_inverse(factor: Tensor, block: int = 512) -> Tensor:
    """Diagonal of (L Lᵀ)⁻¹ for a lower triangular L, at a third of the cost of the inverse: column norms of L⁻¹."""
    n = factor.shape[0]
    diagonal = torch.empty(n, dtype=factor.dtype, device=factor.device)
    for start in range(0, n, block):
        width = min(block, n - start)
        columns = torch.eye(n - start, width, dtype=factor.dtype, device=factor.device)
        columns = torch.linalg.solve_triangular(factor[start:, start:], columns, upper=False)
        diagonal[start : start + width] = columns.square().sum(0)
    return diagonal
