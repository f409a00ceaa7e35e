"""The engine: examples outside, passes inside. Batches stream by once; all their units of work run while they are here.

A unit of work is (examples of a batch, part of the passes). Units are dealt out among all processes that share the
run's folder; no process waits for another while they run, and whoever is done takes over what is left.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import CoarError, DataError
from hf_coar.runs import workers
from hf_coar.runs.progress import Progress, duration
from hf_coar.runs.store import Store
from hf_coar.runs.workers import Team, processes

__all__ = ["Part", "Running", "duration", "placed", "processes", "run", "running"]

logger = logging.getLogger(__name__)

Compute = Callable[[data_module.Batch, int, "Part"], Mapping[str, Tensor]]

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_POLL = 0.1  # seconds between two looks at what the others are doing
_PATIENCE = 2.0  # seconds without any news after which a unit in progress counts as abandoned, or three units' time
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


# ---------------------------------------------------------------------------------------------------------- how to run


@dataclass(frozen=True)
class Running:
    """How passes run. Nothing here changes the numbers beyond rounding, and none but `dtype` is stored.

    Attributes:
        dtype: "bfloat16" or "float16": matrix products and convolutions in lower precision (autocast). That is rounding
            of a few per cent, so it is recorded, and a run does not resume with another one.
        compile: `torch.compile` for masked passes (gates change the model's hooks in every pass, and stay eager); True,
            or the name of a backend.
        masks_together: masks in one forward pass, over as many copies of the batch; for batches too small to fill the
            device.
        worker: "i/n": this is worker i, counted from 0, of n that were started one by one and share the run's folder.
        strict: an example that cannot be read is an error; otherwise it is left out, and listed in the run's folder.
        batch_size: examples a batch, for `datasets` objects and what `load` gives; None for their own.
        progress: show a progress bar.
        log_with: where figures of the run go while it runs, see `tracking.tracked`; None for nowhere.
    """

    dtype: str | None = None
    compile: bool | str = False
    masks_together: int = 1
    worker: str | None = None
    strict: bool = False
    batch_size: int | None = None
    progress: bool = True
    log_with: Any = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise CoarError(f"dtype={self.dtype!r}; there are {', '.join(_DTYPES)}, and None for the model's own")
        if not isinstance(self.masks_together, int) or self.masks_together < 1:
            raise CoarError(f"masks_together={self.masks_together!r}; must be a whole number, at least 1")


_current: ContextVar[Running] = ContextVar("running", default=Running())  # noqa: B039 (frozen)


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    """Inside the block everything runs with these options, the fields of `Running`; others are as outside of it.

    A context and not arguments of every call, so that what changes speed only cannot get among what changes numbers::

        with coar.running(dtype="bfloat16", batch_size=64, progress=False):
            attributions = coar.attribute(model, data)

    Raises:
        CoarError: an unknown option or value.
    """
    unknown = sorted(set(options) - set(Running.__dataclass_fields__))
    if unknown:
        raise CoarError(f"no option {', '.join(unknown)}; there are {', '.join(Running.__dataclass_fields__)}")
    token = _current.set(replace(_current.get(), **options))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def current() -> Running:
    """The options of the innermost `running` block."""
    return _current.get()


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[torch.device]:
    """The model on a device inside the block, and back afterwards; a model that is dispatched already stays."""
    home = models.device_of(model)
    dispatched = _execution_device(model)
    move = dispatched is None and home.type == "cpu" and device.type != "cpu"
    try:
        yield model.to(device) and device if move else dispatched or home
    finally:
        if move:
            model.to(home)


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate's hooks want the inputs of a model that they spread or offload; None for any other model."""
    if hasattr(model, "hf_device_map") or any(parameter.is_meta for parameter in model.parameters()):
        hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
        devices = [getattr(hook, "execution_device", None) for hook in hooks]
        found = next((device for device in devices if device is not None), None)
        return torch.device(found) if found is not None else models.device_of(model)
    return None


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
    """

    kind: str
    start: int
    stop: int
    cost: float
    n_numbers: int = 1
    differentiates: bool = False

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
) -> int:
    """Do every unit of work that the store lacks; how is what `running` says.

    Args:
        store: where the results go; what it holds already is not done again.
        model: evaluated with all parameters frozen, on the accelerator where there is one.
        data: batches, or what `data.as_batch` makes a batch of.
        parts: the parts of the passes on every batch, all of one kind.
        compute: (batch on the device, index of its first example, part) -> results, tensors [examples, …]. Beside them
            every shard holds what `data.identity` says of its examples. Where memory runs out it is called again with
            fewer examples.
        what: said by the progress bar.
        progress: show it.

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
        _autocast(device, options.dtype),
        Progress(what, progress and options.progress and state.is_main_process) as bar,
    ):
        job = _Job(store, chunks, parts, compute, device, team, options.strict, what, bar)
        job.do_own()
        if team.count > 1:
            job.take_over()
    return job.finish()


