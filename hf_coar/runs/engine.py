"""The engine: examples outside, passes inside. Batches stream by once; all their units of work run while they are here.

A unit of work is (examples of a batch, part of the passes). Units are dealt out among all processes that share the
run's folder; no process waits for another while they run, and whoever is done takes over what is left.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.data import Piece
from hf_coar.errors import CoarError, DataError, ModelError
from hf_coar.models import calling, failing, is_out_of_memory
from hf_coar.runs import workers
from hf_coar.runs.outbox import SHORT, Outbox
from hf_coar.runs.progress import Progress, duration
from hf_coar.runs.running import Running, autocast, current, placed, running
from hf_coar.runs.store import Store
from hf_coar.runs.workers import Team, processes

__all__ = ["Part", "Running", "current", "duration", "is_out_of_memory", "placed", "processes", "run", "running"]

logger = logging.getLogger(__name__)

Compute = Callable[[data_module.Batch, int, "Part"], Mapping[str, Tensor]]

_WORTH_SAYING = 3.0  # seconds to go; a bar that is full by then has said it all
_POLL = 0.1  # seconds between two looks at what the others are doing
_PATIENCE = 2.0  # seconds without any news after which a unit in progress counts as abandoned, or three units' time
_NEIGHBOURS = 16  # batches that are dealt to a process together where there are many, so that shards can join them


# ---------------------------------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Part:
    """A part of the passes of a run: numbers start … stop - 1 of them.

    Attributes:
        kind: what is counted, such as "masks" or "rounds".
        start: the first.
        stop: one past the last.
        cost: of this part, in forward passes of one example.
        n_numbers: how many it writes to the disk for every example.
        differentiates: whether its passes have a backward, and so keep the activations.
        besides: forward passes that may come on top, by what is found; for the progress bar alone.
    """

    kind: str
    start: int
    stop: int
    cost: float
    n_numbers: int = 1
    differentiates: bool = False
    besides: int = 0

    @property
    def name(self) -> str:
        """As in the names of shards."""
        return f"{self.kind}-{self.start:06d}"


Unit = tuple[int, int]  # (number of the batch, number of the part)


def run(
    store: Store,
    model: nn.Module,
    data: Iterable,
    parts: list[Part],
    compute: Compute,
    what: str,
    progress: bool = True,
    reader: data_module.Reader | None = None,
) -> int:
    """Do every unit of work that the store lacks; how is what `running` says.

    Args:
        store: where the results go; what it holds already is not done again.
        model: evaluated with all parameters frozen, on the accelerator where there is one.
        data: batches, or what `data.as_batch` makes a batch of.
        parts: the parts of the passes on every batch, all of one kind.
        compute: (batch on the device, index of its first example, part) -> results, tensors [examples, …]. Beside them
            every shard holds the `data.Identity` of its examples. Where memory runs out it is called again with
            fewer examples.
        what: said by the progress bar.
        progress: show it.
        reader: of these data, which keeps what it has decoded; None for a new one.

    Returns:
        The number of examples, skipped ones among them.

    Raises:
        DataError: no examples, a batch that is none, other data than before, or (if strict) an unreadable example.
        CoarError: not even one example fits into memory.
    """
    options, state = current(), processes()
    team = workers.team(options.worker)
    chunks = data_module.Chunks(data)
    with (
        models.frozen(model),
        placed(model, state.device) as device,
        autocast(device, options.dtype),
        Progress(what, progress and options.progress and state.is_main_process) as bar,
        calling.heard(bar.passed),
    ):
        by_hand = team.count > 1 and (options.worker or os.environ.get(workers.WORKER))
        threads = (device.type != "cpu") if options.num_workers is None else options.num_workers
        reader = reader or data_module.Reader()
        outbox = Outbox(store, behind=device.type != "cpu")
        job = _Job(store, chunks, parts, compute, device, team, options.strict, what, bar, outbox, reader, int(threads))
        with job.nothing_lost():
            job.do_own()
            if team.count > 1:
                job.take_over()
        if by_hand:
            job.check_others()
    return job.finish()


@dataclass
class _Job:
    """The units of one run, as one process sees them."""

    store: Store
    chunks: data_module.Chunks
    parts: list[Part]
    compute: Compute
    device: torch.device
    team: Team
    strict: bool
    what: str
    bar: Progress
    outbox: Outbox
    reader: data_module.Reader
    threads: int  # that read batches while the passes of one run
    bounds: dict[int, tuple[int, int]] = field(default_factory=dict)  # of the batches passed so far
    checked: set[int] = field(default_factory=set)  # batches that were compared with what there is
    fits: int | None = None  # examples that fit into memory at once, once that was found out
    longest: float = 0.0  # seconds of the longest unit
    entries: set[str] = field(default_factory=set)  # of a batch

    # ---------------------------------------------------------------------------------------------- which units, when

    @contextmanager
    def nothing_lost(self) -> Iterator[None]:
        """What is computed is written, whatever ends the block."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CoarError):  # the first error is the one to be told
                self.outbox.flush()
            raise
        self.outbox.flush()

    def do_own(self) -> None:
        """The units that are dealt to this process, batch by batch in their order.

        Batches of which there are results already are read all the same, and compared with these.
        """
        count = self.chunks.count
        if count is not None:
            self.bar.total = -(-count * len(self.parts) // self.team.count)
        for chunk in self.chunks:
            self.bounds[chunk.number] = (chunk.start, chunk.stop)
            self.store.check_passed(self.parts[0].kind, chunk.stop)
            units = [(chunk.number, part) for part in range(len(self.parts))]
            units = [unit for unit in units if self._owner(unit) == self.team.index]
            pieces = None
            if units and self.store.was_begun(chunk.start, chunk.stop):
                pieces = self._read(chunk)
            if units:
                self.reader.begin(self._following(chunk.number), self.threads)
            self._do(chunk, units, pieces)
        if not self.bounds:
            raise DataError("the data set is empty; nothing to run on")

    def _following(self, number: int) -> Iterator[data_module.Chunk]:
        """The next batches of which this process does something, as many as there are threads to read them."""
        if not self.threads or not self.chunks.random_access:
            return
        found, soon = 0, number + 1 + self.threads + _NEIGHBOURS * self.team.count
        for following in range(number + 1, min(soon, len(self.chunks))):
            if found == self.threads:
                return
            chunk, parts = self.chunks.at(following), range(len(self.parts))
            own = [part for part in parts if self._owner((following, part)) == self.team.index]
            if any(self.store.missing(self.parts[part].name, chunk.start, chunk.stop) for part in own):
                found += 1
                yield chunk

    def check_others(self) -> None:
        """Compare what other workers had done when this one came, as nobody says that they look at these data."""
        for chunk in self.chunks:
            if chunk.number not in self.checked and self.store.was_begun(chunk.start, chunk.stop):
                self._read(chunk)

    def _owner(self, unit: Unit) -> int:
        number, part = unit
        count = self.chunks.count
        # Whole batches, so that nobody decodes those of others; parts of them where there are too few.
        whole = count is None or count >= self.team.count
        if not whole:
            return (number * len(self.parts) + part) % self.team.count
        many = count is not None and count >= 4 * _NEIGHBOURS * self.team.count
        return (number // _NEIGHBOURS if many else number) % self.team.count

    def take_over(self) -> None:
        """What other processes have left, until nothing is missing.

        The first missing unit of every process is taken to be in progress, and left to it unless nothing new turns up
        for a while; the others are taken from the end, where their owner comes last. What is done twice does no harm.
        """
        self.outbox.flush()
        seen, since = self.store.refresh(now=True), time.monotonic()
        while missing := self._missing():
            in_progress = {self._owner(unit): unit for unit in reversed(missing)}.values()
            free = [unit for unit in missing if unit not in in_progress]
            if not free and time.monotonic() - since < max(_PATIENCE, 3 * self.longest):
                time.sleep(_POLL)
            else:
                self._do_some(free or missing)
                self.outbox.flush()
            now = self.store.refresh()
            if now != seen:
                seen, since = now, time.monotonic()

    def _missing(self) -> list[Unit]:
        units = [(number, part) for number in sorted(self.bounds) for part in range(len(self.parts))]
        return [unit for unit in units if self.store.missing(self.parts[unit[1]].name, *self.bounds[unit[0]])]

    def _do_some(self, units: list[Unit]) -> None:
        if self.chunks.random_access:
            # Two processes that take over at once begin at different places.
            taken = units[-1 - (self.team.index * len(units) // self.team.count) % len(units)]
            short = 0 < self.longest < SHORT  # then with its neighbours, as they share a shard
            units = [unit for unit in units if unit[0] // _NEIGHBOURS == taken[0] // _NEIGHBOURS] if short else [taken]
        else:
            units = units[len(units) // 2 :]  # passing the stream again costs more than a unit done twice
        numbers = sorted({number for number, _ in units})
        chunks = map(self.chunks.at, numbers) if self.chunks.random_access else self.chunks
        for chunk in chunks:
            if chunk.number in numbers:
                self._do(chunk, [unit for unit in units if unit[0] == chunk.number])
            if chunk.number >= numbers[-1]:
                break

    # ------------------------------------------------------------------------------------------------------- one batch

    def _do(self, chunk: data_module.Chunk, units: list[Unit], pieces: list[Piece] | None = None) -> None:
        """The missing ones of some units of a batch, which is read only if there are any, or was already."""
        for _, number in units:
            part = self.parts[number]
            if self.team.count > 1:
                self.store.refresh()
            missing = self.store.missing(part.name, chunk.start, chunk.stop)
            if missing and pieces is None:
                pieces = self._read(chunk)
                missing = self.store.missing(part.name, chunk.start, chunk.stop)  # without those that cannot be read
            # What goes backward as well counts as three passes, and is one that is heard of.
            passes = part.cost / (3 if part.differentiates else 1) + part.besides
            self.bar.expect(passes * len(missing) * len(pieces or ()))
            for first, last in missing:
                self._do_stretch(part, pieces, first, last)
            self.bar.update(part.cost * (chunk.stop - chunk.start), computed=bool(missing))

    def _read(self, chunk: data_module.Chunk) -> list[Piece]:
        """The examples of a batch, compared with those that there are results of."""
        read = self.reader.read(chunk)
        for index, reason in read.failed.items():
            if self.strict:
                raise DataError(f"example {index} cannot be read: {reason}; leave it out, or run without strict")
            if index not in self.store.skipped:
                logger.warning("example %d cannot be read and is left out: %s", index, reason)
                self.store.skip(index, reason)
        pieces = []
        for piece in read.pieces:
            self._check_entries(set(piece.identity.hashes), piece.start)
            self.store.check_expected(piece.batch, piece.identity, piece.start)
            self.store.check_examples(piece.identity, piece.start)
            pieces.append(replace(piece, batch=data_module.to_device(piece.batch, self.device)))
        self.checked.add(chunk.number)
        return pieces

    def _check_entries(self, entries: set[str], start: int) -> None:
        """Raises `DataError` for a batch with other entries than the first one: a run has one table of its examples."""
        self.entries = self.entries or entries
        if entries != self.entries:
            only = [f"{', '.join(sorted(a - b))} only {where}" for a, b, where in (
                (self.entries, entries, "before it"), (entries, self.entries, "from it on")) if a - b]  # fmt: skip
            raise DataError(
                f"the batch of example {start} has other entries than those before: {', '.join(only)}; give all "
                "batches the same (an attention_mask of ones, say)"
            )

    def _do_stretch(self, part: Part, pieces: list[Piece], first: int, last: int) -> None:
        """One part of the passes on examples first … last - 1 of a batch."""
        for piece in pieces:
            low, high = max(first, piece.start), min(last, piece.start + len(piece.identity))
            if low < high:
                begun = time.monotonic()
                rows = slice(low - piece.start, high - piece.start)
                results = self._results(data_module.rows(piece.batch, rows.start, rows.stop), low, part)
                seconds = time.monotonic() - begun
                self.outbox.add(part.name, low, results | piece.identity.rows(rows).columns(), seconds)
                self._note_time(seconds)

    def _note_time(self, seconds: float) -> None:
        if not self.longest and self.bar.total and self.bar.shown:
            left = seconds * (self.bar.total - self.bar.n - 1)
            if left > _WORTH_SAYING:
                logger.info("%s: the first unit took %.1f s; about %s to go", self.what, seconds, duration(left))
        self.longest = max(self.longest, seconds)

    # -------------------------------------------------------------------------------------------------- out of memory

    def _results(self, examples: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        """`compute`, on as many examples at a time as fit into memory."""
        count, done, results = data_module.size(examples), 0, []
        while done < count:
            step = min(self.fits or count, count - done)
            some = self._attempt(data_module.rows(examples, done, done + step), first + done, part)
            if some is not None:
                results.append(some)
                done += step
                continue
            if step == 1:
                raise CoarError(
                    f"one example and {part.kind} {part.start} … {part.stop - 1} do not fit into the memory of "
                    f"{self.device}; try a lower precision (dtype='bfloat16'), fewer masks_together, shorter inputs, "
                    "or a model spread over devices (device_map)"
                )
            self.fits = -(-step // 2)
            logger.warning("out of memory with %d examples at a time; going on with %d", step, self.fits)
        if len(results) == 1:
            return results[0]
        return {name: torch.cat([some[name].cpu() for some in results]) for name in results[0]}

    def _attempt(self, examples: data_module.Batch, first: int, part: Part) -> dict[str, Tensor] | None:
        """Results, or None if memory ran out; what goes wrong becomes an error that names the examples."""
        last = first + data_module.size(examples) - 1
        try:
            return dict(self.compute(examples, first, part))
        except (DataError, ModelError) as error:
            error.args = (f"examples {first} to {last}: {error}",)
            raise
        except CoarError:
            raise
        except (*failing.RAISED, MemoryError) as error:
            if not is_out_of_memory(error):
                raise ModelError(
                    f"examples {first} to {last} do not run {failing.failure(error, examples)}. Leave them out, or "
                    "give what fits the model; what was finished before is kept"
                ) from error
        # Only here, where the error and with it everything that its frames hold is gone.
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None

    # ------------------------------------------------------------------------------------------------------------- end

    def finish(self) -> int:
        """Check and tell what was done.

        Returns:
            The number of examples.

        Raises:
            DataError: the data hold another number than before, or none that can be read.
        """
        n_examples = max(stop for _, stop in self.bounds.values())
        self.store.check_length(self.parts[0].kind, n_examples)
        skipped = self.store.skipped
        if len(skipped) >= n_examples:
            raise DataError(f"none of the {n_examples} examples can be read; the first: {next(iter(skipped.values()))}")
        if skipped and self.strict:
            raise DataError(f"examples {list(skipped)[:8]} could not be read: {next(iter(skipped.values()))}")
        self.store.tell_skipped(n_examples)
        return n_examples
