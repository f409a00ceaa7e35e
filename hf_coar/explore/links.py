"""What is looked at, and the link that reopens it: a `View` and its query string, nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from urllib.parse import parse_qsl, quote, urlencode

from hf_coar.errors import CoarError

TABS = ("examples", "components", "edit", "own")
SIDES = ("help", "hurt")
LONGEST_TEXT = 2000  # characters of a text in a link; browsers and proxies cut much longer addresses
_MOST_INDICES = 5000


@dataclass(frozen=True)
class View:
    """Everything that a link reopens; the defaults are left out of the link.

    Attributes:
        view: which tab.
        example: the example that is looked at, a row of the attributions.
        component: the component that is looked at.
        label: show only examples with this label; -1 for all.
        wrong: show only examples that the model gets wrong.
        page: of the list of examples.
        k: ablate so many of the example's strongest components; 0 where `ticked` says which.
        side: which of them: those that "help" it most, or those that "hurt" it most.
        ticked: components to ablate.
        layer: the layer whose components are listed; "" for all.
        lower: examples whose outputs an edit is to lower.
        higher: examples whose outputs an edit is to raise.
        spared: examples whose outputs an edit is to leave as they are; all others where there are none.
        n_components: how many components an edit ablates.
        text: a text of the visitor's own.
        image: the name under which the explorer keeps an image of the visitor's own, while it runs.
        explained: the class whose output is attributed for that; -1 for the predicted one.
    """

    view: str = "examples"
    example: int = 0
    component: int = 0
    label: int = -1
    wrong: bool = False
    page: int = 0
    k: int = 0
    side: str = "help"
    ticked: tuple[int, ...] = ()
    layer: str = ""
    lower: tuple[int, ...] = ()
    higher: tuple[int, ...] = ()
    spared: tuple[int, ...] = ()
    n_components: int = 10
    text: str = ""
    image: str = ""
    explained: int = -1


_KEPT_EVERYWHERE = ("view", "example", "component")
_OF_TAB = {
    "examples": ("label", "wrong", "page", "k", "side", "ticked"),
    "components": ("layer", "ticked", "k", "side"),
    "edit": ("label", "page", "lower", "higher", "spared", "n_components"),
    "own": ("text", "image", "explained"),
}


def to_query(view: View) -> str:
    """The query string of a view, such as `view=examples&example=17&k=20`; only what the tab shows."""
    default, entries = View(), {"view": view.view}
    for name in dict.fromkeys((*_KEPT_EVERYWHERE[1:], *_OF_TAB[view.view])):
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
    view = View(**found)
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
