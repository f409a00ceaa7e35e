"""Images with more than a label: objects, masks, depths, other images, texts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_coar.data import preprocessors
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Role, is_image, is_text, is_texts
from hf_coar.data.images import IMAGE, decoded, in_mode, shown_by_size
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading, by_head, by_roles
from hf_coar.data.language import ANSWER, PLACE, following, which
from hf_coar.errors import DataError
from hf_coar.models.outputs import IGNORED_LABEL

Row = Mapping[str, Any]

_CLASSES = ("category", "category_id", "categories", "label", "labels", "class")


def _has_boxes(feature: Any) -> bool:
    parts = getattr(feature, "feature", feature)
    return isinstance(parts, Mapping) and "bbox" in parts and any(name in parts for name in _CLASSES)


_BOXES = "{'bbox': [[left, top, width, height], …], 'category': […]}"

OBJECTS = Role("objects", _has_boxes, ("objects", "annotations"), _BOXES, named=True)
MASK = Role("mask", is_image, ("mask", "annotation", "segmentation_mask", "label", "labels"), "an image of classes",
            named=True)  # fmt: skip
DEPTH = Role("depth", is_image, ("depth", "depth_map", "label"), "an image of depths", named=True)
TRUE = Role("target", is_image, ("target", "hr", "ground_truth"), "the image that is to be made", named=True)
CAPTION = Role("text", lambda one: is_text(one) or is_texts(one), ("text", "caption", "captions", "candidates"),
               "a text, or a list of candidates")  # fmt: skip


def _processor(reading: Reading, whole: bool = False) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    what = (AutoProcessor, "processor") if whole else (AutoImageProcessor, "image processor")
    return preprocessors.load(what[0], reading.model, what[1], reading.preprocessor)


def _pictures(rows: Sequence[Row], column: str) -> list[Any]:
    return [in_mode(decoded(row[column]), "RGB") for row in rows]


def _objects(reading: Reading) -> Preparation:
    processor, (image, objects) = _processor(reading), (reading.columns[role] for role in ("image", "objects"))

    def make(rows: Sequence[Row]) -> Batch:
        annotations = [{"image_id": i, "annotations": _coco(row[objects])} for i, row in enumerate(rows)]
        return dict(processor(images=_pictures(rows, image), annotations=annotations, return_tensors="pt"))

    return shown_by_size(reading, make)


def _coco(objects: Any) -> list[dict[str, Any]]:
    """Objects in COCO's way, from a mapping of lists or a list of mappings."""
    each = (
        objects
        if isinstance(objects, list)
        else [dict(zip(objects, row, strict=True)) for row in zip(*objects.values(), strict=True)]
    )
    found = []
    for one in each:
        box, name = [float(value) for value in one["bbox"]], next(name for name in _CLASSES if name in one)
        found.append({"bbox": box, "category_id": int(one[name]), "area": box[2] * box[3], "iscrowd": 0})
    if not found:
        raise ValueError("no objects")  # is left out
    return found


def _masks(reading: Reading) -> Preparation:
    processor, (image, mask) = _processor(reading), (reading.columns[role] for role in ("image", "mask"))

    def make(rows: Sequence[Row]) -> Batch:
        maps = [np.asarray(decoded(row[mask])) for row in rows]
        if any(one.ndim != 2 for one in maps):
            raise DataError(
                f"the masks in {mask!r} have {maps[0].ndim} axes; give images with one class a pixel (mode L)"
            )
        found = processor(images=_pictures(rows, image), segmentation_maps=maps, return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, Tensor | list)}

    return shown_by_size(reading, make)


def _depths(reading: Reading) -> Preparation:
    processor, (image, depth) = _processor(reading), (reading.columns[role] for role in ("image", "depth"))

    def make(rows: Sequence[Row]) -> Batch:
        pixels = processor(images=_pictures(rows, image), return_tensors="pt")["pixel_values"]
        true = [torch.from_numpy(np.array(decoded(row[depth]), dtype=np.float32))[None, None] for row in rows]
        return {"pixel_values": pixels, "labels": torch.cat([F.interpolate(x, pixels.shape[2:]) for x in true])[:, 0]}

    return shown_by_size(reading, make)


