"""The link that reopens what is looked at: a `View` as a query string."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from urllib.parse import parse_qsl, quote, urlencode

from hf_coar.errors import CoarError
from hf_coar.explore.tab import TABS, View

SIDES = ("help", "hurt")
LONGEST_TEXT = 2000  # characters of a text in a link; browsers and proxies cut much longer addresses
_MOST_INDICES = 5000

_KEPT_EVERYWHERE = ("example", "component")


def to_query(view: View) -> str:
    """The query string of a view, such as `view=examples&example=17&k=20`; only what the tab shows."""
    default, entries = View(), {"view": view.view}
    for name in dict.fromkeys((*_KEPT_EVERYWHERE, *TABS[view.view].kept)):
        value = getattr(view, name)
        if value != getattr(default, name):
            entries[name] = _written(value)
    return urlencode(entries, quote_via=quote, safe=",-")


def from_query(query: str, n_examples: int, n_components: int, n_classes: int = 0) -> View:
    """The view of a query string.

    Args:
        query: with or without a leading `?`; entries that are not ours are ignored.
        n_examples: how many there are.
        n_components: how many there are.
        n_classes: how many there are; 0 if unknown.

    Raises:
        CoarError: a value that makes no sense here; the message names it.
    """
    kinds = {field.name: type(field.default) for field in fields(View)}
    found = {
        name: _read(name, value, kinds[name])
        for name, value in parse_qsl(query.lstrip("?"), keep_blank_values=True)
        if name in kinds
    }
    return checked(View(**found), n_examples, n_components, n_classes)


def checked(view: View, n_examples: int, n_components: int, n_classes: int = 0) -> View:
    """The view, if it makes sense here; what a browser sends need not.

    Raises:
        CoarError: a value that makes no sense; the message names it.
    """
    _check_one_of("view", view.view, TABS)
    _check_one_of("side", view.side, SIDES)
    if len(view.text) > LONGEST_TEXT:
        raise CoarError(f"the text in the link has {len(view.text):,} characters; at most {LONGEST_TEXT:,} fit")
    last = {
        "example": n_examples, "lower": n_examples, "higher": n_examples, "spared": n_examples,
        "component": n_components, "ticked": n_components, "k": n_components + 1, "n_components": n_components + 1,
        "label": n_classes or 2**31, "explained": n_classes or 2**31, "page": 2**31,
    }  # fmt: skip
    for name, stop in last.items():
        value = getattr(view, name)
        if value == getattr(View(), name):
            continue  # such as -1 for all
        _check_range(name, value if isinstance(value, tuple) else (value,), stop)
    return view


def _check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise CoarError(f"the link says {name}={value[:40]!r}; there are {', '.join(known)}")


def _check_range(name: str, values: Iterable[int], stop: int) -> None:
    low = {"label": -1, "explained": -1, "n_components": 1}.get(name, 0)
    outside = [value for value in values if not low <= value < stop]
    if outside:
        raise CoarError(f"the link says {name}={outside[0]}; here it runs from {low} to {stop - 1}")


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return to_ranges(value)
    return str(int(value)) if isinstance(value, bool) else str(value)


def _read(name: str, value: str, kind: type) -> object:
    try:
        if kind is tuple:
            return from_ranges(value)
        return bool(int(value)) if kind is bool else kind(value)
    except ValueError as error:
        raise CoarError(f"the link says {name}={value[:40]!r}, which is no {_WANTED[kind]}") from error


_WANTED: Mapping[type, str] = {int: "whole number", bool: "0 or 1", tuple: "list such as 3,7-9"}


def to_ranges(indices: Iterable[int]) -> str:
    """Indices as `3,7-9`, in ascending order, each once."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def from_ranges(text: str) -> tuple[int, ...]:
    """The inverse of `to_ranges`.

    Raises:
        ValueError: something else, or more indices than a link may hold.
    """
    found: list[int] = []
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if last - first >= _MOST_INDICES or len(found) > _MOST_INDICES:
            raise ValueError(f"more than {_MOST_INDICES} indices")
        found += range(first, last + 1)
    return tuple(sorted(set(found)))
