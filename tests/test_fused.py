"""Graphs cut at their products: the same bits uncompiled, rounding compiled, itself where that fails."""

import gc
import itertools
import logging
import weakref
from dataclasses import replace
from operator import attrgetter
from unittest.mock import Mock

import pytest
import timm
import torch
from test_captured import FEW, assert_same_bits, bert, gpt2, resnet, rounds_of, speech, vit
from torch.fx.experimental.proxy_tensor import make_fx

import hf_coar as coar
from hf_coar.estimators.gates import GatePasses, GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import fused, graphs, launched, outputs
from hf_coar.runs import captured


def captured_pass(case):
    """The graph of a gate pass, what it takes, and its model."""
    torch.manual_seed(0)
    model, batches, output = case()
    model.requires_grad_(False)
    components = coar.find_components(model)
    passes = GatePasses(MaskedModel(model, components), outputs.get(output), delta=True)
    gates, width = torch.rand(FEW, len(components)), torch.tensor(0.5, dtype=torch.float64)
    passes._run(batches[0], gates, width)  # looks at the batch once
    inputs = [*batches[0].values(), gates, width]
    graph = graphs.captured(passes._passes._flat(batches[0], (gates, width)), inputs, model, len(batches[0]))
    return graph, inputs, model


@pytest.mark.parametrize("case", [resnet, vit, gpt2, bert, speech])
def test_cut_and_put_together_it_gives_the_same_bits(case, uncompiled):
    graph, inputs, _ = captured_pass(case)
    found = fused.fused(graph, inputs)
    assert found is not graph and uncompiled
    for one, other in zip(found(*inputs), graph(*inputs), strict=True):
        assert torch.equal(one, other)


def test_a_deep_network_has_the_kinds_of_a_shallow_one(uncompiled):
    def of(depth):
        uncompiled.clear()
        fused._compiled.cache_clear()
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=10).eval()
        fused.fused(*captured_pass(lambda: (model, vit()[1], "log_prob"))[:2])
        return len(uncompiled)

    assert of(3) == of(6) < 20


def test_another_run_compiles_nothing_again(uncompiled):
    graph, inputs, _ = captured_pass(vit)
    fused.fused(graph, inputs)
    count = len(uncompiled)
    other, others_inputs, _ = captured_pass(vit)
    found = fused.fused(other, others_inputs)
    assert len(uncompiled) == count
    assert all(torch.equal(a, b) for a, b in zip(found(*others_inputs), other(*others_inputs), strict=True))


def test_weights_are_read_anew(uncompiled):
    graph, inputs, model = captured_pass(vit)
    found = fused.fused(graph, inputs)
    before = found(*inputs)[0]
    model.blocks[0].mlp.fc1.weight.mul_(0.5)
    after = found(*inputs)[0]
    assert not torch.equal(before, after) and torch.equal(after, graph(*inputs)[0])
    assert any(attrgetter(node.target)(found) is model.head.weight for node in found.graph.find_nodes(op="get_attr"))


def test_what_cannot_be_compiled_stays_as_it_is(monkeypatch, caplog):
    def fail(part, examples):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    fused._compiled.cache_clear()
    graph, inputs, _ = captured_pass(vit)
    with caplog.at_level(logging.INFO, "hf_coar"):
        assert fused.fused(graph, inputs) is graph
    assert "operations are not fused: RuntimeError: no compiler" in caplog.text


def test_compiled_it_gives_the_same_up_to_rounding(caplog):
    graph, inputs, _ = captured_pass(vit)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found = fused.fused(graph, inputs)
    assert "operations between products are fused: " in caplog.text
    launched.check_equal(graph(*inputs), found(*inputs), 1e-5)


def test_ties_may_be_broken_otherwise_and_nothing_else_may_differ():
    reads = torch.randn(64, 100)

    def changed(rows, by):
        other = reads.clone()
        other[:rows, 0] += by
        return other

    launched.check_equal([reads], [changed(4, 10)], 0.05)
    for one, other, allowed in (
        (reads, changed(5, 10), 0.05),
        (reads, changed(1, 10), 0.0),
        (reads, changed(1, torch.nan), 0.05),
        (reads, changed(1, torch.inf), 0.05),
        (reads[:15], changed(1, 10)[:15], 0.05),  # of few examples none
        (reads[:, 0], changed(1, 10)[:, 0], 0.05),  # outputs are the same whichever logit is the largest
    ):
        with pytest.raises(launched.DifferentError, match="differ by"):
            launched.check_equal([one], [other], allowed)


