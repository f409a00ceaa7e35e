"""Forecasts for sets of any size: single effects, limits, intervals that hold, and warnings where little is left."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar import data
from hf_coar.attributions.calibration import Calibration, Said
from hf_coar.attributions.far import Far
from hf_coar.attributions.forecast import Forecast
from hf_coar.attributions.layers import Layer, taken
from hf_coar.attributions.predicting import Known
from hf_coar.attributions.rows import as_rows
from hf_coar.estimators import ESTIMATORS, checking, flips
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import sampling
from hf_coar.runs.problem import Estimates


@pytest.fixture(scope="module")
def measured(demo_attributions, demo_pair):
    """Forty fresh sets an example: kept bool [sets, examples, components], outputs [sets, examples]."""
    found, (model, batches) = demo_attributions, demo_pair
    batch = data.as_batch(next(iter(batches)))
    sets = checking.Sets(seed=1234, fraction=0.05)
    kept = torch.stack([sets.kept(found.weights[:], range(len(found)), number) for number in range(40)])
    masked, margin = MaskedModel(model, found.components), outputs.get("margin")
    values = []
    with torch.no_grad():
        for rows in kept:
            with masked.ablated(rows, how="hooks"):
                values.append(margin.of(model, batch))
    return kept, torch.stack(values)


def own(found, kept, level=None):
    """Predictions of every example under its own sets, from those under all of them."""
    number, count = kept.shape[:2]
    rows = found.predict(kept.flatten(0, 1), level)
    pick = torch.arange(count).expand(number, count)
    return [x.view(number, count, count).gather(2, pick[..., None])[..., 0] for x in (rows if level else (rows,))]


# ---------------------------------------------------------------------------------------------------- sets of any size


def test_nothing_ablated_is_predicted_exactly(demo_attributions, demo_pair):
    model, batches = demo_pair
    batch = data.as_batch(next(iter(batches)))
    with torch.no_grad():
        plain = outputs.get("margin").of(model, batch)
    values, low, high = demo_attributions.predict(torch.ones(832), level=0.95)
    assert (values[0] - plain).abs().max() < 1e-4
    assert torch.equal(low, values) and torch.equal(high, values)


def test_a_flipped_component_alone_is_predicted_almost_exactly(demo_attributions, demo_pair):
    found, (model, batches) = demo_attributions, demo_pair
    batch = data.as_batch(next(iter(batches)))
    index = int(found.forecast.flipped[found.forecast.effects.abs().mean(0).argmax()])
    kept = torch.ones(832, dtype=torch.bool).index_fill(0, torch.tensor([index]), False)
    with torch.no_grad(), coar.ablate(model, found.components, kept):
        truth = outputs.get("margin").of(model, batch)
    linear = found.bias + found.weights @ kept.float()
    forecast = (found.predict(kept)[0] - truth).abs().mean()
    assert forecast < 0.1 * (found.forecast.unablated - truth).abs().mean()
    assert forecast < 0.3 * (linear - truth).abs().mean()


def test_small_random_sets_are_predicted_better_than_by_the_weights(demo_attributions, demo_pair):
    model, batches = demo_pair
    found, linear = demo_attributions, plain(demo_attributions)
    options = {"fractions": (0.003, 0.05), "n_masks": 50, "progress": False}
    better, worse = (coar.evaluate(each, model, batches, **options) for each in (found, linear))
    assert better.correlation[0.003] > worse.correlation[0.003] + 0.005
    assert better.correlation[0.05] > worse.correlation[0.05] - 0.01
    assert abs(better.slope[0.003] - 1) < abs(worse.slope[0.003] - 1) - 0.05
    new, old = ((report.predicted[0.003] - report.measured[0.003]).abs().mean() for report in (better, worse))
    assert new < 0.5 * old


def plain(found):
    return coar.Attributions(
        found.weights, found.bias, found.standard_errors, found.components, found.identity, found.provenance.to_json()
    )


def test_the_formula_by_hand():
    weights, effects = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[5.0]])
    forecast = Forecast(torch.tensor([10.0]), torch.tensor([3]), effects, ratio=1.5)
    single = torch.tensor([1.5, 3.0, 6.0, 5.0])
    kept = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    found = forecast.drops(weights, kept, fraction=0.25)
    size = 0.5  # beyond the fraction: weights as they are, and the level by the mean of min(1, u / 0.25) up to it
    level = size * (1 - 0.75) * float((weights[0] - single).sum())
    assert float(found) == pytest.approx(1.0 + 8.0 - level, abs=1e-5)
    tiny = forecast.drops(weights, torch.tensor([[1.0, 1.0, 1.0, 0.999]]), fraction=0.25)
    assert float(tiny) == pytest.approx(0.005, rel=0.01)


def test_pairs_take_the_place_of_the_interpolation():
    weights = torch.tensor([[1.0, 2.0, 4.0]])
    forecast = Forecast(
        torch.tensor([10.0]), torch.arange(3), torch.tensor([[1.5, 2.5, 4.0]]),
        pairs=torch.tensor([[0, 1]]), interactions=torch.tensor([[0.75]]),
    )  # fmt: skip
    kept = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert forecast.drops(weights, kept, 0.1).flatten().tolist() == pytest.approx([1.5 + 2.5 - 0.75, 5.5])


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("kind", ["random", "strongest"])
def test_intervals_hold_on_fresh_sets(demo_attributions, measured, kind):
    kept, truth = measured
    numbers = [i for i in range(len(kept)) if (i % 5 in (1, 3)) == (kind == "strongest")]
    _, low, high = own(demo_attributions, kept[numbers], level=0.95)
    inside = ((low <= truth[numbers]) & (truth[numbers] <= high)).float().mean()
    assert 0.9 <= float(inside) <= 0.995
    _, low, high = own(demo_attributions, kept[numbers], level=0.5)
    narrow = ((low <= truth[numbers]) & (truth[numbers] <= high)).float().mean()
    assert 0.3 <= float(narrow) <= 0.75


def test_limits_keep_forecasts_of_the_strongest_near_the_truth(demo_attributions, measured):
    kept, truth = measured
    numbers = [i for i in range(len(kept)) if i % 5 in (1, 3)]
    (limited,) = own(demo_attributions, kept[numbers])
    (linear,) = own(plain(demo_attributions), kept[numbers])
    assert (limited - truth[numbers]).abs().mean() < 0.6 * (linear - truth[numbers]).abs().mean()


def said(drops, norms, strong=None, shares=None, falls=None):
    """Of sets of the fitted size that are not strong, of examples of which no single effect is known."""
    none = torch.zeros_like(drops)
    shares, falls = (torch.ones_like(drops) if shares is None else shares), (none if falls is None else falls)
    return Said(drops, shares, norms, none.bool() if strong is None else strong, falls, none)


def learnt(drops, norms, measured, typical=False):
    return Calibration.learnt(said(drops, norms), measured, torch.full(drops.shape, bool(typical)))


def test_calibration_learns_limits_and_spread():
    generator = torch.Generator().manual_seed(0)
    drops = 10 * torch.randn(4000, generator=generator, dtype=torch.float64)
    norms = drops.abs() / 4 + 0.1
    truth = Calibration((1 / 6, 1 / 3)).limited(said(drops, norms))
    noisy = truth + 0.3 * norms * torch.randn(4000, generator=generator, dtype=torch.float64)
    found = learnt(drops[:2000], norms[:2000], noisy[:2000])
    assert found.limits[0] == pytest.approx(1 / 6, rel=0.25) and found.limits[1] == pytest.approx(1 / 3, rel=0.25)
    rest = said(drops[2000:], norms[2000:])
    misses = (found.limited(rest) - noisy[2000:]).abs()
    inside = misses <= found.quantile(0.9) * found.expected_miss(rest)
    assert inside.double().mean() == pytest.approx(0.9, abs=0.03)


def test_calibration_learns_the_level():
    drops = torch.linspace(-2, 2, 400, dtype=torch.float64)
    found = learnt(drops, drops.abs() + 1, drops + 0.7, typical=True)
    assert found.level == pytest.approx(0.7, abs=0.1)
    small = found.limited(said(torch.tensor([1.0]), torch.tensor([1.0]), shares=torch.tensor([0.1])))
    assert float(small) == pytest.approx(1.0, abs=0.1)


def test_what_is_within_the_norm_is_not_bent():
    drops = torch.tensor([1.0, -3.0, 9.0])
    bent = Calibration((1.0, 1.0)).limited(said(drops, torch.tensor([1.0, 3.0, 3.0])))
    assert bent.tolist() == pytest.approx([1.0, -3.0, 4 - math.exp(-6)])


def test_as_far_as_a_single_component_goes_many_go_as_well():
    """Strong sets of SmolLM2 without its largest component were forecast with half of their effect."""
    drops, norms = torch.tensor([2.0, 60.0, 60.0, -60.0]), torch.tensor([3.0, 3.0, 12.0, 3.0])
    bent = Calibration((1.0, 1.0)).limited(said(drops, norms, falls=torch.full((4,), 10.0)))
    assert bent.tolist() == pytest.approx([2.0, 10.0, 13.0, -4.0], abs=0.01)
    assert Calibration().limited(said(drops, norms, falls=norms)).tolist() == drops.tolist()
    forecast = Forecast(torch.zeros(2), torch.tensor([0, 1]), torch.tensor([[3.0, -1.0], [0.5, 2.0]]))
    assert [one.tolist() for one in forecast.farthest] == [[3.0, 2.0], [1.0, 0.0]]
    none = Forecast(torch.zeros(2), torch.zeros(0, dtype=torch.long), torch.zeros(2, 0))
    assert [one.tolist() for one in none.farthest] == [[0.0, 0.0]] * 2


def test_no_limit_where_outputs_are_additive():
    drops = torch.linspace(-5, 5, 400, dtype=torch.float64)
    found = learnt(drops, drops.abs() / 3 + 0.1, drops + 0.01 * torch.randn(400, dtype=torch.float64))
    assert max(found.limits) < 0.02


def missed(sets, factors, generator):
    """Forecasts of no limit, of sets of three kinds of strong ones and of none, that are missed by normal numbers."""
    kinds = torch.arange(sets) % 4
    norms = torch.rand(sets, generator=generator, dtype=torch.float64) + 0.5
    drops = torch.tensor([0.3, 3.0, -3.0, 0.3], dtype=torch.float64)[kinds] * norms
    noise = torch.randn(sets, generator=generator, dtype=torch.float64) * norms
    return kinds, drops, norms, drops + 0.1 * torch.tensor(factors, dtype=torch.float64)[kinds] * noise


def test_every_kind_of_strong_sets_is_missed_by_its_own():
    generator = torch.Generator().manual_seed(0)
    factors = (1.0, 2.0, 4.0, 8.0)
    kinds, drops, norms, truth = missed(4000, factors, generator)
    none = torch.zeros(4000, dtype=torch.bool)
    found = Calibration.learnt(said(drops, norms, kinds > 0), truth, none)
    kinds, drops, norms, truth = missed(4000, factors, generator)
    half = found.quantile(0.95) * found.expected_miss(said(drops, norms, kinds > 0))
    inside = ((truth - drops).abs() <= half).double()
    assert all(float(inside[kinds == kind].mean()) == pytest.approx(0.95, abs=0.025) for kind in range(4))


def test_intervals_of_a_single_example_hold():
    """Twenty sets had their worst misses taken in by what was learnt from them: 92 % of others were inside."""
    inside = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        kinds, drops, norms, truth = missed(420, (1.0, 1.0, 1.0, 1.0), generator)
        of_all, own = said(drops, norms, kinds > 0), torch.arange(420) < 20
        found = Calibration.learnt(of_all.at(own), truth[own], kinds[own] == 0)
        half = found.quantile(0.95) * found.expected_miss(of_all)
        inside.append(((truth - found.limited(of_all)).abs() <= half)[20:].double().mean())
    assert 0.94 <= float(torch.stack(inside).mean()) <= 0.98


def test_no_part_of_a_spread_is_zero_by_chance():
    drops, norms = torch.ones(16, dtype=torch.float64), torch.full((16,), 1e-3, dtype=torch.float64)
    found = learnt(drops, norms, drops + 0.1)
    assert min(found.spread) > 0.01


def test_strong_sets_take_more_of_the_weights_than_their_share():
    weights = torch.tensor([[9.0, -9.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 8])
    kept = torch.ones(3, 8).index_put((torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])), torch.tensor(0.0))
    assert Forecast.strong(weights, kept).tolist() == [[True, False], [False, False], [False, False]]


@pytest.mark.parametrize("level", [0, 1, -0.5, 2, True, "high"])
def test_levels_that_make_no_sense(demo_attributions, level):
    with pytest.raises(coar.CoarError, match="level="):
        demo_attributions.predict(torch.ones(832), level=level)


def test_a_level_that_the_checks_cannot_tell():
    with pytest.raises(coar.CoarError, match=r"needs 19 fresh sets.*check_masks"):
        Calibration(scores=(1.0,) * 18).quantile(0.95)
    assert Calibration(scores=tuple(range(19))).quantile(0.95) == 18


def test_without_checks_there_is_no_interval(demo_pair):
    model, batches = demo_pair
    few = [data.rows(data.as_batch(next(iter(batches))), 0, 2)]
    method = coar.PathGradient(rounds=2, check_masks=0, n_flips=3)
    found = coar.attribute(model, few, method=method, ablated_fraction=0.1, progress=False)
    assert found.forecast.calibration is None and found.forecast.effects.shape == (2, 3)
    with pytest.raises(coar.CoarError, match="check_masks"):
        found.predict(torch.ones(832), level=0.95)
    assert found.without(4).low is None


def test_what_was_measured_is_known():
    """Of leave-one-out's every single head an interval was as wide as that of sets that nobody had measured."""
    forecast = Forecast(
        torch.tensor([10.0]), torch.tensor([0, 1]), torch.tensor([[1.0, 2.0]]),
        pairs=torch.tensor([[0, 1]]), interactions=torch.tensor([[0.5]]),
        calibration=Calibration(level=5.0, spread=(1.0, 1.0, 1.0), scores=(1.0,) * 19),
    )  # fmt: skip
    kept = 1 - torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0.5, 0.5, 0]])
    assert forecast.knows(kept)[:, 0].tolist() == [True, True, True, False, False, False, False]
    components = coar.find_components(nn.Linear(2, 3))
    known = Known(components, torch.tensor([[3.0, 3.0, 3.0]]), torch.zeros(1), None, forecast, 0.5)
    values, low, high = known.outputs(kept, 0.95)
    assert values[:3, 0].tolist() == pytest.approx([10.0, 9.0, 7.5])
    assert ((high - low)[:3] < 0.01).all() and ((high - low)[3:] > 1).all()
    alone = replace(forecast, pairs=forecast.pairs[:0], interactions=None)
    assert alone.knows(kept)[:, 0].tolist() == [True, True, False, False, False, False, False]
    one = replace(known, forecast=alone).outputs(kept[1:2], None)
    assert float(one) == pytest.approx(9.0)


