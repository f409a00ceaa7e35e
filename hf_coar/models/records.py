"""Where a model comes from and what it is: its library, its record, the fingerprint of its weights."""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_coar.errors import CorruptFileError
from hf_coar.storage import files

EDIT = "coar_edit.json"  # the file in which an edited model keeps the record of its edit
RECORD = "hf_coar_record"  # attribute of a loaded or edited model: a plain dict that says where it comes from


def library(model: nn.Module) -> str:
    """The library that saves and loads a model: `"transformers"`, `"timm"`, `"diffusers"`, `"peft"` or `"torch"`."""
    roots = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(model).__mro__}
    # By the one ancestor that saves and loads: models of PEFT inherit from others of transformers too.
    for name, ancestors in _ANCESTORS.items():
        if any((name, ancestor) in roots for ancestor in ancestors):
            return name
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    return "torch"


_ANCESTORS = {
    "peft": ("PeftModel", "PeftMixedModel"),
    "transformers": ("PreTrainedModel",),
    "diffusers": ("ModelMixin",),
}


def wrapped(model: nn.Module) -> nn.Module:
    """The model inside of what only wraps it (PEFT, `torch.compile`), or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return wrapped(inner)
    return wrapped(model.get_base_model()) if library(model) == "peft" else model


def record(model: nn.Module) -> dict[str, Any]:
    """Where a model comes from and what it is, as JSON values.

    `id`, `revision` (the commit; None where unknown), `library`, `class`, `dtype`, `n_parameters`; and `edit` if it
    was edited.
    """
    known = dict(getattr(model, RECORD, {}))
    if not known and library(model) == "transformers":
        known = {"id": model.config.name_or_path or None, "revision": getattr(model.config, "_commit_hash", None)}
    if not known and library(model) == "diffusers":
        known = {"id": model.config.get("_name_or_path") or None}
    if not known and library(model) == "peft":
        known = {"id": record(wrapped(model))["id"]}
    if not known and library(model) == "timm":
        known = {"id": model.pretrained_cfg.get("hf_hub_id") or model.pretrained_cfg.get("architecture")}
    parameters = list(model.parameters())
    return {
        "id": known.get("id"),
        "revision": known.get("revision"),
        "library": library(model),
        "class": type(model).__name__,
        "dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        **({"edit": known["edit"]} if known.get("edit") else {}),
    }


def copy_with_record(model: nn.Module, **entries: Any) -> nn.Module:
    """A deep copy of a model whose record has these entries instead; `edit=None` takes the edit out of it."""
    duplicate = copy.deepcopy(model)
    setattr(duplicate, RECORD, {**record(model), **entries})
    return duplicate


def fingerprint(model: nn.Module) -> str:
    """BLAKE2b-128 over names, shapes and values of all parameters and persistent buffers, as 32 hexadecimal digits.

    Weights that are offloaded (on the meta device) enter with name, shape and dtype only; those of a tensor class that
    holds others (quantised ones) enter as these.
    """
    digest = hashlib.blake2b(digest_size=16)
    for whole, value in model.state_dict().items():
        for name, tensor in _plain_tensors(whole, value):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.device.type != "meta":
                digest.update(files.tensor_bytes(tensor))
    return digest.hexdigest()


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(value, Tensor):
        return
    if not is_traceable_wrapper_subclass(value):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(value, part))


_EDIT_LISTS = ("components", "parameters", "indices", "increase", "decrease", "figures")
_EDIT_TEXTS = ("id", "revision", "library", "class", "fingerprint", "split")


def check_edit(value: Any, where: str) -> dict[str, Any]:
    """The record of an edit, checked for all that is read from it.

    Raises:
        CorruptFileError: it is something else.
    """
    lists = {key: value.get(key, []) for key in _EDIT_LISTS} if isinstance(value, dict) else {"": None}
    sane = all(isinstance(entry, list) for entry in lists.values())
    sane = sane and all(isinstance(name, str) for key in ("components", "parameters") for name in lists[key])
    sane = sane and all(isinstance(row, list) and len(row) == 3 for row in lists["figures"])
    sane = sane and isinstance(value.get("reference"), list | str | None)
    sane = sane and all(isinstance(value.get(key), str | None) for key in ("rule", "output", "granularity"))
    records = [value.get(key) or {} for key in ("base", "data")] if sane else []
    sane = sane and all(isinstance(entry, dict) for entry in records)
    sane = sane and all(isinstance(entry.get(key), str | None) for entry in records for key in _EDIT_TEXTS)
    if not sane or not files.is_json(value):
        raise CorruptFileError(f"{where} is no record of an edit; delete it, or download the model again")
    return value