def test_on_a_device_graphs_are_recorded_first_and_fused_in_long_runs(monkeypatch):
    """A stand-in for the device; on a real one, test_gpu."""
    seconds, made = [0.0], []
    monkeypatch.setattr(launched, "are_launched", lambda inputs: True)
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after_launches=0.0))
    monkeypatch.setattr(captured.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(fused, "fused", lambda graph, *given: made.append("fused") or graph)
    monkeypatch.setattr(launched, "recorded", lambda graph, inputs, held: made.append("recorded") or graph)
    torch.manual_seed(0)
    model, batches, output = vit()
    rounds = GateRounds(
        MaskedModel(model.requires_grad_(False), coar.find_components(model)), outputs.get(output), 0.1, 0
    )
    seen = []
    for number in range(6):
        rounds.passes.begin_batch()
        for index in range(2):
            seconds[0] += 11.0  # a round; the sixth ends 66 s after the first pass began
            rounds.round(batches[number % 2], range(FEW), index)
        seen.append(list(made))
    assert seen[0] == ["recorded"] and seen[2] == ["recorded"], "once for a shape"
    assert seen[-1] == ["recorded", "fused", "recorded"], "and once more"
    assert rounds.passes._passes.replays


def test_compile_true_fuses_from_the_beginning(uncompiled):
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    expected, _ = rounds_of(model, batches, output, compile=False)
    found, passes = rounds_of(model, batches, output, compile=True)
    assert_same_bits(found, expected)
    assert uncompiled and passes.replays


@pytest.mark.parametrize(("wrong", "trusted"), [({0}, True), ({0, 1}, True), ({0, 1, 2}, False)])
def test_a_graph_that_differs_is_looked_at_again_in_the_next_passes(wrong, trusted, monkeypatch, uncompiled, caplog):
    """Two logits that are equal up to rounding are, in a batch of four, no reason to do without graphs."""
    looks = itertools.count()

    def check(found, replayed, allowed):
        if next(looks) in wrong:
            raise launched.DifferentReadsError("the graph's values differ by 0.5 of the largest")

    monkeypatch.setattr(launched, "check_equal", check)
    torch.manual_seed(0)
    model, batches, output = vit()
    _, passes = rounds_of(model.requires_grad_(False), batches, output, compile=True)
    assert bool(passes.replays) == passes._possible == trusted
    assert ("run as its own code" in caplog.text) != trusted


def test_what_is_compiled_is_not_taken_for_what_looks_elsewhere_in_memory(monkeypatch):
    """`as_strided` counts from the beginning of the memory, and not of the tensor."""

    def run(x):
        parts = x.split(2, dim=1)
        return tuple(torch.as_strided(part, (2, 2), (6, 1), 0).exp() @ torch.ones(2, 2) for part in parts)

    x = torch.arange(12.0).view(2, 6) / 10
    graph = make_fx(run, tracing_mode="fake")(x)
    found = fused.fused(graph, [x])
    assert found is not graph
    for one, other in zip(found(x), run(x), strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_holds_a_model_no_longer_than_needed():
    graph, inputs, model = captured_pass(vit)
    held = [weakref.ref(parameter) for parameter in model.parameters()]
    del graph, inputs, model
    gc.collect()
    assert not [one for one in held if one() is not None]


def test_more_graphs_than_are_kept_go_even_where_they_differ(monkeypatch, uncompiled):
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, kept=2))
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    components = coar.find_components(model)
    rounds = GateRounds(MaskedModel(model, components), outputs.get(output), 0.1, 0)
    passes = rounds.passes._passes
    with coar.running(compile=True):
        for count in (1, 2, 3, 4):
            some = {name: value[:count] for name, value in batches[0].items()}
            rounds.passes.begin_batch()
            rounds.round(some, range(count), 0)
            made = [shape for shape in passes._shapes.values() if shape.replay is not None]
            assert len(made) <= 2 and all(shape.is_fused for shape in made)
        monkeypatch.setattr(launched, "check_equal", Mock(side_effect=launched.DifferentError("other values")))
        rounds.passes.begin_batch()
        rounds.round(some, range(4), 1)
    assert not passes._possible and not passes._shapes


def test_on_a_device_another_run_of_the_model_records_a_graph_that_is_there(monkeypatch):
    made, captured_graph = [], graphs.captured
    monkeypatch.setattr(launched, "are_launched", lambda inputs: True)
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after_launches=0.0))
    monkeypatch.setattr(graphs, "captured", lambda *given: made.append("captured") or captured_graph(*given))
    monkeypatch.setattr(launched, "recorded", lambda run, inputs, held: made.append("recorded") or run)
    torch.manual_seed(0)
    model, batches, output = vit()
    expected, _ = rounds_of(model.requires_grad_(False), batches, output, compile=False)
    for n_runs in (1, 2):
        found, passes = rounds_of(model, batches, output, compile="auto")
        assert_same_bits(found, expected)
        assert passes.replays and made == ["captured", *["recorded"] * n_runs]
