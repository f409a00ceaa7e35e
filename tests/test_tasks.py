"""Tasks: for every kind of head the right output without a word, compared with the head's own loss or by hand."""

import copy
import random
import subprocess
import sys

import pytest
import torch
from exactness import zeroed_by_hand
from task_cases import CASES, made, rows

import hf_coar as coar
from hf_coar import models
from hf_coar.models import tasks


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_the_head_tells_the_task_and_its_output(case):
    model, batch = made(case)
    assert tasks.of(model).name == CASES[case].task
    assert tasks.bind(model, batch=batch).name == CASES[case].output


def test_the_output_is_what_one_works_out_by_hand(case):
    model, batch = made(case)
    with torch.no_grad():
        found = tasks.bind(model, batch=batch).of(model, batch)
        expected = CASES[case].by_hand(model, batch)
    assert found.shape == (4,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert expected.unique().numel() > 1


def test_an_example_alone_gives_what_it_gives_in_a_batch(case):
    model, batch = made(case)
    output = tasks.bind(model, batch=batch)
    with torch.no_grad():
        alone = torch.cat([output.of(model, row) for row in rows(batch)])
        assert alone.tolist() == pytest.approx(output.of(model, batch).tolist(), rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------- components and the output


def some_masks(n_components, n_masks=3):
    """The last one keeps all, the others lack a tenth of the components."""
    kept = torch.rand(n_masks, n_components, generator=torch.Generator().manual_seed(0)) > 0.1
    kept[-1] = True
    return kept


def test_components_reach_the_output_as_zeroing_by_hand_does(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    masks = some_masks(len(components))
    with torch.no_grad():
        for kept in masks:
            by_hand = output.of(zeroed_by_hand(model, components, kept), batch)
            with coar.ablate(model, components, kept, how="weights"):
                assert torch.allclose(output.of(model, batch), by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_hand, masked(model, components, output, batch, masks[:1].expand(4, -1)), atol=1e-4)


def masked(model, components, output, batch, kept):
    with torch.no_grad(), coar.ablate(model, components, kept):
        return output.of(model, batch)


def test_every_example_may_have_components_of_its_own(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    kept = some_masks(len(components))[[0, 1, 2, 0]]
    found = masked(model, components, output, batch, kept)
    alone = [masked(model, components, output, batch, row)[i] for i, row in enumerate(kept)]
    assert found.tolist() == pytest.approx(torch.stack(alone).tolist(), rel=1e-3, abs=1e-3)


# --------------------------------------------------------------------------------------------------- from end to end

RELOAD = """
import importlib, json, sys, torch
library, name, folder, values = sys.argv[1:]
loader = getattr(importlib.import_module(library), name)
model = loader.from_pretrained(folder)
assert not any(module.split(".")[0] == "hf_coar" for module in sys.modules)
torch.save(model.state_dict(), values)
"""


def reloaded(model, folder):
    """The weights of a saved model as its own library alone loads them, in a process without hf_coar."""
    names = [models.library(model), type(model).__name__, str(folder), str(folder / "state.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RELOAD, *names], check=True)
    return torch.load(folder / "state.pt")


METHOD = {"method": coar.PathGradient(rounds=6), "progress": False}


def end_to_end(case, tmp_path):
    """Attribute, evaluate, edit, save, load again; returns the correlation at a twentieth ablated."""
    model, batch = made(case)
    attributions = coar.attribute(model, [batch], **METHOD)
    assert attributions.provenance.output == CASES[case].output
    report = coar.evaluate(attributions, model, [batch], fractions=(0.05,), n_masks=20, progress=False)
    before = tasks.bind(model, batch=batch).of(model, batch)
    edited = coar.edit(model, attributions, decrease=[0], n_components=max(3, len(attributions.components) // 50))
    after = tasks.bind(edited, batch=batch).of(edited, batch)
    assert after[0] < before[0]
    models.save_model(edited, tmp_path)
    again = copy.deepcopy(model)
    again.load_state_dict(reloaded(edited, tmp_path))
    assert torch.equal(tasks.bind(again, batch=batch).of(again, batch), after)
    return report.correlation[0.05]


SAMPLE = random.Random(0).sample([name for name in CASES if name != "timm"], 5)


@pytest.mark.parametrize("name", SAMPLE)
def test_from_attribution_to_a_plain_reload(name, tmp_path):
    assert end_to_end(name, tmp_path) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*SAMPLE, "timm")])
def test_every_task_from_attribution_to_a_plain_reload(name, tmp_path):
    assert end_to_end(name, tmp_path) > 0.5
