"""More views as HTML: a component, the list of components, what an ablation did, and an edit."""

from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from hf_coar.explore import columns, drawing, panels
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import button, heading, note, number
from hf_coar.explore.links import View
from hf_coar.explore.measuring import Accuracy, Change, Sides, accuracies
from hf_coar.explore.source import Source

_LISTED = 25  # components in the list
_EXTREMES = 8  # most helped and most hurt examples
_FLIPS = 16  # examples shown whose prediction flips
_CLASSES = 40  # rows of the table of accuracies
_HELD_OUT = ". Every fourth example is held out: it is not measured here, and gives the figures on the card."


def component(source: Source, view: View) -> str:
    """One component: its weights over all examples, whom it helps and whom it hurts."""
    one, weights = source.components[view.component], columns.column(source.attributions, view.component)
    group = one.group
    where = f"{group.kind} {one.position + 1} of {group.size} in {group.parameter}"
    mean, size = float(weights.mean()), float(weights.abs().mean())
    errors, places = source.attributions.has_standard_errors, drawing.digits(float(weights.abs().max()))
    error = columns.column(source.attributions, view.component, "standard_errors") if errors else None
    ticked = view.component in view.ticked
    pressed = f' aria-pressed="{"true" if ticked else "false"}"'
    choices = [
        button("try", view.component, "Ablate it alone and see", "coar-small"),
        button("tick", view.component, "Untick it" if ticked else "Tick it", "coar-small", more=pressed),
    ]
    if view.ticked:
        choices.append(button("see", 0, f"Ablate the {len(view.ticked):,} ticked and see", "coar-small"))
    return panels.wrapped(
        f"<h2>{escape(str(one))}</h2>{note(where)}"
        f'<div class="coar-figures">{_figure("mean weight", number(mean, places), source.unit)}'
        f"{_figure('mean size', number(size, places, signed=False), source.unit)}"
        f"{_figure('examples', f'{int((weights > 0).sum()):,} of {len(weights):,}', 'that it helps')}</div>"
        f'<div class="coar-pager">{"".join(choices)}</div>'
        f"{heading('Its weight over the examples')}{drawing.histogram(weights, source.unit)}"
        f"{_by_class(source, weights)}"
        f"{_extremes(source, weights, error, 'Most helped', 'keeping it raises their output most', True)}"
        f"{_extremes(source, weights, error, 'Most hurt', 'ablating it would raise their output most', False)}"
    )


def _figure(name: str, value: str, unit: str) -> str:
    return f'<div class="coar-figure"><b>{value}</b><span>{escape(f"{name}, {unit}")}</span></div>'


def _by_class(source: Source, weights: Tensor) -> str:
    labels = source.attributions.labels
    present = sorted(set(labels.tolist()) - {-1})
    if len(present) < 2:
        return ""
    means = sorted(((float(weights[labels == label].mean()), label) for label in present), reverse=True)
    if len(means) > 10:
        means = means[:5] + means[-5:]
    largest = max(abs(mean) for mean, _ in means) or 1.0
    rows = [
        [
            escape(source.class_name(label)),
            drawing.whisker_bar(mean, None, largest),
            number(mean, drawing.digits(largest)),
        ]
        for mean, label in means
    ]
    title = "Mean by class" if len(present) <= 10 else "Mean by class, the five highest and lowest"
    return heading(title) + drawing.table(["class", "", f"mean weight, {source.unit}"], rows, "coar-narrow")


def _extremes(source: Source, weights: Tensor, error: Tensor | None, title: str, said: str, highest: bool) -> str:
    order = weights.topk(min(_EXTREMES, len(weights)), largest=highest)
    rows = [i for i, v in zip(order.indices.tolist(), order.values.tolist(), strict=True) if (v > 0) == highest]
    places = drawing.digits(float(weights.abs().max()))
    extras = [
        f"<span><b>{number(float(weights[row]), places)}</b>"
        + ("" if error is None else f' <span class="coar-faint coar-whole">± {float(error[row]):.{places}f}</span>')
        + "</span>"
        for row in rows
    ]  # fmt: skip
    shown = panels.cards(source, rows, "example", extras) if rows else note("none")
    return heading(title) + note(f"{said}; weights in {source.unit}") + shown


