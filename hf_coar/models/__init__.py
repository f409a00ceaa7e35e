"""Models of three libraries behind one small set of functions: load, call, describe, freeze, save; and their `outputs`.

Nothing here, or above, asks for a model's name: only for the library it comes from and for what that library's own
interfaces (`get_classifier`, `get_output_embeddings`, `get_input_embeddings`) say.
"""

from hf_coar.models import outputs, tasks
from hf_coar.models.adapters import adapters, check_saved
from hf_coar.models.calling import (
    PARTNER,
    POSITIONS,
    batch_under_way,
    call,
    device_of,
    embedding_modules,
    example_alone,
    frozen,
    is_out_of_memory,
    logits,
    n_examples,
    output_modules,
    to,
    under_way,
    word_embeddings,
)
from hf_coar.models.classes import Head, class_names, head
from hf_coar.models.holding import check_is_model, check_usable, held, state_kept
from hf_coar.models.libraries import library, wrapped
from hf_coar.models.loading import load_architecture, load_model, load_snippet, save_model, saved
from hf_coar.models.records import check_edit, copy_with_record, fingerprint, record

__all__ = [
    "Head",
    "PARTNER",
    "POSITIONS",
    "adapters",
    "batch_under_way",
    "check_saved",
    "check_edit",
    "check_is_model",
    "check_usable",
    "class_names",
    "copy_with_record",
    "call",
    "device_of",
    "embedding_modules",
    "example_alone",
    "fingerprint",
    "frozen",
    "head",
    "held",
    "is_out_of_memory",
    "library",
    "load_architecture",
    "load_model",
    "load_snippet",
    "logits",
    "n_examples",
    "output_modules",
    "outputs",
    "record",
    "save_model",
    "saved",
    "state_kept",
    "tasks",
    "to",
    "under_way",
    "word_embeddings",
    "wrapped",
]
