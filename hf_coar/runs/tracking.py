"""Tracking: a run's figures to trackio, TensorBoard, Weights & Biases, …, through accelerate's trackers.

What is logged, against the number of units of work done: `units`, `forward_passes` (of one example; a forward and
backward pass counts as three), `forward_passes_per_second`; at the end the reliability of the weights, and of an
evaluation the correlation and slope at every ablated fraction.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.models.inside import set_inside

PROJECT = "hf_coar"
TRACKERS = ("trackio", "tensorboard", "wandb")  # known to work; accelerate has more
LOGS = "logs"  # folder in a run's folder, for trackers that write files
_APART = 1.0  # seconds between two entries


class Run:
    """What is told to the trackers of one run."""

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        """With accelerate's trackers, started; without any nothing is logged."""
        self._trackers = list(trackers)
        self._units, self._passes = 0, 0.0
        self._computed, self._seconds, self._logged = 0.0, 0.0, 0.0

    def unit(self, passes: float, seconds: float) -> None:
        """One more unit of work is done.

        Args:
            passes: forward passes of one example that it stands for.
            seconds: that it took; 0 for a unit that was there already, which the rate leaves out.
        """
        self._units += 1
        self._passes += passes
        self._computed += passes if seconds else 0.0
        self._seconds += seconds
        if self._trackers and time.monotonic() - self._logged >= _APART:
            self._log_units()

    def figures(self, values: Mapping[str, float | None]) -> None:
        """Figures of the whole run; those that are None are left out."""
        if self._units:
            self._log_units()
        self._log({name: value for name, value in values.items() if value is not None})

    def finish(self) -> None:
        """Close the trackers."""
        with contextlib.redirect_stdout(sys.stderr):  # trackio speaks on stdout, which belongs to results
            for tracker in self._trackers:
                _close(tracker)

    def _log_units(self) -> None:
        rate = {"forward_passes_per_second": self._computed / self._seconds} if self._seconds else {}
        self._logged = time.monotonic()
        self._log({"units": self._units, "forward_passes": self._passes, **rate})

    def _log(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=self._units)


_current: ContextVar[Run] = ContextVar("run", default=Run())  # noqa: B039 (never changed: it logs nothing)


def current() -> Run:
    """The run of the innermost `tracked` block; outside all of them, one that logs nothing."""
    return _current.get()


@contextlib.contextmanager
def tracked(
    log_with: "str | Any | Sequence[str | Any] | None", folder: str | Path | None, config: Mapping[str, Any]
) -> Iterator[Run]:
    """Inside the block, work is told to trackers.

    Args:
        log_with: names that `accelerate.Accelerator(log_with=…)` takes ("trackio", "tensorboard", "wandb", "all", …),
            `accelerate.tracking.GeneralTracker` objects, or several of them; None = none.
        folder: of the run; trackers that write files do so in its `logs`.
        config: settings of the run; nested ones are logged by dotted names.

    Raises:
        CoarError: an unknown tracker, one that is not installed, or one that writes files and there is no folder.
    """
    trackers = [] if log_with is None else _started(log_with, folder, config)
    run = Run(trackers)
    try:
        with set_inside(_current, run):
            yield run
    finally:
        run.finish()


def _started(log_with: Any, folder: str | Path | None, config: Mapping[str, Any]) -> list[Any]:
    from accelerate import Accelerator

    wanted = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is not installed: said below
            accelerator = Accelerator(log_with=wanted, project_dir=None if folder is None else Path(folder) / LOGS)
    except ValueError as error:
        if "logging_dir" in str(error):
            raise CoarError(f"log_with={log_with!r} writes files; give the run a folder with out=…") from error
        raise CoarError(f"log_with={log_with!r}: {error}") from error
    found = {str(tracker) for tracker in accelerator.log_with}
    absent = [name for name in wanted if isinstance(name, str) and name != "all" and name not in found]
    if absent or not found:
        raise CoarError(f"log_with={log_with!r}: not installed; pip install {' '.join(absent) or TRACKERS[0]}")
    if not accelerator.is_main_process:
        return []
    with contextlib.redirect_stdout(sys.stderr):
        accelerator.init_trackers(PROJECT, flat(config))
    return accelerator.trackers


def _close(tracker: Any) -> None:
    from accelerate.tracking import TrackioTracker

    if isinstance(tracker, TrackioTracker):
        import trackio

        trackio.finish()  # accelerate's leaves the run current, and trackio speaks on stdout again at exit
    else:
        tracker.finish()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by dotted names, as trackers take them; None is left out, lists become text."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found
