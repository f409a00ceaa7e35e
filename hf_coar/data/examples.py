"""Examples in batches that are read only when somebody needs them, each example under its place in the data set."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_coar.data import order
from hf_coar.data.batches import FROM_TABLES, Batch, as_batch, as_tensor, size
from hf_coar.data.columns import declared_names
from hf_coar.data.numbering import numbers, within
from hf_coar.data.streams import first_line, unbroken
from hf_coar.errors import CoarError, DataError, check_count
from hf_coar.storage import cards
from hf_coar.storage.texts import first_few

_BATCH_SIZE = 32


@dataclass(repr=False)
class Examples:
    """A data set with the preprocessing of a model: iterating yields batches, every time from the start.

    Attributes:
        dataset: a `datasets.Dataset` or `IterableDataset` of raw examples.
        prepare: turns a list of raw examples into a batch of tensors.
        batch_size: examples a batch; changes speed only.
        description: id, split and fingerprint: what goes into an attribution's `config.json`.
    """

    dataset: Any
    prepare: Callable[[list[dict]], Batch]
    batch_size: int = _BATCH_SIZE
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the batch size."""
        check_count(self.batch_size, "batch_size")

    def __iter__(self) -> Iterator[Batch]:
        """Batches, in the order of the data set.

        Raises:
            DataError: an example cannot be read; runs leave such a one out, and a batch by hand has no place for that.
        """
        start = 0
        for rows in _in_lists(self.dataset, self.batch_size):
            try:
                batch = self.prepare(rows)
            except CoarError:
                raise
            except Exception as error:  # a decoder's or a tokenizer's own family
                failed = _unpreparable(self, dict(enumerate(rows, start)))
                which, why = next(iter(failed.items()), (start, first_line(error)))
                raise DataError(
                    f"example {which} cannot be read: {why}; select(…) the others (attribute leaves it out by itself)"
                ) from error
            start += len(rows)
            yield batch

    def __len__(self) -> int:
        """How many batches.

        Raises:
            TypeError: the data set is a stream of unknown length.
        """
        return -(-len(self.dataset) // self.batch_size)

    def __repr__(self) -> str:
        """Two lines: how many examples of what, and their columns."""
        count = f"{len(self.dataset):,}" if hasattr(self.dataset, "__len__") else "a stream of"
        of = [str(part) for part in (cards.public_name(self.description), self.description.get("split")) if part]
        columns = ", ".join(getattr(self.dataset, "column_names", None) or ["unknown"])
        names = [str(name) for name in self.description.get("label_names") or ()]
        classes = f"; {len(names)} classes: {first_few(names, 6)}" if names else ""
        first = f"Examples({count} examples of {', '.join(of) or 'a data set'}, {self.batch_size} a batch"
        return f"{first},\n         columns {columns}{classes})"

    def with_batch_size(self, batch_size: int) -> "Examples":
        """These examples in batches of another size."""
        return Examples(self.dataset, self.prepare, batch_size, self.description)

    def select(self, indices: Iterable[int]) -> "Examples":
        """A part of the examples, by index, in the order given, or by a mask over all of them.

        Raises:
            OutOfRangeError: there is no such example.
        """
        length = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        indices = numbers(indices, length) if length is None else within(indices, length)
        chosen = {**self.description, "selected": indices}
        return Examples(self.dataset.select(indices), self.prepare, self.batch_size, chosen)


def _in_lists(rows: Iterable[Any], count: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while taken := list(itertools.islice(iterator, count)):
        yield taken


def batches(data: Any, batch_size: int | None = None) -> Iterable[Batch]:
    """What `attribute` and `evaluate` take, seen as batches.

    `Examples` and raw `datasets` objects are cut into batches of `batch_size` (32 by default; their columns must hold
    numbers or tensors); a `DataLoader`, a list or any other iterable already yields batches, mappings of tensors or
    pairs (inputs, labels). A mapping is one batch.

    Raises:
        DataError: data that cannot be iterated again, such as a generator, or that come in another order or with other
            values every time.
    """
    if isinstance(data, Examples):
        return data.with_batch_size(batch_size) if batch_size is not None else data
    if type(data).__module__.split(".")[0] == "datasets":
        if isinstance(data, dict):
            raise DataError(f"data holds the splits {sorted(data)}; give one of them, such as data[{min(data)!r}]")
        examples = Examples(data, _collate, _BATCH_SIZE if batch_size is None else batch_size, describe(data))
        order.check(examples)
        return examples
    if isinstance(data, Mapping):  # one batch, which is all there is
        data = [data]
    if not hasattr(data, "__iter__") or isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which cannot be iterated again; "
            "give a datasets.Dataset, a DataLoader, or a list of batches"
        )
    order.check(data)
    return data


def _collate(rows: list[dict]) -> Batch:
    from torch.utils.data import default_collate

    try:
        columns = default_collate([{name: as_tensor(value) for name, value in row.items()} for row in rows])
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"the data set's columns {sorted(rows[0])} cannot be stacked into tensors ({error}); "
            "use coar.load, tokenize with padding='max_length', or give the data set a transform that yields tensors "
            "of one shape"
        ) from error
    batch = {name: value for name, value in columns.items() if isinstance(value, Tensor)}
    if not batch:
        raise DataError(f"the data set's columns {sorted(rows[0])} hold no numbers; {FROM_TABLES}")
    return batch


