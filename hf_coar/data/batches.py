"""Batches: mappings of tensors whose first axis is the example."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_coar.errors import DataError

Batch = dict[str, Tensor]


def as_batch(item: Any) -> Batch:
    """One item of a data set as a checked batch.

    Raises:
        DataError: not a mapping (or pair) of tensors that agree on the number of examples, or an empty sequence.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        item = {"inputs": item[0], "labels": item[1]}
    if not isinstance(item, Mapping):
        raise DataError(
            f"the data yielded a {type(item).__name__}; expected batches: mappings of tensors such as "
            "{'pixel_values': …, 'labels': …}, or pairs (inputs, labels)"
        )
    batch = {"labels" if name == "label" else name: value for name, value in item.items() if isinstance(value, Tensor)}
    sizes = {name: value.shape[0] if value.dim() else None for name, value in batch.items()}
    if not batch or len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise DataError(
            f"a batch must hold tensors with the same first axis, at least one example; got {sizes or sorted(item)}"
        )
    _check_not_empty(batch)
    return batch


def _check_not_empty(batch: Batch) -> None:
    for name, value in batch.items():
        if not value.numel():
            raise DataError(
                f"{name!r} has the shape {list(value.shape)}: there is nothing in it; leave such examples out"
            )
    attended = batch.get("attention_mask")
    if attended is not None and attended.dim() == 2:
        empty = (attended == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise DataError(
                f"empty sequences at {empty[:8]} of a batch of {size(batch)}: no token is attended; leave them out"
            )


def size(batch: Mapping[str, Tensor]) -> int:
    """How many examples a batch holds."""
    return next(iter(batch.values())).shape[0]


def rows(batch: Mapping[str, Tensor], start: int, stop: int) -> Batch:
    """Examples start … stop - 1 of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
