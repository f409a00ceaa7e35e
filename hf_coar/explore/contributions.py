"""Components as HTML: the heat map of one example, the list of its strongest components, a button to each."""

from html import escape
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_coar.components import Components
from hf_coar.explore import drawing
from hf_coar.explore.drawing import Strip, button, heading, note, number
from hf_coar.explore.source import Source
from hf_coar.explore.tab import View

_MOST_STRIPS = 64  # rows of a heat map; above, one row a layer
_LISTED = 8  # components on either side of an example's list


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
