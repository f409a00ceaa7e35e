"""Data: anything that can be iterated again, as batches of tensors whose first axis is the example."""

from hf_coar.data.batches import Batch, Identity, as_batch, identity, rows, signatures, size, to_device
from hf_coar.data.described import settings
from hf_coar.data.examples import Chunk, Chunks, Examples, Read, batches, describe
from hf_coar.data.kinds import KINDS, Kind
from hf_coar.data.loading import load_data

__all__ = [
    "Batch",
    "Chunk",
    "Chunks",
    "Examples",
    "Identity",
    "KINDS",
    "Kind",
    "Read",
    "as_batch",
    "batches",
    "describe",
    "identity",
    "load_data",
    "rows",
    "settings",
    "signatures",
    "size",
    "to_device",
]
