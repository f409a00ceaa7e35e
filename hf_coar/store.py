"""The folder of a run: frozen settings and write-once shards. A shard's existence means that its unit is done.

    run.json                                     what determines the numbers
    shards/<part>-<start>-<stop>.safetensors     results of one part of the passes on examples start … stop - 1

No flags, no order, no locks: any number of processes that share the folder can join, die and come back.
"""

import json
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar import files
from hf_coar.errors import CorruptFileError, RunMismatchError

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
        """
        self.folder = Path(folder)
        self._shards = self.folder / "shards"
        self._freeze(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
        self._done: dict[str, list[tuple[int, int]]] = {}
        for path, part, start, stop in self._listing():
            if self._is_whole(path):
                self._done.setdefault(part, []).append((start, stop))

    def _freeze(self, settings: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            files.write_json(path, settings)
        stored = files.read_json(path)
        differing = sorted(_differences(stored, settings))
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

    def _is_whole(self, path: Path) -> bool:
        try:
            files.read_tensors(path)
        except CorruptFileError as error:
            logger.warning("%s; it will be computed again", error)
            path.unlink(missing_ok=True)
            return False
        return True

    def missing(self, part: str, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of examples start … stop - 1 for which a part is not done."""
        gaps, position = [], start
        for first, last in sorted(self._done.get(part, ())):
            if last <= position or first >= stop:
                continue
            if first > position:
                gaps.append((position, first))
            position = max(position, last)
        return gaps + ([(position, stop)] if position < stop else [])

    def write(self, part: str, start: int, results: Mapping[str, Tensor]) -> None:
        """Store the results of a part for examples from `start` on; the first axis of every tensor is the example."""
        stop = start + next(iter(results.values())).shape[0]
        files.write_tensors(self._shards / f"{part}-{start:09d}-{stop:09d}.safetensors", results)
        self._done.setdefault(part, []).append((start, stop))

    def gather(self, part: str, n_examples: int) -> dict[str, Tensor]:
        """A part's results for all examples, in their order: tensors whose first axis is the example.

        Raises:
            CorruptFileError: a shard was damaged since the folder was opened, or is gone.
        """
        gathered: dict[str, Tensor] = {}
        covered = torch.zeros(n_examples, dtype=torch.bool)
        for path, shard_part, start, stop in self._listing():
            if shard_part != part:
                continue
            for name, values in files.read_tensors(path).items():
                if name not in gathered:
                    gathered[name] = values.new_zeros((n_examples, *values.shape[1:]))
                gathered[name][start:stop] = values[: n_examples - start]
            covered[start:stop] = True
        if not covered.all():
            first = int((~covered).nonzero()[0])
            raise CorruptFileError(f"{self._shards} lacks results of {part} for example {first}; run it again")
        return gathered


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new
