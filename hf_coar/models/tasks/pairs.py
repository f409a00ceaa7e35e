"""Models that put things into one space: images with texts, a text with another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import wrapped
from hf_coar.models.tasks.base import Batch, labels_of, register, two_sides

# ------------------------------------------------------------------------------------------------------ image and text


def match(model: nn.Module, batch: Batch) -> Tensor:
    """Scaled similarity of every image with its own text [examples, 1], or with each of its candidates.

    Candidates are `input_ids` [examples, candidates, tokens] (and masks alike); then it is [examples, candidates], and
    the model runs once a candidate.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        raise DataError(
            f"{type(wrapped(model)).__name__} compares an image with 'input_ids'; there are {', '.join(batch)}"
        )
    texts = {name: value for name, value in batch.items() if name in _TEXT and isinstance(value, Tensor)}
    if ids.dim() == 2:
        return _own(model, batch)[:, None]
    rounds = [{name: value[:, place] for name, value in texts.items()} for place in range(ids.shape[1])]
    return torch.stack([_own(model, {**batch, **one}) for one in rounds], dim=1)


_TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _own(model: nn.Module, batch: Batch) -> Tensor:
    """Scores of the images with their own texts; all of the batch are run against each other."""
    found = getattr(calling.call(model, batch), "logits_per_image", None)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != found.shape[1]:
        raise CoarError(
            f"{type(wrapped(model)).__name__} returns no logits_per_image of every image with every text; give call=, "
            "a function (model, batch) -> similarities [examples, candidates]"
        )
    return found.diagonal()


@outputs.register("similarity", unit="scaled cosine")
def similarity(logits: Tensor, batch: Batch) -> Tensor:
    """Similarity of the two things of an example, such as an image and its text."""
    if logits.dim() != 2 or logits.shape[1] != 1:
        raise CoarError(
            f"'similarity' is of one pair an example, and there are {list(logits.shape)[1:]}; with several candidates "
            "and 'labels' use 'margin' or 'log_prob'"
        )
    return logits[:, 0]


def _choose(model: nn.Module, batch: Batch) -> str:
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3:
        labels_of(batch)
        return "margin"
    return "similarity"


# -------------------------------------------------------------------------------------------------------- two of a kind

PAIR = "pair_"


def embed_pair(model: nn.Module, batch: Batch) -> Tensor:
    """Cosine of the embeddings of the two things of an example [examples, 1]; the model runs on each.

    The second one's entries bear the same names after `pair_`. An embedding is the mean of the last hidden states over
    the attended tokens, as most sentence encoders have it; of an image what the model pools. For another, give `call=`.

    Raises:
        DataError: there is no second one.
    """
    first, second = two_sides(batch, PAIR)
    if not second:
        raise DataError(
            f"{type(wrapped(model)).__name__} has no head: what of its embeddings is to be explained? Give pairs (the "
            f"second of each as {PAIR}{next(iter(batch))}), or call= and output= of your own, or a model with a task "
            "head"
        )
    a, b = (_embedding(calling.call(model, one), one) for one in (first, {**_shared(first, second), **second}))
    return F.cosine_similarity(a, b, dim=1)[:, None]


def _shared(first: Batch, second: Batch) -> Batch:
    """What both have in common: all but the tensors that the second one has of its own, and their masks."""
    return {} if "input_ids" in second or "pixel_values" in second else first


def _embedding(found: Any, batch: Batch) -> Tensor:
    hidden, pooled = getattr(found, "last_hidden_state", None), getattr(found, "pooler_output", None)
    if hidden is None and isinstance(found, Tensor):
        pooled = found
    if isinstance(hidden, Tensor) and hidden.dim() == 3 and ("input_ids" in batch or pooled is None):
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != hidden.shape[:2]:
            return hidden.float().mean(1)
        return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    if not isinstance(pooled, Tensor):
        raise CoarError(f"the model returned a {type(found).__name__} without embeddings; give call= of your own")
    return pooled.float().flatten(1)


register(
    "zero_shot_image_classification",
    ("similarity", "margin", "log_prob", "logit", "loss"),
    ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
    call=match,
    choose=_choose,
    needs=(),
    columns=("image", "text"),
)
register(
    "embedding",
    ("similarity",),
    ("MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",),
    call=embed_pair,
    needs=(),
    columns=("text", "text_pair", "label"),
    units={"similarity": "cosine"},
)