def describe(data: Any) -> dict[str, Any]:
    """What is known of a data set: id, split, fingerprint, and what its classes are called."""
    if type(data).__module__.split(".")[0] == "datasets":
        features = getattr(data, "features", None) or {}
        names = next(filter(None, (declared_names(features.get(label)) for label in ("labels", "label"))), None)
        return {"fingerprint": getattr(data, "_fingerprint", None), **({"label_names": names} if names else {})}
    return dict(getattr(data, "description", {}) or {})


# -------------------------------------------------------------------------------------------------- read when needed


@dataclass(frozen=True)
class Read:
    """A batch that was read.

    Attributes:
        pieces: (index of the first example, the examples): whole but for examples that could not be read.
        failed: why, by the index of the example.
    """

    pieces: list[tuple[int, Batch]]
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """A batch, read or not: examples start … stop - 1 of the data set.

    Attributes:
        number: of the batch.
        start: its first example.
        stop: one past its last.
        read: reads and decodes it.
        decodes: whether that makes new tensors of something else, whenever it is wanted.
        in_memory: whether its tensors lie there anyway, as in a list of batches.
    """

    number: int
    start: int
    stop: int
    read: Callable[[], Read]
    decodes: bool = False
    in_memory: bool = False


class Chunks:
    """The batches of a data set, none of them decoded before it is read.

    Attributes:
        random_access: whether `at` finds a batch without passing the ones before it.
    """

    def __init__(self, data: Iterable) -> None:
        """The batches of what `batches` returns.

        Raises:
            DataError: a list that holds something else than batches.
        """
        self._data = data
        # A stream of `datasets` has a `__getitem__` too, inherited and of no use.
        indexed = isinstance(data, Examples) and hasattr(data.dataset, "__getitem__")
        self._indexed = indexed and hasattr(data.dataset, "__len__")
        self._bounds: list[int] | None = None
        if isinstance(data, Sequence):
            sizes = (size(as_batch(item)) for item in data)
            self._bounds = list(itertools.accumulate(sizes, initial=0))
        self.random_access = self._indexed or self._bounds is not None

    def __len__(self) -> int:
        """How many.

        Raises:
            TypeError: a stream of unknown length.
        """
        return len(self._data)

    @property
    def count(self) -> int | None:
        """How many; None for a stream of unknown length."""
        try:
            return len(self._data)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Chunk]:
        """All of them in order."""
        if self.random_access:
            yield from map(self.at, range(len(self)))
        elif isinstance(self._data, Examples):
            lists = _in_lists(unbroken(self._data.dataset), self._data.batch_size)
            yield from self._numbered((len(rows), _reader(self._data, rows)) for rows in lists)
        else:
            yield from self._numbered((size(batch), _ready(batch)) for batch in map(as_batch, self._data))

    def at(self, number: int) -> Chunk:
        """Batch `number`; passes the ones before it where there is no random access."""
        if self._bounds is not None:
            start, stop = self._bounds[number : number + 2]
            return Chunk(number, start, stop, lambda: Read([(start, as_batch(self._data[number]))]), in_memory=True)
        if not self._indexed:
            return next(itertools.islice(self, number, None))
        dataset, batch_size = self._data.dataset, self._data.batch_size
        indices = range(number * batch_size, min((number + 1) * batch_size, len(dataset)))
        read = _indexed_reader(self._data, indices)
        return Chunk(number, indices.start, indices.stop, read, decodes=True)

    @staticmethod
    def _numbered(found: Iterable[tuple[int, Callable[[int], Read]]]) -> Iterator[Chunk]:
        start = 0
        for number, (count, read) in enumerate(found):
            yield Chunk(number, start, start + count, lambda read=read, start=start: read(start))
            start += count