@pytest.mark.parametrize("among", [0, 5])
def test_intervals_are_learnt_from_sets_that_were_not_measured_before(mlp, monkeypatch, among):
    """Of twelve heads' sets nine in ten were single heads and pairs; of larger ones three in ten were inside."""
    learnt, sizes = Calibration.learnt, []

    def spied(said, *rest):
        sizes.extend((said.shares * 0.1 * n_components).round().int().tolist())
        return learnt(said, *rest)

    n_components = len(coar.find_components(mlp.model))
    monkeypatch.setattr(Calibration, "learnt", spied)
    monkeypatch.setattr(Forecast, "shares", staticmethod(lambda kept, fraction: (1 - kept).mean(-1) / 0.1))
    method = coar.baselines.LeaveOneOut(pairs_among=among and n_components, check_masks=20)
    found = coar.attribute(mlp.model, [mlp.batch], method=method, ablated_fraction=0.1, progress=False)
    assert found.forecast.largest_known == (2 if among else 1) and len(sizes) > 10 * len(found)
    assert min(sizes) == 1 + found.forecast.largest_known and max(sizes) > n_components / 3


def test_intervals_that_an_earlier_version_learnt_are_none(demo_attributions):
    found = demo_attributions
    record = found.provenance.to_json()["forecast"]
    old = {key: value for key, value in record["calibration"].items() if key != "strong"} | {"beyond": 1.2}
    provenance = replace(found.provenance, forecast={**record, "calibration": old})
    matrices = {name: as_rows(value) for name, value in found.forecast.matrices().items()}
    loaded = Forecast.from_rows(provenance, matrices, {"unablated": found.forecast.unablated})
    known = Known(found.components, found.weights, found.bias, found.standard_errors, loaded, 0.05)
    kept = torch.rand(3, 832, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(known.outputs(kept, None), found.predict(kept))
    with pytest.raises(coar.CoarError, match="earlier version"):
        known.outputs(kept, 0.95)


# -------------------------------------------------------------------------------------------------------------- without


def test_without_by_name_and_index(demo_attributions):
    found = demo_attributions
    names = [str(found.components[5]), str(found.components[700])]
    everyone, one = found.without([names[0], 700]), found.without(names, example=3)
    kept = torch.ones(832).index_fill(0, torch.tensor([5, 700]), 0)
    values, low, high = found.predict(kept, level=0.95)
    assert torch.allclose(everyone.after, values[0]) and torch.allclose(everyone.low, low[0])
    for name, wanted in (("after", values), ("low", low), ("high", high)):
        assert float(getattr(one, name)) == pytest.approx(float(wanted[0, 3]), abs=1e-4)
    assert float(one.before) == pytest.approx(float(found.forecast.unablated[3]))
    assert "→" in str(one) and "0.95" in str(one)


@pytest.mark.parametrize("which", ["conv9 filter 1", 832, -833, [3, "x"], 1.5, True])
def test_without_something_that_is_not_there(demo_attributions, which):
    with pytest.raises(coar.CoarError, match=r"no component .* from 0 to 831"):
        demo_attributions.without(which)


def test_forecasts_are_saved(demo_attributions, tmp_path):
    demo_attributions.save_pretrained(tmp_path)
    loaded = coar.Attributions.from_pretrained(tmp_path)
    kept = torch.rand(5, 832)
    for a, b in zip(loaded.predict(kept, level=0.9), demo_attributions.predict(kept, level=0.9), strict=True):
        assert torch.equal(a, b)
    assert loaded.provenance == demo_attributions.provenance


# ------------------------------------------------------------------------------------------------------- flips, checks


def test_masks_one_by_one():
    masks = flips.one_by_one(4, (2, 0))
    assert masks.count == 3
    assert masks.rows(0, 3).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]


