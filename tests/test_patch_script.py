"""The script that patches a language model, made tiny: all methods beside each other on the same fresh sets."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import patch_language_model as script  # noqa: E402
import patch_rivals  # noqa: E402

import hf_coar as coar  # noqa: E402


def answered(seed):
    """Three prompts of five tokens, each with an answer and a foil of one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (3, 6), generator=generator)
    batch = {}
    for prefix, last in (("", torch.tensor([1, 2, 3])), ("foil_", torch.tensor([4, 5, 6]))):
        ids = tokens.clone()
        ids[:, -1] = last
        labels = torch.full_like(ids, -100)
        labels[:, -1] = last
        batch |= {prefix + "input_ids": ids, prefix + "labels": labels, prefix + "attention_mask": torch.ones_like(ids)}
    return batch


@pytest.fixture(scope="module")
def measured():
    """The figures with the corrupted prompt's values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=20, intermediate_size=24, **sizes)).eval()
    args = argparse.Namespace(
        units="heads", peers=False, stand_ins=["patch"], rounds=2, pairs=3, fraction=0.25, sizes=(0.25, 0.5), masks=8
    )
    with coar.running(report=False):
        return dict(script.measure(model, answered(0), answered(1), args))


def test_methods_stand_beside_each_other(measured):
    entry = measured["patch"]
    methods = entry["methods"]
    assert {"path gradient, one pass", "path gradient, 2 rounds", "leave-one-out with pairs", "gradient"} <= set(
        methods
    )
    one_by_one = methods["leave-one-out with pairs"]
    assert one_by_one["passes"] == 1 + 8 + 3 and one_by_one["correlation"]["0.25"][0] > 0.9
    assert set(entry["at_equal_time"]) == {name for name in methods if name.startswith(("gradient", "integrated"))}
    text = script.patch_tables.table({"heads": {**ABOUT, "stand_ins": measured}}, script.__doc__)
    assert "| patch | leave-one-out with pairs | 12 |" in text and "same processor time" in text


ABOUT = {"n_prompts": 3, "prompt": "The", "fraction": 0.25, "n_masks": 8, "machine": "here"}


def test_the_picture_has_a_panel_a_stand_in(measured, tmp_path):
    figure = script.patch_tables.picture({"heads": {**ABOUT, "stand_ins": {**measured, "zero": measured["patch"]}}})
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["k, heads kept (log scale)"] * 2
    assert coar.plots.save(figure, tmp_path / "patching.png").stat().st_size > 5000


def test_units_may_have_fewer_stand_ins_than_others(measured):
    both = {**measured, "zero": measured["patch"]}
    of = {"heads": {**ABOUT, "stand_ins": both}, "neurons": {**ABOUT, "stand_ins": measured}}
    assert [axes.get_visible() for axes in script.patch_tables.picture(of).axes] == [True, True, True, False]


def test_gains_have_the_sign_of_who_predicts_better():
    true = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    gain, low, high = script.difference(true, -true, true)
    assert gain == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)
    assert script.difference(true, true, true) == [0, 0, 0]


def test_the_answer_is_read_where_it_is_predicted():
    assert patch_rivals.answers_of(answered(0)) == [(4, 1, 4), (4, 2, 5), (4, 3, 6)]


def test_what_is_not_installed_is_said():
    assert patch_rivals.missing(["torch", "no_such_peer"]) == ["no_such_peer"]
