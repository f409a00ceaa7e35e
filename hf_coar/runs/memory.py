"""The memory that a function takes, counted tensor by tensor: on any device, the meta device included."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Peak(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that nobody holds any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            self._note(storage, given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._alive:
            return  # a view, or written in place
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Every strided tensor's storage; sparse tensors (graphs) have none that can be asked, and are not counted."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


def peak_bytes(run: Callable[[], object]) -> int:
    """How many bytes the tensors that a function makes take at most at a time, without those that it was given.

    An allocator needs a little more. What operations use inside themselves is not counted.
    """
    with _Peak() as peak:
        run()
    return peak.most
