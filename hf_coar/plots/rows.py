"""Rows of two values, before and after an edit, with the change beside them."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_coar.plots import canvas
from hf_coar.plots.canvas import Axes, Figure

_APART = 0.17  # of a row: so far from its middle lie two values that have intervals, which would cover each other
_HIGH = 1.25  # times as high are such rows


class Row(NamedTuple):
    """A row of the picture, in the unit of its axis.

    Attributes:
        name: of the class or group.
        before: value.
        after: value.
        marked: whether the edit is for it.
        ends: 95 % intervals (low, high) of both.
        spread: half of the 95 % interval of the change.
    """

    name: str
    before: float
    after: float
    marked: bool
    ends: tuple[tuple[float, float], tuple[float, float]] | None = None
    spread: float | None = None


def drawn(rows: Sequence[Row], axis: str, change: str = "points", digits: int = 1) -> Figure:
    """A figure without a title: two marks a row, their intervals, and the change.

    Args:
        rows: from the top.
        axis: its label.
        change: unit of the change.
        digits: of the change.
    """
    uncertain = any(row.ends for row in rows)
    figure, axes = canvas.new(1.5 + max(3, len(rows)) * canvas.row(len(rows)) * (_HIGH if uncertain else 1))
    for place, row in enumerate(rows):
        _row(axes, place, row, digits)
    for place, row in enumerate(rows):
        axes.annotate(
            changed(row, digits), (1, place), (_column(rows), 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", fontsize=canvas.font(len(rows)), color=canvas.INK,
            fontweight="bold" if row.marked else "normal",
        )  # fmt: skip
    head = f"change\n({change}{', ± 95 %' if any(row.spread is not None for row in rows) else ''})"
    axes.annotate(
        head, (1, 1), (_column(rows), 2), xycoords="axes fraction", textcoords="offset points", ha="right",
        va="bottom", fontsize=8, color=canvas.INK,
    )  # fmt: skip
    short = [canvas.shortened(row.name, canvas.LABEL_LENGTH) for row in rows]
    canvas.rows(axes, [f"▶ {label}" if row.marked else label for label, row in zip(short, rows, strict=True)])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.marked else "normal")
    values = [
        value for row in rows for value in (row.before, row.after, *(end for ends in row.ends or () for end in ends))
    ]
    margin = (
        max(2.0, 0.05 * (max(values) - min(values))) if axis.endswith("(%)") else 0.05 * (max(values) - min(values))
    )
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.grid(axis="x", color=canvas.FAINT, linewidth=0.5)
    axes.set_xlabel(axis)
    said = " and its 95 % interval" if uncertain else ""
    keys = [
        axes.plot([], [], "o", color=canvas.INK, markerfacecolor="white", markersize=8, label=f"before{said}")[0],
        axes.plot([], [], "D", color=canvas.INK, markersize=4.5, label=f"after{said}")[0],
    ]
    canvas.legend_below(figure, axes, keys)
    return figure


def _row(axes: Axes, place: int, row: Row, digits: int) -> None:
    colour = canvas.VERMILLION if row.marked else canvas.BLUE
    if row.marked:
        axes.axhspan(place - 0.5, place + 0.5, color=canvas.VERMILLION, alpha=0.1, linewidth=0)
    apart = _APART if row.ends else 0
    heights = (place - apart, place + apart)
    axes.plot([row.before, row.after], heights, color=colour, linewidth=2, alpha=0.3 if row.ends else 0.6, zorder=2)
    for (low, high), height in zip(row.ends or (), heights, strict=False):
        axes.plot([low, high], [height, height], color=colour, linewidth=1, alpha=0.8, zorder=2)
    axes.plot(
        row.before, heights[0], "o", color=colour, markerfacecolor="white", markersize=6 if row.ends else 8, zorder=3
    )
    axes.plot(row.after, heights[1], "D", color=colour, markersize=4.5, zorder=4)


def changed(row: Row, digits: int = 1) -> str:
    """Such as `−1.2 ± 0.8`."""
    text = f"{row.after - row.before:+.{digits}f}".replace("-", "−")
    text = text[1:] if not float(text[1:]) else text
    return text if row.spread is None else f"{text} ± {row.spread:.{digits}f}"


def _column(rows: Sequence[Row]) -> int:
    """Points from the axes to the right end of the column of changes."""
    return 40 if all(row.spread is None for row in rows) else 80
