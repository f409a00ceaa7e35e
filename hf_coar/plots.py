"""Pictures: fidelity, contributions and edits, as matplotlib figures that can be told apart without colour.

Every function returns a `matplotlib.figure.Figure` and touches no global state; `save` writes it, and a notebook shows
it after `%matplotlib inline`::

    from hf_coar import plots

    plots.save(plots.predicted_against_measured(report, 0.05), "pictures/fidelity.png")

matplotlib comes with `pip install "hf_coar[plots]"`.
"""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar import files
from hf_coar.attributions import Attributions
from hf_coar.errors import CoarError
from hf_coar.evaluation import Report

# matplotlib's classes, by name only: it is imported where a picture is drawn.
Figure = Axes = Any

# Okabe and Ito's palette (2008), in the order in which its colours are easiest to tell apart.
_BLUE, _VERMILLION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_COLOURS = (_BLUE, _VERMILLION, _GREEN, _ORANGE, "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 2)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++", "oooo")
_SHADES = ("#B5D6EA", "#0072B2", "#00243A")  # few … many points
_INK, _FAINT = "#333333", "#DDDDDD"

_DPI = 150
_WIDTH = 6.0  # inches
_SCATTER_MAX = 1500  # more points than this are counted in hexagons
_MAX_CLASSES = 100
_LABEL_LENGTH = 30  # characters of a module's name
_TITLE_LENGTH = 76  # characters of a line of a title
_MANY_ROWS = 40  # from here on the scale is repeated at the top


