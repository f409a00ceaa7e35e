"""Loading and saving models with the library that they come from; nothing is unpickled."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.models import adapter_files, offloading, weight_files
from hf_coar.models.building import LARGEST, building, check_counts, size_of_file, size_of_weights
from hf_coar.models.libraries import library
from hf_coar.models.quiet import without_bars
from hf_coar.models.records import EDIT, RECORD, check_edit, fingerprint, record
from hf_coar.models.reloading import check_loads
from hf_coar.storage import files, folders, hub
from hf_coar.storage.escaping import python_name

_QUICK = 10**9  # values: files of so many are read in seconds
_LOADED = "edit_is_loaded"  # the record of the edit came from a file, which anybody may have written


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
            or a module, which is copied; by default what the `config.json` beside the file says. Of adapters of PEFT
            their base model, by default the one that they name.

    Raises:
        ModelError: no such model, nothing that these libraries can load, or weights that do not fit the architecture.
    """
    name = str(name)
    if weight_files.is_weight_file(name):
        return _load_weights(name, architecture, revision, trust_remote_code, token)
    source = hub.Source(name, revision, token, cache_dir, local_files_only)
    source.settle()
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if adapter_files.is_adapter(source):
        base = adapter_files.base_of(source) if architecture is None else architecture
        given = isinstance(base, nn.Module)
        base = copy.deepcopy(base) if given else load_model(base, trust_remote_code=trust_remote_code, **options)
        return _with_adapter(source, base)
    if architecture is not None:
        raise ModelError(f"architecture={architecture!r} is for a file of weights, and {name!r} is none; leave it out")
    config = _read_config(source)
    if "architecture" in config and "pretrained_cfg" in config:
        model = _load_timm(source, config)
    elif "architectures" in config or "model_type" in config:
        options |= {"revision": source.commit or revision, "trust_remote_code": trust_remote_code}
        model = _load_transformers(source, config, options)
    else:
        raise ModelError(
            f"{name!r} has a config.json that neither timm ('architecture') nor transformers ('architectures') wrote; "
            f"it has {sorted(config)}"
        )
    known = {"id": name, "revision": source.commit, "loaded": fingerprint(model)}
    setattr(model, RECORD, known | _read_edit(source))
    return model.eval()


def _with_adapter(source: hub.Source, base: nn.Module) -> nn.Module:
    """The base model with the adapters of a folder or repository on it, whose tokenizer is the base's."""
    of = record(base).get("id")
    model = adapter_files.put_onto(base, source)
    known = {"id": source.name, "revision": source.commit, "loaded": fingerprint(model)}
    setattr(model, RECORD, known | ({"architecture": of} if of else {}) | _read_edit(source))
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
        empty = _built(source, _read_config(source), trust_remote_code)
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
        model = _built(source, config, trust_remote_code)
    setattr(model, RECORD, {"id": source.name, "revision": source.commit})
    return model.eval()


def _built(source: hub.Source, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    """The model that a `config.json` describes, with weights as they are drawn at first."""
    largest = size_of_weights(source) if source.is_local else LARGEST  # nothing is downloaded for it
    check_counts(config, largest, f"config.json of {source.name!r}")
    check_counts(config.get("model_args"), largest, f"config.json of {source.name!r}", all_keys=True)
    with building(f"{source.name!r} cannot be built from its config.json", largest):
        if "architecture" in config and "pretrained_cfg" in config:
            import timm

            return timm.create_model(f"local-dir:{source.file('config.json').parent}", pretrained=False)
        return _build_transformers(source, config, trust_remote_code)


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
    if not isinstance(config, dict):  # Infinity is no JSON, and stands in configurations of state-space models
        raise ModelError(f"config.json of {source.name!r} holds a {type(config).__name__}, not a mapping")
    return config


def _read_edit(source: hub.Source) -> dict[str, Any]:
    """Entries of the record of a model that was edited; none of any other."""
    path = source.file_if_there(EDIT)
    if path is None:
        return {}
    return {"edit": check_edit(files.read_json(path), f"{EDIT} of {source.name!r}"), _LOADED: True}


_SAFE_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")  # in timm's own order

# timm chooses a weight file by itself where its configuration names a source, and of some names it unpickles; so the
# file that was found to be safetensors is named, and nothing else that a configuration may name is left.
_NO_OTHER_SOURCE: dict[str, Any] = {"source": None, "state_dict": None, "url": None, "hf_hub_id": None}
_NO_OTHER_SOURCE |= {"hf_hub_filename": None, "custom_load": False}


def _load_timm(source: hub.Source, config: Mapping[str, Any]) -> nn.Module:
    """From the safetensors file of the commit alone: timm itself would also unpickle, and knows no token."""
    import timm

    weights = next((path for name in _SAFE_WEIGHTS if (path := source.file_if_there(name))), None)
    if weights is None:
        raise ModelError(
            f"{source.name!r} holds none of {', '.join(_SAFE_WEIGHTS)}, and other weights are not read, as that could "
            "run code; load it with timm and save it with safe_serialization=True"
        )
    overlay, largest = {**_NO_OTHER_SOURCE, "file": str(weights)}, size_of_file(weights)
    check_counts(config.get("model_args"), largest, f"config.json of {source.name!r}", all_keys=True)
    with building(f"timm cannot load {source.name!r}", largest):
        folder = source.file("config.json").parent
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=overlay)
        model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "file"}
    return model


