"""Numbers of examples as people give them: one, several, or a mask over all of them."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from hf_coar.errors import CoarError, OutOfRangeError

_BOOLS = (bool, np.bool_)


def numbers(which: Any, n_examples: int | None, what: str = "example") -> list[int]:
    """The numbers of examples, in the order given; whether they are in range is not looked at.

    Args:
        which: a number, several of them (list, range, tensor, array, series), or a mask, bool [examples].
        n_examples: how many there are; None where it is not known, and a mask cannot be told from a wrong one.
        what: they are called.

    Raises:
        CoarError: something else, such as fractions, or a mask of another length.
    """
    if isinstance(which, Tensor | np.ndarray):
        which = which.tolist()
    entries = list(which) if isinstance(which, Iterable) and not isinstance(which, str) else [which]
    entries = [one.item() if isinstance(one, Tensor) and one.dim() == 0 else one for one in entries]
    if entries and all(isinstance(one, _BOOLS) for one in entries):
        if n_examples not in (None, len(entries)):
            raise CoarError(f"a mask of {len(entries)} {what}s, and there are {n_examples}; give one entry for each")
        return [place for place, chosen in enumerate(entries) if chosen]
    for one in entries:
        if not isinstance(one, Integral) or isinstance(one, _BOOLS):
            raise CoarError(f"no {what} {one!r}; give whole numbers, or a mask with True or False for every {what}")
    return [int(one) for one in entries]


def within(which: Any, n_examples: int, what: str = "example") -> list[int]:
    """The numbers of examples, from 0 on; negative ones count from the end.

    Args:
        which: as for `numbers`.
        n_examples: how many there are.
        what: they are called.

    Raises:
        OutOfRangeError: there is no such example.
        CoarError: as for `numbers`.
    """
    found = numbers(which, n_examples, what)
    outside = [one for one in found if not -n_examples <= one < n_examples]
    if outside:
        raise OutOfRangeError(f"{what} {outside[0]} of {n_examples}: give a number from 0 to {n_examples - 1}")
    return [one % n_examples for one in found]
