"""Budgets: how large an estimator can be for so many forward passes an example, or minutes."""

import itertools
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hf_coar import data as data_module
from hf_coar.errors import CoarError
from hf_coar.estimators.registry import Estimator
from hf_coar.runs import engine, workers
from hf_coar.runs.problem import Problem, Size
from hf_coar.runs.store import Store
from hf_coar.storage import files

logger = logging.getLogger(__name__)

_TRIED = (8, 64, 512)  # forward passes an example that are timed: the fewest that the method can make use of
_SHARE = 0.05  # of the time goes into timing, about
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_FILE = "budget.json"


def parse(budget: float | str) -> tuple[float, bool]:
    """A budget as (number, whether it is in seconds instead of forward passes an example).

    Raises:
        CoarError: neither a positive number nor a time.
    """
    number: float | None = None
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", budget)
        if match and (match[2] in _SECONDS or not match[2]):
            number = float(match[1]) * _SECONDS.get(match[2], 1)
            timed = bool(match[2])
    elif isinstance(budget, int | float) and not isinstance(budget, bool):
        number, timed = float(budget), False
    if number is None or not 0 < number < math.inf:
        raise CoarError(
            f"budget={budget!r}; give forward passes an example, such as 240, or a time, such as '20 min' (s, min or h)"
        )
    return number, timed


def choose(
    method: Estimator, budget: float | str, problem: Problem, folder: Path, affordable_as_it_is: bool = False
) -> Estimator:
    """The method in the size that a budget affords.

    A budget in forward passes decides by itself. For one in minutes, a small run on a few examples is timed; what it
    affords is kept in the run's folder, so that a run that resumes, or a process that joins, takes the same size.

    Args:
        method: of any size.
        budget: forward passes an example, or a time such as `"20 min"` for the passes of the whole run.
        problem: what is to be attributed; its store is not touched.
        folder: of the run.
        affordable_as_it_is: it was chosen by what a budget in minutes affords, and may have no size.

    Raises:
        CoarError: a budget that makes no sense, or is too small; or minutes for a stream of unknown length.
    """
    amount, timed = parse(budget)
    if not timed:
        return method.sized(amount, problem.size)
    if not method.sizable:
        if affordable_as_it_is:
            return method
        raise CoarError(
            f"budget={budget!r}: {method!r} has no number of rounds, masks or steps to choose; leave budget out"
        )
    path = folder / _FILE
    if not path.exists():
        passes = affordable(method, amount, problem)
        method.sized(passes, problem.size)  # or says that it is too little, and nothing is kept
        # Of several processes that choose at once, one writes, and the others take what it wrote.
        files.write_json(path, {"budget": str(budget), "passes": passes}, replace=False)
    kept = files.read_json(path)
    passes = kept.get("passes") if isinstance(kept, dict) else None
    if not isinstance(passes, int | float):
        raise CoarError(f"{path} holds {kept}, which is no choice of passes; choose another folder, or delete the file")
    chosen = method.sized(passes, problem.size)
    logger.info("budget %s: %.4g forward passes an example, %r", kept.get("budget"), passes, chosen)
    return chosen


def affordable(method: Estimator, seconds: float, problem: Problem) -> float:
    """Forward passes an example that all examples can have within a time, by a small run on a few of them.

    Args:
        method: of any size.
        seconds: for all processes.
        problem: what is to be attributed; its store is not touched.

    Raises:
        CoarError: a stream of unknown length.
    """
    chunks = data_module.Chunks(problem.data)
    if chunks.count is None:
        raise CoarError("a stream of unknown length has no budget in minutes; give forward passes an example")
    size = next(chunk.stop - chunk.start for chunk in chunks)
    n_examples = chunks.count * size
    team = workers.team(engine.current().worker)
    few = data_module.few(problem.data, size)
    sample, trial = _Sample(few, seconds * _SHARE), _small(method, problem.size)
    begun = time.monotonic()
    # Every process times by itself, so that nobody waits, and never on results that are there already.
    with tempfile.TemporaryDirectory() as place, workers.alone(), engine.running(progress=False, worker=None):
        store = Store(place, {"task": "timing", "method": trial.settings()})
        trial.fit(replace(problem, data=sample, store=store, identity=None, first=None))
    spent = time.monotonic() - begun
    each, cost = sample.seconds_an_example, trial.cost(problem.size)
    passes = max(seconds - spent, 0.0) * team.count / n_examples * cost / each
    logger.info(
        "timed on %d examples in %.3g s: %.3g ms a forward pass of one example; %s for %d examples on %d processes: "
        "%.3g passes an example",
        sample.n_examples, spent, 1000 * each / cost, engine.duration(seconds), n_examples, team.count, passes,
    )  # fmt: skip
    return passes


class _Sample:
    """A few examples in pieces of 1, 1, 2, 4 …, until one more would take too long; timed as they are used up.

    Attributes:
        n_examples: of all pieces that were given out.
        seconds_an_example: in the last piece, over all kinds of passes.
    """

    def __init__(self, batch: data_module.Batch, seconds: float) -> None:
        """Pieces of a batch, for about so many seconds at most; the first two always come."""
        self._batch, self._seconds = batch, seconds
        self._stops: list[int] = []
        self._settled = False
        self.seconds_an_example = 0.0

    @property
    def n_examples(self) -> int:
        return self._stops[-1]

    def __iter__(self) -> Iterator[data_module.Batch]:
        spent, start, count, taken = 0.0, 0, data_module.size(self._batch), 0.0
        for number in itertools.count():
            if self._settled and number == len(self._stops):
                break
            stop = self._stops[number] if self._settled else min(max(1, 2 * start), count)
            begun = time.monotonic()
            yield data_module.rows(self._batch, start, stop)
            taken = (time.monotonic() - begun) / (stop - start)
            spent += taken * (stop - start)
            if not self._settled:
                self._stops.append(stop)
                # The first piece warms up, and tells little. The next has as many examples as all before it together.
                if stop == count or (number and spent + taken * stop > self._seconds):
                    self._settled = True
            start = stop
        self.seconds_an_example += taken


def _small(method: Estimator, size: Size) -> Estimator:
    """The method in the smallest size that is worth timing, or as it is."""
    for passes in _TRIED:
        try:
            return method.sized(passes, size)
        except CoarError:
            continue
    return method
