"""How passes run: precision, compilation, place. Nothing of it changes the numbers beyond rounding, or is stored."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_coar import models
from hf_coar.errors import CoarError, check_count
from hf_coar.models.inside import set_inside
from hf_coar.runs import workers

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TF32 = "tf32"


@dataclass(frozen=True)
class Running:
    """How passes run. Nothing here changes the numbers beyond rounding, and none but `dtype` is stored.

    Attributes:
        dtype: "bfloat16" or "float16": matrix products and convolutions in lower precision (autocast); "tf32": float32
            of ten bits on GPUs that have it, elsewhere nothing else than without. That is rounding of a few per cent,
            so it is recorded, and a run does not resume with another one.
        compile: "auto": gate passes of a shape that comes often go through a captured graph, which gives the same bits
            (on a CUDA device the same up to rounding), see `runs.captured`. True: they do from the beginning, and so
            do masked passes whose masks go by weights; what a graph does between matrix products is compiled, which
            takes a minute and changes numbers by rounding. The name of a backend of `torch.compile`: it gets the whole
            graph. False: as the model's own code runs.
        masks_together: masks in one forward pass, over as many copies of the batch; for batches too small to fill the
            device.
        worker: "i/n": this is worker i, counted from 0, of n that were started one by one and share the run's folder.
        strict: an example that cannot be read is an error; otherwise it is left out, and listed in the run's folder.
        batch_size: examples a batch, for `datasets` objects and what `load` gives; None for their own.
        num_workers: threads that read and decode batches while the passes of one run, each a batch; more than one need
            a data set that several threads can read. 0 for none. None: one on an accelerator, whose passes leave the
            host time, and none on a CPU, which they fill.
        progress: show a progress bar.
        log_with: where figures of the run go while it runs, see `tracking.tracked`; None for nowhere.
        report: write `report.html`, `report.md` and pictures into the run's folder, which takes about a second. Where
            it was False, the same call without it makes them later, and computes nothing again.
    """

    dtype: str | None = None
    compile: bool | str = "auto"
    masks_together: int = 1
    worker: str | None = None
    strict: bool = False
    batch_size: int | None = None
    num_workers: int | None = None
    progress: bool = True
    log_with: Any = None
    report: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.dtype is not None and self.dtype not in (*_DTYPES, TF32):
            known = ", ".join((*_DTYPES, TF32))
            raise CoarError(f"dtype={self.dtype!r}; there are {known}, and None for the model's own")
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size")
        if self.num_workers is not None:
            check_count(self.num_workers, "num_workers", least=0)
        if not isinstance(self.compile, bool | str):
            raise CoarError(f"compile={self.compile!r}; there are 'auto', True, False and the names of backends")
        named = self.compile if isinstance(self.compile, str) and self.compile != "auto" else None
        if named is not None and named not in torch.compiler.list_backends(exclude_tags=()):
            known = ", ".join(torch.compiler.list_backends())
            raise CoarError(f"compile={named!r}; there are 'auto', True, False, {known}")
        check_count(self.masks_together, "masks_together")


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
    chosen = replace(_current.get(), **options)
    workers.parsed(chosen.worker)
    with set_inside(_current, chosen):
        yield chosen


def rounding() -> float:
    """How much of the largest value compilers and accelerators, whose sums have no fixed order, may change."""
    return 1e-3 if current().dtype is None else 0.05


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


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """Matrix products and convolutions in lower precision inside the block, if one is given."""
    if dtype is None:
        return contextlib.nullcontext()
    if dtype == TF32:
        return _tf32()
    # No cache of casted weights: masks change them in place.
    return torch.autocast(device.type, _DTYPES[dtype], cache_enabled=False)


def precision(inputs: Iterable[Any]) -> Hashable:
    """What products of these are computed in, here and now: first looks are not in the precision of the run."""
    devices = {one.device.type for one in inputs if isinstance(one, torch.Tensor)}
    casts = [(one, torch.get_autocast_dtype(one)) for one in sorted(devices) if torch.is_autocast_enabled(one)]
    return *casts, *(place.fp32_precision for place in _places())


def _places() -> list[Any]:
    """Where torch keeps how precise products of float32 are on CUDA devices."""
    return [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]


@contextmanager
def _tf32() -> Iterator[None]:
    before = [place.fp32_precision for place in _places()]
    try:
        for place in _places():
            place.fp32_precision = TF32
        yield
    finally:
        for place, value in zip(_places(), before, strict=True):
            place.fp32_precision = value
