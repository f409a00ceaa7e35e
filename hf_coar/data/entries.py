"""Columns that are entries of a batch already: numbers under the names of the model's own arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, asked, declared_names
from hf_coar.data.kinds import BY_HEAD, KINDS, Kind, Preparation, Reading
from hf_coar.errors import DataError
from hf_coar.models import tasks
from hf_coar.models.calling import forward_names

_SIDES = ("foil_", "pair_", "rejected_")


def _is_number(feature: Any) -> bool:
    while getattr(feature, "feature", None) is not None:
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "bool"))


def _arguments(model: nn.Module) -> set[str]:
    """The names of entries that the forward or the task's output reads."""
    return {*forward_names(model)[0], *tasks.of(model).targets, *tasks.of(model).needs, "labels"}


def _found(model: nn.Module, table: Table, given: Columns) -> dict[str, str]:
    """Columns of numbers by entries: as asked for, and those that are called as the entries are."""
    names = _arguments(model)
    known = [n for n in table.features if any(n.removeprefix(side) in names for side in ("", *_SIDES))]
    targets = tasks.of(model).targets
    usual = [n for n in ("label", "labels", "target") if n not in names and _is_number(table.features.get(n))]
    if len(targets) == 1 and targets[0] not in table.features and len(usual) == 1 and "label" not in given:
        given = {**given, "label": usual[0]}
    asked_for = {targets[0] if role == "label" and len(targets) == 1 else role: given[role] for role in given}
    roles = [Role(name, _is_number, what="numbers, or lists of them") for name in asked_for]
    found = asked(asked_for, table, roles)
    taken = set(found.values())
    return {n: n for n in known if _is_number(table.features[n]) and n not in taken} | found


def _there(model: nn.Module, table: Table, given: Columns) -> bool:
    targets = {*tasks.of(model).targets, "labels", "label"}
    names = _arguments(model)
    asked_for = {role: column for role, column in given.items() if role in names}
    return any(name not in targets for name in (*_found(model, table, {}), *asked_for))


def _choose(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    return _found(model, table, given)


def _build(reading: Reading) -> Preparation:
    columns = dict(reading.columns)

    def prepare(rows: Sequence[Mapping[str, Any]]) -> Batch:
        for row in rows:
            gaps = [column for column in columns.values() if _has_gap(row[column])]
            if gaps:
                raise ValueError(f"{gaps[0]!r} has a missing value")  # the example is left out
        try:
            return {name: torch.as_tensor([row[column] for row in rows]) for name, column in columns.items()}
        except (ValueError, TypeError) as error:
            raise DataError(f"the columns {', '.join(columns)} cannot be stacked into tensors: {error}") from error

    labels = [columns[name] for name in ("labels", "label", *tasks.of(reading.model).targets) if name in columns]
    names = next(filter(None, (declared_names(reading.table.features.get(column)) for column in labels)), None)
    description = {"label_names": names} if names else {}
    return Preparation(prepare, lambda row: f"the entries {', '.join(columns)}", description)


def _has_gap(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(map(_has_gap, value)))


KINDS.add(
    "entries",
    Kind(
        "entries",
        (),
        lambda model: BY_HEAD,
        _choose,
        _build,
        labels=False,
        instead=True,
        there=_there,
        entries=_arguments,
    ),
)
