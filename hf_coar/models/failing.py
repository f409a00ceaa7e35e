"""What a forward raises that does not fit its examples: told by the examples, before and during a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

RAISED = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def failure(error: BaseException, batch: Mapping[Any, Any]) -> str:
    """What went wrong, in its first line, and what the examples hold, by name or place."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shapes = {name: list(value.shape) if isinstance(value, Tensor) else "list" for name, value in batch.items()}
    return f"({type(error).__name__}: {first[:200]}); they hold {shapes}"
