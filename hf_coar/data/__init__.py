"""Data: anything that can be iterated again, as batches of tensors whose first axis is the example."""

from hf_coar.data.batches import Batch, as_batch, concatenated, device_of, rows, size, some, take, to_device
from hf_coar.data.described import settings
from hf_coar.data.examples import Chunk, Chunks, Examples, Read, batches, describe, few
from hf_coar.data.identity import Identity
from hf_coar.data.kinds import KINDS, Kind
from hf_coar.data.loading import load_data
from hf_coar.data.numbering import numbers, within
from hf_coar.data.partners import joined, paired, with_partners
from hf_coar.data.reading import Piece, Reader

__all__ = [
    "Batch",
    "Chunk",
    "Chunks",
    "Examples",
    "Identity",
    "KINDS",
    "Kind",
    "Piece",
    "Read",
    "Reader",
    "as_batch",
    "batches",
    "concatenated",
    "describe",
    "device_of",
    "few",
    "joined",
    "load_data",
    "numbers",
    "paired",
    "rows",
    "settings",
    "size",
    "some",
    "take",
    "to_device",
    "with_partners",
    "within",
]
