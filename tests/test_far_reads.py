"""Far reads: what components are worth where much of the model is gone, and forecasts of strong sets by them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar.attributions.far import Far
from hf_coar.attributions.forecast import Forecast
from hf_coar.estimators import checking, far_reads
from hf_coar.estimators.gates import GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs.problem import Estimates, Size

WEIGHTS = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
FAR = Far(torch.tensor([0, 2]), torch.tensor([[1.0, -2.0]]), reach=0.6, ratio=0.5)


def forecast(far=FAR):
    """Nothing is flipped, and single effects are the weights: what is left is what far reads do."""
    return Forecast(torch.tensor([10.0]), torch.zeros(0, dtype=torch.long), torch.zeros(1, 0), far=far)


def gone(*indices):
    return torch.ones(1, 4).index_fill(1, torch.tensor(indices), 0.0)


@pytest.mark.parametrize(
    ("indices", "beside"),
    [((0,), 0.0), ((2, 3), 2 * 0.2 * 0.1 / 0.3), ((0, 1), 2 * 0.4 * 0.3 / 0.7), ((0, 1, 2, 3), 1 - 0.3)],
)
def test_what_is_gone_beside_a_component(indices, beside):
    assert float(Far.beside(WEIGHTS, 1 - gone(*indices))) == pytest.approx(beside, abs=1e-6)


def test_a_component_alone_keeps_its_single_effect_however_strong():
    assert float(forecast().drops(WEIGHTS, gone(0), 0.05)) == pytest.approx(4.0)


def test_a_set_lies_between_near_and_far_by_its_share():
    near, far = 4.0 + 3.0, 1.0 + 0.5 * 3.0
    share = (2 * 0.4 * 0.3 / 0.7 - 0.1) / (0.6 - 0.1)
    found = forecast().drops(WEIGHTS, gone(0, 1), 0.1)
    assert float(found) == pytest.approx(near + share * (far - near), abs=1e-5)
    half = forecast(replace(FAR, trust=0.5)).drops(WEIGHTS, gone(0, 1), 0.1)
    assert float(half) == pytest.approx(near + share / 2 * (far - near), abs=1e-5)


def test_a_set_beyond_the_end_of_the_way_takes_far_effects_alone():
    assert float(forecast().drops(WEIGHTS, gone(0, 1, 2, 3), 0.1)) == pytest.approx(1.0 - 2.0 + 0.5 * (3 + 1))


def test_weights_that_are_all_zero_take_no_share():
    assert float(forecast().drops(torch.zeros(1, 4), gone(0, 1), 0.1)) == 0.0
    assert Far.sizes(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_scaled_weights_have_the_same_forecast():
    of = replace(forecast(), ratio=1.3)
    for kept in (gone(0, 1), gone(3), gone(1, 2, 3)):
        before, after = of.drops(WEIGHTS, kept, 0.9), of.scaled(2.0).drops(2 * WEIGHTS, kept, 0.9)
        assert float(of.far.mixed(before, WEIGHTS, 1 - kept, 0.1)) == pytest.approx(
            float(of.scaled(2.0).far.mixed(before, 2 * WEIGHTS, 1 - kept, 0.1))
        )
        assert after.shape == before.shape


def test_in_a_linear_network_far_effects_are_the_effects():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20, bias=False), nn.Linear(20, 1, bias=False)).eval()
    components = coar.find_components(model, include=["0"])
    rounds = GateRounds(MaskedModel(model, components), outputs.get(lambda found, batch: found[:, 0]), 0.05, seed=0)
    x = torch.randn(3, 6)
    with torch.no_grad():
        wanted = (x @ model[0].weight.T) * model[1].weight[0]
    model.requires_grad_(False)
    apart = torch.zeros(3, 20, dtype=torch.bool)
    apart[:, 4] = True
    for kept in (None, apart):
        assert torch.allclose(rounds.along({"x": x}, range(3), 0.5, kept), wanted, atol=1e-5)


def test_way_and_number():
    assert far_reads.is_far(0.25) and not far_reads.is_far(0.3)
    (part,) = far_reads.parts(Size(1000, 0.05), avoids_outliers=True)
    assert part.cost == 10 and part.n_numbers == 2 * 200
    (part,) = far_reads.parts(Size(100_000, 0.05), avoids_outliers=False)
    assert part.cost == 9 and part.n_numbers == 2 * 1024


def judged_sets(far_truth):
    """Measured outputs of fresh sets that follow far effects, or near ones; the forecast that checks make of it."""
    torch.manual_seed(0)
    n, n_examples, count = 200, 12, 40
    weights, other = torch.randn(n_examples, n), torch.randn(n_examples, n)
    estimates = Estimates(weights, torch.zeros(n_examples, n))
    far = Far(torch.arange(n), other, 0.5, 1.0)
    plain = Forecast(torch.zeros(n_examples), torch.zeros(0, dtype=torch.long), torch.zeros(n_examples, 0))
    sets = checking.Sets(seed=5, fraction=0.05)
    of = replace(plain, far=far if far_truth else None)
    measured = torch.stack(
        [
            torch.stack(
                [
                    -of.at([e]).drops(weights[e][None], sets.kept(weights[e][None], [e], number).float(), 0.05)[0, 0]
                    for e in range(n_examples)
                ]
            )
            for number in range(count)
        ]
    )
    return checking._calibrated(sets, estimates, replace(plain, far=far), list(range(n_examples)), measured)[0]


def test_fresh_sets_say_whether_far_effects_are_to_be_trusted():
    assert judged_sets(far_truth=True).far.trust == 1.0
    assert judged_sets(far_truth=False).far is None


# ------------------------------------------------------------------------------------------------------ on real models


def test_a_model_that_overflows_far_away_keeps_its_weights(demo_pair, monkeypatch, caplog):
    model, batches = demo_pair
    few = [{name: value[:2] for name, value in next(iter(batches)).items()}]
    options = {"method": coar.PathGradient(2, check_masks=5), "ablated_fraction": 0.05, "progress": False}
    whole = coar.attribute(model, few, **options)
    monkeypatch.setattr(GateRounds, "along", lambda self, batch, *rest: torch.full((2, 832), torch.inf))
    found = coar.attribute(model, few, **options)
    assert found.forecast.far is None and "forecast by the weights alone" in caplog.text
    assert torch.equal(found.weights, whole.weights)


def test_saved_and_read_again(demo_attributions, tmp_path):
    assert demo_attributions.forecast.far is not None
    demo_attributions.save_pretrained(tmp_path)
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert torch.equal(loaded.forecast.far.effects, demo_attributions.forecast.far.effects)
    assert loaded.forecast.far.to_json() == demo_attributions.forecast.far.to_json()


@pytest.mark.parametrize(
    "damage", [{"reach": 2.0}, {"reach": 0.05}, {"trust": -1.0}, {"indices": [1, 2]}, {"ratio": "much"}]
)
def test_damaged_far_reads_are_refused(demo_attributions, damage):
    record = demo_attributions.provenance.to_json()
    record["forecast"] = {**record["forecast"], "far": {**record["forecast"]["far"], **damage}}
    provenance = replace(demo_attributions.provenance, forecast=record["forecast"])
    matrices, columns = demo_attributions.forecast.matrices(), {"unablated": demo_attributions.forecast.unablated}
    with pytest.raises(coar.CoarError, match="forecast of these attributions is damaged"):
        Forecast.from_rows(
            provenance, {name: coar.attributions.rows.as_rows(value) for name, value in matrices.items()}, columns
        )
