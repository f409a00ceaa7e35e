"""Detached shares: what the gradient leaves out of modules that it reaches is said, and nothing else is."""

import logging

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar import demo

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Branched(nn.Module):
    """Two ways from the first layer on, of which one may be closed to the gradient, in whole or in part."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first, self.one, self.other = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        one, other = self.one(hidden), self.other(hidden.detach() if self.how == "trunk" else hidden)
        if self.how == "half":
            one = torch.cat([one[:, :16].detach(), one[:, 16:]], dim=1)
        if self.how == "gate":
            with torch.no_grad():
                gate = torch.sigmoid(4 * hidden)
            one = one * gate
        return self.head(torch.tanh(one + other))


def warnings_of(model, caplog, **options):
    caplog.set_level(logging.WARNING)
    options = {"method": coar.PathGradient(rounds=0), "ablated_fraction": 0.1, "progress": False, **options}
    found = coar.attribute(model.eval(), [{"x": X}], output=lambda logits, batch: logits[:, 0], **options)
    return [line for line in found.provenance.warnings if "leaves out" in line]


@pytest.mark.parametrize(("how", "names"), [("trunk", "(first)"), ("half", "one")])
def test_a_branch_that_is_detached_in_part_is_told(how, names, caplog):
    """Something arrives at the gates of every module, and so nothing was said."""
    (line,) = warnings_of(Branched(how), caplog)
    assert names in line and "of 4 modules" in line and line in caplog.text


def test_what_lets_all_of_the_gradient_through_is_not(caplog):
    assert not warnings_of(Branched(), caplog)


def test_a_method_that_needs_no_gradient_is_not_warned_of(caplog):
    assert not warnings_of(Branched("trunk"), caplog, method=coar.baselines.LeaveOneOut())


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_outputs_of_any_size(unit, caplog):
    model = Branched()
    for parameter in model.head.parameters():
        parameter.data.mul_(unit)
    assert not warnings_of(model, caplog)
    model.how = "trunk"
    assert warnings_of(model, caplog)


def test_large_outputs_that_hardly_depend_on_any_component_are_rounding(caplog):
    model = Branched()
    model.head.weight.data.mul_(1e-5)
    model.head.bias.data.fill_(100.0)
    assert not warnings_of(model, caplog)


def test_the_demo_has_none(caplog):
    model, images = coar.load(demo.MODEL, demo.IMAGES, split="train[:4]", batch_size=4)
    caplog.set_level(logging.WARNING)
    coar.attribute(model, images, method=coar.PathGradient(rounds=0), ablated_fraction=0.05, progress=False)
    assert "leaves out" not in caplog.text