def test_flips_take_over_only_where_reads_are_noise():
    effects = torch.tensor([[4.0, 1.0], [5.0, -1.0], [4.5, 2.0]])
    known = flips.Flips(torch.tensor([0, 1]), torch.zeros(3), effects)
    weights = torch.cat([torch.tensor([[-9.0], [20.0], [2.0]]), 0.8 * effects[:, 1:], torch.ones(3, 1)], dim=1)
    errors = torch.tensor([[12.0, 0.05, 0.3]]).expand(3, 3)
    found, spread = flips.steadied(Estimates(weights, errors), known).rows(0, 3)
    assert (found[:, 0] - effects[:, 0]).abs().max() < 2.5 and (spread[:, 0] < 3).all()
    assert torch.equal(found[:, 1:], weights[:, 1:]) and torch.allclose(spread[:, 1:], errors[:, 1:])


def test_sets_are_a_pure_function_and_of_four_kinds():
    weights = torch.linspace(-1, 2, 400)
    sets = checking.Sets(seed=3, fraction=0.05)
    both = [sets.kept(weights.expand(2, -1), [7, 8], number) for number in range(200)]
    rows = [row for row, _ in both]
    assert all(torch.equal(row, sets.kept(weights[None], [7], number)[0]) for number, row in enumerate(rows))
    typical = torch.stack([row for number, row in enumerate(rows) if sets.is_typical(number)])
    assert float((~typical).float().mean()) == pytest.approx(0.05, abs=0.01)
    distant = [number for number in range(200) if sets.is_distant(number, 400)]
    assert [number % 10 for number in distant[:4]] == [3, 9, 3, 9]
    strongest = [number for number in range(200) if number % 5 in (1, 3)]
    orders = [weights.argsort(descending=True), weights.argsort(), weights.abs().argsort(descending=True)]
    for number in strongest:
        gone = ~rows[number]
        count = int(gone.sum())
        assert 50 <= count <= 200 if number in distant else 1 <= count <= 40
        assert any(gone[order[:count]].all() for order in orders)
    sizes = {number: int((~row).sum()) for number, row in enumerate(rows) if number % 5 == 4}
    near, far = ({sizes[number] for number in sizes if (number in distant) == here} for here in (False, True))
    assert min(near) <= 2 and 20 <= max(near) <= 40 and 50 <= min(far) < 70 and 150 < max(far) <= 200
    assert not torch.equal(*both[4])


