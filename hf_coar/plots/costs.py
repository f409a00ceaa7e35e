"""Cost against correlation: what a method gives for its passes."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from hf_coar.errors import CoarError

# matplotlib's classes, by name only: it is imported where a picture is drawn.
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Axes, Figure

Curve = Sequence[tuple[float, float]]  # (cost, correlation)
Curves = Mapping[str, Curve]  # by method

PANEL = 3.7  # inches
_WORTH_SAYING = 1.5  # times fewer passes


def cost_against_correlation(
    points: "Curves | Mapping[str, Curves]",
    reference: str | None = None,
    y_label: str = "mean correlation on fresh masks",
    detail: str = "",
) -> Figure:
    """Correlation of predicted and measured outputs by the cost of the attributions, one line a method.

    Args:
        points: from the methods' names to pairs (cost, correlation), in any order; costs in forward passes of one
            example; what costs 0 is a line across. Or a mapping of such mappings, one panel each, such as one a model;
            at most 4. At most 14 methods, which look the same in all panels.
        reference: a method whose most expensive point the others are measured by: an arrow shows how many times fewer
            passes the cheapest of them needs for the same correlation (between its points by the logarithm of the
            cost), where that is at least 1.5.
        y_label: of the vertical axis.
        detail: second line of the title, such as the number of examples and seeds.

    Returns:
        A figure; costs on a logarithmic axis, the panels on one vertical scale.

    Raises:
        CoarError: no points, too many methods or panels, a cost or correlation that makes no sense, an unknown
            reference, or no matplotlib.
    """
    panels = _panels(points)
    methods = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    _check(panels, methods, reference)
    figure, axes = canvas.new_panels(3.9, [PANEL if len(panels) > 1 else canvas.WIDTH] * len(panels))
    factors = []
    for each, (name, curves) in zip(axes, panels.items(), strict=True):
        for place, method in enumerate(methods):
            if method in curves:
                _draw(each, method, sorted(curves[method]), place)
        if reference in curves:
            factors.append((name, _mark(each, curves, reference)))
        each.set_xscale("log")
        each.grid(color=canvas.FAINT, linewidth=0.5)
        each.set_xlabel("cost (forward passes an example)")
        each.set_title(canvas.plain(name), fontsize=10, color=canvas.INK, loc="left")
    axes[0].set_ylabel(canvas.plain(y_label))
    by_name = {key.get_label(): key for each in axes for key in each.get_legend_handles_labels()[0]}
    if len(methods) > 1:
        canvas.legend_below(figure, axes[0], list(by_name.values()))
    canvas.title(figure, _statement(factors, reference), detail)
    return figure


def _draw(axes: Axes, method: str, curve: Curve, place: int) -> None:
    turn = place % len(canvas.COLOURS)
    style = {"color": canvas.COLOURS[turn], "linestyle": canvas.LINES[turn], "label": canvas.plain(method)}
    costs, values = zip(*curve, strict=True)
    if costs[-1] == 0:
        axes.axhline(values[-1], linewidth=1.2, zorder=2, **style)
        return
    face = canvas.COLOURS[turn] if place < len(canvas.COLOURS) else "white"  # hollow from the eighth method on
    axes.plot(
        costs, values, marker=canvas.MARKERS[turn], markerfacecolor=face, linewidth=1.5, markersize=6, zorder=3, **style
    )


def _panels(points: "Curves | Mapping[str, Curves]") -> dict[str, Curves]:
    nested = bool(points) and all(isinstance(value, Mapping) for value in points.values())
    return dict(points) if nested else {"": points}


def _check(panels: Mapping[str, Curves], methods: Sequence[str], reference: str | None) -> None:
    if not methods or any(len(curve) == 0 for curves in panels.values() for curve in curves.values()):
        raise CoarError(f"points={ {name: list(curves) for name, curves in panels.items()} }; every method needs one")
    if len(methods) > 2 * len(canvas.COLOURS) or len(panels) > 4:
        raise CoarError(f"{len(methods)} methods in {len(panels)} panels; at most {2 * len(canvas.COLOURS)} in 4")
    if reference is not None and reference not in methods:
        raise CoarError(f"reference={reference!r}; the methods are {', '.join(methods)}")
    for name, curves in panels.items():
        for method, curve in curves.items():
            for cost, value in curve:
                if not (0 <= cost < math.inf and -1 <= value <= 1):  # also true of NaN
                    where = f"{name} {method}".strip()
                    raise CoarError(
                        f"{where}: cost {cost}, correlation {value}; expected a cost of at least 0 and a correlation "
                        "from -1 to 1"
                    )


def cost_to_reach(curve: Curve, level: float) -> float | None:
    """The least cost at which a method has a correlation, between its points by the logarithm of the cost.

    Args:
        curve: pairs (cost, correlation), in any order.
        level: correlation.

    Returns:
        The cost; None where it is not reached. A method that begins above the level gives its first cost.
    """
    curve = sorted(curve)
    if curve[0][1] >= level:
        return curve[0][0]
    for (cost_a, a), (cost_b, b) in pairwise(curve):
        if a < level <= b:
            return math.exp(math.log(cost_a) + (level - a) / (b - a) * (math.log(cost_b) - math.log(cost_a)))
    return None


def _mark(axes: Axes, curves: Curves, reference: str) -> float | None:
    """The arrow from the reference's last point to the cheapest method that reaches it; how many times cheaper."""
    cost, level = max(curves[reference])
    others = [[point for point in curve if point[0]] for name, curve in curves.items() if name != reference]
    reached = [found for curve in others if curve and (found := cost_to_reach(curve, level))]
    cheapest = min(reached, default=cost)
    if cost < _WORTH_SAYING * cheapest:
        return None
    axes.annotate(
        "", (cheapest, level), (cost, level), zorder=5,
        arrowprops={"arrowstyle": "->", "color": canvas.INK, "linewidth": 1.1, "linestyle": (0, (3, 2)), "shrinkB": 0},
    )  # fmt: skip
    axes.annotate(
        f"{cost / cheapest:.3g} × fewer", (math.sqrt(cost * cheapest), level), (0, 4), textcoords="offset points",
        ha="center", va="bottom", fontsize=9, color=canvas.INK, zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )  # fmt: skip
    return cost / cheapest


def _statement(factors: Sequence[tuple[str, float | None]], reference: str | None) -> str:
    found = [f"{name} {factor:.3g} ×".strip() for name, factor in factors if factor]
    if not found:
        return "Correlation of predicted and measured outputs by cost"
    return f"Fewer passes than {reference} for the same correlation: {', '.join(found)}"
