"""The tab of components: one component over all examples, whom it helps and whom it hurts."""

from dataclasses import replace
from functools import partial
from html import escape

import torch
from torch import Tensor

from hf_coar.explore import cards, columns, contributions, drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import button, figure, heading, note, number, wrapped
from hf_coar.explore.source import Source
from hf_coar.explore.tab import Tab, Updates, View, register

_LISTED = 25  # components in the list
_EXTREMES = 8  # most helped and most hurt examples


@register
class Components(Tab):
    """Components to choose from, and one of them over all examples."""

    name, title, place = "components", "Components", 1
    kept = ("layer", "ticked", "k", "side")
    acts = {"component": lambda source, view, value, beside: replace(view, view="components", component=value)}

    def build(self) -> None:
        """A list on the left, one component on the right."""
        gr, source, page = self.gr, self.source, self.page
        names, _ = source.components.regroup("layer")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    self.layer = gr.Dropdown(
                        [("all", ""), *((name or "(the model itself)", name) for name in names)], value="",
                        label="Layer", elem_id="layer", min_width=120,
                    )  # fmt: skip
                    self.number = gr.Number(
                        0, precision=0, minimum=0, maximum=len(source.components) - 1,
                        label="Component number, Enter opens it", elem_id="component-number", min_width=120,
                    )  # fmt: skip
                    self.sets("layer", self.layer)
                    self.sets("component", self.number, "submit")
                self.list = page.html("component-list")
                self.draws_later(self.list, lambda view: (view.layer, view.component), partial(component_list, source))
            with gr.Column(scale=7, min_width=320):
                self.component = page.html("component")

    def draw(self, view: View, before: View) -> Updates:
        """The component."""
        return {self.component: component(self.source, view), self.number: view.component}


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
    return wrapped(
        f"<h2>{escape(str(one))}</h2>{note(where)}"
        f'<div class="coar-figures">{figure("mean weight", number(mean, places), source.unit)}'
        f"{figure('mean size', number(size, places, signed=False), source.unit)}"
        f"{figure('examples', f'{int((weights > 0).sum()):,} of {len(weights):,}', 'that it helps')}</div>"
        f'<div class="coar-pager">{"".join(choices)}</div>'
        f"{heading('Its weight over the examples')}{drawing.histogram(weights, source.unit)}"
        f"{_by_class(source, weights)}"
        f"{_extremes(source, weights, error, 'Most helped', 'keeping it raises their output most', True)}"
        f"{_extremes(source, weights, error, 'Most hurt', 'ablating it would raise their output most', False)}"
    )


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
    shown = cards.cards(source, rows, "example", extras) if rows else note("none")
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
        size, named = float(summary.size[i]), contributions.component_button(source, i, i == view.component)
        picked = f'<span class="coar-pick">{named}</span>'
        rows.append([picked, drawing.fraction_bar(size / largest), number(size, places, signed=False)])
    said = f"{len(inside):,} components"
    said += f", the {len(rows)} with the largest weights" if len(inside) > len(rows) else ""
    return wrapped(
        drawing.table(
            ["component", "", f"mean size, {source.unit}"],
            rows,
            "coar-listed",
            f"{said} (mean size over {len(source):,} examples)",
        )
    )
