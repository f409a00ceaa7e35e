"""Heads over images: objects, regions, depth, other images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import wrapped
from hf_coar.models.outputs import IGNORED_LABEL
from hf_coar.models.tasks.base import Batch, labels_of, register

_SMALL = 1e-6  # below this a product of probabilities or an overlap counts as none


def _field(found: Any, *names: str) -> Tensor:
    """The first of some fields of what a model returned that is there, float32.

    Raises:
        CoarError: none is.
    """
    for name in names:
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            return value.float()
    raise CoarError(
        f"the model returned a {type(found).__name__} without {' or '.join(names)}; use 'own_loss', or an output "
        "function of your own"
    )


# -------------------------------------------------------------------------------------------------------------- objects


def _detect(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the classes [examples, queries, classes], and boxes [examples, queries, 4]."""
    found = calling.call(model, batch)
    logits, boxes = _field(found, "logits"), _field(found, "pred_boxes")
    # With one class more than there are labels it is a choice among them and "no object", else each is by itself.
    one_of = logits.shape[-1] == getattr(wrapped(model).config, "num_labels", -1) + 1
    return (logits.log_softmax(-1) if one_of else F.logsigmoid(logits)), boxes


@outputs.register("detection", unit="nats an object", takes="output", call=_detect)
def detection(found: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """How well the objects of an image are found: mean over them of the best query's log p(class) + log IoU.

    The overlap is intersection over union of the query's box and the true one. At most 0. What is seen where there is
    nothing does not count; `own_loss` counts it.
    """
    log_probs, boxes = found
    return torch.stack(
        [_found(log_probs[i], boxes[i], *_objects(one, i, log_probs.shape[-1])) for i, one in enumerate(_listed(batch))]
    )


def _listed(batch: Batch) -> Sequence[Any]:
    labels = batch.get("labels")
    if not isinstance(labels, list | tuple) or not all(isinstance(one, Mapping) for one in labels):
        raise DataError(
            "this output needs 'labels', a list with a mapping {'class_labels': [objects], 'boxes': [objects, 4]} for "
            f"every example, and the batch has {type(labels).__name__ if labels is not None else 'none'}"
        )
    return labels


def _objects(one: Mapping[str, Tensor], index: int, n_classes: int) -> tuple[Tensor, Tensor]:
    classes, boxes = one.get("class_labels"), one.get("boxes")
    if classes is None or boxes is None or len(classes) == 0 or boxes.shape != (len(classes), 4):
        raise DataError(
            f"labels of example {index} of the batch hold {', '.join(one)}: give 'class_labels' [objects] and 'boxes' "
            "[objects, 4] (centre, width and height as fractions), at least one object"
        )
    if int(classes.min()) < 0 or int(classes.max()) >= n_classes:
        raise DataError(f"class_labels run from {int(classes.min())} to {int(classes.max())}, of {n_classes} classes")
    return classes.long(), boxes.float()


def _found(log_probs: Tensor, boxes: Tensor, classes: Tensor, true: Tensor) -> Tensor:
    """How well the objects of one example are found.

    Args:
        log_probs: [queries, classes].
        boxes: [queries, 4].
        classes: [objects].
        true: their boxes, [objects, 4].
    """
    overlap = _overlap(_corners(boxes)[:, None], _corners(true)[None])
    return (log_probs[:, classes] + overlap.clamp_min(_SMALL).log()).max(0).values.mean()


def _corners(boxes: Tensor) -> Tensor:
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes given by their corners [..., 4]."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp_min(0).prod(-1) for x in (a, b)]
    return inside / (areas[0] + areas[1] - inside).clamp_min(_SMALL)


# -------------------------------------------------------------------------------------------------------------- regions

_VOID = 255  # the label that segmentation data give to what belongs to no class


def _pixels(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the size of the labels [examples, classes, …], labels, and which pixels count."""
    labels = labels_of(batch)
    if logits.dim() != 4 or labels.dim() != 3 or len(labels) != len(logits):
        raise DataError(
            f"this output is for logits [examples, classes, height, width] and labels [examples, height, width]; they "
            f"have shape {list(logits.shape)} and {list(labels.shape)}"
        )
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    real = (labels != _VOID) & (labels != IGNORED_LABEL)
    if (
        int(labels[real].min() if real.any() else 0) < 0
        or int(labels[real].max() if real.any() else 0) >= logits.shape[1]
    ):
        raise DataError(f"labels run from {int(labels[real].min())} to {int(labels[real].max())}, of {logits.shape[1]}")
    empty = (~real.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"examples {empty} of the batch have no labelled pixel; leave them out")
    return logits, labels.long().where(real, 0), real


def _mean(values: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, values, 0.0).flatten(1).sum(1) / real.flatten(1).sum(1)


@outputs.register("pixel_log_prob", unit="nats a pixel")
def pixel_log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the class of a pixel, mean over the labelled ones, at the size of the labels (at most 0)."""
    logits, labels, real = _pixels(logits, batch)
    return _mean(-F.cross_entropy(logits, labels, reduction="none"), real)


@outputs.register("pixel_margin", unit="logits", boundary=0.0)
def pixel_margin(logits: Tensor, batch: Batch) -> Tensor:
    """Margin of the class of a pixel, mean over the labelled ones, at the size of the labels."""
    logits, labels, real = _pixels(logits, batch)
    return _mean(outputs.margins(logits.movedim(1, -1), labels), real)


@outputs.register("segment_log_prob", unit="nats a segment", takes="output")
def segment_log_prob(found: Any, batch: Batch) -> Tensor:
    """How well the segments of an image are found: mean over them of the mean over their pixels of log s(class, pixel).

    s is the map of MaskFormer's semantic inference (Cheng et al. 2021): the sum over the queries of p(class) times the
    sigmoid of the mask. Needs `mask_labels` and `class_labels`, lists of tensors [segments, height, width] and
    [segments], one an example.
    """
    classes = _field(found, "class_queries_logits", "logits").softmax(-1)[..., :-1]
    masks = _field(found, "masks_queries_logits", "pred_masks").sigmoid()
    true, which = _segments(batch)
    values = []
    for index, (regions, labels) in enumerate(zip(true, which, strict=True)):
        map_of = torch.einsum("qc,qhw->chw", classes[index], masks[index])
        if map_of.shape[1:] != regions.shape[1:]:
            map_of = F.interpolate(map_of[None], size=regions.shape[1:], mode="bilinear", align_corners=False)[0]
        scores = map_of.clamp_min(_SMALL).log()[labels.long()]
        inside = regions.float()
        values.append(((scores * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)).mean())
    return torch.stack(values)


def _segments(batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The regions and classes of every example, of `mask_labels` and `class_labels` or of DETR's `labels`."""
    true, which = batch.get("mask_labels"), batch.get("class_labels")
    if true is None and isinstance(batch.get("labels"), list | tuple):
        true, which = ([one.get(name) for one in batch["labels"]] for name in ("masks", "class_labels"))
    if true is None or which is None or any(value is None for value in (*true, *which)):
        raise DataError(
            f"this output needs 'mask_labels' and 'class_labels', one tensor an example, and the batch has "
            f"{', '.join(batch)}"
        )
    bad = [
        i for i, one in enumerate(true) if not len(one) or len(one) != len(which[i]) or not one.flatten(1).any(1).all()
    ]
    if bad:
        raise DataError(f"examples {bad} of the batch have no segment, an empty one, or not one class for each")
    return true, which


# -------------------------------------------------------------------------------------------- depth, other images


@outputs.register("depth", unit="depth, absolute error", takes="output")
def depth(found: Any, batch: Batch) -> Tensor:
    """Minus the absolute error of the predicted depth, mean over the pixels whose true depth is above 0 (at most 0)."""
    predicted, labels = _field(found, "predicted_depth"), labels_of(batch).float()
    if labels.dim() != 3 or len(labels) != len(predicted):
        raise DataError(
            f"labels have shape {list(labels.shape)}; expected depths [examples, height, width], 0 = unknown"
        )
    if predicted.shape[1:] != labels.shape[1:]:
        predicted = F.interpolate(predicted[:, None], size=labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    known = labels > 0
    if not known.flatten(1).any(1).all():
        raise DataError("an example of the batch has no pixel with a depth above 0; leave it out")
    return _mean(-(predicted - labels).abs(), known)


@outputs.register("reconstruction", unit="squared error", takes="output")
def reconstruction(found: Any, batch: Batch) -> Tensor:
    """Minus the squared error of the image that is made, mean over its values; `labels` is the true one (at most 0)."""
    made, labels = _field(found, "reconstruction", "sample"), labels_of(batch).float()
    if made.shape != labels.shape:
        raise DataError(f"labels have shape {list(labels.shape)}, and the images made {list(made.shape)}")
    return -(made - labels).square().flatten(1).mean(1)


@outputs.register("mask_log_prob", unit="nats a pixel", takes="output")
def mask_log_prob(found: Any, batch: Batch) -> Tensor:
    """Log-probability of the true mask under the best of the masks that a prompt gets, mean over pixels and prompts.

    `labels` holds the true masks, [examples, prompts, height, width], at the size of the predicted ones.
    """
    masks, labels = _field(found, "pred_masks"), labels_of(batch).float()
    if masks.dim() != 5 or labels.shape != (*masks.shape[:2], *masks.shape[3:]):
        raise DataError(
            f"labels have shape {list(labels.shape)}, and the masks {list(masks.shape)}; expected [examples, prompts, "
            "height, width] of 0 and 1"
        )
    true = labels[:, :, None].expand_as(masks)
    each = -F.binary_cross_entropy_with_logits(masks, true, reduction="none").flatten(3).mean(3)
    return each.max(2).values.mean(1)


register(
    "object_detection",
    ("detection", "own_loss"),
    ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",),
    columns=("image", "objects"),
)
register(
    "zero_shot_object_detection",
    ("detection", "own_loss"),
    ("MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",),
    columns=("image", "text", "objects"),
)
register(
    "semantic_segmentation",
    ("pixel_margin", "pixel_log_prob", "own_loss"),
    ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",),
    columns=("image", "mask"),
)
register(
    "universal_segmentation",
    ("segment_log_prob", "own_loss"),
    (
        "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES",
    ),
    targets=("mask_labels", "class_labels", "labels"),
    needs=(),
    columns=("image", "mask", "classes"),
)  # fmt: skip
register("depth_estimation", ("depth",), ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",), columns=("image", "depth"))
register(
    "image_to_image", ("reconstruction",), ("MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",), columns=("image", "target")
)
register(
    "mask_generation",
    ("mask_log_prob",),
    ("MODEL_FOR_MASK_GENERATION_MAPPING_NAMES",),
    columns=("image", "points", "mask"),
)
