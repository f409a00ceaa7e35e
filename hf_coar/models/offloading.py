"""Weights that accelerate keeps elsewhere, on disk or in the CPU's memory, until the module that needs them runs.

Such a parameter is on the meta device. A hook of accelerate's, on its module or on one around it, has a `weights_map`
from which the values come before every forward pass. What is kept there may be the user's own checkpoint, so that it is
never written to: changed values are laid over the map, and taken off again.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hf_coar.errors import CoarError, ModelError


class Overlay(Mapping):
    """A `weights_map` in which some values are others."""

    def __init__(self, below: Mapping[str, Tensor]) -> None:
        """Nothing is changed yet."""
        self.below, self.changed = below, {}

    def __getitem__(self, key: str) -> Tensor:
        """A value, changed or not."""
        return self.changed[key] if key in self.changed else self.below[key]

    def __iter__(self) -> Iterator[str]:
        """The keys below: none is added."""
        return iter(self.below)

    def __len__(self) -> int:
        """How many there are below."""
        return len(self.below)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are kept elsewhere."""
    return any(parameter.is_meta for parameter in model.parameters()) and any(
        _hooks(module) for module in model.modules()
    )


def check_held(model: nn.Module) -> None:
    """Raises `ModelError` for weights on the meta device that are kept nowhere."""
    nowhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if nowhere and not is_offloaded(model):
        raise ModelError(
            f"{len(nowhere)} weights of {type(model).__name__} are on the meta device, such as {nowhere[0]!r}, and so "
            "have no values; load it with from_pretrained or coar.load"
        )


def _hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module that put weights in place."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in (hook, *getattr(hook, "hooks", ())) if getattr(one, "weights_map", None) is not None]


def _place(model: nn.Module, name: str) -> tuple[Any, str, Tensor] | None:
    """The hook that has a parameter or buffer, under which key, and its value."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        key = ".".join(parts[end:])
        for hook in _hooks(model.get_submodule(".".join(parts[:end]))):
            try:
                return hook, key, hook.weights_map[key]
            except KeyError:
                continue
    return None


def value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """What a parameter or buffer holds, wherever it is kept.

    Args:
        model: that has it.
        name: from the root of the model.
        tensor: as the model shows it, on the meta device if it is kept elsewhere.

    Raises:
        CoarError: it is on the meta device, and kept nowhere.
    """
    if not tensor.is_meta:
        return tensor
    for one in (name, *_tied(model, name)):
        found = _place(model, one)
        if found is not None:
            return found[2].to(tensor.dtype)
    raise CoarError(f"{name!r} is on the meta device, and no hook of accelerate's holds its values; load the weights")


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and persistent buffers by name, each with its value wherever it is kept; one at a time.

    Those that are nowhere, as of a model without weights, stay on the meta device.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        try:
            yield name, value(model, name, tensor)
        except CoarError:
            yield name, tensor


def put(model: nn.Module, values: Mapping[str, Tensor]) -> Callable[[], None]:
    """Lay other values over those that are kept elsewhere, under all names that a tied weight has.

    Args:
        model: whose hooks see the values from now on.
        values: by name, from the root of the model.

    Returns:
        Takes them off again; several are taken off in the reverse order.

    Raises:
        CoarError: one that is kept nowhere.
    """
    undo: list[Callable[[], None]] = []
    for name, tensor in values.items():
        places = [found for one in (name, *_tied(model, name)) if (found := _place(model, one)) is not None]
        if not places:
            raise CoarError(f"{name!r} is on the meta device, and no hook of accelerate's holds its values")
        undo += [_lay(hook, key, tensor.detach().to("cpu", copy=True)) for hook, key, _ in places]

    def take_off() -> None:
        while undo:
            undo.pop()()

    return take_off


def _lay(hook: Any, key: str, tensor: Tensor) -> Callable[[], None]:
    below = hook.weights_map
    if not isinstance(below, Overlay):
        hook.weights_map = Overlay(below)
    overlay = hook.weights_map
    before = overlay.changed.get(key)
    overlay.changed[key] = tensor

    def take_off() -> None:
        if before is not None:
            overlay.changed[key] = before
        else:
            overlay.changed.pop(key, None)
        if hook.weights_map is overlay and not overlay.changed:
            hook.weights_map = overlay.below

    return take_off


def _tied(model: nn.Module, name: str) -> list[str]:
    """The other names of a weight that a transformers model ties: off its device it is no longer one parameter."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(ties, Mapping):
        return []
    root = ties.get(name, name)
    return [other for other in {root, *(target for target, source in ties.items() if source == root)} if other != name]


def of_module(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, such as its bias, wherever it is kept; None where it has none.

    Of a model without weights it is itself, on the meta device, where such a model's activations are as well.
    """
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    try:
        return value(module, name, tensor)
    except CoarError:
        return tensor


def in_memory(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights are all in the CPU's memory, without accelerate's hooks."""
    from accelerate.hooks import remove_hook_from_module

    values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state(model)}
    duplicate = copy.deepcopy(model)
    remove_hook_from_module(duplicate, recurse=True)
    for name, tensor in values.items():
        owner, _, leaf = name.rpartition(".")
        module = duplicate.get_submodule(owner)
        old = getattr(module, leaf)
        if not isinstance(old, nn.Parameter):
            module._buffers[leaf] = tensor
        elif old.is_meta:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    if hasattr(duplicate, "hf_device_map"):
        del duplicate.hf_device_map
    return duplicate
