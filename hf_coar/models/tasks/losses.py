"""The head's own training loss, for every head that has one and no output of its own here."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import CoarError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import wrapped
from hf_coar.models.tasks import apart
from hf_coar.models.tasks.base import Batch, register

# Random masks and noise are drawn anew in every pass; what is compared must have the same ones.
_SEED = 0


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the head on a batch, targets and all, as training has it: float32, a number or one an example.

    Raises:
        CoarError: it computes none.
    """
    devices = [calling.device_of(model)] if calling.device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        found = calling.call(model, {**_asked(model), **batch}, without=())
    loss = getattr(found, "loss", None)
    if not isinstance(loss, Tensor):
        raise CoarError(
            f"{type(wrapped(model)).__name__} computes no loss of {', '.join(batch)}; its forward takes "
            f"{', '.join(sorted(calling.forward_names(model)[0]))}: give its targets, or another output"
        )
    return loss.float()


def _asked(model: nn.Module) -> dict[str, Any]:
    """What some heads want to be asked for."""
    return {"return_loss": True} if "return_loss" in calling.forward_names(model)[0] else {}


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of every example by itself, float32 [examples]: means over a batch do not tell them apart."""
    return apart.losses(model, batch, loss_of)


@outputs.register("own_loss", unit="of the head's loss", takes="output", call=losses)
def own_loss(found: Tensor, batch: Batch) -> Tensor:
    """Minus the head's own training loss of every example by itself."""
    return -found


_LOSS = ("own_loss",)

register(
    "transducer", _LOSS, ("MODEL_FOR_RNNT_MAPPING_NAMES", "MODEL_FOR_TDT_MAPPING_NAMES"), columns=("audio", "text")
)
register(
    "time_series_prediction",
    _LOSS,
    (
        "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES", "PatchTSTForPrediction", "PatchTSMixerForPrediction",
        "TimeSeriesTransformerForPrediction", "InformerForPrediction", "AutoformerForPrediction",
    ),
    targets=("future_values",),
    columns=("past_values", "future_values"),
)  # fmt: skip
register(
    "time_series_classification",
    _LOSS,
    ("MODEL_FOR_TIME_SERIES_CLASSIFICATION_MAPPING_NAMES",),
    targets=("target_values",),
    columns=("past_values", "target_values"),
)
register(
    "time_series_regression",
    _LOSS,
    ("MODEL_FOR_TIME_SERIES_REGRESSION_MAPPING_NAMES",),
    targets=("target_values",),
    columns=("past_values", "target_values"),
)
register(
    "masked_image_modeling",
    _LOSS,
    ("MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES", "ViTMAEForPreTraining"),
    targets=(),
    columns=("image",),
)
register(
    "table_question_answering",
    _LOSS,
    ("MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING_NAMES",),
    columns=("table", "text", "label"),
)
register(
    "text_to_speech",
    _LOSS,
    ("MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES", "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES"),
    needs=(),
    columns=("text", "audio"),
)
register(
    "dense_prediction",
    _LOSS,
    (
        "MODEL_FOR_IMAGE_MATTING_MAPPING_NAMES", "MODEL_FOR_NORMAL_ESTIMATION_MAPPING_NAMES",
        "MODEL_FOR_POINTMAP_ESTIMATION_MAPPING_NAMES", "MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES",
        "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES", "MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES",
    ),
    columns=("image", "label"),
)  # fmt: skip
register("own_loss", _LOSS, columns=())
