"""Results on their way to the disk: those of short units wait a moment for their neighbours, and share a shard."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_coar.runs.store import Store

# A shard takes about a millisecond, and makes every look at the folder longer. Units that are not short go out at once;
# the others wait, and a process that is killed loses so much of its time at most.
SECONDS = 1.0
SHORT = 0.1
_BYTES = 2**28  # that wait at most


@dataclass
class _Waiting:
    start: int
    stop: int
    results: list[dict[str, Tensor]]


@dataclass
class Outbox:
    """Results of one process that are not written yet, by part.

    Attributes:
        store: where they go.
    """

    store: Store
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _since: float = 0.0
    _bytes: int = 0

    def add(self, part: str, start: int, results: Mapping[str, Tensor], seconds: float) -> None:
        """Results of a part for examples from `start` on, which took so long to compute."""
        if not self._waiting:
            self._since = time.perf_counter()
        results = {name: value.detach().cpu() for name, value in results.items()}
        stop = start + len(next(iter(results.values())))
        before = self._waiting.get(part)
        if before is not None and before.stop != start:
            self._write(part)
            before = None
        if before is None:
            self._waiting[part] = _Waiting(start, stop, [results])
        else:
            before.stop = stop
            before.results.append(results)
        self._bytes += sum(value.nbytes for value in results.values())
        waited = time.perf_counter() - self._since
        if seconds > min(SHORT, SECONDS) or waited > SECONDS or self._bytes > _BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all that waits."""
        for part in list(self._waiting):
            self._write(part)
        self._bytes = 0

    def _write(self, part: str) -> None:
        waiting = self._waiting.pop(part)
        joined = {name: torch.cat([some[name] for some in waiting.results]) for name in waiting.results[0]}
        self.store.write(part, waiting.start, joined)
