"""Faint modules: what has no slope and still matters is said, and nothing else is."""

import logging

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar import demo
from hf_coar.estimators import choosing
from hf_coar.masking import MaskedModel
from hf_coar.runs.problem import Problem

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Routed(nn.Module):
    """Every example goes to the experts with the largest logits; with one, its weight is 1 but for a trifle."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen = chosen
        self.first, self.router, self.head = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 1)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        best = self.router(hidden).topk(self.chosen, dim=1)
        made = torch.stack([expert(hidden) for expert in self.experts], dim=1)
        picked = made.gather(1, best.indices[..., None].expand(-1, -1, 12))
        weights = best.values.softmax(1) + 1e-4 * best.values
        return self.head(torch.relu((picked * weights[..., None]).sum(1)))


def attributed(model, caplog, method=None, data=None):
    caplog.set_level(logging.WARNING)
    method = coar.PathGradient(rounds=2, check_masks=0) if method is None else method
    options = {"method": method, "ablated_fraction": 0.1, "progress": False}
    return coar.attribute(model.eval(), [{"x": X}] if data is None else data, output="first_value", **options)


@pytest.fixture(autouse=True)
def first_value():
    coar.outputs.register("first_value", unit="units", replace=True)(lambda logits, batch: logits[:, 0])


def test_a_router_of_the_best_alone_is_named_in_the_log_and_the_provenance(caplog, tmp_path):
    found = attributed(Routed(1), caplog)
    (warning,) = [line for line in found.provenance.warnings if "next to nothing" in line]
    assert "1 of 7 modules" in warning and "(router)" in warning and "include=[…]" in warning
    assert warning in caplog.text
    found.save_pretrained(tmp_path / "saved")
    assert "next to nothing" in (tmp_path / "saved" / "README.md").read_text()


def test_a_router_whose_weights_have_a_slope_is_not(caplog):
    assert not attributed(Routed(3), caplog).provenance.warnings
    assert "next to nothing" not in caplog.text


def test_what_is_ablated_one_by_one_needs_no_slope(caplog):
    found = attributed(Routed(1), caplog, coar.baselines.LeaveOneOut())
    router = torch.tensor([component.group.module == "router" for component in found.components])
    assert found.weights[:, router].abs().max() > 0.01
    assert "next to nothing" not in caplog.text


def test_a_layer_that_does_nothing_is_not_one(caplog):
    model = Routed(1)
    model.router.weight.data[:3] = 0  # with these biases, the fourth always is chosen
    model.router.bias.data = torch.tensor([-99.0, -99.0, -99.0, 99.0])
    attributed(model, caplog)
    assert "next to nothing" not in caplog.text


def test_the_demo_has_none(caplog):
    model, images = coar.load(demo.MODEL, demo.IMAGES, split="train[:4]", batch_size=4)
    caplog.set_level(logging.WARNING)
    coar.attribute(model, images, method=coar.PathGradient(passes=3), ablated_fraction=0.05, progress=False)
    assert "next to nothing" not in caplog.text


def test_faint_modules_that_say_what_they_do_hide_none(caplog):
    """A wide one adds up to much that is told, beside which a router would not be noticed."""

    class Beside(Routed):
        def __init__(self) -> None:
            super().__init__(1)
            self.plain = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))
            self.aside = nn.Linear(6, 6000)

        def forward(self, x):
            aside = 1e-4 * torch.relu(self.aside(x)).sum(1, keepdim=True)
            return super().forward(x) + 0.1 * sum(layer(x) for layer in self.plain) + aside

    (warning,) = attributed(Beside(), caplog).provenance.warnings
    assert "(router)" in warning and "1 of 12 modules" in warning


@pytest.mark.parametrize(("chosen", "name"), [(1, "leave_one_out"), (3, "path_gradient")])
def test_where_one_by_one_is_affordable_a_faint_module_decides(chosen, name, monkeypatch):
    monkeypatch.setattr(choosing, "_usual", lambda size: 40.0)
    monkeypatch.setattr(choosing, "_NOISE", -99.0)
    model = Routed(chosen).eval()
    masked = MaskedModel(model, coar.find_components(model))
    method, reasons = choosing.settled(Problem(masked, [{"x": X}], coar.outputs.get("first_value"), 0.1, 0), None)
    reason = reasons["method"]
    assert method.name == name and ("arrives at gates" in reason) == (chosen == 1)


def test_a_model_in_double_precision_gives_what_it_gives_in_single(caplog):
    single, double = Routed(3), Routed(3).double()
    expected = attributed(single, caplog).weights
    found = attributed(double, caplog, data=[{"x": X.double()}]).weights
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
