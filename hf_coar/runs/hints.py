"""Hints: what the first examples and their logits look like that is no error, and not what was meant either."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.models import calling, tasks
from hf_coar.models.outputs import DECODED, Output
from hf_coar.storage.labels import name_key, places
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]

_OF_CLASSES = ("margin", "log_prob", "logit", "loss")  # outputs that take logits for one of each class
_OF_ONE = 1e-2  # by which probabilities in half precision miss a sum of one


def tell_of_inputs(model: nn.Module, batch: Batch) -> None:
    """Warns of padding that nothing masks, of pairs that nothing marks, and of padding that is to be predicted."""
    _tell_unmasked_padding(model, batch)
    _tell_unmarked_pairs(model, batch)
    _tell_padded_targets(model, batch)


def _tell_unmasked_padding(model: nn.Module, batch: Batch) -> None:
    """Warns of padding that nothing masks: it is attended to, and counts as text that is to be predicted."""
    config, tokens = getattr(models.wrapped(model), "config", None), batch.get("input_ids")
    pad = getattr(config, "pad_token_id", None)
    masked = "attention_mask" in batch or "attention_mask" not in calling.forward_names(model)[0]
    if masked or pad is None or not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return
    # Where the end of a text is marked by the same token, one of them is no padding.
    width = 2 if pad in (getattr(config, "eos_token_id", None), getattr(config, "bos_token_id", None)) else 1
    ends = (tokens[:, :width], tokens[:, -width:])
    padded = sum((end == pad).all(1) for end in ends).bool()
    if tokens.shape[1] > width and padded.any():
        logger.warning(
            "%d of the first %d examples begin or end in the padding token %d, and the batch has no attention_mask: "
            "the model takes padding for text; give the mask that the tokenizer gave, or examples of one length",
            int(padded.sum()), len(tokens), pad,
        )  # fmt: skip


def _tell_unmarked_pairs(model: nn.Module, batch: Batch) -> None:
    """Warns of pairs of texts of which the model is not told where the second one begins, as BERT was trained to be."""
    tokens, sorts = (
        batch.get("input_ids"),
        getattr(getattr(models.wrapped(model), "config", None), "type_vocab_size", 0),
    )
    told = "token_type_ids" in batch or "token_type_ids" not in calling.forward_names(model)[0]
    if told or (sorts or 0) < 2 or not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return
    attended = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    texts = [row[mask].tolist() for row, mask in zip(tokens, attended, strict=True)]
    # What begins all texts, and another token that ends them all and stands inside each of them once more.
    ends = {(text[0], text[-1]) for text in texts}
    if len(texts) > 1 and len(ends) == 1 and all(text.count(text[-1]) == 2 and text[-2] != text[-1] for text in texts):
        logger.warning(
            "the examples look like pairs of texts (token %d ends them and stands inside), and the batch has no "
            "token_type_ids, so that the model takes both for the first one; give those that the tokenizer gave",
            texts[0][-1],
        )  # fmt: skip


def _tell_padded_targets(model: nn.Module, batch: Batch) -> None:
    """Warns of padding among the targets of a decoder, which -100 is to stand for."""
    config, labels = getattr(models.wrapped(model), "config", None), batch.get("labels")
    pad, ends = getattr(config, "pad_token_id", None), [getattr(config, f"{n}_token_id", None) for n in ("eos", "bos")]
    if pad is None or pad in ends or tasks.of(model).alignment != DECODED or "decoder_attention_mask" in batch:
        return
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return
    padded = labels[:, -1] == pad
    if padded.any():
        logger.warning(
            "the labels of %d of the first %d examples end in the padding token %d, which then counts as what is to be "
            "predicted; put -100 in its place, as the losses of transformers want it",
            int(padded.sum()), len(labels), pad,
        )  # fmt: skip


def tell_of_logits(model: nn.Module, output: Output, logits: Sequence[Tensor]) -> None:
    """Warns of a model that ends in a softmax: what outputs make of logits is something else then."""
    for found in logits[:1]:
        classes = found.dim() > 1 and found.shape[-1] > 1
        if classes and bool((found >= 0).all()) and bool(((found.sum(-1) - 1).abs() < _OF_ONE).all()):
            logger.warning(
                "%s gives probabilities, it seems, and output %r takes them for logits: margins are differences of "
                "probabilities then, and log_prob and loss are wrong; take the softmax out of the model, or give "
                "call=, a function (model, batch) -> logits, such as the log of what it returns",
                type(models.wrapped(model)).__name__, output.name,
            )  # fmt: skip


def tell_of_names(model: nn.Module, output: Output, logits: Tensor, names: Sequence[str]) -> None:
    """Warns of data that name more or fewer classes than a model tells apart, or number them otherwise.

    Args:
        model: any module.
        output: that it is looked at by.
        logits: of some examples.
        names: of the classes, as the data have them; none where they name none.
    """
    of_classes = output.name in _OF_CLASSES and logits.dim() == 2 and logits.shape[1] > 1
    if not names or not of_classes:
        return
    theirs = places(models.class_names(model) or ())  # of which several may have one name
    moved = [place for place, name in enumerate(names) if place not in theirs.get(name_key(name), (place,))]
    if moved:
        name, there = names[moved[0]], theirs[name_key(names[moved[0]])][0]
        logger.warning(
            "%r is class %d of the data and class %d of %s: labels are taken by their numbers, so that it is counted "
            "right where the model says another one; number the classes of the data as the model does",
            name, moved[0], there, type(models.wrapped(model)).__name__,
        )  # fmt: skip
    elif len(names) != logits.shape[1]:
        logger.warning(
            "the data name %d classes (%s), and %s has %d: they are taken by their numbers. If they are not those that "
            "the model was trained on, give data with its own, or rename the classes of these",
            len(names), shortened(", ".join(names), 80), type(models.wrapped(model)).__name__, logits.shape[1],
        )  # fmt: skip
