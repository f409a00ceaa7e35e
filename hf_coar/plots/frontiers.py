"""What an edit wins against what it costs: the models on its way, the one that was taken, and its rivals."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hf_coar.errors import CoarError
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Axes, Figure

_MARKERS = "sv^Pd*X<>p"
_GAP = 0.065  # of the height of the axes between two names


class Dot(NamedTuple):
    """A model: what it makes of the targets and of the others.

    Attributes:
        target: value on the targets.
        others: value on the others.
        target_ends: 95 % interval of the first (low, high).
        others_spread: half of the 95 % interval of the change of the second.
    """

    target: float
    others: float
    target_ends: tuple[float, float] | None = None
    others_spread: float | None = None


def edit_frontier(
    frontier: Sequence[tuple[int, float, float]],
    chosen: tuple,
    before: tuple,
    rivals: Mapping[str, tuple] = {},
    target_name: str = "accuracy on targeted examples",
    other_name: str = "accuracy on other examples",
    limits: tuple[float | None, float | None] = (None, None),
    units: tuple[str, str] = ("%", "%"),
) -> Figure:
    """What the targets come to against what the others lose: every model on the way of an edit, its choice, its rivals.

    Better is further to the right and higher, whichever way the targets are to go. The others are shown by their change
    from the model as it was, as the way is measured on other examples than the models that came of it.

    Args:
        frontier: (components ablated, target, others) of every model, `EditResult.frontier`, on the examples to choose
            on; 0 = the model as it was.
        chosen: (target, others) or `Dot` of the edited model, on the examples to judge on.
        before: the same of the model as it was.
        rivals: the same of every rival, by its name; at most ten.
        target_name: what is counted of them, for axis and title.
        other_name: what is counted of them, for axis and title.
        limits: the target that was asked for, and what the others were allowed to lose; None for none.
        units: of target and others; "%" for accuracies, which are given as fractions from 0 to 1 and shown in percent.

    Returns:
        A figure.

    Raises:
        CoarError: neither models on the way nor rivals, more than ten of these, shares outside 0 … 1, or no matplotlib.
    """
    if not (frontier or rivals) or len(rivals) > len(_MARKERS):
        raise CoarError(
            f"{len(frontier)} models on the way and {len(rivals)} rivals; give one of either at least, and ten rivals "
            "at most, such as coar.forget(…, rivals=['fine_tuning'])"
        )
    start, edited, others = Dot(*before), Dot(*chosen), {name: Dot(*dot) for name, dot in rivals.items()}
    for place, unit in enumerate(units):
        if unit == "%":
            values = [point[place + 1] for point in frontier] + [
                dot[place] for dot in (start, edited, *others.values())
            ]
            canvas.shares(("targets", "others")[place], values, len(values))
    figure, axes = canvas.new(4.4, 7.0)
    falls = edited.target < start.target
    scales = [100.0 if unit == "%" else 1.0 for unit in units]
    _way(axes, frontier, start, scales)
    dots = [("before", start, "D", canvas.INK), ("edited", edited, "o", canvas.VERMILLION)]
    dots += [(name, dot, marker, canvas.BLUE) for (name, dot), marker in zip(others.items(), _MARKERS, strict=False)]
    places = [_dot(axes, dot, start, scales, marker, colour, name) for name, dot, marker, colour in dots]
    if falls:
        axes.invert_xaxis()
    _limits(axes, limits, scales, units)
    _names(axes, [(name, place, colour) for (name, _, _, colour), place in zip(dots, places, strict=True)])
    axes.set_xlabel(canvas.plain(f"{target_name} ({units[0]})"))
    other_unit = "points" if units[1] == "%" else units[1]
    axes.set_ylabel("\n".join(textwrap.wrap(canvas.plain(f"{other_name}: change ({other_unit})"), 48)))
    axes.grid(color=canvas.FAINT, linewidth=0.5)
    keys = axes.get_legend_handles_labels()[0]
    canvas.legend_below(figure, axes, [key for key in keys if not key.get_label().startswith("dot ")])
    said = [
        f"{name} {_value(a * scale, unit)} → {_value(b * scale, unit)}"
        for name, a, b, scale, unit in zip((target_name, other_name), start, edited, scales, units, strict=False)
    ]
    canvas.title(figure, "What the edit wins and what it costs", "; ".join(said))
    return figure


def _value(value: float, unit: str) -> str:
    return f"{value:.1f}\u00a0%" if unit == "%" else f"{value:.3g}".replace("-", "−")


def _limits(axes: Axes, limits: tuple[float | None, float | None], scales: list[float], units: tuple[str, str]) -> None:
    """Lines, and a shade over all that keeps them."""
    style = {"color": canvas.GREEN, "linestyle": "--", "linewidth": 1.2, "zorder": 1}
    target, allowed = limits
    if target is None and allowed is None:
        return
    ends, (low, high) = axes.get_xlim(), axes.get_ylim()
    left, right = ends
    if target is not None:
        left = target * scales[0]
        axes.axvline(left, **style)
    if allowed is not None:
        sides = (-1,) if units[1] == "%" else (-1, 1)
        for side in sides:
            axes.axhline(side * allowed * scales[1], **style)
        bottom, top = -allowed * scales[1], high if len(sides) == 1 else allowed * scales[1]
        low, high = min(low, 1.15 * bottom), max(high, 1.15 * top if len(sides) == 2 else high)
    else:
        bottom, top = low, high
    axes.fill_between([left, right], bottom, top, color=canvas.GREEN, alpha=0.07, linewidth=0, zorder=0)
    axes.set_xlim(ends)
    axes.set_ylim(low, high)
    axes.plot([], [], label="limits, and what keeps them", **style)


def _way(axes: Axes, frontier: Sequence[tuple[int, float, float]], start: Dot, scales: list[float]) -> None:
    """Small dots, the darker the more is ablated."""
    if not frontier:
        return
    base = next((others for count, _, others in frontier if count == 0), start.others)
    most = max(count for count, _, _ in frontier) or 1
    for count, target, others in frontier:
        axes.plot(
            target * scales[0], (others - base) * scales[1], ".", color=canvas.INK, alpha=0.25 + 0.6 * count / most
        )
    keys = {"color": canvas.INK, "alpha": 0.6}
    axes.plot([], [], ".", label=f"on the way, to {canvas.count(most, 'component')} (examples to choose on)", **keys)


def _dot(
    axes: Axes, dot: Dot, start: Dot, scales: list[float], marker: str, colour: str, name: str
) -> tuple[float, float]:
    x, y = dot.target * scales[0], (dot.others - start.others) * scales[1]
    if dot is not start:
        line = {"color": colour, "linewidth": 1, "alpha": 0.4, "zorder": 2}
        if dot.target_ends is not None:
            axes.plot([end * scales[0] for end in dot.target_ends], [y, y], **line)
        if dot.others_spread is not None:
            axes.plot([x, x], [y - dot.others_spread * scales[1], y + dot.others_spread * scales[1]], **line)
    edited = colour == canvas.VERMILLION
    axes.plot(
        x, y, marker, color=colour, markersize=10 if edited else 6, markerfacecolor=colour if edited else "white",
        linestyle="none", label=f"dot {name}", zorder=3 if edited else 4,
    )  # fmt: skip
    return x, y


def _names(axes: Axes, dots: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """The name of every dot at the right, on a line that leads to it."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = {name: (y - low) / (high - low) for name, (_, y), _ in dots}
    left, right = axes.get_xlim()
    # Of dots at one height the one furthest to the right is named lowest, so that no line crosses another.
    across = {name: (x - left) / (right - left) for name, (x, _), _ in dots}
    order = sorted(heights, key=lambda name: (round(heights[name], 2), -across[name]))
    at = _spread([heights[name] for name in order])
    named = {name: (place, colour) for name, place, colour in dots}
    for name, height in zip(order, at, strict=True):
        place, colour = named[name]
        axes.annotate(
            canvas.plain(name.replace("_", " ")), place, (1.03, height), xycoords="data", textcoords="axes fraction",
            ha="left", va="center", fontsize=9, color=colour, annotation_clip=False,
            fontweight="bold" if name == "edited" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkB": 4},
        )  # fmt: skip


def _spread(heights: list[float]) -> list[float]:
    """Ascending heights, moved apart as little as gives every name its place."""
    found = list(heights)
    for place in range(1, len(found)):
        found[place] = max(found[place], found[place - 1] + _GAP)
    over = max(0.0, found[-1] - 1.0)
    found[-1] -= over
    for place in range(len(found) - 2, -1, -1):
        found[place] = min(found[place], found[place + 1] - _GAP)
    return found
