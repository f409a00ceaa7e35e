"""Masks and gates as a pure function of (seed, index): nothing is stored, any unit can be drawn again anywhere.

The source is Philox-4x64, a counter-based generator (Salmon et al., SC 2011). The key is the seed and the purpose, the
counter is the index, so that seeds never overlap (as `seed + index` would) and the purposes never share a stream.
Only raw 64-bit words are taken from NumPy: those are fixed by the algorithm, whatever NumPy's version.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.storage.threads import side_by_side

MASKS, PATHS, BACKGROUND, EVALUATION, BOOTSTRAP, BASELINES, CHECKS, CONTEXTS = range(8)  # the purposes
_FEWEST_ABLATED = 0.04  # components that a mask ablates on average
_BLOCK = 8  # words of 32 bits that Philox makes at a time
_MANY = 2**18  # words, which take a millisecond: fewer are not worth handing out to threads


def words(seed: int, purpose: int, index: int, sub_index: int, count: int, start: int = 0) -> np.ndarray:
    """`count` random words, uint32 [count], a pure function of the arguments.

    Args:
        seed: 0 .. 2^64 - 1.
        purpose: one of this module's constants.
        index: which mask or which example.
        sub_index: which draw for that index.
        count: how many words.
        start: from which word of that draw on; those before are not made.
    """
    # The lowest counter word moves with every block drawn; the upper ones say which stream this is.
    # Lists of such large integers would pass through floats.
    block, skipped = divmod(start, _BLOCK)
    key, counter = (np.array(values, dtype=np.uint64) for values in ((seed, purpose), (block, 0, sub_index, index)))
    return _SOURCE.at(key, counter).random_raw((skipped + count + 1) // 2).view(np.uint32)[skipped : skipped + count]


def words_of(
    seed: int, purpose: int, indices: Sequence[int], sub_index: int, count: int, device: torch.device, start: int = 0
) -> Tensor:
    """The `words` of several indices on a device, int64 [indices, count]: what is made of them it may do sooner."""
    pinned = device.type == "cuda"
    found = torch.empty(len(indices), count, dtype=torch.int32, device="cpu", pin_memory=pinned)
    rows = found.numpy().view(np.uint32)

    def draw(row: int) -> None:
        rows[row] = words(seed, purpose, indices[row], sub_index, count, start)

    threaded = found.numel() > _MANY and len(indices) > 1
    for _ in side_by_side(draw, range(len(indices))) if threaded else map(draw, range(len(indices))):
        pass
    # Not every operation takes unsigned numbers.
    return found.to(device, non_blocking=True).long() & 0xFFFFFFFF


class _Source(threading.local):
    """A generator a thread, put to where it is wanted: to make one takes longer than to draw a small mask."""

    def __init__(self) -> None:
        self._generator = np.random.Philox(0)
        self._state: dict[str, Any] = dict(self._generator.state)  # with nothing drawn

    def at(self, key: np.ndarray, counter: np.ndarray) -> np.random.Philox:
        """What `np.random.Philox(key=key, counter=counter)` is."""
        self._state["state"] = {"key": key, "counter": counter}
        self._generator.state = self._state
        return self._generator


_SOURCE = _Source()


class MaskSequence(Protocol):
    """Masks that are drawn when they are wanted; `Masks` are random ones.

    Attributes:
        ablated_fraction: that they ablate, for messages.
        count: how many masks.
    """

    ablated_fraction: float
    count: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Masks start … stop - 1, bool [stop - start, n_components], True = left in place."""
        ...


@dataclass(frozen=True)
class Masks:
    """A sequence of random masks, none of them stored: mask i is a pure function of these fields and i.

    Every component is ablated independently with the same probability, as in the paper.

    Attributes:
        n_components: length of a mask.
        ablated_fraction: probability that a component is ablated.
        count: how many masks.
        seed: of the run.
        purpose: `MASKS` for fitting, `EVALUATION` for judging.
    """

    n_components: int
    ablated_fraction: float
    count: int
    seed: int
    purpose: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Masks start … stop - 1, bool [stop - start, n_components], True = left in place."""
        threshold = round(self.ablated_fraction * 2**32)
        # The fraction is part of the index, so that masks of two fractions are independent of each other.
        rows = [words(self.seed, self.purpose, i, threshold, self.n_components) for i in range(start, stop)]
        return torch.from_numpy(np.reshape(rows, (stop - start, self.n_components)) >= threshold)


def uniforms(seed: int, purpose: int, index: int, sub_index: int, count: int) -> np.ndarray:
    """Uniform numbers in (0, 1), float32 [count]."""
    # 24 bits, the mid-points of equal cells: exact in float32, never 0 or 1, and 1 - u is another one of them.
    cells = words(seed, purpose, index, sub_index, count) >> np.uint32(9)
    return (cells.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def balanced_split(seed: int, purpose: int, index: int, sub_index: int, count: int, n_blocks: int) -> np.ndarray:
    """A random split of `count` components into `n_blocks` blocks whose sizes differ by one at most, int32 [count]."""
    order = _stable_order(words(seed, purpose, index, sub_index, count))
    block = np.empty(count, dtype=np.int32)
    block[order] = np.arange(count, dtype=np.int32) % n_blocks
    return block


def _stable_order(words: np.ndarray) -> np.ndarray:
    """What a stable argsort of uint32 gives, in two: of uint16, NumPy's is a radix sort (2.5 times as fast in all)."""
    order = np.argsort(words.astype(np.uint16), kind="stable")
    return order[np.argsort((words >> np.uint32(16)).astype(np.uint16)[order], kind="stable")]


def uniforms_of(words: Tensor) -> Tensor:
    """What `uniforms` makes of its words, on their device: float32 from int64 of any shape, bit for bit."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def balanced_splits_of(words: Tensor, n_blocks: int) -> Tensor:
    """What `balanced_split` makes of its words, on their device: int32 from int64 [draws, count], bit for bit."""
    order = words.argsort(dim=1, stable=True)
    blocks = torch.arange(words.shape[1], dtype=torch.int32, device=words.device) % n_blocks
    return torch.empty_like(words, dtype=torch.int32).scatter_(1, order, blocks.expand_as(order))


def check_seed(seed: int) -> None:
    """Raises `CoarError` unless the seed is an integer from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise CoarError(f"seed={seed!r}; must be an integer from 0 to 2^64 - 1")


def check_some_ablated(ablated_fraction: float, n_components: int) -> None:
    """Raises `CoarError` where hardly any mask would ablate anything."""
    if ablated_fraction * n_components < _FEWEST_ABLATED:
        raise CoarError(
            f"ablated_fraction={ablated_fraction:g} of {n_components} components: hardly any mask would ablate one; "
            f"take {min(0.5, 1 / n_components):.3g}, which ablates one on average, or None to have it chosen"
        )


def check_fraction(ablated_fraction: float) -> None:
    """Raises `CoarError` unless the fraction lies strictly between 0 and 1."""
    if not isinstance(ablated_fraction, Real) or not 0 < ablated_fraction < 1:
        raise CoarError(
            f"ablated_fraction={ablated_fraction!r}; must lie strictly between 0 and 1, such as 0.05 for one in twenty"
        )
