"""Labels of a data set, understood: as tensors, and what the classes are called."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.data.columns import Table
from hf_coar.data.label_readings import Convert, NotUnderstood, few, meant_by, read, strange_because, wanted
from hf_coar.errors import DataError
from hf_coar.models.classes import CLASSES, NUMBER, SEVERAL, Head
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """The labels of a data set, understood.

    Attributes:
        columns: that hold them: one, or one a class.
        kind: `CLASSES`, `NUMBER` or `SEVERAL`.
        convert: an entry of the column -> class index (int), number (float), or list of numbers.
        names: of the classes by index; None where nobody has named them.
    """

    columns: tuple[str, ...]
    kind: str
    convert: Convert
    names: tuple[str, ...] | None = None

    def tensor(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The labels of raw examples: int64 [examples]; float32 for numbers, [examples, labels] for several at once."""
        values = [self.convert(self._entry(row)) for row in rows]
        return torch.tensor(values, dtype=torch.int64 if self.kind == CLASSES else torch.float32)

    def _entry(self, row: Mapping[str, Any]) -> Any:
        return row[self.columns[0]] if len(self.columns) == 1 else [row[column] for column in self.columns]

    def counts(self, values: Iterable[Any]) -> dict[str, int]:
        """How many examples each class has, by name; empty for labels that are no classes."""
        if self.kind != CLASSES:
            return {}
        found = Counter(self.convert(value) for value in values)
        return {self.named(label): found[label] for label in sorted(found)}

    def named(self, label: int) -> str:
        """A class by its name, or as `class 3`."""
        return self.names[label] if self.names and 0 <= label < len(self.names) else f"class {label}"


def understood(name: str | Sequence[str], table: Table, head: Head, values: Sequence[Any]) -> Labels:
    """The entries of a column as labels of the head.

    Args:
        name: of the column; or of one column a class, see `label_columns`.
        table: the data set's columns.
        head: of the model.
        values: entries, all of them or the first of a stream; lists with one of each column where there are several.

    Raises:
        DataError: they are no labels of this head; the message says what they look like and what the head has.
    """
    single = isinstance(name, str)
    feature = table.features[name] if single else None
    if not single and head.kind != NUMBER:
        head = replace(head, kind=SEVERAL, n=head.n or len(name))
    kind = head.kind or CLASSES
    try:
        reading = read(values, feature, head)
    except NotUnderstood as error:
        raise DataError(
            f"the labels in {name!r} of {table.name!r} look like {few(values)}, and the model needs {wanted(head)}: "
            f"{error}; {table.name!r} has {table.shown()}"
        ) from error
    if single and kind == CLASSES and not strange_because(name, meant_by(head.names)):
        logger.warning(
            "labels: %r, the name of the column of labels, is a class itself: if the table begins with its first "
            "example, give it a line with the names of the columns", name,
        )  # fmt: skip
    if reading.note or reading.doubt:
        logger.log(logging.WARNING if reading.doubt else logging.INFO, "labels: %s", reading.doubt or reading.note)

    def convert(value: Any) -> Any:
        try:
            return reading.convert(value)
        except (NotUnderstood, TypeError, ValueError) as error:
            raise DataError(
                f"an entry {shortened(repr(value))} of the labels in {name!r}: the model needs {wanted(head)}"
            ) from error

    return Labels((name,) if single else tuple(name), kind, convert, reading.names)
