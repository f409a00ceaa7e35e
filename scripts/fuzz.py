"""Fuzz: files that anybody may send, changed at random, are read or are an error of ours.

Five kinds of files are changed, seeded by kind and number: saved attributions, records of edits, folders of runs,
models with their configurations, and files of flags. Each change is tried in a forked child that may take no more than
some memory and time beyond what it had. Anything but a result or a `CoarError` of a few lines is a finding: another
exception, a killed child, one that takes too long, and for a run that goes on, other numbers than it had before.

    python scripts/fuzz.py                            # 20,000 changes, about 20 minutes on one core
    python scripts/fuzz.py --write                    # and the table, scripts/results/fuzz.md; by --kind in pieces
    python scripts/fuzz.py --kind run --from 123 --n 1   # one change again, with its traceback
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tables
from conftest import build_net
from test_crash import attribute
from test_format import tiny

import hf_coar as coar
from hf_coar import cli, models
from hf_coar.cli import config
from hf_coar.editing import edited
from hf_coar.plots import page
from hf_coar.runs import outbox
from hf_coar.storage import folders

RESULT = Path(__file__).resolve().parent / "results" / "fuzz.md"
SHARES = {"artefact": 7000, "edit": 3000, "run": 1500, "model": 3500, "flags": 5000}
MEMORY, SECONDS = 2 * 2**30, 10.0  # of one change, beyond what the process had; of its own time, not that of others
WAIT = 120.0  # seconds on the clock, for what waits and does nothing
LONGEST = 2000  # characters of an error

Files = dict[str, bytes]

# What JSON may hold where something else is expected; `10**30` and so on are no sizes that may be allocated.
STRANGE = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\ud800", "\x1b[2J", "# <b>x</b>", "a" * 5000, [], {}, [[]], {"": ""}, [None] * 50, "os.system",
    "attributions-00001-of-00001.safetensors", "0" * 64,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ changes


def changed_bytes(content: bytes, source: random.Random) -> bytes:
    """Flip, cut, repeat, insert or zero a few bytes."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 8])):
        position, length = source.randrange(len(data) + 1), source.choice([1, 2, 8, 64])
        what = source.randrange(6)
        if what == 0 and position < len(data):
            data[position] ^= 1 << source.randrange(8)
        elif what == 1:
            del data[position:]
        elif what == 2:
            data[position:position] = source.randbytes(length)
        elif what == 3:
            data[position : position + length] = bytes(length)
        elif what == 4:
            del data[position : position + length]
        else:
            data[position : position + length] = b"\xff" * length
    return bytes(data)


def places(value: Any, path: tuple = ()) -> Any:
    """The path of every entry of nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed_json(value: Any, source: random.Random) -> Any:
    """Replace, remove, add or rename some entry, keys included."""
    value = json.loads(json.dumps(value))
    for _ in range(source.choice([1, 1, 2])):
        if not isinstance(value, dict | list):
            return source.choice(STRANGE)
        *parents, last = source.choice([path for path in places(value) if path] or [("new",)])
        holder = value
        for key in parents:
            holder = holder[key]
        what = source.randrange(4)
        if what == 0 or (isinstance(holder, list) and what == 3):
            holder[last] = source.choice(STRANGE)
        elif what == 1:
            holder.pop(last) if isinstance(holder, list) else holder.pop(last, None)
        elif what == 2 and isinstance(holder, dict):
            holder[source.choice(["../x", "new", "files", "\ud800", "a" * 300])] = source.choice(STRANGE)
        elif isinstance(holder, dict) and last in holder:
            holder[source.choice(["../../evil", "/tmp/evil", "x", ""])] = holder.pop(last)
    return value


def dumped(value: Any) -> bytes:
    """As JSON, with what JSON does not know too."""
    return json.dumps(value).encode()


def changed_file(name: str, content: bytes, source: random.Random) -> bytes:
    """Its JSON, its header or any of its bytes."""
    if name.endswith(".json") and source.random() < 0.7:
        with suppress(ValueError):
            return dumped(changed_json(json.loads(content), source))
    if name.endswith(".safetensors") and source.random() < 0.5:
        with suppress(ValueError, struct.error):  # it was changed before, and has no header any more
            return changed_header(content, source)
    return changed_bytes(content, source)


def changed_header(content: bytes, source: random.Random) -> bytes:
    """A safetensors file with other entries in its header, or another length of it, or of the data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    encoded = dumped(changed_json(header, source))
    claimed = source.choice([len(encoded)] * 6 + [0, 2**40, 2**64 - 1, len(encoded) - 1])
    return struct.pack("<Q", claimed) + encoded + source.choice([data, data[:-1], data + b"x", b""])


