"""One family of errors: every message says what is wrong, with the values, and what to do."""

import math
import re
from numbers import Integral

_LONGEST = 1800  # characters: a library's own error may list all that it knows, or quote all of a file
_LONG = re.compile(r"\S{300,}")  # values that come from elsewhere, and libraries' own errors, may quote all of a file


class CoarError(ValueError):
    """Anything that the user can put right: a wrong name, shape, value, file or model."""

    def __str__(self) -> str:
        """The message, with the ends of words that are longer than any path that people have, and its own."""
        said = _LONG.sub(lambda word: f"{word[0][:120]}…{word[0][-60:]}", super().__str__())
        return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 400]} … {said[-400:]}"


def check_kind(value: object, kind: type, what: str, instead: str) -> None:
    """Raises `CoarError` for an argument of another kind: what it is called, what it is, and what to give instead."""
    if not isinstance(value, kind):
        raise CoarError(f"{what} is a {type(value).__name__}, {repr(value)[:60]}; give {instead}")


def is_count(value: object, least: int = 1, most: float = math.inf) -> bool:
    """Whether a value is a whole number within limits; truth values, 0 and 1 to Python, are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def check_count(value: object, what: str, least: int = 1) -> None:
    """Raises `CoarError` for what is no whole number, or below `least`."""
    if not is_count(value, least):
        raise CoarError(f"{what}={value!r}; give a whole number, at least {least}")


class NoComponentsError(CoarError):
    """Nothing in the model matched: an unknown glob, a granularity the model lacks, or no known layer."""


class ModelError(CoarError):
    """A model that cannot be found, loaded, called or differentiated."""


class ModelMismatchError(ModelError):
    """Attributions or components of another model."""


class DataError(CoarError):
    """A data set that cannot be found, has no labels, or does not yield batches of tensors."""


class RunMismatchError(CoarError):
    """A run folder that was begun with other settings."""


class CorruptFileError(CoarError):
    """A file that is truncated, altered or not ours."""


class BudgetError(CoarError):
    """A budget that affords not even the smallest run."""


class UnsatisfiedError(CoarError):
    """No candidate of an edit satisfies the constraints.

    Attributes:
        best: what comes nearest (`editing.tasks.walking.Point`): it reaches the target and costs too much, or else
            costs little enough and reaches less; None where nothing was measured that does either.
    """

    best: object = None


class OutOfRangeError(CoarError, IndexError):
    """An example or a component of a number that there is none of."""


class NonFiniteOutputError(CoarError):
    """The model gave NaN or infinity, so nothing can be attributed."""
