"""Figures of an edit, all from examples that chose nothing, with their intervals."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_Z = 1.959964  # of a 95 % interval
ROUNDING = 1e-6  # of shares


@dataclass(frozen=True)
class Figure:
    """One quantity before and after an edit.

    Attributes:
        what: in words, such as "accuracy on 'Bag'".
        before: of the model as it was.
        after: of the edited one.
        low: lower end of the 95 % interval of `after`; minus infinity where one example gives none of a mean.
        high: upper end.
        n: examples that it is from.
        share: whether it is a share from 0 to 1, shown in percent.
        spread: half of the 95 % interval of the change, where the same examples were seen before and after.
        unit: of a mean, such as "logits".
    """

    what: str
    before: float
    after: float
    low: float
    high: float
    n: int
    share: bool = True
    spread: float | None = None
    unit: str = ""

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    def row(self) -> tuple[str, str, str]:
        """What, before and after with its interval, for a card."""
        if not self.share:
            what = f"{self.what} ({self.unit})" if self.unit else self.what
            between = f"{self.low:.3g} to {self.high:.3g}" if math.isfinite(self.low) else "one example has no interval"
            return what, f"{self.before:.3g}", f"{self.after:.3g} ({between})"
        low, high = 100 * self.low, 100 * self.high
        return self.what, f"{self.before:.1%}", f"{self.after:.1%} ({low:.1f}–{high:.1f}, n = {self.n})"

    def to_json(self) -> dict[str, float | int | str | bool | None]:
        """JSON values: null for an end of an interval that there is none of."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n examples (Wilson 1927)."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def _half(values: Tensor) -> float:
    """Half of the normal 95 % interval of a mean."""
    return _Z * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def of_shares(what: str, before: Tensor, after: Tensor) -> Figure:
    """A share of examples with its Wilson interval, and that of its change (Agresti and Min 2005).

    Args:
        what: in words.
        before: which examples count, of the model as it was, bool [examples]; or how much of each does, float32 from
            0 to 1, of which the intervals are rather too wide.
        after: of the edited one, likewise.
    """
    before, after = before.float(), after.float()
    n, share, change = len(after), float(after.mean()), after - before
    gained, lost = float(change.clamp_min(0).sum()), float((-change).clamp_min(0).sum())
    # Half an example more of each of four kinds, so that no change at all is not certain either.
    spread = _Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return Figure(what, float(before.mean()), share, *interval(share, n), n, spread=spread)


def of_means(what: str, before: Tensor, after: Tensor, unit: str = "") -> Figure:
    """A mean over examples, float32 [examples], with its normal interval, and that of its change."""
    n, mean, half = len(after), float(after.mean()), _half(after)
    spread = _half(after - before)
    return Figure(what, float(before.mean()), mean, mean - half, mean + half, n, False, spread, unit)


def fall(before: Tensor, after: Tensor) -> tuple[float, float]:
    """By how much a mean over the same examples has fallen, and the standard error of that."""
    lost = before.float() - after.float()
    error = float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
    return float(lost.mean()), error


def share_and_error(right: Tensor) -> tuple[float, float]:
    """A share and its standard error, which is not 0 where all are alike (one more of either kind counts as seen)."""
    n, share = len(right), float(right.float().mean())
    guarded = (share * n + 1) / (n + 2)
    return share, math.sqrt(guarded * (1 - guarded) / n)


def unmoved(was: float, now: float) -> bool:
    """Whether a share that is to rise did not, though it could: then an edit achieved nothing, whatever else it did."""
    return now <= was + ROUNDING < 1


def of_worst(what: str, name: Callable[[int], str], labels: Tensor, before: Tensor, after: Tensor) -> Figure:
    """The share of the class or group that loses most, of labels int64 [examples]; `what` has `{}` for its name."""
    found = labels.unique()
    lost = torch.stack([(before.float() - after.float())[labels == one].mean() for one in found])
    worst = int(found[lost.argmax()])
    return of_shares(what.format(name(worst)), before[labels == worst], after[labels == worst])


@dataclass(frozen=True)
class Figures(Mapping[str, Figure]):
    """Figures by name, such as `figures["target"].after`; those of the rivals by their names in `rivals`.

    Attributes:
        measured: "target", "others", "worst_other", "probe", "recovery", "relearned", …, as far as the task has them.
        rivals: by rival, the same figures of the model that it makes; none where it makes none that keeps the limits.
    """

    measured: Mapping[str, Figure]
    rivals: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Figure:
        """A figure by its name."""
        return self.measured[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.measured)

    def __len__(self) -> int:
        """How many."""
        return len(self.measured)

    def rows(self) -> list[tuple[str, str, str]]:
        """What, before, after: of the edit, then of its rivals; for a card."""
        found = [figure.row() for figure in self.measured.values()]
        for rival, figures in self.rivals.items():
            if not figures:
                found.append((f"instead, {rival}", "", "nothing that keeps the limits"))
            for figure in figures.values():
                what, before, after = figure.row()
                found.append((f"instead, {rival}: {what}", before, after))
        return found

    def to_json(self) -> dict:
        """JSON values."""
        own = {name: figure.to_json() for name, figure in self.measured.items()}
        rivals = {
            rival: {name: figure.to_json() for name, figure in figures.items()}
            for rival, figures in self.rivals.items()
        }
        return {**own, "rivals": rivals}

    def __str__(self) -> str:
        """A table."""
        return table(self.rows())


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of figures in columns."""
    head = ("on examples that chose nothing", "before", "after (95 % interval)")
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(3)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)
