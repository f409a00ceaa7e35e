"""`load` makes the batches of a task of a data set's columns; each is compared with what is worked out by hand."""

import json

import datasets
import numpy as np
import pytest
import tiny_texts
import torch
import transformers as tf
from PIL import Image
from task_cases import made

import hf_coar as coar
from hf_coar import cli
from hf_coar import data as data_module
from hf_coar.errors import DataError

WORDS = [*tiny_texts.WORDS, "[MASK]", "good", "old"]
ID = {word: place for place, word in enumerate(WORDS)}


def tokenizer(closing=True):
    """Knows `WORDS`; opens and closes texts as BERT does, or not at all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closing:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if closing else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


def ids(text, closing=True):
    found = [ID[word] for word in text.split()]
    return [2, *found, 3] if closing else found


def labels(length, **at):
    """-100 but for some places."""
    return [at.get(f"p{place}", -100) for place in range(length)]


def spans(text, start):
    return {"text": [text], "answer_start": [start]}


TEXTS = {
    "causal_lm": (
        [{"prompt": "a very", "answer": "dull film", "foil": "fine film"},
         {"prompt": "it", "answer": "is", "foil": "a"}],
        {"input_ids": [ids("a very dull film", False), ids("it is is is", False)],
         "labels": [labels(4, p2=ID["dull"], p3=ID["film"]), labels(4, p1=ID["is"])],
         "foil_labels": [labels(4, p2=ID["fine"], p3=ID["film"]), labels(4, p1=ID["a"])]},
        "answer_difference",
    ),
    "seq2seq": (
        [{"article": "a dull film", "summary": "dull"}, {"article": "it is fine", "summary": "fine film"}],
        {"input_ids": [ids("a dull film", False), ids("it is fine", False)],
         "labels": [[ID["dull"], -100], [ID["fine"], ID["film"]]]},
        "token_margin",
    ),
    "question_answering": (
        [{"question": "is it dull", "context": "it is a very fine film", "answers": spans("very fine", 8)},
         {"question": "is it", "context": "a dull film", "answers": spans("dull", 2)}],
        {"input_ids": [[*ids("is it dull"), *ids("it is a very fine film")[1:]],
                       [*ids("is it"), *ids("a dull film")[1:], 0, 0, 0, 0]],
         "start_positions": [8, 5], "end_positions": [9, 5]},
        "span_margin",
    ),
    "multiple_choice": (
        [{"sent1": "it is", "endings": ["dull", "a film", "fine"], "label": 1},
         {"sent1": "a", "endings": ["film", "is", "it"], "label": 0}],
        {"labels": [1, 0]},
        "margin",
    ),
    "tokens": (
        [{"tokens": ["a", "dull", "film"], "ner_tags": [0, 2, 1]}, {"tokens": ["it"], "ner_tags": [1]}],
        {"labels": [[-100, 0, 2, 1, -100], [-100, 1, -100, -100, -100]]},
        "token_margin",
    ),
    "masked_lm": (
        [{"text": "a [MASK] film", "answer": "dull"}, {"text": "it is [MASK]", "answer": "fine"}],
        {"labels": [labels(5, p2=ID["dull"]), labels(5, p3=ID["fine"])]},
        "token_margin",
    ),
    "embedding": (
        [{"sentence1": "a film", "sentence2": "it is fine", "score": 1.0},
         {"sentence1": "it", "sentence2": "a", "score": 2.0}],
        {"input_ids": [ids("a film"), [*ids("it"), 0]], "pair_input_ids": [ids("it is fine"), [*ids("a"), 0, 0]]},
        "similarity",
    ),
    "score": (
        [{"chosen": "a fine film", "rejected": "a dull film"}, {"chosen": "fine", "rejected": "very dull"}],
        {"input_ids": [ids("a fine film"), [*ids("fine"), 0, 0]],
         "rejected_input_ids": [ids("a dull film"), [*ids("very dull"), 0]]},
        "preference",
    ),
    "next_sentence": (
        [{"sentence1": "a film", "sentence2": "it is fine", "label": 1},
         {"sentence1": "it", "sentence2": "is", "label": 0}],
        {"labels": [1, 0]},
        "margin",
    ),
    "series": (
        [{"past_values": torch.randn(16, 2).tolist(), "future_values": torch.randn(4, 2).tolist(), "name": "x"}] * 2,
        {},
        "own_loss",
    ),
}  # fmt: skip


def loaded(tmp_path, name, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    more = {"preprocessor": tokenizer(closing=name not in ("causal_lm", "seq2seq")), **more}
    return coar.load(made(name)[0], path, **more)


def attributed(model, data):
    return coar.attribute(model, data, method=coar.PathGradient(rounds=0), progress=False)


@pytest.mark.parametrize("name", TEXTS)
def test_columns_of_texts_become_what_the_task_needs(name, tmp_path):
    rows, expected, output = TEXTS[name]
    model, data = loaded(tmp_path, name, rows)
    batch = next(iter(data))
    assert {key: batch[key].tolist() for key in expected} == expected
    assert attributed(model, data).provenance.output == output


def test_an_example_alone_is_masked_as_in_a_batch(tmp_path):
    rows = [{"text": "it is a very fine old film"}, {"text": "a dull film"}]
    _, data = loaded(tmp_path, "masked_lm", rows)
    batch, (alone, _) = next(iter(data)), [next(iter(data.select([i]))) for i in range(2)]
    hidden = batch["labels"] != -100
    assert hidden.sum(1).tolist() == [1, 1] and (batch["input_ids"][hidden] == ID["[MASK]"]).all()
    assert torch.equal(alone["labels"], batch["labels"][:1]) and torch.equal(alone["input_ids"], batch["input_ids"][:1])
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    assert whole[0].tolist() == ids(rows[0]["text"])


WRONG = {
    "no such columns": ("question_answering", [{"query": "it", "body": "a film"}], {}, "known as the question"),
    "a choice too few": ("multiple_choice", [{"sent1": "a", "endings": ["a", "it"], "label": 0},
                                             {"sent1": "a", "endings": ["a", "it", "is"], "label": 0}], {}, "choices"),
    "a label beyond": ("multiple_choice", [{"sent1": "a", "endings": ["a", "it"], "label": 2}], {}, "of 2 choices"),
    "an unknown tag": ("tokens", [{"tokens": ["a"], "tags": [7]}], {}, "none of the model's 4"),
    "nothing under the mask": ("masked_lm", [{"text": "a [MASK] film"}], {}, "says what is under it"),
    "an answer of two": ("masked_lm", [{"text": "a [MASK]", "answer": "dull film"}], {}, "no single token"),
    "no target": ("seq2seq", [{"text": "a film", "extra": "it"}], {}, "known as the target"),
    "a role of another task": ("tokens", [{"tokens": ["a"], "tags": [0]}], {"columns": {"prompt": "tokens"}}, "prompt"),
    "a conversation": (
        "causal_lm", [{"messages": [{"role": "user", "content": "is it"}]}], {},
        r"no column of text or answers; it has 'messages'.*apply_chat_template\(messages, tokenize=False\)",
    ),
    "numbers for texts": ("causal_lm", [{"text": 1}], {}, "'text' .1. is not a text: make every entry a string"),
    "an answer that is its foil": ("causal_lm", [{"prompt": "a", "answer": "it", "foil": "it"}], {}, "another foil"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_columns_that_do_not_serve_are_told(what, tmp_path):
    name, rows, more, words = WRONG[what]
    with pytest.raises(DataError, match=words):
        _, data = loaded(tmp_path, name, rows, **more)
        next(iter(data))


def test_a_prompt_and_its_completion_are_a_prompt_and_an_answer(tmp_path):
    _, data = loaded(tmp_path, "causal_lm", [{"prompt": "a very", "completion": "dull film"}])
    _, same = loaded(tmp_path, "causal_lm", [{"prompt": "a very", "answer": "dull film"}])
    assert next(iter(data))["labels"].tolist() == next(iter(same))["labels"].tolist() == [[-100, -100, 5, 6]]


def test_an_encoder_reads_one_text_where_there_is_no_second(tmp_path):
    model, data = loaded(tmp_path, "embedding", [{"text": "a film"}])
    assert next(iter(data))["input_ids"].tolist() == [ids("a film")]
    with pytest.raises(DataError, match="pair_input_ids"):
        attributed(model, data)


def test_columns_are_named_and_remembered(tmp_path):
    rows = [{"p": "a very", "right": "dull", "wrong": "fine"}, {"p": "it", "right": "is", "wrong": "a"}]
    columns = {"prompt": "p", "answer": "right", "foil": "wrong"}
    _, data = loaded(tmp_path, "causal_lm", rows, columns=columns)
    assert "foil_labels" in next(iter(data)) and data.description["columns"] == columns
    assert data_module.settings(data.description)["columns"] == columns


def test_the_command_line_names_columns(tmp_path, capsys):
    made("causal_lm")[0].save_pretrained(tmp_path / "model")
    tokenizer(closing=False).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"p": "a very", "right": "dull", "wrong": "fine"}\n')
    words = ["attribute", tmp_path / "model", tmp_path / "rows.jsonl", "--rounds", 0, "--out", tmp_path / "run"]
    code = cli.main([*map(str, words), "--columns", "prompt=p", "answer=right", "foil=wrong"])
    assert code == 0, capsys.readouterr().err
    attributions = coar.Attributions.from_pretrained(tmp_path / "run")
    assert attributions.provenance.output == "answer_difference"
    _, data = coar.reopen(attributions)
    assert "foil_labels" in next(iter(data))
    assert cli.main([*map(str, words), "--columns", "prompt"]) == 2


# ------------------------------------------------------------------------------------------------- images and sounds


def drawn(size=32, mode="RGB", seed=0):
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def stored(tmp_path, columns, **features):
    path = tmp_path / "rows.parquet"
    data = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    data.to_parquet(path)
    return path


SIZE = {"height": 32, "width": 32}
PICTURES = [drawn(seed=0), drawn(seed=1)]


def objects_case():
    boxes = [[[4.0, 8.0, 16.0, 8.0]], [[0.0, 0.0, 32.0, 16.0], [8.0, 8.0, 8.0, 8.0]]]
    columns = {"image": PICTURES, "objects": [{"bbox": b, "category": [1, 2][: len(b)]} for b in boxes]}
    return "detection", columns, tf.YolosImageProcessor(do_resize=False, do_pad=False), "detection"


def masks_case():
    masks = [Image.fromarray((torch.arange(1024).view(32, 32) // 400).to(torch.uint8).numpy()) for i in range(2)]
    return "semantic", {"image": PICTURES, "mask": masks}, tf.SegformerImageProcessor(size=SIZE), "pixel_margin"


def depths_case():
    depths = [Image.fromarray(torch.rand(32, 32).add(0.5).numpy()) for _ in range(2)]
    return "depth", {"image": PICTURES, "depth": depths}, tf.GLPNImageProcessor(size_divisor=32), "depth"


def captions_case():
    processor = tf.CLIPProcessor(tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE), tokenizer())
    return "image_and_text", {"image": PICTURES, "caption": ["a dull film", "it"]}, processor, "similarity"


def candidates_case():
    name, columns, processor, _ = captions_case()
    columns = {"image": columns["image"], "candidates": [["a film", "it"], ["dull", "fine"]], "label": [1, 0]}
    return name, columns, processor, "margin"


def conversations_case():
    words = tokenizer(closing=False)
    words.add_tokens([f"word {place}" for place in range(len(words), 39)])  # the model's own place of the image
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size=SIZE, crop_size=SIZE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    columns = {"image": PICTURES, "question": ["is it dull", "is it"], "answer": ["very dull", "fine"]}
    return "image_text", columns, processor, "token_margin"


@pytest.mark.parametrize(
    "make", [objects_case, masks_case, depths_case, captions_case, candidates_case, conversations_case]
)
def test_columns_of_images_become_what_the_task_needs(make, tmp_path):
    name, columns, processor, output = make()
    model, data = coar.load(made(name)[0], stored(tmp_path, columns), preprocessor=processor)
    batch = next(iter(data))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert attributed(model, data).provenance.output == output
    if name == "detection":
        assert batch["labels"][0]["boxes"].tolist() == [[0.375, 0.375, 0.5, 0.25]]
        assert [one["class_labels"].tolist() for one in batch["labels"]] == [[1], [1, 2]]
    elif name == "semantic":
        assert batch["labels"][0].tolist() == (torch.arange(1024).view(32, 32) // 400).tolist()
    elif name == "depth":
        assert torch.allclose(batch["labels"][1], torch.from_numpy(np.array(columns["depth"][1])))
    elif name == "image_text":
        answers = [row[row != -100].tolist() for row in batch["labels"]]
        assert answers == [ids("very dull", False), ids("fine", False)]
        assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [16, 16]
    elif output == "margin":
        assert batch["input_ids"].shape[:2] == (2, 2) and batch["labels"].tolist() == [1, 0]


def sounds():
    return [torch.randn(1600, generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]


def test_sounds_with_a_label_and_with_what_is_said(tmp_path):
    extractor = tf.Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=16000)
    path = stored(tmp_path, {"audio": sounds(), "label": [2, 0]})
    model, data = coar.load(made("audio")[0], path, preprocessor=extractor)
    batch = next(iter(data))
    assert torch.allclose(batch["input_values"], torch.tensor(sounds())) and batch["labels"].tolist() == [2, 0]
    assert attributed(model, data).provenance.output == "margin"
    letters = {"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4, "C": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    spelling = tf.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<unk>")
    path = stored(tmp_path, {"audio": sounds(), "text": ["AB", "C"]})
    model, data = coar.load(made("ctc")[0], path, preprocessor=tf.Wav2Vec2Processor(extractor, spelling))
    assert next(iter(data))["labels"].tolist() == [[3, 4], [5, -100]]
    assert attributed(model, data).provenance.output == "ctc_log_prob"
