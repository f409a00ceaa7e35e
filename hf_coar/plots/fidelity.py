"""Predicted against measured."""

from collections.abc import Mapping, Sequence

from hf_coar.errors import CoarError
from hf_coar.judging.evaluation import Report

# matplotlib's classes, by name only: it is imported where a picture is drawn.
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Figure


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
    chosen = canvas.chosen(examples, n_examples)
    predicted, measured = (canvas.centred(side[fraction][:, chosen]) for side in (report.predicted, report.measured))
    correlation = float(report.per_example[fraction][chosen].nanmean())

    dense = len(predicted) > canvas.SCATTER_MAX
    figure, axes = canvas.new(4.6, width=5.4 if dense else 4.7)
    low, high = canvas.limits(predicted, measured)
    if dense:
        from matplotlib.colors import LinearSegmentedColormap

        shades = LinearSegmentedColormap.from_list("shades", canvas.SHADES)
        extent = (low, high, low, high)
        cells = axes.hexbin(predicted, measured, gridsize=45, extent=extent, bins="log", mincnt=1, cmap=shades)
        bar = figure.colorbar(cells, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("points (mask and example) in a hexagon", color=canvas.INK, fontsize=9)
        bar.ax.tick_params(labelsize=8, colors=canvas.INK)
        bar.ax.yaxis.set_major_formatter("{x:,.0f}")
        bar.outline.set_visible(False)
    else:
        axes.scatter(predicted, measured, s=12, color=canvas.BLUE, alpha=0.45, linewidths=0)
    axes.plot(
        [low, high], [low, high], color=canvas.VERMILLION, linewidth=1.3, linestyle="--", label="predicted = measured"
    )
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.locator_params(nbins=6)
    axes.grid(color=canvas.FAINT, linewidth=0.5)
    axes.legend(loc="upper left", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    axes.set_xlabel(f"predicted output minus the example's mean ({unit})")
    axes.set_ylabel(f"measured output minus the example's mean ({unit})")
    counts = f"{canvas.percent(fraction)} of the components ablated, {canvas.count(n_masks, 'mask')}"
    counts = f"{counts}, {canvas.of(chosen, n_examples)}"
    canvas.title(figure, f"Correlation of predicted and measured outputs: {correlation:.2f}", counts)
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
    if not 1 <= len(named) <= len(canvas.COLOURS) or not all(report.correlation for report in named.values()):
        raise CoarError(
            f"{len(named)} reports; give 1 to {len(canvas.COLOURS)}, each with at least one ablated fraction"
        )
    figure, axes = canvas.new(4.0)
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
            [fraction * shift for fraction in shown], means, yerr=[below, above], label=canvas.plain(name),
            color=canvas.COLOURS[place], marker=canvas.MARKERS[place], linestyle=canvas.LINES[place],
            linewidth=1.4, markersize=6, capsize=3,
        )  # fmt: skip
    axes.set_xscale("log")
    pad = max(1.15, (fractions[-1] / fractions[0]) ** 0.06)
    axes.set_xlim(fractions[0] / pad, fractions[-1] * pad)
    ticks = canvas.spread_out(fractions)
    axes.set_xticks(ticks, [canvas.percent(fraction) for fraction in ticks])
    axes.set_xticks([], minor=True)
    lows = [report.interval[fraction][0] for report in named.values() for fraction in report.correlation]
    axes.set_ylim(min([0.0, *(low - 0.05 for low in lows if low < 0)]), 1.0)
    axes.grid(axis="y", color=canvas.FAINT, linewidth=0.5)
    axes.set_xlabel("components ablated (log scale)")
    axes.set_ylabel("mean correlation over masks")
    if len(named) > 1:
        canvas.legend_below(figure, axes)
    counts = sorted({len(values) for report in named.values() for values in report.per_example.values()})
    masks = sorted({report.n_masks for report in named.values()})
    statement = "Correlation of predicted and measured outputs by ablated fraction"
    if len(named) == 1:
        ends = [f"{means[i]:.2f} at {canvas.percent(shown[i])}" for i in sorted({0, len(shown) - 1})]
        statement = f"Correlation with measured outputs: {', '.join(ends)} ablated"
    canvas.title(
        figure,
        statement,
        f"bars: 95 % intervals over {canvas.span(counts)} examples; {canvas.span(masks)} masks a fraction",
    )
    return figure
