"""What a forward raises that does not fit its examples: told by the examples, before and during a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

RAISED = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def failure(error: BaseException, batch: Mapping[Any, Any]) -> str:
    """What went wrong, in its first line, and what the examples hold, by name or place."""
    shapes = {name: list(value.shape) if isinstance(value, Tensor) else "list" for name, value in batch.items()}
    return f"({first_line(error)}); they hold {shapes}"


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:200]}"
