"""What the entries of a column of labels mean to the model's head."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_coar.models.classes import NUMBER, SEVERAL, Head, wordnet_numbers
from hf_coar.storage.labels import name_key, places
from hf_coar.storage.texts import first_few, shortened

Convert = Callable[[Any], Any]  # an entry of the column -> class index, number, or list of numbers


@dataclass(frozen=True)
class Reading:
    """What a column could mean: conversion, names, whether the names themselves say so, what a user should know."""

    convert: Convert
    names: tuple[str, ...] | None = None
    by_name: bool = False
    note: str = ""
    doubt: str = ""


class NotUnderstood(Exception):
    """Why the entries of a column are no labels of this head."""


def read(values: Sequence[Any], feature: Any, head: Head) -> Reading:
    """The reading of a column, tried on entries.

    Raises:
        NotUnderstood: none.
    """
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        raise NotUnderstood(f"{len(values) - len(present)} of {len(values)} entries are empty; leave them out")
    if not present:
        raise NotUnderstood("there are no examples")
    if head.kind == NUMBER:
        reading = Reading(_number if head.n in (None, 1) else _several_numbers(head.n))
    elif head.kind == SEVERAL:
        reading = _several(present, feature, head)
    elif type(feature).__name__ == "ClassLabel":
        reading = _of_classes(feature, head)
    elif all(isinstance(value, str) for value in present):
        reading = _of_strings(present, head)
    else:
        reading = _of_numbers(present, head)
    for value in present if isinstance(present[0], list) else dict.fromkeys(present):
        reading.convert(value)
    return reading


def _number(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise NotUnderstood(f"{value!r} is no number")
    return found


def _several_numbers(n: int) -> Convert:
    def convert(value: Any) -> list[float]:
        if not isinstance(value, list | tuple) or len(value) != n:
            raise NotUnderstood(f"{shortened(repr(value))} is no list of {n} numbers")
        return [_number(entry) for entry in value]

    return convert


def _several(values: Sequence[Any], feature: Any, head: Head) -> Reading:
    """Lists of zeros and ones, one for each class; or of the classes that an example has, by name or by number."""
    lists = [value for value in values if isinstance(value, list | tuple)]
    members = list(dict.fromkeys(member for value in lists for member in value if isinstance(member, str | int)))
    inner = getattr(feature, "feature", None)
    if type(inner).__name__ == "ClassLabel":
        of_each = all(len(value) == head.n for value in lists)  # "no" and "yes", for each class
        try:
            of_one = _of_classes(inner, head)
        except NotUnderstood:
            if not of_each:
                raise
        else:
            if of_one.by_name or not of_each:
                return _sets(of_one, head)
    if members and all(isinstance(member, str) for member in members):
        return _sets(_of_strings(members, head), head)
    different = len({len(value) for value in lists}) > 1 and all(len(set(value)) == len(value) for value in lists)
    if different and members and all(type(member) is int for member in members):
        return _sets(replace(_of_numbers(members, head), note="lists of class numbers, for each example its own"), head)
    return Reading(_yes_or_no(head.n), head.names)


def _sets(of_one: Reading, head: Head) -> Reading:
    """The reading of lists of classes, from that of one class."""
    n = head.n or len(of_one.names or ())

    def convert(value: Any) -> list[float]:
        if not isinstance(value, list | tuple):
            raise NotUnderstood(f"{shortened(repr(value))} is no list of classes")
        chosen = {of_one.convert(member) for member in value}
        return [float(place in chosen) for place in range(n)]

    return replace(of_one, convert=convert)


def _yes_or_no(n: int | None) -> Convert:
    def convert(value: Any) -> list[float]:
        value = [value] if n == 1 and not isinstance(value, list | tuple) else value
        if not isinstance(value, list | tuple) or (n is not None and len(value) != n):
            raise NotUnderstood(f"{shortened(repr(value))} is no list of {n} yes-or-no entries")
        found = [_number(entry) for entry in value]
        if not set(found) <= {0.0, 1.0}:
            raise NotUnderstood(f"{shortened(repr(value))} holds something else than 0 and 1")
        return found

    return convert


def _index(n: int | None, place: Callable[[Any], int | None] = lambda value: int(value)) -> Convert:
    """A conversion whose results are classes of the head."""

    def convert(value: Any) -> int:
        found = place(value)
        if found is None:
            raise NotUnderstood(f"{value!r} is none of its classes")
        if found < 0:
            raise NotUnderstood(f"{value!r} says that the example has no label; choose a split that has labels")
        if n is not None and found >= n:
            raise NotUnderstood(f"{value!r} is none of its classes 0 to {n - 1}")
        return found

    return convert


def meant_by(names: tuple[str, ...] | None) -> Mapping[str, tuple[int, ...]]:
    """Which of the head's classes a word means, see `places`."""
    return places(names, wordnet_numbers(names)) if names else {}


