"""The page: four tabs of Gradio controls, with HTML between them that the files of `tabs` fill."""

from typing import Any

from hf_coar.errors import CoarError
from hf_coar.explore import drawing, links
from hf_coar.explore.drawing import note
from hf_coar.explore.links import View
from hf_coar.explore.source import Source
from hf_coar.explore.style import ON_LOAD

INSTALL = 'the explorer needs Gradio; install it with: pip install "hf_coar[explore]"'
_CACHE = (3600, 86_400)  # look every hour for uploads and downloads older than a day
_TITLES = {"examples": "Examples", "components": "Components", "edit": "Edit", "own": "Your own input"}
_MARKS = [("lower its output", "lower"), ("raise its output", "higher"), ("spare it (reference)", "spared")]


def gradio() -> Any:
    """Gradio, or an error that says how to get it."""
    try:
        import gradio
    except ImportError as error:
        raise CoarError(INSTALL) from error
    return gradio


class Layout:
    """The controls of a page of one source, without what they do; `blocks` is what Gradio serves."""

    def __init__(self, source: Source) -> None:
        """Lay them out; nothing is computed before somebody looks.

        Raises:
            CoarError: Gradio is not installed.
        """
        self.gr, self.source = gradio(), source
        with self.gr.Blocks(
            title="hf_coar explorer", analytics_enabled=False, fill_width=True, delete_cache=_CACHE
        ) as self.blocks:
            self._lay_out()

    def _lay_out(self) -> None:
        gr = self.gr
        with gr.Row(equal_height=False, elem_id="head"):
            with gr.Column(scale=7, min_width=320):
                gr.HTML(_header(self.source))
            with gr.Column(scale=4, min_width=260):
                self.link = gr.Textbox(
                    label="Link to this view", buttons=["copy"], interactive=False, max_lines=1, elem_id="link"
                )
        self.view = gr.State(View())
        self.measured, self.listed = gr.State(()), gr.State(())  # what is shown of a view already
        self.search = gr.Textbox(visible="hidden", elem_id="search")
        self.query = gr.Textbox(visible="hidden", elem_id="query")
        self.message = gr.HTML("", elem_id="message")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as self.tabs:
            builders = (self._examples_tab, self._components_tab, self._edit_tab, self._own_tab)
            self.items = {}
            for (name, title), build in zip(_TITLES.items(), builders, strict=True):
                with gr.Tab(title, id=name) as self.items[name]:
                    build()

    def _html(self, name: str, value: str = "") -> Any:
        return self.gr.HTML(value, elem_id=name, js_on_load=ON_LOAD, apply_default_css=False, min_height=20)

    def _class_choices(self) -> list[tuple[str, int]]:
        return [(self.source.class_name(index), index) for index in range(self.source.n_classes)]

    def _examples_tab(self) -> None:
        gr, source = self.gr, self.source
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    self.label = gr.Dropdown(
                        [("all", -1), *self._class_choices()], value=-1, label="Label", elem_id="label", min_width=120,
                        visible=source.n_classes > 0,
                    )  # fmt: skip
                    self.number = gr.Number(
                        0, precision=0, minimum=0, maximum=len(source) - 1, label="Example number, Enter opens it",
                        elem_id="number", min_width=120,
                    )  # fmt: skip
                self.wrong = gr.Checkbox(
                    False,
                    label="only wrong predictions",
                    elem_id="wrong",
                    container=False,
                    visible=source.n_classes > 0,
                )
                self.gallery = self._html("gallery")
            with gr.Column(scale=7, min_width=320):
                self.example = self._html("example")
                gr.HTML(drawing.wrapped(drawing.heading("What if they were gone?")))
                with gr.Row():
                    self.k = gr.Slider(
                        0, most_components(source), 0, step=1,
                        label="k: how many of its strongest components to ablate", elem_id="k", scale=3, buttons=[],
                    )  # fmt: skip
                    self.side = gr.Radio(
                        [("those that help it most", "help"), ("those that hurt it most", "hurt")], value="help",
                        label="Which", elem_id="side", scale=2, min_width=200,
                    )  # fmt: skip
                self.change = self._html("change")

    def _components_tab(self) -> None:
        gr, source = self.gr, self.source
        names, _ = source.components.regroup("layer")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                with gr.Row():
                    self.layer = gr.Dropdown(
                        [("all", ""), *((name or "(the model itself)", name) for name in names)], value="",
                        label="Layer", elem_id="layer", min_width=120,
                    )  # fmt: skip
                    self.component_number = gr.Number(
                        0, precision=0, minimum=0, maximum=len(source.components) - 1,
                        label="Component number, Enter opens it", elem_id="component-number", min_width=120,
                    )  # fmt: skip
                self.component_list = self._html("component-list")
            with gr.Column(scale=7, min_width=320):
                self.component = self._html("component")

    def _edit_tab(self) -> None:
        gr, source = self.gr, self.source
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self.marking = gr.Radio(
                    _MARKS, value="lower", label="A click on an example asks the edit to …", elem_id="marking"
                )
                with gr.Row(visible=source.n_classes > 0):
                    self.edit_label = gr.Dropdown(
                        [("all", -1), *self._class_choices()], value=-1, label="Show the label", elem_id="edit-label"
                    )
                    self.mark_all = gr.Button("Mark all that are shown", elem_id="mark-all", min_width=140)
                self.edit_gallery = self._html("edit-gallery")
            with gr.Column(scale=6, min_width=320):
                self.marks = self._html("marks")
                most = most_components(source)
                self.n_components = gr.Slider(
                    1, most, min(10, most), step=1, label="How many components the edit ablates",
                    elem_id="n-components", buttons=[],
                )  # fmt: skip
                with gr.Row():
                    self.preview = gr.Button("Preview the edit", variant="primary", elem_id="preview")
                    self.save = gr.Button("Save the edited model", elem_id="save")
                self.file = gr.File(label="Edited model with its card (ZIP)", visible=False, elem_id="file")
                self.edit = self._html("edit")

    def _own_tab(self) -> None:
        gr, source = self.gr, self.source
        of_text, possible = source.kind == "text", source.takes_own
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                self.own_image = gr.Image(
                    type="pil", image_mode=None, sources=["upload", "clipboard"], label="Your image", height=230,
                    visible=possible and not of_text, elem_id="own-image", buttons=[],
                )  # fmt: skip
                self.own_text = gr.Textbox(
                    label="Your text", lines=5, max_length=links.LONGEST_TEXT, visible=possible and of_text,
                    elem_id="own-text",
                )  # fmt: skip
                self.explained = gr.Dropdown(
                    [("the predicted one", -1), *self._class_choices()], value=-1, label="Class to explain",
                    visible=possible and source.n_classes > 0, elem_id="explained",
                )  # fmt: skip
                with gr.Row(visible=possible):
                    self.start = gr.Button("Attribute it", variant="primary", elem_id="start")
                    self.stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=7, min_width=320):
                words = "Its attribution arrives here round by round, with standard errors that shrink."
                cannot = "The data are batches of tensors, which do not say how an image or a text becomes one."
                self.own = self._html("own", drawing.wrapped(note(words if possible else cannot)))


def most_components(source: Source) -> int:
    """As far as the sliders go: a tenth of the components, where attributions still predict."""
    n = len(source.components)
    return min(n, max(20, round(0.1 * n)))


def _header(source: Source) -> str:
    config = source.attributions.config
    ids = [str((config.get(key) or {}).get("id") or "").rstrip("/") for key in ("model", "data")]
    names = " on ".join("/".join(name.split("/")[-2:]) for name in ids if name)
    size = f"{len(source):,} examples × {len(source.components):,} components"
    said = [names, size, f"output: {source.output.name}, {source.unit}"]
    return drawing.wrapped(f"<h2>hf_coar explorer</h2>{note(' · '.join(filter(None, said)))}")