def files_of(folder: Path) -> Files:
    """Content by name."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def put(files: Files, folder: Path) -> None:
    """A folder with just these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------ kinds of files


@dataclass(frozen=True)
class Kind:
    """What is changed, how, and what is done with it.

    Attributes:
        make: the files as they are, by name; several sets, from which one is drawn.
        change: some of them; with the number of the change as the seed.
        attempt: reads a folder with the changed files as a user would; given the originals.
    """

    make: Callable[[Path], list[Files]]
    change: Callable[[Files, random.Random], Files]
    attempt: Callable[[Path, Files], None]


def make_artefacts(folder: Path) -> list[Files]:
    """In one file, and in two of half precision."""
    tiny().save_pretrained(folder / "a")
    tiny().save_pretrained(folder / "b", max_shard_size=24, dtype="float16")
    return [files_of(folder / "a"), files_of(folder / "b")]


def change_artefact(files: Files, source: random.Random) -> Files:
    """As damage, or as a liar would do it: with a configuration that names the checksums of what is really there."""
    name = source.choice([*sorted(files), "config.json", "components.json"])
    changed = {**files, name: changed_file(name, files[name], source)}
    if source.random() < 0.5 and name == "components.json":
        known = json.loads(changed["config.json"])
        known["files"]["components.json"] = hashlib.sha256(changed["components.json"]).hexdigest()
        changed["config.json"] = dumped(known)
    return changed


def use_artefact(folder: Path, files: Files) -> None:
    """Load, check, predict, name, save and push nothing."""
    attributions = coar.Attributions.from_pretrained(folder)
    attributions.verify()
    attributions.predict(torch.ones(len(attributions.components)))
    [str(component) for component in attributions.components]
    attributions.save_pretrained(folder / "again")
    attributions.save_pretrained(folder)
    coar.Attributions.from_pretrained(folder / "again")
    folders.made_here(folder)


def make_edits(folder: Path) -> list[Files]:
    """A record alone; its model is another kind's business."""
    record = {"rule": "welch", "components": ["a"], "parameters": ["a.weight"], "indices": [1], "increase": [0]}
    record |= {"decrease": [], "base": {"id": "a/b", "library": "timm"}, "data": {"id": "c/d", "revision": "0" * 40}}
    record |= {"figures": [["a", "b", "c"]], "output": "margin", "granularity": "unit", "reference": "all others"}
    record |= {"step": 2, "tried": [["welch", 1]], "gate": 0.5}
    return [{"coar_edit.json": dumped(record)}]


def change_any(files: Files, source: random.Random) -> Files:
    """One file, now and then two, now and then one that is gone."""
    changed = dict(files)
    for _ in range(source.choice([1, 1, 2])):
        name = source.choice(sorted(changed) or ["x.json"])
        if source.random() < 0.05:
            changed.pop(name, None)
        else:
            changed[name] = changed_file(name, changed.get(name, b"{}"), source)
    return changed


def use_edit(folder: Path, files: Files) -> None:
    """The record as a card, here and for the Hub."""
    entries = edited.read_record(folder)
    edited.write_card(folder, entries, "user/name")
    (folder / "README.md").unlink()
    edited.write_card(folder, entries, ".")


def make_runs(folder: Path) -> list[Files]:
    """A run that is done, and one that was broken off; a shard a unit, so that changes do not depend on the time."""
    patience, outbox.SECONDS = outbox.SECONDS, 0.0
    attribute(folder / "run")
    outbox.SECONDS = patience
    whole = files_of(folder / "run")
    shards = sorted(name for name in whole if name.startswith("shards/"))
    ends = ("config.json", "attributions.safetensors", "length-", "report", "README", "pictures", *shards[1::2])
    return [whole, {name: content for name, content in whole.items() if not name.startswith(ends)}]


def change_run(files: Files, source: random.Random) -> Files:
    """A shard, the settings, the marker or a note."""
    names = [name for name in files if not name.startswith(("report", "pictures", "README"))]
    if source.random() < 0.15:
        extra = source.choice(["skipped/000000001.json", "length-rounds.json", "budget.json", "skipped/x.json"])
        return {**files, extra: dumped(source.choice(STRANGE))}
    return {**files, **change_any({source.choice(names): files[name] for name in [source.choice(names)]}, source)}


@functools.cache
def undisturbed(folder: str) -> torch.Tensor:
    """The weights of the run."""
    return coar.Attributions.from_pretrained(folder).weights.clone()