def _images(reading: Reading) -> Preparation:
    processor, (image, target) = _processor(reading), (reading.columns[role] for role in ("image", "target"))
    scale = getattr(reading.model.config, "upscale", 1)

    def make(rows: Sequence[Row]) -> Batch:
        pixels = processor(images=_pictures(rows, image), return_tensors="pt")["pixel_values"]
        true = [np.asarray(one, dtype=np.float32) / 255 for one in _pictures(rows, target)]
        size = [scale * side for side in pixels.shape[2:]]  # the processor pads to whole windows at the right and below
        each = [torch.from_numpy(one).permute(2, 0, 1) for one in true]
        padded = [F.pad(x[None], (0, size[1] - x.shape[2], 0, size[0] - x.shape[1]), mode="replicate") for x in each]
        return {"pixel_values": pixels, "labels": torch.cat(padded)}

    return shown_by_size(reading, make)


def _captions(reading: Reading) -> Preparation:
    processor, (image, text) = _processor(reading, whole=True), (reading.columns[role] for role in ("image", "text"))
    label = reading.columns.get("label")

    def make(rows: Sequence[Row]) -> Batch:
        texts = [row[text] for row in rows]
        several = isinstance(texts[0], list)
        flat = [one for row in texts for one in row] if several else texts
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        found = dict(processor(text=flat, images=_pictures(rows, image), **options))
        if several:
            count = len(texts[0])
            if any(len(row) != count for row in texts):
                raise DataError(
                    f"the examples have {sorted({len(row) for row in texts})} candidates; give as many to each"
                )
            found = {n: v if n == "pixel_values" else v.unflatten(0, (-1, count)) for n, v in found.items()}
            if label is None:
                raise DataError(f"{text!r} holds candidates, and no column says which is right: name one as the label")
            found["labels"] = torch.tensor([which(row[label], count) for row in rows])
        return found

    return shown_by_size(reading, make)


def _conversations(reading: Reading) -> Preparation:
    """An image, what is asked, and the answer, whose tokens are labelled; without an answer, the text itself."""
    processor, (image, text) = _processor(reading, whole=True), (reading.columns[role] for role in ("image", "text"))
    answer = reading.columns.get("answer")

    def make(rows: Sequence[Row]) -> Batch:
        asked, pictures = [_asked(processor, row[text]) for row in rows], _pictures(rows, image)
        whole = [a + following(a, row[answer]) for a, row in zip(asked, rows, strict=True)] if answer else asked
        found = dict(processor(text=whole, images=pictures, padding=True, return_tensors="pt"))
        ids, attended = found["input_ids"], found["attention_mask"].bool()
        special = [token for token in processor.tokenizer.all_special_ids if token is not None]
        placeholder = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        told = attended & ~torch.isin(ids, torch.tensor([*special, placeholder]))
        if answer:
            told &= torch.stack(
                [_last(attended[i], _length(processor, asked[i], pictures[i])) for i in range(len(rows))]
            )
        return {**found, "labels": ids.where(told, IGNORED_LABEL)}

    return shown_by_size(reading, make)


def _asked(processor: Any, text: str) -> str:
    """What is asked with the place of its image, as the model was trained to be asked."""
    if processor.image_token in text:
        return text
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{processor.image_token} {text}"


def _length(processor: Any, text: str, image: Any) -> int:
    return processor(text=[text], images=[image], return_tensors="pt")["input_ids"].shape[1]


def _last(attended: Tensor, without: int) -> Tensor:
    """The attended places but for so many at the beginning."""
    return attended & (attended.long().cumsum(0) > without)


ASKED = Role("text", is_text, ("question", "prompt", "text", "instruction", "caption"), "what is asked")

for _name, _roles, _optional, _tasks, _build in (
    ("image and objects", (IMAGE, OBJECTS), (), ("object_detection",), _objects),
    ("image and mask", (IMAGE, MASK), (), ("semantic_segmentation", "universal_segmentation"), _masks),
    ("image and depth", (IMAGE, DEPTH), (), ("depth_estimation",), _depths),
    ("image and image", (IMAGE, TRUE), (), ("image_to_image",), _images),
    ("image and text", (IMAGE, CAPTION, PLACE), ("label",), ("zero_shot_image_classification",), _captions),
    ("image and answer", (IMAGE, ASKED, ANSWER), ("answer",), ("image_text_lm",), _conversations),
):
    _choose = by_roles(_roles, _optional)
    KINDS.add(_name, Kind(_name, _roles, by_head(*_tasks), _choose, _build, lazy=("image",), optional=_optional))
