"""Models of three libraries behind one small set of functions: load, call, describe, freeze, save.

Nothing here, or above, asks for a model's name: only for the library it comes from and for what that library's own
interfaces (`get_classifier`, `get_output_embeddings`, `get_input_embeddings`) say.
"""

import copy
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import files, hub
from hf_coar.errors import CoarError, CorruptFileError, ModelError

_EDIT = "coar_edit.json"
_RECORD = "hf_coar_record"  # attribute of a loaded or edited model: a plain dict that says where it comes from


def library(model: nn.Module) -> str:
    """`"transformers"`, `"timm"` or `"torch"`."""
    module_names = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "transformers" in module_names and hasattr(model, "config"):
        return "transformers"
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    return "torch"


def load_model(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """A model of timm or transformers, from a local folder or the Hub, in evaluation mode.

    Its `config.json` says which library wrote it: timm's names an `architecture`, transformers' its `architectures`.
    All files are of one commit, which its record holds. Weights are read from safetensors only: nothing is unpickled.

    Args:
        name: local folder or Hub id.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model; never on by itself.
        token: for private repositories.
        cache_dir: of the Hub's files; the usual one by default.
        local_files_only: look only at what has been downloaded before.

    Raises:
        ModelError: no such model, or nothing that these libraries can load.
    """
    name = str(name)
    source = hub.Source(name, revision, token, cache_dir, local_files_only)
    config = _read_config(source)
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if "architecture" in config and "pretrained_cfg" in config:
        model = _load_timm(source)
    elif "architectures" in config or "model_type" in config:
        options |= {"revision": source.commit or revision, "trust_remote_code": trust_remote_code}
        model = _load_transformers(name, config, options)
    else:
        raise ModelError(
            f"{name!r} has a config.json that neither timm ('architecture') nor transformers ('architectures') wrote; "
            f"it has {sorted(config)}"
        )
    edit = _read_edit(source)
    setattr(model, _RECORD, {"id": name, "revision": source.commit, **({"edit": edit} if edit else {})})
    return model.eval()


def load_architecture(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False, token: str | bool | None = None
) -> nn.Module:
    """A model without its weights, from its `config.json` alone, on the meta device: shapes and names, no memory.

    Args:
        name: local folder or Hub id.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model; never on by itself.
        token: for private repositories.

    Raises:
        ModelError: no such model, or nothing that these libraries can build.
    """
    source = hub.Source(str(name), revision, token)
    config = _read_config(source)
    try:
        with torch.device("meta"):
            if "architecture" in config and "pretrained_cfg" in config:
                import timm

                model = timm.create_model(f"local-dir:{source.file('config.json').parent}", pretrained=False)
            else:
                model = _build_transformers(source, config, trust_remote_code)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{source.name!r} cannot be built from its config.json: {_first_line(error)}") from error
    setattr(model, _RECORD, {"id": str(name), "revision": source.commit})
    return model.eval()


def _build_transformers(source: hub.Source, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    import transformers

    options = {"revision": source.commit, "trust_remote_code": trust_remote_code}
    loader = _transformers_class(source.name, config, trust_remote_code)
    built = transformers.AutoConfig.from_pretrained(source.name, **options)
    if hasattr(loader, "from_config"):
        return loader.from_config(built, trust_remote_code=trust_remote_code)
    return loader(built)


def _read_config(source: hub.Source) -> dict:
    try:
        config = files.read_json(source.file("config.json"))
    except CoarError as error:
        raise ModelError(
            f"no model {source.name!r}: {error}; give a Hub id, or a folder that timm or transformers saved"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {source.name!r} holds a {type(config).__name__}, not a mapping")
    return config


def _read_edit(source: hub.Source) -> dict[str, Any] | None:
    path = source.file_if_there(_EDIT)
    return None if path is None else check_edit(files.read_json(path), f"{_EDIT} of {source.name!r}")


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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_SAFE_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")  # in timm's own order


def _load_timm(source: hub.Source) -> nn.Module:
    """From the folder that holds the files of the commit: timm itself would also unpickle, and knows no token."""
    import timm

    weights = next((path for name in _SAFE_WEIGHTS if (path := source.file_if_there(name))), None)
    if weights is None:
        raise ModelError(
            f"{source.name!r} holds none of {', '.join(_SAFE_WEIGHTS)}, and other weights are not read, as that could "
            "run code; load it with timm and save it with safe_serialization=True"
        )
    try:
        return timm.create_model(f"local-dir:{weights.parent}", pretrained=True)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"timm cannot load {source.name!r}: {_first_line(error)}") from error


def _load_transformers(name: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    loader = _transformers_class(name, config, options["trust_remote_code"])
    try:
        return loader.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"transformers cannot load {name!r}: {_first_line(error)}") from error


def _transformers_class(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    import transformers

    architecture = (config.get("architectures") or [None])[0]
    loader = getattr(transformers, architecture or "", None)
    if loader is None and not trust_remote_code:
        raise ModelError(
            f"{name!r} needs the class {architecture!r}, which transformers {transformers.__version__} does not hold; "
            "if you trust the code that comes with it, pass trust_remote_code=True"
        )
    return loader or _remote_class(transformers, config)


def _remote_class(transformers: Any, config: Mapping[str, Any]) -> Any:
    """The first task class that a repository with its own code names in `auto_map`."""
    tasks = [key for key in config.get("auto_map", {}) if key.startswith("AutoModelFor")]
    return getattr(transformers, tasks[0] if tasks else "AutoModel")


def record(model: nn.Module) -> dict[str, Any]:
    """Where a model comes from and what it is, as JSON values.

    `id`, `revision` (the commit; None where unknown), `library`, `class`, `dtype`, `n_parameters`; and `edit` if it
    was edited.
    """
    known = dict(getattr(model, _RECORD, {}))
    if not known and library(model) == "transformers":
        known = {"id": model.config.name_or_path or None, "revision": getattr(model.config, "_commit_hash", None)}
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
    setattr(duplicate, _RECORD, {**record(model), **entries})
    return duplicate


def fingerprint(model: nn.Module) -> str:
    """BLAKE2b-128 over names, shapes and values of all parameters and persistent buffers, as 32 hexadecimal digits.

    Weights that are offloaded (on the meta device) enter with name, shape and dtype only.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type != "meta":
            digest.update(files.tensor_bytes(tensor))
    return digest.hexdigest()


def output_modules(model: nn.Module) -> list[nn.Module]:
    """The classifier or language-model head, as the model's own library tells; empty for a plain module."""
    if library(model) == "timm":
        found = _flatten(model.get_classifier())
        return [module for module in found if any(True for _ in module.parameters())]
    if library(model) == "transformers":
        return _transformers_heads(model)
    return []


def _flatten(found: Any) -> list[nn.Module]:
    if isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList):
        return [found]
    return [module for item in found or () for module in _flatten(item)]


def _transformers_heads(model: nn.Module) -> list[nn.Module]:
    embeddings = model.get_output_embeddings()
    if isinstance(embeddings, nn.Module):
        return [embeddings]
    # Task models are a backbone under `base_model_prefix` and, beside it, what the task needs: the head.
    base = model.base_model
    if base is model:
        return []
    return [child for child in model.children() if child is not base and any(True for _ in child.parameters())]


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that look up vectors of tokens, positions or types."""
    # A vision model's "input embedding" is its patch convolution, which holds filters like any other.
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]


@functools.lru_cache(maxsize=32)
def _forward_parameters(model_class: type[nn.Module]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(model_class.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset(parameter.name for parameter in parameters), takes_any


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One forward pass: the model's logits, first axis = example.

    `labels` stay out of it. A transformers model gets the rest by name, any other model its one input positionally
    (or all by name, where there are several and its forward takes those names).

    Raises:
        ModelError: the batch does not fit the model's forward.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not inputs:
        raise ModelError("the batch holds nothing but labels; the model needs an input")
    names, takes_any = _forward_parameters(type(model))
    if library(model) == "transformers":
        if "use_cache" in names and "use_cache" not in inputs:
            inputs["use_cache"] = False  # a cache of keys and values is memory spent for nothing here
        output = model(**inputs)
    elif len(inputs) == 1:
        output = model(next(iter(inputs.values())))
    elif takes_any or set(inputs) <= names:
        output = model(**inputs)
    else:
        raise ModelError(
            f"{type(model).__name__}.forward takes {sorted(names - {'self'})}, and the batch holds {sorted(inputs)}; "
            "give one input, or inputs named as the forward names them"
        )
    return _logits_of(output, model)


def _logits_of(output: Any, model: nn.Module) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if found is None and isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor):
        raise ModelError(
            f"{type(model).__name__} returned a {type(output).__name__} without logits; "
            "attribute a model with a task head, or wrap it in a module that returns one tensor"
        )
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient to any parameter, with every flag put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            if parameter.is_floating_point():
                parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in wanted:
            if parameter.is_floating_point():
                parameter.requires_grad_(required)


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Save with the library that the model came from, so that this library alone loads it again.

    transformers: `AutoModelFor….from_pretrained(folder)`; timm: `timm.create_model("local-dir:" + folder,
    pretrained=True)`; a plain module: its state dict as `model.safetensors`. An edited model's record goes into
    `coar_edit.json`.

    Raises:
        CoarError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save_with_its_library(model, folder)
    except OSError as error:
        raise CoarError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    edit = record(model).get("edit")
    if edit:
        files.write_json(folder / _EDIT, edit)


def _save_with_its_library(model: nn.Module, folder: Path) -> None:
    if library(model) == "transformers":
        model.save_pretrained(folder)
    elif library(model) == "timm":
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
    else:
        from safetensors.torch import save_model as save_state

        save_state(model, str(folder / "model.safetensors"))
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # as files usually are; safetensors makes some that only their owner can read


def load_snippet(model: nn.Module, folder: str) -> str:
    """The line of Python that loads what `save_model` wrote, with the base library alone."""
    if library(model) == "transformers":
        return f"transformers.{type(model).__name__}.from_pretrained({json.dumps(folder)})"
    if library(model) == "timm":
        return f"timm.create_model({json.dumps('local-dir:' + folder)}, pretrained=True)"
    return f"model.load_state_dict(safetensors.torch.load_file({json.dumps(folder + '/model.safetensors')}))"


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter (an offloaded model's own hooks move what they need)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    if any(True for _ in model.parameters()):
        return torch.device("cpu")
    raise CoarError(f"{type(model).__name__} has no parameters, so it has no components")
