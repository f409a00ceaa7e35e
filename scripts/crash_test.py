"""Whatever dies, nothing is lost: hundreds of SIGKILLs, small disks, a read-only one, and what is there afterwards.

Runs (`attribute`, `evaluate`) are killed at random moments with their three workers and then go on: they must end in
the same bytes as one that nobody disturbed. Saves (of attributions, of an edited model, of an explorer, to a Hub on
this machine) over an earlier one are killed, too: a reader must find all of the old or all of the new. Then both on a
tmpfs that is too small by more or less, and on one that is made read-only half-way (as root; otherwise these are left
out).

    python scripts/crash_test.py                  # 300 kills, 20 disks; about 15 minutes on one core
    python scripts/crash_test.py --write          # and the table, scripts/results/crash_test.md; by --only in pieces
    python scripts/crash_test.py --kills 30 --disks 4
"""

# ruff: noqa: E402 (the address of the Hub is set between the imports)
import argparse
import atexit
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import hub_server
import tables

# The Hub's client reads its address when it is imported, and the tests' own settings would take it offline.
HUB = hub_server.hub()
atexit.register(HUB.__exit__, None, None, None)  # before threads are frozen, for which it would wait for ever
os.environ |= {"HF_ENDPOINT": HUB.__enter__().endpoint, "HF_HUB_DISABLE_XET": "1"}
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="crash-home-")
import huggingface_hub.constants  # noqa: F401 (before conftest, which goes offline)
from conftest import DEMO, build_net
from other_processes import start, wait
from test_crash import attribute, data
from test_format import tiny

import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.explore import export
from hf_coar.runs import engine, outbox
from hf_coar.storage import folders

RESULT = Path(__file__).resolve().parent / "results" / "crash_test.md"
N_WORKERS = 3
outbox.SECONDS = 0.0  # a shard a unit: how many short ones share one depends on how fast they were


@dataclass
class Tally:
    """What came of one kind of work.

    Attributes:
        killed: processes (or all workers at once) that a signal ended before they were done.
        finished: that were done before the signal came.
        old: saves after whose death the old one was there, whole.
        new: saves after whose death the new one was there, whole.
        full: refusals for want of space, or of permission.
        lost: what went wrong.
    """

    killed: int = 0
    finished: int = 0
    old: int = 0
    new: int = 0
    full: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """Something that writes into a folder.

    Attributes:
        name: in the table.
        run: does it, as worker i of n where it has workers.
        before: what is there when it begins.
        read: what a reader finds, comparable; None for runs, which are compared byte by byte when they are done.
        workers: how many processes do it together.
    """

    name: str
    run: Callable[[Path, str], None]
    before: Callable[[Path], None] = lambda folder: None
    read: Callable[[Path], Any] | None = None
    workers: int = 1

    @property
    def on_disks(self) -> bool:
        """Whether it is tried on small and failing disks: not where several write, or a Hub does."""
        return self.workers == 1 and not self.name.startswith("push")


# --------------------------------------------------------------------------------------------------------------- works


def other() -> coar.Attributions:
    """As `tiny`, with one other weight."""
    found = tiny()
    found.weights[0, 0] = 9.0
    return found


@functools.cache
def attributions() -> coar.Attributions:
    """Of the small network."""
    return coar.attribute(build_net("mlp").model, data(), method=coar.PathGradient(rounds=2), progress=False)


@functools.cache
def models_to_save() -> tuple[Any, Any]:
    """Two edits of a small vision transformer."""
    net = build_net("timm_vit")
    found = coar.attribute(net.model, [net.batch], method=coar.PathGradient(rounds=2), progress=False)
    sides = [coar.edit(net.model, found, decrease=[0], n_components=n) for n in (2, 5)]
    return sides[0], sides[1]


def run_attribute(folder: Path, worker: str) -> None:
    """Eight batches of two examples."""
    attribute(folder, worker=worker)


def run_evaluate(folder: Path, worker: str) -> None:
    """Two fractions."""
    found = attributions()  # by every worker, as they have no folder in common for these
    with engine.running(worker=worker):
        coar.evaluate(found, build_net("mlp").model, data(), n_masks=20, out=folder, progress=False)


