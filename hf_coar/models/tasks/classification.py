"""Heads with one vector of logits an example: classifiers of any kind of input, regression, rewards."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import library, wrapped
from hf_coar.models.tasks.base import Batch, labels_of, of, register, two_sides

_CLASSIFIER = ("margin", "log_prob", "logit", "loss")
_ONE_VECTOR = (*_CLASSIFIER, "multi_label", "regression", "score", "preference", "own_loss")


def _floats(logits: Tensor, batch: Batch) -> Tensor:
    """Float labels in the shape of the logits."""
    labels = labels_of(batch).float()
    if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] == 1:
        labels = labels[:, None]
    if labels.dim() == 1 and logits.dim() == 2 and labels.shape != logits.shape:
        whole = outputs.AS_CLASSES if outputs.are_whole(labels) else "fractions name no class"
        raise DataError(
            f"labels are one number an example ({outputs.said(labels)}), and the model gives {logits.shape[1]}: "
            f"{whole}; if they are numbers to predict or yes and no, give one for each, of shape {list(logits.shape)}"
        )
    if labels.shape != logits.shape:
        raise DataError(f"labels have shape {list(labels.shape)}, and the model's logits {list(logits.shape)}")
    return labels


@outputs.register("multi_label", unit="nats a label")
def multi_label(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the labels, each by itself, mean over them: minus the binary cross-entropy (at most 0)."""
    labels = _floats(logits, batch)
    if float(labels.min()) < 0 or float(labels.max()) > 1:
        raise DataError(
            f"labels run from {float(labels.min())} to {float(labels.max())}; of several labels each is 0 … 1"
        )
    return -F.binary_cross_entropy_with_logits(logits, labels, reduction="none").reshape(len(logits), -1).mean(1)


@outputs.register("regression", unit="squared error")
def regression(logits: Tensor, batch: Batch) -> Tensor:
    """Minus the squared error, mean over the numbers that are predicted (at most 0)."""
    return -(logits - _floats(logits, batch)).square().reshape(len(logits), -1).mean(1)


@outputs.register("score", unit="of the model")
def score(logits: Tensor, batch: Batch) -> Tensor:
    """The one number that a reward model, a reranker or a regression gives; labels play no part."""
    if logits.dim() == 1:
        return logits
    if logits.dim() != 2 or logits.shape[1] != 1:
        raise CoarError(
            f"'score' is for heads with one number an example, and the logits have shape {list(logits.shape)}"
        )
    return logits[:, 0]


def both(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """The model run on what was chosen, and on what was rejected: entries of the same names after `rejected_`."""
    chosen, rejected = two_sides(batch, "rejected_")
    if not rejected:
        raise DataError(
            f"this output needs 'rejected_input_ids' beside 'input_ids', and the batch has {', '.join(batch)}"
        )
    run = of(model).run
    return run(model, chosen), run(model, {**chosen, **rejected})


@outputs.register("preference", unit="of the model", takes="output", call=both, boundary=0.0)
def preference(found: tuple[Any, Any], batch: Batch) -> Tensor:
    """Score of what was chosen minus score of what was rejected; above 0 = the reward model agrees."""
    chosen, rejected = (score(calling.logits_of(one).float(), batch) for one in found)
    return chosen - rejected


def _choose(model: nn.Module, batch: Batch) -> str:
    """By the number of logits and the kind of labels, as heads of transformers choose their loss."""
    config = getattr(wrapped(model), "config", None)
    count = getattr(config, "num_labels", None)
    stated = {"regression": "regression", "multi_label_classification": "multi_label"}
    labels, name = batch.get("labels"), type(wrapped(model)).__name__
    if labels is None and "rejected_input_ids" in batch:
        return "preference"
    if labels is None and count == 1:
        return "score"
    labels = labels_of(batch)
    if getattr(config, "problem_type", None) in stated:
        return stated[config.problem_type]
    if labels.is_floating_point():
        several = labels.dim() > 1 and labels.shape[1] > 1
        if config is None and not several and bool(((labels == 0) | (labels == 1)).all()):
            raise CoarError(
                f"the labels are 0 and 1 as fractions, and {name} does not say whether it gives the logit of yes or a "
                "number: say output='multi_label' (what BCEWithLogitsLoss trains) or output='regression'; "
                f"{outputs.AS_CLASSES}"
            )
        return "multi_label" if several and bool(((labels >= 0) & (labels <= 1)).all()) else "regression"
    if count == 1:
        raise CoarError(
            f"{name} gives one number, and the labels are whole numbers: it may be a score or a regression; say "
            "output='score' or output='regression'"
        )
    if labels.dim() > 1:
        raise DataError(
            f"labels are whole numbers of shape {list(labels.shape)}; give one class an example, or several labels an "
            "example as floats, 0 or 1"
        )
    return "margin"


def _has_classes(model: nn.Module) -> bool:
    """Whether a model has a head: timm takes it off with `num_classes=0`, and what is left gives features."""
    return library(model) != "timm" or getattr(model, "num_classes", None) != 0


register("classification", _ONE_VECTOR, choose=_choose, columns=("inputs", "label"))
register(
    "image_classification",
    _ONE_VECTOR,
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "timm"),
    choose=_choose,
    columns=("image", "label"),
    only=_has_classes,
)
register(
    "video_classification",
    _ONE_VECTOR,
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",),
    choose=_choose,
    columns=("video", "label"),
)
register(
    "text_classification",
    _ONE_VECTOR,
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    choose=_choose,
    columns=("text", "text_pair", "label"),
)
register(
    "audio_classification",
    _ONE_VECTOR,
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES"),
    choose=_choose,
    columns=("audio", "label"),
)
register(
    "visual_question_answering",
    _ONE_VECTOR,
    ("ViltForQuestionAnswering",),
    choose=_choose,
    columns=("image", "text", "label"),
)
register(
    "next_sentence_prediction",
    _CLASSIFIER,
    ("MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",),
    columns=("text", "text_pair", "label"),
)
register(
    "multiple_choice",
    _CLASSIFIER,
    ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",),
    columns=("text", "choices", "label"),
)
