"""What `result.plot` of an edit has: pictures by short names; each registers itself."""

from typing import Any

from hf_coar.editing.tasks import EditResult
from hf_coar.editing.tasks.figures import Figure as Measured
from hf_coar.editing.tasks.setting import PLOTS
from hf_coar.errors import check_count
from hf_coar.plots import canvas, flips
from hf_coar.plots.canvas import Figure
from hf_coar.plots.frontiers import Dot, edit_frontier
from hf_coar.plots.rows import Row, drawn

_WELL_KNOWN = 8  # examples from which on an interval says something


@PLOTS.register("groups")
def groups(result: EditResult, most: int = 40) -> Figure:
    """Every class or group of the examples to judge on before and after an edit, with 95 % intervals.

    Those that the edit is for are marked. Beside each stands its change with the interval that the same examples give
    before and after. Where no answer is right or wrong, means of the output are shown.

    Args:
        result: of `coar.forget`, `fix`, `lift`, `match` or `steer`.
        most: groups to show: those that the edit is for, then those that changed most.

    Raises:
        CoarError: a result without its examples, or no matplotlib.
    """
    check_count(most, "most")
    found = [row for judged in result.judged for row in judged.by_group()]
    ranked = sorted(range(len(found)), key=lambda i: (not found[i][0], -abs(found[i][1].change)))
    kept = [found[i] for i in sorted(ranked[:most])]
    rows = [_row(*one) for one in kept]
    share, unit = kept[0][1].share, result.judged[0].unit
    figure = drawn(rows, "accuracy (%)" if share else f"mean output ({unit})", "points" if share else unit, 2 - share)
    n_all = sum(len(judged.rows) for judged in result.judged)
    shown = f", {len(kept)} of {len(found)} groups" if len(kept) < len(found) else ""
    canvas.title(figure, f"Before and after: {result.task}", f"{n_all:,} examples to judge on{shown}; {_fallen(rows)}")
    return figure


def _fallen(rows: list[Row]) -> str:
    """Which of the others changed by more than their intervals allow."""
    certain = [row for row in rows if not row.marked and row.spread is not None]
    fell = [row.name for row in certain if row.before - row.after > row.spread]
    if not fell:
        return "of the others none fell beyond its interval"
    return f"of the others fell beyond the interval: {', '.join(fell[:4])}{', …' * (len(fell) > 4)}"


def _row(marked: bool, figure: Measured, swapped: Measured) -> Row:
    scale = 100 if figure.share else 1
    well = figure.n >= _WELL_KNOWN
    ends = tuple((one.low * scale, one.high * scale) for one in (swapped, figure)) if well else None
    spread = figure.spread * scale if well and figure.spread is not None else None
    return Row(f"{figure.what} ({figure.n:,})", figure.before * scale, figure.after * scale, marked, ends, spread)


@PLOTS.register("frontier")
def frontier(result: EditResult) -> Figure:
    """What the targets come to against what the others lose: the way of the edit, its choice, the limits, the rivals.

    `edit_frontier` of a result. Lines through the dots are 95 % intervals, of the change of the others that of the
    same examples before and after.

    Args:
        result: of `coar.forget`, `fix`, `lift`, `match` or `steer`.

    Raises:
        CoarError: neither a way nor rivals: a rival that was taken in the place of the edit, measured beside none.
    """
    figures = result.figures
    key = "moved" if "moved" in figures else "target"
    target, others = figures[key], figures["others"]
    measured = {name: one for name, one in figures.rivals.items() if one}
    found = edit_frontier(
        result.frontier, _dot(figures, key), (target.before, others.before),
        {name: _dot(one, key) for name, one in measured.items()}, target.what, others.what,
        (result.limits.get("target"), result.limits.get("others")), (_unit(target), _unit(others)),
    )  # fmt: skip
    if missing := [name.replace("_", " ") for name in figures.rivals if name not in measured]:
        found.text(0.015, 0.005, f"kept no limits: {', '.join(missing)}", fontsize=8, color=canvas.INK)
    return found


def _dot(figures: Any, key: str) -> Dot:
    target, others = figures[key], figures["others"]
    ends = (target.low, target.high) if target.n >= _WELL_KNOWN else None
    return Dot(target.after, others.after, ends, others.spread)


def _unit(figure: Measured) -> str:
    return "%" if figure.share else figure.unit


PLOTS.register("flips")(flips.flips)