def _load_transformers(source: hub.Source, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    loader = _transformers_class(source.name, config, options["trust_remote_code"])
    largest = size_of_weights(source)
    check_counts(config, largest, f"config.json of {source.name!r}")
    quick = source.is_local and largest.n_values < _QUICK
    quiet = without_bars("transformers") if quick else nullcontext()
    with building(f"transformers cannot load {source.name!r}", largest), quiet:
        return loader.from_pretrained(source.name, use_safetensors=True, **options)


def _transformers_class(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    import transformers

    named = config.get("architectures") or [None]
    architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str | None):
        raise ModelError(f"config.json of {name!r} names the architecture {str(architecture)[:80]!r}, which is no name")
    loader = getattr(transformers, architecture or "", None)
    if not (isinstance(loader, type) and issubclass(loader, transformers.PreTrainedModel)):
        loader = None  # a function, a tokenizer, a module
    if loader is None and not trust_remote_code:
        raise ModelError(
            f"{name!r} needs the class {architecture!r}, which is no model of transformers {transformers.__version__}; "
            "if you trust the code that comes with it, pass trust_remote_code=True"
        )
    return loader or _remote_class(transformers, config)


def _remote_class(transformers: Any, config: Mapping[str, Any]) -> Any:
    """The first task class that a repository with its own code names in `auto_map`."""
    named = config.get("auto_map")
    tasks = [key for key in named if key.startswith("AutoModelFor")] if isinstance(named, dict) else []
    return getattr(transformers, tasks[0] if tasks else "AutoModel", transformers.AutoModel)


def save_model(model: nn.Module, folder: str | Path, overwrite: bool = False) -> None:
    """Save with the library that the model came from, so that this library alone loads it again; all or nothing.

    transformers and diffusers: `….from_pretrained(folder)`; timm: `timm.create_model("local-dir:" + folder,
    pretrained=True)`; PEFT: its adapters, to be put onto the same base model; a plain module: its state dict as
    `model.safetensors`. An edited model's record goes into `coar_edit.json`.

    Args:
        model: of any library.
        folder: made if it does not exist; otherwise it must be empty, or hold a model that was saved here before.
        overwrite: take a folder that holds other things as well; files of the same names are replaced.

    Raises:
        ModelError: the library loads another model from what it has saved, see `reloading.check_loads`.
        CoarError: the folder holds other things, or cannot be written. What was there is as it was then.
    """
    with saved(model, folder, overwrite):
        pass


@contextmanager
def saved(model: nn.Module, folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """`save_model`, to which the block may add files in the folder that it is given; all are in place after it."""
    vouched = not getattr(model, RECORD, {}).get(_LOADED)
    with folders.replaced(folder, folders.MODEL, overwrite, vouched, removed=_STATE) as new:
        _save_with_its_library(model, new)
        check_loads(model, new)
        edit = record(model).get("edit")
        if edit:
            files.write_json(new / EDIT, edit)
        yield new


# What would be read instead of, or with, the weights that are saved now.
_STATE = ("model.safetensors", "model.safetensors.index.json", EDIT)


def _save_with_its_library(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model as save_state

    if offloading.is_offloaded(model) and not (library(model) == "transformers" and hasattr(model, "hf_device_map")):
        model = offloading.in_memory(model)  # transformers alone saves from where the weights are, and by that map

    mode = files.mode_in(folder)
    try:
        if library(model) in ("transformers", "diffusers", "peft"):
            with without_bars("transformers"):  # how long a file takes depends on the disk alone
                model.save_pretrained(folder)
        elif library(model) == "timm":
            from timm.models import save_for_hf

            save_for_hf(model, str(folder), safe_serialization=True)
        else:
            save_state(model, str(folder / "model.safetensors"))
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from error
    for path in folder.glob("*.safetensors"):
        files.settle(path, mode)  # as other files are; safetensors makes some that only their owner can read


def load_snippet(model: nn.Module, folder: str) -> str:
    """The line of Python that loads what `save_model` wrote, with the base library alone."""
    if library(model) in ("transformers", "diffusers"):
        name = python_name(type(model).__name__, "AutoModel")
        return f"{library(model)}.{name}.from_pretrained({json.dumps(folder)})"
    if library(model) == "peft":
        name = python_name(type(model).__name__, "PeftModel")
        return f"peft.{name}.from_pretrained(base_model, {json.dumps(folder)})"
    if library(model) == "timm":
        return f"timm.create_model({json.dumps('local-dir:' + folder)}, pretrained=True)"
    return f"model.load_state_dict(safetensors.torch.load_file({json.dumps(folder + '/model.safetensors')}))"
