"""What a run's folder costs by the number of its shards: writing, looking at what others did, opening, gathering.

    python scripts/measure_store.py [--shards 2000 8000 32000] [--units 1000000] [--write]

Every shard is one unit of four examples with sixteen numbers; files are not synced to the disk, whose time is not ours.
Then so many units that compute nothing through the engine, of which many share a shard, and the index of as many. Last
the end of a run of many components, whose passes are done: attributions are made of its shards and saved, by one
process and by three at once; the memory is what a process holds beyond what it did before, without what is mapped from
files (which all processes of a machine share, and which the system takes back when it needs it).
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import hf_coar as coar
from hf_coar.data import Identity
from hf_coar.runs import engine, outbox, problem
from hf_coar.runs.index import Index, gaps
from hf_coar.runs.store import Store

RESULT = Path(__file__).resolve().parent / "results" / "store.md"
EXAMPLES = 4  # of a unit
COMPONENTS = 20_000
METHOD = coar.PathGradient(rounds=2)
PLANNED = 1_000_000  # units, by the last row measured
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


def wide() -> torch.nn.Module:
    """A network with so many neurons in one layer."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, COMPONENTS - 3), torch.nn.ReLU(), torch.nn.Linear(COMPONENTS - 3, 3))


def of_end(folder: Path, n_examples: int, processes: int, in_memory: bool) -> dict[str, float]:
    """Seconds, and megabytes a process at most, of the end of a run that is done but for it."""
    problem._IN_MEMORY = 2**62 if in_memory else 2**28
    pipes = [os.pipe() for _ in range(processes)]
    begun = time.perf_counter()
    for number, (_, theirs) in enumerate(pipes):
        if not os.fork():
            try:
                before, peak = anonymous(), Peak()
                attribute(folder, n_examples, f"{number}/{processes}")
                os.write(theirs, f"{peak.stop() - before}".encode())
            finally:
                os._exit(0)
    found = [float(os.read(ours, 100)) for ours, theirs in pipes if not os.close(theirs)]
    for _ in pipes:
        os.wait()
    return {"seconds": time.perf_counter() - begun, "MB": max(found)}


def attribute(folder: Path, n_examples: int, worker: str | None = None) -> None:
    """A run of few passes and many numbers."""
    draw = torch.Generator().manual_seed(0)
    data = [
        {"inputs": torch.randn(50, 2, generator=draw), "labels": torch.zeros(50).long()}
        for _ in range(n_examples // 50)
    ]
    with coar.running(worker=worker, report=False):
        coar.attribute(wide(), data, method=METHOD, ablated_fraction=0.5, out=folder, progress=False)


def anonymous() -> float:
    """Megabytes of memory of this process that are not mapped from files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


class Peak:
    """The most of it, looked at every few milliseconds."""

    def __init__(self) -> None:
        """From now on."""
        self._most, self._going = anonymous(), True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while self._going:
            self._most = max(self._most, anonymous())
            time.sleep(0.005)

    def stop(self) -> float:
        """Megabytes."""
        self._going = False
        self._thread.join()
        return self._most


def ends(n_examples: int) -> Iterator[str]:
    """Rows of the last table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        attribute(folder, n_examples)
        for processes in (1, 3):
            for in_memory in (True, False):
                found = of_end(folder, n_examples, processes, in_memory)
                how = "in memory, each process" if in_memory else "one process, in a file"
                size = 8 * n_examples * COMPONENTS / 1e6
                numbers = f"{found['seconds']:.1f} | {found['MB']:,.0f}"
                yield f"| {n_examples:,} | {size:,.0f} | {how} | {processes} | {numbers} |"


def main() -> None:
    """Measure, print tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[2000, 8000, 32000])
    parser.add_argument("--units", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--end", type=int, nargs="*", default=[2000], help="examples")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []

    def told(*more: str) -> None:
        lines.extend(more)
        print("\n".join(more), flush=True)

    told(f"The end of a run of {COMPONENTS:,} components, flips and checks included\n")
    told(
        "| examples | attributions, MB | made | processes | seconds | MB, each at most |",
        "|--:|--:|---|--:|--:|--:|",
    )
    for n_examples in arguments.end:
        for row in ends(n_examples):
            told(row)
    os.fsync = lambda handle: None
    told("\nOne shard a unit, seconds\n")
    told("| shards | writing | looking | opening | gathering |", "|--:|--:|--:|--:|--:|")
    for n_shards in arguments.shards:
        found = of_shards(n_shards)
        told(f"| {n_shards:,} | " + " | ".join(f"{seconds:.2f}" for seconds in found.values()) + " |")
    told(f"\nUnits that compute nothing, which share shards of {outbox.SECONDS:g} s; seconds\n")
    told("| units | running | shards | opening | gathering | noting | asking |", "|--:" * 7 + "|")
    for n_units in arguments.units:
        found = of_units(n_units) | of_index(n_units)
        cells = [f"{value:,.2f}".removesuffix(".00") for value in found.values()]
        told(f"| {n_units:,} | " + " | ".join(cells) + " |")
    if arguments.units:
        times = PLANNED / n_units
        cells = [f"{times * value:,.0f}" for value in found.values()]
        told(f"| {PLANNED:,}, planned | " + " | ".join(cells) + " |")
    if arguments.write:
        command = "    python scripts/measure_store.py --write"
        machine = "Machine: two CPU cores, one thread a process, other work going on."
        RESULT.write_text("\n\n".join(["# The folder of a run", command, machine, "\n".join(lines)]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