def component_list(source: Source, view: View, progress: Progress = no_progress) -> str:
    """The components of a layer, those with the largest weights over all examples first."""
    summary = source.summary(progress)
    names, index = source.components.regroup("layer")
    inside = (index == names.index(view.layer)).nonzero().flatten() if view.layer in names else torch.arange(len(index))
    order = inside[summary.size[inside].argsort(descending=True)][:_LISTED]
    largest = float(summary.size.max()) or 1.0
    rows, places = [], drawing.digits(largest)
    for i in order.tolist():
        size, named = float(summary.size[i]), panels.component_button(source, i, i == view.component)
        picked = f'<span class="coar-pick">{named}</span>'
        rows.append([picked, drawing.fraction_bar(size / largest), number(size, places, signed=False)])
    said = f"{len(inside):,} components"
    said += f", the {len(rows)} with the largest weights" if len(inside) > len(rows) else ""
    return panels.wrapped(
        drawing.table(
            ["component", "", f"mean size, {source.unit}"],
            rows,
            "coar-listed",
            f"{said} (mean size over {len(source):,} examples)",
        )
    )


# ---------------------------------------------------------------------------------------------------------- ablations


def change(source: Source, view: View, components: Sequence[int], found: Change) -> str:
    """What ablating components did: to the example that is looked at, to the classes, to the predictions."""
    return panels.wrapped(
        f"{_of_example(source, view, components, found)}"
        f'<div class="coar-columns coar-aside"><div>{accuracy_table(accuracies(source, found), len(found.rows))}</div>'
        f"<div>{heading('Predicted against measured')}{_agreement(source, view, found)}</div></div>"
        f"{flips(source, found, view.example)}"
    )


def _of_example(source: Source, view: View, components: Sequence[int], found: Change) -> str:
    names = panels.words(source.components[i] for i in components)
    place = found.rows.index(view.example)
    before, after = float(found.before.outputs[place]), float(found.after.outputs[place])
    predicted = before + float(found.predicted[place])
    places = drawing.digits(max(abs(after - before), abs(predicted - before)))
    error = f" ± {2 * float(found.error[place]):.{places}f}" if found.error is not None else ""
    said = ""
    if found.before.classes is not None and found.after.classes is not None:
        was, now = (int(side.classes[place]) for side in (found.before, found.after))
        names_of = [source.class_name(index) for index in (was, now)]
        flip = f": it flips from <b>{escape(names_of[0])}</b> to <b>{escape(names_of[1])}</b>"
        said = flip if was != now else f": it stays <b>{escape(names_of[0])}</b>"
    unit = source.unit
    return (
        f'<p class="coar-statement">Example {view.example} with {len(components):,} '
        f"component{'s' if len(components) != 1 else ''} ablated{said}.</p>"
        f'<div class="coar-figures">{_figure(f"{source.output.name} now", number(before, places), unit)}'
        f"{_figure('predicted ± 2 s.e.' if error else 'predicted', number(predicted, places) + error, unit)}"
        f"{_figure('measured', number(after, places), unit)}</div>{note(f'ablated: {names}')}"
    )


def accuracy_table(found: Sequence[Accuracy], n_measured: int) -> str:
    """Accuracy of every class before and after."""
    if not found:
        return heading("Accuracy") + note("these examples have no labels")
    shown = found
    if len(found) > _CLASSES:
        shown = sorted(found, key=lambda one: abs(one.after - one.before) / one.count, reverse=True)[:_CLASSES]
    rows = [
        [
            f'{escape(one.name)} <span class="coar-faint">{one.count:,}</span>',
            f'<div class="coar-pair">{drawing.fraction_bar(one.before / one.count, "coar-before")}'
            f"{drawing.fraction_bar(one.after / one.count)}</div>",
            f"{100 * one.before / one.count:.0f} → <b>{100 * one.after / one.count:.0f}</b> %",
        ]
        for one in shown
    ]  # fmt: skip
    total = sum(one.count for one in found)
    before, after = (100 * sum(getattr(one, side) for one in found) / total for side in ("before", "after"))
    said = f"measured on {n_measured:,} examples: {before:.1f} → {after:.1f} % in all"
    said += f"; the {_CLASSES} classes that change most" if len(found) > _CLASSES else ""
    title = "Accuracy by class" if len(found) > 1 else "Accuracy"
    return heading(title) + drawing.table(["class, examples", "", "now → ablated"], rows, caption=said)