def use_run(folder: Path, files: Files) -> None:
    """Go on with it: an error, or the numbers of a run that nobody disturbed."""
    skipped = (folder / "skipped").exists()
    attribute(folder)
    found = coar.Attributions.from_pretrained(folder).weights
    expected = undisturbed(os.environ["FUZZ_RUN"])
    # Units are sized by time: what is computed again may stand in another batch, and be rounded otherwise.
    if not skipped and not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise AssertionError("the run went on, and gave other numbers")


def make_models(folder: Path) -> list[Files]:
    """Small ones of three families and two libraries."""
    for name in ("bert", "gpt2", "timm_vit", "vit"):
        models.save_model(build_net(name).model, folder / name)
    return [files_of(folder / name) for name in ("bert", "gpt2", "timm_vit", "vit")]


def change_model(files: Files, source: random.Random) -> Files:
    """Most often its configuration."""
    name = "config.json" if source.random() < 0.8 else source.choice(sorted(files))
    return {**files, name: changed_file(name, files[name], source)}


def use_model(folder: Path, files: Files) -> None:
    """Load it, with and without its weights, and fingerprint it."""
    models.load_architecture(folder)
    models.fingerprint(models.load_model(folder))


def make_flags(folder: Path) -> list[Files]:
    """What two verbs write back."""
    said = {"model": "m", "data": "d", "out": "o", "rounds": 8, "include": ["a*", "b"], "seed": 3, "streaming": True}
    said |= {"ablated_fraction": 0.05, "split": "train[:20]", "exclude": None, "granularity": "unit"}
    more = {"attributions": "a", "out": "o", "decrease": ["label=3", "1-2"], "n_components": 5, "rule": "welch"}
    texts = [config.text("attribute", said), config.text("edit", more)]
    return [
        {"flags.yaml": text.encode(), "verb": verb} for text, verb in zip(texts, (b"attribute", b"edit"), strict=True)
    ]


YAML = [
    b"!!python/object:os.system ", b"&a ", b"*a", b"[" * 3000, b"{" * 3000, b"- - - ", b"? ", b"2024-13-45",
    b"9" * 5000,
    b"0x" + b"f" * 5000, b"!!binary ", b"<<: ", b".nan", b"1e999", b"\x00", b"\x1b[2J", b"|\n", b">-\n", b"---\n",
    b"%TAG ! x\n", b"true", b"~", b"190:20:30", b"'", b'"', b"\t", b"\xef\xbb\xbf", b"\xc2\x85", b": ", b"#",
    b"a: [1, {b: c}]\n",
]  # fmt: skip


def change_flags(files: Files, source: random.Random) -> Files:
    """Bytes, or pieces of YAML that do not belong."""
    content = files["flags.yaml"]
    for _ in range(source.choice([1, 1, 2, 4])):
        position = source.randrange(len(content) + 1)
        if source.random() < 0.6:
            content = content[:position] + source.choice(YAML) + content[position:]
        else:
            content = changed_bytes(content, source)
    return {**files, "flags.yaml": content}


def use_flags(folder: Path, files: Files) -> None:
    """As the command line does."""
    verb = files["verb"].decode()
    words = [verb, "a", "b"] if verb == "attribute" else [verb, "a"]
    try:
        config.parse(cli.parser(), [*words, "--out", "o", "--config", str(folder / "flags.yaml")])
    except SystemExit as error:  # argparse has said what is wrong
        if error.code != 2:
            raise


KINDS = {
    "artefact": Kind(make_artefacts, change_artefact, use_artefact),
    "edit": Kind(make_edits, change_any, use_edit),
    "run": Kind(make_runs, change_run, use_run),
    "model": Kind(make_models, change_model, use_model),
    "flags": Kind(make_flags, change_flags, use_flags),
}


# ------------------------------------------------------------------------------------------------------------- trying


@dataclass
class Tally:
    """What came of the changes of one kind."""

    read: int = 0
    refused: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    memory: int = 0  # bytes beyond what the child had before


def attempt(kind: str, number: int, originals: list[Files], folder: Path) -> str:
    """`read`, `refused`, or what happened instead."""
    source = random.Random(f"{kind} {number}")
    files = source.choice(originals)
    put(KINDS[kind].change(files, source), folder)
    try:
        KINDS[kind].attempt(folder, files)
    except coar.CoarError as error:
        said = str(error)
        return "refused" if said and len(said) < LONGEST else f"an error of {len(said)} characters"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(where.filename).name} ({where.name}): {str(error)[:100]}"
    return "read"


