"""The tab of edits: examples are marked, the edit is previewed on the live model, and saved."""

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar import editing, models
from hf_coar.attributions import Attributions
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.explore import drawing, measuring, pieces
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Html, button, html, joined, note, number, warning, wrapped
from hf_coar.explore.measuring import MOST_MEASURED, Change, accuracies, is_held_out, measured_rows, what_if
from hf_coar.explore.source import Source
from hf_coar.explore.tab import TABS, Tab, Updates, View
from hf_coar.storage.texts import count

_MARKS = [("lower its output", "lower"), ("raise its output", "higher"), ("spare it (reference)", "spared")]
_MOST_MARKED = 200  # examples that "mark all that are shown" marks
_KEPT_SAVED = 4  # edited models
_NAMED = 40  # ablated components
_HELD_OUT = ". Every fourth example is held out: it is not measured here, and gives the figures on the card."
_MOST_ENTRIES = 2**24  # of the weights that an edit is ranked by: 64 MB, and as many references as fit into it


@TABS.register("edit")
class Edit(Tab):
    """Examples are marked, and an edit of the model by them is previewed and saved."""

    title, place = "Edit", 2
    kept = ("label", "page", "lower", "higher", "spared", "n_components")
    acts = {
        "mark": lambda source, view, value, side: toggled(view, value, side),
        "clear": lambda source, view, value, side: replace(view, lower=(), higher=(), spared=()),
    }

    def build(self) -> None:
        """Examples to mark on the left, the edit on the right."""
        gr, source, page = self.gr, self.source, self.page
        self.saved: list[tempfile.TemporaryDirectory] = []  # what visitors may still be downloading
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self.marking = gr.Radio(
                    _MARKS, value="lower", label="A click on an example asks the edit to …", elem_id="marking"
                )
                with gr.Row(visible=source.n_classes > 0):
                    self.label = gr.Dropdown(
                        [("all", -1), *page.class_choices()], value=-1, label="Show the label", elem_id="edit-label"
                    )
                    self.mark_all = gr.Button("Mark all that are shown", elem_id="mark-all", min_width=140)
                self.sets("label", self.label, page=0)
                self.gallery = page.html("edit-gallery", self.marking)
            with gr.Column(scale=6, min_width=320, elem_classes="coar-first"):
                self.marks = page.html("marks", self.marking)
                most = measuring.most_components(source)
                self.n_components = gr.Slider(
                    1, most, min(10, most), step=1, label="How many components the edit ablates",
                    elem_id="n-components", buttons=[],
                )  # fmt: skip
                self.sets("n_components", self.n_components)
                with gr.Row():
                    self.preview = gr.Button("Preview the edit", variant="primary", elem_id="preview")
                    self.save = gr.Button("Save the edited model", elem_id="save")
                self.file = gr.File(label="Edited model with its card (ZIP)", visible=False, elem_id="file")
                self.edit = page.html("edit", self.marking)

    def connect(self) -> None:
        """Marking, the preview and saving."""
        page = self.page
        page.step(self.mark_all.click, self._mark_shown, page.view, self.marking)
        for listen in (self.preview.click, page.loaded.then):
            listen(page.with_progress(self._preview), page.view, self.edit, show_progress_on=self.edit, **page.heavy)
        self.save.click(
            page.with_progress(self._save), page.view, [self.file, page.message], show_progress_on=self.save,
            **page.heavy,
        )  # fmt: skip

    def draw(self, view: View, before: View) -> Updates:
        """The examples with their marks; a preview of other marks goes."""
        gallery = pieces.gallery(self.source, replace(view, wrong=False), act="mark")
        drawn = {self.gallery: gallery, self.marks: marks(view)}
        if _asked(view) != _asked(before):
            drawn |= {self.edit: "", self.file: self.gr.File(visible=False)}
        return drawn

    def controls(self, view: View) -> Updates:
        """As set, within the slider."""
        most = measuring.most_components(self.source)
        return {**super().controls(view), self.n_components: min(view.n_components, most)}

    def _mark_shown(self, view: View, marking: str) -> Updates:
        rows, _ = pieces.filtered(self.source, replace(view, wrong=False))
        if len(rows) > _MOST_MARKED:
            raise CoarError(
                f"{len(rows):,} examples are shown, and {_MOST_MARKED} can be marked at once: choose a label"
            )
        rest = {name: tuple(set(getattr(view, name)) - set(rows)) for name in ("lower", "higher", "spared")}
        rest[marking] = (*rest[marking], *rows)
        return self.page.shown(replace(view, **{name: tuple(sorted(rows)) for name, rows in rest.items()}), view)

    def _preview(self, view: View, progress: Progress) -> Any:
        if view.view != self.name:
            return self.gr.skip()
        if not (view.lower or view.higher):
            return wrapped(note("Choose what a click asks for, click on examples, and preview the edit."))
        try:
            return edit(self.source, view, *preview(self.source, view, progress))
        except CoarError as error:
            return warning(error)

    def _save(self, view: View, progress: Progress) -> tuple[Any, str]:
        try:
            self.saved.append(tempfile.TemporaryDirectory(prefix="coar-edit-"))
            path = save_edit(self.source, view, self.saved[-1].name, progress)
        except CoarError as error:
            return self.gr.File(visible=False), warning(error)
        while len(self.saved) > _KEPT_SAVED:
            self.saved.pop(0).cleanup()
        return self.gr.File(str(path), visible=True), ""


