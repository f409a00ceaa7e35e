"""The tab of examples: one example, its components, and what happens without some of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_coar.explore import drawing, measuring, pieces
from hf_coar.explore.columns import Progress
from hf_coar.explore.drawing import Html, figure, heading, html, joined, note, number, wrapped
from hf_coar.explore.measuring import Change
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source
from hf_coar.explore.tab import TABS, Tab, Updates, View
from hf_coar.storage.texts import and_more, count

_KEPT_CHANGES = 15  # measured ablations
_NAMED = 6  # ablated components
_LONGEST_TEXT = 4000  # characters shown of an example


@TABS.register("examples")
class Examples(Tab):
    """Examples to choose from, one of them with its components, and what happens without those."""

    title, place = "Examples", 0
    kept = ("label", "wrong", "page", "k", "side", "ticked")
    acts = {
        "example": lambda source, view, value, beside: replace(view, view="examples", example=value),
        "try": lambda source, view, value, beside: replace(view, view="examples", ticked=(value,), k=0),
        "see": lambda source, view, value, beside: replace(view, view="examples"),
        "tick": lambda source, view, value, beside: replace(
            view, ticked=tuple(sorted(set(measuring.ablated(source, view)) ^ {value})), k=0
        ),
        "page": lambda source, view, value, beside: replace(view, page=max(0, value)),
    }

    def build(self) -> None:
        """A gallery on the left, one example on the right."""
        gr, source, page = self.gr, self.source, self.page
        self.changes: dict[tuple[int, ...], Change] = {}
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    self.label = gr.Dropdown(
                        [("all", -1), *page.class_choices()], value=-1, label="Label", elem_id="label", min_width=120,
                        visible=source.n_classes > 0,
                    )  # fmt: skip
                    self.number = gr.Number(
                        0, precision=0, minimum=0, maximum=len(source) - 1, label="Example number, Enter opens it",
                        elem_id="number", min_width=120,
                    )  # fmt: skip
                    self.sets("label", self.label, page=0)
                    self.sets("example", self.number, "submit")
                self.wrong = gr.Checkbox(
                    False, label="only wrong predictions", elem_id="wrong", container=False,
                    visible=source.n_classes > 0,
                )  # fmt: skip
                self.gallery = page.html("gallery")
            with gr.Column(scale=7, min_width=320, elem_classes="coar-first"):
                self.example = page.html("example")
                gr.HTML(wrapped(heading("What if they were gone?")))
                with gr.Row():
                    self.k = gr.Slider(
                        0, measuring.most_components(source), 0, step=1,
                        label="k: how many of its strongest components to ablate", elem_id="k", scale=3, buttons=[],
                    )  # fmt: skip
                    self.side = gr.Radio(
                        [("those that help it most", "help"), ("those that hurt it most", "hurt")], value="help",
                        label="Which", elem_id="side", scale=2, min_width=200,
                    )  # fmt: skip
                    self.sets("k", self.k, ticked=())
                    self.sets("side", self.side, ticked=())
                self.change = page.html("change")
                self.draws_later(
                    self.change, lambda view: (view.example, measuring.ablated(source, view)), self._measured
                )

    def connect(self) -> None:
        """Wrong predictions are searched with a bar before they are shown."""
        search = self.wrong.input(
            self.page.with_progress(self._search), [self.page.view, self.wrong], self.gallery, **self.page.heavy
        )
        self.page.step(search.then, self.page.setter("wrong", page=0), self.page.view, self.wrong)

    def draw(self, view: View, before: View) -> Updates:
        """The gallery and the example."""
        return {
            self.gallery: pieces.gallery(self.source, view), self.example: example(self.source, view),
            self.number: view.example,
        }  # fmt: skip

    def controls(self, view: View) -> Updates:
        """As set, and whether only wrong ones are shown."""
        return {**super().controls(view), self.wrong: view.wrong}

    def _search(self, view: View, wrong: bool, progress: Progress) -> Any:
        """Run the model on the examples among which wrong predictions are looked for."""
        if wrong:
            pieces.filtered(self.source, replace(view, wrong=True), progress)
        return self.gr.skip()

    def _measured(self, view: View, progress: Progress) -> Html:
        components = measuring.ablated(self.source, view)
        if not components:
            return wrapped(note("Move k, or tick components in the lists above: the model runs without them, live."))
        return change(self.source, view, components, self._changed(components, view.example, progress))

    def _changed(self, components: tuple[int, ...], row: int, progress: Progress) -> Change:
        """What ablating components does; kept, as the next example that is looked at wants the same."""
        found = self.changes.get(components)
        if found is None or row not in found.rows:
            rows = measuring.measured_rows(self.source, [row])
            found = measuring.what_if(self.source, components, rows, progress)
            self.changes = {**dict(list(self.changes.items())[-_KEPT_CHANGES:]), components: found}
        return found


def example(source: Source, view: View) -> Html:
    """One example: what it is, what the model says, its components by layer and in order."""
    row, found = view.example, source.predictions([view.example])[0]
    weights = source.attributions.row(row)
    errors = source.attributions.row(row, "standard_errors") if source.attributions.has_standard_errors else None
    of_text, label = source.kind != "image", source.label(row)
    big = _text(source, row, found) if of_text else drawing.picture(pieces.content(source.raw(row), 256))
    attributed = f"{source.output.name}, what is attributed: {number(float(found.outputs[0]), 2)} {source.unit}"
    return wrapped(
        html("<h2>Example {}{}</h2>", row, f" · {source.class_name(label)}" if label >= 0 else ""),
        drawing.top(big, pieces.top_table(source, found, label) + note(attributed), of_text),
        pieces.attribution(source, weights, errors),
        pieces.ranked(source, weights, errors, measuring.ablated(source, view)),
    )


def _text(source: Source, row: int, found: Outcome) -> Html:
    marked = source.marked(row, found)
    if marked:
        said = note("underlined: where the model expects what is there")
        inner = joined(html('<span class="coar-hit">{}</span>', word) if hit else word for word, hit in marked)
    else:
        text, said = "\n".join(source.texts(row)), html("")
        inner = html("{}", text[:_LONGEST_TEXT] if text else pieces.content(source.raw(row), 256))
    return html('<div class="coar-text" tabindex="0">{}</div>{}', inner, said)


def change(source: Source, view: View, components: Sequence[int], found: Change) -> Html:
    """What ablating components did: to the example that is looked at, to the classes, to the predictions."""
    aside = _agreement(source, view, found)
    return wrapped(
        _of_example(source, view, components, found),
        pieces.change_columns(source, found, "Predicted against measured", aside),
        pieces.flips(source, found, view.example),
    )


def _of_example(source: Source, view: View, components: Sequence[int], found: Change) -> Html:
    place, unit = found.rows.index(view.example), source.unit
    before, after = float(found.before.outputs[place]), float(found.after.outputs[place])
    predicted = before + float(found.predicted[place])
    places = drawing.digits(max(abs(after - before), abs(predicted - before)))
    between = ""
    if found.between is not None:
        low, high = (number(before + float(end[place]), places) for end in found.between)
        between = html(" <small>({} … {})</small>", low, high)
    said = html("")
    if found.before.classes is not None and found.after.classes is not None:
        was, now = (source.class_name(int(side.classes[place])) for side in (found.before, found.after))
        flip = html(": it flips from <b>{}</b> to <b>{}</b>", was, now)
        said = flip if was != now else html(": it stays <b>{}</b>", was)
    figures = [
        figure(number(before, places), f"{source.output.name} now, {unit}"),
        figure(
            html("{}{}", number(predicted, places), between),
            f"predicted{f' ({measuring.LEVEL:.0%} of fresh sets between)' if between else ''}, {unit}",
        ),
        figure(number(after, places), f"measured, {unit}"),
    ]
    names = ", ".join(source.components.names.name(i) for i in components[:_NAMED])
    names += and_more(len(components), _NAMED)
    statement = '<p class="coar-statement">Example {} with {} ablated{}.</p><div class="coar-figures">{}</div>{}'
    ablated = count(len(components), "component")
    return html(statement, view.example, ablated, said, joined(figures), note(f"ablated: {names}"))


def _agreement(source: Source, view: View, found: Change) -> Html:
    marked = found.rows.index(view.example) if view.example in found.rows else None
    drawn = drawing.scatter(found.predicted, found.measured, ("predicted change", "measured change"), marked)
    correlation = found.correlation
    said = f"change of the {source.output.name}, {source.unit}, of {len(found.rows)} examples"
    return drawn + note(said + (f"; correlation {correlation:.2f}" if correlation is not None else ""))
