"""Building a model from a configuration that anybody may have written: no larger than its weights, no raw errors."""

import json
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.storage import files, hub

_LARGEST_HEADER = 100 * 2**20  # bytes; what safetensors itself allows


@dataclass(frozen=True)
class Size:
    """How much a model may hold.

    Attributes:
        n_tensors: parameters and buffers; and as many as any of them is long or wide.
        n_values: numbers in all of them.
    """

    n_tensors: int
    n_values: int


# Of any model, where there are no weights to compare with: twice the tensors of 61 layers of 256 experts each, one by
# one, and some ten seconds of building.
LARGEST = Size(100_000, 10**14)


def size_of_weights(source: hub.Source) -> Size:
    """What a model may hold whose weights are those of a folder or repository; `LARGEST` where it has none to read.

    Those of a repository are downloaded. Tied, packed and missing weights make a model larger than its file, by less
    than the margins here.
    """
    path = source.file_if_there("model.safetensors")
    if path is not None:
        return size_of_file(path)
    path = source.file_if_there("model.safetensors.index.json")
    index = files.read_json(path) if path is not None else None
    places = index.get("weight_map") if isinstance(index, dict) else None
    return Size(4 * len(places) + 1000, LARGEST.n_values) if isinstance(places, dict) else LARGEST


def size_of_file(path: Path) -> Size:
    """What a model may hold whose weights are one safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
        n_bytes = path.stat().st_size
    except (OSError, ValueError, struct.error, RecursionError, MemoryError) as error:
        raise ModelError(f"{path} is no safetensors file ({first_line(error)}); download the model again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is no safetensors file; download the model again")
    shapes = [entry.get("shape") for entry in header.values() if isinstance(entry, dict)]
    sizes = [size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)]
    return Size(4 * max([len(header), *sizes]) + 1000, 16 * n_bytes + 10**7)


# Of these a library makes lists as long as they say, before anything is built that could be counted.
_COUNTS = re.compile("layer|depth|block|stage|expert|head|repeat")


def check_counts(config: Any, largest: Size, where: str, all_keys: bool = False, key: str = "") -> None:
    """Raises `ModelError` where a configuration names more layers (blocks, heads, …) than the weights have tensors.

    Args:
        config: nested JSON.
        largest: what the model may hold.
        where: such as "config.json of 'a/b'".
        all_keys: whether every whole number is a size or a count of something.
        key: of `config` in what holds it.
    """
    if isinstance(config, dict):
        for name, entry in config.items():
            check_counts(entry, largest, where, all_keys, name)
    elif isinstance(config, list):
        for entry in config:
            check_counts(entry, largest, where, all_keys, key)
    elif isinstance(config, int) and config > largest.n_tensors and (all_keys or _COUNTS.search(key)):
        raise ModelError(
            f"{where} says {key}={config if config < 10**18 else 'a giant number'}, and its weights have no place for "
            "that; it is damaged, or was made to do harm"
        )


@contextmanager
def building(what: str, largest: Size) -> Iterator[None]:
    """Whatever a library makes of a configuration in this block is of a sane size, or an error in a sentence.

    Args:
        what: such as "timm cannot load 'a/b'".
        largest: what the model may hold; counted as it is built, before most of its memory is touched.

    Raises:
        ModelError: too large, or anything that the library raises.
    """
    try:
        with _counted(largest):
            yield
    except CoarError:
        raise
    except Exception as error:  # libraries raise all there is when they are given nonsense
        raise ModelError(f"{what}: {first_line(error)}") from error


@contextmanager
def _counted(largest: Size) -> Iterator[None]:
    thread, count, values = threading.get_ident(), 0, 0

    def registered(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal count, values
        if threading.get_ident() != thread or not isinstance(tensor, Tensor):
            return
        count += 1
        values += tensor.numel()
        if count > largest.n_tensors or values > largest.n_values:
            raise ModelError(
                f"its config.json describes a model of more than {count - 1:,} tensors and {values:,} values, which is "
                "more than its weights can fill; it is damaged, or was made to do harm"
            )

    hooks: list[Any] = [
        nn.modules.module.register_module_parameter_registration_hook(registered),
        nn.modules.module.register_module_buffer_registration_hook(registered),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_line(error: BaseException) -> str:
    """The first line of a message, or the kind of the error where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
