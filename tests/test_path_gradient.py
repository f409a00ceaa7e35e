"""PathGradient's sizes: one pass, a fixed number of rounds, as many as are needed; smoothing; live attributions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_coar as coar
from hf_coar import data
from hf_coar.estimators import flips, live
from hf_coar.estimators.delta_reads import DeltaReads, _mean_slope, followed
from hf_coar.estimators.gates import Sums
from hf_coar.estimators.trying import elementwise_modules
from hf_coar.masking import FiredGroups, ablate
from hf_coar.runs.problem import Size


def attribute(pair, method, **options):
    model, batches = pair
    return coar.attribute(model, batches, method=method, progress=False, **{"ablated_fraction": 0.05, **options})


def fidelity(pair, found, n_masks=60):
    model, batches = pair
    return coar.evaluate(found, model, batches, fractions=(0.05,), n_masks=n_masks, progress=False).correlation[0.05]


# ------------------------------------------------------------------------------------------------------------ one pass


def test_one_pass_costs_three_and_one_and_predicts(demo_pair):
    found = attribute(demo_pair, coar.PathGradient(rounds=0))
    assert found.config["cost"] == 3 + 1 and found.standard_errors is None
    assert fidelity(demo_pair, found) > 0.7


@pytest.mark.parametrize(
    "method",
    [
        coar.PathGradient(rounds=0),
        coar.PathGradient(passes=2),
        coar.PathGradient(passes=2, max_outliers=0),
        coar.PathGradient(rounds=2, n_flips=0, check_masks=0),
        coar.PathGradient(rounds=2, across_examples=False, max_outliers=0),
    ],
    ids=["one pass", "two passes", "no outliers", "bare rounds", "by itself"],
)
def test_predictions_start_from_the_unablated_output(demo_pair, tmp_path, method):
    """Of a small encoder 6.35 was predicted with everything in place, where it says 7.05."""
    model, batches = demo_pair
    batch = data.rows(data.as_batch(next(iter(batches))), 0, 4)
    found = attribute((model, [batch]), method)
    with torch.no_grad():
        plain = coar.outputs.get("margin").of(model, batch)
    whole, none = torch.ones(832), torch.zeros(832)
    found.save_pretrained(tmp_path)
    for one in (found, coar.Attributions.from_pretrained(tmp_path)):
        assert torch.allclose(one.predict(whole)[0], plain, atol=1e-4)
        assert torch.allclose(one.without(3).before, plain, atol=1e-4)
        # Sets of the fitted size and larger ones are where the fit has them.
        assert torch.allclose(one.predict(none)[0], found.bias, atol=1e-3)
    assert (plain - found.bias - found.weights.sum(1)).abs().max() > 0.1


def test_the_batch_size_moves_nothing_in_one_pass(demo_pair):
    model, batches = demo_pair
    whole = data.as_batch(next(iter(batches)))
    parts = [data.rows(whole, 0, 3), data.rows(whole, 3, 8)]
    a = attribute((model, [data.rows(whole, 0, 8)]), coar.PathGradient(rounds=0))
    b = attribute((model, parts), coar.PathGradient(rounds=0))
    assert (a.weights - b.weights).abs().max() < 1e-3 * a.weights.abs().max()


# ------------------------------------------------------------------------------------------------------------- company


def test_an_example_can_be_attributed_by_itself(demo_pair):
    model, batches = demo_pair
    whole = data.as_batch(next(iter(batches)))
    method = coar.PathGradient(2, across_examples=False)
    alone, among = (attribute((model, [data.rows(whole, 0, n)]), method) for n in (1, 6))
    assert (alone.weights[0] - among.weights[0]).abs().max() < 1e-3 * among.weights[0].abs().max()
    together = attribute((model, [data.rows(whole, 0, 6)]), bare(2))
    assert (together.weights[0] - alone.weights[0]).norm() > 0.05 * alone.weights[0].norm()


# ----------------------------------------------------------------------------------------------- any number of passes


def test_any_number_of_passes_between_one_and_rounds(demo_pair):
    found = {n: attribute(demo_pair, coar.PathGradient(passes=n)) for n in (1, 2, 5, 11)}
    assert torch.equal(found[1].weights, attribute(demo_pair, coar.PathGradient(rounds=0)).weights)
    assert [found[n].config["cost"] for n in (1, 2)] == [4, 7] and found[5].config["cost"] == 15 + 1
    assert found[2].standard_errors is None and (found[5].standard_errors > 0).all()
    fidelities = {n: fidelity(demo_pair, one) for n, one in found.items()}
    assert fidelities[1] + 0.03 < fidelities[5] < fidelities[11] + 0.01
    assert "passes" not in coar.PathGradient().settings() and "rounds" not in coar.PathGradient(passes=5).settings()


def test_a_budget_below_two_rounds_takes_single_passes(demo_pair):
    assert coar.PathGradient().sized(33, Size(832, 0.05)) == coar.PathGradient(passes=11)
    assert coar.PathGradient().sized(60, Size(832, 0.05)).rounds == 2
    with pytest.raises(coar.CoarError, match="too small"):
        coar.PathGradient().sized(2, Size(832, 0.05))


# --------------------------------------------------------------------------------------------------- as many as needed


def test_auto_stops_when_every_example_is_reliable(demo_pair):
    level = 0.9
    method = coar.PathGradient(rounds="auto", reliability=level, max_rounds=12, shrink=False)
    found = attribute(demo_pair, method)
    reliability = coar.stability.reliability(found)
    spent = found.config["cost"]
    assert 2 * 30 <= spent < 12 * 30
    assert (reliability >= level - 1e-4).float().mean() > 0.5


def test_auto_does_not_depend_on_the_batch_size(demo_pair):
    model, batches = demo_pair
    whole = data.rows(data.as_batch(next(iter(batches))), 0, 3)
    method = coar.PathGradient(rounds="auto", reliability=0.85, max_rounds=6, shrink=False)
    together = attribute((model, [whole]), method)
    alone = attribute((model, [data.rows(whole, i, i + 1) for i in range(3)]), method)
    assert together.config["cost"] == alone.config["cost"]
    assert (together.weights - alone.weights).abs().max() < 1e-3 * together.weights.abs().max()


def test_auto_with_an_unreachable_level_takes_the_most(demo_pair):
    model, batches = demo_pair
    small = (model, [data.rows(data.as_batch(next(iter(batches))), 0, 2)])
    auto = attribute(small, coar.PathGradient(rounds="auto", reliability=0.9999, max_rounds=4))
    fixed = attribute(small, coar.PathGradient(rounds=4))
    assert (
        auto.config["cost"] == fixed.config["cost"] == 121 + 30 + 10 + 20
    )  # one pass looks for outliers; flips, far reads, checks
    assert torch.equal(auto.weights, fixed.weights)


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 1}, {"rounds": -2}, {"rounds": "many"}, {"rounds": True},
        {"passes": 0}, {"passes": 2.5}, {"rounds": "auto", "max_rounds": 3}, {"rounds": "auto", "reliability": 1.0},
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense(options):
    with pytest.raises(coar.CoarError, match="PathGradient"):
        coar.PathGradient(**options)


# ----------------------------------------------------------------------------------------------------------- smoothing


def test_the_mean_slope_is_the_mean_of_the_slopes():
    x = torch.linspace(-2, 2, 41)[None]
    half = 0.5 * 3**0.5 * x.std(correction=0)
    grid = torch.linspace(-1, 1, 4001)[:, None] * half
    for function, slope in ((F.relu, lambda z: (z > 0).float()), (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2)):
        expected = slope(x + grid).mean(0)
        assert torch.allclose(_mean_slope(function, x, 0.5)[0], expected, atol=1e-3)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2)])
def test_the_mean_slope_of_a_clamp_is_known_without_its_values(module):
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    (bounds,) = elementwise_modules(module).values()
    assert torch.allclose(_mean_slope(module, x, 0.5, bounds), _mean_slope(module, x, 0.5), atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_smoothing_leaves_the_forward_pass_as_it_is(in_place):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=in_place), nn.Conv2d(4, 3, 3), nn.ReLU6(in_place))
    x = torch.randn(2, 2, 9, 9, requires_grad=True)
    plain = net(x)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    with followed(dict.fromkeys([net[1], net[3]]), FiredGroups(net, []), DeltaReads(), smoothing=0.5):
        smoothed = net(x)
    (other,) = torch.autograd.grad(smoothed.sum(), x)
    assert torch.equal(plain, smoothed)
    assert not torch.allclose(slope, other)


def test_smoothing_helps_where_there_are_kinks(demo_pair):
    with_it = fidelity(demo_pair, attribute(demo_pair, coar.PathGradient(rounds=2)))
    without = fidelity(demo_pair, attribute(demo_pair, coar.PathGradient(rounds=2, smooth=False)))
    assert with_it > without


# ---------------------------------------------------------------------------------------------------------------- live


def test_live_ends_where_attribute_does(demo_pair):
    model, batches = demo_pair
    few = data.rows(data.as_batch(next(iter(batches))), 0, 3)
    components = coar.find_components(model)
    seen = list(live.rounds(model, few, components, max_rounds=4))
    assert [r.rounds for r in seen] == [0, 1, 2, 3, 4]
    assert [r.cost for r in seen] == [3, 34, 64, 94, 124]
    assert seen[0].standard_errors is None and seen[-1].standard_errors is not None
    assert (seen[-1].reliability > seen[2].reliability).float().mean() > 0.5
    found = attribute((model, [few]), bare(4))  # checks set a scale, which these rounds do not know
    assert torch.allclose(seen[-1].weights, found.weights, atol=1e-5)
    one = attribute((model, [few]), coar.PathGradient(rounds=0))
    assert torch.allclose(seen[0].weights, one.weights, atol=1e-5)


def test_live_leaves_the_model_as_it_was_between_rounds(demo_pair):
    model, batches = demo_pair
    few = data.rows(data.as_batch(next(iter(batches))), 0, 1)
    components = coar.find_components(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in live.rounds(model, few, components, max_rounds=1):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_live_refuses(demo_pair):
    model, batches = demo_pair
    with pytest.raises(coar.CoarError, match="max_rounds"):
        next(live.rounds(model, next(iter(batches)), coar.find_components(model), max_rounds=-1))


def test_reliability_of_pure_noise_is_about_zero():
    torch.manual_seed(0)
    sums = Sums(2, 4000, torch.device("cpu"))
    for _ in range(6):
        noise = torch.randn(2, 4000)
        sums.add([0, 1], type("R", (), {"soft": noise, "hard": noise, "gates": noise, "output": noise[:, 0]}))
    assert sums.reliability().abs().max() < 0.1


# ------------------------------------------------------------------------------------------------------------ outliers


class Massive(nn.Module):
    """A net with one row that dwarfs its layer, and without which the output collapses."""

    def __init__(self, factor=100.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        with torch.no_grad():
            self.first.weight[5] *= factor
            self.head.weight[:, :] *= 0.3

    def forward(self, x):
        hidden = self.first(x)
        hidden = torch.tanh(self.second(hidden / hidden.square().mean(-1, keepdim=True).sqrt())) + 0.01 * hidden
        return self.head(hidden)


def massive(factor=100.0, count=6):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1)).abs() + 0.3
    return Massive(factor).eval(), [{"inputs": inputs, "labels": torch.arange(count) % 3}]


def bare(rounds, **options):
    """Without flips and checks."""
    return coar.PathGradient(rounds, n_flips=0, check_masks=0, **options)


def test_outliers_get_their_exact_differences():
    model, batches = massive()
    components = coar.find_components(model, exclude=["head"])
    found = coar.attribute(
        model, batches, components, method=coar.PathGradient(2, check_masks=0), ablated_fraction=0.05, progress=False
    )
    kept = torch.ones(len(components), dtype=torch.bool)
    margin = coar.outputs.get("margin")
    with torch.no_grad():
        before = margin(model(batches[0]["inputs"]), batches[0])
        kept[5] = False
        with ablate(model, components, kept):
            after = margin(model(batches[0]["inputs"]), batches[0])
    assert torch.allclose(found.weights[:, 5], before - after, atol=1e-4)
    assert (found.standard_errors[:, 5] == 0).all()
    assert (found.standard_errors[:, 6] > 0).any()
    assert found.config["cost"] == 60 + 1 + 1 + flips.default_number(len(components)) + 1
    assert (found.predict(kept)[0] - after).abs().max() < 0.1 * (before - after).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outliers_of_models_in_half_precision(dtype):
    model, batches = massive()
    model, batches = model.to(dtype), [{**batches[0], "inputs": batches[0]["inputs"].to(dtype)}]
    found = coar.attribute(model, batches, method=bare(2), ablated_fraction=0.05, progress=False)
    assert found.config["cost"] == 60 + 1 + 1
    assert found.weights.isfinite().all()


def test_without_outliers_there_are_none():
    model, batches = massive(factor=1.0)
    found = coar.attribute(model, batches, method=bare(2), ablated_fraction=0.05, progress=False)
    assert found.config["cost"] == 60 + 1
    none = coar.attribute(model, batches, method=bare(2, max_outliers=0), ablated_fraction=0.05, progress=False)
    assert none.config["cost"] == 60 + 1
    assert torch.equal(found.weights, none.weights)


def test_outliers_do_not_depend_on_the_batch_size():
    model, batches = massive()
    parts = [data.rows(batches[0], 0, 1), data.rows(batches[0], 1, 6)]
    a = coar.attribute(model, batches, method=bare(2), ablated_fraction=0.05, progress=False)
    b = coar.attribute(model, parts, method=bare(2), ablated_fraction=0.05, progress=False)
    assert torch.allclose(a.weights, b.weights, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- checks


def test_fresh_masks_set_the_scale_and_are_reported(demo_pair, monkeypatch):
    monkeypatch.setattr("hf_coar.estimators.gates._SMOOTHING_OF_ONE_PASS", 0.0)  # then the scale is off by a quarter
    plain = attribute(demo_pair, coar.PathGradient(rounds=0))
    checked = attribute(demo_pair, coar.PathGradient(rounds=0, check_masks=32))
    assert checked.config["cost"] == 3 + 1 + 32
    model, batches = demo_pair

    def slope(found):
        report = coar.evaluate(found, model, batches, fractions=(0.05,), n_masks=60, progress=False)
        return report.slope[0.05]

    assert abs(slope(checked) - 1) < 0.1 < abs(slope(plain) - 1)
    assert checked.config["checked"]["n_sets"] == 32 and 0.5 < checked.config["checked"]["correlation"] < 1
    factor = checked.config["checked"]["scale"]
    assert torch.allclose(checked.weights, plain.weights * factor, rtol=1e-4)


def test_a_low_correlation_on_fresh_masks_is_a_warning(demo_pair, monkeypatch, caplog):
    monkeypatch.setattr("hf_coar.estimators.checking._LOW_CORRELATION", 0.99)
    attribute(demo_pair, coar.PathGradient(rounds=0, check_masks=8))
    assert "correlation of 0." in caplog.text and "prior=" in caplog.text


@pytest.mark.parametrize("number", [-1, 3, 2.5, True])
def test_checks_that_make_no_sense(number):
    with pytest.raises(coar.CoarError, match="check_masks"):
        coar.PathGradient(check_masks=number)
