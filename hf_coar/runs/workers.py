"""Who shares a run: processes that a launcher started together, and workers that were started one by one."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_coar.errors import CoarError
from hf_coar.models import is_out_of_memory
from hf_coar.models.inside import set_inside

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")

WORKER = "HF_COAR_WORKER"  # environment variable: "i/n", this is worker i (from 0) of n that share the run's folder


@dataclass(frozen=True)
class Team:
    """The place of this process among all that share a run.

    Attributes:
        index: of this process, from 0.
        count: of all processes.
    """

    index: int = 0
    count: int = 1


def processes() -> Any:
    """accelerate's view of this process: `process_index`, `num_processes`, `device`, `wait_for_everyone()`.

    Raises:
        CoarError: `accelerate launch` was asked for several processes and started one.
    """
    from accelerate import PartialState

    _check_launched(os.environ)
    # Without `cpu=True`, on a machine without an accelerator, every process would believe that it is alone. Processes
    # meet once, at the end, so a slow one must not be taken for a dead one.
    options = {"timeout": timedelta(days=7)} if "WORLD_SIZE" in os.environ else {}
    return PartialState(cpu=not torch.accelerator.is_available(), **options)


_BESIDE_PASSES = ("cuda", "xpu")  # other accelerators have no float64


def beside_passes(device: torch.device) -> torch.device:
    """Where to compute what is not the model's: on a device itself, or on the CPU where it lacks what that takes."""
    return device if device.type in _BESIDE_PASSES else torch.device("cpu")


def where_it_fits(compute: Callable[[torch.device], _Found], what: str) -> _Found:
    """What a function of a device finds on this process's accelerator, or on the CPU where that is full or lacking.

    Args:
        compute: called with the device, once or twice.
        what: it does, for the log.
    """
    device = beside_passes(processes().device)
    if device.type != "cpu":
        try:
            return compute(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("%s does not fit into the memory of %s, and is done on the CPU", what, device)
        torch.accelerator.empty_cache()  # here, where the error and with it what its frames hold is gone
    return compute(torch.device("cpu"))


def _check_launched(environment: Mapping[str, str]) -> None:
    """`accelerate launch` starts one process on a machine without GPUs, however many are asked for (accelerate#2741).

    It then sets an address to meet at, which it does for two processes or more, and no rank.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if by_accelerate and not any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise CoarError(
            "accelerate launch was asked for several processes and started only one, as it does without GPUs; use "
            "torchrun --nproc-per-node N -m hf_coar …, or start workers by hand with --worker 0/N … N-1/N"
        )


def check_folder(out: str | Path | None, worker: str | None) -> None:
    """Raises `CoarError` for workers started one by one that have no folder in common; `worker` is as of `team`."""
    own = parsed(worker)
    if out is None and own.count > 1:
        raise CoarError(f"worker {own.index}/{own.count}, and the workers have no folder in common; give out=…")


@contextmanager
def folder(out: str | Path | None) -> Iterator[Path]:
    """The folder of a run, the same one for all processes; a temporary one if `out` is None."""
    state = processes()
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        shared = [temporary]
        if state.num_processes > 1:
            torch.distributed.broadcast_object_list(shared, src=0)
        yield Path(shared[0])
        state.wait_for_everyone()  # the main process's folder goes when it leaves


_alone: ContextVar[bool] = ContextVar("alone", default=False)


def alone() -> AbstractContextManager[None]:
    """Inside the block this process shares nothing with others, whoever started it."""
    return set_inside(_alone, True)


def parsed(worker: str | None = None) -> Team:
    """Which worker this is of how many that were started independently, whoever else shares the run.

    Args:
        worker: as for `team`.

    Raises:
        CoarError: it is not of that form; looked at before a model is loaded or run.
    """
    text = worker or os.environ.get(WORKER) or "0/1"
    match = re.fullmatch(r"(\d+)/(\d+)", text) if isinstance(text, str) else None
    if not match or not int(match[1]) < int(match[2]):
        raise CoarError(f"worker {text!r}; write i/n with i from 0 to n - 1, such as 0/2 for the first of two")
    return Team(int(match[1]), int(match[2]))


def team(worker: str | None = None) -> Team:
    """This process among all that share the run.

    Args:
        worker: "i/n": worker i, counted from 0, of n that were started independently; the environment variable
            `HF_COAR_WORKER` by default, and alone without it. Every worker may be several processes of one launcher.

    Raises:
        CoarError: `worker` is not of that form.
    """
    if _alone.get():
        return Team()
    state, own = processes(), parsed(worker)
    return Team(own.index * state.num_processes + state.process_index, own.count * state.num_processes)
