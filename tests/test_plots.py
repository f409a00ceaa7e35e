"""Pictures: the right number of points, bars and labels, and errors that name the values."""

import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from hf_coar import plots
from hf_coar.attributions import Attributions
from hf_coar.components import Components
from hf_coar.components.groups import Group
from hf_coar.data import Identity
from hf_coar.errors import CoarError
from hf_coar.judging.evaluation import Report, bootstrap_interval
from hf_coar.plots.frontiers import Dot
from hf_coar.runs.fidelity import correlation

figures = pytest.importorskip("matplotlib.figure")

GROUPS = (
    Group("stem.conv", "filter", "stem.conv.weight", 0, 4),
    Group("blocks.0.attn", "neuron", "blocks.0.attn.weight", 0, 6),
    Group("blocks.0.mlp", "input feature", "blocks.0.mlp.weight", 1, 5),
)


def make_attributions(groups=GROUPS, n_examples=8, with_errors=True, **config) -> Attributions:
    components = Components(tuple(groups))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(n_examples, len(components), generator=generator)
    return Attributions(
        weights,
        torch.zeros(n_examples),
        0.1 + torch.rand(weights.shape, generator=generator) if with_errors else None,
        components,
        Identity({"inputs": torch.zeros(n_examples, 16, dtype=torch.uint8)}, torch.arange(n_examples) % 3),
        {"unit": "logits", "output": "margin", **config},
    )


def make_report(fractions=(0.0125, 0.05), n_masks=20, n_examples=8, noise=0.5, seed=0) -> Report:
    generator = torch.Generator().manual_seed(seed)
    predicted = {fraction: torch.randn(n_masks, n_examples, generator=generator) for fraction in fractions}
    measured = {
        fraction: 3 + values + noise * torch.randn(values.shape, generator=generator)
        for fraction, values in predicted.items()
    }
    per_example = {fraction: correlation(predicted[fraction], measured[fraction]) for fraction in fractions}
    return Report(
        correlation={fraction: float(values.nanmean()) for fraction, values in per_example.items()},
        interval={f: bootstrap_interval(predicted[f], measured[f], seed) for f in fractions},
        slope=dict.fromkeys(fractions, 1.0),
        per_example=per_example,
        predicted=predicted,
        measured=measured,
        n_masks=n_masks,
        seed=seed,
    )


def axes_of(figure):
    assert isinstance(figure, figures.Figure)
    return figure.axes[0]


