"""Models from a file of weights alone: `.safetensors`, or `.pth` and its like, of which only tensors are read."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import ModelError

SAFE, PICKLED = (".safetensors",), (".pth", ".pt", ".bin", ".ckpt")
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "weights")  # under which trainers keep the weights
_WRAPPED = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before the names


def is_weight_file(name: str | Path) -> bool:
    """Whether a name is that of a file of weights on this machine."""
    return Path(name).suffix.lower() in SAFE + PICKLED and Path(name).is_file()


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, by name; nothing in it is run.

    Raises:
        ModelError: it cannot be read, holds something else than tensors, or could only be read by running code.
    """
    path = Path(path)
    found = _read_safe(path) if path.suffix.lower() in SAFE else _read_pickled(path)
    for key in _INSIDE:
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{str(path)!r} holds no tensors; it has {sorted(map(str, found))[:8]}. Give a state dict")
    return tensors


def _read_safe(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _read_pickled(path: Path) -> dict[str, Any]:
    """The one place where a file of torch's is read: `weights_only` lets nothing but tensors and plain values in."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's errors, zipfile's and its own
        raise ModelError(
            f"{str(path)!r} cannot be read without running code that is in it, or is no file of torch's "
            f"({type(error).__name__}); save its state dict instead, torch.save(model.state_dict(), …), or safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{str(path)!r} holds a {type(found).__name__}, not a state dict; save model.state_dict()")
    return dict(found)


def need_architecture(path: str | Path, tensors: Mapping[str, Tensor]) -> ModelError:
    """The error where nothing says which model the weights are of."""
    name, tensor = next(iter(tensors.items()))
    return ModelError(
        f"{str(path)!r} holds weights only ({len(tensors)} tensors, such as {name} {list(tensor.shape)}), and "
        "not which model they are of; give architecture=…: a timm name ('resnet18'), a folder or Hub id whose "
        "config.json is of the same model, or an nn.Module (--architecture)"
    )


def into_module(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The weights in a copy of a module.

    Raises:
        ModelError: names or shapes do not fit.
    """
    model = copy.deepcopy(model)
    _fill(model, tensors, path)
    return model


def into_timm(name: str, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The weights in a timm architecture, with as many classes and input channels as they have.

    Raises:
        ModelError: timm has no such architecture, or names or shapes do not fit.
    """
    import timm

    model = timm.create_model(name, pretrained=False)
    fitting = _unwrapped(model, tensors)
    options = {}
    for option, key in (("num_classes", "classifier"), ("in_chans", "first_conv")):
        place = model.pretrained_cfg.get(key)
        weight = fitting.get(f"{place}.weight") if isinstance(place, str) else None
        own = model.state_dict().get(f"{place}.weight")
        axis = 0 if option == "num_classes" else 1
        if weight is not None and own is not None and weight.dim() == own.dim() and weight.shape != own.shape:
            options[option] = weight.shape[axis]
    if options:
        model = timm.create_model(name, pretrained=False, **options)
    _fill(model, tensors, path)
    return model


def _unwrapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights under the model's own names: without what a trainer put before all of them."""
    own = model.state_dict().keys()
    for prefix in ("", *_WRAPPED):
        if all(name.startswith(prefix) for name in tensors):
            stripped = {name.removeprefix(prefix): value for name, value in tensors.items()}
            if own & stripped.keys():
                return stripped
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    given, own = _unwrapped(model, tensors), model.state_dict()
    tied = {value.data_ptr() for name, value in own.items() if name in given}  # saved once under one of their names
    missing = [name for name, value in own.items() if name not in given and value.data_ptr() not in tied]
    strange = [name for name in given if name not in own]
    shapes = [
        f"{name} {list(given[name].shape)} for {list(own[name].shape)}"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    if missing or strange or shapes:
        named = {"missing": missing, "not in the model": strange, "of another shape": sorted(shapes)}
        said = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in named.items() if names)
        raise ModelError(
            f"the weights of {str(path)!r} do not fit a {type(model).__name__} ({said}); give the architecture that "
            "they are of"
        )
    model.load_state_dict(given, strict=False)
