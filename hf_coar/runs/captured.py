"""Captured passes: passes of one kind go through a graph where that pays off and gives what they give.

A graph (`models.graphs`) knows shapes and weights. Whether all else that it was made of (attributes that a model
keeps, what stands in, whether a mask leaves anything out) is as it was, every batch shows: its first pass (or the one
after which there is a graph) is run both ways, with other gates or under another mask than the graph was made with, and
the same must come out. With `compile="auto"` on a CPU that is bit for bit: such graphs are not fused, as that changes
numbers by rounding. On a CUDA device they are launched as one, and fused in long runs; `compile=True` fuses from the
beginning.

Other runs of the same model object use a graph again (`graphs.known`). Where the first check of a run tells that it is
right no more, the model was changed in between, and another is made.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.models import calling, checked, graphs, launched
from hf_coar.models.launched import Operations
from hf_coar.runs.running import current, precision, rounding

logger = logging.getLogger(__name__)

Pass = Callable[..., tuple[Tensor, ...]]

_REFUSED = 3  # times in a row that a graph may differ by more than rounding; ties do so now and then in small batches


@dataclass(frozen=True)
class Kind:
    """What passes are called, and when there is a graph of them.

    Attributes:
        name: of the passes.
        least: passes over a batch, if it is known how many there will be.
        kept: graphs of different shapes.
        after: seconds of passes of one shape after which "auto" makes one on a CPU.
        after_launches: the same on a CUDA device, of host time, all of which a graph launched as one saves.
        fused_after: seconds since the first pass after which "auto" fuses graphs on a CUDA device; None where it
            launches what the model's own code does as one, without a graph.
    """

    name: str
    least: int
    kept: int
    after: float
    after_launches: float
    fused_after: float | None


# Making a graph takes as long as two passes (MobileNetV2) to five (the demo), beside one that compares, and saves from
# nothing (GPT-2) to 25 % (MobileNetV2) of every later one. Compiling took 15 to 31 s for ViT-B/16 on a GPU, and
# took its pass from 2.8 times the plain forward and backward to 1.0.
GATES = Kind("gate passes", least=0, kept=4, after=2.0, after_launches=10.0, fused_after=60.0)
# Recording takes about as long as five passes. The last batch may be shorter; one recording is kept.
MASKED = Kind("masked passes", least=16, kept=1, after=math.inf, after_launches=0.0, fused_after=None)


@dataclass
class _Shape:
    """Passes of one shape: seconds of their own code, how many of the batch, and what replays them.

    Attributes:
        n_entries: of a batch, which come first of all that a pass is given.
        n_made: graphs of them.
        of_before: the graph is one of an earlier run, and none of this run has shown yet that it still is right.
        was_right: the graph was so for a batch of this run.
    """

    key: Hashable
    n_entries: int
    n_made: int = 0
    seconds: float = 0.0
    of_batch: int = 0
    replay: Operations | None = None
    of_before: bool = False
    was_right: bool = False
    is_fused: bool = False
    is_trusted: bool = False


class CapturedPasses:
    """The passes of one model, replayed where that pays off; call it as the pass itself."""

    def __init__(self, run: Pass, model: nn.Module, kind: Kind, what: Hashable, possible: bool = True) -> None:
        """Prepare.

        Args:
            run: a pass, (batch, more tensors or None …) -> tensors, the first axis of each the example.
            model: what is run.
            kind: of passes.
            what: all that a pass depends on beside its arguments and the model; it must not hold the model.
            possible: whether a pass depends on nothing but its arguments.
        """
        self._run, self._model, self._kind, self._what = run, model, kind, what
        self._possible = possible and not any(parameter.is_meta for parameter in model.parameters())
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._n_passes, self._refused = math.inf, 0
        self._first: float | None = None

    @property
    def replays(self) -> list[Operations]:
        """What replays passes over this batch, by shape."""
        return [shape.replay for shape in self._shapes.values() if shape.is_trusted]

    def begin_batch(self, n_passes: float = math.inf) -> None:
        """Other examples come, for so many passes."""
        self._n_passes = n_passes
        for shape in self._shapes.values():
            shape.of_batch, shape.is_trusted = 0, False

    def __call__(self, batch: data_module.Batch, *more: Tensor | None) -> tuple[Tensor, ...]:
        """One pass, as `run` makes it."""
        wanted = current().compile
        if not wanted or not self._possible or self._n_passes < self._kind.least:
            return self._run(batch, *more)
        inputs = [*batch.values(), *(one for one in more if one is not None)]
        after = self._after(wanted, launched.are_launched(inputs))
        if after == math.inf:
            return self._run(batch, *more)
        like = tuple(map(graphs.described, (*batch.values(), *more)))
        shape = self._shape((wanted, precision(inputs), tuple(batch), *like), len(batch))
        fuse = self._is_to_be_fused(wanted, launched.are_launched(inputs))
        if shape.is_trusted and shape.is_fused >= fuse:
            calling.tell()
            return shape.replay(*inputs)
        begun = time.monotonic()
        self._first = self._first or begun
        found = self._run(batch, *more)
        shape.seconds += time.monotonic() - begun
        shape.of_batch += 1
        # None is made after the first pass of a batch, as there may be no other; after any later, as this may be all
        # data. What is there is compared in the first: on a GPU the model's own code takes up to five times as long.
        is_due = shape.of_batch >= 2 and (shape.seconds >= after or self._is_there(shape, fuse))
        if is_due or shape.replay is not None:
            self._prepare(shape, self._flat(batch, more), inputs, found, fuse)
        return found

    def _shape(self, key: Hashable, n_entries: int) -> _Shape:
        """Passes like these; those that came last are the last."""
        shape = self._shapes.setdefault(key, _Shape(key, n_entries))
        self._shapes.move_to_end(key)
        return shape

    def _is_there(self, shape: _Shape, fuse: bool) -> bool:
        """Whether there is a graph, of this run or an earlier one."""
        return shape.replay is not None or graphs.known(self._model, self._shared(shape, fuse)) is not None

    def _shared(self, shape: _Shape, fuse: bool) -> Hashable:
        """What a graph is known by to other runs."""
        return self._kind.name, self._what, torch.are_deterministic_algorithms_enabled(), fuse, shape.key

    def _after(self, wanted: bool | str, are_launched: bool) -> float:
        """Seconds of passes of one shape after which there is a graph of them."""
        if wanted != "auto":
            return 0.0
        return self._kind.after_launches if are_launched else self._kind.after

    def _is_to_be_fused(self, wanted: bool | str, are_launched: bool) -> bool:
        if wanted != "auto":
            return wanted is True
        after = self._kind.fused_after
        return are_launched and after is not None and self._first is not None and time.monotonic() - self._first > after

    def _flat(self, batch: data_module.Batch, more: tuple[Tensor | None, ...]) -> Operations:
        """A pass as a function of tensors alone."""
        names, given = list(batch), [one is not None for one in more]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            left = iter(inputs)
            batch = dict(zip(names, left, strict=False))
            return self._run(batch, *(next(left) if is_given else None for is_given in given))

        return run

    def _prepare(
        self, shape: _Shape, run: Operations, inputs: list[Tensor], found: tuple[Tensor, ...], fuse: bool
    ) -> None:
        """Make a graph; or let the batch's other passes be replays, if it gives what was found."""
        exact = current().compile == "auto" and not launched.are_launched(inputs)
        try:
            if shape.replay is None or fuse > shape.is_fused:
                shape.replay = None  # before another takes as much memory
                self._make_room()
                shape.replay, shape.is_fused = self._made(shape, run, inputs, fuse), fuse
            else:
                launched.check_equal(found, shape.replay(*inputs), 0.0 if exact else rounding())
                shape.is_trusted, shape.was_right, shape.of_before, self._refused = True, True, False, 0
        except Exception as error:  # whatever stands against it in a model's own code
            # The model is another by now, or looked at other values in the batch that the graph was made with: there is
            # to be a graph of it as it is. Fused ones, which take longer to make, stay for batches like that one.
            if shape.of_before or (exact and shape.was_right and shape.n_made <= _REFUSED):
                graphs.forget(self._model, self._shared(shape, shape.is_fused))
                shape.replay, shape.of_before, shape.was_right = None, False, False
                return
            self._refused += 1
            if exact or self._refused >= _REFUSED or not isinstance(error, launched.DifferentReadsError):
                self._give_up(error)

    def _make_room(self) -> None:
        """One graph more is not too many: what was not replayed for the longest time goes."""
        made = [key for key, shape in self._shapes.items() if shape.replay is not None]
        for key in made[: max(0, len(made) - self._kind.kept + 1)]:
            del self._shapes[key]  # what comes back is to be worth another graph

    def _made(self, shape: _Shape, run: Operations, inputs: list[Tensor], fuse: bool) -> Operations:
        """What replays passes like this one."""
        wanted, model, key = current().compile, self._model, self._shared(shape, fuse)
        if wanted == "auto" and self._kind.fused_after is None:
            with models.state_kept(model), checked.passed(), calling.unheard():
                return launched.Recording(run, inputs, [*model.parameters(), *model.buffers()])
        graph = graphs.known(model, key)
        shape.of_before = graph is not None
        if graph is None:
            shape.n_made += 1
            captured = self._captured(run, inputs, shape.n_entries)
            graph = graphs.compiled(captured, inputs, fuse if wanted == "auto" else wanted, self._level)
            if not fuse or graph is not captured:  # what could not be fused is told in every run
                graphs.keep(model, key, graph)
        return graphs.replay(graph, inputs)

    def _captured(self, run: Operations, inputs: list[Tensor], n_entries: int) -> fx.GraphModule:
        begun = time.monotonic()
        graph = graphs.captured(run, inputs, self._model, n_entries)
        logger.info(
            "%s on inputs of %s go through a captured graph of %d operations from here on (made in %.1f s)",
            self._kind.name, ", ".join(str(list(one.shape)) for one in inputs), len(graph.graph.nodes),
            time.monotonic() - begun,
        )  # fmt: skip
        return graph

    def _give_up(self, error: Exception) -> None:
        """No more graphs, of other shapes neither: what stands against one stands against all."""
        self._possible = False
        for shape in self._shapes.values():
            graphs.forget(self._model, self._shared(shape, shape.is_fused))
        self._shapes.clear()
        torch.cuda.empty_cache()
        name = type(self._model).__name__
        logger.log(self._level, "%s of %s run as its own code: %s", self._kind.name, name, launched.reason(error))

    @property
    def _level(self) -> int:
        """The level of lines that say what is not done: who asked for it is warned."""
        return logging.INFO if current().compile == "auto" else logging.WARNING
