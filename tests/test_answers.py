"""Prompts, answers and foils as batches: lengths, contexts, and what cannot be asked."""

import pytest
import torch
from task_cases import CASES, made
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import hf_coar as coar
from hf_coar.errors import DataError
from hf_coar.models import tasks

PROMPTS = ["When Mary and John went to the shop, John gave a book to", "Tom saw"]
ANSWERS, FOILS = [" Mary", " the old shop"], [" John", " Mary"]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte pairs of two sentences, with a token that opens a text."""
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"])
    bytes_.train_from_iterator([*PROMPTS * 4, "John gave Mary the old shop book"], trainer)
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", model_max_length=40)


def marked(ids, labels):
    return [
        [int(token) for token, label in zip(*row, strict=True) if label != -100]
        for row in zip(ids, labels, strict=True)
    ]


def test_only_the_tokens_of_the_answer_are_labelled(tokenizer):
    batch = tasks.encode_answers(tokenizer, PROMPTS, ANSWERS, FOILS)
    for ids, labels, mask, texts in (
        ("input_ids", "labels", "attention_mask", ANSWERS),
        ("foil_input_ids", "foil_labels", "foil_attention_mask", FOILS),
    ):
        assert [tokenizer.decode(tokens) for tokens in marked(batch[ids], batch[labels])] == texts
        real = [row[m.bool()].tolist() for row, m in zip(batch[ids], batch[mask], strict=True)]
        assert real == [tokenizer(prompt + text)["input_ids"] for prompt, text in zip(PROMPTS, texts, strict=True)]


def test_without_foils_it_is_the_answers_alone(tokenizer):
    batch = tasks.encode_answers(tokenizer, PROMPTS, ANSWERS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_one_pass_tells_answers_of_one_token():
    model, _ = made("answers")
    ids = torch.randint(5, 40, (4, 7), generator=torch.Generator().manual_seed(0))
    foils, labels, wrong = ids.clone(), torch.full_like(ids, -100), torch.full_like(ids, -100)
    foils[:, 6] = (ids[:, 6] - 5 + 1) % 35 + 5
    labels[:, 6], wrong[:, 6] = ids[:, 6], foils[:, 6]
    batch = {"input_ids": ids, "labels": labels, "foil_input_ids": foils, "foil_labels": wrong}
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        output = tasks.bind(model, "answer_difference")
        with torch.no_grad():
            found = output.of(model, batch)
        assert len(calls) == 1
        logits = model(ids).logits[:, 5]
    finally:
        handle.remove()
    rows = torch.arange(4)
    assert torch.allclose(found, logits[rows, ids[:, 6]] - logits[rows, foils[:, 6]], atol=1e-4)


def test_a_model_with_a_decoder_is_asked_the_same(tokenizer):
    batch = tasks.encode_answers(tokenizer, PROMPTS, ANSWERS, FOILS, decoder=True)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "foil_labels"}
    model = CASES["seq2seq"].build().eval()
    model.resize_token_embeddings(400)
    with torch.no_grad():
        found = tasks.bind(model, batch=batch).of(model, batch)
        sums = []
        for name in ("labels", "foil_labels"):
            logits = model(**{n: batch[n] for n in ("input_ids", "attention_mask")}, labels=batch[name]).logits
            said = logits.log_softmax(-1).gather(-1, batch[name].clamp_min(0)[..., None])[..., 0]
            sums.append((said * (batch[name] != -100)).sum(1))
    assert torch.allclose(found, sums[0] - sums[1], atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "answers", "foils", "message"),
    [
        (["When Mar"], ["y"], [" John"], "splits"),
        (["Tom saw"], [""], [" Mary"], "not empty"),
        (["Tom saw"], [" Mary"], [" Mary"], "another foil"),
        (["Tom saw", "Tom"], [" Mary"], [" John"], "2 prompts"),
        (["Tom saw the shop " * 12], [" Mary"], [" John"], "takes 40"),
    ],
)
def test_what_cannot_be_asked(tokenizer, prompts, answers, foils, message):
    with pytest.raises(DataError, match=message):
        tasks.encode_answers(tokenizer, prompts, answers, foils)


def test_answers_without_foils_say_so():
    model, batch = made("answers")
    alone = {name: value for name, value in batch.items() if not name.startswith("foil_")}
    with pytest.raises(DataError, match="foil_labels"):
        coar.attribute(model, [alone], output="answer_difference", progress=False)
