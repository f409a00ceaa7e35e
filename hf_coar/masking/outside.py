"""Weights that the model reads outside of their own module, where a gate at that module does not reach.

A tied autoencoder decodes by `F.linear(hidden, self.encoder.weight.t())`: with a gate at the encoder's output the
decoder still has the whole weight, and the same mask in the weights gives something else. So one pass is looked at, and
what was read where its module does not run is tried: masked in the weights and by gates.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hf_coar.components import Group

Reaches = Callable[[Group, Callable[[], Any]], bool]

_ROUNDING = 1e-3  # of the largest number; half precision is coarser, and a decoder with half of its rows far off


class Reads(TorchFunctionMode):
    """While this is on, notes of every weight whether an operation takes it while its own module does not run."""

    def __init__(self, groups: Sequence[Group], weights: Sequence[Tensor], reaches: Reaches) -> None:
        """Nothing was read yet.

        Args:
            groups: of components.
            weights: theirs.
            reaches: (group, a run of the model) -> whether gates do what a mask in the weights does.
        """
        super().__init__()
        self._of = {id(weight): group for group, weight in zip(groups, weights, strict=True)}
        self._reaches = reaches
        self._running: Counter[str] = Counter()
        self._found: dict[str, Group] = {}

    def outside(self, run: Callable[[], Any]) -> set[str]:
        """Parameters that were read outside of their modules, which ran as well, and that matter there."""
        found = [group for group in self._found.values() if group.place in self._running]
        return {group.parameter for group in found if not self._reaches(group, run)}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every torch function comes by here; what gives no tensor (a shape, a dtype) takes no values."""
        result = func(*args, **(kwargs or {}))
        if any(isinstance(one, Tensor) for one in pytree.tree_leaves(result)):
            for one in pytree.tree_leaves((args, kwargs)):
                group = self._of.get(id(one)) if isinstance(one, Tensor) else None
                if group is not None and not self._running[group.place]:
                    self._found[group.parameter] = group
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside the block a pass of the model is looked at."""

        def begin(name: str) -> Callable[..., None]:
            return lambda *_: self._running.update([name])

        def end(name: str) -> Callable[..., None]:
            return lambda *_: self._running.subtract([name])

        hooks = []
        try:
            for name in {group.place for group in self._of.values()}:
                module = model.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(begin(name), prepend=True))
                hooks.append(module.register_forward_hook(end(name)))
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def same(one: Any, other: Any) -> bool:
    """Whether two runs returned the same numbers, up to rounding."""
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        off = (a.double() - b.double()).abs().nan_to_num(0, 0, 0)
        if off.numel() and float(off.max()) > _ROUNDING * float(a.double().abs().nan_to_num(0, 0, 0).max()):
            return False
    return True


def every_other(size: int) -> Tensor:
    """A mask without every other component, the first one among them, bool [size]."""
    return torch.arange(size) % 2 == 1
