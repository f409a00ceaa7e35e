"""Reading: batches are decoded and known once where they are small, and by threads ahead of the passes where asked for.

Every kind of passes goes over all data. What is decoded for one serves the next, up to a bound; the first batch is read
for each all the same, so that data which differ from one reading to the next are noticed.
"""

import contextvars
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from hf_coar.data.batches import Batch
from hf_coar.data.examples import Chunk, Read
from hf_coar.data.identity import Identity

_KEPT = 2**28  # bytes of decoded examples


@dataclass(frozen=True)
class Piece:
    """Examples of a batch without a hole: the index of the first, the batch, by what they are known."""

    start: int
    batch: Batch
    identity: Identity


@dataclass(frozen=True)
class Ready:
    """A batch that was read, see `examples.Read`."""

    pieces: list[Piece]
    failed: dict[int, str]

    @property
    def n_bytes(self) -> int:
        """What all of its tensors take."""
        return sum(tensor.nbytes for piece in self.pieces for tensor in _tensors(piece.batch))


class Reader:
    """Reads the batches of one data set; a `Problem` has one for all of its passes."""

    def __init__(self, most_bytes: int = _KEPT) -> None:
        """Nothing is read yet; at most so many bytes of decoded examples are kept."""
        self._left = most_bytes
        self._kept: dict[int, Ready] = {}
        self._known: dict[int, list[tuple[_Versions, Identity]]] = {}
        self._begun: dict[int, Future[Ready]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, chunks: Iterable[Chunk], threads: int) -> None:
        """Let threads read some batches, as many as they are at a time, while other work is done."""
        for chunk in chunks:
            if chunk.number in self._kept or chunk.number in self._begun:
                continue
            self._pool = self._pool or ThreadPoolExecutor(threads, "hf_coar reads")
            self._begun[chunk.number] = self._pool.submit(contextvars.copy_context().run, self._read, chunk)

    def read(self, chunk: Chunk) -> Ready:
        """A batch and by what its examples are known.

        Raises:
            CoarError: whatever stands against reading it.
        """
        kept = self._kept.get(chunk.number)
        if kept is not None:
            return kept
        begun = self._begun.pop(chunk.number, None)
        if begun is None and self._begun:  # a data set that two threads read at once need not give the same
            begun = self._pool.submit(contextvars.copy_context().run, self._read, chunk)
        ready = self._read(chunk) if begun is None else begun.result()
        if chunk.decodes and chunk.number > 0 and (n_bytes := ready.n_bytes) <= self._left:
            self._kept[chunk.number] = ready
            self._left -= n_bytes
        return ready

    def _read(self, chunk: Chunk) -> Ready:
        read = chunk.read()
        return Ready(self._identified(chunk, read), read.failed)

    def _identified(self, chunk: Chunk, read: Read) -> list[Piece]:
        """The pieces; what lies in memory and was not written to since is known by what it was known by."""
        known, pieces, seen = self._known.get(chunk.number, []), [], []
        for place, (start, batch) in enumerate(read.pieces):
            versions = _versions(batch) if chunk.in_memory else None
            same = versions is not None and place < len(known) and _are_same(versions, known[place][0])
            identity = known[place][1] if same else Identity.of_batch(batch)
            pieces.append(Piece(start, batch, identity))
            if versions is not None:
                seen.append((versions, identity))
        if seen:
            self._known[chunk.number] = seen
        return pieces


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]


_Versions = list[tuple[weakref.ref, int]]


def _versions(batch: Batch) -> _Versions | None:
    """The tensors of a batch, which are not kept for it, and how often each was written to; None if one cannot tell."""
    leaves = pytree.tree_leaves(dict(batch))
    if not all(isinstance(leaf, Tensor) and not leaf.is_inference() for leaf in leaves):
        return None
    return [(weakref.ref(leaf), leaf._version) for leaf in leaves]


def _are_same(found: _Versions, known: _Versions) -> bool:
    return len(found) == len(known) and all(
        one() is not None and one() is other() and version == before
        for (one, version), (other, before) in zip(found, known, strict=True)
    )
