"""Models of three libraries behind one small set of functions: load, call, describe, freeze, save; and their `outputs`.

Nothing here, or above, asks for a model's name: only for the library it comes from and for what that library's own
interfaces (`get_classifier`, `get_output_embeddings`, `get_input_embeddings`) say.
"""

from hf_coar.models.calling import device_of, embedding_modules, frozen, logits, output_modules
from hf_coar.models.classes import Head, class_names, head
from hf_coar.models.libraries import library
from hf_coar.models.loading import load_architecture, load_model, load_snippet, save_model
from hf_coar.models.records import check_edit, copy_with_record, fingerprint, record

__all__ = [
    "Head",
    "check_edit",
    "class_names",
    "copy_with_record",
    "device_of",
    "embedding_modules",
    "fingerprint",
    "frozen",
    "head",
    "library",
    "load_architecture",
    "load_model",
    "load_snippet",
    "logits",
    "output_modules",
    "record",
    "save_model",
]
