"""Where a model comes from and what it is: its library, its record, the fingerprint of its weights."""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_coar.errors import CorruptFileError
from hf_coar.models import offloading
from hf_coar.models.classes import class_names
from hf_coar.models.holding import check_is_model
from hf_coar.models.libraries import library, wrapped
from hf_coar.storage import files

EDIT = "coar_edit.json"  # the file in which an edited model keeps the record of its edit
RECORD = "hf_coar_record"  # attribute of a loaded or edited model: a plain dict that says where it comes from


def record(model: nn.Module) -> dict[str, Any]:
    """Where a model comes from and what it is, as JSON values.

    `id`, `revision` (the commit; None where unknown), `library`, `class`, `dtype`, `n_parameters`; `edit` if it was
    edited; `architecture` if it came from a file of weights; and `loaded`, the fingerprint of what `load_model` read
    (None for models made otherwise): only as long as the model's own is still the same, the weights are those of `id`.
    A model that was made otherwise has the `id` that its configuration names, which says nothing about its weights.
    """
    check_is_model(model)
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
        "loaded": known.get("loaded"),
        **{key: known[key] for key in ("architecture", "edit") if known.get(key)},
        **({"label_names": list(names)} if (names := class_names(model)) else {}),
    }


def copy_with_record(model: nn.Module, **entries: Any) -> nn.Module:
    """A deep copy of a model whose record has these entries instead; `edit=None` takes the edit out of it."""
    duplicate = copy.deepcopy(model, _made_by_hooks(model))
    setattr(duplicate, RECORD, {**record(model), **entries})
    return duplicate


def _made_by_hooks(model: nn.Module) -> dict[int, Tensor]:
    """Copies of the tensors that hooks made in the last pass (weights of `torch.nn.utils`), which copy no other way."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf}


def fingerprint(model: nn.Module) -> str:
    """BLAKE2b-128 over names, shapes and values of all parameters and persistent buffers, as 32 hexadecimal digits.

    Weights that accelerate keeps elsewhere enter as they are there, so that where a model lies makes no difference;
    those of a tensor class that holds others (quantised ones) enter as these. Of a model without weights (on the meta
    device) names, shapes and dtypes enter alone.
    """
    check_is_model(model)
    digest = hashlib.blake2b(digest_size=16)
    for whole, value in offloading.state(model):
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
