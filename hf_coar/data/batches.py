"""Batches: mappings of tensors whose first axis is the example, and by what the examples are known again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_coar import models
from hf_coar.errors import DataError

Batch = dict[str, Any]  # tensors, or lists of tensors or of mappings of them, one an example


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
    batch = {"labels" if name == "label" else name: value for name, value in item.items() if _is_entry(value)}
    sizes = {name: _size_of(value) for name, value in batch.items()}
    if not sizes or len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise DataError(
            "a batch must hold tensors (or lists of them, or of mappings of them) with the same first axis, at least "
            f"one example; got {sizes or sorted(item)}"
        )
    _check_not_empty(batch)
    return batch


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


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch on a device."""
    return models.to(batch, device)


def device_of(batch: Mapping[str, Any]) -> torch.device:
    """Where the tensors of a batch are."""
    return next(value.device for value in batch.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class Identity:
    """By what the examples of a run are known again.

    Attributes:
        signatures: float64 [examples], see `signatures`.
        labels: int64 [examples]; -1 where there is no label of the whole example.
    """

    signatures: Tensor
    labels: Tensor

    @classmethod
    def of(cls, results: Mapping[str, Tensor]) -> "Identity":
        """From the results of a run."""
        return cls(results["signatures"], results["labels"])

    def check(self, other: "Identity") -> None:
        """Raises `DataError` unless the other examples are the same, in the same order."""
        ours, theirs = self.signatures, other.signatures
        if len(ours) != len(theirs):
            raise DataError(f"the data hold {len(theirs)} examples, and the attributions are of {len(ours)}")
        differing = (ours - theirs).abs() > _SIGNATURE_TOLERANCE * (1 + ours.abs())
        if differing.any():
            first = int(differing.nonzero()[0])
            raise DataError(
                f"{int(differing.sum())} of {len(ours)} examples are not those that were attributed, the first one is "
                f"example {first}; give the same data set, split and order (no shuffling)"
            )


_SIGNATURE_TOLERANCE = 1e-3


def identity(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `signatures` and `labels` of a batch."""
    labels = batch.get("labels")
    if labels is None or not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        labels = torch.full((size(batch),), -1)
    return {"signatures": signatures(batch), "labels": labels.detach().cpu().long()}


def signatures(batch: Mapping[str, Tensor]) -> Tensor:
    """One number an example, float64 [examples]; not a hash, so that it survives the rounding of a resized image.

    The sum over the inputs of a weighted mean, in which padding does not count.
    """
    real = batch.get("attention_mask")
    total = torch.zeros(size(batch), dtype=torch.float64)
    for name, value in batch.items():
        if name in ("attention_mask", "labels") or not isinstance(value, Tensor):
            continue
        flat = value.detach().cpu().double()
        if real is not None and real.shape == value.shape:
            flat = flat * real.detach().cpu().double()
        flat = flat.reshape(len(flat), -1)
        # Weights that differ by position, so that permuted pixels or tokens do not cancel.
        weights = torch.cos(torch.arange(flat.shape[1], dtype=torch.float64) * 0.1) + 1.5
        total += (flat * weights).sum(1) / (flat.abs().sum(1) + 1.0)
    return total