def test_of_few_components_no_set_is_distant():
    """Of fewer than sixteen half are in near sets, and there is nothing to learn from sets of the same size."""
    sets = checking.Sets(seed=3, fraction=0.05)
    assert not any(sets.is_distant(number, count) for number in range(20) for count in (1, 2, 12, 16))
    assert sets.is_distant(9, 40) and not checking.Sets(seed=3, fraction=0.3).is_distant(9, 400)


def test_blocks_of_sets_are_as_small_as_what_is_made_of_them_wants(monkeypatch):
    """Of 12 heads and their 66 pairs all examples came at once, and what was made of the pairs filled the memory."""
    monkeypatch.setattr(checking, "_BYTES", {"cpu": 4 * 5 * 100})
    weights, sets = torch.randn(9, 10), checking.Sets(0, 0.2)
    for width, examples in ((10, 9), (25, 4), (1000, 1)):
        blocks = list(sets.blocks(Estimates(weights), [(i, i) for i in range(9)], range(5), width, checking._CPU))
        assert max(len(block.rows) for block in blocks) == examples
        kept = torch.cat([block.kept for block in blocks], dim=1)
        assert torch.equal(kept[3].bool(), sets.kept(weights, range(9), 3))


def test_of_equal_weights_the_first_are_the_largest():
    """Which of equal values are the largest a GPU and a CPU do not agree on, and sets are drawn on either."""
    values = torch.tensor([[0.0, 3, 0, 3, 3, 0], [1, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]])
    found = checking._largest(values, torch.tensor([[2], [3], [1]]), 3).int().tolist()
    assert found == [[0, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert checking._largest(values[:1], torch.tensor([[6]]), 6).all()


@torch.no_grad()
def test_forecasts_of_examples_own_sets_are_those_of_each_alone():
    torch.manual_seed(0)
    weights, errors = torch.randn(3, 40), torch.rand(3, 40)
    kept = (torch.rand(5, 3, 40) > 0.2).float()
    far = Far(torch.arange(6), torch.randn(3, 6), 0.5, 0.9, 0.7)
    singles = Forecast(torch.randn(3), torch.tensor([1, 4]), torch.randn(3, 2), 0.8, far=far)
    pairs = replace(singles, pairs=torch.tensor([[1, 4], [0, 2]]), interactions=torch.randn(3, 2), far=None)
    kept[0, 0], kept[0, 1, 1:] = 1, 1  # nothing, and maybe one that was measured
    for forecast in (singles, pairs):
        for name, of_all in {
            "drops": lambda f, w, e, k: f.drops(w, k, 0.1),
            "norms": lambda f, w, e, k: f.norms(w, e, k),
            "strong": lambda f, w, e, k: f.strong(w, k).float(),
            "shares": lambda f, w, e, k: f.shares(k, 0.1),
            "knows": lambda f, w, e, k: f.knows(k).float(),
        }.items():
            found = of_all(forecast, weights, errors, kept)
            for row in range(3):
                alone = of_all(forecast.at([row]), weights[row : row + 1], errors[row : row + 1], kept[:, row])
                torch.testing.assert_close(
                    found[:, row : row + 1], alone, msg=lambda text, name=name: f"{name}: {text}"
                )


def test_many_examples_are_calibrated_by_some_of_them(mlp, monkeypatch):
    found = {}
    for most in (1024, 1):
        monkeypatch.setattr(checking, "_MOST_CALIBRATING", most)
        found[most] = coar.attribute(mlp.model, [mlp.batch], ablated_fraction=0.1, progress=False)
    assert torch.equal(found[1024].weights, found[1].weights) and torch.equal(found[1024].bias, found[1].bias)
    kept = torch.ones(1, len(found[1].components), dtype=torch.bool).index_fill_(1, torch.tensor([0, 9]), False)
    intervals = [one.predict(kept, level=0.8) for one in found.values()]
    assert all(torch.isfinite(torch.as_tensor(side)).all() for interval in intervals for side in interval)


def test_two_sets_of_one_example_set_no_scale():
    predicted = torch.tensor([[0.0], [1.0]])
    assert checking._scale(predicted, 3 * predicted) == (1.0, checking._SCALE_PRIOR)
    several = predicted.expand(2, 40)
    scale, uncertain = checking._scale(several, 3 * several)
    assert scale == pytest.approx(3.0) and uncertain == pytest.approx(0.0, abs=1e-3)


def test_sets_of_examples_that_could_not_be_read_are_theirs():
    assert [checking._row(example, [1, 4]) for example in (0, 2, 3, 5)] == [0, 1, 2, 3]


def test_the_facts_are_recorded(demo_attributions):
    facts = demo_attributions.provenance.checked
    assert facts["correlation"] > 0.7 and facts["decisions"] > 0.7 and facts["n_sets"] == 20
    assert facts["unablated"] > facts["output"]
    assert demo_attributions.provenance.warnings == ()
    line = checking.said(facts, 0.05)
    assert f"{facts['decisions']:.0%} of the decisions" in line and f"{facts['output']:.3g}" in line


def test_a_fraction_that_leaves_no_model_is_said(demo_pair, caplog):
    model, batches = demo_pair
    few = [data.rows(data.as_batch(next(iter(batches))), 0, 4)]
    found = coar.attribute(
        model, few, method=coar.PathGradient(rounds=2, n_flips=0), ablated_fraction=0.5, progress=False
    )
    assert found.provenance.checked["decisions"] < 0.25
    assert any("decisions are left" in line for line in found.provenance.warnings)
    assert "smaller ablated_fraction" in caplog.text


def test_warnings_say_what_to_do():
    bad = {"decisions": 0.0, "unablated": 3.6, "output": -9.6, "correlation": 0.2}
    lines = checking.warnings_of(bad, 0.1, 0.05, "something else")
    assert len(lines) == 3 and all("take" in line for line in lines)
    assert "3.6" in lines[0] and "-9.6" in lines[0] and "0.05" in lines[0]
    assert checking.warnings_of({"decisions": 0.6, "correlation": 0.8}, 0.9, 0.05, "") == ()
    assert checking.warnings_of(None, None, 0.05, "") == () and checking.warnings_of(None, math.nan, 0.05, "") == ()


def test_strong_sets_that_do_not_do_what_is_forecast_are_said():
    """Sets that should raise the margin most hardly did, and the more of them, the less; nothing was said."""
    which = torch.tensor([0, 1, 2]).repeat(40)
    fallen = torch.tensor([9.0, 2.0, -1.0]).repeat(40)
    misses = torch.tensor([9.0, 0.5, 1.5]).repeat(40)
    facts = checking._explained(which, misses, fallen)
    assert facts == pytest.approx({"lower": 0.75, "raise": -0.5})
    (line,) = checking.warnings_of(facts, None, 0.05, "")
    assert "raise the output" in line and "hf_coar.ablate" in line
    assert checking._explained(which[:30], misses[:30], fallen[:30]) == {}


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_nobody_is_told_to_take_what_was_taken(name):
    """Leave-one-out that predicts little was told to take leave-one-out."""
    method = ESTIMATORS[name]
    assert f"{method.__name__}()" not in method.better and ("rounds" in method.better) <= hasattr(method, "rounds")


def test_checks_are_not_the_masks_of_an_evaluation():
    assert sampling.CHECKS not in (sampling.EVALUATION, sampling.MASKS, sampling.PATHS)


def test_that_nothing_changes_the_output_is_told(caplog):
    """Weights of 0, forecasts without an error, all decisions kept: all of it true, and of no use to anybody."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = {"x": torch.randn(8, 4), "labels": torch.zeros(8, dtype=torch.long)}
    for dead in (False, True):
        with torch.no_grad():
            model[2].weight.mul_(0.0 if dead else 1.0)
        caplog.clear()
        with caplog.at_level("WARNING", "hf_coar"):
            found = coar.attribute(model, [batch], progress=False)
        assert (found.provenance.checked["changed"] == 0) == dead == bool((found.weights[:] == 0).all())
        assert ("changes the output of any example: it does not depend on them" in caplog.text) == dead


def test_intervals_grow_with_the_distance_from_what_was_checked():
    """On a small ViT 60 % of random sets of eight times the fitted size lay inside intervals of 95 %."""
    forecast = Forecast(torch.tensor([10.0]), torch.zeros(0, dtype=torch.long), torch.zeros(1, 0))
    kept = torch.ones(3, 100)
    kept[0, :10], kept[1, :40], kept[2, :80] = 0, 0, 0
    assert forecast.times(kept, 0.1).flatten().tolist() == pytest.approx([1, 2, 4])
    own = kept[:, None].repeat(1, 2, 1)
    assert torch.equal(forecast.times(own, 0.1), forecast.times(kept, 0.1).repeat(1, 2))
    calibrated = replace(forecast, calibration=Calibration(spread=(1.0, 0.0, 0.0), scores=(1.0,) * 19))
    known = Known(coar.find_components(nn.Linear(2, 100)), torch.ones(1, 100), torch.zeros(1), None, calibrated, 0.1)
    _, low, high = known.outputs(kept, 0.95)
    norms = forecast.norms(known.weights, None, kept)
    assert ((high - low) / 2 / norms).flatten().tolist() == pytest.approx([1, 2**0.75, 4**0.75])


def test_distant_sets_teach_how_intervals_grow():
    """Of a GPT-2's random sets four times as large as near ones half were inside intervals that a constant widened."""
    generator = torch.Generator().manual_seed(0)
    count, spread = 400, (1.0, 0.0, 0.0)
    norms, times = torch.ones(count), 1.25 + 8 * torch.rand(count, generator=generator)
    strong = torch.arange(count) % 2 == 0
    noise = torch.rand(count, generator=generator)
    near = Calibration(spread=spread, scores=tuple(torch.linspace(0.05, 1, 20).tolist()))
    of_all = said(torch.zeros(count), norms, strong)
    for power, until in ((1.5, 1e6), (2.0, 2.0)):
        measured = noise * times.clamp_max(until) ** torch.where(strong, 0.0, power)
        found = near.reaching(of_all, measured, times, 0.5)
        assert found.growth[0] == pytest.approx(power, abs=0.2) and found.growth[1] < 0.1 and found.reach == 0.5
        assert found.until[0] == until
        inside = measured <= found.quantile(0.95) * found.widening(of_all, times)
        assert inside[strong].all() and 0.93 < float(inside[~strong].float().mean()) < 0.98
    six, none = torch.arange(count) < 6, torch.zeros(count).bool()
    few = near.reaching(of_all.at(six), measured[six], times[six], 0.5)
    assert min(few.growth) >= 0.75  # what a constant says, and as much as any of them wants
    assert near.reaching(of_all.at(none), measured[none], times[none], 0.5) == near


class Wreck(torch.nn.Module):
    """Gives no numbers as soon as a third of its neurons are gone."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = torch.nn.Linear(6, 40, bias=False), torch.nn.Linear(40, 3)

    def forward(self, x):
        h = self.inner(x).tanh()
        few = h.count_nonzero(1) < 28
        return self.head(h).masked_fill(few[:, None], math.nan)


def test_where_half_a_model_gives_no_numbers_intervals_are_of_near_sets(caplog):
    """One set of these, of forty, took all intervals away."""
    torch.manual_seed(0)
    model, batch = Wreck().eval(), {"x": torch.randn(8, 6), "labels": torch.arange(8) % 3}
    components = coar.find_components(model, exclude=["head"])
    with caplog.at_level("WARNING", "hf_coar"):
        found = coar.attribute(
            model, [batch, batch], components, method="path_gradient", ablated_fraction=0.05, progress=False
        )
    assert "how intervals grow with the size of a set is not measured" in caplog.text
    calibration = found.forecast.calibration
    assert calibration.scores and calibration.reach == calibration.layers == 0
    assert calibration.growth == (0.75, 0.75)
    kept = torch.ones(1, 40)
    kept[0, :3] = 0
    found.predict(kept, level=0.95)


@pytest.mark.parametrize(
    ("name", "value"),
    [("growth", [1.0]), ("growth", [-1.0, 1.0]), ("growth", [1.0, 1e300]), ("until", [0.5, 2.0]), ("until", [2, 1e300]),
     ("reach", 1.5), ("reach", None), ("layers", -1.0), ("layers", 1e9)],
)  # fmt: skip
def test_growth_that_makes_no_sense_is_damage(name, value, demo_attributions, tmp_path):
    demo_attributions.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["forecast"]["calibration"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(coar.CoarError, match="forecast of these attributions is damaged"):
        coar.Attributions.from_pretrained(tmp_path)


def test_forecasts_of_before_distant_sets_grow_by_the_constant(demo_attributions, tmp_path):
    demo_attributions.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["forecast"]["calibration"]["reach"] == 0.5
    for name in ("growth", "until", "reach", "layers"):
        del config["forecast"]["calibration"][name]
    path.write_text(json.dumps(config))
    found = coar.Attributions.from_pretrained(tmp_path).forecast.calibration
    assert (found.growth, found.until, found.reach, found.layers) == ((0.75, 0.75), Calibration.until, 0.0, 0.0)


def test_strong_sets_are_checked_as_far_as_intervals_are_said_to_hold():
    """They were checked up to half the size from which a warning tells that intervals are extrapolated."""
    weights, sets = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)), checking.Sets(0, 0.05)
    sizes = [(~sets.kept(weights, range(300), number)).sum(1) for number in (1, 4, 6)]
    assert all(one.min() < 3 and 38 <= one.max() <= 40 for one in sizes)


def of_first_layers(found: coar.Attributions, count: int) -> torch.Tensor:
    kept = torch.ones(len(found.components), dtype=torch.bool)
    kept[: sum(found.components.sizes()[:count])] = False
    return kept


def test_whole_layers_have_intervals_of_their_own(demo_attributions, caplog, monkeypatch):
    """Of some none of the examples were inside intervals of 95 % that random and strong sets had taught."""
    found, count = demo_attributions, len(demo_attributions.components)
    learnt = found.forecast.calibration
    assert learnt.layers >= 1
    wide = replace(found.forecast, calibration=replace(learnt, layers=1e3))
    random = torch.rand(20, count, generator=torch.Generator().manual_seed(0)) > 0.1
    strongest = torch.ones(count, dtype=torch.bool)
    strongest[found.weights[0].topk(20).indices] = False
    sets = torch.cat([random, strongest[None], of_first_layers(found, 1)[None]])
    with caplog.at_level("WARNING", "hf_coar"):
        widths = [torch.sub(*reversed(found.predict(sets, level=0.95)[1:]))]
        monkeypatch.setattr(found, "forecast", wide)
        widths.append(torch.sub(*reversed(found.predict(sets, level=0.95)[1:])))
        found.without([0], level=0.95)
    assert "take most of" not in caplog.text
    assert torch.equal(widths[0][:-1], widths[1][:-1])
    assert (widths[1][-1] > 10 * widths[0][-1]).all()


def test_several_layers_are_told_of(demo_attributions, caplog, monkeypatch):
    """Nothing is measured of them; nor of single ones where few examples were."""
    found = demo_attributions
    kept = torch.stack([of_first_layers(found, 0), of_first_layers(found, 2)])
    with caplog.at_level("WARNING", "hf_coar"):
        found.predict(kept)
        assert not caplog.text
        found.predict(kept, level=0.95)
        first = found.components.groups[0].module
        assert f"1 of 2 sets take most of several layers (such as {first})" in caplog.text
        caplog.clear()
        found.without((~kept[1]).nonzero().flatten().tolist())
        assert "1 of 1 sets take most of several layers" in caplog.text
        caplog.clear()
        unknown = replace(found.forecast, calibration=replace(found.forecast.calibration, layers=0.0))
        monkeypatch.setattr(found, "forecast", unknown)
        found.predict(of_first_layers(found, 1), level=0.95)
    assert f"eight examples or more): 1 of 1 sets take most of a layer (such as {first})" in caplog.text


def test_the_strongest_of_one_example_are_told_of_where_others_are_asked(demo_attributions, caplog):
    """Nothing like it is measured; of small nets 62 to 84 % were inside intervals of 95 %."""
    found, count = demo_attributions, len(demo_attributions.components)
    random = torch.rand(20, count, generator=torch.Generator().manual_seed(0)) > 0.05
    strongest = torch.ones(1, count, dtype=torch.bool)
    strongest[0, found.weights[2].topk(40).indices] = False
    with caplog.at_level("WARNING", "hf_coar"):
        found.predict(random, level=0.95)
        found.predict(strongest)
        gone = (~strongest[0]).nonzero().flatten().tolist()
        found.without(gone, example=2)
        found.without([gone[0]])  # which was measured alone
        assert not caplog.text
        found.predict(torch.cat([random, strongest]), level=0.95)
        assert "1 of 21 sets hold the strongest of some examples" in caplog.text
        caplog.clear()
        found.without(gone)
        assert "1 of 1 sets hold the strongest of some examples" in caplog.text


def test_few_small_random_sets_are_told_to_hold_an_examples_strongest(caplog):
    """One of five may be the strongest by chance, and take half of what five can: a fifth of these was told of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 4)).eval()
    batch = {"x": torch.randn(12, 16), "labels": torch.arange(12) % 4}
    method = coar.baselines.LeaveOneOut(check_masks=20)
    found = coar.attribute(model, [batch], method=method, ablated_fraction=0.05, progress=False)
    kept = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) > 0.05
    with caplog.at_level("WARNING", "hf_coar"):
        found.predict(kept, level=0.8)
    told = re.search(r"(\d+) of 100 sets hold the strongest", caplog.text)
    assert told is None or int(told[1]) <= 5


