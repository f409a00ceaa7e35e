"""What ablations do, predicted and measured on the live model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar import editing, masking
from hf_coar.errors import CoarError
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source
from hf_coar.explore.tab import View

LEVEL = 0.95  # of the intervals of predictions
MOST_MEASURED = 500  # examples that an ablation is measured on
_HELD_OUT = 4  # every fourth example plays no part in an edit, so that its card can be honest


@dataclass(frozen=True)
class Change:
    """What an ablation did to some examples."""

    rows: list[int]  # the examples
    predicted: Tensor  # change of the output that the attributions expect, float32 [rows]
    between: tuple[Tensor, Tensor] | None  # ends of its interval of 95 %, float32 [rows]; None where none is known
    before: Outcome  # the model as it is
    after: Outcome  # the model with the components ablated

    @property
    def measured(self) -> Tensor:
        """Change of the output, float32 [rows]."""
        return self.after.outputs - self.before.outputs

    @property
    def correlation(self) -> float | None:
        """The correlation of predicted and measured changes over the examples; None where one of them is constant."""
        if len(self.rows) < 3 or not float(self.predicted.std()) > 0 or not float(self.measured.std()) > 0:
            return None  # also where nothing could be measured
        return float(torch.corrcoef(torch.stack([self.predicted, self.measured]))[0, 1])

    def flips(self) -> list[int]:
        """Places in `rows` of examples whose predicted class changed; of texts, those with changed tokens."""
        if self.before.classes is not None and self.after.classes is not None:
            return (self.before.classes != self.after.classes).nonzero().flatten().tolist()
        pairs = zip(self.before.tokens, self.after.tokens, strict=True)
        return [place for place, (a, b) in enumerate(pairs) if not torch.equal(a, b)]


@dataclass(frozen=True)
class Accuracy:
    """How many a model gets right, of one class or of all tokens."""

    name: str  # of the class
    count: int  # examples of it (or tokens)
    before: int  # how many of them the model got right
    after: int  # the same with the components ablated


def accuracies(source: Source, change: Change) -> list[Accuracy]:
    """Accuracies of the classes that occur among the examples; of a language model one row, of the next tokens."""
    if change.before.classes is None and not change.before.tokens:
        return []
    if change.before.classes is None or change.after.classes is None:
        targets = torch.cat(change.before.targets)
        hits = [int((torch.cat(side.tokens) == targets).sum()) for side in (change.before, change.after)]
        return [Accuracy(source.targets, len(targets), *hits)]
    labels = source.attributions.labels[change.rows]
    found = []
    for label in sorted(set(labels.tolist()) - {-1}):
        of_class = labels == label
        hits = [int((side.classes[of_class] == label).sum()) for side in (change.before, change.after)]
        found.append(Accuracy(source.class_name(label), int(of_class.sum()), *hits))
    return found


def strongest(source: Source, row: int, k: int, side: str) -> tuple[int, ...]:
    """The components that help an example most (largest weights) or hurt it most (most negative ones)."""
    weights = source.attributions.row(row)
    k = min(k, len(weights))
    return tuple(weights.topk(k, largest=side == "help").indices.tolist())


def ablated(source: Source, view: View) -> tuple[int, ...]:
    """The components that a view asks to ablate: those ticked, or the example's k strongest."""
    return view.ticked or (strongest(source, view.example, view.k, view.side) if view.k else ())


def most_components(source: Source) -> int:
    """As far as sliders go: a tenth of the components, where attributions still predict."""
    n = len(source.components)
    return min(n, max(20, round(0.1 * n)))


def measured_rows(source: Source, always: Sequence[int] = (), without_held_out: bool = False) -> list[int]:
    """The examples that are measured: all, or as many as are allowed, evenly spread; `always` are among them."""
    candidates = [row for row in range(len(source)) if not (without_held_out and is_held_out(row))]
    n = min(MOST_MEASURED, len(candidates))
    spread = {candidates[i * len(candidates) // n] for i in range(n)} if n else set()
    return sorted(spread | set(always))


def is_held_out(row: int) -> bool:
    """Whether an example plays no part in an edit, as it gives the figures on its card."""
    return row % _HELD_OUT == _HELD_OUT - 1


def what_if(source: Source, components: Sequence[int], rows: Sequence[int], progress: Progress = no_progress) -> Change:
    """Ablate components on the live model for a moment, and compare with what the attributions predict.

    Raises:
        CoarError: no components, or a model that cannot be run.
    """
    if not len(components):
        raise CoarError("no components are ticked: tick some, or move the slider")
    rows, index = list(rows), torch.as_tensor(components, dtype=torch.long)
    of = source.attributions
    expected = of.without(index, rows, LEVEL if of.has_intervals(LEVEL) else None)
    predicted, between = expected.after - expected.before, None
    if expected.low is not None:
        between = (expected.low - expected.before, expected.high - expected.before)
    before = Outcome.joined(source.predictions(rows, progress))
    kept = editing.kept_without(len(source.components), index).to(source.device)
    with source.lock, masking.ablate(source.model, source.components, kept, how="auto"):
        after = source.measure(rows, progress)
    return Change(rows, predicted, between, before, after)