def row_labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def legend_labels(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_predicted_against_measured_has_a_point_a_mask_and_example():
    report = make_report()
    figure = plots.predicted_against_measured(report, 0.05, unit="nats")
    axes = axes_of(figure)
    points = torch.as_tensor(axes.collections[0].get_offsets())
    assert points.shape == (20 * 8, 2)
    torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    [identity] = axes.lines
    assert list(identity.get_xdata()) == list(identity.get_ydata())
    assert axes.get_xlim() == axes.get_ylim()
    assert f"{report.correlation[0.05]:.2f}" in figure.get_suptitle()
    assert "5 % of the components" in figure.get_suptitle()
    assert "(nats)" in axes.get_xlabel() and "(nats)" in axes.get_ylabel()


def test_predicted_against_measured_for_some_examples():
    report = make_report()
    figure = plots.predicted_against_measured(report, 0.05, examples=[1, 4, 6])
    assert len(axes_of(figure).collections[0].get_offsets()) == 20 * 3
    assert f"{float(report.per_example[0.05][[1, 4, 6]].mean()):.2f}" in figure.get_suptitle()
    assert "3 of 8 examples" in figure.get_suptitle()


def test_many_points_are_counted_in_hexagons():
    report = make_report(n_masks=100, n_examples=40)
    figure = plots.predicted_against_measured(report, 0.05)
    hexagons, scale = figure.axes
    assert hexagons.collections[0].get_array().sum() == 100 * 40
    assert "points" in scale.get_ylabel()


def test_outputs_that_never_vary_are_drawn_nevertheless():
    report = make_report()
    report = replace(report, predicted={0.05: torch.zeros(20, 8)}, measured={0.05: torch.zeros(20, 8)})
    low, high = axes_of(plots.predicted_against_measured(report, 0.05)).get_xlim()
    assert low < 0 < high


def test_correlation_of_one_report():
    report = make_report((0.0125, 0.05, 0.2))
    figure = plots.correlation_by_fraction(report)
    axes = axes_of(figure)
    [bars] = axes.containers
    line, _, [intervals] = bars
    assert list(line.get_xdata()) == pytest.approx([0.0125, 0.05, 0.2])
    assert list(line.get_ydata()) == pytest.approx(list(report.correlation.values()))
    ends = [tuple(segment[:, 1]) for segment in intervals.get_segments()]
    assert ends == [pytest.approx(interval) for interval in report.interval.values()]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.25 %", "5 %", "20 %"]
    assert not figure.legends


def test_correlation_of_methods_differs_in_more_than_colour():
    reports = {"path gradient": make_report(), "regression": make_report(noise=2.0, fractions=(0.05, 0.1))}
    figure = plots.correlation_by_fraction(reports)
    lines = [bars[0] for bars in axes_of(figure).containers]
    assert [len(line.get_xdata()) for line in lines] == [2, 2]
    for style in ("get_marker", "get_linestyle", "get_color"):
        assert getattr(lines[0], style)() != getattr(lines[1], style)()
    assert legend_labels(figure) == list(reports)


def test_long_legends_wrap_and_stay_in_the_figure():
    figure = plots.correlation_by_fraction({f"a method with a long name {i}": make_report(seed=i) for i in range(7)})
    figure.draw_without_rendering()
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len(legend_labels(figure)) == 7


def test_negative_and_undefined_correlations():
    report = make_report()
    report = replace(
        report,
        correlation={0.0125: -0.2, 0.05: float("nan")},
        interval={0.0125: (-0.3, -0.1), 0.05: (float("nan"), float("nan"))},
    )
    low, high = axes_of(plots.correlation_by_fraction(report)).get_ylim()
    assert low < -0.3 and high == 1


def test_class_accuracies_in_the_order_given():
    names, before, after = ["cat", "dog", "$fox$"], [0.5, 0.9, 0.8], torch.tensor([0.75, 0.85, 0.8])
    figure = plots.class_accuracies(names, before, after, highlight="cat")
    axes = axes_of(figure)
    assert row_labels(axes) == ["▶ cat", "dog", r"\$fox\$"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first at the top
    before_points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    after_points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert before_points == pytest.approx([50, 90, 80]) and after_points == pytest.approx([75, 85, 80], abs=1e-4)
    assert [text.get_text() for text in axes.texts][:3] == ["+25.0", "−5.0", "0.0"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", "normal", "normal"]
    assert legend_labels(figure) == ["before", "after"]
    assert "cat 50.0 % → 75.0 %; other classes 85.0 % → 82.5 %" in figure.get_suptitle()


def test_class_accuracies_grow_with_the_classes():
    heights = [
        plots.class_accuracies([str(i) for i in range(n)], [0.5] * n, [0.6] * n).get_figheight() for n in (10, 30, 100)
    ]
    assert heights == sorted(heights) and heights[0] <= 4.1 and heights[2] < 15


def test_contribution_by_layer_has_a_bar_a_module():
    attributions = make_attributions()
    figure = plots.contribution_by_layer(attributions)
    axes = axes_of(figure)
    means = [part.abs().mean().item() for part in attributions.weights.split([4, 6, 5], 1)]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(means)
    assert row_labels(axes) == ["stem.conv", "L0 attn", "L0 mlp"]
    assert legend_labels(figure) == ["filter", "neuron", "input feature", "estimation error alone"]
    assert len({bar.get_facecolor() for bar in axes.patches}) == len({bar.get_hatch() for bar in axes.patches}) == 3
    assert "(logits)" in axes.get_xlabel()
    errors = [part.mean().item() * 0.7979 for part in attributions.standard_errors.split([4, 6, 5], 1)]
    assert [segment[0][0] for segment in axes.collections[0].get_segments()] == pytest.approx(errors, rel=1e-3)


def test_contribution_by_layer_of_some_examples_without_errors():
    attributions = make_attributions(GROUPS[:1], with_errors=False)
    figure = plots.contribution_by_layer(attributions, examples=[2, 5])
    [bar] = axes_of(figure).patches
    assert bar.get_width() == pytest.approx(attributions.weights[[2, 5]].abs().mean().item())
    assert not figure.legends
    assert "2 of 8 examples" in figure.get_suptitle() and "per filter" in axes_of(figure).get_xlabel()


def test_groups_of_one_module_and_kind_share_a_bar():
    groups = [Group("attn", "neuron", f"attn.{part}", 0, 4, site=part) for part in ("query", "value")]
    axes = axes_of(plots.contribution_by_layer(make_attributions(groups)))
    assert len(axes.patches) == 1 and row_labels(axes) == ["attn"]


def test_a_hundred_modules_stay_readable():
    parts = ("attention.attention.query", "attention.output.dense", "intermediate.dense", "output.dense")
    groups = [
        Group(f"vit.encoder.layer.{i}.{part}", "neuron", f"{i}.{part}.weight", 0, 2)
        for i in range(25)
        for part in parts
    ]
    figure = plots.contribution_by_layer(make_attributions(groups))
    axes = axes_of(figure)
    assert len(axes.patches) == len(set(row_labels(axes))) == 100
    assert row_labels(axes)[1] == "L0 attention.output.dense"
    assert figure.get_figheight() < 15
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize("with_errors", [True, False])
def test_top_components_are_ranked(with_errors):
    attributions = make_attributions(with_errors=with_errors)
    figure = plots.top_components(attributions, 3, n=6)
    axes = axes_of(figure)
    order = attributions.weights[3].abs().argsort(descending=True)[:6].tolist()
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(attributions.weights[3, order].tolist())
    assert row_labels(axes) == [attributions.components.names.name(index) for index in order]
    assert all(bool(bar.get_hatch()) == (bar.get_width() < 0) for bar in axes.patches)
    assert len(axes.containers) == 6 + with_errors  # one container a bar, and one of all errors
    assert ("standard error" in axes.get_xlabel()) == with_errors
    assert "example 3 (class 0)" in figure.get_suptitle()


def test_top_components_shows_all_where_there_are_few():
    attributions = make_attributions(GROUPS[:1], unit="of your own")
    axes = axes_of(plots.top_components(attributions, 0))
    assert len(axes.patches) == 4
    assert "(unit of your own)" in axes.get_xlabel()


def test_edit_frontier_shows_the_way_the_choice_and_the_rivals():
    way = [(4, 0.9, 0.93), (8, 0.4, 0.92), (12, 0.0, 0.9)]
    edited, rivals = Dot(0.02, 0.91, (0.0, 0.1), 0.03), {"logit_bias": (0.0, 0.93)}
    figure = plots.edit_frontier(way, edited, (0.98, 0.93), rivals, "bags", limits=(0.1, 0.015))
    axes = axes_of(figure)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["dot edited"] == [[2.0, pytest.approx(-2)]] and lines["dot logit_bias"] == [[0.0, 0.0]]
    shown = [
        line.get_xydata()[0].tolist() for line in axes.get_lines() if line.get_marker() == "." and len(line.get_xdata())
    ]
    assert shown == [pytest.approx(one) for one in ([90, 0], [40, -1], [0, -3])]
    ends = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "None"]
    assert [[0.0, pytest.approx(-2)], [10.0, pytest.approx(-2)]] in ends  # the interval of the target
    assert [[2.0, pytest.approx(-5)], [2.0, pytest.approx(1)]] in ends  # of the change of the others
    assert [[10.0, 0], [10.0, 1]] in ends and [[0, pytest.approx(-1.5)], [1, pytest.approx(-1.5)]] in ends  # limits
    assert {text.get_text() for text in axes.texts} == {"before", "edited", "logit bias"}
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.06, "names do not cover each other"
    assert axes.get_xlim()[0] > axes.get_xlim()[1], "better is to the right"
    assert axes_of(plots.edit_frontier(way, (0.99, 0.9), (0.1, 0.93))).get_xlim()[0] < 0
    alone = plots.edit_frontier([], (2.0, 1.0), (0.0, 1.5), {"other": (1.0, 1.2)}, units=("nats", "nats"))
    assert axes_of(alone).get_ylabel().endswith("change (nats)")
    for wrong in ([], [(4, 1.2, 0.5)]):
        with pytest.raises(CoarError):
            plots.edit_frontier(wrong, (0.02, 0.91), (0.98, 0.93))
    with pytest.raises(CoarError, match="0 models on the way and 11 rivals"):
        plots.edit_frontier([], (0.02, 0.91), (0.98, 0.93), dict.fromkeys("abcdefghijk", (0.1, 0.9)))


def test_edit_sweep_marks_the_choice():
    figure = plots.edit_sweep([10, 0, 5], [0.9, 0.4, 0.8], [0.7, 0.9, 0.85], chosen=5, target_name="shirts")
    axes = axes_of(figure)
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in curves] == [[0, 5, 10]] * 2
    assert list(curves[0].get_ydata()) == pytest.approx([40, 80, 90])
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert rings == [(5, pytest.approx(80)), (5, pytest.approx(85))]
    assert legend_labels(figure) == ["shirts", "other examples"]
    assert "shirts 40.0 % → 80.0 %; other examples 90.0 % → 85.0 %" in figure.get_suptitle()
    assert [text.get_text() for text in axes.texts] == ["chosen: 5"]


def test_a_wide_edit_sweep_has_a_logarithmic_axis_with_a_zero():
    counts = [0, 1, 10, 100, 2000]
    axes = axes_of(plots.edit_sweep(counts, [0.5] * 5, [0.9] * 5, chosen=10))
    assert axes.get_xscale() == "symlog"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "10", "100", "2\u2009000"]


