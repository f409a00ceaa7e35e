"""The views as HTML, from the source and a `View`; nothing here knows of Gradio."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_coar.components import Components
from hf_coar.explore import drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Strip, button, heading, note, number, percent
from hf_coar.explore.links import View
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source, image_column, text_column

PAGES = {"text": 10}  # examples on a page
PAGE = 24  # the same of all that is no text
_MOST_SEARCHED = 500  # examples that a search for wrong predictions runs the model on, a page at a time
_MOST_STRIPS = 64  # rows of a heat map; above, one row a layer
_LISTED = 8  # components on either side of an example's list
_LONGEST_TEXT = 4000  # characters shown of an example


def wrapped(inner: str) -> str:
    """HTML in the explorer's own style."""
    return f'<div class="coar">{inner}</div>'


# ---------------------------------------------------------------------------------------------------------- examples


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


_MARKS = {"lower": "↓ lower", "higher": "↑ raise", "spared": "= spare"}


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


def example(source: Source, view: View) -> str:
    """One example: what it is, what the model says, its components by layer and in order."""
    row, found = view.example, source.predictions([view.example])[0]
    weights = source.attributions.row(row)
    errors = source.attributions.row(row, "standard_errors") if source.attributions.has_standard_errors else None
    of_text = source.kind != "image"
    big = _text(source, row, found) if of_text else f'<div class="coar-big">{content(source, row, 256)}</div>'
    label = source.label(row)
    title = f"Example {row}" + (f" · {source.class_name(label)}" if label >= 0 else "")
    return wrapped(
        f"<h2>{escape(title)}</h2>"
        f'<div class="coar-top{" coar-of-text" if of_text else ""}">{big}<div>{top_table(source, found, label)}'
        f"{_measured_output(source, found)}</div></div>"
        f"{attribution(source, weights, errors)}{ranked(source, weights, errors, view)}"
    )


def _text(source: Source, row: int, found: Outcome) -> str:
    raw = source.raw(row)
    column = text_column(raw)
    if found.targets and source.tokenizer is not None:
        pieces = "".join(
            f'<span class="coar-hit">{escape(piece)}</span>' if hit else escape(piece)
            for piece, hit in zip(
                [source.token(t) for t in found.targets[0].tolist()],
                (found.tokens[0] == found.targets[0]).tolist(),
                strict=True,
            )
        )
        return (
            f'<div class="coar-text" tabindex="0">{pieces}</div>{note("underlined: the token that the model expects")}'
        )
    inner = escape(raw[column][:_LONGEST_TEXT]) if column else content_of(raw, 256)
    return f'<div class="coar-text" tabindex="0">{inner}</div>'


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


def _measured_output(source: Source, found: Outcome) -> str:
    value = float(found.outputs[0])
    return note(f"{source.output.name}, what is attributed: {number(value, 2)} {source.unit}")


def attribution(source: Source, weights: Tensor, errors: Tensor | None) -> str:
    """The heat map, with the sign explained."""
    said = (
        f"Positive (blue): keeping the component raises the {source.output.name}, ablating it lowers it. "
        "Negative (orange): the other way round."
    )
    noise = ""
    if errors is not None:
        noise = f" Typical standard error: {float(errors.square().mean().sqrt()):.2g} {source.unit}."
    kinds = {group.kind for group in source.components.groups}
    kind = f"{kinds.pop()}s" if len(kinds) == 1 else "components"
    return (
        heading("Components by layer")
        + note(said + noise)
        + drawing.heat_map(strips(source.components, weights), source.unit, kind)
    )


def strips(components: Components, weights: Tensor) -> list[Strip]:
    """Rows of a heat map: the matrices, or the layers where there are many matrices."""
    if len(components.groups) <= _MOST_STRIPS:
        skip = len(common_prefix(components))
        return [Strip(_place(group)[skip:], start, weights[start:stop]) for group, start, stop in components.spans()]
    names, index = components.regroup("layer")
    bounds = [0, *(torch.nonzero(index.diff())[:, 0] + 1).tolist(), len(index)]
    return [Strip(names[int(index[a])], a, weights[a:b]) for a, b in pairwise(bounds)]


