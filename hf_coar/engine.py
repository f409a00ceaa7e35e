"""The engine: examples outside, passes inside. Batches stream by once; all their units of work run while they are here.

A unit of work is (examples of a batch, part of the passes). Units are dealt out by process rank, and no process ever
waits for another while they run.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import DataError
from hf_coar.store import Store

logger = logging.getLogger(__name__)

Compute = Callable[[data_module.Batch, int, "Part"], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """A part of the passes of a run: numbers start … stop - 1 of them.

    Attributes:
        kind: what is counted, such as "masks" or "rounds".
        start: the first.
        stop: one past the last.
        cost: of this part, in forward passes of one example.
    """

    kind: str
    start: int
    stop: int
    cost: float

    @property
    def name(self) -> str:
        """As in the names of shards."""
        return f"{self.kind}-{self.start:06d}"


def processes() -> Any:
    """accelerate's view of this process: `process_index`, `num_processes`, `device`, `wait_for_everyone()`."""
    from accelerate import PartialState

    # Without `cpu=True`, on a machine without an accelerator, every process would believe that it is alone.
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[torch.device]:
    """The model on a device inside the block, and back afterwards; a model that is dispatched already stays."""
    home = models.device_of(model)
    move = home.type == "cpu" and device.type != "cpu" and not hasattr(model, "hf_device_map")
    try:
        yield model.to(device) and device if move else home
    finally:
        if move:
            model.to(home)


def run(
    store: Store,
    model: nn.Module,
    data: Iterable,
    parts: list[Part],
    compute: Compute,
    what: str,
    progress: bool = True,
) -> int:
    """Do every unit of work that the store lacks.

    Args:
        store: where the results go; what it holds already is not done again.
        model: evaluated with all parameters frozen, on the accelerator where there is one.
        data: batches, or what `data.as_batch` makes a batch of.
        parts: the parts of the passes on every batch.
        compute: (batch on the device, index of its first example, part) -> results, tensors [examples, …]. Beside them
            every shard holds what `data.identity` says of its examples.
        what: said by the progress bar.
        progress: show it.

    Returns:
        The number of examples.

    Raises:
        DataError: no examples, or a batch that is none.
    """
    from tqdm import tqdm

    state = processes()
    n_batches = _length(data)
    total = n_batches * len(parts) if n_batches is not None else None
    n_examples, unit, started = 0, 0, None
    with (
        models.frozen(model),
        placed(model, state.device) as device,
        tqdm(total=total, desc=what, unit="unit", disable=not (progress and state.is_main_process)) as bar,
    ):
        for item in data:
            batch = data_module.as_batch(item)
            start, stop = n_examples, n_examples + data_module.size(batch)
            n_examples = stop
            on_device = None
            for part in parts:
                unit += 1
                mine = unit % state.num_processes == state.process_index
                for first, last in store.missing(part.name, start, stop) if mine else ():
                    on_device = on_device or data_module.to_device(batch, device)
                    begun = time.monotonic()
                    examples = data_module.rows(on_device, first - start, last - start)
                    results = dict(compute(examples, first, part))
                    results |= data_module.identity(examples)
                    store.write(part.name, first, results)
                    if started is None:
                        started = begun
                        _tell_time(what, time.monotonic() - begun, total, unit, state)
                bar.update()
    if not n_examples:
        raise DataError("the data set is empty; nothing to run on")
    if state.num_processes > 1:
        state.wait_for_everyone()
    return n_examples


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _tell_time(what: str, seconds: float, total: int | None, unit: int, state: Any) -> None:
    if total is not None and state.is_main_process:
        left = seconds * (total - unit) / state.num_processes
        logger.info("%s: the first unit took %.1f s; about %s to go", what, seconds, duration(left))


def duration(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
