"""The tab of examples: one example, its components, and what happens without some of them."""

from collections.abc import Sequence
from html import escape

from hf_coar.explore import cards, contributions, drawing
from hf_coar.explore.changes import accuracy_table, flips
from hf_coar.explore.drawing import figure, heading, note, number, wrapped
from hf_coar.explore.links import View
from hf_coar.explore.measuring import Change, accuracies
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source, text_column

_LONGEST_TEXT = 4000  # characters shown of an example


def example(source: Source, view: View) -> str:
    """One example: what it is, what the model says, its components by layer and in order."""
    row, found = view.example, source.predictions([view.example])[0]
    weights = source.attributions.row(row)
    errors = source.attributions.row(row, "standard_errors") if source.attributions.has_standard_errors else None
    of_text = source.kind != "image"
    big = _text(source, row, found) if of_text else f'<div class="coar-big">{cards.content(source, row, 256)}</div>'
    label = source.label(row)
    title = f"Example {row}" + (f" · {source.class_name(label)}" if label >= 0 else "")
    return wrapped(
        f"<h2>{escape(title)}</h2>"
        f'<div class="coar-top{" coar-of-text" if of_text else ""}">{big}<div>{cards.top_table(source, found, label)}'
        f"{_measured_output(source, found)}</div></div>"
        f"{contributions.attribution(source, weights, errors)}{contributions.ranked(source, weights, errors, view)}"
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
    inner = escape(raw[column][:_LONGEST_TEXT]) if column else cards.content_of(raw, 256)
    return f'<div class="coar-text" tabindex="0">{inner}</div>'


def _measured_output(source: Source, found: Outcome) -> str:
    value = float(found.outputs[0])
    return note(f"{source.output.name}, what is attributed: {number(value, 2)} {source.unit}")


def change(source: Source, view: View, components: Sequence[int], found: Change) -> str:
    """What ablating components did: to the example that is looked at, to the classes, to the predictions."""
    return wrapped(
        f"{_of_example(source, view, components, found)}"
        f'<div class="coar-columns coar-aside"><div>{accuracy_table(accuracies(source, found), len(found.rows))}</div>'
        f"<div>{heading('Predicted against measured')}{_agreement(source, view, found)}</div></div>"
        f"{flips(source, found, view.example)}"
    )


def _of_example(source: Source, view: View, components: Sequence[int], found: Change) -> str:
    names = cards.words(source.components[i] for i in components)
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
        f'<div class="coar-figures">{figure(f"{source.output.name} now", number(before, places), unit)}'
        f"{figure('predicted ± 2 s.e.' if error else 'predicted', number(predicted, places) + error, unit)}"
        f"{figure('measured', number(after, places), unit)}</div>{note(f'ablated: {names}')}"
    )


def _agreement(source: Source, view: View, found: Change) -> str:
    marked = found.rows.index(view.example) if view.example in found.rows else None
    drawn = drawing.scatter(found.predicted, found.measured, ("predicted change", "measured change"), marked)
    correlation = found.correlation
    said = f"change of the {source.output.name}, {source.unit}, of {len(found.rows)} examples"
    return drawn + note(said + (f"; correlation {correlation:.2f}" if correlation is not None else ""))
