"""What of an example a person can look at: its image, or its text."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.data.examples import Examples

_TEXT_ROLES = ("text", "pair")  # in the order in which a person reads them
_TEXT_COLUMNS = ("text", "sentence", "content")


def image_column(raw: Mapping[str, Any]) -> str | None:
    """The entry of a raw example that holds an image."""
    return next((name for name, value in raw.items() if hasattr(value, "convert") and hasattr(value, "size")), None)


def text_column(raw: Mapping[str, Any]) -> str | None:
    """The entry of a raw example that holds its text."""
    texts = [name for name, value in raw.items() if isinstance(value, str)]
    return next((name for name in _TEXT_COLUMNS if name in texts), texts[0] if texts else None)


def text_columns(raw: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """The entries of a raw example that were read as texts; of data that do not say it, the one that looks like it."""
    named = [description[role] for role in _TEXT_ROLES if isinstance(raw.get(description.get(role)), str)]
    return named or list(filter(None, [text_column(raw)]))


def shown(data: Iterable[Any], index: int) -> Any:
    """What a person can look at of an example: a PIL image, a text, or None; of batches of tensors the first alone."""
    if not isinstance(data, Examples):
        if index:
            return None
        batch = None if isinstance(data, Iterator) else next(iter(data), None)  # of an iterator that were another one
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else None
        return image_of(pixels[0]) if isinstance(pixels, Tensor) and len(pixels) else None
    raw = next(itertools.islice(iter(data.dataset), index, None), {})
    if (column := image_column(raw)) is not None:
        return raw[column]
    return " / ".join(raw[column] for column in text_columns(raw, data.description)) or None


def image_of(pixels: Any) -> Any:
    """Pixel values float [channels, height, width] as an image, stretched to their own range; None for others."""
    from PIL import Image

    if not isinstance(pixels, Tensor) or pixels.dim() != 3 or not pixels.numel() or not bool(pixels.isfinite().all()):
        return None
    pixels = pixels.detach().float().cpu()
    low, high = float(pixels.min()), float(pixels.max())
    levels = ((pixels - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    if len(levels) in (3, 4):
        return Image.fromarray(levels[:3].permute(1, 2, 0).contiguous().numpy())
    return Image.fromarray(levels[0].numpy())


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of a transformers model whose files are at hand, or None."""
    from transformers import AutoTokenizer

    known = models.record(models.wrapped(model))
    if not known["id"]:
        return None
    try:
        found = AutoTokenizer.from_pretrained(known["id"], revision=known["revision"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if len(found) > len(found.all_special_ids) else None  # of a folder without one an empty one is made