def few(data: Any, count: int) -> Batch:
    """The first examples that can be read, at most `count` of them; no more than these are decoded.

    Raises:
        DataError: there is none.
    """
    if isinstance(data, Examples):
        data = data.with_batch_size(min(count, data.batch_size))
    n_examples, why = 0, {}
    for chunk in Chunks(data):
        read = chunk.read()
        for _, batch in read.pieces:
            return {name: value[:count] for name, value in batch.items()}
        n_examples, why = chunk.stop, why or read.failed
    if why:
        raise DataError(f"none of the {n_examples} examples can be read; the first: {next(iter(why.values()))}")
    raise DataError("the data set is empty; nothing to run on")


def _ready(batch: Batch) -> Callable[[int], Read]:
    return lambda start: Read([(start, batch)])


def _reader(examples: Examples, rows: list[dict]) -> Callable[[int], Read]:
    def read(start: int) -> Read:
        return _prepared(examples, dict(enumerate(rows, start)), {})

    return read


def _indexed_reader(examples: Examples, indices: range) -> Callable[[], Read]:
    def read() -> Read:
        try:
            rows = [examples.dataset[i] for i in indices]
        except CoarError:
            raise
        except Exception:
            return _prepared(examples, *_readable(examples.dataset, indices))
        return _prepared(examples, dict(zip(indices, rows, strict=True)), {})

    return read


def _readable(dataset: Any, indices: Iterable[int]) -> tuple[dict[int, dict], dict[int, str]]:
    """The rows that can be read, and why the others cannot, both by index."""
    rows, failed = {}, {}
    for index in indices:
        try:
            rows[index] = dataset[index]
        except Exception as error:
            failed[index] = first_line(error)
    return rows, failed


def _prepared(examples: Examples, rows: dict[int, dict], failed: dict[int, str]) -> Read:
    """Rows as pieces without a hole; where the whole cannot be prepared, the rows at fault are found one by one."""
    try:
        return Read(list(_pieces(examples, rows)), failed)
    except CoarError:
        raise
    except Exception:
        failed = failed | _unpreparable(examples, rows)
    if not failed.keys() & rows.keys():  # each alone can be prepared, together they cannot
        return Read(list(_pieces(examples, rows)), failed)
    return Read(list(_pieces(examples, {i: row for i, row in rows.items() if i not in failed})), failed)


def _unpreparable(examples: Examples, rows: dict[int, dict]) -> dict[int, str]:
    failed = {}
    for index, row in rows.items():
        try:
            examples.prepare([row])
        except Exception as error:
            failed[index] = first_line(error)
    return failed


def _pieces(examples: Examples, rows: dict[int, dict]) -> Iterator[tuple[int, Batch]]:
    """Batches of neighbours: index minus place is the same for all of them."""
    for _, neighbours in itertools.groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
        indices = [index for _, index in neighbours]
        yield indices[0], as_batch(examples.prepare([rows[index] for index in indices]))
