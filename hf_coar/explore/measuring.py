"""What ablations do, predicted and measured on the live model: any components, and edits before they are saved."""

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_coar import editing, masking, models
from hf_coar.attributions import Attributions
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.explore import columns
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.links import View
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source

MOST_MEASURED = 500  # examples that an ablation is measured on
_HELD_OUT = 4  # every fourth example plays no part in an edit, so that its card can be honest
_MOST_ENTRIES = 2**24  # of the weights that an edit is ranked by: 64 MB, and as many references as fit into it


@dataclass(frozen=True)
class Change:
    """What an ablation did to some examples.

    Attributes:
        rows: the examples.
        predicted: change of the output that the attributions expect, float32 [rows].
        error: standard error of `predicted`, float32 [rows], or None.
        before: the model as it is.
        after: the model with the components ablated.
    """

    rows: list[int]
    predicted: Tensor
    error: Tensor | None
    before: Outcome
    after: Outcome

    @property
    def measured(self) -> Tensor:
        """Change of the output, float32 [rows]."""
        return self.after.outputs - self.before.outputs

    @property
    def correlation(self) -> float | None:
        """Of predicted and measured changes over the examples; None where one of them is constant."""
        if len(self.rows) < 3 or float(self.predicted.std()) == 0 or float(self.measured.std()) == 0:
            return None
        return float(torch.corrcoef(torch.stack([self.predicted, self.measured]))[0, 1])

    def flips(self) -> list[int]:
        """Places in `rows` of examples whose predicted class changed; of texts, those with changed tokens."""
        if self.before.classes is not None and self.after.classes is not None:
            return (self.before.classes != self.after.classes).nonzero().flatten().tolist()
        pairs = zip(self.before.tokens, self.after.tokens, strict=True)
        return [place for place, (a, b) in enumerate(pairs) if not torch.equal(a, b)]


@dataclass(frozen=True)
class Accuracy:
    """Of one class, or of all tokens.

    Attributes:
        name: of the class.
        count: examples of it (or tokens).
        before: how many of them the model got right.
        after: the same with the components ablated.
    """

    name: str
    count: int
    before: int
    after: int


def accuracies(source: Source, change: Change) -> list[Accuracy]:
    """Of every class that occurs among the examples; of a language model, of the next tokens in one row."""
    if change.before.classes is None or change.after.classes is None:
        targets = torch.cat(change.before.targets)
        hits = [int((torch.cat(side.tokens) == targets).sum()) for side in (change.before, change.after)]
        return [Accuracy("next tokens", len(targets), *hits)]
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


