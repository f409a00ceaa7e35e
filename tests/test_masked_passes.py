"""How masks get into a forward pass: by what touches less memory, and with the same bits."""

import pytest
import torch
from test_captured import FEW, gpt2, vit
from torch import nn

import hf_coar as coar
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import MaskedPasses
from hf_coar.runs.sampling import Masks

N_MASKS = 5


def passed(monkeypatch, model, batches, output, compile="auto"):
    """Outputs of all masks, those by changed weights alone, and how the passes of the former went."""
    model.requires_grad_(False)
    masked = MaskedModel(model, coar.find_components(model))
    masks, part = Masks(len(masked), 0.05, N_MASKS, 0, 0), Part("masks", 0, N_MASKS, float(N_MASKS), N_MASKS)
    with torch.no_grad():
        expected = []
        for batch in batches:
            for kept in masks.rows(0, N_MASKS):
                with masked.ablated(kept, how="weights"):
                    expected.append(outputs.get(output).of(model, batch))
    how, ablated = [], MaskedModel.ablated

    def noted(self, kept, how_it_is="auto", **options):
        how.append(options.get("how", how_it_is))
        return ablated(self, kept, how[-1])

    monkeypatch.setattr(MaskedModel, "ablated", noted)
    with coar.running(compile=compile):
        passes = MaskedPasses(masked, outputs.get(output), masks)
        found = [passes.compute(batch, 0, part)["outputs"].T for batch in batches]
    return torch.cat(found), torch.stack(expected), how


def long_texts():
    model, _, output = gpt2()
    return model, [{"input_ids": torch.randint(0, 100, (FEW, 60))}], output


def test_columns_are_gated_where_few_positions_go_through(monkeypatch):
    torch.manual_seed(0)
    found, expected, how = passed(monkeypatch, *gpt2())
    assert torch.equal(found, expected)
    assert how == 2 * ["auto", *(N_MASKS - 1) * ["hooks"]], "the first pass of a batch tells"


@pytest.mark.parametrize(("case", "compile"), [(long_texts, "auto"), (vit, "auto"), (gpt2, "aot_eager")])
def test_elsewhere_weights_are_changed(monkeypatch, case, compile):
    torch.manual_seed(0)
    found, expected, how = passed(monkeypatch, *case(), compile=compile)
    assert torch.equal(found, expected)
    assert set(how) == {"auto"}


def test_what_hooks_cannot_reach_goes_by_weights(monkeypatch):
    torch.manual_seed(0)
    model, batches, output = gpt2()
    inner = model.transformer.h[0].mlp

    class Aside(nn.Module):
        """Reads the weight of its layer without running it."""

        def __init__(self, layer):
            super().__init__()
            self.c_fc = layer

        def forward(self, x):
            return x @ self.c_fc.weight + self.c_fc.bias

    inner.c_fc = Aside(inner.c_fc)
    found, expected, how = passed(monkeypatch, model, batches, output)
    assert torch.equal(found, expected)
    assert how == 2 * ["auto", "hooks", *(N_MASKS - 1) * ["auto"]]