def strange_because(word: str, meant: Mapping[str, tuple[int, ...]]) -> str:
    """Why a word is no name of one class; empty where it is."""
    found = meant.get(name_key(word), ())
    if len(found) > 1:
        return f"{word!r} is the name of several of its classes ({', '.join(map(str, found))}); give their numbers"
    return "" if found else f"{word!r} is none of its classes"


def _of_classes(feature: Any, head: Head) -> Reading:
    """A ClassLabel: by the names where the model's are the same ones, else by the number if there are as many."""
    names = tuple(str(name) for name in feature.names or ())
    meant = meant_by(head.names)
    named = [_one(meant.get(name_key(name), ()), place) for place, name in enumerate(names)]
    if names and None not in named and len(set(named)) == len(names):
        if named == list(range(len(named))):
            return Reading(_index(head.n), names if len(names) == len(head.names) else head.names, True)
        note = f"the data set's classes {shortened(str(list(names)))} were matched to the model's by their names"
        return Reading(_index(head.n, _at(named)), head.names, True, note)
    elsewhere = [name for place, name in enumerate(names) if named[place] not in (None, place)]
    if elsewhere and None in named:
        strange = strange_because(names[named.index(None)], meant)
        raise NotUnderstood(
            f"{strange}, and {elsewhere[0]!r} is another one than its number says; call the data set's classes as the "
            "model calls its own"
        )
    return _by_number(names, head)


def _one(found: Sequence[int], number: int) -> int | None:
    """The one class that a name means, or of several the one whose number it has; None where neither is to be had."""
    return number if number in found else found[0] if len(found) == 1 else None


def _by_number(names: tuple[str, ...], head: Head) -> Reading:
    """A ClassLabel whose names are not the model's: the numbers that they are, or the numbers that they have."""
    spoken = [int(name) if re.fullmatch(r"\d{1,9}", name) else None for name in names]
    numbers = names and None not in spoken and len(set(spoken)) == len(spoken)
    if numbers and head.n is not None and max(spoken) < head.n and len(names) < head.n:
        note = f"the data set's classes {shortened(str(list(names)))} are the numbers of the model's"
        return Reading(_index(head.n, _at(spoken)), head.names, True, note)
    if head.n is not None and len(names) != head.n:
        counts = (
            f"the data set has {len(names)} classes ({shortened(', '.join(names), 80)}) and the model {head.n}, and no "
            "names tell which they are"
        )
        if head.names and not numbers:  # the first of ten animals is not class 0 of a thousand
            raise NotUnderstood(
                f"{counts}; call the data set's classes (folders) as the model calls its own, or give their numbers in "
                "a column of whole numbers"
            )
        # Names that only the data have are held against the logits before the first pass, of any model; not here, too.
        doubt = f"{counts}: they are taken by their numbers. If that is wrong, name them as the model does its own"
        return Reading(_index(head.n), head.names or names, doubt=doubt if head.names or not names else "")
    if numbers and spoken != list(range(len(spoken))):
        place = next(place for place, number in enumerate(spoken) if number != place)
        doubt = (
            f"the data set's classes are called by numbers that are not their own: they are taken by their own, "
            f"{names[place]!r} as class {place} (folders are sorted as texts). If the model counts them as they are "
            "called, give a column of numbers, or fill the names with zeros (02)"
        )
        return Reading(_index(head.n), names or head.names, doubt=doubt)
    doubt = "" if numbers or not head.names or not names else _unlike(names, head.names)
    return Reading(_index(head.n), names or head.names, doubt=doubt)


def _unlike(names: Sequence[str], theirs: Sequence[str]) -> str:
    """What to say where as many classes are called otherwise by the data and by the model, every one; else empty."""
    pairs = list(zip(names, theirs, strict=False))
    if any({*name_key(a).split()} & {*re.split(r"[\s,/]+", name_key(b))} for a, b in pairs):
        return ""
    said = shortened(", ".join(f"{a!r} as {b!r}" for a, b in pairs), 160)
    return (
        f"no class of the data set is called as one of the model's, and as many as there are they are taken by their "
        f"numbers: {said}. If that is wrong, call the data set's classes as the model calls its own"
    )