def test_a_layer_that_is_half_of_a_model_is_one(caplog):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 30), torch.nn.ReLU(), torch.nn.Linear(30, 30)).eval()
    batch = {"x": torch.randn(7, 5), "labels": torch.arange(7)}
    found = coar.attribute(model, [batch], method="path_gradient", progress=False)
    kept = torch.ones(3, 60)
    kept[0, :30], kept[1, ::2], kept[2] = 0, 0, 0
    for row, told in zip(kept, (True, False, False), strict=True):
        caplog.clear()
        with caplog.at_level("WARNING", "hf_coar"):
            found.predict(row, level=0.9)
        assert ("most of a layer (such as 0)" in caplog.text) == told


def test_some_fresh_sets_are_whole_layers():
    layers = [Layer("a", 0, 10), Layer("b", 12, 40)]
    sets, weights = checking.Sets(0, 0.05, layers=layers), torch.randn(64, 50)
    gone = ~sets.kept(weights, range(64), 6)
    wanted = {tuple(range(start, stop)) for _, start, stop in layers}
    assert {tuple(row.nonzero().flatten().tolist()) for row in gone} == wanted
    assert torch.equal(gone[5:7], ~sets.kept(weights[5:7], [5, 6], 6))
    assert [number for number in range(20) if sets.is_layer(number)] == [6, 16]
    assert not replace(sets, reaching=False).is_layer(6) and not checking.Sets(0, 0.05).is_layer(6)


