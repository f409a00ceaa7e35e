"""Arguments of another kind than is wanted are told in a line of ours, before anything is run."""

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar.cli import editing

MODEL = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
DATA = [{"inputs": torch.eye(6), "labels": torch.arange(6) % 3}]
OPTIONS = {"method": coar.baselines.LeaveOneOut(), "progress": False}


@pytest.fixture(scope="module")
def attributions() -> coar.Attributions:
    return coar.attribute(MODEL, DATA, **OPTIONS)


class Holding:
    """As a pipeline or a trainer, it holds a model."""

    model = MODEL


EMPTY = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to("meta")
ID = "bert-base-uncased"
CASES = {
    "load a pipeline": (lambda a: coar.load(Holding(), DATA), "the module inside it, its .model, a Sequential"),
    "attribute a pipeline": (lambda a: coar.attribute(Holding(), DATA), "the module inside it, its .model"),
    "load a number": (lambda a: coar.load(3, DATA), "the model is a int, 3; give a module"),
    "attribute an id": (lambda a: coar.attribute(ID, DATA), f"the model is a str, '{ID}'; give .*load_model"),
    "components of an id": (lambda a: coar.find_components(ID), "the model is a str"),
    "ablate an id": (lambda a: coar.ablate(ID, a.components, [True] * 8).__enter__(), "the model is a str"),
    "evaluate an id": (lambda a: coar.evaluate(a, ID, DATA), "the model is a str"),
    "edit an id": (lambda a: coar.edit(ID, a, decrease=[0]), "the model is a str"),
    "forget of an id": (lambda a: coar.forget(ID, DATA, label=1), "the model is a str"),
    "undo a folder": (lambda a: coar.undo("edited", MODEL), "the model is a str"),
    "a granularity for components": (lambda a: coar.attribute(MODEL, DATA, "head"), "components is a str.*find_compon"),
    "a folder for attributions": (
        lambda a: coar.evaluate("run", MODEL, DATA),
        "attributions is a str.*from_pre",
    ),
    "a word for a mask": (lambda a: a.predict("all"), "kept is no tensor"),
    "no batch size": (lambda a: coar.attribute(MODEL, DATA, batch_size=0, **OPTIONS), "batch_size=0"),
    "a batch size in words": (lambda a: coar.running(batch_size="8").__enter__(), "batch_size='8'"),
    "a number for globs": (lambda a: coar.find_components(MODEL, include=3), "include=3; give names of modules"),
    "a list of numbers for globs": (lambda a: coar.find_components(MODEL, exclude=[0]), "exclude=.0.; give names"),
    "a word for a number": (lambda a: a.top(k="all"), "k='all'; give a whole number, at least 1"),
    "half a component": (lambda a: a.top(k=2.5), "k=2.5; give a whole number"),
    "a truth value for a count": (lambda a: coar.running(masks_together=True).__enter__(), "masks_together=True; give"),
    "a truth value for a length": (lambda a: coar.load(MODEL, DATA, max_length=True), "max_length=True; give a whole"),
    "a truth value for a seed": (lambda a: coar.load(MODEL, DATA, data_seed=False), "data_seed=False; give a whole"),
    "a model without weights": (lambda a: coar.attribute(EMPTY, DATA), "4 weights of Sequential are on the meta dev"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_of_another_kind_is_told(attributions, name):
    use, words = CASES[name]
    with pytest.raises(coar.CoarError, match=words):
        use(attributions)


def test_one_fraction_is_as_good_as_a_list_of_one(attributions):
    one, several = (
        coar.evaluate(attributions, MODEL, DATA, fractions=given, n_masks=5, progress=False) for given in (0.2, [0.2])
    )
    assert one.correlation == several.correlation


def test_the_one_input_that_goes_by_position_is_no_misspelled_entry(caplog):
    coar.attribute(MODEL, [{"x": torch.eye(6), "labels": torch.arange(6) % 3}], **OPTIONS)
    assert "takes no entry" not in caplog.text
    coar.attribute(MODEL, [{**DATA[0], "mask": torch.ones(6)}], **OPTIONS)
    assert "takes no entry mask" in caplog.text


@pytest.mark.parametrize("word", ["3-1", "a", "3-", "²"])
def test_a_range_of_examples_that_is_none_is_told_as_it_was_written(word):
    with pytest.raises(coar.CoarError, match=f"--fix {word}: write an index"):
        editing.numbered([word])
    assert editing.numbered(["2", "4-5"]) == [2, 4, 5]
