"""What an edit wins against what it costs: the models on its way, the one that was taken, and its rivals."""

from collections.abc import Mapping, Sequence

from hf_coar.errors import CoarError
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Figure

_MARKERS = "sv^Pd*X<>p"


def edit_frontier(
    frontier: Sequence[tuple[int, float, float]],
    chosen: tuple[float, float],
    before: tuple[float, float],
    rivals: Mapping[str, tuple[float, float]] = {},
    target_name: str = "targeted examples",
    other_name: str = "other examples",
) -> Figure:
    """Accuracy of the targeted examples against that of the others, for every model on the way of an edit.

    Args:
        frontier: (components ablated, target, others) of every model, `EditResult.frontier`; accuracies from 0 to 1, on
            the examples to choose on.
        chosen: (target, others) of the edited model, on the examples to judge on.
        before: the same of the model as it was.
        rivals: the same of every rival, by its name; at most ten.
        target_name: for the axis.
        other_name: for the axis.

    Returns:
        A figure, in percent.

    Raises:
        CoarError: nothing on the way, more than ten rivals, shares outside 0 … 1, or no matplotlib.
    """
    if not frontier or len(rivals) > len(_MARKERS):
        raise CoarError(f"{len(frontier)} models and {len(rivals)} rivals; give one model at least, ten rivals at most")
    dots = [chosen, before, *rivals.values()]
    columns = [[*(point[place + 1] for point in frontier), *(dot[place] for dot in dots)] for place in (0, 1)]
    targets, others = (
        canvas.shares(name, values, len(values)) for name, values in zip(("targets", "others"), columns, strict=True)
    )
    figure, axes = canvas.new(4.2)
    count = len(frontier)
    axes.plot(
        [100 * value for value in targets[:count]], [100 * value for value in others[:count]], ".", color=canvas.BLUE,
        alpha=0.5, label="on the way (examples to choose on)",
    )  # fmt: skip
    kinds = [("edited", "o", canvas.VERMILLION), ("before", "D", canvas.INK)]
    kinds += [(name, marker, canvas.INK) for name, marker in zip(rivals, _MARKERS, strict=False)]
    for place, (name, marker, colour) in enumerate(kinds, count):
        axes.plot(
            100 * targets[place], 100 * others[place], marker, color=colour, markersize=8 if place == count else 6,
            markerfacecolor=colour if place == count else "white", linestyle="none", label=canvas.plain(name),
        )  # fmt: skip
    axes.set_xlabel(f"accuracy on {canvas.plain(target_name)} (%)")
    axes.set_ylabel(f"accuracy on {canvas.plain(other_name)} (%)")
    axes.grid(color=canvas.FAINT, linewidth=0.5)
    canvas.legend_below(figure, axes)
    said = [f"{name} {100 * a:.1f} % → {100 * b:.1f} %" for name, a, b in zip(
        (target_name, other_name), before, chosen, strict=True)]  # fmt: skip
    canvas.title(figure, "What the edit wins and what it costs", "; ".join(said))
    return figure
