"""Images as batches: resized and normalised as the model was trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.data import preprocessors
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, asked, is_image, the_one
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading
from hf_coar.errors import DataError
from hf_coar.models import library

IMAGE = Role("image", is_image, ("image", "img"), "an image")


def reads_images(model: nn.Module) -> int:
    """How surely a model reads images; see `Kind.reads`."""
    if library(model) == "timm":
        return 2
    if library(model) == "transformers":
        return 2 if getattr(model, "main_input_name", None) == "pixel_values" else 0
    return 1


def _choose(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    found = asked(given, table, (IMAGE,))
    return found or {"image": the_one(IMAGE, table, taken)}


def _build(reading: Reading) -> Preparation:
    column, labels = reading.columns["image"], reading.labels
    transform = _transform(reading.model, reading.preprocessor)

    def prepare(examples: list[dict]) -> Batch:
        batch = {"pixel_values": torch.stack([transform(decoded(example[column])) for example in examples])}
        return batch if labels is None else {**batch, "labels": labels.tensor(examples)}

    def show(example: Mapping[str, Any]) -> str:
        image = decoded(example[column])
        return f"an image of {image.width} × {image.height}, mode {image.mode}"

    return Preparation(prepare, show)


def _transform(model: nn.Module, preprocessor: Any) -> Callable[[Any], Tensor]:
    if library(model) == "timm":
        if preprocessor is not None:
            raise DataError(
                "preprocessor=… is for transformers models; timm's preprocessing is in model.pretrained_cfg"
            )
        return _timm_transform(model)
    from transformers import AutoImageProcessor

    processor = preprocessors.load(AutoImageProcessor, model, "image processor", preprocessor)
    return lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def _timm_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    mode = {1: "L", 3: "RGB"}.get(config["input_size"][0])
    return lambda image: transform(image.convert(mode) if mode else image)


def has_to_be_decoded(feature: Any) -> bool:
    """Whether the entries of a column are files: images, sounds, videos."""
    return hasattr(feature, "decode_example")


def undecoded(feature: Any) -> Any:
    """The type of a column of images or sounds whose entries stay bytes until somebody needs them."""
    feature = copy.copy(feature)
    feature.decode = False
    return feature


def decoded(image: Any) -> Any:
    """An image that its data set left undecoded (a mapping of bytes and path), or any other one as it is."""
    if not isinstance(image, Mapping):
        return image
    from datasets import Image

    return Image().decode_example(image)


KINDS.add("image", Kind("image", (IMAGE,), reads_images, _choose, _build, lazy=("image",)))
