"""Graphs that other runs of the same model object use: made once, right for the weights as they are, gone with it."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from test_captured import FEW, assert_same_bits, at_once, gpt2, lstm, resnet, rounds_of, vit  # noqa: F401 (a fixture)
from test_captured_masks import assert_close, measured
from torch import nn

import hf_coar as coar
from hf_coar import demo
from hf_coar.models import fused, graphs, outputs
from hf_coar.models.outputs import Output
from hf_coar.runs.running import autocast


@pytest.fixture
def made(monkeypatch):
    """A number for every graph that is made."""
    numbers, captured = [], graphs.captured
    monkeypatch.setattr(graphs, "captured", lambda *given: numbers.append(len(numbers)) or captured(*given))
    return numbers


def gates(model, batches, output, compile, seed=0):
    found, passes = rounds_of(model.requires_grad_(False), batches, output, compile, seed=seed)
    return found, bool(passes.replays)


def masks(model, batches, output, compile, seed=0):
    found, passes = measured(model, batches, output, compile, seed=seed)
    return found, bool(passes.replays)


def assert_alike(one, other):
    if isinstance(one, torch.Tensor):
        return assert_close(one, other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.soft, b.soft, rtol=1e-4, atol=1e-5)


both = pytest.mark.parametrize("kind", [gates, masks])


@both
@pytest.mark.parametrize("case", [resnet, gpt2])
def test_a_second_run_makes_none(kind, case, made, uncompiled):
    torch.manual_seed(0)
    model, batches, output = case()
    for seed in range(2):
        expected, _ = kind(model, batches, output, compile=False, seed=seed)
        found, replayed = kind(model, batches, output, compile=True, seed=seed)
        assert_alike(found, expected)
        assert replayed
    assert made == [0]


def test_by_auto_it_is_used_at_once_and_gives_the_same_bits(made):
    torch.manual_seed(0)
    model, batches, output = vit()
    for seed in range(2):
        expected, _ = gates(model, batches, output, compile=False, seed=seed)
        found, replayed = gates(model, batches, output, compile="auto", seed=seed)
        assert_same_bits(found, expected)
        assert replayed
    assert made == [0]


def test_each_precision_has_a_graph_of_its_own(made):
    torch.manual_seed(0)
    model, batches, output = vit()
    for _ in range(2):
        for dtype in ("bfloat16", None):  # first looks are in full precision, whatever the run is in
            with coar.running(dtype="bfloat16"), autocast(torch.device("cpu"), dtype):
                _, replayed = gates(model, batches, output, compile="auto")
            assert replayed
    assert made == [0, 1]


def loaded(model):
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def other_data(model):
    model.fc.weight.data = 2 * model.fc.weight.data


def other_parameter(model):
    model.fc.weight = nn.Parameter(1.0001 * model.fc.weight.data)  # less than rounding


def other_module(model):
    model.fc = nn.Linear(model.fc.in_features, model.fc.out_features)


def other_buffer(model):
    model.bn1.running_mean = model.bn1.running_mean + 1.0


def other_type(model):
    model.double()


def other_attribute(model):
    model.fc.register_forward_hook(lambda module, inputs, output: 3 * output)


@both
@pytest.mark.parametrize(
    ("change", "anew"),
    [(loaded, 1), (other_data, 1), (other_parameter, 2), (other_module, 2), (other_buffer, 2), (other_type, 2),
     (other_attribute, 2)],
)  # fmt: skip
def test_what_changes_between_runs_is_seen(kind, change, anew, made, uncompiled, caplog):
    torch.manual_seed(0)
    model, batches, output = resnet()
    kind(model, batches, output, compile=True)
    change(model)
    if change is other_type:
        batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    expected, _ = kind(model, batches, output, compile=False)
    found, replayed = kind(model, batches, output, compile=True)
    assert_alike(found, expected)
    if change is other_parameter:
        close = kind(model, batches, output, compile=True)[0]
        assert_alike(close, expected)
    assert replayed and len(made) == anew and "own code" not in caplog.text


def test_an_edited_model_is_another(made, uncompiled):
    torch.manual_seed(0)
    model, batches, output = resnet()
    masks(model, batches, output, compile=True)
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.fc.weight[0] = 0
    expected, _ = masks(edited, batches, output, compile=False)
    found, _ = masks(edited, batches, output, compile=True)
    assert_close(found, expected)
    assert made == [0, 1] and len(pickle.dumps(edited)) < 1.1 * len(pickle.dumps(resnet()[0]))


def test_other_outputs_and_components_have_graphs_of_their_own(made, uncompiled):
    torch.manual_seed(0)
    model, batches, _ = resnet()
    for function in (lambda logits, batch: logits[:, 0], lambda logits, batch: logits[:, 1]):
        output = Output("one", "logits", function)
        for kind in (gates, masks):
            expected, _ = kind(model, batches, output, compile=False)
            assert_alike(kind(model, batches, output, compile=True)[0], expected)
    assert len(made) == 4


class Bound:
    """An output by a method of an object that has no hash."""

    __hash__ = None

    def __call__(self, logits, batch):
        return logits[:, 0]

    def method(self, logits, batch):
        return logits[:, 0]


@pytest.mark.parametrize("function", [Bound(), Bound().method, torch.nn.Identity()])
def test_any_function_will_do(function):
    output = Output("one", "logits", function)
    assert len({output.identity: 1, Output("one", "logits", function).identity: 2}) == 1


def test_methods_are_told_apart_by_what_they_are_of():
    one, other = Bound(), Bound()
    of_one = Output("one", "logits", one.method).identity
    assert of_one == Output("one", "logits", one.method).identity != Output("one", "logits", other.method).identity
    del one
    assert of_one not in {Output("one", "logits", Bound().method).identity for _ in range(100)}


def test_whole_runs_share_graphs(made, uncompiled, tmp_path):
    model, data = coar.load(demo.MODEL, demo.IMAGES, split="train[:8]", batch_size=8)
    components = coar.find_components(model, include=["layer3.*"])
    found, counts = [], []
    for number, compile in enumerate((True, True, False)):
        with coar.running(compile=compile, progress=False):
            method = coar.PathGradient(rounds=2)
            found.append(coar.attribute(model, data, components, method=method, out=tmp_path / f"{number}"))
            report = coar.evaluate(found[-1], model, data, n_masks=20)
            assert report.correlation
        counts.append(len(made))
    assert counts[0] > 0 and counts == [counts[0]] * 3
    torch.testing.assert_close(found[1].weights, found[2].weights, rtol=1e-3, atol=1e-5)


def test_what_refuses_graphs_keeps_none(made, caplog):
    torch.manual_seed(0)
    model, batches, output = lstm()
    with caplog.at_level(logging.INFO, "hf_coar"):
        gates(model, batches, output, "auto")
    assert "own code" in caplog.text and len(made) == 1 and not graphs._KNOWN[model]


@both
@pytest.mark.parametrize("compile", ["auto", True, "aot_eager"])
def test_kept_graphs_go_with_the_model(kind, compile, uncompiled):
    torch.manual_seed(0)
    model, batches, name = vit()
    output = Output("its own", "logits", lambda logits, batch, model=model: outputs.get(name)(logits, batch))
    kind(model, batches, output, compile=compile)
    n_kept, held = len(graphs._KNOWN.get(model, ())), [weakref.ref(one) for one in (model, *model.parameters())]
    assert n_kept == (0 if compile == "auto" and kind is masks else 1)
    del model, output
    gc.collect()  # the model
    gc.collect()  # what went with it
    assert not [one for one in held if one() is not None]


def test_what_could_not_be_fused_is_told_in_every_run(monkeypatch, caplog):
    def fail(part, examples):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    fused._compiled.cache_clear()
    torch.manual_seed(0)
    model, batches, output = vit()
    for n_runs in (1, 2):
        _, replayed = masks(model, batches, output, compile=True)
        assert replayed and caplog.text.count("operations are not fused: RuntimeError: no compiler") == n_runs


def test_a_model_with_a_sparse_buffer_has_graphs(made, uncompiled):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("graph", torch.eye(3).to_sparse())

        def forward(self, x):
            return self.head(self.layer(x).relu())

    torch.manual_seed(0)
    model, batches = Sparse().eval(), [{"x": torch.randn(FEW, 6), "labels": torch.zeros(FEW).long()}]
    for _ in range(2):
        assert masks(model, batches, "margin", compile=True)[1]
    assert made == [0]
