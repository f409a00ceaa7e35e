"""A tokenizer of a few words and classifiers of texts that fit it, saved in folders."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dull", "film", "fine", "very", "is", "it"]


def tokenizer():
    """Knows `WORDS`, and how two texts are put together."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, **special)


def classifier(names: list[str] | None = None, **settings):
    """A small BERT with a head, seeded; its classes have these names."""
    from transformers import BertConfig, BertForSequenceClassification

    if names is not None:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 32}
        return BertForSequenceClassification(BertConfig(**sizes, **settings)).eval()


def saved(folder: Path, model, with_tokenizer: bool = True) -> Path:
    """The model in a folder, with the tokenizer beside it."""
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def written(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text, encoding="utf-8")
    return path
