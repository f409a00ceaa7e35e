"""The look that all pictures share: canvas, colours, labels, scales."""

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_coar.attributions import Attributions
from hf_coar.data import numbers
from hf_coar.errors import CoarError
from hf_coar.storage import files

# matplotlib's classes, by name only: it is imported where a picture is drawn.
Figure = Axes = Any

# Okabe and Ito's palette (2008), in the order in which its colours are easiest to tell apart.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 2)))
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++", "oooo")
SHADES = ("#B5D6EA", "#0072B2", "#00243A")  # few … many points
INK, FAINT = "#333333", "#DDDDDD"

DPI = 150
WIDTH = 6.0  # inches
SCATTER_MAX = 1500  # more points than this are counted in hexagons
MAX_CLASSES = 100
LABEL_LENGTH = 30  # characters of a module's name
TITLE_LENGTH = 76  # characters of a line of a title
MANY_ROWS = 40  # from here on the scale is repeated at the top


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, 150 dots an inch; folders that are not there are made.

    Returns:
        The path.

    Raises:
        CoarError: another ending than `.png`, or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise CoarError(f"{path} does not end in .png, and pictures are written as PNG; use figure.savefig for others")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    files.write_bytes(path, written.getvalue())
    return path


def new(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes in inches."""
    figure, [axes] = new_panels(height, [width])
    return figure, axes


def new_panels(height: float, widths: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side on one vertical scale; sizes in inches."""
    figure = blank(height, sum(widths), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True, width_ratios=widths)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(labelsize=9, colors=INK)
        axes.xaxis.label.set(color=INK, fontsize=9.5)
        axes.yaxis.label.set(color=INK, fontsize=9.5)
        axes.set_axisbelow(True)
    return figure, list(panels)


def blank(height: float, width: float = WIDTH, **options: Any) -> Figure:
    """A figure with nothing on it; sizes in inches."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise CoarError('pictures need matplotlib; install it with: pip install "hf_coar[plots]"') from error
    return matplotlib.figure.Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)


def new_of_rows(n_rows: int) -> tuple[Figure, Axes]:
    """A figure with as much height as its rows need."""
    return new(1.5 + max(3, n_rows) * row(n_rows))


def title(figure: Figure, statement: str, detail: str) -> None:
    """A title of two parts: what is seen, and on what."""
    width = round(TITLE_LENGTH * figure.get_figwidth() / WIDTH)
    lines = [line for text in (statement, detail) for line in textwrap.wrap(plain(text), width)]
    figure.suptitle("\n".join(lines), x=0.015, ha="left", fontsize=10, color="black")


def legend_below(figure: Figure, axes: Axes, keys: list[Any] | None = None) -> None:
    """A legend under the axes, in as many columns as fit."""
    keys = keys or axes.get_legend_handles_labels()[0]
    labels = [key.get_label() for key in keys]
    for columns in range(len(labels), 0, -1):
        legend = figure.legend(
            keys, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    further_rows = -(-len(labels) // columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.2 * further_rows)


def kind_keys(kinds: Iterable[str]) -> list[Any]:
    """Legend entries for kinds of components, by colour and hatch."""
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=COLOURS[i % len(COLOURS)], hatch=HATCHES[i % len(HATCHES)], edgecolor="white", label=kind)
        for i, kind in enumerate(kinds)
    ]


def rows(axes: Axes, labels: Sequence[str]) -> None:
    """Horizontal rows from the top, one a label."""
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=font(len(labels)))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if len(labels) >= MANY_ROWS:
        axes.tick_params(axis="x", top=True, labeltop=True)


def row(n_rows: int) -> float:
    """Inches a row: 0.25 for up to 25 rows, and less for more."""
    return min(0.25, max(0.125, 6.25 / n_rows))


def font(n_rows: int) -> float:
    """Points of a row's label, which fill at most three quarters of the row."""
    return min(9.0, 72 * row(n_rows) * 0.75)


def count_axis(axes: Axes, counts: list[int]) -> None:
    """A linear axis of whole numbers, or a logarithmic one that has a place for 0."""
    from matplotlib.ticker import MaxNLocator

    positive = [count for count in counts if count]
    if positive and positive[-1] > 50 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        ticks = [0] * (0 in counts) + [round(tick) for tick in spread_out(positive)]
        axes.set_xticks(ticks, [f"{tick:,}".replace(",", "\u2009") for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("components ablated (log scale)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axes.set_xlabel("components ablated")


def spread_out(values: Sequence[float], apart: float = 0.09) -> list[float]:
    """Those of sorted positive values that lie far enough apart on a log axis for their labels, the last among them."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if kept[-1] / value >= (values[-1] / values[0]) ** apart:
            kept.append(value)
    return kept[::-1]


def chosen(examples: Sequence[int] | None, n_examples: int) -> list[int]:
    """The examples to show, checked; all of them by default."""
    chosen = list(range(n_examples)) if examples is None else numbers(examples, n_examples)
    outside = [index for index in chosen if not 0 <= index < n_examples]
    if outside or not chosen:
        raise CoarError(f"examples {outside[:8] or '[]'}: give one or more indices from 0 to {n_examples - 1}")
    return chosen


def shares(name: str, values: Sequence[float] | Tensor, n_values: int) -> list[float]:
    """Accuracies as a checked list."""
    shares = [float(value) for value in values]
    if len(shares) != n_values:
        raise CoarError(f"{name} has {len(shares)} values; expected {n_values}")
    for place, share in enumerate(shares):
        if not 0 <= share <= 1:  # also true of NaN
            raise CoarError(f"{name}[{place}] = {share}; accuracies are fractions from 0 to 1, not percent")
    return shares


def centred(values: Tensor) -> Any:
    """[masks, examples] without the examples' means, flat, as float64 array."""
    values = values.double()
    return (values - values.mean(0)).flatten().numpy()


def limits(*sides: Any) -> tuple[float, float]:
    """Common limits of values on two axes, with a margin."""
    low, high = min(float(side.min()) for side in sides), max(float(side.max()) for side in sides)
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def shortened(text: str, length: int) -> str:
    """The text with its middle left out if it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def plain(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return text.replace("$", r"\$")


def unit(attributions: Attributions) -> str:
    """The unit of the attributed output."""
    unit = attributions.provenance.unit
    if not unit:
        return ""
    return f" (unit {unit})" if unit.startswith("of ") else f" ({unit})"


def percent(fraction: float) -> str:
    """Such as `1.25 %`."""
    return f"{100 * fraction:.3g} %"


def mean_percent(shares: list[float], places: list[int]) -> str:
    """The mean of some shares, such as `92.6 %`."""
    return f"{100 * sum(shares[place] for place in places) / len(places):.1f} %"


def count(count: int, noun: str) -> str:
    """Such as `3 masks`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def of(chosen: list[int], n_examples: int) -> str:
    """Such as `5 of 200 examples`."""
    return f"{len(chosen)} of {n_examples} examples" if len(chosen) < n_examples else count(n_examples, "example")


def span(counts: list[int]) -> str:
    """Such as `100 to 200`."""
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
