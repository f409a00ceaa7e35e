"""Results on their way to the disk: those of short units wait a moment for their neighbours, and share a shard."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from hf_coar.data import concatenated
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
        behind: a thread writes them while the next unit runs; or everything else waits. A shard of 64 images and 83,712
            components takes .2 s, in which an accelerator would do nothing and a CPU has enough to do.
    """

    store: Store
    behind: bool = False
    _pool: ThreadPoolExecutor | None = None
    _writing: Future | None = None
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
            self._write_all()

    def flush(self) -> None:
        """Write all that waits; it is on the disk afterwards."""
        self._write_all()
        self._settle()

    def _write_all(self) -> None:
        for part in list(self._waiting):
            self._write(part)
        self._bytes = 0

    def _write(self, part: str) -> None:
        """Hand results over, one shard at a time: what went wrong with the one before is raised first."""
        self._settle()
        waiting = self._waiting.pop(part)
        if self.behind:
            self._pool = self._pool or ThreadPoolExecutor(1, "hf_coar writes")
            self._writing = self._pool.submit(self._put, part, waiting)
        else:
            self.store.note(*self._put(part, waiting))

    def _put(self, part: str, waiting: _Waiting) -> tuple[str, int, int]:
        return part, waiting.start, self.store.put(part, waiting.start, concatenated(waiting.results))

    def _settle(self) -> None:
        """Wait until what was handed over is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.store.note(*writing.result())
