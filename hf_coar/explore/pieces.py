"""What several tabs show: examples as cards, components in order and by layer, and what an ablation did; no Gradio."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_coar.components import Components
from hf_coar.data.showing import image_column, image_of, text_column
from hf_coar.explore import drawing, measuring
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Html, Strip, button, heading, html, joined, note, number, wrapped
from hf_coar.explore.measuring import Accuracy, Change
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source
from hf_coar.explore.tab import View

PAGES = {"text": 10}  # examples on a page
PAGE = 24  # the same of all that is no text
_MOST_SEARCHED = 500  # examples that a search for wrong predictions runs the model on, a page at a time
_COLUMNS = 4  # of an example that is neither picture nor text
_MOST_STRIPS = 64  # rows of a heat map; above, one row a layer
_LISTED = 8  # components on either side of an example's list
_FLIPS = 16  # examples shown whose prediction flips
_CLASSES = 40  # rows of the table of accuracies
_MARKS = {"lower": "↓ lower", "higher": "↑ raise", "spared": "= spare"}


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


def gallery(source: Source, view: View, act: str = "example") -> Html:
    """A page of examples as cards; in an edit with their marks."""
    rows, more = filtered(source, view)
    size = PAGES.get(source.kind, PAGE)
    last = max(0, (len(rows) - 1) // size)
    page = min(view.page, last)
    shown = rows[page * size : (page + 1) * size]
    said = f"{len(rows):,} of {len(source):,} examples" if len(rows) < len(source) else f"{len(source):,} examples"
    said += f"; searched in the first {_MOST_SEARCHED}" if more else ""
    pager = html(
        '<div class="coar-pager">{}<span>page {} of {}</span>{}<span class="coar-faint">{}</span></div>',
        _turn(page - 1, "‹ Back", page > 0), page + 1, last + 1, _turn(page + 1, "Next ›", page < last), said,
    )  # fmt: skip
    return wrapped(cards(source, shown, act, view=view) if shown else note("no example is left"), pager)


def _turn(page: int, text: str, possible: bool) -> Html:
    return button("page", page, text, "coar-small", more="" if possible else " disabled")


def cards(source: Source, rows: Sequence[int], act: str, extras: Sequence[Html] = (), view: View | None = None) -> Html:
    """Examples as cards, with something beneath each; those that a view looks at or marks show it."""
    found = source.predictions(list(rows))
    extras = extras or [html("")] * len(rows)
    inner = joined(_card(source, *one, act, view) for one in zip(rows, found, extras, strict=True))
    return html('<div class="coar-cards{}">{}</div>', " coar-texts" if source.kind != "image" else "", inner)


def _card(source: Source, row: int, found: Outcome, extra: Html, act: str, view: View | None) -> Html:
    """An example small: picture or beginning of the text, prediction, label where they differ."""
    said, plain = _prediction(source, row, found)
    state = html(' aria-current="true"') if view and act == "example" and row == view.example else html("")
    if act == "mark":
        side = next((side for side in _MARKS if row in getattr(view, side)), "")
        state = html(' aria-pressed="{}"', "true" if side else "false")
        extra = html('<span class="coar-mark coar-mark-{}">{}</span>', side, _MARKS[side]) if side else extra
        plain += f", {_MARKS[side]}" if side else ""
    inner = html('{}<span class="coar-said">{}</span>{}', content(source.raw(row), 88, source.texts(row)), said, extra)
    return button(act, row, inner, "coar-card", f"example {row}: {plain}", state)


def _prediction(source: Source, row: int, found: Outcome) -> tuple[Html, str]:
    """What the model says of an example, as HTML and as plain words."""
    start = html('<span class="coar-faint">{}</span> ', row)
    if found.classes is None and not found.tokens:
        plain = f"{source.output.name} {number(float(found.outputs[0]))}"
        return start + plain, plain
    if found.classes is None:
        hits = int((found.tokens[0] == found.targets[0]).sum())
        plain = f"{hits} of {len(found.targets[0])} {source.targets} right"
        return start + plain, plain
    predicted, label = int(found.classes[0]), source.label(row)
    name, probability = source.class_name(predicted), f"{100 * found.top[0][0][1]:.0f}\u00a0%"
    said, plain = html("{}{} {}", start, name, probability), f"{name}, {probability}"
    if label in (-1, predicted):
        return said, plain
    truth = source.class_name(label)
    return html('{}<br><span class="coar-wrong">✗ is {}</span>', said, truth), f"{plain}, wrong: is {truth}"


def content(raw: Mapping[str, Any], size: int, texts: Sequence[str] = ()) -> Html:
    """A raw example's picture, or the beginning of its texts, or of the values that it has.

    Args:
        raw: the example.
        size: of the picture.
        texts: what the model reads of it; by default what looks like it.
    """
    column = image_column(raw)
    picture = raw[column] if column is not None else image_of(raw.get("pixel_values"))
    shown = None if picture is None else drawing.thumbnail(picture, size)
    if shown is not None:
        return shown
    column = text_column(raw)
    texts = texts or ([] if column is None else [raw[column]])
    said = " · ".join(texts)[:240] or ", ".join(map(_value, list(raw.items())[:_COLUMNS]))
    return html('<span class="coar-snippet">{}</span>', said)


def _value(item: tuple[str, Any]) -> str:
    """Such as `input_values: [0.1, -0.2, …]`."""
    name, value = item
    if isinstance(value, Tensor):
        value = value.flatten()[:7].tolist()
    if isinstance(value, list | tuple):
        numbers = [f"{one:.3g}" if isinstance(one, float) else f"{one!s:.20}" for one in value[:6]]
        return f"{name}: [{', '.join(numbers)}{', …' if len(value) > 6 else ''}]"
    return f"{name}: {value!s:.60}"


def top_table(source: Source, found: Outcome, label: int = -1) -> Html:
    """The most likely classes, or the most likely tokens after a text."""
    of_classes, rows = found.classes is not None, []
    if not found.top[0]:
        return note("of what this model gives, the explorer shows the output that is attributed")
    for index, probability in found.top[0]:
        name: object = repr(source.token(index)) if source.speaks else source.class_name(index)
        name = html("<b>{}</b> (its label)", name) if index == label and of_classes else name
        bar = '{} <span class="coar-percent">{:.1f} %</span>'
        rows.append([name, html(bar, drawing.fraction_bar(probability), 100 * probability)])
    at_end = "most likely next" if source.is_language_model else "most likely at the last of them"
    return drawing.table(["the model says" if of_classes else at_end, "probability"], rows, "coar-narrow")


# -------------------------------------------------------------------------------------------------------- components


def attribution(source: Source, weights: Tensor, errors: Tensor | None) -> Html:
    """The heat map of one example, with the sign explained."""
    said = (
        f"Positive (blue): keeping the component raises the {source.output.name}, ablating it lowers it. "
        "Negative (orange): the other way round."
    )
    if errors is not None:
        said += f" Typical standard error: {float(errors.square().mean().sqrt()):.2g} {source.unit}."
    kinds = {group.kind for group in source.components.groups}
    kind = f"{kinds.pop()}s" if len(kinds) == 1 else "components"
    heat = drawing.heat_map(strips(source.components, weights), source.unit, kind)
    return joined([heading("Components by layer"), note(said), heat])


def strips(components: Components, weights: Tensor) -> list[Strip]:
    """Rows of a heat map: the matrices, or the layers where there are many matrices."""
    if len(components.groups) <= _MOST_STRIPS:
        spans = zip(components.names.labels, components.spans(), strict=True)
        return [Strip(name, start, weights[start:stop]) for name, (_, start, stop) in spans]
    names, (_, index) = components.names.of("layer"), components.regroup("layer")
    bounds = [0, *(torch.nonzero(index.diff())[:, 0] + 1).tolist(), len(index)]
    return [Strip(names[int(index[a])], a, weights[a:b]) for a, b in pairwise(bounds)]


def component_button(source: Source, index: int, current: bool = False) -> Html:
    """A button that opens a component: its short name, and its full one where the pointer rests on it."""
    name, full = source.components.names.name(index), str(source.components[index])
    more = html('{} title="{}"', html(' aria-current="true"') if current else "", full)
    return button("component", index, name, "coar-link coar-name", name, more)


def ranked(source: Source, weights: Tensor, errors: Tensor | None, ticked: Sequence[int] | None = None) -> Html:
    """The components that help most and those that hurt most; with boxes to tick, unless `ticked` is None."""
    n, largest, found = min(_LISTED, len(weights)), float(weights.abs().max()) or 1.0, []
    unit = f"{drawing.scale(largest)[1]}{source.unit}{'' if errors is None else ' ± s.e.'}"
    for title, sign in (("Help most", 1), ("Hurt most", -1)):
        wanted = [i for i in (sign * weights).topk(n).indices.tolist() if sign * float(weights[i]) > 0]
        rows = [_ranked_row(source, i, weights, errors, largest, ticked) for i in wanted]
        shown = drawing.table(["component", "", unit], rows, "coar-ranked") if rows else note("none")
        found.append(html("<div>{}{}</div>", heading(title), shown))
    return html('<div class="coar-columns">{}</div>', joined(found))


def _ranked_row(
    source: Source, i: int, weights: Tensor, errors: Tensor | None, largest: float, ticked: Sequence[int] | None
) -> list[object]:
    value, error = float(weights[i]), float(errors[i]) if errors is not None else None
    box = html("")
    if ticked is not None:
        box = html(
            '<input type="checkbox" data-act="tick" data-value="{}" aria-label="ablate {}"{}> ',
            i, source.components.names.name(i), " checked" if i in ticked else "",
        )  # fmt: skip
    factor, _ = drawing.scale(largest)
    places = drawing.digits(factor * largest)
    said = number(factor * value, places) + (f" ± {factor * error:.{places}f}" if error is not None else "")
    picked = html('<span class="coar-pick">{}{}</span>', box, component_button(source, i))
    return [picked, drawing.whisker_bar(value, error, largest, True), said]


# --------------------------------------------------------------------------------------------------------- ablations


def change_columns(source: Source, found: Change, title: str, aside: Html) -> Html:
    """Accuracies before and after an ablation, beside something else, and the predictions that flip."""
    columns = '<div class="coar-columns coar-aside"><div>{}</div><div>{}{}</div></div>'
    table = _accuracy_table(measuring.accuracies(source, found), len(found.rows))
    return html(columns, table, heading(title), aside)


def _accuracy_table(found: Sequence[Accuracy], n_measured: int) -> Html:
    """Accuracy of every class before and after."""
    if not found:
        return heading("Accuracy") + note("these examples have no labels, or no classes are predicted for them")
    shown = found
    if len(found) > _CLASSES:
        shown = sorted(found, key=lambda one: abs(one.after - one.before) / one.count, reverse=True)[:_CLASSES]
    rows = [_accuracy_row(one) for one in shown]
    total = sum(one.count for one in found)
    before, after = (100 * sum(getattr(one, side) for one in found) / total for side in ("before", "after"))
    said = f"measured on {n_measured:,} examples: {before:.1f} → {after:.1f} % in all"
    said += f"; the {_CLASSES} classes that change most" if len(found) > _CLASSES else ""
    title = "Accuracy by class" if len(found) > 1 else "Accuracy"
    return heading(title) + drawing.table(["class, examples", "", "now → ablated"], rows, caption=said)


def _accuracy_row(one: Accuracy) -> list[Html]:
    before, after = one.before / one.count, one.after / one.count
    bars = drawing.fraction_bar(before, "coar-before") + drawing.fraction_bar(after)
    return [
        html('{} <span class="coar-faint">{:,}</span>', one.name, one.count),
        html('<div class="coar-pair">{}</div>', bars),
        html("{:.0f} → <b>{:.0f}</b> %", 100 * before, 100 * after),
    ]


def flips(source: Source, found: Change, first: int = -1) -> Html:
    """The examples whose prediction changed; the one that is looked at comes first."""
    if found.before.classes is None and not found.before.tokens:
        return html("")
    places = sorted(found.flips(), key=lambda place: found.rows[place] != first)
    if found.before.classes is None or found.after.classes is None:
        return _token_flips(source, found, places)
    title = heading(f"Predictions that flip: {len(places):,} of {len(found.rows):,}")
    shown, extras = [found.rows[place] for place in places[:_FLIPS]], []
    for place, row in zip(places, shown, strict=False):
        now = int(found.after.classes[place])
        colour = "coar-faint" if now == source.label(row) else "coar-wrong"
        extras.append(html('<span><span class="{}">→</span> <b>{}</b></span>', colour, source.class_name(now)))
    more = note(f"the first {len(shown)} of them") if len(places) > len(shown) else ""
    return joined([title, more, cards(source, shown, "example", extras)])


def _token_flips(source: Source, found: Change, places: Sequence[int]) -> Html:
    rows, total = [], 0
    for place in places:
        before, after, targets = found.before.tokens[place], found.after.tokens[place], found.before.targets[place]
        where = (before != after).nonzero().flatten().tolist()
        total += len(where)
        for at in where[: min(_FLIPS - len(rows), 4)] if len(rows) < _FLIPS else ():
            cells = [source.target(int(side[at])) for side in (targets, before, after)]
            opens = button("example", found.rows[place], _before(source, found, place, at), "coar-link")
            rows.append([opens, *cells[:2], html("<b>{}</b>", cells[2])])
    name = source.targets.capitalize()
    title = heading(f"{name} that flip: {total:,}, in {len(places):,} of {len(found.rows):,} examples")
    return title + (drawing.table(["after", "true", "expected", "with the ablation"], rows) if rows else "")


def _before(source: Source, found: Change, place: int, at: int) -> str:
    """What goes before a target: the words, or its position."""
    if not source.is_language_model:
        return f"example {found.rows[place]}, position {int(found.before.places[place][at])}"
    return "…" + "".join(source.words(found.before.targets[place][max(0, at - 6) : at].tolist()))