def _at(classes: Sequence[int]) -> Callable[[Any], int | None]:
    """The class at a place of a list; a negative number (no label) stays what it is."""
    return lambda value: int(value) if value < 0 else classes[value] if value < len(classes) else None


def _of_strings(values: Sequence[str], head: Head) -> Reading:
    """Class names, or numbers that were written as texts."""
    meant = meant_by(head.names)
    strange = [why for value in dict.fromkeys(values) if (why := strange_because(value, meant))]
    if not strange:
        return Reading(_index(head.n, lambda value: meant.get(name_key(value), (None,))[0]), head.names, True)
    if all(re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", value) for value in set(values)):
        reading = _of_numbers([float(value) for value in values], head)
        return Reading(lambda value: reading.convert(float(value)), reading.names, reading.by_name, reading.note)
    if head.names:
        raise NotUnderstood(strange[0])
    raise NotUnderstood(
        "the model does not say what its classes are called (config.id2label, or label_names of a timm model), so "
        "which one is which cannot be told; name them there, or give numbers"
    )


def _of_numbers(values: Sequence[Any], head: Head) -> Reading:
    """Class indices; or, where the names begin with numbers ("1 star"), those numbers."""
    if any(isinstance(value, list | tuple | dict) for value in values):
        raise NotUnderstood("an example must have one class")
    present = sorted({_number(value) for value in values})
    if any(value != int(value) for value in present):
        raise NotUnderstood("fractions are no classes")
    if all(isinstance(value, bool) for value in values) and head.n not in (None, 2):
        raise NotUnderstood("true and false are two classes")
    spoken = _numbers_in(head.names)
    if spoken and spoken != list(range(len(spoken))):
        return _of_spoken(spoken, [int(value) for value in present], head)
    if head.n is not None and head.n > 1 and present[0] == 1 and present[-1] == head.n:
        raise NotUnderstood(
            f"they run from 1 to {head.n}, and the model's classes from 0 to {head.n - 1}; count from 0 in a column of "
            "your own, or name the classes (config.id2label)"
        )
    return Reading(_index(head.n), head.names)


def _of_spoken(spoken: list[int], present: list[int], head: Head) -> Reading:
    """Numbers where the classes' names are numbers too: "1 star" is class 0."""
    by_name, by_index = set(present) <= set(spoken), set(present) <= set(range(len(spoken)))
    unlike = [number for number in present if not by_index or spoken[number] != number]
    if by_name and not (by_index and unlike):
        places = {number: place for place, number in enumerate(spoken)}
        note = f"{present[0]} to {present[-1]} are read as the names of the model's classes ({head.names[0]!r}, …)"
        return Reading(_index(head.n, lambda value: places.get(int(value))), head.names, True, note)
    if by_name and by_index:
        raise NotUnderstood(
            f"a {unlike[0]} could be the class {head.names[spoken.index(unlike[0])]!r} or the class number "
            f"{unlike[0]}, {head.names[unlike[0]]!r}; give the names of the classes instead"
        )
    return Reading(_index(head.n), head.names)


def _numbers_in(names: tuple[str, ...] | None) -> list[int] | None:
    """The numbers that the names of all classes begin with, where they differ."""
    found = [re.match(r"\s*(\d{1,9})\b", name) for name in names or ()]
    numbers = [int(match[1]) for match in found if match]
    return numbers if numbers and len(set(numbers)) == len(found) else None


def wanted(head: Head) -> str:
    """What a head needs, in words."""
    if head.kind == NUMBER:
        return "a number an example" if head.n in (None, 1) else f"a list of {head.n} numbers an example"
    if head.kind == SEVERAL:
        return f"a list of {head.n} yes-or-no entries an example, or of the classes that it has"
    named = f" ({shortened(', '.join(head.names), 60)})" if head.names else ""
    return f"one of {head.n} classes{named}" if head.n is not None else "a class"


def few(values: Sequence[Any]) -> str:
    """Some different entries."""
    found = list(dict.fromkeys(shortened(repr(value), 24) for value in values[:1000]))
    return first_few(found, 5)