def test_sets_are_of_layers_where_they_are_mostly_that():
    layers, kept = [Layer("a", 0, 10), Layer("b", 20, 50)], torch.ones(6, 200)
    kept[0, :10] = kept[1, :8] = kept[2, :7] = kept[3, :50] = 0
    kept[4, :10], kept[4, 100:115] = 0, 0  # as strongest sets of all of a thin layer do
    kept[5] = 0
    assert taken(layers, kept).tolist() == [
        [True, False], [True, False], [False, False], [True, True], [False, False], [False, False]
    ]  # fmt: skip
    assert taken([], kept).shape == (6, 0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 7.0])
def test_the_factor_of_layers_is_what_they_teach(factor):
    count = 400
    generator = torch.Generator().manual_seed(3)
    of_all, few = said(torch.zeros(count), torch.ones(count)), torch.arange(count) < 15
    misses = torch.randn(2 * count, generator=generator)
    near = Calibration.learnt(of_all, misses[:count], torch.zeros(count).bool())
    found = near.for_layers(of_all, factor * misses[count:])
    assert found.layers == pytest.approx(max(1.0, factor), rel=0.25)
    half = found.quantile(0.95) * found.expected_miss(of_all) * found.layers
    assert 0.93 <= (factor * misses[count:].abs() <= half).float().mean() <= 1
    assert near.for_layers(of_all.at(few), misses[:15]).layers == 0


