"""Columns that are entries of a batch already: numbers under the names of the model's own arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Table
from hf_coar.data.kinds import BY_HEAD, KINDS, Kind, Preparation, Reading
from hf_coar.errors import DataError
from hf_coar.models import tasks
from hf_coar.models.calling import forward_names

_SIDES = ("foil_", "pair_", "rejected_")


def _is_number(feature: Any) -> bool:
    while getattr(feature, "feature", None) is not None:
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "bool"))


def _found(model: nn.Module, table: Table) -> list[str]:
    """The columns of numbers that the forward or the task's output names."""
    names = forward_names(model)[0]
    targets = {*tasks.of(model).targets, *tasks.of(model).needs, "labels"}
    known = [n for n in table.features if any(n.removeprefix(side) in names | targets for side in ("", *_SIDES))]
    return [name for name in known if _is_number(table.features[name])]


def _there(model: nn.Module, table: Table) -> bool:
    targets = {*tasks.of(model).targets, "labels", "label"}
    return any(name not in targets for name in _found(model, table))


def _choose(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    return {name: name for name in _found(model, table)}


def _build(reading: Reading) -> Preparation:
    names = list(reading.columns.values())

    def prepare(rows: Sequence[Mapping[str, Any]]) -> Batch:
        try:
            return {name: torch.as_tensor([row[name] for row in rows]) for name in names}
        except (ValueError, TypeError) as error:
            raise DataError(f"the columns {', '.join(names)} cannot be stacked into tensors: {error}") from error

    return Preparation(prepare, lambda row: f"the entries {', '.join(names)}")


KINDS.add(
    "entries",
    Kind("entries", (), lambda model: BY_HEAD, _choose, _build, labels=False, instead=True, there=_there),
)
