"""Examples as HTML: cards, a gallery of them, what the model says of one; nothing here knows of Gradio."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from hf_coar.explore import drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import button, note, percent, wrapped
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source, image_column, text_column
from hf_coar.explore.tab import View

PAGES = {"text": 10}  # examples on a page
PAGE = 24  # the same of all that is no text
_MOST_SEARCHED = 500  # examples that a search for wrong predictions runs the model on, a page at a time
_MARKS = {"lower": "↓ lower", "higher": "↑ raise", "spared": "= spare"}


def filtered(source: Source, view: View, progress: Progress = no_progress) -> tuple[list[int], bool]:
    """The examples that a filter leaves, and whether there may be more (wrong ones are searched up to a bound)."""
    labels = source.attributions.labels
    rows = list(range(len(source))) if view.label < 0 else (labels == view.label).nonzero().flatten().tolist()
    if not view.wrong:
        return rows, False
    searched = rows[:_MOST_SEARCHED]
    source.predictions(searched, progress)
    return [row for row in searched if not source.is_right(row)], len(rows) > len(searched)


def gallery(source: Source, view: View, progress: Progress = no_progress, act: str = "example") -> str:
    """A page of examples as cards; in an edit with their marks."""
    rows, more = filtered(source, view, progress)
    size = PAGES.get(source.kind, PAGE)
    last = max(0, (len(rows) - 1) // size)
    page = min(view.page, last)
    shown = rows[page * size : (page + 1) * size]
    found = source.predictions(shown, progress)
    cards = "".join(
        card(source, row, one, act, current=act == "example" and row == view.example, mark=_mark(view, row, act))
        for row, one in zip(shown, found, strict=True)
    )
    texts = " coar-texts" if source.kind != "image" else ""
    said = f"{len(rows):,} of {len(source):,} examples" if len(rows) < len(source) else f"{len(source):,} examples"
    said += f"; searched in the first {_MOST_SEARCHED}" if more else ""
    pager = (
        f'<div class="coar-pager">{_turn("page", page - 1, "‹ Back", page > 0)}'
        f"<span>page {page + 1} of {last + 1}</span>{_turn('page', page + 1, 'Next ›', page < last)}"
        f'<span class="coar-faint">{said}</span></div>'
    )
    return wrapped(f'<div class="coar-cards{texts}">{cards or note("no example is left")}</div>{pager}')


def _turn(act: str, value: int, text: str, possible: bool) -> str:
    return button(act, value, text, "coar-small", more="" if possible else " disabled")


def _mark(view: View, row: int, act: str) -> str:
    if act == "example":
        return ""
    return next((side for side in ("lower", "higher", "spared") if row in getattr(view, side)), "")


def card(
    source: Source, row: int, found: Outcome, act: str, current: bool = False, mark: str = "", extra: str = ""
) -> str:
    """An example small: picture or beginning of the text, prediction, label where they differ; `extra` is HTML."""
    said, label = prediction_words(source, row, found)
    state = f' aria-pressed="{"true" if mark else "false"}"' if act == "mark" else ""
    state += ' aria-current="true"' if current else ""
    marked = f'<span class="coar-mark coar-mark-{mark}">{_MARKS[mark]}</span>' if mark else ""
    inner = f'{content(source, row, 88)}<span class="coar-said">{said}</span>{marked}{extra}'
    return button(act, row, inner, "coar-card", f"example {row}: {label}{', ' + _MARKS[mark] if mark else ''}", state)


def prediction_words(source: Source, row: int, found: Outcome) -> tuple[str, str]:
    """What the model says of an example, as HTML and as plain words."""
    if found.classes is None:
        hits = int((found.tokens[0] == found.targets[0]).sum())
        plain = f"{hits} of {len(found.targets[0])} next tokens right"
        return f'<span class="coar-faint">{row}</span> {plain}', plain
    predicted, label = int(found.classes[0]), source.label(row)
    name, probability = source.class_name(predicted), f"{100 * found.top[0][0][1]:.0f}\u00a0%"
    html = f'<span class="coar-faint">{row}</span> {escape(name)} {probability}'
    if label in (-1, predicted):
        return html, f"{name}, {probability}"
    truth = source.class_name(label)
    return (
        f'{html}<br><span class="coar-wrong">✗ is {escape(truth)}</span>',
        f"{name}, {probability}, wrong: is {truth}",
    )


def content(source: Source, row: int, size: int) -> str:
    """An example's picture, or the beginning of its text."""
    return content_of(source.raw(row), size)


def content_of(raw: Mapping[str, Any], size: int) -> str:
    """The same of a raw example."""
    column = image_column(raw)
    if column is not None:
        return drawing.thumbnail(raw[column], size)
    column = text_column(raw)
    if column is not None:
        return f'<span class="coar-snippet">{escape(raw[column][:240])}</span>'
    pixels = raw.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.dim() == 3:
        return drawing.thumbnail(drawing.image_of(pixels), size)
    first = next((value for value in raw.values() if isinstance(value, Tensor)), torch.empty(0))
    shown = ", ".join(f"{value:.3g}" for value in first.flatten()[:6].tolist())
    return f'<span class="coar-snippet">[{shown}{", …" if first.numel() > 6 else ""}]</span>'


def cards(source: Source, rows: Sequence[int], act: str, extras: Sequence[str]) -> str:
    """Examples as cards with something beneath each."""
    found = source.predictions(list(rows))
    inner = "".join(
        card(source, row, one, act, extra=extra) for row, one, extra in zip(rows, found, extras, strict=True)
    )
    return f'<div class="coar-cards{" coar-texts" if source.kind != "image" else ""}">{inner}</div>'


def top_table(source: Source, found: Outcome, label: int = -1) -> str:
    """The most likely classes, or the most likely tokens after a text."""
    rows = []
    for index, probability in found.top[0]:
        name = escape(source.class_name(index) if found.classes is not None else repr(source.token(index)))
        name = f"<b>{name}</b> (its label)" if index == label and found.classes is not None else name
        rows.append(
            [name, f'{drawing.fraction_bar(probability)} <span class="coar-percent">{percent(probability)}</span>']
        )
    head = "the model says" if found.classes is not None else "most likely next"
    return drawing.table([head, "probability"], rows, "coar-narrow")


def words(values: Iterable[object], most: int = 6) -> str:
    """Some of a list, in words."""
    values = list(values)
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