def read_attributions(folder: Path) -> Any:
    """Weights, and whose evaluation is shown."""
    found = coar.Attributions.from_pretrained(folder)
    return found.weights.flatten().tolist()


def read_model(folder: Path) -> Any:
    """By timm alone, and the record that must be of these weights."""
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    record = json.loads((folder / edited.RECORD).read_text())
    return models.fingerprint(loaded), record["components"], models.fingerprint(models.load_model(folder))


def read_export(folder: Path) -> Any:
    """What the explorer would load."""
    found = read_attributions(folder / "attributions")
    return found, (folder / "app.py").read_bytes(), models.fingerprint(models.load_model(folder / "model"))


def run_export(folder: Path, worker: str) -> None:
    """Attributions of the demo's model, with the model and some data."""
    export(exported()[1], folder, model=DEMO / "model", data=exported()[2])


def before_export(folder: Path) -> None:
    """An export of other attributions."""
    export(exported()[0], folder, model=DEMO / "model", data=exported()[2])


@functools.cache
def exported() -> tuple[Path, Path, Path]:
    """Two folders of attributions, and data."""
    place = Path(tempfile.mkdtemp(prefix="crash-export-"))
    tiny().save_pretrained(place / "old")
    other().save_pretrained(place / "new")
    (place / "data.csv").write_text("text,label\na,0\n")
    return place / "old", place / "new", place / "data.csv"


def works() -> list[Work]:
    """All of them."""
    old, new = models_to_save()

    def pushed(folder: Path, side: coar.Attributions) -> None:
        side.push_to_hub(f"me/{folder.name}", token="hf_test")

    def read_pushed(folder: Path) -> Any:
        with tempfile.TemporaryDirectory() as cache:
            found = coar.Attributions.from_pretrained(f"me/{folder.name}", cache_dir=cache, token="hf_test")
            found.verify()
            return found.weights.flatten().tolist()

    return [
        Work("attribute, 3 workers", run_attribute, workers=N_WORKERS),
        Work("attribute", run_attribute),
        Work("evaluate, 3 workers", run_evaluate, workers=N_WORKERS),
        Work(
            "save attributions",
            lambda folder, worker: other().save_pretrained(folder),
            lambda folder: tiny().save_pretrained(folder, max_shard_size=24),
            read_attributions,
        ),
        Work(
            "save an edited model",
            lambda folder, worker: edited.save(new, folder),
            lambda folder: edited.save(old, folder),
            read_model,
        ),
        Work("explore --export", run_export, before_export, read_export),
        Work(
            "push to a Hub",
            lambda folder, worker: pushed(folder, other()),
            lambda folder: pushed(folder, tiny()),
            read_pushed,
        ),
    ]


# --------------------------------------------------------------------------------------------------------------- kills


