"""Captured passes: a gate pass as one flat graph of tensor operations, forward and backward, that is replayed.

Hooks, trackers and the tape cost host time in every pass and keep what the graph lets go of as early as it can, and the
operations are the same for other gates. So a pass is run on tensors without values and what it does is written down
(`torch.fx.experimental.proxy_tensor.make_fx`). Where a model looks at values, that fails, and passes are run as before:
a graph depends on nothing but shapes. On a CUDA device graphs are launched as one, and fused in long runs; on a CPU
they are fused where `compile=True` asks for it, as that changes numbers by rounding.

Whether all else that a graph was made of (attributes that a model keeps, what stands in) is as it was, every batch
shows: its first pass is run as before, its second (or the one after which there is a graph) both ways, and on a CPU the
same must come out bit for bit, or there are no more graphs.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.models import calling, checked, fused, launched
from hf_coar.runs.running import current, rounding

logger = logging.getLogger(__name__)

# Seconds of passes of one shape before there is a graph of it: making one takes 3 to 10, and saves from 4 % (GPT-2) to
# 40 % (MobileNetV2) of every later pass. After 64 passes, as it was at first, it did not pay in a demo run of 320.
_AFTER = 60.0
_AFTER_LAUNCHES = 10.0  # of host time on a CUDA device, all of which a graph launched as one saves
# Seconds since the first pass after which graphs on a CUDA device are fused as well: compiling took 15 to 31 s for
# ViT-B/16, and took its pass from 2.8 times the plain forward and backward to 1.0.
_FUSED_AFTER = 60.0
_KEPT = 4  # graphs of different shapes
_REFUSED = 3  # times in a row that a graph may differ by more than rounding; ties do so now and then in small batches

Reads = tuple[Tensor, Tensor]  # values [examples], reads [examples, components]
Pass = Callable[[data_module.Batch, Tensor, Tensor | None], Reads]


class CapturedPasses:
    """The passes of one model, replayed where that pays off; call it as the pass itself."""

    def __init__(self, run: Pass, model: nn.Module, possible: bool = True) -> None:
        """Prepare.

        Args:
            run: a pass, (batch, gates [examples, components], a number [] or None) -> (values [examples], reads
                [examples, components]).
            model: what is run.
            possible: whether a pass depends on nothing but its arguments.
        """
        self._run, self._model = run, model
        self._possible = possible and not any(parameter.is_meta for parameter in model.parameters())
        self._graphs: OrderedDict[Hashable, Callable[..., Reads]] = OrderedDict()
        self._seconds: Counter[Hashable] = Counter()
        self._passes_of_batch: Counter[Hashable] = Counter()
        self._trusted: set[Hashable] = set()
        self._fused: set[Hashable] = set()
        self._first: float | None = None
        self._refused = 0

    def begin_batch(self) -> None:
        """Other examples come."""
        self._passes_of_batch.clear()
        self._trusted.clear()

    def __call__(self, batch: data_module.Batch, gates: Tensor, smoothing: Tensor | None) -> Reads:
        """One pass, as `run` makes it."""
        wanted = current().compile
        if not wanted or not self._possible:
            return self._run(batch, gates, smoothing)
        key = (wanted, _shape(gates), _shape(smoothing), *((name, _shape(value)) for name, value in batch.items()))
        if key in self._trusted and (key in self._fused or not self._is_to_be_fused(wanted, gates)):
            calling.tell()
            return self._replayed(key, batch, gates, smoothing)
        begun = time.monotonic()
        self._first = self._first or begun
        found = self._run(batch, gates, smoothing)
        self._seconds[key] += time.monotonic() - begun
        self._passes_of_batch[key] += 1
        # Not after the first pass of a batch, as there may be no other; after any later one, as this may be all data.
        if self._passes_of_batch[key] >= 2:
            self._prepare(key, batch, gates, smoothing, wanted, found)
        return found

    def _replayed(self, key: Hashable, batch: data_module.Batch, gates: Tensor, smoothing: Tensor | None) -> Reads:
        self._graphs.move_to_end(key)
        # Casts are part of the graph, and are not to be made twice.
        with torch.no_grad(), torch.autocast(gates.device.type, enabled=False):
            return self._graphs[key](*_inputs(batch, gates, smoothing))

    def _prepare(
        self,
        key: Hashable,
        batch: data_module.Batch,
        gates: Tensor,
        smoothing: Tensor | None,
        wanted: bool | str,
        found: Reads,
    ) -> None:
        """Let the batch's other passes be replays, if it is time for a graph and it gives what was found."""
        launches, there = _is_launched(gates), key in self._graphs
        exact = wanted == "auto" and not launches
        if not there and wanted == "auto" and self._seconds[key] <= (_AFTER_LAUNCHES if launches else _AFTER):
            return
        fuse = self._is_to_be_fused(wanted, gates)
        try:
            if not there or (fuse and key not in self._fused):
                self._graphs.pop(key, None)  # before another takes as much memory
                self._fused |= {key} if fuse else set()
                self._graphs[key] = self._captured(batch, gates, smoothing, wanted, fuse)
            launched.check_equal(found, self._replayed(key, batch, gates, smoothing), 0.0 if exact else rounding())
            self._trusted.add(key)
            self._refused = 0
        except Exception as error:  # whatever a model's own code does with tensors that hold no values
            self._refused += 1
            if exact or self._refused >= _REFUSED or not isinstance(error, launched.DifferentError):
                self._give_up(error, wanted)
        while len(self._graphs) > _KEPT:
            self._forget(next(iter(self._graphs)))

    def _is_to_be_fused(self, wanted: bool | str, gates: Tensor) -> bool:
        long = self._first is not None and time.monotonic() - self._first > _FUSED_AFTER
        return wanted is True or (wanted == "auto" and _is_launched(gates) and long)

    def _give_up(self, error: Exception, wanted: bool | str) -> None:
        """No more graphs, of other shapes neither: what stands against one stands against all."""
        self._possible = False
        for key in list(self._graphs):
            self._forget(key)
        torch.cuda.empty_cache()
        name, level = type(self._model).__name__, logging.INFO if wanted == "auto" else logging.WARNING
        logger.log(level, "gate passes of %s run as its own code: %s", name, _reason(error))

    def _forget(self, key: Hashable) -> None:
        del self._graphs[key]
        self._seconds.pop(key, None)  # what comes back is to be worth another graph
        self._trusted.discard(key)
        self._fused.discard(key)

    def _captured(
        self, batch: data_module.Batch, gates: Tensor, smoothing: Tensor | None, wanted: bool | str, fuse: bool
    ) -> Callable[..., Reads]:
        from torch.fx.experimental.proxy_tensor import make_fx

        begun, names = time.monotonic(), list(batch)
        if not all(isinstance(value, Tensor) for value in batch.values()):
            raise TypeError("the batch has entries that are no tensors")

        def run(gates: Tensor, *rest: Tensor) -> Reads:
            # What autograd saves would, as fakes that know their operations, hold the model for good.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved):
                return self._run(dict(zip(names, rest, strict=False)), gates, None if smoothing is None else rest[-1])

        with models.state_kept(self._model), checked.passed(), calling.unheard(), _torch_quiet():
            trace = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)
            graph = trace(*_inputs(batch, gates, smoothing))
        _simplify(graph)
        entries = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
        logger.info(
            "gate passes on %s go through a captured graph of %d operations from here on (made in %.1f s)",
            entries, len(graph.graph.nodes), time.monotonic() - begun,
        )  # fmt: skip
        with torch.no_grad(), torch.autocast(gates.device.type, enabled=False):
            return _fast(graph, _inputs(batch, gates, smoothing), wanted, fuse)


