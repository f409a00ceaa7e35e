"""Before and after an edit."""

from collections.abc import Sequence

from torch import Tensor

from hf_coar.errors import CoarError

# matplotlib's classes, by name only: it is imported where a picture is drawn.
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Figure
from hf_coar.plots.rows import Row, drawn


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
    figure, before, after, marked = _before_and_after(names, before, after, highlight, names, ("class", "classes"))
    others = [place for place, name in enumerate(names) if name not in marked]
    target = canvas.shortened(marked[0], canvas.LABEL_LENGTH) if len(marked) == 1 else "edited classes"
    parts = [(target, sorted({names.index(name) for name in marked}))]
    parts.append(("other classes" if marked else "mean of the classes", others))
    changes = [
        f"{label} {canvas.mean_percent(before, places)} → {canvas.mean_percent(after, places)}"
        for label, places in parts
        if places
    ]
    canvas.title(figure, "Accuracy by class, before and after the edit", "; ".join(changes))
    return figure


def group_accuracies(
    names: Sequence[str],
    before: Sequence[float] | Tensor,
    after: Sequence[float] | Tensor,
    highlight: str | Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Figure:
    """Accuracy of every group of examples before and after an edit, such as landbirds on water; the worst in the title.

    Args:
        names: the groups, drawn from the top in this order; at most 100.
        before: accuracies [groups], fractions from 0 to 1.
        after: the same after the edit.
        highlight: name or names of the groups that the edit is for.
        sizes: examples a group [groups], said beside the names; the mean over all examples weighs by them.

    Returns:
        A figure, in percent.

    Raises:
        CoarError: lengths that differ, accuracies outside 0 … 1, an unknown group to highlight, or no matplotlib.
    """
    names = [str(name) for name in names]
    if sizes is not None and (len(sizes) != len(names) or min(sizes, default=0) < 1):
        raise CoarError(f"sizes={list(sizes)[:12]}; expected {len(names)} numbers of examples, each at least 1")
    labels = names if sizes is None else [f"{name} ({size:,})" for name, size in zip(names, sizes, strict=True)]
    figure, before, after, _ = _before_and_after(names, before, after, highlight, labels, ("group", "groups"))
    weights = [1] * len(names) if sizes is None else list(sizes)
    means = [sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights) for each in (before, after)]
    changes = f"worst group {100 * min(before):.1f} % → {100 * min(after):.1f} %; "
    changes += f"mean over {'groups' if sizes is None else 'examples'} {100 * means[0]:.1f} % → {100 * means[1]:.1f} %"
    canvas.title(figure, "Accuracy by group, before and after the edit", changes)
    return figure


def _before_and_after(
    names: Sequence[str],
    before: Sequence[float] | Tensor,
    after: Sequence[float] | Tensor,
    highlight: str | Sequence[str] | None,
    labels: Sequence[str],
    nouns: tuple[str, str],
) -> tuple[Figure, list[float], list[float], list[str]]:
    """The figure without its title, the checked accuracies, and the names that are marked."""
    if not 1 <= len(names) <= canvas.MAX_CLASSES:
        raise CoarError(f"{len(names)} {nouns[1]}; a picture holds 1 to {canvas.MAX_CLASSES}: choose those that matter")
    before, after = canvas.shares("before", before, len(names)), canvas.shares("after", after, len(names))
    marked = [highlight] if isinstance(highlight, str) else list(highlight or ())
    if unknown := [name for name in marked if name not in names]:
        raise CoarError(f"highlight names {unknown}, and the {nouns[1]} are {names[:12]}")

    rows = [
        Row(label, 100 * old, 100 * new, name in marked)
        for label, name, old, new in zip(labels, names, before, after, strict=True)
    ]
    return drawn(rows, "accuracy (%)"), before, after, marked


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
        target_name: canvas.shares("targets", targets, len(counts)),
        other_name: canvas.shares("others", others, len(counts)),
    }
    figure, axes = canvas.new(4.0)
    axes.axvline(chosen, color=canvas.INK, linewidth=1, linestyle=":", zorder=1)
    at_choice = []
    for place, (name, values) in enumerate(curves.items()):
        colour, marker = (canvas.VERMILLION, canvas.BLUE)[place], canvas.MARKERS[place]
        axes.plot(
            [counts[i] for i in order], [100 * values[i] for i in order], color=colour, marker=marker,
            linestyle=canvas.LINES[place], linewidth=1.5, markersize=5, label=canvas.plain(name),
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
        ha="center", va="bottom", fontsize=9, color=canvas.INK,
    )  # fmt: skip
    canvas.count_axis(axes, [counts[i] for i in order])
    lowest = 100 * min(min(values) for values in curves.values())
    axes.set_ylim(20 * max(0, (lowest - 5) // 20) - 2, 102)
    axes.grid(axis="y", color=canvas.FAINT, linewidth=0.5)
    axes.set_ylabel("accuracy (%)")
    canvas.legend_below(figure, axes)
    canvas.title(figure, f"Accuracy by the number of ablated components; chosen: {chosen}", "; ".join(at_choice))
    return figure
