"""Loading and saving models with the library that they come from; nothing is unpickled."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.models import offloading, weight_files
from hf_coar.models.libraries import library
from hf_coar.models.records import EDIT, RECORD, check_edit, fingerprint, record
from hf_coar.storage import files, hub


def load_model(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    architecture: "str | Path | nn.Module | None" = None,
) -> nn.Module:
    """A model of timm or transformers, from a local folder, the Hub or a file of weights, in evaluation mode.

    Its `config.json` says which library wrote it: timm's names an `architecture`, transformers' its `architectures`.
    All files are of one commit, which its record holds. Weights of folders and repositories are read from safetensors
    only; of a file such as `weights.pth` nothing but tensors. Nothing is unpickled.

    Args:
        name: local folder or Hub id; or a file of weights, `.safetensors`, `.pth`, `.pt`, `.bin` or `.ckpt`.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model; never on by itself.
        token: for private repositories.
        cache_dir: of the Hub's files; the usual one by default.
        local_files_only: look only at what has been downloaded before.
        architecture: of a file of weights: a timm name, a folder or Hub id whose `config.json` is of the same model,
            or a module, which is copied; by default what the `config.json` beside the file says.

    Raises:
        ModelError: no such model, nothing that these libraries can load, or weights that do not fit the architecture.
    """
    name = str(name)
    if weight_files.is_weight_file(name):
        return _load_weights(name, architecture, revision, trust_remote_code, token)
    if architecture is not None:
        raise ModelError(f"architecture={architecture!r} is for a file of weights, and {name!r} is none; leave it out")
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
    known = {"id": name, "revision": source.commit, "loaded": fingerprint(model)}
    setattr(model, RECORD, known | ({"edit": edit} if edit else {}))
    return model.eval()


def _load_weights(
    path: str, architecture: Any, revision: str | None, trust_remote_code: bool, token: str | bool | None
) -> nn.Module:
    """A model from a file of weights and what its architecture is."""
    tensors = weight_files.read(path)
    if architecture is None and (Path(path).parent / "config.json").is_file():
        architecture = Path(path).parent
    if architecture is None:
        raise weight_files.need_architecture(path, tensors)
    if isinstance(architecture, nn.Module):
        model, architecture = weight_files.into_module(architecture, tensors, path), None
    elif _is_timm_name(str(architecture)):
        model = weight_files.into_timm(str(architecture), tensors, path)
    else:
        source = hub.Source(architecture, revision, token)
        empty = _guarded(source, lambda: _build(source, _read_config(source), trust_remote_code))
        model = weight_files.into_module(empty, tensors, path)
    known = {"id": path, "revision": None, "loaded": fingerprint(model)}
    setattr(model, RECORD, known | ({} if architecture is None else {"architecture": str(architecture)}))
    return model.eval()


def _is_timm_name(name: str) -> bool:
    import timm

    return not Path(name).exists() and timm.is_model(name)


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
    with torch.device("meta"):
        model = _guarded(source, lambda: _build(source, config, trust_remote_code))
    setattr(model, RECORD, {"id": source.name, "revision": source.commit})
    return model.eval()


def _build(source: hub.Source, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    """The model that a `config.json` describes, with weights as they are drawn at first."""
    if "architecture" in config and "pretrained_cfg" in config:
        import timm

        return timm.create_model(f"local-dir:{source.file('config.json').parent}", pretrained=False)
    return _build_transformers(source, config, trust_remote_code)


def _guarded(source: hub.Source, build: Callable[[], nn.Module]) -> nn.Module:
    """What a library raises while it builds a model, as an error of ours."""
    try:
        return build()
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{source.name!r} cannot be built from its config.json: {_first_line(error)}") from error


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
    path = source.file_if_there(EDIT)
    return None if path is None else check_edit(files.read_json(path), f"{EDIT} of {source.name!r}")


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
        files.write_json(folder / EDIT, edit)


def _save_with_its_library(model: nn.Module, folder: Path) -> None:
    if offloading.is_offloaded(model) and not (library(model) == "transformers" and hasattr(model, "hf_device_map")):
        model = offloading.in_memory(model)  # transformers alone saves from where the weights are, and by that map
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
