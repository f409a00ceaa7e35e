"""Checks of values, once a batch: on an accelerator every look at a value waits for all that is under way."""

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from contextvars import ContextVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_coar.models.inside import set_inside

# By the first tensor: what of it was checked, with the other tensors of the check and the versions of them all.
_PASSED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


def passed() -> AbstractContextManager[None]:
    """Inside the block no values are looked at: tensors stand for others that passed all checks."""
    return set_inside(_TRUSTED, True)


def once(what: Hashable, tensors: tuple[Tensor, ...], check: Callable[[], None]) -> None:
    """Run a check of values, unless the very same tensors passed it before and have not been written to since.

    Args:
        what: is checked; with all numbers that the check compares to.
        tensors: all whose values the check looks at.
        check: raises where something is wrong; then it runs again the next time.
    """
    if _TRUSTED.get() or any(tensor.is_meta for tensor in tensors):  # of a model without weights there are no values
        return
    if any(tensor.is_inference() for tensor in tensors):  # these do not count what is written to them
        check()
        return
    key = (what, *(tensor._version for tensor in tensors))
    passed = _PASSED.setdefault(tensors[0], {})
    others = passed.get(key)
    if others is not None and all(seen() is one for seen, one in zip(others, tensors[1:], strict=True)):
        return
    check()
    passed[key] = tuple(weakref.ref(tensor) for tensor in tensors[1:])
