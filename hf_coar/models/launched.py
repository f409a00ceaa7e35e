"""What a CUDA device is to do, recorded and launched as one: launches from Python take longer than small kernels run.

A recording reads and writes the addresses that it was made with. So inputs are copied to where they were, what comes
out is written over by the next launch, and a model that was moved in between is recorded again.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_coar.errors import CoarError

logger = logging.getLogger(__name__)

Operations = Callable[..., tuple[Tensor, ...]]


class Recording:
    """Operations on tensors of a CUDA device, recorded once and launched from then on."""

    def __init__(self, operations: Operations, inputs: Sequence[Tensor], weights: Iterable[Tensor]) -> None:
        """Record.

        Args:
            operations: what is done to the inputs; it makes no gradients, and looks at no value.
            inputs: of the shapes that they will always have.
            weights: all that is read beside them.

        Raises:
            ValueError: tensors of several devices: what the others do would not be recorded, and is needed.
            Exception: whatever else stands against it: a copy from the host, an operation that waits, no memory.
        """
        self._operations, self._weights = operations, [weight for weight in weights if weight.is_cuda]
        devices = {one.device for one in (*inputs, *self._weights)}
        if len(devices) != 1 or not all(one.is_cuda for one in inputs):
            raise ValueError(f"its tensors are on {', '.join(sorted(map(str, devices)))}")
        (self._device,) = devices
        self._inputs = [one.clone() for one in inputs]
        self._record()

    def _record(self) -> None:
        self._addresses = [weight.data_ptr() for weight in self._weights]
        self._graph = self._outputs = None  # before another takes as much memory
        with torch.cuda.device(self._device):  # whose streams are recorded
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose their kernels, which is not to be recorded
                self._operations(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                self._outputs = self._operations(*self._inputs)
        for one in self._outputs:
            one.fill_(torch.nan)  # what no launch writes is not taken for what it gives
        self._graph = recorded

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the operations give."""
        if [weight.data_ptr() for weight in self._weights] != self._addresses:
            self._record()
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return tuple(one.clone() for one in self._outputs)


def are_launched(inputs: Iterable[Any]) -> bool:
    """Whether what is done to these are kernels launched on a CUDA device, many of which can be launched as one."""
    return all(isinstance(one, Tensor) and one.is_cuda for one in inputs)


def recorded(operations: Operations, inputs: Sequence[Tensor], weights: Iterable[Tensor]) -> Operations:
    """A `Recording` of the operations; the operations themselves where there can be none, which is said."""
    try:
        return Recording(operations, inputs, weights)
    except Exception as error:  # whatever a model's own code does
        logger.info("operations are launched one by one: %s", reason(error))
        torch.cuda.empty_cache()
        return operations


# Of the examples, how many may have other reads: a margin takes the largest of several logits, and where two are equal
# up to rounding, as in 1 of 64 examples in bfloat16 in networks of 1,000 classes, its gradient may go to the other
# (scripts/benchmark_ties.py). The margin itself is the same.
_SHARE_OF_TIES = 1 / 16


class DifferentError(ValueError):
    """A replay gives something else than what was found."""


class DifferentReadsError(DifferentError):
    """What was read is something else, as it may be now and then in small batches, where outputs are the same."""


def check_equal(found: Iterable[Tensor], replayed: Iterable[Tensor], allowed: float) -> None:
    """Raises `DifferentError` if a replay gives something else than what was found.

    Args:
        found: outputs [examples], and what was read of them, [examples, …].
        replayed: the same.
        allowed: by which part of the largest they may differ; 0 for the same bits. Of reads, one example in 16 may
            differ by more, unless that is 0.
    """
    for one, other in zip(found, replayed, strict=True):
        if torch.equal(one, other):
            continue
        off = ((one - other).abs() / one.abs().max().clamp_min(1e-30)).nan_to_num(torch.inf, torch.inf)
        reads = one.dim() > 1 and allowed > 0
        by_example = off.flatten(1).amax(1) if reads else off.flatten()
        ties = int(len(by_example) * _SHARE_OF_TIES) if reads else 0
        worst = float(by_example.sort(descending=True).values[ties])
        if not (worst <= allowed and bool(other.isfinite().all() | ~one.isfinite().all())):
            kind = DifferentReadsError if one.dim() > 1 else DifferentError
            raise kind(f"the graph's values differ by {worst:.2g} of the largest")


def reason(error: Exception) -> str:
    """Why passes cannot be made faster, in a line."""
    lines = str(error).strip().splitlines()
    said = lines[0][:200] if lines else ""
    return said if isinstance(error, CoarError) else f"{type(error).__name__}: {said}"