def _child(kind: str, numbers: range, originals: list[Files], folder: Path, pipe: int) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.fsync = lambda handle: None
    page._drawn = lambda folder, sections: {}  # pictures take most of the time, and read nothing
    with open("/proc/self/statm") as sizes:
        has = int(sizes.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: WAIT}
    for number in numbers:
        os.write(pipe, dumped({"begun": number}) + b"\n")
        for timer, seconds in limits.items():
            signal.setitimer(timer, seconds)  # nobody handles it, so it ends a loop in C too
        started = time.process_time()
        outcome = attempt(kind, number, originals, folder)
        for timer in limits:
            signal.setitimer(timer, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        done = {"done": number, "outcome": outcome, "seconds": time.process_time() - started, "memory": grown}
        os.write(pipe, dumped(done) + b"\n")


def fuzz(kind: str, numbers: range, progress: Callable[[int], None] = lambda done: None) -> Tally:
    """Try changes of one kind, each in a child that is begun anew where one dies."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        originals = KINDS[kind].make(place / "originals")
        os.environ["FUZZ_RUN"] = str(place / "originals" / "run")
        if kind == "run":
            undisturbed(os.environ["FUZZ_RUN"])
        position = numbers.start
        while position < numbers.stop:
            position = _some(kind, range(position, numbers.stop), originals, place / "tried", tally)
            progress(position - numbers.start)
    return tally


def _some(kind: str, numbers: range, originals: list[Files], folder: Path, tally: Tally, most: int = 250) -> int:
    """One child, for some changes; returns the number of the next one."""
    numbers = range(numbers.start, min(numbers.stop, numbers.start + most))
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        try:
            _child(kind, numbers, originals, folder, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    begun = None
    with os.fdopen(ours, "rb") as lines:
        for line in lines:
            said = json.loads(line)
            begun = said.get("begun")
            if begun is None:
                _note(tally, said)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if begun is None:
        return numbers.stop
    reason = "took too long" if status in (-signal.SIGALRM, -signal.SIGPROF) else f"the process died (status {status})"
    tally.findings.append((begun, reason))
    return begun + 1


def _note(tally: Tally, said: dict[str, Any]) -> None:
    if said["outcome"] in ("read", "refused"):
        setattr(tally, said["outcome"], getattr(tally, said["outcome"]) + 1)
    else:
        tally.findings.append((said["done"], said["outcome"]))
    tally.slowest = max(tally.slowest, said["seconds"])
    tally.memory = max(tally.memory, said["memory"])


# ------------------------------------------------------------------------------------------------------------- report

HEADER = (
    "| files | changes | read | refused by a CoarError | findings | slowest, s | most memory, MB | minutes |",
    "|:--|--:|--:|--:|--:|--:|--:|--:|",
)


def row(name: str, tally: Tally, seconds: float) -> str:
    """A line of the table."""
    n = tally.read + tally.refused + len(tally.findings)
    counts = [f"{count:,}" for count in (n, tally.read, tally.refused, len(tally.findings))]
    cells = [name, *counts, f"{tally.slowest:.2f}", str(tally.memory // 2**20), f"{seconds / 60:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=tuple(KINDS))
    parser.add_argument("--n", type=int, help=f"changes of each kind (default {SHARES})")
    parser.add_argument("--from", type=int, default=0, dest="start", help="number of the first one")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}; rows of other kinds stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, findings = [], []
    for kind in [args.kind] if args.kind else KINDS:
        n, started = args.n or SHARES[kind], time.monotonic()

        def told(done: int, kind: str = kind, n: int = n, started: float = started) -> None:
            sys.stderr.write(f"\r{kind} {done:,} of {n:,}; {time.monotonic() - started:.0f} s ")

        tally = fuzz(kind, range(args.start, args.start + n), told)
        sys.stderr.write("\n")
        whole = n == SHARES[kind] and not args.start
        name = kind if whole else f"{kind} {args.start:,} … {args.start + n - 1:,}"
        rows.append(row(name, tally, time.monotonic() - started))
        findings += [f"{kind} {number}: {what}" for number, what in tally.findings[:20]]
    sys.stdout.write("\n".join([*HEADER, *rows, "", *findings]) + "\n")
    if args.write:
        notes = [
            f"Each change may take {SECONDS:g} s and {MEMORY // 2**30} GiB beyond what the process had. Machine: "
            "one of two CPU cores, other work going on. A row is made by `--kind`, or all of them at once.",
            *findings,
        ]
        tables.write(RESULT, "Fuzz", "python scripts/fuzz.py --write", HEADER, rows, notes)
    if findings:
        sys.exit(1)


if __name__ == "__main__":
    main()
