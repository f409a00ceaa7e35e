"""Files of tensors written a few rows at a time, so that they may exceed the memory, in the format of safetensors.

The bytes are those that the library writes when it is given everything at once.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.storage import files

Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name

# In the order in which the library puts them into a file, which keeps each of them aligned.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write(
    path: Path, n_rows: int, blocks: Iterable[Mapping[str, Tensor]], words: Callable[[Kinds], Mapping[str, str]]
) -> None:
    """Write tensors that come in blocks of rows, atomically.

    Args:
        path: the file.
        n_rows: of all blocks together.
        blocks: tensors [rows of the block, …] by name, the same names in each; of them one is held at a time.
        words: what the header says besides, asked for when all blocks were written; words of the same length each time.

    Raises:
        CoarError: the disk is full, the folder cannot be written, or the blocks have another number of rows.
    """
    files.write_bytes(path, lambda temporary: _write(temporary, n_rows, blocks, words))


def _write(
    temporary: str, n_rows: int, blocks: Iterable[Mapping[str, Tensor]], words: Callable[[Kinds], Mapping[str, str]]
) -> None:
    kinds: Kinds = {}
    offsets: dict[str, int] = {}
    done = 0
    with open(temporary, "wb") as file:
        for block in blocks:
            if not kinds:
                kinds = {name: (tensor.dtype, (n_rows, *tensor.shape[1:])) for name, tensor in block.items()}
                offsets = _offsets(kinds, len(_header(kinds, words(kinds))))
            for name, tensor in block.items():
                _put(file, offsets[name], done, tensor)
            done += len(next(iter(block.values())))
        if done != n_rows or not kinds:
            raise CoarError(f"{done} rows were to be written in the place of {n_rows}")
        file.seek(0)
        file.write(_header(kinds, words(kinds)))


def _put(file: BinaryIO, offset: int, first: int, tensor: Tensor) -> None:
    content = files.tensor_bytes(tensor)
    file.seek(offset + first * (len(content) // len(tensor)))
    file.write(content)


def _offsets(kinds: Kinds, start: int) -> dict[str, int]:
    """Where each tensor begins in the file."""
    found = {}
    order = list(_DTYPES)
    for name in sorted(kinds, key=lambda name: (order.index(kinds[name][0]), name)):
        found[name] = start
        start += _n_bytes(*kinds[name])
    return found


def _header(kinds: Kinds, words: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(words)}
    for name, start in _offsets(kinds, 0).items():
        dtype, shape = kinds[name]
        place = [start, start + _n_bytes(dtype, shape)]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": place}
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _n_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
