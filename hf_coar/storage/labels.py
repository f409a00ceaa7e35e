"""Class names in a record: what a label is called, and which label a name means."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.storage.texts import shortened

_ENTRY = "label_names"  # of the record of the data, or of the model


def label_names(record: Any) -> tuple[str, ...]:
    """The names of the classes, by label; empty where nobody has named them.

    Args:
        record: what attributions are of, with the records of the `data` and the `model` as attributes or entries; from
            whomever it comes.
    """
    for part in ("data", "model"):
        entry = record.get(part) if isinstance(record, Mapping) else getattr(record, part, None)
        names = entry.get(_ENTRY) if isinstance(entry, Mapping) else None
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def label_name(record: Any, label: int) -> str:
    """A label as people call it: the class's name, `class 3` where it has none, "" for -1, which is no label.

    Args:
        record: as of `label_names`.
        label: of an example.
    """
    names = label_names(record)
    if label < 0:
        return ""
    return shortened(names[label], 80) if label < len(names) and names[label].strip() else f"class {label}"


def label_of(record: Any, name: int | str) -> int:
    """The label that a name or a number means.

    Args:
        record: as of `label_names`.
        name: of a class, in any case, or its number.

    Raises:
        CoarError: no class has this name, or several have; the message says which there are.
    """
    if isinstance(name, int):
        return int(name)
    names = label_names(record)
    for same in (lambda one: one == name, lambda one: _key(one) == _key(name)):
        found = [label for label, one in enumerate(names) if same(one)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CoarError(f"the classes {found} are all called {names[found[0]]!r}; give the number of one")
    if re.fullmatch(r"\d{1,9}", name):
        return int(name)
    known = (
        shortened(", ".join(repr(one) if "," in one else one for one in names), 300)
        if names
        else "none: the data and the model name no classes, give a number"
    )
    raise CoarError(f"no class is called {name!r}; there are {known}")


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def listed(names: Sequence[str], most: int = 8) -> str:
    """Class names as they can stand in a text that others render."""
    shown = [f"`{shortened(str(name), 40).replace('`', chr(39))}`" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def of_classes(edit: Mapping[str, Any], side: str) -> str:
    """Which classes the examples of one side of an edit are, such as " of `three`"; from the record of the edit."""
    sides = edit.get("classes")
    names = sides.get(side) if isinstance(sides, Mapping) else None
    return f" of {listed(names)}" if isinstance(names, list | tuple) and names else ""
