"""Allowance: how many rounds or masks a budget affords, in forward passes an example or in minutes."""

import logging
import math
import re
import tempfile
import time
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hf_coar import data as data_module
from hf_coar.errors import CoarError, DataError
from hf_coar.runs import engine, workers
from hf_coar.runs.problem import Method, Problem
from hf_coar.runs.store import Store
from hf_coar.storage import files

logger = logging.getLogger(__name__)

_NUMBERS = {"rounds": (2, 2), "n_masks": (3, 1), "n_steps": (1, 1)}  # what a method has most of: (smallest, step)
_LARGEST = 10**7
_TIMED = {"n_masks": 8}  # enough of them to be timed, where the smallest number is not
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


def number_of(method: Method) -> str | None:
    """The name of what a method has more or fewer of: `"rounds"`, `"n_masks"`, `"n_steps"`; None if there is none."""
    names = {field.name for field in fields(method)} if is_dataclass(method) else set()
    return next((name for name in _NUMBERS if name in names), None)


def within(method: Method, passes: float, ablated_fraction: float, n_components: int) -> Method:
    """The method with as many rounds (an even number, or one single pass), masks or steps as a budget affords.

    Args:
        method: of any size; all but its size stays.
        passes: forward passes an example.
        ablated_fraction: as for `attribute`.
        n_components: of the model.

    Raises:
        CoarError: not even the smallest is affordable.
    """
    name = number_of(method)
    smallest = method if name is None else replace(method, **{name: _NUMBERS[name][0]})
    least = smallest.cost(ablated_fraction, n_components)
    if least > passes and name == "rounds":
        smallest = replace(method, rounds=0)  # a single pass
        least = smallest.cost(ablated_fraction, n_components)
        if least <= passes:
            return smallest
    if least > passes:
        size = "" if name is None else f" with {name}={getattr(smallest, name)}"
        raise CoarError(
            f"a budget of {passes:.4g} forward passes an example is too small: {type(method).__name__}{size} costs "
            f"{least:g} at ablated_fraction={ablated_fraction:g}; give more, take fewer examples, or another method"
        )
    if name is None:
        return method
    start, step = _NUMBERS[name]
    slope = replace(method, **{name: start + step}).cost(ablated_fraction, n_components) - least
    steps = math.floor((passes - least) / slope + 1e-9) if slope > 0 else 0
    return replace(method, **{name: min(start + steps * step, _LARGEST)})


def choose(method: Method, budget: float | str, problem: Problem, folder: Path) -> Method:
    """The method in the size that a budget affords.

    A budget in forward passes decides by itself. For one in minutes, the smallest run on the first batch is timed; the
    number chosen is kept in the run's folder, so that a run that resumes, or a process that joins, takes the same one.

    Args:
        method: of any size.
        budget: forward passes an example, or a time such as `"20 min"` for the passes of the whole run.
        problem: what is to be attributed; its store is not touched.
        folder: of the run.

    Raises:
        CoarError: a budget that makes no sense, or is too small; or minutes for a stream of unknown length.
    """
    amount, timed = parse(budget)
    n_components = len(problem.components)
    if not timed:
        return within(method, amount, problem.ablated_fraction, n_components)
    name = number_of(method)
    if name is None:
        raise CoarError(
            f"budget={budget!r}: {type(method).__name__} has no number of rounds or masks to choose; leave budget out"
        )
    path = folder / _FILE
    if not path.exists():
        passes = _affordable(method, name, amount, problem, folder)
        chosen = within(method, passes, problem.ablated_fraction, n_components)
        # Of several processes that choose at once, one writes, and the others take what it wrote.
        files.write_json(path, {"budget": str(budget), name: getattr(chosen, name)}, replace=False)
    kept = files.read_json(path)
    if not isinstance(kept, dict) or not isinstance(kept.get(name), int):
        raise CoarError(f"{path} holds the choice of another method, {kept}; choose another folder, or delete the file")
    logger.info("budget %s: %s=%d", kept.get("budget"), name, kept[name])
    return replace(method, **{name: kept[name]})


def _affordable(method: Method, name: str, seconds: float, problem: Problem, folder: Path) -> float:
    """Forward passes an example that all examples can have within a time."""
    chunks = data_module.Chunks(problem.data)
    batch, n_examples = first_batch(chunks), None
    if chunks.count is not None:
        n_examples = chunks.count * data_module.size(batch)
    if n_examples is None:
        raise CoarError("a stream of unknown length has no budget in minutes; give forward passes an example")
    team = workers.team(engine.current().worker)
    trial = replace(method, **{name: _TIMED.get(name, _NUMBERS[name][0])})
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() if team.count == 1 else nullcontext(folder / "timing") as place:
        store = Store(place, {"task": "timing", "method": trial.settings()})
        trial.fit(replace(problem, data=[batch], store=store, progress=False))
    spent = time.monotonic() - begun
    cost = trial.cost(problem.ablated_fraction, len(problem.components)) * data_module.size(batch)
    passes = max(seconds - spent, 0.0) * team.count / n_examples * cost / spent
    logger.info(
        "timed: %.3g ms a forward pass of one example; %s for %d examples on %d processes: %.3g passes an example",
        1000 * spent / cost, engine.duration(seconds), n_examples, team.count, passes,
    )  # fmt: skip
    return passes


def first_batch(chunks: Any) -> data_module.Batch:
    """The first batch of `data.Chunks` that can be read.

    Raises:
        DataError: there is none.
    """
    for chunk in chunks:
        for _, batch in chunk.read().pieces:
            return batch
    raise DataError("the data set is empty; nothing to run on")