def content(folder: Path) -> dict[str, bytes]:
    """Bytes by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def quietly(work: Callable[[], None]) -> int:
    """The process id of a child that does it; 0 = done, 1 = failed, 3 = a CoarError."""

    def child() -> None:
        warnings.simplefilter("ignore")
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            work()
        except CoarError:
            os._exit(3)

    return start(child)


def seconds_of(work: Work, folder: Path) -> float:
    """How long it takes, undisturbed, in a child."""
    work.before(folder)
    begun = time.monotonic()
    status = wait(quietly(lambda: work.run(folder, "0/1")))
    if status:
        raise SystemExit(f"{work.name} fails when nobody disturbs it (status {status})")
    return time.monotonic() - begun


def killed(work: Work, n_kills: int, place: Path, source: random.Random) -> Tally:
    """Kill it so often, at random moments; what it leaves is read, and it is done again."""
    tally = Tally()
    reference = place / "reference"
    seconds = seconds_of(work, reference)
    expected = content(reference) if work.read is None else None
    sides = None
    if work.read is not None:
        work.before(place / "old")
        sides = {"old": work.read(place / "old"), "new": work.read(reference)}
    round_ = 0
    while tally.killed < n_kills:
        folder = place / f"tried-{round_}"
        round_ += 1
        work.before(folder)
        for _ in range(5):  # kills, one after another, before it may go on to its end
            alive = _one_kill(work, folder, seconds, source, tally)
            if sides is not None:
                _check_sides(work, folder, sides, tally)
            if alive or tally.killed >= n_kills:
                break
        _check_end(work, folder, expected, sides, tally)
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def _one_kill(work: Work, folder: Path, seconds: float, source: random.Random, tally: Tally) -> bool:
    """Whether it was done before the signal came."""
    names = [f"{i}/{work.workers}" for i in range(work.workers)]
    children = [quietly(partial(work.run, folder, name)) for name in names]
    time.sleep(source.uniform(0, 1.1 * seconds))
    for child in children:
        os.kill(child, signal.SIGKILL)
    statuses = [wait(child) for child in children]
    died = -signal.SIGKILL in statuses
    tally.killed += died
    tally.finished += not died
    tally.lost += [f"{work.name}: status {status}" for status in statuses if status not in (0, -signal.SIGKILL)]
    return not died


def _check_sides(work: Work, folder: Path, sides: dict[str, Any], tally: Tally) -> None:
    try:
        found = work.read(folder)
    except Exception as error:
        tally.lost.append(f"{work.name}: nothing to read after a kill ({error})")
        return
    for name, side in sides.items():
        if found == side:
            setattr(tally, name, getattr(tally, name) + 1)
            return
    tally.lost.append(f"{work.name}: neither old nor new after a kill")


def _check_end(work: Work, folder: Path, expected: Any, sides: Any, tally: Tally) -> None:
    """Done again, it ends as if nothing had been."""
    status = wait(quietly(lambda: work.run(folder, "0/1")))
    if status:
        tally.lost.append(f"{work.name}: cannot go on after a kill (status {status})")
    elif expected is not None:
        left = {name: value for name, value in content(folder).items() if not _left_behind(name)}
        if left != expected:
            tally.lost.append(f"{work.name}: other bytes in {sorted(set(left.items()) ^ set(expected.items()))[0][0]}")
    elif work.read(folder) != sides["new"]:
        tally.lost.append(f"{work.name}: not the new one after it was done again")


def _left_behind(name: str) -> bool:
    """A temporary file of a killed writer, which is deleted a day later."""
    last = name.rsplit("/", 1)[-1]
    return last.endswith(".tmp") or last.startswith(".tmp")


# --------------------------------------------------------------------------------------------------------------- disks


@contextmanager
def disk(place: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        place.rmdir()


def remounted(place: Path, option: str) -> None:
    """Another size, or read-only."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


def on_small_disks(work: Work, n_disks: int, place: Path) -> Tally:
    """Sizes from next to nothing to enough; afterwards the disk is made large, and the work done again."""
    tally = Tally()
    folders._ROOM = 0  # a disk that is refused at once tells nothing of one that fills up on the way
    with disk(place / "large", 2**28) as large:
        work.before(large / "a")
        before = sum(path.stat().st_size for path in large.rglob("*") if path.is_file())
        work.run(large / "a", "0/1")
        expected = content(large / "a") if work.read is None else None
        new = work.read(large / "a") if work.read else None
        needed = sum(max(4096, path.stat().st_size) for path in large.rglob("*"))
    for i in range(n_disks):
        floor = max(16384, 2 * before)
        size = floor + (2 * needed - floor // 2) * i // n_disks
        with disk(place / f"disk-{i}", 2**28) as small:
            work.before(small / "a")
            old = work.read(small / "a") if work.read else None
            with suppress(subprocess.CalledProcessError):  # smaller than what is there already
                remounted(small, f"size={size}")
            status = wait(quietly(lambda small=small: work.run(small / "a", "0/1")))
            tally.full += status == 3
            tally.finished += status == 0
            _check_refusal(work, small / "a", status, {"old": old, "new": new}, tally)
            remounted(small, f"size={2**28}")
            _check_end(work, small / "a", expected, {"new": new}, tally)
    return tally


def on_a_disk_that_becomes_read_only(work: Work, place: Path) -> Tally:
    """As a failing disk does: read-only while the work is at it, and again before it begins."""
    tally = Tally()
    with disk(place / "large", 2**28) as large:
        work.before(large / "a")
        work.run(large / "a", "0/1")
        expected = content(large / "a") if work.read is None else None
        new = work.read(large / "a") if work.read else None
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.8):
        with disk(place / "read-only", 2**28) as failing:
            work.before(failing / "a")
            old = work.read(failing / "a") if work.read else None
            seconds = 0.0 if fraction == 0 else fraction * seconds_of(work, failing / "timed")
            child = quietly(lambda failing=failing: work.run(failing / "a", "0/1")) if fraction else None
            time.sleep(seconds)
            _make_read_only(failing)
            child = child or quietly(lambda failing=failing: work.run(failing / "a", "0/1"))
            status = wait(child)
            tally.full += status == 3
            tally.finished += status == 0
            _check_refusal(work, failing / "a", status, {"old": old, "new": new}, tally)
            remounted(failing, "rw")
            _check_end(work, failing / "a", expected, {"new": new}, tally)
    return tally


