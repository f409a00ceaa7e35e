"""Class names in a record: what a label is called, and which label a name means."""

import operator
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.storage.texts import and_more, shortened

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


def label_of(record: Any, name: Any) -> int:
    """The label that a name or a number means.

    Args:
        record: as of `label_names`.
        name: of a class, in any case, or its number; either may stand alone in what `each` takes.

    Raises:
        CoarError: no class has this name, or several have, and the message says which there are; or neither is given,
            but a truth value, a fraction, or several classes.
    """
    several = each(name)
    if len(several) > 1:
        raise CoarError(f"label {repr(name)[:80]}: give the name of one class, or its number; these are {len(several)}")
    (name,) = several
    if not isinstance(name, str):
        return _number(name)
    names = label_names(record)
    exact = [label for label, one in enumerate(names) if one == name]
    found = exact or list(places(names).get(name_key(name), ()))
    if len(found) == 1:
        return found[0]
    if found:
        raise CoarError(f"the classes {found} are all called {name!r}; give the number of one")
    number = re.fullmatch(r"(class )?(\d{1,9})", name)  # or as `label_name` calls a class without a name
    # Of classes that are called by numbers themselves a number that is none of these is a slip, or of another count.
    if number and (number[1] or not names or not all(re.fullmatch(r"\s*\d+\s*", one) for one in names)):
        return int(number[2])
    known = (
        shortened(", ".join(repr(one) if "," in one else one for one in names), 300)
        if names
        else "none: the data and the model name no classes, give a number"
    )
    raise CoarError(f"no class is called {name!r}; there are {known}")


def _number(given: Any) -> int:
    """The number of a class; a truth value is none, although Python counts it as 0 or 1."""
    if isinstance(given, bool):
        raise CoarError(
            f"label {given!r}: give the name of one class, or its number, {int(given)} for class {int(given)}; a mask "
            "of examples is given by itself, without 'label'"
        )
    try:
        return operator.index(given)
    except TypeError:
        raise CoarError(f"label {repr(given)[:80]}: give the name of one class, or its number") from None


def each(wanted: Any) -> list[Any]:
    """The classes that somebody names: one, or several in whatever holds them, in its order; of a set by their words.

    Args:
        wanted: a name or a number; or a list, tuple, set, range, array, tensor or series of them.

    Raises:
        CoarError: none.
    """
    wanted = _plain(wanted)
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        return [wanted]
    found = sorted(wanted, key=str) if isinstance(wanted, Set) else list(wanted)
    if not found:
        raise CoarError("no class is given by {'label': …}; give its name or number, or several")
    return found


def are_names(given: Any) -> bool:
    """Whether something holds names of classes, one at least, and is no name itself."""
    given = _plain(given)
    return isinstance(given, Collection) and not isinstance(given, str) and any(isinstance(one, str) for one in given)


def _plain(given: Any) -> Any:
    """An array, tensor or series as a list, or as the one number that it holds; anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def name_key(name: str) -> str:
    """A class name without case, and with one sort of gap; an ö is one, be it one letter or an o with a mark."""
    return unicodedata.normalize("NFC", re.sub(r"[\s_-]+", " ", str(name)).strip().casefold())


def places(names: Sequence[str], further: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    """Which classes a word means, by `name_key`: several where nothing tells which.

    A whole name comes first, then one of several between commas, as ImageNet has them ("bobsled, bobsleigh, bob"), then
    a further name.

    Args:
        names: of the classes, in order.
        further: names that they have besides, likewise.
    """
    found: dict[str, tuple[int, ...]] = {}
    for of_class in ([[name] for name in names], [name.split(",") for name in names], [[name] for name in further]):
        meant: dict[str, tuple[int, ...]] = {}
        for place, words in enumerate(of_class):
            for word in {name_key(word) for word in words} - {""}:
                meant[word] = (*meant.get(word, ()), place)
        found = meant | found
    return found


def listed(names: Sequence[str], most: int = 8) -> str:
    """Class names as they can stand in a text that others render."""
    shown = [f"`{shortened(str(name), 40).replace('`', chr(39))}`" for name in names[:most]]
    return ", ".join(shown) + and_more(len(names), most)


def of_classes(edit: Mapping[str, Any], side: str) -> str:
    """Which classes the examples of one side of an edit are, such as " of `three`"; from the record of the edit."""
    sides = edit.get("classes")
    names = sides.get(side) if isinstance(sides, Mapping) else None
    return f" of {listed(names)}" if isinstance(names, list | tuple) and names else ""
