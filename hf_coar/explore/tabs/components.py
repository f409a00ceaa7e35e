"""The tab of components: one component over all examples, whom it helps and whom it hurts."""

import re
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_coar.explore import acts, columns, drawing, pieces
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Html, button, figure, heading, html, joined, note, number, wrapped
from hf_coar.explore.source import Source
from hf_coar.explore.tab import TABS, Tab, View
from hf_coar.storage.texts import count

_LISTED = 25  # components in the list
_LONGEST_SEARCH = 200  # characters
_EXTREMES = 8  # most helped and most hurt examples


@TABS.register("components")
class Components(Tab):
    """Components to choose from, and one of them over all examples."""

    title, place = "Components", 1
    kept = ("layer", "find", "ticked", "k", "side")
    acts = {"component": lambda source, view, value, beside: replace(view, view="components", component=value)}

    def build(self) -> None:
        """What is searched above, a list of it on the left, one component on the right."""
        gr, source, page = self.gr, self.source, self.page
        layers = zip(source.components.names.of("layer"), source.components.regroup("layer")[0], strict=True)
        with gr.Row():
            self.find = gr.Textbox(
                label="Search by name or number", placeholder=source.components.names.name(0), max_lines=1,
                max_length=_LONGEST_SEARCH, elem_id="find", min_width=120,
            )  # fmt: skip
            self.layer = gr.Dropdown(
                [("all", ""), *layers], value="", label="Layer",
                elem_id="layer", min_width=120,
            )  # fmt: skip
            self.sets("layer", self.layer)
            self.sets("find", self.find)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self.list = page.html("component-list")
                self.draws_later(
                    self.list, lambda view: (view.layer, view.find, view.component), partial(component_list, source)
                )
            with gr.Column(scale=7, min_width=320, elem_classes="coar-first"):
                self.component = page.html("component")
                self.draws_later(self.component, lambda view: (view.component, view.ticked), partial(component, source))


def looked_at(source: Source, view: View, progress: Progress = no_progress) -> int:
    """The component of a view: the one with the largest weights, unless it names one."""
    return view.component if view.component >= 0 else int(source.sizes(progress).argmax())


def found(source: Source, view: View) -> Tensor:
    """The components of a layer whose names hold all words that are searched, or that have this number; int64 [found].

    Letters count whether large or small.
    """
    layers, index = source.components.regroup("layer")
    inside = index == layers.index(view.layer) if view.layer in layers else torch.ones(len(index), dtype=torch.bool)
    words = view.find[:_LONGEST_SEARCH].casefold().split()
    if words:
        number = int(words[0]) if words[0].isdecimal() and len(words) == 1 else -1
        hits = [i == number or all(_holds(name, w) for w in words) for i, name in enumerate(source.names)]
        inside &= torch.tensor(hits)
    return inside.nonzero().flatten()


def _holds(name: str, word: str) -> bool:
    """Whether a name holds a word; a number counts as a whole, so that 7 is not found in 17."""
    return word in name and (not word.isdecimal() or word in re.findall(r"\d+", name))


def component(source: Source, view: View, progress: Progress = no_progress) -> Html:
    """One component: its weights over all examples, whom it helps and whom it hurts."""
    view = replace(view, component=looked_at(source, view, progress))
    one, weights = source.components[view.component], columns.column(source.attributions, view.component)
    group, places = one.group, drawing.digits(float(weights.abs().max()))
    error = None
    if source.attributions.has_standard_errors:
        error = columns.column(source.attributions, view.component, "standard_errors")
    ticked = view.component in view.ticked
    pressed = html(' aria-pressed="{}"', "true" if ticked else "false")
    choices = [
        button("try", view.component, "Ablate it alone and see", "coar-small"),
        button("tick", view.component, "Untick it" if ticked else "Tick it", "coar-small", more=pressed),
    ]
    if view.ticked:
        choices.append(button("see", 0, f"Ablate the {len(view.ticked):,} ticked and see", "coar-small"))
    figures = [
        figure(number(float(weights.mean()), places), f"mean weight, {source.unit}"),
        figure(number(float(weights.abs().mean()), places, signed=False), f"mean size, {source.unit}"),
        figure(f"{int((weights > 0).sum()):,} of {len(weights):,}", "examples, that it helps"),
    ]
    return wrapped(
        html('<h2 title="{}">{}</h2>', one, source.components.names.name(view.component)),
        note(f"{group.kind} {one.position + 1} of {group.size} in {group.parameter}"),
        html('<div class="coar-figures">{}</div><div class="coar-pager">{}</div>', joined(figures), joined(choices)),
        acts.strongest(source, view.component, progress),
        _extremes(source, weights, error, "Most helped", "keeping it raises their output most", True),
        _extremes(source, weights, error, "Most hurt", "ablating it would raise their output most", False),
        heading("Its weight over the examples"),
        drawing.histogram(weights, source.unit),
        _by_class(source, weights),
    )


def _by_class(source: Source, weights: Tensor) -> Html:
    labels = source.attributions.labels
    present = sorted(set(labels.tolist()) - {-1})
    if len(present) < 2:
        return html("")
    means = sorted(((float(weights[labels == label].mean()), label) for label in present), reverse=True)
    if len(means) > 10:
        means = means[:5] + means[-5:]
    largest = max(abs(mean) for mean, _ in means) or 1.0
    rows = [
        [source.class_name(label), drawing.whisker_bar(mean, None, largest), number(mean, drawing.digits(largest))]
        for mean, label in means
    ]
    title = "Mean by class" if len(present) <= 10 else "Mean by class, the five highest and lowest"
    return heading(title) + drawing.table(["class", "", f"mean weight, {source.unit}"], rows, "coar-narrow")


def _extremes(source: Source, weights: Tensor, error: Tensor | None, title: str, said: str, highest: bool) -> Html:
    order = weights.topk(min(_EXTREMES, len(weights)), largest=highest).indices.tolist()
    rows = [row for row in order if (float(weights[row]) > 0) == highest]
    places, extras = drawing.digits(float(weights.abs().max())), []
    for row in rows:
        noise = "" if error is None else f" ± {float(error[row]):.{places}f}"
        noise = html('<span class="coar-faint coar-whole">{}</span>', noise) if noise else ""
        extras.append(html("<span><b>{}</b>{}</span>", number(float(weights[row]), places), noise))
    shown = pieces.cards(source, rows, "example", extras) if rows else note("none")
    return joined([heading(title), note(f"{said}; weights in {source.unit}"), shown])


def component_list(source: Source, view: View, progress: Progress = no_progress) -> Html:
    """The components that are searched, those with the largest weights over all examples first."""
    sizes, current, inside = source.sizes(progress), looked_at(source, view, progress), found(source, view)
    largest, rows = float(sizes.max()) or 1.0, []
    for i in inside[sizes[inside].argsort(descending=True)][:_LISTED].tolist():
        size, bar = float(sizes[i]), drawing.fraction_bar(float(sizes[i]) / largest)
        picked = html('<span class="coar-pick">{}</span>', pieces.component_button(source, i, i == current))
        rows.append([picked, bar, number(size, drawing.digits(largest), signed=False)])
    if not rows:
        return wrapped(note(f"no component{' of ' + view.layer if view.layer else ''} is called {view.find!r}"))
    said = count(len(inside), "component")
    said += f", the {len(rows)} with the largest weights" if len(inside) > len(rows) else ""
    said += f" (mean size over {len(source):,} examples)"
    return wrapped(drawing.table(["component", "", f"mean size, {source.unit}"], rows, "coar-listed", said))
