"""Labels of models of several classes at once that have a column each, as a data set of toxic comments has them."""

import logging
from collections.abc import Sequence
from typing import Any

from hf_coar.data.columns import Table
from hf_coar.errors import DataError
from hf_coar.models.classes import CLASSES, SEVERAL, Head
from hf_coar.storage.labels import name_key
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)


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
        if head.kind != SEVERAL or head.names is None:
            return None
        present = {name_key(name): name for name, feature in table.features.items() if _is_yes_or_no(feature)}
        wanted = [name_key(name) for name in head.names]
        return tuple(present[key] for key in wanted) if set(wanted) <= set(present) else None
    absent = [name for name in asked if name not in table.features]
    if absent:
        raise DataError(
            f"label={list(asked)}: {table.name!r} has no column {absent[0]!r}; it has {table.shown()}"
            f"{_taken_apart(asked, table)}"
        )
    if len(set(asked)) < len(asked) or (head.n is not None and len(asked) != head.n):
        raise DataError(f"label={list(asked)}: {len(set(asked))} columns, and the model needs one for each of {head.n}"
                        f" classes{f' ({shortened(str(list(head.names)), 120)})' if head.names else ''}")  # fmt: skip
    if head.kind == CLASSES and head.n is not None:
        logger.warning(
            "labels: the model does not say that its classes are independent (config.problem_type = "
            "'multi_label_classification'), and with a column each they are taken so; of one class an example give its "
            "name or number in one column"
        )
    named = {name_key(name): name for name in asked}
    if head.names is None or set(named) == {name_key(name) for name in head.names}:
        return tuple(asked) if head.names is None else tuple(named[name_key(name)] for name in head.names)
    pairs = list(zip(asked, head.names, strict=True))
    said = ", ".join(f"{column!r} as {name!r}" for column, name in pairs)
    theirs = {name_key(name) for name in head.names}
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
