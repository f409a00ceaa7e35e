"""The tab of layers and heads: which parts of the network contribute, before any single component is looked at."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_coar.errors import NoComponentsError
from hf_coar.explore import drawing, pieces
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Html, button, heading, html, joined, note, number, wrapped
from hf_coar.explore.source import Source
from hf_coar.explore.tab import TABS, Tab, View

_MOST_HEADS = 64  # in a row of the grid


@TABS.register("layers")
class Layers(Tab):
    """All layers in the order of the network, and the heads as a grid."""

    title, place = "Layers and heads", 0.5
    acts = {
        "layer": lambda source, view, value, beside: replace(
            view, view="components", layer=_layer(source, value), find="", component=_strongest(source, value)
        )
    }

    def build(self) -> None:
        """One view of everything."""
        self.layers = self.page.html("layers")
        self.draws_later(self.layers, lambda view: ("layers",), partial(layers, self.source))


def _layer(source: Source, value: int) -> str:
    names, _ = source.components.regroup("layer")
    return names[min(max(value, 0), len(names) - 1)]


def _strongest(source: Source, value: int) -> int:
    _, index = source.components.regroup("layer")
    inside = (index == min(max(value, 0), int(index.max()))).nonzero().flatten()
    return int(inside[source.sizes()[inside].argmax()])


def layers(source: Source, view: View, progress: Progress = no_progress) -> Html:
    """Layers with what their components contribute, and heads where there are any."""
    sizes, names = source.sizes(progress), source.components.names.of("layer")
    full, index = source.components.regroup("layer")
    totals = torch.zeros(len(full)).index_add_(0, index, sizes)
    counts, largest = index.bincount(minlength=len(full)).tolist(), float(totals.max()) or 1.0
    rows = []
    for i, name in enumerate(names):
        opens = button("layer", i, name, "coar-link coar-name", name, html(' title="{}"', full[i]))
        shown = number(float(totals[i]), drawing.digits(largest), signed=False)
        strongest = pieces.component_button(source, _strongest(source, i))
        rows.append([opens, f"{counts[i]:,}", drawing.fraction_bar(float(totals[i]) / largest), strongest, shown])
    head = ["layer", "components", "", "its strongest", f"sum of mean sizes, {source.unit}"]
    said = f"the input is at the top; a click lists a layer's components; means over {len(source):,} examples"
    table = drawing.table(head, rows, "coar-layers", said)
    return wrapped(html("<h2>Layers</h2>"), table, _heads(source, sizes))


def _heads(source: Source, sizes: Tensor) -> Html:
    """A grid with a row a layer and a cell a head; a click opens its strongest component."""
    try:
        full, index = source.components.regroup("head")
    except NoComponentsError:
        return note("Heads are shown of attributions by head: find_components(model, granularity='head').")
    inside = index >= 0
    totals = torch.zeros(len(full)).index_add_(0, index[inside], sizes[inside])
    largest, rows = float(totals.max()) or 1.0, {}
    for i, (name, short) in enumerate(zip(full, source.components.names.of("head"), strict=True)):
        members = (index == i).nonzero().flatten()
        strongest = int(members[sizes[members].argmax()])
        share, said = float(totals[i]) / largest, f"{short}: {float(totals[i]):.3g} {source.unit}"
        style = html(' style="--share:{:.0f}%" title="{} ({})"', 100 * share, said, name)
        cell = button("component", strongest, short.rpartition(" ")[2], "coar-head", said, style)
        rows.setdefault(short.rpartition(" head")[0], []).append(cell)
    row = '<div class="coar-heads-row"><span>{}</span><span class="coar-heads">{}</span></div>'
    grid = joined(html(row, at, joined(cells[:_MOST_HEADS])) for at, cells in rows.items())
    return joined([heading("Heads"), note("darker: larger mean weights; a click opens the head"), grid])
