"""A law: outputs times a power of two have attributions, errors and intervals times it."""

import functools

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar.models import outputs
from hf_coar.runs import units

METHODS = {
    "default": coar.PathGradient(),
    "leave-one-out": coar.baselines.LeaveOneOut(check_masks=20),
    "pairs": coar.baselines.LeaveOneOut(pairs_among=4, check_masks=20),
    "regression": coar.Regression(n_masks=200),
}
OF_ALL = ("default", "leave-one-out", "pairs")  # which have intervals
POWERS = (-90, -60, -30, -17, -16, 16, 17, 30, 60, 90)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 3)).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return [{"inputs": torch.randn(12, 6, generator=generator), "labels": torch.arange(12) % 3}]


def times(power, output="margin"):
    of = outputs.get(output)

    def scaled(logits, batch):
        return of.function(logits, batch) * 2.0**power

    return outputs.Output("scaled", of.unit, scaled, of.boundary)


@functools.cache
def attributed(method, power):
    return coar.attribute(
        net(), data(), output=times(power), method=METHODS[method], ablated_fraction=0.05, progress=False
    )


def sets(n_components):
    kept = torch.rand(12, n_components, generator=torch.Generator().manual_seed(2)) > 0.05
    kept[0, 3:], kept[1, :4], kept[2, ::3], kept[3] = True, False, False, True
    return kept


def same_but_for(power, found, expected):
    """Equal, to the last digits of what is not exact where the unit is another one."""
    if expected is None:
        assert found is None
        return
    found = found.double() * 2.0**-power
    assert torch.allclose(found, expected.double(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_times_a_power_of_two_have_attributions_times_it(method, power):
    """Squares of float32 went under below 1e-19 and over above 1e19, and floors of 1e-12 were as large as effects."""
    found, expected = attributed(method, power), attributed(method, 0)
    for name in ("weights", "standard_errors", "bias"):
        same_but_for(power, getattr(found, name), getattr(expected, name))
    kept = sets(len(found.components))
    same_but_for(power, found.predict(kept), expected.predict(kept))
    if method in OF_ALL:
        for one, other in zip(found.predict(kept, level=0.95), expected.predict(kept, level=0.95), strict=True):
            same_but_for(power, one, other)
        value, low, high = found.predict(kept[1:3], level=0.95)
        assert bool((low < value).all()) and bool((value < high).all())
    assert found.provenance.boundary == expected.provenance.boundary
    checked, known = found.provenance.checked or {}, expected.provenance.checked or {}
    of_outputs = {name: 2.0**-power if name in ("output", "unablated") else 1.0 for name in known}
    assert {name: value * of_outputs[name] for name, value in checked.items()} == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize("power", [-60, 60])
def test_attributions_of_any_unit_are_judged_and_saved_alike(power, tmp_path):
    found, expected = attributed("default", power), attributed("default", 0)
    reports = [
        coar.evaluate(one, net(), data(), n_masks=20, output=times(of), progress=False)
        for one, of in ((found, power), (expected, 0))
    ]
    assert reports[0].correlation == pytest.approx(reports[1].correlation, rel=1e-4)
    found.save_pretrained(tmp_path / "saved")
    kept, again = sets(len(found.components)), coar.Attributions.from_pretrained(tmp_path / "saved")
    for one, other in zip(again.predict(kept, level=0.95), found.predict(kept, level=0.95), strict=True):
        assert torch.equal(one, other)


def test_units_of_usual_outputs_are_one():
    for values in ([0.0, 0.0], [3.0, -70.0], [1e-4], [torch.nan, 2.0], [torch.inf], []):
        assert units.unit_of(torch.tensor(values)) == 1
    assert units.unit_of(torch.tensor([3.0, -(2.0**40)])) == 2.0**41
    assert units.unit_of(torch.tensor([0.0, 2.0**-40, torch.nan])) == 2.0**-39
    of_margins = times(-40)
    assert units.measured_in(of_margins, 1.0) is of_margins
    assert units.measured_in(outputs.Output("x", "", lambda *_: torch.ones(1), 2.0), 4.0).boundary == 0.5
