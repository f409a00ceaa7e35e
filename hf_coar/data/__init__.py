"""Data: anything that can be iterated again, as batches of tensors whose first axis is the example."""

from hf_coar.data.batches import Batch, Identity, as_batch, device_of, identity, rows, signatures, size, take, to_device
from hf_coar.data.examples import Chunk, Chunks, Examples, Read, batches, describe
from hf_coar.data.loading import load_data

__all__ = [
    "Batch",
    "Chunk",
    "Chunks",
    "Examples",
    "Identity",
    "Read",
    "as_batch",
    "batches",
    "describe",
    "device_of",
    "identity",
    "load_data",
    "rows",
    "signatures",
    "size",
    "take",
    "to_device",
]
