"""Components at positions and roles: by hand, as units of attributions, with partners; and what cannot be."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hf_coar as coar
from hf_coar.components import Components, mark
from hf_coar.errors import CoarError, DataError

TEXTS = ["the whale swims in the sea", "a ship sails on the cold sea"]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", *dict.fromkeys(" ".join(TEXTS).split())]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_embd=12, n_layer=1, n_head=3, n_positions=16, attn_implementation="eager")
    net = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


@pytest.fixture
def batch(tokenizer):
    return dict(tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False))


def heads(model, **options):
    return coar.find_components(model, "head", **options)


def test_one_head_at_one_token(model, batch):
    components = heads(model, positions=[1, 4])
    assert len(components) == 3 * 2
    assert [str(one) for one in components][:2] == [
        "transformer.h.0.attn.c_proj head 0 at token 1", "transformer.h.0.attn.c_proj head 0 at token 4",
    ]  # fmt: skip
    kept = torch.ones(6, dtype=torch.bool)
    kept[3] = False  # head 1 at token 4

    def without(module, inputs):
        changed = inputs[0].clone()
        changed[:, 4, 4:8] = 0
        return (changed, *inputs[1:])

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(without)
    with torch.no_grad():
        expected = model(**batch).logits
    handle.remove()
    with torch.no_grad(), coar.ablate(model, components, kept):
        assert torch.equal(model(**batch).logits, expected)
    # One mask an example.
    both = torch.stack([kept, torch.ones(6, dtype=torch.bool)])
    with torch.no_grad(), coar.ablate(model, components, both):
        found = model(**batch).logits
    with torch.no_grad():
        plain = model(**batch).logits
    assert torch.allclose(found[0], expected[0], atol=1e-6) and torch.allclose(found[1], plain[1], atol=1e-6)
    assert not torch.equal(found[0], plain[0])


def test_roles_are_found_in_the_text(tokenizer, batch):
    marked = mark(batch, tokenizer, TEXTS, {"subject": ["whale", "ship"], "verb": r"s\w+s\b", "last token": None})
    assert marked["positions"].tolist() == [[-1, 0, 1, -1, -1, 2, -1], [-1, 0, 1, -1, -1, -1, 2]]
    left = {name: value.flip(1) for name, value in batch.items()}  # padded on the left
    assert mark(left, tokenizer, TEXTS[:1], {"last token": None})["positions"][0].tolist() == [-1] * 6 + [0]
    with pytest.raises(DataError, match=r"no token of example 1 plays 'subject': 'whale' is not in 'a ship"):
        mark(batch, tokenizer, TEXTS, {"subject": "whale"})


def test_a_head_at_a_role_is_one_unit(model, tokenizer, batch):
    marked = mark(batch, tokenizer, TEXTS, {"subject": ["whale", "ship"], "last token": None})
    components = heads(model, positions=["subject", "last token"])
    assert len(components) == 6 and str(components[5]) == "transformer.h.0.attn.c_proj head 2 at last token"
    method = coar.Regression(n_masks=64)
    attributions = coar.attribute(
        model, [marked], components, output="token_log_prob", method=method, ablated_fraction=0.3, progress=False
    )
    report = coar.evaluate(attributions, model, [marked], fractions=[0.3], n_masks=30, progress=False)
    assert report.correlation[0.3] > 0.5
    # What is told at the subject is what ablating there does, by hand.
    kept = torch.ones(6, dtype=torch.bool)
    kept[0] = False

    def without(module, inputs):
        changed = inputs[0].clone()
        changed[:, 1, :4] = 0
        return (changed, *inputs[1:])

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(without)
    with torch.no_grad():
        expected = model(**batch).logits
    handle.remove()
    output = coar.outputs.Output("sum", "logits", lambda found, batch: found.sum((1, 2)))
    with torch.no_grad(), coar.ablate(model, components, kept):
        assert torch.allclose(output.of(model, marked), expected.sum((1, 2)), atol=1e-4)


def test_patched_at_positions_from_a_partner(model, batch):
    corrupt = {**batch, "input_ids": batch["input_ids"].flip(0)}
    corrupt["input_ids"] = torch.where(batch["attention_mask"].bool(), corrupt["input_ids"], batch["input_ids"])
    components = heads(model, positions=range(6), ablation=coar.Patch(corrupt))
    kept = torch.zeros(len(components), dtype=torch.bool)
    read = []
    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda m, i: read.append(i[0].clone()))
    with torch.no_grad():
        model(**corrupt), model(**batch)
    handle.remove()
    partners, own = read

    def patched(module, inputs):
        return (torch.cat([partners[:, :6], own[:, 6:]], 1), *inputs[1:])

    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(patched)
    with torch.no_grad():
        expected = model(**batch).logits
    handle.remove()
    with torch.no_grad(), coar.ablate(model, components, kept):
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


def test_what_has_no_positions(model, batch):
    with pytest.raises(DataError, match="position 40 is outside of the 7 tokens"):
        with torch.no_grad(), coar.ablate(model, heads(model, positions=[40]), torch.zeros(3, dtype=torch.bool)):
            model(**batch)
    components = heads(model, positions=["subject"])
    with pytest.raises(DataError, match=r"roles subject need an entry 'positions' \[examples, 7\].*mark"):
        coar.attribute(model, [batch], components, output="token_log_prob", progress=False)
    for wrong in ([], [1, 1], [1, "subject"], [-1]):
        with pytest.raises(CoarError, match="positions="):
            heads(model, positions=wrong)
    with pytest.raises(CoarError, match=r"single positions.*how='hooks'"):
        with coar.ablate(model, heads(model, positions=[0]), torch.zeros(3, dtype=torch.bool), how="weights"):
            pass
    with pytest.raises(CoarError, match="no positions: what they make never leaves"):
        coar.find_components(nn.LSTM(3, 4), positions=[0])
    images = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CoarError, match="not \\[examples, tokens, features\\]"):
        found = coar.find_components(images, positions=[0])
        with torch.no_grad(), coar.ablate(images, found, torch.zeros(4, dtype=torch.bool)):
            images(torch.randn(2, 3, 5, 5))


def test_positions_are_saved(model):
    components = heads(model, positions=["subject", "last token"])
    assert Components.from_json(components.to_json()) == components
    names, index = components.regroup("head")
    assert len(names) == 3 and index.tolist() == [0, 0, 1, 1, 2, 2]
