"""What the controls of the page do: every event makes a `View`, and the view is drawn by its tab."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.explore import cards, drawing, links, measuring
from hf_coar.explore.drawing import note, warning
from hf_coar.explore.layout import Layout, most_components
from hf_coar.explore.links import View
from hf_coar.explore.source import Source
from hf_coar.explore.style import LINK, READY, SEARCH
from hf_coar.explore.tabs import components, edit, examples, own

_MOST_MARKED = 200  # examples that "mark the whole class" marks
_KEPT_SAVED = 4  # edited models
_KEPT_CHANGES = 15  # measured ablations

Updates = dict[Any, Any]


class Page(Layout):
    """The page of one source; `blocks` is what Gradio serves."""

    def __init__(self, source: Source) -> None:
        """Build all controls; nothing is computed before somebody looks.

        Raises:
            CoarError: Gradio is not installed.
        """
        self.uploads = own.Uploads()
        self.saved: list[tempfile.TemporaryDirectory] = []  # what visitors may still be downloading
        self.changes: dict[tuple[int, ...], measuring.Change] = {}
        self.turns: dict[str, object] = {}  # by session: the attribution of an own input that is wanted now
        super().__init__(source)
        with self.blocks:
            self._connect()

    # -------------------------------------------------------------------------------------------------------- events

    def _connect(self) -> None:
        gr = self.gr
        self.query.change(None, self.query, self.link, js=LINK)
        shown = [
            self.view, self.query, self.message, self.tabs, self.gallery, self.example, self.component,
            self.edit_gallery, self.marks, self.label, self.wrong, self.k, self.side, self.layer,
            self.n_components, self.explained, self.own_text, self.own_image, self.number, self.component_number,
            self.edit_label, self.file, self.edit,
        ]  # fmt: skip
        quiet = {"outputs": shown, "show_progress": "minimal", "show_progress_on": self.link}
        steps = [self.blocks.load(self._safely(self._restored), [self.search], js=SEARCH, **quiet)]

        def act(view: View, marking: str, event: gr.EventData) -> Updates:
            return self._safely(self._acted)(view, marking, event._data or {})

        for html in (self.gallery, self.example, self.change, self.component, self.component_list, self.edit_gallery,
                     self.marks, self.edit, self.own):  # fmt: skip
            clicked = html.click(act, [self.view, self.marking], trigger_mode="multiple", **quiet)
            steps.append(clicked)
        for control, name, event in self._controls():
            listen = getattr(control, event)
            mode = "always_last" if event == "input" else "once"
            set_one = self._safely(self._setter(name))
            steps.append(listen(set_one, [self.view, control], trigger_mode=mode, **quiet))
        for name, item in self.items.items():
            steps.append(item.select(self._safely(self._opener(name)), [self.view, self.search], js=READY, **quiet))
        set_wrong = self._safely(self._setter("wrong"))
        search = self.wrong.input(
            self._with_progress(self._search), [self.view, self.wrong], [self.gallery], show_progress="full"
        )
        steps.append(search.then(set_wrong, [self.view, self.wrong], **quiet))
        for step in steps:
            for call, kept, html in ((self._measure, self.measured, self.change),
                                     (self._list, self.listed, self.component_list)):  # fmt: skip
                run = self._with_progress(call)
                step.then(run, [self.view, kept], [html, kept], show_progress="full", show_progress_on=html)
        self.mark_all.click(self._safely(self._mark_shown), [self.view, self.marking], **quiet)
        for step in (self.preview.click, steps[0].then):
            step(self._with_progress(self._preview), [self.view], [self.edit], show_progress_on=self.edit)
        self.save.click(
            self._with_progress(self._save), self.view, [self.file, self.message], show_progress_on=self.save
        )
        self._connect_own(steps[0], clicked)

    def _connect_own(self, loaded: Any, clicked: Any) -> None:
        gr = self.gr

        def start(view: View, image: Any, text: str, explained: int, request: gr.Request) -> Iterator[tuple]:
            yield from self._attribute_own(view, image, text, explained, request.session_hash)

        def linked(view: View, request: gr.Request) -> Iterator[tuple]:
            yield from self._attribute_linked(view, request.session_hash)

        inputs = [self.view, self.own_image, self.own_text, self.explained]
        shown = {"outputs": [self.own, self.view, self.query], "show_progress": "minimal", "concurrency_limit": None}
        running = [
            self.start.click(start, inputs, **shown), self.own_text.submit(start, inputs, **shown),
            loaded.then(linked, self.view, **shown), clicked.then(linked, self.view, **shown),
        ]  # fmt: skip
        self.stop.click(None, cancels=running)

    def _controls(self) -> list[tuple[Any, str, str]]:
        return [
            (self.label, "label", "input"), (self.edit_label, "label", "input"),
            (self.k, "k", "input"), (self.side, "side", "input"), (self.number, "example", "submit"),
            (self.layer, "layer", "input"), (self.component_number, "component", "submit"),
            (self.n_components, "n_components", "input"),
        ]  # fmt: skip

    def _safely(self, call: Callable[..., Updates]) -> Callable[..., Updates]:
        """The updates of a call; an error that the visitor can put right is said on the page."""

        def run(*arguments: Any) -> Updates:
            try:
                return {self.message: "", **call(*arguments)}
            except CoarError as error:
                return {self.message: drawing.wrapped(warning(str(error)))}

        return run

    def _with_progress(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call whose last argument reports progress."""
        bar = self.gr.Progress()

        def run(*arguments: Any, progress: Any = bar) -> Any:
            return call(*arguments, lambda done, what: progress(done, desc=what))

        return run

    # ------------------------------------------------------------------------------------------------------- actions

    def _restored(self, search: str) -> Updates:
        """What a link names; the first example if it names nothing, or nothing that makes sense."""
        source, said = self.source, ""
        try:
            view = links.from_query(search or "", len(source), len(source.components), source.n_classes)
            controls = self._controls_of(view)
        except CoarError as error:
            view, said = View(), drawing.wrapped(warning(str(error)))
            controls = self._controls_of(view)
        selected = {self.tabs: self.gr.Tabs(selected=view.view), self.message: said}
        return {**self._shown(view), **controls, **selected}

    def _controls_of(self, view: View) -> Updates:
        most = most_components(self.source)
        found = {
            self.label: view.label, self.edit_label: view.label, self.wrong: view.wrong, self.k: view.k,
            self.side: view.side, self.layer: view.layer, self.n_components: min(view.n_components, most),
            self.explained: view.explained, self.own_text: view.text,
        }  # fmt: skip
        if view.image:
            found[self.own_image] = self.uploads.get(view.image)
        return found

    def _shown(self, view: View) -> Updates:
        """The tab that is looked at, drawn anew, and the link to it."""
        drawn = {
            "examples": self._draw_examples, "components": self._draw_components, "edit": self._draw_edit,
            "own": lambda view: {},
        }[view.view](view)  # fmt: skip
        return {self.view: view, self.query: links.to_query(view), **drawn}

    def _draw_examples(self, view: View) -> Updates:
        return {
            self.gallery: cards.gallery(self.source, view), self.example: examples.example(self.source, view),
            self.number: view.example,
        }  # fmt: skip

    def _draw_components(self, view: View) -> Updates:
        return {
            self.component: components.component(self.source, view), self.component_number: view.component,
        }  # fmt: skip

    def _draw_edit(self, view: View) -> Updates:
        gallery = cards.gallery(self.source, replace(view, wrong=False), act="mark")
        return {self.edit_gallery: gallery, self.marks: edit.marks(view)}

    def _acted(self, view: View, marking: str, event: dict[str, str]) -> Updates:
        """A click on something with `data-act`."""
        act, value = event.get("act"), int(event.get("value") or 0)
        if act in ("example", "component", "try", "see"):
            tab = "components" if act == "component" else "examples"
            moved = {"try": {"ticked": (value,), "k": 0}, "see": {}}.get(act, {act: value})
            view = replace(view, view=tab, **moved)
            return {**self._shown(view), self.tabs: self.gr.Tabs(selected=tab), self.k: view.k}
        if act == "tick":
            ticked = set(measuring.ablated(self.source, view)) ^ {value}
            view = replace(view, ticked=tuple(sorted(ticked)), k=0)
            return {**self._shown(view), self.k: 0}
        if act == "token":
            return self._shown(replace(view, view="own", explained=value))
        if act == "page":
            return self._shown(replace(view, page=max(0, value)))
        changed = edit.toggled(view, value, marking) if act == "mark" else view
        if act == "clear":
            changed = replace(view, lower=(), higher=(), spared=())
        return {**self._shown(changed), self.edit: "", self.file: self.gr.File(visible=False)}

    def _setter(self, name: str) -> Callable[[View, Any], Updates]:
        def set_one(view: View, value: Any) -> Updates:
            value = _checked(name, value, self.source)
            changed = replace(view, **{name: value})
            if name in ("label", "wrong"):
                changed = replace(changed, page=0)
            if name in ("k", "side"):
                changed = replace(changed, ticked=())
            shown = self._shown(changed)
            return {**shown, self.label: value, self.edit_label: value} if name == "label" else shown

        return set_one

    def _opener(self, name: str) -> Callable[[View, str], Updates]:
        """Of a tab. Gradio also tells of the tab that it selects itself while the page is being restored."""

        def open_tab(view: View, ready: str) -> Updates:
            return self._shown(replace(view, view=name)) if ready and view.view != name else {}

        return open_tab

    def _mark_shown(self, view: View, marking: str) -> Updates:
        rows, _ = cards.filtered(self.source, replace(view, wrong=False))
        if len(rows) > _MOST_MARKED:
            raise CoarError(
                f"{len(rows):,} examples are shown, and {_MOST_MARKED} can be marked at once: choose a label"
            )
        rest = {name: tuple(set(getattr(view, name)) - set(rows)) for name in ("lower", "higher", "spared")}
        rest[marking] = (*rest[marking], *rows)
        view = replace(view, **{name: tuple(sorted(marked)) for name, marked in rest.items()})
        return {**self._shown(view), self.edit: "", self.file: self.gr.File(visible=False)}

    def _search(self, view: View, wrong: bool, progress: Any) -> Any:
        """Run the model on the examples among which wrong predictions are looked for."""
        if wrong:
            cards.filtered(self.source, replace(view, wrong=True), progress)
        return self.gr.skip()

    def _list(self, view: View, before: Any, progress: Any) -> tuple[Any, Any]:
        """The components of a layer; the first time all attributions are read once."""
        now = (view.layer, view.component)
        if view.view != "components" or now == before:
            return self.gr.skip(), self.gr.skip()
        return components.component_list(self.source, view, progress), now

    def _measure(self, view: View, before: tuple, progress: Any) -> tuple[Any, Any]:
        """What is ticked, measured on the live model; only where it is looked at and has changed."""
        if view.view != "examples":
            return self.gr.skip(), self.gr.skip()
        components = measuring.ablated(self.source, view)
        now = (view.example, components)
        if now == before:
            return self.gr.skip(), self.gr.skip()
        if not components:
            hint = "Move k, or tick components in the lists above: the model runs without them, live."
            return drawing.wrapped(note(hint)), now
        try:
            found = self._changed(components, view.example, progress)
            return examples.change(self.source, view, components, found), now
        except CoarError as error:
            return drawing.wrapped(warning(str(error))), ()

    def _changed(self, components: tuple[int, ...], example: int, progress: Any) -> measuring.Change:
        """What ablating components does; kept, as the next example that is looked at wants the same."""
        found = self.changes.get(components)
        if found is None or example not in found.rows:
            rows = measuring.measured_rows(self.source, [example])
            found = measuring.what_if(self.source, components, rows, progress)
            self.changes = {**dict(list(self.changes.items())[-_KEPT_CHANGES:]), components: found}
        return found

    def _preview(self, view: View, progress: Any) -> Any:
        if view.view != "edit":
            return self.gr.skip()
        if not (view.lower or view.higher):
            return drawing.wrapped(note("Choose what a click asks for, click on examples, and preview the edit."))
        try:
            return edit.edit(self.source, view, *edit.preview(self.source, view, progress))
        except CoarError as error:
            return drawing.wrapped(warning(str(error)))

    def _save(self, view: View, progress: Any) -> tuple[Any, str]:
        try:
            self.saved.append(tempfile.TemporaryDirectory(prefix="coar-edit-"))
            path = edit.save_edit(self.source, view, self.saved[-1].name, progress)
        except CoarError as error:
            return self.gr.File(visible=False), drawing.wrapped(warning(str(error)))
        while len(self.saved) > _KEPT_SAVED:
            self.saved.pop(0).cleanup()
        return self.gr.File(str(path), visible=True), ""

    def _attribute_own(self, view: View, image: Any, text: str, explained: int, session: str) -> Iterator[tuple]:
        view = replace(own.without_input(view), view="own", explained=explained)
        if self.source.kind == "image" and image is not None:
            view = replace(view, image=self.uploads.keep(image))
        elif self.source.kind == "text":
            view = replace(view, text=text or "")
        if not (view.image or view.text):
            what = "upload an image" if self.source.kind == "image" else "type a text"
            yield drawing.wrapped(warning(f"nothing to attribute yet: {what} first")), view, links.to_query(view)
        yield from self._attribute_linked(view, session)

    def _attribute_linked(self, view: View, session: str) -> Iterator[tuple]:
        """The attribution of the input that a view names, round by round, until the same visitor asks for another."""
        skip, turn, last = self.gr.skip(), object(), None
        if view.view != "own" or not (view.image or view.text):
            yield skip, skip, skip
            return
        self.turns[session] = turn
        yield skip, view, links.to_query(view)
        try:
            content = own.content_of(view, self.uploads)
            for last in own.arriving(self.source, content, view.explained):
                if self.turns.get(session) is not turn:
                    return
                yield own.panel(self.source, content, last, running=True), skip, skip
            yield own.panel(self.source, content, last, running=False), skip, skip
        except CoarError as error:
            yield drawing.wrapped(warning(str(error))), skip, skip
        finally:
            if self.turns.get(session) is turn:
                del self.turns[session]


def _checked(name: str, value: Any, source: Source) -> Any:
    """A value that a control gave, within its range."""
    n = len(source.components)
    if name in ("k", "n_components"):
        return min(n, max(int(name == "n_components"), int(value or 0)))
    stop = {"example": len(source), "component": n}.get(name)
    if stop is not None and (value is None or not 0 <= value < stop):
        raise CoarError(f"{name} {value}: they run from 0 to {stop - 1}")
    return value
