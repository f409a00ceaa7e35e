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


def probability(logits, batch):
    """Of a class that is never likely."""
    return (logits - torch.tensor([8.0, 0, 0])).softmax(-1)[:, 0]


def thousandth(logits, batch):
    return 1e-3 * (logits[:, 0] - logits[:, 1])


@pytest.mark.parametrize("function", [probability, thousandth])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_outputs_of_large_logits_are_told_from_rounding_of_these(function, dtype):
    """Up to 1 they were compared as if they were differences of logits: of 1e-3 no tenth was seen."""
    batch = {**data()[0], "inputs": data()[0]["inputs"].to(dtype)}
    output, size = outputs.Output("own", "", function), {probability: 2.0, thousandth: 10.0}[function]
    steady = Small(size).eval().to(dtype)
    assert outputs.Output("own", "", function).of(steady, batch).abs().max() < 0.03
    checks.check_repeats(steady, output, batch)
    noise = {torch.float32: 3e-3, torch.bfloat16: 0.3}[dtype]
    with pytest.raises(ModelError, match="stochastic forward"):
        checks.check_repeats(Small(size, noise=noise).eval().to(dtype), output, batch)
    with pytest.raises(ModelError, match=r"gates of 1 of .* modules of Small: stopped"):
        checks.check_reached(MaskedModel(steady, coar.find_components(steady)), output, batch)


class Rounding(Small):
    """Logits that are off by the last bits, as of kernels that add up in any order."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * (1 + 1e-7 * torch.randn(3))


@pytest.mark.parametrize("function", [probability, thousandth, lambda logits, batch: logits[:, 0] - logits.max(-1)[0]])
def test_rounding_of_logits_is_no_noise(function):
    for seed in range(20):
        torch.manual_seed(seed)
        checks.check_repeats(Rounding(30.0).eval(), outputs.Output("own", "", function), data()[0])


def test_outputs_that_are_all_zero_repeat_themselves():
    model, nothing = net(), outputs.Output("nothing", "", lambda logits, batch: 0 * logits[:, 0])
    checks.check_repeats(model, nothing, data()[0])
    assert checks.blocked(MaskedModel(model, coar.find_components(model)), nothing, data()[0]) == []
