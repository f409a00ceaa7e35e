"""Adapters of PEFT inside a model: what they added, which is all that their files hold."""

from collections.abc import Iterable, Iterator

from torch import nn

from hf_coar.errors import CoarError
from hf_coar.models.libraries import library


def _inherits(module: nn.Module, *names: str) -> bool:
    """Whether a module is of one of these classes of PEFT, which need not be installed for it."""
    mro = type(module).__mro__
    return any(cls.__name__ in names and cls.__module__.split(".")[0] == "peft" for cls in mro)


def adapters(model: nn.Module) -> list[nn.Module]:
    """The modules that adapters added beside the layers of the model; empty where there are none."""
    return [part for module in model.modules() for part in _added(module)]


def _added(module: nn.Module) -> Iterator[nn.Module]:
    if _inherits(module, "BaseTunerLayer"):
        names = module.adapter_layer_names
    elif _inherits(module, "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"):
        names = ("modules_to_save",)  # copies that are trained whole
    else:
        return
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            yield part


def check_saved(model: nn.Module, parameters: Iterable[str]) -> None:
    """Raises `CoarError` if an edit of these parameters, by name, would be lost when the model is saved.

    The files of a PEFT model hold its adapters only; whoever loads them puts them onto the base model as it was.
    """
    added = adapters(model)
    if library(model) != "peft" and not added:
        return
    saved = {id(parameter) for part in added for parameter in part.parameters()}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    lost = sorted(name for name in parameters if name in tensors and id(tensors[name]) not in saved)
    if lost:
        raise CoarError(
            f"{len(lost)} of the weights to edit belong to the base model ({lost[0]}), and the files of a PEFT model "
            "hold its adapters only, so that the edit would be lost: attribute and edit model.merge_and_unload(), or "
            "only the adapters' ranks, which find_components(model) gives by default"
        )
