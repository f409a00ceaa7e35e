"""The folder of a run: frozen settings and write-once shards. A shard's existence means that its unit is done.

    run.json                                     what determines the numbers
    shards/<part>-<start>-<stop>.safetensors     results of one part of the passes on examples start … stop - 1, with
                                                 the hashes of these examples and of what determines the numbers
    skipped/<index>.json                         an example that could not be read, and why
    estimates-<hash>.safetensors                 what was estimated from them, if it is large; until it is saved
    witness.safetensors                          outputs of the first examples with nothing ablated, see `witness`
    length-<kind>.json                           how many examples the data held when all of them were done

No flags, no order, no locks: any number of processes that share the folder can join, die and come back.
"""

import hashlib
import json
import logging
import os
import re
import reprlib
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions import rows
from hf_coar.data import Batch, Identity
from hf_coar.data.identity import HASH
from hf_coar.errors import CoarError, CorruptFileError, DataError, RunMismatchError
from hf_coar.runs.index import Index, Stretch, gaps
from hf_coar.storage import files, folders, swapping

logger = logging.getLogger(__name__)

_RUN = "run"  # word in the header of a shard: a hash of the settings in run.json
_NAME = "shard"  # and its own name
_ESTIMATES = "estimates-"  # begin of the names of files of estimates
_ANY, _ALL = "any", 2**62  # the part that stands for all of them; more examples than there are
_LOOKS = 20  # looks at the folder take one part in so many of the time
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
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self._about = {_RUN: _stamp(settings)}
        self._compare(settings)
        for place in (self.folder, self._shards):
            files.remove_stale_temporaries(place)
        for name in sorted(_names_in(self._shards)):
            if _SHARD.fullmatch(name):
                self._inspect(self._shards / name)
        # Not before the shards were looked at: where run.json is gone, they say whose they are.
        files.write_json(self.folder / "run.json", settings, replace=False)
        self._compare(settings)  # of several processes that begin at once, one wrote
        self._names: set[str] = set()
        self._done, self._before = Index(), Index()
        self._skipped: dict[int, str] = {}
        self._told: set[int] = set()
        self._known = _Known()
        self._expected: tuple[Identity, list[int]] | None = None
        self._next_look = 0.0
        self.refresh()
        for part in self._done.parts():
            for stretch in self._done.overlapping(part, 0, _ALL):
                self._before.add(_ANY, *stretch)

    def _compare(self, settings: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            return
        differing = sorted(_differences(files.read_json(path), settings), key=lambda entry: entry[0])
        if differing:
            raise RunMismatchError(
                f"{self.folder} holds a run with other settings: "
                + "; ".join(f"{key} was {reprlib.repr(old)}, now {reprlib.repr(new)}" for key, old, new in differing)
                + ". Choose another folder, or go back to those settings"
            )

    def _inspect(self, path: Path) -> None:
        """Delete a shard that is damaged; one of another run is an error."""
        try:
            _, about = files.read_tensors_about(path)
            self._check_whose(path, about)
        except CorruptFileError as error:
            logger.warning("%s; it will be computed again", error)
            try:
                path.unlink(missing_ok=True)
            except OSError as reason:
                raise CoarError(f"cannot delete the damaged {path}: {reason.strerror}; delete it yourself") from reason

    def _check_whose(self, path: Path, about: Mapping[str, str]) -> None:
        """Whether a shard is of this run, and under its own name: shards of two parts may look alike."""
        if about.keys() != self._about_shard(path).keys() or about[_RUN] != self._about[_RUN]:
            raise RunMismatchError(
                f"{path} holds results of a run with other settings (its run.json is gone or was exchanged), or of an "
                f"older hf_coar; choose another folder, or delete {self._shards} to compute them again"
            )

        if about != self._about_shard(path):
            raise CorruptFileError(f"{path} holds what belongs into {about[_NAME]!r}")

    def _about_shard(self, path: Path) -> dict[str, str]:
        return {**self._about, _NAME: path.stem}

    # ---------------------------------------------------------------------------------------------------- what is done

    def refresh(self, now: bool = False) -> int:
        """Look for what other processes did meanwhile, trusting it until it is gathered.

        Args:
            now: even if the last look was a moment ago. Otherwise looks take a twentieth of the time at most: a listing
                takes the longer, the more shards there are.

        Returns:
            How many shards there are.
        """
        begun = time.monotonic()
        if not now and begun < self._next_look:
            return len(self._names)
        new = _names_in(self._shards) - self._names
        self._names |= new
        for name in sorted(new):
            match = _SHARD.fullmatch(name)
            if match:
                self._done.add(match["part"], int(match["start"]), int(match["stop"]))
        for name in _names_in(self.folder / "skipped"):
            index = name.removesuffix(".json")
            if index.isdigit() and int(index) not in self._skipped:
                self._skipped[int(index)] = str(files.read_json(self.folder / "skipped" / name))
        done = time.monotonic()
        self._next_look = done + _LOOKS * (done - begun)
        return len(self._names)

    def missing(self, part: str, start: int, stop: int) -> list[Stretch]:
        """The stretches of examples start … stop - 1 for which a part is not done; skipped examples count as done."""
        skipped = [(index, index + 1) for index in self._skipped if start <= index < stop]
        return gaps([*self._done.overlapping(part, start, stop), *skipped], start, stop)

    def was_begun(self, start: int, stop: int) -> bool:
        """Whether there were results of some of the examples start … stop - 1 when the folder was opened."""
        return bool(self._before.overlapping(_ANY, start, stop))

    def write(self, part: str, start: int, results: Mapping[str, Tensor]) -> None:
        """Store the results of a part for examples from `start` on; the first axis of every tensor is the example."""
        self.note(part, start, self.put(part, start, results))

    def put(self, part: str, start: int, results: Mapping[str, Tensor]) -> int:
        """The half of `write` that any thread may do, the file alone; returns one past the last example."""
        stop = start + next(iter(results.values())).shape[0]
        path = self._path(part, start, stop)
        files.write_tensors(path, results, self._about_shard(path))
        return stop

    def note(self, part: str, start: int, stop: int) -> None:
        """The other half: that the results of examples start … stop - 1 are on the disk."""
        self._names.add(self._path(part, start, stop).name)
        self._done.add(part, start, stop)

    def _path(self, part: str, start: int, stop: int) -> Path:
        return self._shards / f"{part}-{start:09d}-{stop:09d}.safetensors"

    def skip(self, index: int, reason: str) -> None:
        """Note that an example cannot be read: it is left out of all results."""
        files.write_json(self.folder / "skipped" / f"{index:09d}.json", reason)
        self._skipped[index] = reason

    @property
    def skipped(self) -> dict[int, str]:
        """Why an example was left out, by its index; in order."""
        return dict(sorted(self._skipped.items()))

    def tell_skipped(self, n_examples: int) -> None:
        """Warn of what was left out of so many examples; of the same ones once, however many parts a run has."""
        if self._skipped.keys() == self._told:
            return
        self._told = set(self._skipped)
        logger.warning(
            "%d of %d examples were left out because they cannot be read: %s; delete what is called 'skipped' in the "
            "run's folder, and in those of its evaluation, to try them again",  # the same words for all of them
            len(self._told), n_examples, sorted(self._told)[:8],
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ how many, of what

    def length(self, kind: str) -> int | None:
        """How many examples the data held when all parts of this kind were done; None if they never were."""
        path = self.folder / f"length-{kind}.json"
        length = files.read_json(path) if path.exists() else None
        if length is not None and (type(length) is not int or length < 0):
            raise CorruptFileError(f"{path} is damaged: it holds no number of examples; delete it to count them again")
        return length

    def check_length(self, kind: str, n_examples: int) -> None:
        """Note how many examples the data hold, when all is done.

        Raises:
            DataError: they held another number before, or there are results of examples beyond the last.
        """
        self.check_passed(kind, n_examples)
        # A run that was broken off noted no length, so its results are looked at as well.
        before = max(self._done.end(kind), self.length(kind) or 0)
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

    def check_examples(self, identity: Identity, start: int) -> None:
        """Compare examples from `start` on, as they were read now, with those that there are results of.

        Raises:
            DataError: they are others; names the first, and in what it differs.
        """
        todo = [(start, start + len(identity))]
        for part in self._done.parts():  # as a rule the first one tells of all: shards agree with each other
            found = [(stretch, part_of) for part_of in todo for stretch in self._done.overlapping(part, *part_of)]
            for (first, last), (low, high) in found:
                results = files.read_tensors(self._path(part, first, last), verify=False)
                low, high = max(first, low), min(last, high)
                stored = Identity.of({name: value[low - first : high - first] for name, value in results.items()})
                with self._same_examples():
                    stored.check(identity.rows(slice(low - start, high - start)), low)
            todo = [gap for part_of in todo for gap in gaps(self._done.overlapping(part, *part_of), *part_of)]
            if not todo:
                return

    def expect(self, identity: Identity, skipped: Sequence[int] = ()) -> None:
        """Say beforehand of which examples the results are to be; `check_expected` compares with them.

        Args:
            identity: of the examples.
            skipped: indices of examples that it leaves out, as they could not be read.
        """
        self._expected = (identity, sorted(skipped))

    def check_expected(self, batch: Batch, identity: Identity, start: int) -> None:
        """Compare the examples of a batch, from `start` on, with those to be expected, if it was said which.

        Raises:
            DataError: they are others; names the first, and in what it differs.
        """
        if self._expected is None:
            return
        expected, skipped = self._expected
        count, first = len(identity), start - bisect_left(skipped, start)
        added = [index for index in skipped if start <= index < start + count]
        if added:
            raise DataError(f"example {added[0]} could not be read when the attributions were made, and now it can be")
        if first + count > len(expected):
            raise DataError(f"the data hold more than the {len(expected)} examples that the attributions are of")
        expected.rows(slice(first, first + count)).check_batch(batch, start, identity)

    @contextmanager
    def _same_examples(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(
                f"{self.folder} holds results of other examples: {error}, or choose another folder"
            ) from error

    # ------------------------------------------------------------------------------------------------------ the results

    def gather(self, part: str, n_examples: int) -> dict[str, Tensor]:
        """A part's results for all examples, in their order: tensors whose first axis is the example.

        Examples that were skipped are left out.

        Raises:
            CorruptFileError: a shard was damaged since the folder was opened, or is gone.
            RunMismatchError: a shard is of a run with other settings.
            DataError: two shards are of different examples.
        """
        return next(self.blocks(part, n_examples, n_examples), {})

    def blocks(self, part: str, n_examples: int, size: int) -> Iterator[dict[str, Tensor]]:
        """What `gather` gives, `size` examples at a time; every shard is read once."""
        if self.missing(part, 0, n_examples):
            self.refresh(now=True)  # another process may have done it
        kept = [index for index in range(n_examples) if index not in self._skipped]
        opened: dict[Stretch, dict[str, Tensor]] = {}  # shards that reach into the next block
        for first in range(0, len(kept), size):
            yield self._joined(part, kept[first : first + size], opened)

    def estimates(
        self, part: str, n_examples: int, n_rows: int, blocks: Iterable[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What is estimated from the results of a part, in a file that one of the processes of a machine makes.

        It is taken as it is where another one, or this run before it was broken off, has made it already.

        Args:
            part: of which it is.
            n_examples: of the data, skipped ones among them.
            n_rows: without these.
            blocks: the estimates, some examples at a time; taken only if there is no file of them yet.

        Returns:
            Tensors, mapped from the file.
        """
        stamp = _stamp({**self._about, part: [n_examples, *self._skipped]})
        path = self.folder / f"{_ESTIMATES}{part}-{stamp}.safetensors"
        with swapping.locked(path):
            try:
                return _opened(path, verify=True)
            except CorruptFileError:  # as a rule it is not there
                self.drop_estimates(part)
            rows.write(path, n_rows, blocks, rows.MATRICES)
        return _opened(path)

    def drop_estimates(self, part: str = "") -> None:
        """Delete what `estimates` made, of one part or of all, once it is saved; what was mapped stays."""
        for path in self.folder.glob(f"{_ESTIMATES}{part}*.safetensors"):
            path.unlink(missing_ok=True)

    def _joined(self, part: str, indices: Sequence[int], opened: dict[Stretch, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Some examples' results out of the shards that hold them."""
        start, stop = indices[0], indices[-1] + 1
        joined: dict[str, Tensor] = {}
        covered = torch.zeros(stop - start, dtype=torch.bool)
        stretches = self._done.overlapping(part, start, stop)
        if not all(self._path(part, *stretch).exists() for stretch in stretches):  # somebody deleted some
            self._names, self._done = set(), Index()
            self.refresh(now=True)
            stretches = self._done.overlapping(part, start, stop)
        for stretch in stretches:
            results = opened.pop(stretch, None) or self._open(part, stretch)
            first, last = stretch
            low, high = max(first, start), min(last, stop)
            for name, values in results.items():
                if name not in joined:
                    joined[name] = values.new_zeros((stop - start, *values.shape[1:]))
                joined[name][low - start : high - start] = values[low - first : high - first]
            covered[low - start : high - start] = True
            if last > stop:
                opened[stretch] = results
        wanted = torch.tensor(indices) - start
        if not covered[wanted].all():
            lost = start + int(wanted[~covered[wanted]][0])
            raise CorruptFileError(f"{self._shards} lacks results of {part} for example {lost}; run it again")
        return joined if len(wanted) == stop - start else {name: values[wanted] for name, values in joined.items()}

    def _open(self, part: str, stretch: Stretch) -> dict[str, Tensor]:
        """A shard, checked: whole, of this run, and of the same examples as all that were opened before."""
        path = self._path(part, *stretch)
        results, about = files.read_tensors_about(path)
        self._check_whose(path, about)
        if any(name.startswith(HASH) for name in results):
            with self._same_examples():
                self._known.check(Identity.of(results), stretch[0])
        return results


class _Known:
    """The identity of all examples whose shards were opened so far."""

    def __init__(self) -> None:
        self._columns: dict[str, Tensor] = {}
        self._seen = torch.zeros(0, dtype=torch.bool)

    def check(self, identity: Identity, start: int) -> None:
        """Compare the examples from `start` on that were seen before, and note the others."""
        stop, columns = start + len(identity), identity.columns()
        if stop > len(self._seen):
            self._grow(max(stop, 2 * len(self._seen)), columns)
        seen = self._seen[start:stop]
        if seen.any():
            rows = seen.nonzero().flatten()
            known = Identity.of({name: column[rows + start] for name, column in self._columns.items()})
            known.check(identity.rows(rows), start + int(rows[0]))
        for name in self._columns:
            self._columns[name][start:stop] = columns[name]
        self._seen[start:stop] = True

    def _grow(self, size: int, columns: Mapping[str, Tensor]) -> None:
        old, count = self._columns or columns, len(self._seen)
        self._columns = {name: column.new_zeros((size, *column.shape[1:])) for name, column in old.items()}
        seen, self._seen = self._seen, torch.zeros(size, dtype=torch.bool)
        self._seen[:count] = seen
        for name, column in old.items():
            self._columns[name][:count] = column[:count]


def _opened(path: Path, verify: bool = False) -> dict[str, Tensor]:
    matrices, columns = rows.load([path], [rows.recorded(path)], rows.MATRICES)
    if verify:
        for matrix in matrices.values():
            matrix.verify()
    return {**{name: matrix.tensor() for name, matrix in matrices.items()}, **columns}


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _stamp(settings: dict[str, Any]) -> str:
    """A hash of settings: equal where `_differences` finds none."""
    plain = json.dumps(_without_none(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return value


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            dotted = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(old.get(key), new.get(key), dotted)
    elif old != new:
        yield prefix, old, new
