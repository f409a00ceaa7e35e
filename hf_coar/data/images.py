"""Images as batches: resized and normalised as the model was trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar.data import preprocessors
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, asked, is_image, the_one
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading
from hf_coar.errors import DataError
from hf_coar.models import library, wrapped

IMAGE = Role("image", is_image, ("image", "img"), "an image", become="a data set's paths and arrays become images by "
             "data.cast_column(…, datasets.Image())")  # fmt: skip


def reads_images(model: nn.Module) -> int:
    """How surely a model reads images; see `Kind.reads`."""
    model = wrapped(model)
    if library(model) == "timm":
        return 2
    if library(model) == "transformers":
        return 2 if getattr(model, "main_input_name", None) == "pixel_values" else 0
    return 1


def _choose(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    found = asked(given, table, (IMAGE,))
    return found or {"image": the_one(IMAGE, table, taken)}


def _build(reading: Reading) -> Preparation:
    column = reading.columns["image"]
    transform = _transform(reading.model, reading.preprocessor)

    def prepare(examples: list[dict]) -> Batch:
        pixels = torch.stack([transform(decoded(example[column])) for example in examples])
        return reading.labelled({"pixel_values": pixels}, examples)

    return shown_by_size(reading, prepare)


def shown_by_size(reading: Reading, prepare: Callable[[list[dict]], Batch]) -> Preparation:
    """A preparation of images, of each of which its size and mode are told."""
    column = reading.columns["image"]

    def show(example: Mapping[str, Any]) -> str:
        image = decoded(example[column])
        return f"an image of {image.width} × {image.height}, mode {image.mode}"

    return Preparation(prepare, show)


def _transform(model: nn.Module, preprocessor: Any) -> Callable[[Any], Tensor]:
    if callable(preprocessor) and not hasattr(preprocessor, "from_pretrained"):
        return lambda image: _checked(preprocessor(image))
    if library(model) == "timm":
        if preprocessor is not None:
            raise DataError(
                "preprocessor=… of a timm model is a function from an image to a tensor, such as a transform of "
                "torchvision; timm's own preprocessing is in model.pretrained_cfg"
            )
        return _timm_transform(model)
    from transformers import AutoImageProcessor

    processor = preprocessors.load(AutoImageProcessor, model, "image processor", preprocessor)
    return lambda image: processor(in_mode(image, "RGB"), return_tensors="pt")["pixel_values"][0]


def _checked(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise DataError(f"the preprocessor made a {type(found).__name__} of an image; give a function to a tensor")
    return found


def _timm_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    if _takes_one_channel(model):  # whatever the configuration, which `create_model(…, in_chans=1)` leaves as it was
        config["input_size"] = (1, *config["input_size"][1:])
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    transform = create_transform(**config, is_training=False)
    mode = {1: "L", 3: "RGB"}.get(config["input_size"][0])
    return lambda image: transform(in_mode(image, mode) if mode else image)


def _takes_one_channel(model: nn.Module) -> bool:
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    modules = dict(model.named_modules())
    names = [first] if isinstance(first, str) else first or ()
    return any(getattr(modules.get(name), "in_channels", None) == 1 for name in names)


def in_mode(image: Any, mode: str) -> Any:
    """An image in another mode; one of 16 bits is scaled to 8, which PIL's own conversion cuts off at 255.

    Raises:
        ValueError: its numbers have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        from PIL import Image

        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode!r} has no known range; save it with 8 or 16 bits a channel")
    return image.convert(mode)


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
