"""Captured gate passes: the same bits as passes that run as the model's own code, or no graph at all."""

import logging
from dataclasses import replace

import pytest
import timm
import torch
import transformers
from torch import nn

import hf_coar as coar
from hf_coar import demo
from hf_coar.errors import CoarError
from hf_coar.estimators.gates import GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import captured

FEW = 4


def resnet():
    model, data = coar.load(demo.MODEL, demo.IMAGES, split="train[:8]", batch_size=FEW)
    return model, [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in data], "margin"


def vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).eval()
    return model, [{"x": torch.randn(FEW, 3, 32, 32), "labels": torch.arange(FEW)} for _ in range(2)], "log_prob"


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, **ends)
    model = transformers.GPT2LMHeadModel(config).eval()
    return model, [{"input_ids": torch.randint(0, 100, (FEW, 9))} for _ in range(2)], "token_margin"


def llama():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).eval(), gpt2()[1], "token_log_prob"


def bert():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes)).eval()
    batches = []
    for padded in (2, 5):
        tokens, mask = torch.randint(0, 100, (FEW, 9)), torch.ones(FEW, 9, dtype=torch.long)
        mask[0, -padded:] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])})
    return model, batches, "margin"


def lstm():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    return Recurrent().eval(), [{"x": torch.randn(FEW, 5, 6), "labels": torch.zeros(FEW).long()}] * 2, "margin"


def speech():
    """Its first convolution's channels are normalised one by one."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    first = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    config = transformers.HubertConfig(**sizes, **first, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = transformers.HubertForSequenceClassification(config).eval()
    return model, [{"input_values": torch.randn(FEW, 200), "labels": torch.tensor([0, 1, 0, 1])}] * 2, "margin"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Graphs are made in the second pass of all."""
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after=0.0))


def rounds_of(model, batches, output, compile, fraction=0.1, seed=0):
    """All reads of two rounds of every batch, and the passes they came from."""
    rounds = GateRounds(MaskedModel(model, coar.find_components(model)), outputs.get(output), fraction, seed)
    found = []
    with coar.running(compile=compile):
        for number, batch in enumerate(batches):
            rounds.passes.begin_batch()
            examples = [number * FEW + row for row in range(FEW)]
            found += [rounds.round(batch, examples, index) for index in range(2)]
    return found, rounds.passes._passes


def assert_same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        for name in ("soft", "hard", "gates", "output"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def mixtral():
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 3}
    config = transformers.MixtralConfig(num_attention_heads=2, num_key_value_heads=2, vocab_size=100, **sizes)
    return transformers.MixtralForCausalLM(config).eval(), gpt2()[1], "token_log_prob"


def padded_or_not():
    """Transformers looks at whether a mask leaves anything out."""
    model, batches, output = bert()
    whole = {name: torch.ones_like(value) for name, value in batches[0].items() if name == "attention_mask"}
    return model, [batches[0], batches[0] | whole, batches[0]], output


@pytest.mark.parametrize("case", [resnet, vit, gpt2, bert, speech, llama, mixtral, padded_or_not])
def test_a_replay_gives_the_same_bits(case):
    torch.manual_seed(0)
    model, batches, output = case()
    model.requires_grad_(False)
    expected, _ = rounds_of(model, batches, output, compile=False)
    found, passes = rounds_of(model, batches, output, compile="auto")
    assert_same_bits(found, expected)
    assert passes.replays


def test_the_only_batch_gets_a_graph_once_it_is_time(monkeypatch):
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after=60.0))
    monkeypatch.setattr(captured.time, "monotonic", lambda: next(clock))  # 25 s a pass
    expected, _ = rounds_of(model, batches[:1], output, compile=False)
    found, passes = rounds_of(model, batches[:1], output, compile="auto")
    assert_same_bits(found, expected)
    assert passes.replays and [shape.of_batch for shape in passes._shapes.values()] == [4]  # the others were replays


def test_where_a_graph_gives_other_bits_there_is_none(capfd):
    torch.manual_seed(0)
    model, batches, output = lstm()
    model.requires_grad_(False)
    expected, _ = rounds_of(model, batches, output, compile=False)
    found, passes = rounds_of(model, batches, output, compile="auto")
    assert_same_bits(found, expected)
    assert not passes.replays
    assert "Traceback" not in capfd.readouterr().err


def test_attributions_are_the_same(tmp_path):
    model, data = coar.load(demo.MODEL, demo.IMAGES, split="train[:4]", batch_size=4)
    components = coar.find_components(model, include=["layer3.*"], ablation=coar.Mean(data))
    found = []
    for compile in (False, "auto"):
        with coar.running(compile=compile):
            method = coar.PathGradient(rounds="auto", reliability=0.3, max_rounds=4)
            found.append(coar.attribute(model, data, components, method=method, out=tmp_path / str(compile)))
    torch.testing.assert_close(found[0].weights, found[1].weights, rtol=0, atol=0)