def predicted_against_measured(
    report: Report, fraction: float, unit: str = "logits", examples: Sequence[int] | None = None
) -> Figure:
    """Measured against predicted outputs, one point a mask and example, with the line on which both are equal.

    Each example's mean over the masks is taken off both, as the correlation does: what is left is what the ablations
    do. Many points are counted in hexagons.

    Args:
        report: from `hf_coar.evaluate`; `predicted` and `measured` are float32 [masks, examples].
        fraction: one of the report's ablated fractions, 0 … 1.
        unit: of the outputs.
        examples: indices of the examples to show; all by default.

    Returns:
        A figure. The correlation in its title is the mean over the examples shown of the one over masks.

    Raises:
        CoarError: a fraction that the report does not have, examples out of range, or no matplotlib.
    """
    if fraction not in report.measured:
        raise CoarError(f"fraction={fraction}; the report has {', '.join(map(str, report.measured)) or 'none'}")
    n_masks, n_examples = report.measured[fraction].shape
    chosen = _chosen(examples, n_examples)
    predicted, measured = (_centred(side[fraction][:, chosen]) for side in (report.predicted, report.measured))
    correlation = float(report.per_example[fraction][chosen].nanmean())

    dense = len(predicted) > _SCATTER_MAX
    figure, axes = _canvas(4.6, width=5.4 if dense else 4.7)
    low, high = _limits(predicted, measured)
    if dense:
        from matplotlib.colors import LinearSegmentedColormap

        shades = LinearSegmentedColormap.from_list("shades", _SHADES)
        extent = (low, high, low, high)
        cells = axes.hexbin(predicted, measured, gridsize=45, extent=extent, bins="log", mincnt=1, cmap=shades)
        bar = figure.colorbar(cells, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("points (mask and example) in a hexagon", color=_INK, fontsize=9)
        bar.ax.tick_params(labelsize=8, colors=_INK)
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
        bar.outline.set_visible(False)
    else:
        axes.scatter(predicted, measured, s=12, color=_BLUE, alpha=0.45, linewidths=0)
    axes.plot([low, high], [low, high], color=_VERMILLION, linewidth=1.3, linestyle="--", label="predicted = measured")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.grid(color=_FAINT, linewidth=0.5)
    axes.legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    axes.set_xlabel(f"predicted output minus the example's mean ({unit})")
    axes.set_ylabel(f"measured output minus the example's mean ({unit})")
    counts = f"{_percent(fraction)} of the components ablated, {_count(n_masks, 'mask')}, {_of(chosen, n_examples)}"
    _title(figure, f"Correlation of predicted and measured outputs: {correlation:.2f}", counts)
    return figure


def correlation_by_fraction(reports: Mapping[str, Report] | Report) -> Figure:
    """Mean correlation of predicted and measured outputs by ablated fraction, one line a method.

    Args:
        reports: from `hf_coar.evaluate`: a single one, or a mapping from the methods' names; at most 7.

    Returns:
        A figure: correlations, without unit, with bootstrap 95 % intervals over the examples. Methods are drawn side by
        side by a hair, so that their intervals can be told apart.

    Raises:
        CoarError: no reports, too many, or no matplotlib.
    """
    named = {"": reports} if isinstance(reports, Report) else dict(reports)
    if not 1 <= len(named) <= len(_COLOURS) or not all(report.correlation for report in named.values()):
        raise CoarError(f"{len(named)} reports; give 1 to {len(_COLOURS)}, each with at least one ablated fraction")
    figure, axes = _canvas(4.0)
    fractions = sorted({fraction for report in named.values() for fraction in report.correlation})
    step = (fractions[-1] / fractions[0]) ** min(0.012, 0.05 / len(named))
    for place, (name, report) in enumerate(named.items()):
        shown = sorted(report.correlation)
        means = [report.correlation[fraction] for fraction in shown]
        # A mean outside its percentile interval is possible, and would be a negative length.
        below = [max(0.0, mean - report.interval[x][0]) for x, mean in zip(shown, means, strict=True)]
        above = [max(0.0, report.interval[x][1] - mean) for x, mean in zip(shown, means, strict=True)]
        shift = step ** (place - (len(named) - 1) / 2)
        axes.errorbar(
            [fraction * shift for fraction in shown], means, yerr=[below, above], label=_plain(name), linewidth=1.4,
            color=_COLOURS[place], marker=_MARKERS[place], linestyle=_LINES[place], markersize=6, capsize=3,
        )  # fmt: skip
    axes.set_xscale("log")
    pad = max(1.15, (fractions[-1] / fractions[0]) ** 0.06)
    axes.set_xlim(fractions[0] / pad, fractions[-1] * pad)
    ticks = _spread_out(fractions)
    axes.set_xticks(ticks, [_percent(fraction) for fraction in ticks])
    axes.set_xticks([], minor=True)
    lows = [report.interval[fraction][0] for report in named.values() for fraction in report.correlation]
    axes.set_ylim(min([0.0, *(low - 0.05 for low in lows if low < 0)]), 1.0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)
    axes.set_xlabel("components ablated (log scale)")
    axes.set_ylabel("mean correlation over masks")
    if len(named) > 1:
        _legend_below(figure, axes)
    counts = sorted({len(values) for report in named.values() for values in report.per_example.values()})
    masks = sorted({report.n_masks for report in named.values()})
    statement = "Correlation of predicted and measured outputs by ablated fraction"
    if len(named) == 1:
        ends = [f"{means[i]:.2f} at {_percent(shown[i])}" for i in sorted({0, len(shown) - 1})]
        statement = f"Correlation with measured outputs: {', '.join(ends)} ablated"
    _title(figure, statement, f"bars: 95 % intervals over {_span(counts)} examples; {_span(masks)} masks a fraction")
    return figure


def class_accuracies(
    names: Sequence[str],
    before: Sequence[float] | Tensor,
    after: Sequence[float] | Tensor,
    highlight: str | Sequence[str] | None = None,
) -> Figure:
    """Accuracy of every class before and after an edit: two points a class, and the change in percentage points.

    Args:
        names: the classes, drawn from the top in this order; at most 100.
        before: accuracies [classes], fractions from 0 to 1.
        after: the same after the edit.
        highlight: name or names of the classes that the edit is for.

    Returns:
        A figure, in percent.

    Raises:
        CoarError: lengths that differ, accuracies outside 0 … 1, an unknown class to highlight, or no matplotlib.
    """
    names = [str(name) for name in names]
    if not 1 <= len(names) <= _MAX_CLASSES:
        raise CoarError(f"{len(names)} classes; a picture holds 1 to {_MAX_CLASSES}: choose those that matter")
    before, after = _shares("before", before, len(names)), _shares("after", after, len(names))
    marked = [highlight] if isinstance(highlight, str) else list(highlight or ())
    if unknown := [name for name in marked if name not in names]:
        raise CoarError(f"highlight names {unknown}, and the classes are {names[:12]}")

    figure, axes = _canvas_of_rows(len(names))
    size = _font(len(names))
    for place, (name, old, new) in enumerate(zip(names, before, after, strict=True)):
        colour = _VERMILLION if name in marked else _BLUE
        if name in marked:
            axes.axhspan(place - 0.5, place + 0.5, color=_VERMILLION, alpha=0.1, linewidth=0)
        axes.plot([100 * old, 100 * new], [place, place], color=colour, linewidth=2, alpha=0.6, zorder=2)
        axes.plot(100 * old, place, "o", color=colour, markerfacecolor="white", markersize=8, zorder=3)
        axes.plot(100 * new, place, "D", color=colour, markersize=4.5, zorder=4)
        change = f"{100 * (new - old):+.1f}".replace("-", "−")
        axes.annotate(
            "0.0" if change in ("+0.0", "−0.0") else change, (1, place), (40, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", fontsize=size, color=_INK,
            fontweight="bold" if name in marked else "normal",
        )  # fmt: skip
    axes.annotate(
        "change\n(points)", (1, 1), (40, 2), xycoords="axes fraction", textcoords="offset points", ha="right",
        va="bottom", fontsize=8, color=_INK,
    )  # fmt: skip
    short = [_shortened(name, _LABEL_LENGTH) for name in names]
    _rows(axes, [f"▶ {label}" if name in marked else label for label, name in zip(short, names, strict=True)])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name in marked else "normal")
    low, high = 100 * min(before + after), 100 * max(before + after)
    margin = max(2.0, 0.05 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    axes.set_xlabel("accuracy (%)")
    keys = [
        axes.plot([], [], "o", color=_INK, markerfacecolor="white", markersize=8, label="before")[0],
        axes.plot([], [], "D", color=_INK, markersize=4.5, label="after")[0],
    ]
    _legend_below(figure, axes, keys)
    others = [place for place, name in enumerate(names) if name not in marked]
    target = _shortened(marked[0], _LABEL_LENGTH) if len(marked) == 1 else "edited classes"
    parts = [(target, sorted({names.index(name) for name in marked}))]
    parts.append(("other classes" if marked else "mean of the classes", others))
    changes = [
        f"{label} {_mean_percent(before, places)} → {_mean_percent(after, places)}" for label, places in parts if places
    ]
    _title(figure, "Accuracy by class, before and after the edit", "; ".join(changes))
    return figure


def contribution_by_layer(attributions: Attributions, examples: Sequence[int] | None = None) -> Figure:
    """Mean absolute attribution of a layer's components, in the order of the network, a colour and hatch a kind.

    An estimate's error adds to its size, so where there are standard errors a tick shows what they alone would
    amount to, √(2/π) of their mean: a bar that ends at its tick shows nothing. Where there are none, the shortest bars
    may be noise.

    Args:
        attributions: float32 weights [examples, components].
        examples: indices of the examples to average over; all by default.

    Returns:
        A figure with one bar a module and kind of component, in the unit of the output; it grows with their number.

    Raises:
        CoarError: examples out of range, or no matplotlib.
    """
    chosen = _chosen(examples, len(attributions))
    sizes = attributions.weights[chosen].double().abs().mean(0)
    errors = attributions.standard_errors
    errors = None if errors is None else errors[chosen].double().mean(0) * (2 / torch.pi) ** 0.5
    members: dict[tuple[str, str], list[int]] = {}
    for group, start, stop in attributions.components.spans():
        members.setdefault((group.module, group.kind), []).extend(range(start, stop))
    if not members:
        raise CoarError("the attributions have no components, so there is nothing to draw")
    modules, kinds = [module for module, _ in members], list(dict.fromkeys(kind for _, kind in members))
    short, prefix = _short_names(modules)
    values = [float(sizes[indices].mean()) for indices in members.values()]

    figure, axes = _canvas_of_rows(len(members))
    for place, ((_, kind), value) in enumerate(zip(members, values, strict=True)):
        style = kinds.index(kind) % len(_COLOURS)
        axes.barh(place, value, 0.72, color=_COLOURS[style], hatch=_HATCHES[style], edgecolor="white", linewidth=0)
    _rows(axes, short)
    axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    keys = _kind_keys(kinds) if len(kinds) > 1 else []
    if errors is not None:
        floor = [float(errors[indices].mean()) for indices in members.values()]
        rows = torch.arange(len(floor))
        axes.vlines(floor, rows - 0.42, rows + 0.42, color="black", linewidth=1.6)
        key = {"marker": "|", "markersize": 13, "markeredgewidth": 1.6, "label": "estimation error alone"}
        keys += axes.plot([], [], linestyle="none", color="black", **key)
    axes.set_xlim(0, max(values) * 1.05 or 1.0)
    if keys:
        _legend_below(figure, axes, keys)
    each = kinds[0] if len(kinds) == 1 else "component"
    axes.set_xlabel(f"mean absolute attribution per {each}{_unit(attributions)}")
    if prefix:
        axes.set_ylabel(f"in {_plain(prefix)}")
    largest = short[max(range(len(values)), key=values.__getitem__)]
    counts = f"{_count(len(attributions.components), each)} in {_count(len(set(modules)), 'layer')}, input at the top; "
    _title(figure, f"Contribution per {each}: largest in {largest}", counts + _of(chosen, len(attributions)))
    return figure


def top_components(attributions: Attributions, example: int, n: int = 15) -> Figure:
    """The components with the largest absolute attributions to one example, ranked, with ± 1 standard error.

    Args:
        attributions: float32 weights [examples, components].
        example: its index.
        n: how many components to show; all of them where there are fewer.

    Returns:
        A figure, in the unit of the output; positive = keeping the component raises it.

    Raises:
        CoarError: an example out of range, `n` below 1, or no matplotlib.
    """
    [example] = _chosen([example], len(attributions))
    if n < 1:
        raise CoarError(f"n={n}; give the number of components to show, at least 1")
    weights = attributions.weights[example]
    order = weights.abs().argsort(descending=True, stable=True)[:n].tolist()
    if not order:
        raise CoarError("the attributions have no components, so there is nothing to draw")
    top = [attributions.components[index] for index in order]

    figure, axes = _canvas_of_rows(len(order))
    for place, index in enumerate(order):
        value = float(weights[index])
        colour, hatch = (_BLUE, "") if value >= 0 else (_VERMILLION, "////")
        axes.barh(place, value, 0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    errors = attributions.standard_errors
    if errors is not None:
        axes.errorbar(
            weights[order].tolist(), range(len(order)), xerr=errors[example, order].tolist(), fmt="none",
            ecolor="black", elinewidth=1, capsize=2,
        )  # fmt: skip
    axes.axvline(0, color=_INK, linewidth=0.8)
    modules = list(dict.fromkeys(group.module for group in attributions.components.groups))
    short, prefix = _short_names(modules)
    names = dict(zip(modules, short, strict=True))
    _rows(axes, [f"{names[c.group.module]} {c.group.kind} {c.position}" for c in top])
    if prefix:
        axes.set_ylabel(f"in {_plain(prefix)}")
    axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    bars = "" if errors is None else ", ± 1 standard error"
    axes.set_xlabel(f"attribution{_unit(attributions)}{bars}")
    label = int(attributions.labels[example])
    label = f" (class {label})" if label >= 0 else ""
    output = attributions.config.get("output", "output")
    _title(
        figure,
        f"The {_count(len(order), 'component')} with the largest attributions to example {example}{label}",
        f"positive: keeping the component raises the {output}; hatched: lowers it",
    )
    return figure


def edit_sweep(
    n_components: Sequence[int],
    targets: Sequence[float] | Tensor,
    others: Sequence[float] | Tensor,
    chosen: int,
    target_name: str = "targeted examples",
    other_name: str = "other examples",
) -> Figure:
    """Accuracy of the targeted and of all other examples by the number of ablated components.

    Args:
        n_components: numbers of components that were ablated, [points], in any order; 0 = the model before the edit.
        targets: accuracies on the targeted examples [points], fractions from 0 to 1.
        others: accuracies on the others [points].
        chosen: the number that the edit uses, one of `n_components`.
        target_name: for the legend and title.
        other_name: for the legend and title.

    Returns:
        A figure, in percent, with the chosen number marked.

    Raises:
        CoarError: lengths that differ, accuracies outside 0 … 1, a choice that was not tried, or no matplotlib.
    """
    counts = [int(count) for count in n_components]
    if chosen not in counts or len(set(counts)) != len(counts) or min(counts) < 0:
        raise CoarError(f"chosen={chosen} and n_components={counts}; give different numbers, the chosen one among them")
    order = sorted(range(len(counts)), key=counts.__getitem__)
    curves = {
        target_name: _shares("targets", targets, len(counts)),
        other_name: _shares("others", others, len(counts)),
    }
    figure, axes = _canvas(4.0)
    axes.axvline(chosen, color=_INK, linewidth=1, linestyle=":", zorder=1)
    at_choice = []
    for place, (name, values) in enumerate(curves.items()):
        colour, marker = (_VERMILLION, _BLUE)[place], _MARKERS[place]
        axes.plot(
            [counts[i] for i in order], [100 * values[i] for i in order], color=colour, marker=marker,
            linestyle=_LINES[place], linewidth=1.5, markersize=5, label=_plain(name),
        )  # fmt: skip
        value = values[counts.index(chosen)]
        axes.plot(
            chosen,
            100 * value,
            "o",
            color="black",
            markerfacecolor="none",
            markersize=13,
            markeredgewidth=1.4,
            zorder=3,
        )
        start = f"{100 * values[counts.index(0)]:.1f} % → " if 0 in counts else ""
        at_choice.append(f"{name} {start}{100 * value:.1f} %")
    axes.annotate(
        f"chosen: {chosen}", (chosen, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="center", va="bottom", fontsize=9, color=_INK,
    )  # fmt: skip
    _count_axis(axes, [counts[i] for i in order])
    lowest = 100 * min(min(values) for values in curves.values())
    axes.set_ylim(20 * max(0, (lowest - 5) // 20) - 2, 102)
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)
    axes.set_ylabel("accuracy (%)")
    _legend_below(figure, axes)
    _title(figure, f"Accuracy by the number of ablated components; chosen: {chosen}", "; ".join(at_choice))
    return figure


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
    figure.savefig(written, format="png", dpi=_DPI)
    files.write_bytes(path, written.getvalue())
    return path


def _canvas(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes in inches."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise CoarError('pictures need matplotlib; install it with: pip install "hf_coar[plots]"') from error
    figure = matplotlib.figure.Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.xaxis.label.set(color=_INK, fontsize=9.5)
    axes.yaxis.label.set(color=_INK, fontsize=9.5)
    axes.set_axisbelow(True)
    return figure, axes


def _canvas_of_rows(n_rows: int) -> tuple[Figure, Axes]:
    return _canvas(1.5 + max(3, n_rows) * _row(n_rows))


def _title(figure: Figure, statement: str, detail: str) -> None:
    width = round(_TITLE_LENGTH * figure.get_figwidth() / _WIDTH)
    lines = [line for text in (statement, detail) for line in textwrap.wrap(_plain(text), width)]
    figure.suptitle("\n".join(lines), x=0.015, ha="left", fontsize=10, color="black")


def _legend_below(figure: Figure, axes: Axes, keys: list[Any] | None = None) -> None:
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


def _kind_keys(kinds: Iterable[str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=_COLOURS[i % len(_COLOURS)], hatch=_HATCHES[i % len(_HATCHES)], edgecolor="white", label=kind)
        for i, kind in enumerate(kinds)
    ]


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Horizontal rows from the top, one a label."""
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=_font(len(labels)))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if len(labels) >= _MANY_ROWS:
        axes.tick_params(axis="x", top=True, labeltop=True)


def _row(n_rows: int) -> float:
    """Inches a row: 0.25 for up to 25 rows, and less for more."""
    return min(0.25, max(0.125, 6.25 / n_rows))


def _font(n_rows: int) -> float:
    """Points of a row's label, which fill at most three quarters of the row."""
    return min(9.0, 72 * _row(n_rows) * 0.75)


def _count_axis(axes: Axes, counts: list[int]) -> None:
    """A linear axis of whole numbers, or a logarithmic one that has a place for 0."""
    from matplotlib.ticker import MaxNLocator

    positive = [count for count in counts if count]
    if positive and positive[-1] > 50 * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        ticks = [0] * (0 in counts) + [round(tick) for tick in _spread_out(positive)]
        axes.set_xticks(ticks, [f"{tick:,}".replace(",", "\u2009") for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("components ablated (log scale)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axes.set_xlabel("components ablated")


def _spread_out(values: Sequence[float], apart: float = 0.09) -> list[float]:
    """Those of sorted positive values that lie far enough apart on a log axis for their labels, the last among them."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if kept[-1] / value >= (values[-1] / values[0]) ** apart:
            kept.append(value)
    return kept[::-1]


def _chosen(examples: Sequence[int] | None, n_examples: int) -> list[int]:
    chosen = list(range(n_examples)) if examples is None else [int(index) for index in examples]
    outside = [index for index in chosen if not 0 <= index < n_examples]
    if outside or not chosen:
        raise CoarError(f"examples {outside[:8] or '[]'}: give one or more indices from 0 to {n_examples - 1}")
    return chosen


def _shares(name: str, values: Sequence[float] | Tensor, n_values: int) -> list[float]:
    """Accuracies as a checked list."""
    shares = [float(value) for value in values]
    if len(shares) != n_values:
        raise CoarError(f"{name} has {len(shares)} values; expected {n_values}")
    for place, share in enumerate(shares):
        if not 0 <= share <= 1:  # also true of NaN
            raise CoarError(f"{name}[{place}] = {share}; accuracies are fractions from 0 to 1, not percent")
    return shares


def _centred(values: Tensor) -> Any:
    """[masks, examples] without the examples' means, flat, as float64 array."""
    values = values.double()
    return (values - values.mean(0)).flatten().numpy()


def _limits(*sides: Any) -> tuple[float, float]:
    low, high = min(float(side.min()) for side in sides), max(float(side.max()) for side in sides)
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def _short_names(modules: Sequence[str]) -> tuple[list[str], str]:
    """Modules without the part that all share, long ones abbreviated, and that part."""
    parents = [module.split(".")[:-1] for module in modules]
    shared = 0
    while all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
        shared += 1
    if len(set(modules)) == 1:
        shared = 0
    rest = [".".join(module.split(".")[shared:]) for module in modules]
    # `encoder.layer.11.` in all of them or in none
    if any(len(name) > _LABEL_LENGTH for name in rest if _leading_words(name)):
        rest = [_abbreviated(name, _leading_words(name)) for name in rest]
    short = [_fitted(name) for name in rest]
    return (short if len(set(short)) == len(set(rest)) else rest), ".".join(parents[0][:shared])


def _leading_words(name: str) -> int:
    """How many words stand before the first number; 0 if there is none."""
    numbers = [place for place, word in enumerate(name.split(".")) if word.isdigit()]
    return numbers[0] if numbers else 0


def _abbreviated(name: str, n_words: int) -> str:
    """`encoder.layer.11.attention.query` as `e.l.11.attention.query`: the first words as initials, numbers in full."""
    words = name.split(".")
    return ".".join([word if word.isdigit() else word[:1] for word in words[:n_words]] + words[n_words:])


def _fitted(name: str) -> str:
    n_words = 0
    while len(_abbreviated(name, n_words)) > _LABEL_LENGTH and n_words < name.count("."):
        n_words += 1
    return _shortened(_abbreviated(name, n_words), _LABEL_LENGTH)


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out if it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formulas."""
    return text.replace("$", r"\$")


def _unit(attributions: Attributions) -> str:
    unit = attributions.config.get("unit")
    if not unit:
        return ""
    return f" (unit {unit})" if unit.startswith("of ") else f" ({unit})"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _mean_percent(shares: list[float], places: list[int]) -> str:
    return f"{100 * sum(shares[place] for place in places) / len(places):.1f} %"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _of(chosen: list[int], n_examples: int) -> str:
    return f"{len(chosen)} of {n_examples} examples" if len(chosen) < n_examples else _count(n_examples, "example")


def _span(counts: list[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