def test_intervals_of_larger_sets_than_were_checked_are_told(demo_attributions, caplog):
    found, count = demo_attributions, len(demo_attributions.components)
    checked = count // 2
    kept = torch.ones(2, count, dtype=torch.bool)
    kept[1, :checked] = False
    with caplog.at_level("WARNING", "hf_coar"):
        found.predict(kept, level=0.9)
        kept[1, : count - 2] = False
        found.predict(kept)
        found.without(list(range(count - 2)), level=None)
        assert "extrapolated" not in caplog.text
        found.predict(kept, level=0.9)
        assert f"up to {checked} components: for the 1 larger ones, of up to {count - 2}," in caplog.text
        caplog.clear()
        found.without(list(range(count - 2)))
    assert "extrapolated" in caplog.text


# ------------------------------------------------------------------------------------------------- a low correlation


def warned(predicted, measured):
    facts = checking._facts(predicted, measured, torch.zeros(predicted.shape[1]), None)
    return checking.warnings_of(facts, None, 0.05, "more rounds")


def test_one_value_that_is_missed_does_not_condemn_all():
    """Of 32 values with heavy tails the correlation was .43, and on a hundred masks .94."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(8, 4, generator=generator)
    measured = predicted + 0.2 * torch.randn(8, 4, generator=generator)
    measured[3, 1] -= 12
    (line,) = warned(predicted, measured)
    assert "which 32 values cannot tell from 0.8" in line and "judge by hf_coar.evaluate" in line


@pytest.mark.parametrize("truth", [0.0, -0.5])
def test_predictions_that_say_nothing_are_warned_of(truth):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        predicted = torch.randn(8, 32, generator=generator)
        (line,) = warned(predicted, truth * predicted + torch.randn(8, 32, generator=generator))
        assert line.endswith(" only; take more rounds")