def _agreement(source: Source, view: View, found: Change) -> str:
    marked = found.rows.index(view.example) if view.example in found.rows else None
    drawn = drawing.scatter(found.predicted, found.measured, ("predicted change", "measured change"), marked)
    correlation = found.correlation
    said = f"change of the {source.output.name}, {source.unit}, of {len(found.rows)} examples"
    return drawn + note(said + (f"; correlation {correlation:.2f}" if correlation is not None else ""))


def flips(source: Source, found: Change, first: int = -1) -> str:
    """The examples whose prediction changed; the one that is looked at comes first."""
    places = sorted(found.flips(), key=lambda place: found.rows[place] != first)
    if found.before.classes is None or found.after.classes is None:
        return _token_flips(source, found, places)
    title = heading(f"Predictions that flip: {len(places):,} of {len(found.rows):,}")
    shown = places[:_FLIPS]
    extras = []
    for place in shown:
        now = int(found.after.classes[place])
        right = now == source.label(found.rows[place])
        mark = '<span class="coar-faint">→</span>' if right else '<span class="coar-wrong">→</span>'
        extras.append(f"<span>{mark} <b>{escape(source.class_name(now))}</b></span>")
    more = note(f"the first {len(shown)} of them") if len(places) > len(shown) else ""
    return title + more + panels.cards(source, [found.rows[place] for place in shown], "example", extras)


def _token_flips(source: Source, found: Change, places: Sequence[int]) -> str:
    rows, total = [], 0
    for place in places:
        before, after, targets = found.before.tokens[place], found.after.tokens[place], found.before.targets[place]
        where = (before != after).nonzero().flatten().tolist()
        total += len(where)
        for at in where[: min(_FLIPS - len(rows), 4)] if len(rows) < _FLIPS else ():
            context = "".join(source.token(t) for t in targets[max(0, at - 6) : at].tolist())
            cells = [escape(repr(source.token(int(side[at])))) for side in (targets, before, after)]
            opens = button("example", found.rows[place], f"…{escape(context)}", "coar-link")
            rows.append([opens, cells[0], cells[1], f"<b>{cells[2]}</b>"])
    title = heading(f"Next tokens that flip: {total:,}, in {len(places):,} of {len(found.rows):,} texts")
    return title + (drawing.table(["after", "true token", "expected", "with the ablation"], rows) if rows else "")


# -------------------------------------------------------------------------------------------------------------- edits


def marks(view: View) -> str:
    """How many examples are marked."""
    sides = [("to lower", view.lower), ("to raise", view.higher), ("to spare", view.spared)]
    said = " · ".join(f"<b>{len(rows)}</b> {name}" for name, rows in sides)
    clear = button("clear", 0, "Clear all marks", "coar-small") if any(rows for _, rows in sides) else ""
    default = "" if view.spared else '<span class="coar-faint">(none marked: all others are spared)</span>'
    return panels.wrapped(f'<div class="coar-pager" role="status">{said} {default} {clear}</div>')


def edit(source: Source, view: View, chosen: Sides, components: Sequence[int], found: Change) -> str:
    """What an edit would do."""
    rows = []
    for name, side in (("to lower", view.lower), ("to raise", view.higher), ("to spare", chosen.spared)):
        places = [place for place, row in enumerate(found.rows) if row in set(side)]
        if places:
            means = [number(float(values[places].mean()), 2) for values in (found.predicted, found.measured)]
            rows.append([f"{name} ({len(places):,} measured)", *means])
    head = ["examples", "predicted change", f"measured change, mean {source.unit}"]
    drawn = chosen.n_others and chosen.n_others > len(chosen.spared)
    said = f"References: {len(chosen.spared):,}"
    said += f", drawn evenly from {chosen.n_others:,} others" if drawn else ""
    names = "".join(f"<li>{panels.component_button(source, i)}</li>" for i in components[:40])
    more = f"<li>and {len(components) - 40} more</li>" if len(components) > 40 else ""
    return panels.wrapped(
        f'<p class="coar-statement">Preview: {len(components):,} '
        f"component{'s' if len(components) != 1 else ''} ablated.</p>"
        f"{drawing.table(head, rows)}{note(said + _HELD_OUT)}"
        f'<div class="coar-columns coar-aside"><div>{accuracy_table(accuracies(source, found), len(found.rows))}</div>'
        f"<div>{heading('What is ablated')}<ol>{names}{more}</ol></div></div>{flips(source, found)}"
    )