def blocks(depth=3):
    groups = [Group("stem.conv", "filter", "stem.conv.weight", 0, 4)]
    for i in range(depth):
        groups += [
            Group(f"blocks.{i}.attn.qkv", "neuron", f"blocks.{i}.attn.qkv.weight", 0, 6),
            Group(f"blocks.{i}.mlp.fc1", "neuron", f"blocks.{i}.mlp.fc1.weight", 0, 5),
            Group(f"blocks.{i}.mlp.experts.0.up", "neuron", f"blocks.{i}.mlp.experts.0.up.weight", 0, 2),
            Group(f"blocks.{i}.mlp.experts.1.up", "neuron", f"blocks.{i}.mlp.experts.1.up.weight", 0, 2),
        ]
    return groups


def test_the_heat_map_has_a_cell_a_layer_and_kind():
    attributions = make_attributions(blocks())
    figure = plots.contribution_heat_map(attributions, examples=[0, 2])
    axes = axes_of(figure)
    assert row_labels(axes) == ["stem.conv", "L0", "L1", "L2"]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["itself", "attn.qkv", "mlp.fc1", "mlp.experts.*.up"]
    table = torch.as_tensor(axes.images[0].get_array().filled(torch.nan))
    assert table.shape == (4, 4) and table.isnan().sum() == 6
    sizes = attributions.weights[[0, 2]].abs().mean(0)
    assert table[0, 0] == pytest.approx(float(sizes[:4].mean()))
    assert table[1, 3] == pytest.approx(float(sizes[15:19].mean()))  # both experts
    assert len([text for text in axes.texts if text.get_text()]) == 10
    assert "2 of 8 examples" in figure.get_suptitle()


