"""Examples with partners: entries of a second example travel with each, under the same names after `partner_`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_coar.data.batches import Batch, as_batch, concatenated, rows, size
from hf_coar.data.examples import Examples, batches, describe
from hf_coar.errors import DataError
from hf_coar.models import PARTNER

_MISSING = object()


def with_partners(data: Any, add: Callable[[Batch], Batch]) -> Any:
    """The data with partners that a function finds for every batch.

    Args:
        data: anything that `batches` takes.
        add: (batch) -> the batch with `partner_…` entries; of any number of examples.
    """
    data = batches(data)
    if isinstance(data, Examples):
        return Examples(data.dataset, lambda rows: add(data.prepare(rows)), data.batch_size, data.description)
    if isinstance(data, Sequence):
        return [add(as_batch(item)) for item in data]
    return _Mapped(data, add)


def paired(data: Any, others: Any) -> Any:
    """The data, each example with the one at its place among `others` as partner.

    Args:
        data: anything that `batches` takes.
        others: the same; as many examples, of the same shapes.

    Raises:
        DataError: fewer or more of them, or (when the batch is read) one of another shape; says which.
    """
    data, others = batches(data), batches([others] if isinstance(others, Mapping) else others)
    if isinstance(data, Examples) and isinstance(others, Examples):
        both = _Rows(data.dataset, others.dataset)
        prepare = lambda pairs: joined(data.prepare([a for a, _ in pairs]), others.prepare([b for _, b in pairs]))  # noqa: E731
        return Examples(both, prepare, data.batch_size, data.description)
    found = _Zipped(data, others)
    return list(found) if isinstance(data, Sequence) else found


class _Mapped:
    """An iterable of batches, each with something added."""

    def __init__(self, data: Iterable, add: Callable[[Batch], Batch]) -> None:
        self._data, self._add, self.description = data, add, describe(data)

    def __iter__(self) -> Iterator[Batch]:
        return (self._add(as_batch(item)) for item in self._data)

    def __len__(self) -> int:
        return len(self._data)


class _Zipped:
    """Batches of two iterables that are cut alike, or whose examples can be gathered to be so."""

    def __init__(self, data: Iterable, others: Iterable) -> None:
        self._data, self._others, self.description = data, others, describe(data)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        rest, left, first = iter(self._others), None, 0
        for batch in map(as_batch, self._data):
            wanted = size(batch)
            while left is None or size(left) < wanted:
                more = next(rest, _MISSING)
                if more is _MISSING:
                    there = first + (0 if left is None else size(left))
                    raise DataError(f"there are only {there} partners, and more examples; give one for every example")
                left = as_batch(more) if left is None else _appended(left, as_batch(more))
            yield joined(batch, rows(left, 0, wanted), first)
            left = rows(left, wanted, size(left)) if size(left) > wanted else None
            first += wanted
        if left is not None or next(rest, _MISSING) is not _MISSING:
            raise DataError(f"there are {first} examples, and more partners; give one for every example")


def _appended(one: Batch, more: Batch) -> Batch:
    try:
        return concatenated([one, more])
    except (RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"batches of partners cannot be cut as those of the data are: {error}") from error


class _Rows:
    """Raw examples of two data sets, pair by pair."""

    def __init__(self, one: Any, other: Any) -> None:
        if hasattr(one, "__len__") and hasattr(other, "__len__") and len(one) != len(other):
            raise DataError(f"there are {len(one)} examples and {len(other)} partners; give one for every example")
        self._one, self._other = one, other

    def __len__(self) -> int:
        return len(self._one)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._one[index], self._other[index]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return zip(self._one, self._other, strict=True)

    def select(self, indices: Sequence[int]) -> "_Rows":
        """Some of the pairs."""
        return _Rows(self._one.select(indices), self._other.select(indices))


def joined(batch: Batch, others: Batch, first: int = 0) -> Batch:
    """A batch with the entries of another one as partners.

    Raises:
        DataError: the shapes differ; says at which example, and at which token.
    """
    for name, value in batch.items():
        other = others.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            raise DataError(_unlike(name, value, other, first))
    attended, theirs = batch.get("attention_mask"), others.get("attention_mask")
    if isinstance(attended, Tensor) and isinstance(theirs, Tensor) and not torch.equal(attended, theirs):
        row = int((attended != theirs).flatten(1).any(1).nonzero()[0])
        raise DataError(_other_length(first, row, batch, others))
    return {**batch, **{PARTNER + name: value for name, value in others.items()}}


def _unlike(name: str, value: Tensor, other: Tensor, first: int) -> str:
    if value.shape[:1] == other.shape[:1] and value.dim() == 2 == other.dim() and not value.is_floating_point():
        width = min(value.shape[1], other.shape[1])
        differing = (value[:, :width] != other[:, :width]).any(0).nonzero().flatten().tolist()
        where = f"; they first differ at token {differing[0]}" if differing else ""
        return (
            f"the examples from {first} on have {value.shape[1]} tokens in {name!r} and their partners "
            f"{other.shape[1]}{where}; write prompts whose tokens go one to one"
        )
    return (
        f"{name!r} has the shape {list(value.shape)} in the batch from example {first} on and {list(other.shape)} in "
        "that of its partners; give partners of the same shape, in batches cut alike"
    )


def _other_length(first: int, row: int, batch: Batch, others: Batch) -> str:
    mine, theirs = (int(part["attention_mask"][row].sum()) for part in (batch, others))
    tokens, others_tokens = (part.get("input_ids") for part in (batch, others))
    where = ""
    if isinstance(tokens, Tensor) and isinstance(others_tokens, Tensor):
        differing = (tokens[row] != others_tokens[row]).nonzero().flatten().tolist()
        where = f"; they first differ at token {differing[0]}" if differing else ""
    return (
        f"example {first + row} has {mine} tokens and its partner {theirs}{where}; write prompts whose tokens go one "
        "to one"
    )