@contextmanager
def _torch_quiet() -> Iterator[None]:
    """Torch logs a traceback where an operation cannot be captured; the reason is told in a line of ours."""
    theirs = logging.getLogger("torch._subclasses.fake_tensor")
    before = theirs.level
    theirs.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        theirs.setLevel(before)


def _is_launched(gates: Tensor) -> bool:
    """Whether passes are kernels launched on a device, many of which can be launched as one."""
    return gates.is_cuda


def _shape(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _inputs(batch: data_module.Batch, gates: Tensor, smoothing: Tensor | None) -> list[Tensor]:
    return [gates, *batch.values()] + ([] if smoothing is None else [smoothing])


def _held(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that a graph holds by itself: weights and constants."""
    found = [attrgetter(node.target)(graph) for node in graph.graph.nodes if node.op == "get_attr"]
    return [value for value in found if isinstance(value, Tensor)]


def _simplify(graph: fx.GraphModule) -> None:
    """Takes out what does nothing where no gradient is kept."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _fast(graph: fx.GraphModule, inputs: list[Tensor], wanted: bool | str, fuse: bool) -> Callable[..., Reads]:
    """What runs the graph: with the same bits by "auto" on a CPU, and else within rounding."""
    if wanted not in (True, "auto"):
        return torch.compile(graph, backend=wanted)
    level = logging.INFO if wanted == "auto" else logging.WARNING
    graph = fused.fused(graph, inputs, level) if fuse else graph
    return launched.recorded(graph, inputs, _held(graph)) if _is_launched(inputs[0]) else graph


def _reason(error: Exception) -> str:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        return "what it does depends on values, and not on shapes alone"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