def test_the_heat_map_tells_kinds_of_one_module_apart():
    groups = [
        Group("h.0.attn", "head", "h.0.attn.weight", 0, 2),
        Group("h.0.attn", "input feature", "h.0.attn.weight", 1, 4),
        Group("h.1.attn", "head", "h.1.attn.weight", 0, 2),
    ]
    axes = axes_of(plots.contribution_heat_map(make_attributions(groups)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attn head", "attn input feature"]


COSTS = {
    "least squares": [(400, 0.5), (11840, 0.88), (2400, 0.7)],
    "path gradient": [(60, 0.87), (240, 0.89), (120, 0.88)],
}


def test_cost_against_correlation_marks_the_factor():
    figure = plots.cost_against_correlation(COSTS, reference="least squares", detail="32 examples")
    axes = axes_of(figure)
    assert axes.get_xscale() == "log" and len(axes.lines) == 2
    assert list(axes.lines[0].get_xdata()) == [400, 2400, 11840]
    factor = 11840 / 120
    assert f"{factor:.3g} × fewer" in [text.get_text() for text in axes.texts]
    assert f"{factor:.3g} ×" in figure.get_suptitle() and "32 examples" in figure.get_suptitle()
    assert legend_labels(figure) == list(COSTS)
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len({colour for colour, _, _ in styles}) == len({marker for _, marker, _ in styles}) == 2


def test_cost_against_correlation_in_panels():
    other = {"path gradient": [(60, 0.5), (240, 0.6)], "least squares": [(400, 0.9)]}
    figure = plots.cost_against_correlation({"ViT": COSTS, "GPT-2": other}, reference="least squares")
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert first.lines[1].get_color() == second.lines[1].get_color()  # a method looks the same everywhere
    assert not second.texts and "GPT-2" not in figure.get_suptitle()  # never reached there
    assert len(legend_labels(figure)) == 2


def test_baselines_of_one_point_or_no_cost_and_more_methods_than_colours():
    points = COSTS | {"weight norm": [(0, 0.1)]} | {f"baseline {i}": [(10 + i, 0.2)] for i in range(8)}
    figure = plots.cost_against_correlation(points)
    axes = axes_of(figure)
    assert list(axes.lines[2].get_ydata()) == [0.1, 0.1] and axes.lines[2].get_marker() == "None"
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in axes.lines}
    assert len(looks) == len(points) == len(legend_labels(figure))


def test_cost_to_reach():
    assert plots.cost_to_reach(COSTS["path gradient"], 0.5) == 60
    assert plots.cost_to_reach(COSTS["path gradient"], 0.95) is None
    assert plots.cost_to_reach([(10, 0.0), (1000, 1.0)], 0.5) == pytest.approx(100)


def test_accuracies_by_group_say_the_worst():
    names = ["landbird on land", "landbird on water", "waterbird on land"]
    figure = plots.group_accuracies(names, [0.9, 0.5, 0.8], [0.9, 0.7, 0.6], "landbird on water", sizes=[3, 1, 1])
    assert "worst group 50.0 % → 60.0 %" in figure.get_suptitle()
    assert "mean over examples 80.0 % → 80.0 %" in figure.get_suptitle()
    assert row_labels(axes_of(figure)) == ["landbird on land (3)", "▶ landbird on water (1)", "waterbird on land (1)"]


def test_save_makes_folders_and_gives_the_path(tmp_path):
    path = tmp_path / "deep" / "er" / "top.png"
    figure = plots.top_components(make_attributions(), 0)
    assert plots.save(figure, path) == path
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == tuple(int(150 * inches) for inches in figure.get_size_inches())
    assert plots.save(figure, str(path)) == path
    with pytest.raises(CoarError, match=r"top\.jpg does not end in \.png"):
        plots.save(figure, tmp_path / "top.jpg")


ERRORS = {
    "fraction": (lambda: plots.predicted_against_measured(make_report(), 0.3), "fraction=0.3; the report has 0.0125"),
    "examples": (
        lambda: plots.predicted_against_measured(make_report(), 0.05, examples=[2, 8]),
        r"examples \[8\].* 0 to 7",
    ),
    "no examples": (lambda: plots.contribution_by_layer(make_attributions(), examples=[]), "one or more indices"),
    "no reports": (lambda: plots.correlation_by_fraction({}), "0 reports"),
    "many reports": (lambda: plots.correlation_by_fraction(dict.fromkeys("abcdefgh", make_report())), "8 reports"),
    "no classes": (lambda: plots.class_accuracies([], [], []), "0 classes"),
    "percent": (lambda: plots.class_accuracies(["a"], [50.0], [0.6]), r"before\[0\] = 50.0; .* not percent"),
    "nan": (lambda: plots.class_accuracies(["a"], [0.5], [float("nan")]), r"after\[0\] = nan"),
    "lengths": (lambda: plots.class_accuracies(["a", "b"], [0.5, 0.5], [0.6]), "after has 1 values; expected 2"),
    "unknown class": (lambda: plots.class_accuracies(["a"], [0.5], [0.6], highlight="z"), r"\['z'\].* \['a'\]"),
    "example": (lambda: plots.top_components(make_attributions(), 8), r"examples \[8\].* 0 to 7"),
    "negative example": (lambda: plots.top_components(make_attributions(), -1), r"examples \[-1\]"),
    "n": (lambda: plots.top_components(make_attributions(), 0, n=0), "n=0"),
    "chosen": (lambda: plots.edit_sweep([1, 2], [0.5, 0.6], [0.9, 0.8], chosen=3), r"chosen=3 and .*\[1, 2\]"),
    "sweep twice": (lambda: plots.edit_sweep([1, 1], [0.5, 0.6], [0.9, 0.8], chosen=1), "different numbers"),
    "no costs": (lambda: plots.cost_against_correlation({}), "every method needs one"),
    "cost": (lambda: plots.cost_against_correlation({"a": [(-1, 0.5)]}), "a: cost -1, correlation 0.5"),
    "correlation": (lambda: plots.cost_against_correlation({"a": [(1, 1.5)]}), "correlation 1.5"),
    "reference": (lambda: plots.cost_against_correlation(COSTS, "ridge"), "reference='ridge'"),
    "group sizes": (lambda: plots.group_accuracies(["a", "b"], [0.5, 0.5], [1, 1], sizes=[3]), r"sizes=\[3\]"),
    "unknown group": (lambda: plots.group_accuracies(["a"], [0.5], [0.6], highlight="z"), "and the groups are"),
    "sweep lengths": (lambda: plots.edit_sweep([1, 2], [0.5], [0.9, 0.8], chosen=1), "targets has 1 values"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_values(name):
    call, message = ERRORS[name]
    with pytest.raises(CoarError, match=message):
        call()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CoarError, match=r'pip install "hf_coar\[plots\]"'):
        plots.top_components(make_attributions(), 0)


def test_no_state_of_pyplot_is_touched():
    before = "matplotlib.pyplot" in sys.modules
    plots.correlation_by_fraction(make_report())
    assert ("matplotlib.pyplot" in sys.modules) == before