def _make_read_only(place: Path) -> None:
    """Refused while a file is open for writing, so it is tried until it is not."""
    for _ in range(2000):
        if subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True).returncode == 0:
            return
        time.sleep(0.001)
    raise SystemExit(f"{place} cannot be made read-only")


def _check_refusal(work: Work, folder: Path, status: int, sides: dict[str, Any], tally: Tally) -> None:
    if status not in (0, 3):
        tally.lost.append(f"{work.name}: status {status}, and no CoarError")
    if work.read is not None:
        _check_sides(work, folder, sides, tally)


# -------------------------------------------------------------------------------------------------------------- report

HEADER = (
    "| work | disturbed by | killed | refused | done | old, whole | new, whole | lost | minutes |",
    "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
)


def told(rows: list[str], work: Work, by: str, disturbed: Callable[[], Tally]) -> list[str]:
    """Adds a line to the table; returns what was lost."""
    begun = time.monotonic()
    tally = disturbed()
    cells = [tally.killed, tally.full, tally.finished, tally.old, tally.new, len(tally.lost)]
    minutes = f"{(time.monotonic() - begun) / 60:.1f}"
    rows.append(f"| {work.name} | {by} | {' | '.join(map(str, cells))} | {minutes} |")
    sys.stderr.write("\n".join([rows[-1], *tally.lost, ""]))
    return tally.lost


def mounts(place: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    try:
        with disk(place / "tried", 2**20):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def write(rows: list[str], lost: list[str]) -> None:
    """The table."""
    notes = ["Machine: two CPU cores, other work going on. A row is made by `--only`, or all of them at once."]
    command = "python scripts/crash_test.py --write"
    tables.write(RESULT, "Nothing is lost", command, HEADER, rows, [*notes, *lost[:10]])


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--disks", type=int, default=20, help="sizes")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}; other rows of it stay")
    parser.add_argument("--only", help="one work, by its name in the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    rows, lost = [], []
    with tempfile.TemporaryDirectory() as temporary:
        every = works()
        for work in (work for work in every if args.only in (None, work.name)):
            place = Path(temporary) / work.name.replace(" ", "-")
            place.mkdir()
            kills, source = -(-args.kills // len(every)), random.Random(work.name)
            lost += told(rows, work, "SIGKILL", partial(killed, work, kills, place, source))
            if work.on_disks and mounts(place):
                by = f"{args.disks} sizes of a tmpfs"
                lost += told(rows, work, by, partial(on_small_disks, work, args.disks, place))
                by = "a read-only remount"
                lost += told(rows, work, by, partial(on_a_disk_that_becomes_read_only, work, place))
            if args.write:  # work by work, as this may be broken off as well
                write(rows, lost)
    sys.stdout.write("\n".join([*HEADER, *rows, *lost]) + "\n")
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
