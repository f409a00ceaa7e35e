"""Captured masked passes: the same up to rounding as the model's own code under every mask, or no graph at all."""

import logging

import pytest
import timm
import torch
from test_captured import FEW, Looking, bert, gpt2, resnet, speech, vit
from torch import nn

import hf_coar as coar
from hf_coar.masking import MaskedModel
from hf_coar.models import calling, outputs
from hf_coar.runs import captured
from hf_coar.runs.engine import Part, autocast
from hf_coar.runs.measuring import MaskedPasses
from hf_coar.runs.sampling import Masks

N_MASKS = captured.MASKED.least + 4


def mobilenet():
    model = timm.create_model("mobilenetv2_035", num_classes=5).eval()
    return model, [{"x": torch.randn(FEW, 3, 32, 32), "labels": torch.arange(FEW)} for _ in range(2)], "margin"


def measured(model, batches, output, compile, components=None, n_masks=N_MASKS, seed=0):
    """Outputs [masks, examples] of all batches, and the passes that they came from."""
    model.requires_grad_(False)
    masked = MaskedModel(model, components or coar.find_components(model))
    masks = Masks(len(masked), 0.05, n_masks, seed, 0)
    part = Part("masks", 0, n_masks, float(n_masks), n_masks)
    with coar.running(compile=compile):
        passes = MaskedPasses(masked, outputs.get(output), masks)
        found = [passes.compute(batch, 0, part)["outputs"] for batch in batches]
    return torch.cat(found), passes._passes


def assert_close(found, expected):
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert float(expected.std(1).min()) > 0, "masks make a difference"


@pytest.mark.parametrize("case", [resnet, gpt2, mobilenet, vit, bert, speech])
def test_masked_passes_are_the_same(case, uncompiled):
    torch.manual_seed(0)
    model, batches, output = case()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected, _ = measured(model, batches, output, compile=False)
    found, passes = measured(model, batches, output, compile=True)
    assert_close(found, expected)
    assert passes.replays and uncompiled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled_they_are_the_same_up_to_rounding():
    torch.manual_seed(0)
    model, batches, output = vit()
    expected, _ = measured(model, batches, output, compile=False)
    found, passes = measured(model, batches, output, compile=True)
    assert_close(found, expected)
    assert passes.replays and not torch.equal(found, expected)


def test_so_they_are_by_a_backend_of_ones_own():
    torch.manual_seed(0)
    model, batches, output = gpt2()
    expected, _ = measured(model, batches, output, compile=False)
    found, passes = measured(model, batches, output, compile="aot_eager")
    assert_close(found, expected)
    assert passes.replays


def test_by_auto_no_graph_is_made_on_a_cpu():
    _, passes = measured(*resnet(), compile="auto")
    assert not passes._shapes


def test_what_stands_in_is_read_from_the_weights(uncompiled):
    torch.manual_seed(0)
    model, batches, output = resnet()
    components = coar.find_components(model, ablation=coar.Mean(batches))
    expected, _ = measured(model, batches, output, False, components)
    found, passes = measured(model, batches, output, True, components)
    assert_close(found, expected)
    assert passes.replays


def test_masks_that_go_by_hooks_run_as_own_code(uncompiled):
    torch.manual_seed(0)
    model, batches, output = resnet()
    values = torch.rand(len(coar.find_components(model)))
    components = coar.find_components(model, ablation=coar.Values(values))
    model.requires_grad_(False)
    assert not MaskedModel(model, components).is_in_weights(torch.ones(len(components)).bool())
    expected, _ = measured(model, batches, output, False, components)
    found, passes = measured(model, batches, output, True, components)
    assert torch.equal(found, expected) and not passes._shapes


def test_lower_precision(uncompiled):
    torch.manual_seed(0)
    model, batches, output = vit()
    with autocast(torch.device("cpu"), "bfloat16"), coar.running(dtype="bfloat16"):
        expected, _ = measured(model, batches, output, compile=False)
        found, passes = measured(model, batches, output, compile=True)
    plain, _ = measured(model, batches, output, compile=False)
    assert torch.equal(found, expected) and passes.replays and not torch.equal(plain, expected)


def test_a_weight_that_is_shared_is_read_where_it_is_masked(uncompiled):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()).relu())

    torch.manual_seed(0)
    batches = [{"x": torch.randn(FEW, 8), "labels": torch.zeros(FEW).long()}]
    model = Tied().eval()
    components = coar.find_components(model)
    expected, _ = measured(model, batches, "margin", False, components)
    found, passes = measured(model, batches, "margin", True, components)
    assert_close(found, expected)
    assert passes.replays


def test_a_model_that_looks_at_values_says_so_and_runs_as_its_own_code(caplog):
    torch.manual_seed(0)
    model = Looking().eval()
    batches = [{"x": torch.rand(FEW, 6) - at, "labels": torch.zeros(FEW).long()} for at in (0.0, 1.0)]
    expected, _ = measured(model, batches, "margin", compile=False)
    with caplog.at_level(logging.WARNING, "hf_coar"):
        found, passes = measured(model, batches, "margin", compile=True)
    assert torch.equal(found, expected) and not passes._possible
    assert "masked passes of Looking run as its own code: what it does depends on values" in caplog.text


@pytest.mark.parametrize("later", [3.0, torch.nan])
def test_a_graph_that_is_right_no_more_says_so_and_own_code_runs(later, caplog, uncompiled):
    torch.manual_seed(0)
    model, batches, _ = vit()
    held = {"weight": torch.tensor(2.0)}
    output = outputs.Output("weighted", "logits", lambda logits, batch: logits[:, 0] * held["weight"])
    masked = MaskedModel(model.requires_grad_(False), coar.find_components(model))
    part, found = Part("masks", 0, N_MASKS, float(N_MASKS), N_MASKS), []
    with coar.running(compile=True), caplog.at_level(logging.WARNING, "hf_coar"):
        passes = MaskedPasses(masked, output, Masks(len(masked), 0.05, N_MASKS, 0, 0))
        for weight, batch in zip((2.0, later), batches, strict=True):
            held["weight"] = torch.tensor(2.0)
            wanted = weight / 2 * measured(model, [batch], output, compile=False)[0]
            held["weight"] = torch.tensor(weight)
            if not wanted.isfinite().all():
                with pytest.raises(coar.errors.NonFiniteOutputError):
                    passes.compute(batch, 0, part)
                continue
            found.append((passes.compute(batch, 0, part)["outputs"], wanted))
    for one, other in found:
        assert_close(one, other)
    assert not passes._passes._possible and "masked passes of VisionTransformer run as its own code" in caplog.text


def test_passes_are_heard_of_once(uncompiled):
    counts = []
    for compile in (False, True):
        heard = []
        with calling.heard(lambda heard=heard: heard.append(1)):
            measured(*vit(), compile)
        counts.append(len(heard))
    assert counts == [2 * N_MASKS] * 2
