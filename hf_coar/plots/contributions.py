"""What contributes: by layer, by layer and kind of module, by component."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from hf_coar.attributions import Attributions, labelled
from hf_coar.errors import CoarError, check_count

# matplotlib's classes, by name only: it is imported where a picture is drawn.
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Figure

_ITSELF = "itself"  # the column of layers that are one module


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
    chosen = canvas.chosen(examples, len(attributions))
    sizes = attributions.matrix().mean(chosen, torch.abs)
    errors = None
    if attributions.has_standard_errors:
        errors = attributions.matrix("standard_errors").mean(chosen, torch.abs) * (2 / torch.pi) ** 0.5
    members: dict[tuple[str, str], list[int]] = {}
    for group, start, stop in attributions.components.spans():
        members.setdefault((group.module, group.kind), []).extend(range(start, stop))
    if not members:
        raise CoarError("the attributions have no components, so there is nothing to draw")
    modules, kinds = [module for module, _ in members], list(dict.fromkeys(kind for _, kind in members))
    names, _ = attributions.components.regroup("module")
    called = dict(zip(names, attributions.components.names.of("module"), strict=True))
    short = [called[module] for module in modules]
    values = [float(sizes[indices].mean()) for indices in members.values()]

    figure, axes = canvas.new_of_rows(len(members))
    for place, ((_, kind), value) in enumerate(zip(members, values, strict=True)):
        style = kinds.index(kind) % len(canvas.COLOURS)
        axes.barh(
            place, value, 0.72, color=canvas.COLOURS[style], hatch=canvas.HATCHES[style], edgecolor="white", linewidth=0
        )
    canvas.rows(axes, short)
    axes.grid(axis="x", color=canvas.FAINT, linewidth=0.5)
    keys = canvas.kind_keys(kinds) if len(kinds) > 1 else []
    if errors is not None:
        floor = [float(errors[indices].mean()) for indices in members.values()]
        rows = torch.arange(len(floor))
        axes.vlines(floor, rows - 0.42, rows + 0.42, color="black", linewidth=1.6)
        key = {"marker": "|", "markersize": 13, "markeredgewidth": 1.6, "label": "estimation error alone"}
        keys += axes.plot([], [], linestyle="none", color="black", **key)
    axes.set_xlim(0, max(values) * 1.05 or 1.0)
    if keys:
        canvas.legend_below(figure, axes, keys)
    each = kinds[0] if len(kinds) == 1 else "component"
    axes.set_xlabel(f"mean absolute attribution per {each}{canvas.unit(attributions)}")
    largest = short[max(range(len(values)), key=values.__getitem__)]
    layers = canvas.count(len(set(modules)), "layer")
    detail = f"{canvas.count(len(attributions.components), each)} in {layers}, input at the top; "
    detail += canvas.of(chosen, len(attributions))
    canvas.title(figure, f"Contribution per {each}: largest in {largest}", detail)
    return figure


def contribution_heat_map(attributions: Attributions, examples: Sequence[int] | None = None) -> Figure:
    """Mean absolute attribution of the components by layer and kind of module, darker = more.

    A row is a numbered block of the network (`blocks.3`), a column what its modules are called inside (`attn.qkv`), so
    that the same kind of module stands in one column however deep it lies. Experts of one layer count as one kind. Of
    one model at most: an estimate's error adds to the sizes, see `contribution_by_layer`.

    Args:
        attributions: float32 weights [examples, components].
        examples: indices of the examples to average over; all by default.

    Returns:
        A figure with one cell a layer and kind, in the unit of the output; white cells are of kinds that a layer lacks.

    Raises:
        CoarError: examples out of range, no components, or no matplotlib.
    """
    chosen = canvas.chosen(examples, len(attributions))
    sizes = attributions.matrix().mean(chosen, torch.abs)
    if not len(sizes):
        raise CoarError("the attributions have no components, so there is nothing to draw")
    cells, kind = _cells(attributions)
    layers, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    table = torch.full((len(layers), len(columns)), torch.nan, dtype=torch.float64)
    for (layer, column), indices in cells.items():
        table[layers.index(layer), columns.index(column)] = sizes[indices].mean()

    short = [attributions.components.names.layer(layer) for layer in layers]
    width = min(14.0, max(4.2, 2.2 + 0.75 * len(columns)))
    figure, axes = canvas.new(1.9 + max(3, len(layers)) * max(canvas.row(len(layers)), 0.2), width)
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", ("#EEF5FA", *canvas.SHADES))
    top = float(table.nan_to_num(0).max()) or 1.0
    image = axes.imshow(table.numpy(), aspect="auto", cmap=shades, vmin=0, vmax=top, interpolation="nearest")
    if len(columns) <= 12 and len(layers) <= 40:
        _write_cells(axes, table, top)
    canvas.rows(axes, short)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [canvas.plain(canvas.shortened(name, 24)) for name in columns], fontsize=8.5)
    axes.tick_params(axis="x", length=0, rotation=30 if len(columns) > 1 else 0)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right" if len(columns) > 1 else "center")
        label.set_rotation_mode("anchor")
    axes.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
    bar.set_label(f"mean absolute attribution\nper {kind}{canvas.unit(attributions)}", color=canvas.INK, fontsize=8.5)
    bar.ax.tick_params(labelsize=8, colors=canvas.INK)
    bar.outline.set_visible(False)
    at = int(table.nan_to_num(-1).argmax())
    most = f"{short[at // len(columns)]} {columns[at % len(columns)]}".removesuffix(f" {_ITSELF}")
    detail = f"{canvas.count(len(attributions.components), kind)}, input at the top; "
    canvas.title(figure, f"Contribution per {kind}: largest in {most}", detail + canvas.of(chosen, len(attributions)))
    return figure


def _cells(attributions: Attributions) -> tuple[dict[tuple[str, str], list[int]], str]:
    """(layer, kind of module) -> indices of components, in the order of the network; and what one component is."""
    names, layer_of = attributions.components.regroup("layer")
    kinds = {group.kind for group in attributions.components.groups}
    found: dict[tuple[str, str, str], list[int]] = {}
    for group, start, stop in attributions.components.spans():
        layer = names[int(layer_of[start])]
        inside = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", group.module.removeprefix(layer).removeprefix("."))
        found.setdefault((layer, inside or _ITSELF, group.kind), []).extend(range(start, stop))
    several = {name for name in {key[1] for key in found} if len({key[2] for key in found if key[1] == name}) > 1}
    cells = {
        (layer, f"{name} {kind}" if name in several else name): indices
        for (layer, name, kind), indices in found.items()
    }
    return cells, kinds.pop() if len(kinds) == 1 else "component"


def _write_cells(axes: canvas.Axes, table: torch.Tensor, top: float) -> None:
    digits = max(0, (2 if top >= 1 else 1) - math.floor(math.log10(top)))
    for row, values in enumerate(table.tolist()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                axes.text(
                    column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7,
                    color="white" if value > 0.55 * top else canvas.INK,
                )  # fmt: skip


def example(image: Any) -> Figure:
    """One example as it is, with no word beside it.

    Args:
        image: a PIL image.

    Returns:
        A figure 2 inches high.
    """
    figure = canvas.blank(2.0, 2.0 * min(3.0, image.width / max(image.height, 1)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    grey = "gray" if image.mode not in ("RGB", "RGBA") else None
    sharp = "nearest" if max(image.size) < 64 else "antialiased"
    axes.imshow(image.convert("RGB") if image.mode in ("P", "CMYK", "1") else image, cmap=grey, interpolation=sharp)
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
    [example] = canvas.chosen([example], len(attributions))
    check_count(n, "n")
    weights = attributions.weights[example]
    order = weights.abs().argsort(descending=True, stable=True)[:n].tolist()
    if not order:
        raise CoarError("the attributions have no components, so there is nothing to draw")

    figure, axes = canvas.new_of_rows(len(order))
    for place, index in enumerate(order):
        value = float(weights[index])
        colour, hatch = (canvas.BLUE, "") if value >= 0 else (canvas.VERMILLION, "////")
        axes.barh(place, value, 0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
    errors = attributions.standard_errors
    if errors is not None:
        axes.errorbar(
            weights[order].tolist(), range(len(order)), xerr=errors[example, order].tolist(), fmt="none",
            ecolor="black", elinewidth=1, capsize=2,
        )  # fmt: skip
    axes.axvline(0, color=canvas.INK, linewidth=0.8)
    canvas.rows(axes, [attributions.components.names.name(index) for index in order])
    axes.grid(axis="x", color=canvas.FAINT, linewidth=0.5)
    bars = "" if errors is None else ", ± 1 standard error"
    axes.set_xlabel(f"attribution{canvas.unit(attributions)}{bars}")
    label = labelled.label_name(attributions, example)
    label = f" ({label})" if label else ""
    output = attributions.provenance.output or "output"
    canvas.title(
        figure,
        f"The {canvas.count(len(order), 'component')} with the largest attributions to example {example}{label}",
        f"positive: keeping the component raises the {output}; hatched: lowers it",
    )
    return figure
