"""Checks before the first pass, of outputs of any size: a model repeats itself, and lets gradients through."""

import pytest
import torch
from test_units import data, net, times
from torch import nn

import hf_coar as coar
from hf_coar.errors import ModelError
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import checks


class Small(nn.Module):
    """Logits of any size, with noise, or with a layer that no gradient reaches."""

    def __init__(self, size: float, noise: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.stopped, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.size, self.noise = size, noise

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self.head(self.hidden(inputs).tanh() + self.stopped(inputs).detach())
        return self.size * (found + self.noise * torch.randn_like(found))


@pytest.mark.parametrize("size", [1e6, 1.0, 1e-6, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checks_are_as_strict_of_outputs_of_any_size(size, dtype):
    """Differences were compared in units of at least 1, so that of small outputs none was seen."""
    batch, margin = {**data()[0], "inputs": data()[0]["inputs"].to(dtype)}, outputs.get("margin")
    steady = Small(size).eval().to(dtype)
    checks.check_repeats(steady, margin, batch)
    with pytest.raises(ModelError, match="stochastic forward"):
        checks.check_repeats(Small(size, noise=0.3).eval().to(dtype), margin, batch)
    with pytest.raises(ModelError, match=r"gates of 1 of .* modules of Small: stopped"):
        checks.check_reached(MaskedModel(steady, coar.find_components(steady)), margin, batch)


@pytest.mark.parametrize("power", [0, -40, 40])
def test_an_output_in_small_units_of_a_model_that_draws_numbers_is_refused(power):
    with pytest.raises(ModelError, match="stochastic forward"):
        coar.attribute(Small(1.0, noise=0.3).eval(), data(), output=times(power), progress=False)


def test_outputs_that_are_all_zero_repeat_themselves():
    model, nothing = net(), outputs.Output("nothing", "", lambda logits, batch: 0 * logits[:, 0])
    checks.check_repeats(model, nothing, data()[0])
    assert checks.blocked(MaskedModel(model, coar.find_components(model)), nothing, data()[0]) == []