def measured_rows(source: Source, always: Sequence[int] = (), without_held_out: bool = False) -> list[int]:
    """The examples that are measured: all, or as many as are allowed, evenly spread; `always` are among them."""
    candidates = [row for row in range(len(source)) if not (without_held_out and _is_held_out(row))]
    n = min(MOST_MEASURED, len(candidates))
    spread = {candidates[i * len(candidates) // n] for i in range(n)} if n else set()
    return sorted(spread | set(always))


def _is_held_out(row: int) -> bool:
    return row % _HELD_OUT == _HELD_OUT - 1


def what_if(source: Source, components: Sequence[int], rows: Sequence[int], progress: Progress = no_progress) -> Change:
    """Ablate components on the live model for a moment, and compare with what the attributions predict.

    Raises:
        CoarError: no components, or a model that cannot be run.
    """
    if not len(components):
        raise CoarError("no components are ticked: tick some, or move the slider")
    rows, index = list(rows), torch.as_tensor(components, dtype=torch.long)
    error = None
    if source.attributions.has_standard_errors:
        error = columns.sums(source.attributions, rows, index, squares_of_errors=True).sqrt()
    predicted = -columns.sums(source.attributions, rows, index)
    before = Outcome.joined(source.predictions(rows, progress))
    kept = editing.kept_without(len(source.components), index).to(source.device)
    with source.lock, masking.ablate(source.model, source.components, kept, how="auto"):
        after = source.measure(rows, progress)
    return Change(rows, predicted, error, before, after)


# -------------------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True)
class Sides:
    """The examples of an edit, as rows of the attributions.

    Attributes:
        higher: whose outputs are to rise.
        lower: whose outputs are to fall.
        spared: whose outputs are to stay.
        n_others: how many examples `spared` was drawn from, where it was drawn.
    """

    higher: tuple[int, ...]
    lower: tuple[int, ...]
    spared: tuple[int, ...]
    n_others: int = 0


def sides(source: Source, view: View) -> Sides:
    """The examples that were marked; without marked references all others but those held out, or a part of them.

    Raises:
        CoarError: nothing is marked, or nothing is left to spare.
    """
    targets = {*view.higher, *view.lower}
    if not targets:
        raise CoarError("no targets yet: choose what clicks mark, then click on examples")
    if view.spared:
        return Sides(view.higher, view.lower, view.spared)
    others = [row for row in range(len(source)) if row not in targets and not _is_held_out(row)]
    if not others:
        raise CoarError(f"all {len(source)} examples are targets, so that none is left to spare; unmark some")
    most = max(16, _MOST_ENTRIES // len(source.components) - len(targets))
    n = min(len(others), most)
    return Sides(view.higher, view.lower, tuple(others[i * len(others) // n] for i in range(n)), len(others))


def _subset(source: Source, rows: Sequence[int]) -> Attributions:
    """Attributions of some examples only; no other row is read."""
    whole = source.attributions
    weights = torch.stack([whole.row(row) for row in rows])
    identity = whole.identity.rows(list(rows))
    return Attributions(weights, whole.bias[list(rows)], None, whole.components, identity, whole.config)


def _local(chosen: Sides) -> tuple[list[int], dict[str, list[int] | None]]:
    """All rows of an edit, and the arguments of `editing` that count among them."""
    rows = [*chosen.higher, *chosen.lower, *chosen.spared]
    first, second = len(chosen.higher), len(chosen.higher) + len(chosen.lower)
    groups = {"increase": range(first), "decrease": range(first, second), "reference": range(second, len(rows))}
    return rows, {name: list(group) or None for name, group in groups.items()}


def edit_ranking(source: Source, chosen: Sides) -> Tensor:
    """All components, the best to ablate first, int64 [components]."""
    rows, arguments = _local(chosen)
    return editing.rank_components(_subset(source, rows), **arguments)


def preview(source: Source, view: View, progress: Progress = no_progress) -> tuple[Sides, tuple[int, ...], Change]:
    """What an edit would ablate, and what that does, on examples that are not held out."""
    chosen = sides(source, view)
    components = tuple(edit_ranking(source, chosen)[: view.n_components].tolist())
    marked = (*view.higher, *view.lower, *view.spared)
    rows = measured_rows(source, marked, without_held_out=True)
    return chosen, components, what_if(source, components, rows, progress)


def save_edit(source: Source, view: View, folder: str | Path, progress: Progress = no_progress) -> Path:
    """The edited model with its card, as a ZIP file in a folder; the figures on the card are of the held-out examples.

    Raises:
        CoarError: nothing is marked, or the folder cannot be written.
    """
    chosen = sides(source, view)
    rows, arguments = _local(chosen)
    progress(0.1, "making the edited model")
    with source.lock:
        changed = editing.edit(source.model, _subset(source, rows), n_components=view.n_components, **arguments)
    entries = {
        **models.record(changed)["edit"],
        "increase": list(chosen.higher), "decrease": list(chosen.lower), "reference": list(chosen.spared),
    }  # fmt: skip
    changed = models.copy_with_record(changed, edit=entries)
    progress(0.4, "measuring on the examples that were held out")
    figures = held_out_figures(source, view, tuple(entries["indices"]))
    inner = Path(folder) / "edited-model"
    progress(0.8, "saving")
    edited.save(changed, inner, figures)
    archive = _zipped(inner, Path(folder) / "edited-model.zip")
    shutil.rmtree(inner)
    return archive


def held_out_figures(source: Source, view: View, components: Sequence[int]) -> list[tuple[str, str, str]]:
    """Rows for the card: (what, before, after), on examples that neither the ranking nor a preview has seen."""
    marked = {*view.higher, *view.lower, *view.spared}
    rows = [row for row in range(len(source)) if _is_held_out(row) and row not in marked][:MOST_MEASURED]
    if not rows:
        return []
    change = what_if(source, components, rows)
    found = [
        (f"accuracy on {one.name} ({one.count} held out)", _of(one.before, one.count), _of(one.after, one.count))
        for one in accuracies(source, change)
    ]
    means = [f"{float(side.outputs.mean()):.3f} {source.unit}" for side in (change.before, change.after)]
    return [*found, (f"mean {source.output.name} ({len(rows)} held out)", *means)]


def _of(hits: int, count: int) -> str:
    return f"{100 * hits / count:.1f}% ({hits} of {count})"


def _zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder.parent))
    return path


def toggled(view: View, row: int, side: str) -> View:
    """The view after a click on an example while clicks mark `side`: marked, moved from another side, or unmarked."""
    was_there = row in getattr(view, side, ())
    emptied = {name: tuple(i for i in getattr(view, name) if i != row) for name in ("lower", "higher", "spared")}
    if side in emptied and not was_there:
        emptied[side] = tuple(sorted((*emptied[side], row)))
    return replace(view, **emptied)
