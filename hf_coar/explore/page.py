"""The page: a link and the tabs; every event makes a new `View`, and the tab that is looked at draws it."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

from markupsafe import escape

from hf_coar.errors import CoarError
from hf_coar.explore import links, tabs  # noqa: F401 (the tabs register themselves)
from hf_coar.explore.drawing import Html, html, note, warning, wrapped
from hf_coar.explore.source import Source
from hf_coar.explore.style import LINK, ON_LOAD, READY, SEARCH
from hf_coar.explore.tab import TABS, Tab, Updates, View
from hf_coar.storage.registry import Registry

INSTALL = 'the explorer needs Gradio; install it with: pip install "hf_coar[explore]"'
_CACHE = (3600, 86_400)  # look every hour for uploads and downloads older than a day


def gradio() -> Any:
    """Gradio, or an error that says how to get it."""
    try:
        import gradio
    except ImportError as error:
        raise CoarError(INSTALL) from error
    return gradio


def known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of some options that this version of Gradio has; for what is nice to have, and new."""
    return {name: value for name, value in options.items() if name in signature(function).parameters}


class Page:
    """The page of one source; `blocks` is what Gradio serves."""

    def __init__(self, source: Source) -> None:
        """Build all controls; nothing is computed before somebody looks.

        Raises:
            CoarError: Gradio is not installed.
        """
        self.gr, self.source = gradio(), source
        with self.gr.Blocks(
            title="hf_coar explorer", analytics_enabled=False, fill_width=True, delete_cache=_CACHE
        ) as self.blocks:
            self._lay_out()
            self._connect()

    # ------------------------------------------------------------------------------------------------------ controls

    def _lay_out(self) -> None:
        gr = self.gr
        with gr.Row(equal_height=False, elem_id="head"):
            with gr.Column(scale=7, min_width=320):
                gr.HTML(_header(self.source))
            with gr.Column(scale=4, min_width=260):
                self.link = gr.Textbox(
                    label="Link to this view", buttons=["copy"], interactive=False, max_lines=1, elem_id="link"
                )
        # One at a time on the model; who waits sees the place in the queue.
        self.heavy = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "full"}
        self.view = gr.State(View())
        self.search = gr.Textbox(visible="hidden", elem_id="search")
        self.query = gr.Textbox(visible="hidden", elem_id="query")
        self.message = gr.HTML("", elem_id="message")
        self._clickable: dict[Any, Any] = {}
        self.clicked: dict[Any, Any] = {}  # by HTML, the event
        self.tabs: dict[str, Tab] = {}
        self.items = {}
        # Older ones put tabs for which there is no room into a menu.
        with gr.Tabs(elem_id="tabs", **known(gr.Tabs, overflow_behavior="wrap")) as self.shown_tab:
            for name, kind in sorted(TABS.items(), key=lambda item: item[1].place):
                with gr.Tab(kind.title, id=name) as self.items[name]:
                    self.tabs[name] = kind(self, name)

    def html(self, name: str, beside: Any = None, value: str = "") -> Any:
        """HTML with the id `name`; what is clicked in it does the act of its `data-act`, given the control `beside`."""
        shown = self.gr.HTML(value, elem_id=name, js_on_load=ON_LOAD, apply_default_css=False, min_height=20)
        shown.postprocess = lambda drawn: None if drawn is None else str(escape(drawn))  # only `drawing.html` is HTML
        self._clickable[shown] = self.query if beside is None else beside
        return shown

    def class_choices(self) -> list[tuple[str, int]]:
        """Names and indices for a list to choose a class from."""
        return [(self.source.class_name(index), index) for index in range(self.source.n_classes)]

    # -------------------------------------------------------------------------------------------------------- events

    def _connect(self) -> None:
        self.query.change(None, self.query, self.link, js=LINK)
        kinds = (self.gr.components.Component, self.gr.State)
        of_tabs = [
            control for tab in self.tabs.values() for control in vars(tab).values() if isinstance(control, kinds)
        ]
        self._outputs = [self.view, self.query, self.message, self.shown_tab, *of_tabs]
        self._steps: list[Any] = []
        self.loaded = self.step(self.blocks.load, self._restored, self.search, js=SEARCH)
        for shown, beside in self._clickable.items():
            self.clicked[shown] = self.step(shown.click, self._act(), self.view, beside, trigger_mode="multiple")
        for name, item in self.items.items():
            self.step(item.select, self._opener(name), self.view, self.search, js=READY)
        for tab in self.tabs.values():
            for control, field, event, resets in tab.settings:
                mode = "always_last" if event == "input" else "once"
                set_one = self.setter(field, **resets)
                self.step(getattr(control, event), set_one, self.view, control, trigger_mode=mode)
            tab.connect()
        for tab in self.tabs.values():
            for later in tab.later:
                self._connect_later(tab.name, *later)

    def step(self, listen: Callable[..., Any], call: Callable[..., Updates], *inputs: Any, **more: Any) -> Any:
        """Let an event change what is shown: `call` gives the updates; what takes a while to draw follows."""
        done = listen(
            self._safely(call), list(inputs), self._outputs, show_progress="minimal", show_progress_on=self.link, **more
        )
        self._steps.append(done)
        return done

    def setter(self, field: str, **resets: Any) -> Callable[[View, Any], Updates]:
        """What an event of a control that sets this field of the view does."""

        def set_one(view: View, value: Any) -> Updates:
            value = _checked(field, value, self.source)
            return self.shown(replace(view, **{field: value}, **resets), view)

        return set_one

    def with_progress(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call whose last argument reports progress."""
        bar = self.gr.Progress()

        def run(*arguments: Any, progress: Any = bar) -> Any:
            return call(*arguments, lambda done, what: progress(done, desc=what))

        return run

    def shown(self, view: View, before: View) -> Updates:
        """The tab that is looked at, drawn anew, and the link to it."""
        return {self.view: view, self.query: links.to_query(view), **self.tabs[view.view].draw(view, before)}

    def _connect_later(self, tab: str, html: Any, key: Callable, draw: Callable) -> None:
        skip, kept = self.gr.skip(), self.gr.State(())

        def run(view: View, before: Any, progress: Any) -> tuple[Any, Any]:
            if view.view != tab or key(view) == before:
                return skip, skip
            try:
                return draw(view, progress), key(view)
            except CoarError as error:
                return warning(error), ()

        for step in self._steps:
            call = self.with_progress(run)
            step.then(call, [self.view, kept], [html, kept], show_progress_on=html, **self.heavy)

    def _safely(self, call: Callable[..., Updates]) -> Callable[..., Updates]:
        """The updates of a call; an error that the visitor can put right is said on the page."""

        @functools.wraps(call)
        def run(*arguments: Any) -> Updates:
            try:
                return {self.message: "", **call(*arguments)}
            except CoarError as error:
                return {self.message: warning(error)}

        return run

    def _restored(self, search: str) -> Updates:
        """What a link names; the first example if it names nothing, or nothing that makes sense."""
        source, said = self.source, ""
        try:
            view = links.from_query(search or "", len(source), len(source.components), source.n_classes)
            controls = self._controls(view)
        except CoarError as error:
            view, said = View(), warning(error)
            controls = self._controls(view)
        selected = {self.shown_tab: self.gr.Tabs(selected=view.view), self.message: said}
        return {**controls, **self.shown(view, View()), **selected}

    def _checked(self, view: View) -> View:
        return links.checked(view, len(self.source), len(self.source.components), self.source.n_classes)

    def _controls(self, view: View) -> Updates:
        return {control: value for tab in self.tabs.values() for control, value in tab.controls(view).items()}

    def _opener(self, name: str) -> Callable[[View, str], Updates]:
        """What fills a tab when it is opened.

        Gradio also tells of the tab that it selects itself while the page is being restored.
        """

        def open_tab(view: View, ready: str) -> Updates:
            if not ready or view.view == name:
                return {}
            return self._moved(replace(view, view=name), view)

        return open_tab

    def _act(self) -> Callable[..., Updates]:
        gr, acts = self.gr, Registry("act")
        for tab in self.tabs.values():
            for name, one in tab.acts.items():
                acts.add(name, one)

        def act(view: View, beside: Any, event: gr.EventData) -> Updates:
            said = event._data or {}
            if said.get("act") not in acts:
                return {}
            value = str(said.get("value") or 0)
            if not re.fullmatch(r"-?\d{1,12}", value):
                raise CoarError(f"a click on {value[:40]!r} means nothing here")
            changed = self._checked(acts[said["act"]](self.source, view, int(value), beside))
            return {**self._moved(changed, view), self.shown_tab: gr.Tabs(selected=changed.view)}

        return act

    def _moved(self, view: View, before: View) -> Updates:
        return {**self.tabs[view.view].controls(view), **self.shown(view, before)}


def _checked(name: str, value: Any, source: Source) -> Any:
    """A value that a control gave, within its range."""
    n = len(source.components)
    if name in ("k", "n_components"):
        return min(n, max(int(name == "n_components"), int(value or 0)))
    stop = {"example": len(source), "component": n}.get(name)
    if stop is not None and (value is None or not 0 <= value < stop):
        raise CoarError(f"{name} {value}: they run from 0 to {stop - 1}")
    return value


def _header(source: Source) -> Html:
    config = source.attributions.config
    ids = [str((config.get(key) or {}).get("id") or "").rstrip("/") for key in ("model", "data")]
    names = " on ".join("/".join(name.split("/")[-2:]) for name in ids if name)
    size = f"{len(source):,} examples × {len(source.components):,} components"
    said = [names, size, f"output: {source.output.name}, {source.unit}"]
    warned = [html('<p class="coar-warning">{}</p>', line) for line in source.attributions.provenance.warnings]
    return wrapped(html("<h2>hf_coar explorer</h2>"), note(" · ".join(filter(None, said))), *warned)
