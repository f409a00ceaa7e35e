"""Batches: mappings of tensors whose first axis is the example."""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hf_coar import models
from hf_coar.errors import DataError
from hf_coar.models import ragged

FROM_TABLES = "batches of texts, images and the like are what coar.load(model, data) makes of tables of them"

Batch = dict[str, Any]  # tensors, or lists of tensors or of mappings of them, one an example


def as_batch(item: Any) -> Batch:
    """One item of a data set as a checked batch; arrays and lists of numbers count as tensors.

    Raises:
        DataError: not a mapping (or pair) of tensors that agree on the number of examples, or an empty sequence.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        item = {"inputs": item[0], "labels": item[1]}
    item = ragged.unpacked(item)
    if not isinstance(item, Mapping):
        raise DataError(
            f"the data yielded a {type(item).__name__}; expected batches: mappings of tensors such as "
            f"{{'pixel_values': …, 'labels': …}}, or pairs (inputs, labels); {FROM_TABLES}"
        )
    entries = {"labels" if name == "label" else name: as_tensor(value) for name, value in item.items()}
    batch = {name: value for name, value in entries.items() if _is_entry(value)}
    sizes = {name: _size_of(value) for name, value in batch.items()}
    if not sizes or len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise DataError(
            "a batch must hold tensors (or lists of them, or of mappings of them) with the same first axis, at least "
            f"one example; got {sizes or sorted(item)}. Single examples are put into batches by "
            "torch.utils.data.DataLoader(examples, batch_size=32)"
        )
    _check_not_empty(batch)
    return batch


def as_tensor(value: Any) -> Any:
    """The tensor that a NumPy array or a (nested) list of numbers stands for; anything else as it is.

    An attention mask that somebody left as a list must not be overlooked, as what is no tensor is.
    """
    if isinstance(value, Tensor) and not value.is_floating_point() and value.layout is torch.strided:
        return value.contiguous()  # a part of longer labels: transformers' losses take views of them
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, list | tuple) or not _begins_with_number(value):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # ragged, or of more than numbers
        return value


def _begins_with_number(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, Number)


def _is_entry(value: Any) -> bool:
    """Whether a batch keeps this: a tensor, or a list with one tensor or mapping of tensors an example (objects)."""
    if isinstance(value, Tensor):
        return True
    return isinstance(value, list | tuple) and len(value) > 0 and all(_is_tensors(one) for one in value)


def _is_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(one, Tensor) for one in value.values())
    return isinstance(value, Tensor)


def _size_of(value: Any) -> int | None:
    return (value.shape[0] if value.dim() else None) if isinstance(value, Tensor) else len(value)


def _check_not_empty(batch: Batch) -> None:
    for name, value in batch.items():
        if isinstance(value, Tensor) and not value.numel():
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


def size(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds."""
    return models.n_examples(batch)


def rows(batch: Mapping[str, Any], start: int, stop: int) -> Batch:
    """Examples start … stop - 1 of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}


def take(batch: Mapping[str, Any], indices: Sequence[int] | Tensor) -> Batch:
    """Some examples of a batch, in the order given, one as often as it is named."""
    places = torch.as_tensor(indices, dtype=torch.long)
    listed: list[int] | None = None
    found = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            found[name] = value[places.to(value.device)]
        else:
            listed = places.tolist() if listed is None else listed
            found[name] = [value[index] for index in listed]
    return found


def some(batches: Sequence[Mapping[str, Any]], indices: Tensor) -> list[Batch]:
    """The examples of several batches that have these numbers, int64 [any], ascending; in batches as they come."""
    found, start = [], 0
    for batch in batches:
        stop = start + size(batch)
        of_batch = indices[(indices >= start) & (indices < stop)] - start
        found += [take(batch, of_batch)] if len(of_batch) else []
        start = stop
    return found


def concatenated(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, one after the other along their first axis."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch on a device."""
    return models.to(batch, device)


def device_of(batch: Mapping[str, Any]) -> torch.device:
    """Where the tensors of a batch are."""
    return next(one.device for value in batch.values() for one in pytree.tree_leaves(value) if isinstance(one, Tensor))