def _asked(view: View) -> tuple:
    return view.lower, view.higher, view.spared, view.n_components


@dataclass(frozen=True)
class Sides:
    """The examples of an edit, as rows of the attributions."""

    higher: tuple[int, ...]  # whose outputs are to rise
    lower: tuple[int, ...]  # whose outputs are to fall
    spared: tuple[int, ...]  # whose outputs are to stay
    n_others: int = 0  # how many examples `spared` was drawn from, where it was drawn


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
    others = [row for row in range(len(source)) if row not in targets and not is_held_out(row)]
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
    rows = [row for row in range(len(source)) if is_held_out(row) and row not in marked][:MOST_MEASURED]
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


def marks(view: View) -> Html:
    """How many examples are marked."""
    sides = [("to lower", view.lower), ("to raise", view.higher), ("to spare", view.spared)]
    said = html(" · ").join(html("<b>{}</b> {}", len(rows), name) for name, rows in sides)
    clear = button("clear", 0, "Clear all marks", "coar-small") if any(rows for _, rows in sides) else ""
    default = html('<span class="coar-faint">{}</span>', "" if view.spared else "(none marked: all others are spared)")
    return wrapped(html('<div class="coar-pager" role="status">{} {} {}</div>', said, default, clear))


def edit(source: Source, view: View, chosen: Sides, components: Sequence[int], found: Change) -> Html:
    """What an edit would do."""
    rows = []
    for name, side in (("to lower", view.lower), ("to raise", view.higher), ("to spare", chosen.spared)):
        places = [place for place, row in enumerate(found.rows) if row in set(side)]
        if places:
            means = [number(float(values[places].mean()), 2) for values in (found.predicted, found.measured)]
            rows.append([f"{name} ({len(places):,} measured)", *means])
    head = ["examples", "predicted change", f"measured change, mean {source.unit}"]
    drawn = chosen.n_others and chosen.n_others > len(chosen.spared)
    said = f"References: {len(chosen.spared):,}"
    said += f", drawn evenly from {chosen.n_others:,} others" if drawn else ""
    names = [pieces.component_button(source, i) for i in components[:_NAMED]]
    names += [f"and {len(components) - _NAMED} more"] if len(components) > _NAMED else []
    listed = html("<ol>{}</ol>", joined(html("<li>{}</li>", name) for name in names))
    return wrapped(
        html('<p class="coar-statement">Preview: {} ablated.</p>', count(len(components), "component")),
        drawing.table(head, rows, "coar-numbers") + note(said + _HELD_OUT),
        pieces.change_columns(source, found, "What is ablated", listed),
        pieces.flips(source, found),
    )
