"""What a run's folder costs by the number of its shards: writing, looking at what others did, opening, gathering.

    python scripts/measure_store.py [--shards 2000 8000 32000] [--units 1000000]

Every shard is one unit of four examples with sixteen numbers; files are not synced to the disk, whose time is not ours.
Then so many units of about a millisecond through the engine, of which many share a shard, and the index of as many.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_coar.data import Identity
from hf_coar.runs import engine, outbox
from hf_coar.runs.index import Index, gaps
from hf_coar.runs.store import Store

EXAMPLES = 4  # of a unit
PART = "masks-000000"


@contextmanager
def clock(found: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that a block takes."""
    begun = time.perf_counter()
    yield
    found[name] = found.get(name, 0.0) + time.perf_counter() - begun


def of_shards(n_shards: int) -> dict[str, float]:
    """Seconds by what is done, with one shard a unit and a look at the folder before each, as in a team."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, watcher = (Store(folder, {"seed": 0}) for _ in range(2))
        for number in range(n_shards):
            batch = {"inputs": torch.full((EXAMPLES, 2), float(number))}
            results = {"outputs": torch.zeros(EXAMPLES, 16), **Identity.of_batch(batch).columns()}
            with clock(found, "writing"):
                store.write(PART, number * EXAMPLES, results)
            with clock(found, "looking"):
                watcher.refresh()
                watcher.missing(PART, number * EXAMPLES, (number + 1) * EXAMPLES)
        with clock(found, "opening"):
            again = Store(folder, {"seed": 0})
        with clock(found, "gathering"):
            again.gather(PART, n_shards * EXAMPLES)
    return found


class Batches:
    """Many small batches, none of which is kept."""

    def __init__(self, count: int) -> None:
        """So many."""
        self.count = count

    def __len__(self) -> int:
        """How many."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """From the first on."""
        for number in range(self.count):
            yield {"inputs": torch.full((EXAMPLES, 2), float(number))}


def of_units(n_units: int) -> dict[str, float]:
    """Seconds, and shards, of units that take next to nothing."""
    found: dict[str, float] = {}
    part = engine.Part("masks", 0, 16, 16.0)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, {"seed": 0})
        with clock(found, "running"):
            count = engine.run(
                store, torch.nn.Linear(1, 1), Batches(n_units), [part],
                lambda batch, first, part: {"outputs": torch.zeros(EXAMPLES, 16)}, "units", progress=False,
            )  # fmt: skip
        found["shards"] = len(list((Path(folder) / "shards").iterdir()))
        with clock(found, "opening"):
            again = Store(folder, {"seed": 0})
        with clock(found, "gathering"):
            again.gather(PART, count)
    return found


def of_index(n_units: int) -> dict[str, float]:
    """Seconds to note so many units, and to ask for each."""
    found: dict[str, float] = {}
    index = Index()
    with clock(found, "noting"):
        for number in range(n_units):
            index.add(PART, number * EXAMPLES, (number + 1) * EXAMPLES)
    with clock(found, "asking"):
        for number in range(n_units):
            start, stop = number * EXAMPLES, (number + 1) * EXAMPLES
            gaps(index.overlapping(PART, start, stop), start, stop)
    return found


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[2000, 8000, 32000])
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    os.fsync = lambda handle: None
    torch.set_num_threads(1)
    print("one shard a unit, seconds")
    print(f"{'shards':>10}{'writing':>10}{'looking':>10}{'opening':>10}{'gathering':>11}")
    for n_shards in arguments.shards:
        found = of_shards(n_shards)
        print(f"{n_shards:10,}" + "".join(f"{found[name]:10.2f}" for name in found), flush=True)
    print(f"\nshort units, which share shards of {outbox.SECONDS:g} s; seconds")
    print(f"{'units':>10}{'running':>10}{'shards':>10}{'opening':>10}{'gathering':>11}{'noting':>10}{'asking':>10}")
    for n_units in arguments.units:
        found = of_units(n_units) | of_index(n_units)
        print(f"{n_units:10,}" + "".join(f"{found[name]:10.2f}" for name in found), flush=True)


if __name__ == "__main__":
    main()