def _place(group: Any) -> str:
    return group.parameter.removesuffix(".weight") or group.module


def common_prefix(components: Components) -> str:
    """With what the names of all matrices begin, up to a dot, such as `transformer.`; nobody needs to read it."""
    every = [group.parameter.split(".") for group in components.groups]
    n = 0
    while all(len(parts) > n + 2 and parts[n] == every[0][n] for parts in every):
        n += 1
    n -= n > 0 and all(parts[n].isdigit() for parts in every)  # a number needs the word before it
    return "".join(f"{part}." for part in every[0][:n])


def component_button(source: Source, index: int, current: bool = False) -> str:
    """A button that opens a component; its number is readable however narrow the column."""
    name = str(source.components[index])
    place, _, rest = name.removeprefix(common_prefix(source.components)).partition(" ")
    inner = (
        f'<span class="coar-place"><bdi>{escape(place)}</bdi></span> <span class="coar-position">{escape(rest)}</span>'
    )
    state = ' aria-current="true"' if current else ""
    return button("component", index, inner, "coar-link coar-name", name, f'{state} title="{escape(name)}"')


def ranked(source: Source, weights: Tensor, errors: Tensor | None, view: View, ticks: bool = True) -> str:
    """The components that help most and those that hurt most, with boxes to tick."""
    n = min(_LISTED, len(weights))
    largest = float(weights.abs().max()) or 1.0
    chosen = _ticked(weights, view)
    found = []
    for title, order in (("Help most", weights.topk(n)), ("Hurt most", weights.topk(n, largest=False))):
        wanted = [i for i, v in zip(order.indices.tolist(), order.values.tolist(), strict=True)
                  if (v > 0) == (title == "Help most")]  # fmt: skip
        rows = [_ranked_row(source, i, weights, errors, largest, i in chosen, ticks) for i in wanted]
        head = ["component", "", f"{drawing.scale(largest)[1]}{source.unit}{'' if errors is None else ' ± s.e.'}"]
        shown = drawing.table(head, rows, "coar-ranked") if rows else note("none")
        found.append(f"<div>{heading(title)}{shown}</div>")
    return f'<div class="coar-columns">{"".join(found)}</div>'


def _ticked(weights: Tensor, view: View) -> set[int]:
    if view.ticked or not view.k:
        return set(view.ticked)
    return set(weights.topk(min(view.k, len(weights)), largest=view.side == "help").indices.tolist())


def _ranked_row(
    source: Source, i: int, weights: Tensor, errors: Tensor | None, largest: float, checked: bool, ticks: bool
) -> list[str]:
    name, value = str(source.components[i]), float(weights[i])
    error = float(errors[i]) if errors is not None else None
    box = ""
    if ticks:
        state = " checked" if checked else ""
        box = f'<input type="checkbox" data-act="tick" data-value="{i}" aria-label="ablate {escape(name)}"{state}> '
    factor, _ = drawing.scale(largest)
    places = drawing.digits(factor * largest)
    said = number(factor * value, places) + (f" ± {factor * error:.{places}f}" if error is not None else "")
    named = component_button(source, i)
    return [f'<span class="coar-pick">{box}{named}</span>', drawing.whisker_bar(value, error, largest, True), said]


def words(values: Iterable[object], most: int = 6) -> str:
    """Some of a list, in words."""
    values = list(values)
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")


def cards(source: Source, rows: Sequence[int], act: str, extras: Sequence[str]) -> str:
    """Examples as cards with something beneath each."""
    found = source.predictions(list(rows))
    inner = "".join(
        card(source, row, one, act, extra=extra) for row, one, extra in zip(rows, found, extras, strict=True)
    )
    return f'<div class="coar-cards{" coar-texts" if source.kind != "image" else ""}">{inner}</div>'
