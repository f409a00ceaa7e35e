"""Order: whether data give the same examples, in the same places, whenever they are read."""

import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any

from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from hf_coar.data.batches import as_batch
from hf_coar.data.identity import Identity
from hf_coar.errors import CoarError, DataError

logger = logging.getLogger(__name__)

_SHUFFLE = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_N_BATCHES = 4  # read twice at most; a batch sampler that shuffles ten of them escapes one time in 5,040
_SECONDS = 2.0  # after which reading for this check ends, with the first batch at least


def check(data: Iterable[Any]) -> None:
    """Read the first batches twice, and compare.

    What changes later on escapes this look, and is found where a run compares all that it reads with what it has.

    Raises:
        DataError: data that are shuffled, or that have other values every time.
    """
    samplers = [getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)]
    shuffling = next((type(sampler).__name__ for sampler in samplers if isinstance(sampler, _SHUFFLE)), None)
    if shuffling is not None:
        raise DataError(
            f"the data come in another order every time ({shuffling}), so that no example keeps its place; build the "
            "DataLoader with shuffle=False and without a sampler, and give torch.utils.data.Subset(dataset, indices) "
            "for a part of a data set"
        )
    first = _identities(data, _N_BATCHES)
    for number, (was, now) in enumerate(zip(first, _identities(data, len(first)), strict=False)):
        try:
            was.check(now)
        except DataError as error:
            raise DataError(
                f"the data are not the same when they are read again: batch {number} has {len(now)} examples, and "
                f"{_difference(was, now)}; turn off shuffling and random augmentation"
            ) from error


def _identities(data: Iterable[Any], count: int) -> list[Identity]:
    begun, found = time.monotonic(), []
    try:
        for item in itertools.islice(data, count):
            found.append(Identity.of_batch(as_batch(item)))
            if time.monotonic() - begun > _SECONDS:
                break
    except CoarError:
        raise
    except Exception as error:  # an example that cannot be read: the run leaves it out, or says which it is
        logger.debug("the order of the data was not looked at: %r", error)
    return found


def _difference(was: Identity, now: Identity) -> str:
    """Whether the examples moved, or their values changed."""
    if len(was) != len(now):
        return f"had {len(was)} before"
    names = was.hashes.keys() & now.hashes.keys()
    differing = sorted(name for name in names if bool((was.hashes[name] != now.hashes[name]).any()))
    return f"its {', '.join(map(repr, differing)) or 'entries'} changed"
