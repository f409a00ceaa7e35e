"""Progress: a bar on a terminal and in a notebook; in a log file a line now and then."""

import os
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from hf_coar.runs import tracking

EVERY = 30.0  # seconds between two lines in a log file
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"  # a part of a unit is no count to show


class Progress:
    """How much is done, how fast, how much is left; told to the screen or the log file, and to trackers.

    Attributes:
        total: units in all, or None as long as that is not known.
        n: units done.
        shown: whether it is shown; trackers are told in any case.
    """

    def __init__(self, what: str, shown: bool = True, every: float = EVERY, stream: TextIO | None = None) -> None:
        """Begin.

        Args:
            what: is going on; said in front.
            shown: on the screen or in the log file.
            every: seconds between two lines in a log file.
            stream: standard error by default.
        """
        self.what, self.shown, self.every = what, shown, every
        self.stream = stream or sys.stderr
        self.n, self._computed = 0, 0
        self._expected, self._passed = 0.0, 0  # forward passes within the unit that is under way
        self._total: int | None = None
        self._bar = _bar(what, self.stream) if shown and interactive(self.stream) else None
        self._begun = self._said = self._last = time.monotonic()

    @property
    def total(self) -> int | None:
        """Units in all."""
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        self._total = total
        if self._bar is not None:
            self._bar.total, self._bar.bar_format = total, _BAR if total else None
            self._bar.refresh()

    def expect(self, passes: float) -> None:
        """A stretch of work begins that takes about so many forward passes of the model; `passed` counts them."""
        self._expected, self._passed = passes, 0

    def passed(self) -> None:
        """One more forward pass is done; a unit may take minutes, and the bar moves within it."""
        before = self._within
        self._passed += 1
        if self._bar is not None:
            self._bar.update(self._within - before)
        elif self.shown and (now := time.monotonic()) - self._said >= self.every:
            self._say(now)

    @property
    def _within(self) -> float:
        """How much of the unit that is under way is done; how many passes it takes is only about known."""
        return min(0.99, self._passed / self._expected) if self._expected else 0.0

    def update(self, passes: float = 0.0, computed: bool = True) -> None:
        """One more unit is done.

        Args:
            passes: forward passes of one example that the unit stands for.
            computed: just now; False for a unit that was there already, which the rate leaves out.
        """
        now, within = time.monotonic(), self._within
        self.expect(0)
        tracking.current().unit(passes, max(now - self._last, 1e-9) if computed else 0.0)
        self.n += 1
        if computed:
            self._computed += 1
        else:
            self._begun += now - self._last
        self._last = now
        if self._bar is not None:
            self._bar.initial += not computed  # tqdm's rate leaves these out
            self._bar.set_postfix_str(f"{self.n}/{self._total or '?'} units", refresh=False)
            self._bar.update(1 - within)
        elif self.shown and now - self._said >= self.every:
            self._say(now)

    def line(self, now: float | None = None) -> str:
        """Such as `gate paths: 12/64 units (19 %), 3.2 units/min, 16 min left`."""
        elapsed = (time.monotonic() if now is None else now) - self._begun
        done = self.n + self._within
        of = f"{self.n}/{self._total} units ({done / self._total:.0%})" if self._total else f"{self.n} units"
        parts = [f"{self.what}: {of.replace('%', ' %')}"]
        computed = self._computed + self._within
        if computed and elapsed > 0:
            rate = computed / elapsed
            parts.append(_rate(rate))
            if self._total and self.n < self._total:
                parts.append(f"{duration((self._total - done) / rate)} left")
        if not (self._total and self.n < self._total):
            parts.append(f"{duration(elapsed)} in all")
        return ", ".join(parts)

    def close(self) -> None:
        """Say the last state; the line of a bar stays."""
        if self._bar is not None:
            self._bar.close()
        elif self.shown and (self.n or self._passed):
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        self._said = now
        self.stream.write(f"{self.line(now)}\n")
        self.stream.flush()

    def __enter__(self) -> "Progress":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whatever happened."""
        self.close()


def interactive(stream: TextIO) -> bool:
    """Whether a line can be drawn over: on a terminal and in a notebook, not in a log file."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


def duration(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rate(rate: float) -> str:
    if rate >= 1:
        return f"{rate:.3g} units/s"
    return f"{60 * rate:.3g} units/min" if rate * 60 >= 1 else f"{3600 * rate:.3g} units/h"


def _bar(what: str, stream: TextIO) -> Any:
    from tqdm.auto import tqdm

    # A terminal that says it has no columns (a pseudo-terminal of nobody's) would get an empty bar.
    width = {"dynamic_ncols": True} if _columns(stream) else {"ncols": 80, "nrows": 20}
    return tqdm(desc=what, unit="unit", file=stream, **width)


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no file behind it, as in a notebook
        return 0
