"""What was saved is loaded again, as anybody would: that it is the model in memory is seen, not taken for granted."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import ModelError
from hf_coar.models import offloading
from hf_coar.models.adapters import adapters
from hf_coar.models.building import first_line
from hf_coar.models.libraries import library
from hf_coar.models.quiet import without_bars

logger = logging.getLogger(__name__)

MOST = 10**9  # values of a model: files of so many are read in seconds, and memory takes one more of them
_SHOWN = 6  # names in a message


def check_loads(model: nn.Module, folder: Path) -> None:
    """Refuses a folder of which the model's own library makes another model; tells of other modules and lost hooks.

    A head put in the place of the one that the configuration describes, layers taken out, parametrised weights: all of
    them are saved, and what loads has fresh random weights there. Models of more than `MOST` values are loaded without
    their weights, of which then only names and precisions are compared.

    Args:
        model: of transformers or timm; of others, with adapters, with quantised or offloaded weights nothing is loaded.
        folder: into which its library saved it.

    Raises:
        ModelError: some of its tensors are others there, or nothing loads; says which.
    """
    if library(model) not in ("transformers", "timm") or _only_there(model):
        return
    try:
        with torch.random.fork_rng(devices=[]):  # what is missing is drawn
            loaded, missing = _loaded(model, folder)
    except Exception as error:  # libraries raise all there is
        raise ModelError(_refusal(model, f"fails ({type(error).__name__}: {first_line(error)})")) from error
    others = sorted({*missing, *_others(model, loaded)})
    if others:
        raise ModelError(_refusal(model, f"gives another one: {len(others)} tensors differ ({_some(others)})"))
    changed = [name for name, said in _modules(model).items() if _modules(loaded).get(name, said) != said]
    if changed:
        here, there = (_modules(one)[changed[0]] for one in (model, loaded))
        logger.warning(
            "loading what is saved gives the same weights in other modules: %s is %s and becomes %s (%d in all); have "
            "the configuration say so, or what was measured may not hold of what others load",
            changed[0], here, there, len(changed),
        )  # fmt: skip
    hooks, there = _hooks(model), _hooks(loaded)
    if lost := sorted({name for name, hook in hooks - there}):
        logger.warning(
            "loading what is saved gives a model without the hooks of this one, of %d modules (%s): what they do to "
            "outputs is in the attributions and in the figures of an edit, and not in what others load; write it into "
            "the class of the model, or remove the hooks and measure again",
            len(lost), _some([name or "the model itself" for name in lost]),
        )  # fmt: skip


def _only_there(model: nn.Module) -> bool:
    """Whether a second one may not fit on this machine, or is not made of its files alone."""
    return offloading.is_offloaded(model) or bool(adapters(model)) or getattr(model, "hf_quantizer", None) is not None


def _loaded(model: nn.Module, folder: Path) -> tuple[nn.Module, list[str]]:
    """The model as its library loads it by default, and the names of what the files lack."""
    if library(model) == "timm":
        import timm
        from safetensors.torch import load_file

        loaded = timm.create_model(f"local-dir:{folder}", pretrained=False)
        loaded.load_state_dict(load_file(folder / "model.safetensors"))  # timm itself may look for pickles first
        return loaded, []
    large = sum(parameter.numel() for parameter in model.parameters()) > MOST
    options: dict[str, Any] = {"device_map": "meta"} if large else {}
    with without_bars("transformers"):
        loaded, said = type(model).from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    return loaded, [*said["missing_keys"], *(one[0] for one in said["mismatched_keys"])]


def _others(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Names of parameters and persistent buffers that one lacks, or whose values the other does not have."""
    ours, theirs = (
        {name: value for name, value in one.state_dict().items() if isinstance(value, Tensor)}
        for one in (model, loaded)
    )
    return [
        name for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _same(ours[name].cpu(), theirs[name])
    ]  # fmt: skip


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all values are there, in this precision or a higher one; NaN as itself."""
    if ours.shape != theirs.shape:
        return False
    if theirs.is_meta:
        return torch.promote_types(ours.dtype, theirs.dtype) == theirs.dtype
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    ours, theirs = ours.to(wide), theirs.to(wide)
    return torch.equal(ours, theirs) or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


def _modules(model: nn.Module) -> dict[str, str]:
    """What every module is, in words; those that do nothing in evaluation are left out."""
    said = {name: (type(one).__name__, one.extra_repr()) for name, one in model.named_modules()}
    return {name: f"{kind}({more})" for name, (kind, more) in said.items() if not kind.startswith("Drop")}


def _hooks(model: nn.Module) -> Counter:
    """How often every module, by name, has which hook that runs with its forward."""
    return Counter(
        (name, getattr(hook, "__qualname__", type(hook).__name__))
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _refusal(model: nn.Module, found: str) -> str:
    name = type(model).__name__
    return (
        f"it is not saved, as loading a {name} from what {library(model)} writes of it {found}. Its configuration "
        "describes another model than the one in memory (a replaced head, removed layers, other precisions): change "
        "the configuration or the class before editing, or keep model.state_dict() and load it with the code that "
        "built the model"
    )
