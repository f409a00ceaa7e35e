"""What holds inside of a block alone, for the thread that is in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_Value = TypeVar("_Value")


@contextmanager
def set_inside(variable: ContextVar[_Value], value: _Value) -> Iterator[None]:
    """Inside the block a context variable has this value, and afterwards the one that it had."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
