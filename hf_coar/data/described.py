"""The description of loaded data: what its record says, and the settings with which `load` reads the same again."""

from collections.abc import Mapping
from typing import Any

from hf_coar.errors import CorruptFileError

ROLES = ("text", "pair", "image", "label")  # that have a keyword of their own; others are in `columns`
_TEXTS, _NUMBERS = ("split", *ROLES, "preprocessor"), ("max_length", "n_examples", "data_seed")


def recorded(chosen: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
    """Which columns were read, as the record of the data has them, by keywords of `load`."""
    chosen = {role: column if isinstance(column, str) else list(column) for role, column in chosen.items()}
    others = {role: column for role, column in chosen.items() if role not in ROLES}
    return {role: chosen[role] for role in ROLES if role in chosen} | ({"columns": others} if others else {})


def settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `load` that read the described data again, in the place of its defaults; `data` itself is the id.

    Args:
        description: of `Examples`, or from a record, from whomever it comes.

    Raises:
        CorruptFileError: an entry is not what it should be.
    """
    found = {name: description[name] for name in (*_TEXTS, *_NUMBERS) if description.get(name) is not None}
    for name, value in found.items():
        if not _is_sane(name, value):
            raise CorruptFileError(f"the record of the data is damaged: its {name!r} is {str(value)[:80]!r}")
    columns = description.get("columns") or {}
    if not isinstance(columns, Mapping) or not all(isinstance(one, str) for pair in columns.items() for one in pair):
        raise CorruptFileError(f"the record of the data is damaged: its 'columns' are {str(columns)[:80]!r}")
    if columns:
        found["columns"] = dict(columns)
    if description.get("revision") is not None:
        found["data_revision"] = str(description["revision"])
    return found


def _is_sane(name: str, value: Any) -> bool:
    if name == "label" and isinstance(value, list) and value:  # of one column a class
        return all(isinstance(column, str) for column in value)
    return isinstance(value, str) if name in _TEXTS else type(value) is int and 0 <= value < 2**63
