"""The folder of a run: frozen settings and write-once shards. A shard's existence means that its unit is done.

    run.json                                     what determines the numbers
    shards/<part>-<start>-<stop>.safetensors     results of one part of the passes on examples start … stop - 1
    skipped/<index>.json                         an example that could not be read, and why
    length-<kind>.json                           how many examples the data held when all of them were done

No flags, no order, no locks: any number of processes that share the folder can join, die and come back.
"""

import json
import logging
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar.errors import CoarError, CorruptFileError, DataError, RunMismatchError
from hf_coar.storage import files, folders

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<part>[a-z]+-\d+)-(?P<start>\d+)-(?P<stop>\d+)\.safetensors")


class Store:
    """The results of a run, on disk."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Open a run's folder, or begin one.

        Shards that are damaged are deleted, so that their units run again.

        Args:
            folder: made if it does not exist.
            settings: all that determines the numbers; JSON values.

        Raises:
            RunMismatchError: the folder holds a run with other settings; the error lists the keys that differ.
            CoarError: the folder holds other things, or cannot be written.
        """
        self.folder = folders.claim(folder, folders.ATTRIBUTIONS)
        self._shards = self.folder / "shards"
        self._freeze(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
        files.remove_stale_temporaries(self._shards)
        self._names: set[str] = set()
        self._done: dict[str, set[tuple[int, int]]] = {}
        self._skipped: dict[int, str] = {}
        for path, _, _, _ in self._listing():
            self._drop_damaged(path)
        self.refresh()

    def _freeze(self, settings: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            # Of several processes that begin at once, one writes, and the others compare with what it wrote.
            files.write_json(path, settings, replace=False)
        stored = files.read_json(path)
        differing = sorted(_differences(stored, settings), key=lambda entry: entry[0])
        if differing:
            raise RunMismatchError(
                f"{self.folder} holds a run with other settings: "
                + "; ".join(f"{key} was {reprlib.repr(old)}, now {reprlib.repr(new)}" for key, old, new in differing)
                + ". Choose another folder, or go back to those settings"
            )

    def _listing(self) -> Iterator[tuple[Path, str, int, int]]:
        for path in sorted(self._shards.glob("*.safetensors")):
            match = _SHARD.fullmatch(path.name)
            if match:
                yield path, match["part"], int(match["start"]), int(match["stop"])

    def _drop_damaged(self, path: Path) -> None:
        try:
            files.read_tensors(path)
        except CorruptFileError as error:
            logger.warning("%s; it will be computed again", error)
            try:
                path.unlink(missing_ok=True)
            except OSError as reason:
                raise CoarError(f"cannot delete the damaged {path}: {reason.strerror}; delete it yourself") from reason

    def refresh(self) -> int:
        """Look for what other processes did meanwhile, trusting it until it is gathered.

        Returns:
            How many shards there are.
        """
        for name in _names_in(self._shards) - self._names:
            self._names.add(name)
            match = _SHARD.fullmatch(name)
            if match:
                self._done.setdefault(match["part"], set()).add((int(match["start"]), int(match["stop"])))
        for name in _names_in(self.folder / "skipped"):
            index = name.removesuffix(".json")
            if index.isdigit() and int(index) not in self._skipped:
                self._skipped[int(index)] = str(files.read_json(self.folder / "skipped" / name))
        return len(self._names)

    def missing(self, part: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of examples start … stop - 1 for which a part is not done; skipped examples count as done."""
        done = self._done.get(part, set())
        if (start, stop) in done:  # as a rule: the batches are those of before
            return []
        gaps, position = [], start
        skipped = [(index, index + 1) for index in self._skipped if start <= index < stop]
        for first, last in sorted([*done, *skipped]):
            if last <= position or first >= stop:
                continue
            if first > position:
                gaps.append((position, first))
            position = max(position, last)
        return gaps + ([(position, stop)] if position < stop else [])

    def write(self, part: str, start: int, results: Mapping[str, Tensor]) -> None:
        """Store the results of a part for examples from `start` on; the first axis of every tensor is the example."""
        stop = start + next(iter(results.values())).shape[0]
        path = self._shards / f"{part}-{start:09d}-{stop:09d}.safetensors"
        files.write_tensors(path, results)
        self._names.add(path.name)
        self._done.setdefault(part, set()).add((start, stop))

    def skip(self, index: int, reason: str) -> None:
        """Note that an example cannot be read: it is left out of all results."""
        files.write_json(self.folder / "skipped" / f"{index:09d}.json", reason)
        self._skipped[index] = reason

    @property
    def skipped(self) -> dict[int, str]:
        """Why an example was left out, by its index; in order."""
        return dict(sorted(self._skipped.items()))

    def length(self, kind: str) -> int | None:
        """How many examples the data held when all parts of this kind were done; None if they never were."""
        path = self.folder / f"length-{kind}.json"
        return files.read_json(path) if path.exists() else None

    def check_length(self, kind: str, n_examples: int) -> None:
        """Note how many examples the data hold, when all is done.

        Raises:
            DataError: they held another number before, or there are results of examples beyond the last.
        """
        # A run that was broken off noted no length, so its results are looked at as well.
        ends = [stop for part, done in self._done.items() if part.startswith(f"{kind}-") for _, stop in done]
        self.check_passed(kind, n_examples)
        before = max([*ends, self.length(kind) or 0])
        if before > n_examples:
            raise DataError(self._other_length(before, f"{n_examples}"))
        files.write_json(self.folder / f"length-{kind}.json", n_examples, replace=False)

    def check_passed(self, kind: str, n_examples: int) -> None:
        """Raises `DataError` if the data, of which so many examples were passed by now, held fewer before."""
        before = self.length(kind)
        if before is not None and n_examples > before:
            raise DataError(self._other_length(before, f"{n_examples} or more"))

    def _other_length(self, before: int, now: str) -> str:
        return (
            f"the data hold {now} examples, and {self.folder} has results of {before}; give the same data, "
            "or choose another folder"
        )

    def of_examples(self, start: int, stop: int) -> tuple[int, dict[str, Tensor]] | None:
        """The first example and the results of some shard that begins among examples start … stop - 1, if any."""
        for path, _, first, _ in self._listing():
            if start <= first < stop:
                return first, files.read_tensors(path)
        return None

    def gather(self, part: str, n_examples: int) -> dict[str, Tensor]:
        """A part's results for all examples, in their order: tensors whose first axis is the example.

        Examples that were skipped are left out.

        Raises:
            CorruptFileError: a shard was damaged since the folder was opened, or is gone.
        """
        gathered: dict[str, Tensor] = {}
        covered = torch.zeros(n_examples, dtype=torch.bool)
        for path, shard_part, start, stop in self._listing():
            if shard_part != part or start >= n_examples:
                continue
            for name, values in files.read_tensors(path).items():
                if name not in gathered:
                    gathered[name] = values.new_zeros((n_examples, *values.shape[1:]))
                gathered[name][start:stop] = values[: n_examples - start]
            covered[start:stop] = True
        skipped = [index for index in self._skipped if index < n_examples]
        covered[skipped] = True
        if not covered.all():
            first = int((~covered).nonzero()[0])
            raise CorruptFileError(f"{self._shards} lacks results of {part} for example {first}; run it again")
        if skipped:
            covered[skipped] = False
            gathered = {name: values[covered] for name, values in gathered.items()}
        return gathered


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            dotted = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(old.get(key), new.get(key), dotted)
    elif old != new:
        yield prefix, old, new