class Looking(nn.Module):
    """Takes another way where the mean of its input, or of what it makes of it, is negative."""

    def __init__(self, at_input=False):
        super().__init__()
        self.first, self.second, self.at_input = nn.Linear(6, 8), nn.Linear(8, 3), at_input

    def forward(self, x):
        hidden = self.first(x)
        hidden = hidden if float((x if self.at_input else hidden).mean()) > 0 else -2 * hidden
        return self.second(hidden.relu())


def signed_batches():
    return [{"x": torch.rand(FEW, 6) - at, "labels": torch.zeros(FEW).long()} for at in (0.0, 1.0)]


@pytest.mark.parametrize("times", [1, 3])
def test_a_model_that_looks_at_its_inputs_gets_another_graph_where_they_are_others(times):
    torch.manual_seed(0)
    model, batches = Looking(at_input=True).eval().requires_grad_(False), signed_batches() * times
    expected, _ = rounds_of(model, batches, "margin", compile=False)
    found, passes = rounds_of(model, batches, "margin", compile="auto")
    assert_same_bits(found, expected)
    if times == 1:
        assert [shape.n_made for shape in passes._shapes.values()] == [2] and passes.replays
    else:
        assert not passes._possible  # more graphs than that win nothing


def test_a_model_that_looks_at_values_is_not_captured(caplog):
    torch.manual_seed(0)
    model, batches = Looking().eval().requires_grad_(False), signed_batches()
    expected, _ = rounds_of(model, batches, "margin", compile=False)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found, passes = rounds_of(model, batches, "margin", compile="auto")
    assert_same_bits(found, expected)
    assert not passes.replays
    assert "gate passes of Looking run as its own code: what it does depends on values" in caplog.text


def test_what_a_graph_cannot_know_of_is_noticed(caplog):
    torch.manual_seed(0)
    model, batches, _ = vit()
    model.requires_grad_(False)
    held = {"weight": torch.tensor(2.0)}
    output = outputs.Output("weighted", "logits", lambda logits, batch: logits[:, 0] * held["weight"])
    rounds = GateRounds(MaskedModel(model, coar.find_components(model)), output, 0.1, 0)
    found = {}
    with caplog.at_level(logging.INFO, "hf_coar"):
        for compile in ("auto", False):
            with coar.running(compile=compile):
                for number, weight in enumerate((2.0, 3.0)):
                    held["weight"] = torch.tensor(weight)
                    rounds.passes.begin_batch()
                    found[compile, number] = rounds.round(batches[number], range(FEW), 0)
    for number in range(2):
        assert_same_bits([found["auto", number]], [found[False, number]])
    assert [shape.n_made for shape in rounds.passes._passes._shapes.values()] == [2]
    assert caplog.text.count("go through a captured graph") == 2


def test_compiled_by_a_backend_of_ones_own():
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    expected, _ = rounds_of(model, batches, output, compile=False)
    found, passes = rounds_of(model, batches, output, compile="aot_eager")
    assert passes.replays
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.soft, b.soft, rtol=1e-4, atol=1e-5)


def test_a_backend_that_is_not_known():
    with pytest.raises(CoarError, match=r"compile='no-such'; there are 'auto', True, False, .*inductor"):
        with coar.running(compile="no-such"):
            pass


def test_lower_precision():
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), coar.running(dtype="bfloat16"):
        expected, _ = rounds_of(model, batches, output, compile=False)
        found, passes = rounds_of(model, batches, output, compile="auto")
    assert_same_bits(found, expected)
    assert passes.replays


def test_more_shapes_than_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after=0.0, kept=1))
    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    components, batch = coar.find_components(model), batches[0]
    rounds = GateRounds(MaskedModel(model, components), outputs.get(output), 0.1, 0)
    found = {"auto": [], False: []}
    for compile, reads in found.items():
        with coar.running(compile=compile):
            rounds.passes.begin_batch()
            for count in (4, 3, 4, 3):  # as examples have enough rounds, one after the other
                some = {name: value[:count] for name, value in batch.items()}
                reads.append(rounds.round(some, range(count), 0))
    assert_same_bits(found["auto"], found[False])


def test_passes_are_heard_of_once():
    from hf_coar.models import calling

    torch.manual_seed(0)
    model, batches, output = vit()
    model.requires_grad_(False)
    counts = []
    for compile in (False, "auto"):
        heard = []
        with calling.heard(lambda heard=heard: heard.append(1)):
            rounds_of(model, batches, output, compile)
        counts.append(len(heard))
    assert counts[0] == counts[1]
