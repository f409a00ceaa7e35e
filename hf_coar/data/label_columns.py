"""Which column holds the labels: one by evidence, or one a class, as a data set of toxic comments has them."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hf_coar.data.columns import Role, Table, is_label, several
from hf_coar.data.label_readings import NotUnderstood, Reading, read, wanted
from hf_coar.errors import DataError
from hf_coar.models.classes import CLASSES, SEVERAL, Head
from hf_coar.storage.labels import name_key
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)

_USUAL = ("label", "labels", "target", "targets")
_TELLING = ("sentiment", "stars", "rating", "class", "category", "score", "polarity", "answer", "y", "fine_label",
            "gold_label", "is_duplicate", "intent", "topic", "emotion", "similarity")  # fmt: skip

LABEL = Role("label", is_label, _USUAL, "a class (its number or name), true or false, or a number",
             become="make all entries numbers, or all of them names")  # fmt: skip


def column(table: Table, head: Head, taken: Iterable[str | None], values_of: Callable[[str], Sequence]) -> str | None:
    """The column of the labels, by evidence: type, name, and whether its entries mean anything to the head.

    Args:
        table: the data set's columns.
        head: of the model.
        taken: columns that were asked for as something else.
        values_of: the first entries of a column.

    Returns:
        None where no column holds labels, and none has to.

    Raises:
        DataError: several could be it, or none is and the head needs one.
    """
    if head.kind is None:
        return None
    candidates = table.fitting(LABEL, taken)
    meant = _meant(head, values_of)
    for rank in (_usual_and(meant), _classes_of(head), _usual_and(_any_class), _telling(meant), _said):
        found = [name for name in candidates if rank(name, table.features[name])]
        if len(found) > 1:
            raise several("label", found, table)
        if found:
            return found[0]
    if not head.required:
        return None
    advice = "add one (images may lie in a folder for each class, which is called as the class)"
    if candidates:
        advice = f"name one of {table.shown(candidates)}, such as label={candidates[-1]!r}"
    raise DataError(
        f"{table.name!r} has no column that is known to hold labels, and the model needs {wanted(head)}; {advice}"
        f"{table.misnamed(LABEL)}"
    )


Rank = Callable[[str, Any], Any]  # name and type of a column -> whether it could hold the labels


def _meant(head: Head, values_of: Callable[[str], Sequence]) -> Rank:
    """What a column's first entries mean to the head; None if nothing."""

    def rank(name: str, feature: Any) -> Reading | None:
        try:
            return read(values_of(name), feature, head)
        except NotUnderstood:
            return None

    return rank


def _usual_and(rank: Rank) -> Rank:
    return lambda name, feature: name.lower() in _USUAL and rank(name, feature)


def _any_class(name: str, feature: Any) -> bool:
    return True


def _said(name: str, feature: Any) -> bool:
    """By its name alone, so that the message can say why its entries are no labels."""
    return name.lower() in _TELLING or type(feature).__name__ == "ClassLabel"


def _classes_of(head: Head) -> Rank:
    """Declared as classes, as many as the head's."""

    def rank(name: str, feature: Any) -> bool:
        return type(feature).__name__ == "ClassLabel" and (head.n is None or feature.num_classes == head.n)

    return rank


def _telling(meant: Rank) -> Rank:
    """Entries that are the names of the head's classes, or mean something to it under a telling name."""

    def rank(name: str, feature: Any) -> bool:
        found = meant(name, feature)
        declared = type(feature).__name__ == "ClassLabel"
        return found is not None and (found.by_name or declared or name.lower() in _TELLING)

    return rank


def one_a_class(table: Table, head: Head, asked: str | Sequence[str] | None = None) -> tuple[str, ...] | None:
    """The columns of zeros and ones, one a class, in the order of the classes: as asked for, or named as they are.

    Args:
        table: the data set's columns.
        head: of the model.
        asked: one column, which is left to others, or several; those that are not called as the classes are taken in
            the order given.

    Returns:
        None where one column was asked for, or none and the data set lacks columns for a model of several at once.

    Raises:
        DataError: there is no such column, or there are not as many as the model has classes.
    """
    if isinstance(asked, str):
        return None
    if asked is None:
        return _called_as_classes(table, head)
    _check_one_a_class(asked, table, head)
    if head.kind == CLASSES and head.n is not None:
        logger.warning(
            "labels: the model does not say that its classes are independent (config.problem_type = "
            "'multi_label_classification'), and with a column each they are taken so; of one class an example give its "
            "name or number in one column"
        )
    return tuple(asked) if head.names is None else _in_order(asked, head.names)


def _called_as_classes(table: Table, head: Head) -> tuple[str, ...] | None:
    """The columns that are called as the classes of a model of several at once; None where some are absent."""
    if head.kind != SEVERAL or head.names is None:
        return None
    present = {name_key(name): name for name, feature in table.features.items() if _is_yes_or_no(feature)}
    wanted = [name_key(name) for name in head.names]
    return tuple(present[key] for key in wanted) if set(wanted) <= set(present) else None


def _check_one_a_class(asked: Sequence[str], table: Table, head: Head) -> None:
    """Raises `DataError` where there is no such column, or there are not as many as classes."""
    absent = [name for name in asked if name not in table.features]
    if absent:
        raise DataError(
            f"label={list(asked)}: {table.name!r} has no column {absent[0]!r}; it has {table.shown()}"
            f"{_taken_apart(asked, table)}"
        )
    if len(set(asked)) < len(asked) or (head.n is not None and len(asked) != head.n):
        raise DataError(f"label={list(asked)}: {len(set(asked))} columns, and the model needs one for each of {head.n}"
                        f" classes{f' ({shortened(str(list(head.names)), 120)})' if head.names else ''}")  # fmt: skip


def _in_order(asked: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The columns in the order of the classes, if they are called as these are, else as they come.

    Raises:
        DataError: some are called as classes, and stand elsewhere.
    """
    named, theirs = {name_key(column): column for column in asked}, {name_key(name) for name in names}
    if set(named) == theirs:
        return tuple(named[name_key(name)] for name in names)
    pairs = list(zip(asked, names, strict=True))
    said = ", ".join(f"{column!r} as {name!r}" for column, name in pairs)
    if any(name_key(column) in theirs and name_key(column) != name_key(name) for column, name in pairs):
        raise DataError(f"label={list(asked)}: some are called as the model's classes and others are not, and in this "
                        f"order they would be {said}; give them in the order of the classes")  # fmt: skip
    logger.warning("labels: columns and classes are called otherwise, and are taken in the order given: %s", said)
    return tuple(asked)


def _taken_apart(asked: Sequence[str], table: Table) -> str:
    """How to name a column whose name the command line has taken for several."""
    pieces = [name.strip() for name in asked]
    whole = [name for name in table.features if [piece.strip() for piece in name.split(",")] == pieces]
    return f"; for the one column {whole[0]!r} write --label '\"{whole[0]}\"'" if whole else ""


def _is_yes_or_no(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool", "float"))