def _autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    if dtype is None:
        return contextlib.nullcontext()
    # No cache of casted weights: masks change them in place.
    return torch.autocast(device.type, _DTYPES[dtype], cache_enabled=False)


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
    bounds: dict[int, tuple[int, int]] = field(default_factory=dict)  # of the batches passed so far
    fits: int | None = None  # examples that fit into memory at once, once that was found out
    longest: float = 0.0  # seconds of the longest unit

    # ---------------------------------------------------------------------------------------------- which units, when

    def _check_first(self, chunk: data_module.Chunk) -> None:
        """Results that are there already must be of these data: compares the examples of one shard.

        Raises:
            DataError: they are not.
        """
        stored = self.store.of_examples(chunk.start, chunk.stop)
        if stored is None:
            return
        first, results = stored
        for start, batch in chunk.read().pieces:
            low, high = max(first, start), min(first + len(results["labels"]), start + data_module.size(batch))
            if low < high:
                found = data_module.identity(data_module.rows(batch, low - start, high - start))
                kept = {name: results[name][low - first : high - first] for name in found}
                try:
                    data_module.Identity.of(kept).check(data_module.Identity.of(found))
                except DataError as error:
                    raise DataError(
                        f"{self.store.folder} holds results of other examples: {error}, or choose another folder"
                    ) from error

    def do_own(self) -> None:
        """The units that are dealt to this process, batch by batch in their order."""
        count = self.chunks.count
        if count is not None:
            self.bar.total = -(-count * len(self.parts) // self.team.count)
        for chunk in self.chunks:
            if not self.bounds:
                self._check_first(chunk)
            self.bounds[chunk.number] = (chunk.start, chunk.stop)
            self.store.check_passed(self.parts[0].kind, chunk.stop)
            units = [(chunk.number, part) for part in range(len(self.parts))]
            self._do(chunk, [unit for unit in units if self._owner(unit) == self.team.index])
        if not self.bounds:
            raise DataError("the data set is empty; nothing to run on")

    def _owner(self, unit: Unit) -> int:
        number, part = unit
        count = self.chunks.count
        # Whole batches, so that nobody decodes those of others; parts of them where there are too few.
        whole = count is None or count >= self.team.count
        return (number if whole else number * len(self.parts) + part) % self.team.count

    def take_over(self) -> None:
        """What other processes have left, until nothing is missing.

        The first missing unit of every process is taken to be in progress, and left to it unless nothing new turns up
        for a while; the others are taken from the end, where their owner comes last. What is done twice does no harm.
        """
        seen, since = self.store.refresh(), time.monotonic()
        while missing := self._missing():
            in_progress = {self._owner(unit): unit for unit in reversed(missing)}.values()
            free = [unit for unit in missing if unit not in in_progress]
            if not free and time.monotonic() - since < max(_PATIENCE, 3 * self.longest):
                time.sleep(_POLL)
            else:
                self._do_some(free or missing)
            now = self.store.refresh()
            if now != seen:
                seen, since = now, time.monotonic()

    def _missing(self) -> list[Unit]:
        units = [(number, part) for number in sorted(self.bounds) for part in range(len(self.parts))]
        return [unit for unit in units if self.store.missing(self.parts[unit[1]].name, *self.bounds[unit[0]])]

    def _do_some(self, units: list[Unit]) -> None:
        if self.chunks.random_access:
            # Two processes that take over at once begin at different places.
            units = [units[-1 - (self.team.index * len(units) // self.team.count) % len(units)]]
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

    def _do(self, chunk: data_module.Chunk, units: list[Unit]) -> None:
        """The missing ones of some units of a batch, which is read only if there are any."""
        pieces: list[tuple[int, data_module.Batch]] | None = None
        for _, number in units:
            part = self.parts[number]
            if self.team.count > 1:
                self.store.refresh()
            todo = bool(self.store.missing(part.name, chunk.start, chunk.stop))
            if todo:
                pieces = pieces if pieces is not None else self._read(chunk)
                for first, last in self.store.missing(part.name, chunk.start, chunk.stop):
                    self._do_stretch(part, pieces, first, last)
            self.bar.update(part.cost * (chunk.stop - chunk.start), computed=todo)

    def _read(self, chunk: data_module.Chunk) -> list[tuple[int, data_module.Batch]]:
        read = chunk.read()
        for index, reason in read.failed.items():
            if self.strict:
                raise DataError(f"example {index} cannot be read: {reason}; leave it out, or run without strict")
            if index not in self.store.skipped:
                logger.warning("example %d cannot be read and is left out: %s", index, reason)
                self.store.skip(index, reason)
        return [(start, data_module.to_device(batch, self.device)) for start, batch in read.pieces]

    def _do_stretch(self, part: Part, pieces: list[tuple[int, data_module.Batch]], first: int, last: int) -> None:
        """One part of the passes on examples first … last - 1 of a batch."""
        for start, batch in pieces:
            low, high = max(first, start), min(last, start + data_module.size(batch))
            if low < high:
                begun = time.monotonic()
                examples = data_module.rows(batch, low - start, high - start)
                results = self._results(examples, low, part)
                self.store.write(part.name, low, results | data_module.identity(examples))
                self._note_time(time.monotonic() - begun)

    def _note_time(self, seconds: float) -> None:
        if not self.longest and self.bar.total and self.bar.shown:
            left = seconds * (self.bar.total - self.bar.n - 1)
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
        """Results, or None if memory ran out."""
        try:
            return dict(self.compute(examples, first, part))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
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
        if skipped:
            if self.strict:
                raise DataError(f"examples {list(skipped)[:8]} could not be read: {next(iter(skipped.values()))}")
            logger.warning(
                "%d of %d examples were left out because they cannot be read: %s; delete %s to try them again",
                len(skipped), n_examples, list(skipped)[:8], self.store.folder / "skipped",
            )  # fmt: skip
        return n_examples


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
