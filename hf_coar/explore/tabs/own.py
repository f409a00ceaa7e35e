"""Bring your own input: an image or a text, attributed round by round while the visitor watches."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.data import Batch
from hf_coar.errors import CoarError
from hf_coar.estimators import live
from hf_coar.explore import drawing, links, pieces
from hf_coar.explore.drawing import Html, button, figure, html, joined, note, number, warning, wrapped
from hf_coar.explore.outcome import Outcome
from hf_coar.explore.source import Source
from hf_coar.explore.tab import TABS, Tab, Updates, View
from hf_coar.models import outputs

MAX_ROUNDS = 16
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # their headers tell the size of what is decoded
_MOST_MEGAPIXELS = 25  # 75 MB as pixels; a telephone's picture has 12
_KEPT_IMAGES, _LARGEST_SIDE = 64, 1024  # uploads kept for their links, and pixels that are kept of one


@TABS.register("own")
class Own(Tab):
    """An image or a text of the visitor's, and its attribution as it arrives."""

    title, place = "Your own input", 3
    kept = ("text", "image", "explained")
    acts = {"token": lambda source, view, value, beside: replace(view, view="own", explained=value)}

    def build(self) -> None:
        """The input on the left, its attribution on the right."""
        gr, source, page = self.gr, self.source, self.page
        self.uploads = Uploads()
        self.turns: dict[str, object] = {}  # by session: the attribution of an own input that is wanted now
        of_text, possible = source.kind == "text", source.takes_own
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                self.image = gr.Image(
                    type="pil", image_mode=None, sources=["upload", "clipboard"], label="Your image", height=230,
                    visible=possible and not of_text, elem_id="own-image", buttons=[],
                )  # fmt: skip
                self.image.preprocess = self._read
                self.text = gr.Textbox(
                    label="Your text", lines=5, max_length=links.LONGEST_TEXT, visible=possible and of_text,
                    elem_id="own-text",
                )  # fmt: skip
                self.explained = gr.Dropdown(
                    [("the predicted one", -1), *page.class_choices()], value=-1, label="Class to explain",
                    visible=possible and source.n_classes > 0, elem_id="explained",
                )  # fmt: skip
                with gr.Row(visible=possible):
                    self.start = gr.Button("Attribute it", variant="primary", elem_id="start")
                    self.stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=7, min_width=320):
                words = "Its attribution arrives here round by round, with standard errors that shrink."
                cannot = (
                    "An image or a text of your own needs a data set that says how it becomes what the model reads, "
                )
                cannot += "and an output that needs no more than a class, or the text itself."
                self.own = page.html("own", value=wrapped(note(words if possible else cannot)))

    def connect(self) -> None:
        """The attribution begins with the button, with Enter, with a click on a token, and with a link."""
        gr, page = self.gr, self.page

        def start(view: View, image: Any, text: str, explained: int, request: gr.Request) -> Iterator[tuple]:
            yield from self._attribute(view, image, text, explained, request.session_hash)

        def linked(view: View, request: gr.Request) -> Iterator[tuple]:
            yield from self._attribute_linked(view, request.session_hash)

        inputs = [page.view, self.image, self.text, self.explained]
        # A lane of its own, as it lets others have the model between two rounds.
        lane = {"concurrency_id": "own", "concurrency_limit": 1, "show_progress": "minimal"}
        shown = {"outputs": [self.own, page.view, page.query], **lane}

        def forget(request: gr.Request) -> None:
            self.turns.pop(request.session_hash, None)  # so that the next need not wait until the last has ended

        def forget_shown(view: View, request: gr.Request) -> None:
            if view.view == self.name:
                forget(request)

        # One after the other, so that what is forgotten is the last one, and never the one that begins.
        running = [
            listen(forget, queue=False).then(start, inputs, **shown) for listen in (self.start.click, self.text.submit)
        ]
        running += [
            step.then(forget_shown, page.view, queue=False).then(linked, page.view, **shown)
            for step in (page.loaded, page.clicked[self.own])
        ]
        self.stop.click(None, cancels=running)

    def _read(self, given: Any) -> Any:
        """An uploaded file as a PIL image; its size is looked at before its pixels are."""
        from PIL import Image, ImageOps

        if given is None:
            return None
        try:
            with Image.open(given.path, formats=_FORMATS) as image:
                megapixels = image.width * image.height / 1e6
                if megapixels <= _MOST_MEGAPIXELS:
                    return ImageOps.exif_transpose(image)
                said = f"has {megapixels:,.0f} megapixels; give one of at most {_MOST_MEGAPIXELS}"
        except Image.DecompressionBombError:
            said = f"has hundreds of megapixels; give one of at most {_MOST_MEGAPIXELS}"
        except (OSError, ValueError, TypeError, AttributeError, SyntaxError):
            said = f"cannot be read; {', '.join(_FORMATS)} can"
        raise self.gr.Error(f"this image {said}", print_exception=False)

    def controls(self, view: View) -> Updates:
        """The input that a view names.

        Raises:
            CoarError: its image is gone.
        """
        found = {self.explained: view.explained, self.text: view.text}
        return {**found, self.image: self.uploads.get(view.image)} if view.image else found

    def _attribute(self, view: View, image: Any, text: str, explained: int, session: str) -> Iterator[tuple]:
        view = replace(view, view="own", text="", image="", explained=explained)
        if self.source.kind == "image" and image is not None:
            view = replace(view, image=self.uploads.keep(image))
        elif self.source.kind == "text":
            view = replace(view, text=(text or "")[: links.LONGEST_TEXT])
            if len(text or "") > links.LONGEST_TEXT:
                said = f"the text has {len(text):,} characters; at most {links.LONGEST_TEXT:,} are taken"
                yield warning(said), view, links.to_query(view)
                return
        if not (view.image or view.text):
            what = "upload an image" if self.source.kind == "image" else "type a text"
            yield warning(f"nothing to attribute yet: {what} first"), view, links.to_query(view)
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
            content = self.uploads.get(view.image) if view.image else view.text
            for last in arriving(self.source, content, view.explained):
                if self.turns.get(session) is not turn:
                    return
                yield panel(self.source, content, last, running=True), skip, skip
            yield panel(self.source, content, last, running=False), skip, skip
        except CoarError as error:
            yield warning(error), skip, skip
        finally:
            if self.turns.get(session) is turn:
                del self.turns[session]


class Uploads:
    """Images of visitors, by a name made from their pixels, as long as the explorer runs; the oldest go first."""

    def __init__(self) -> None:
        """None yet."""
        self._images: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, image: Any) -> str:
        """Keep a PIL image; its name, for links, comes back."""
        image = image.copy()
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        name = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()[:20]
        with self._lock:
            self._images[name] = image
            self._images.move_to_end(name)
            while len(self._images) > _KEPT_IMAGES:
                self._images.popitem(last=False)
        return name

    def get(self, name: str) -> Any:
        """The image of that name.

        Raises:
            CoarError: it is gone; links to uploaded images work while the explorer that made them runs.
        """
        with self._lock:
            if name not in self._images:
                raise CoarError("the image of this link is gone: uploads are kept only for a while; upload it again")
            return self._images[name]


@dataclass(frozen=True)
class Arrived:
    """The attribution of a visitor's input after some rounds."""

    found: Outcome  # the model's prediction
    value: float  # the output that is attributed
    tokens: tuple[int, ...]  # of a language model the tokens of the text; no others follow from it
    explained: int  # the class, or of a language model the token's position; -1: the mean over all tokens
    last: "live.Round"  # weights, standard errors, cost and number of rounds up to now
    errors: tuple[float, ...]  # the typical standard error after every round that had one, in the unit of the output
    reliabilities: tuple[float, ...]  # the expected correlation with another seed's after every round that had one


def arriving(source: Source, content: Any, explained: int = -1, max_rounds: int = MAX_ROUNDS) -> Iterator[Arrived]:
    """The attribution of an image or text, better with every item.

    Args:
        source: whose model and components.
        content: a PIL image, or a text.
        explained: the class whose output is attributed, or of a language model the position of the token; -1 for the
            predicted class, or all tokens.
        max_rounds: when it ends by itself.

    Raises:
        CoarError: nothing was given, or it cannot be prepared for this model.
    """
    if content is None or (isinstance(content, str) and not content.strip()):
        raise CoarError("nothing to attribute yet: upload an image" if source.kind == "image" else "type a text first")
    batch, found, explained = _targeted(source, source.prepare_own(content), explained)
    value, tokens = float(source.run(batch).outputs[0]), ()
    if source.is_language_model:
        tokens = tuple(batch["input_ids"][0][_attended(batch)].tolist())
    config, errors, reliabilities = source.attributions.config, [], []
    rounds = live.rounds(
        source.model, {name: value.to(source.device) for name, value in batch.items()}, source.components,
        output=source.output, ablated_fraction=config.get("ablated_fraction", 0.05),
        seed=config.get("seed", 0), max_rounds=max_rounds,
    )  # fmt: skip
    try:
        while True:
            with source.lock:  # a round at a time, so that others get their turn in between
                one = next(rounds, None)
            if one is None:
                return
            if one.standard_errors is not None:
                errors.append(float(one.standard_errors[0].square().mean().sqrt()))
            if one.reliability is not None:
                reliabilities.append(float(one.reliability[0]))
            yield Arrived(found, value, tokens, explained, one, tuple(errors), tuple(reliabilities))
    finally:
        rounds.close()


def _targeted(source: Source, batch: Batch, explained: int) -> tuple[Batch, Outcome, int]:
    """The batch with the labels that are to be explained, the prediction, and what is explained."""
    if source.is_language_model:
        found = source.run(batch)
        if explained < 0:
            return batch, found, -1
        places = _attended(batch).nonzero().flatten().tolist()
        if not 1 <= explained < len(places):
            raise CoarError(f"token {explained}: of this text, tokens 1 to {len(places) - 1} follow from others")
        labels = torch.full_like(batch["input_ids"], outputs.IGNORED_LABEL)
        labels[0, places[explained]] = batch["input_ids"][0, places[explained]]
        return {**batch, "labels": labels}, found, explained
    found = source.run({**batch, "labels": torch.zeros(1, dtype=torch.long)})
    if found.classes is None:
        raise CoarError("inputs of one's own are attributed for classifiers and language models, and this is neither")
    explained = int(found.classes[0]) if explained < 0 else explained
    return {**batch, "labels": torch.tensor([explained])}, found, explained


def _attended(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0].bool()


def panel(source: Source, content: Any, arrived: Arrived, running: bool) -> Html:
    """What has arrived, as HTML."""
    weights, errors = arrived.last.weights[0].cpu(), arrived.last.standard_errors
    errors = errors[0].cpu() if errors is not None else None
    of_text, one, rounds = isinstance(content, str), arrived.explained, arrived.last.rounds
    of = "" if one < 0 else f" of {source.class_name(one)}"
    if arrived.tokens:
        of = ", mean over the tokens" if one < 0 else f" of token {one}, {source.words(arrived.tokens)[one]!r}"
    attributed = note(f"attributed: the {source.output.name}{of}: {number(arrived.value, 2)} {source.unit}")
    state = f"round {rounds} of {MAX_ROUNDS}" if rounds else "first pass"
    figures = [
        figure(state, "more is arriving …" if running else "done"),
        figure(f"{arrived.last.cost:,.0f}", "forward passes so far"),
        *_noise(source, arrived),
    ]
    picture = _text(source, content, arrived) if of_text else drawing.picture(drawing.thumbnail(content, 256))
    return wrapped(
        drawing.top(picture, pieces.top_table(source, arrived.found) + attributed, of_text),
        html('<div class="coar-figures" role="status">{}</div>', joined(figures)),
        pieces.attribution(source, weights, errors),
        pieces.ranked(source, weights, errors),
    )


def _text(source: Source, content: str, arrived: Arrived) -> Html:
    """The text; of a language model every token that follows from others is a button that explains it."""
    if not arrived.tokens:
        return html('<div class="coar-text" tabindex="0">{}</div>', content)
    words = source.words(arrived.tokens)
    shown: list[object] = [words[0]]
    for place, hit in enumerate((arrived.found.tokens[0] == arrived.found.targets[0]).tolist(), start=1):
        pressed = html(' aria-pressed="{}"', "true" if place == arrived.explained else "false")
        classes, label = "coar-token" + (" coar-hit" if hit else ""), f"explain token {place}, {words[place]}"
        shown.append(button("token", place, words[place], classes, label, pressed))
    every = button("token", -1, "Explain all tokens", "coar-small") if arrived.explained >= 0 else ""
    said = note("Click a token to explain it alone; underlined: the token that the model expects.")
    return html('<div><div class="coar-text">{}</div>{}{}</div>', joined(shown), said, every)


def _noise(source: Source, arrived: Arrived) -> list[Html]:
    """Standard error and reliability, now and by round."""
    if not arrived.errors:
        return [figure("–", "standard errors come from the second round on")]
    said = [(f"± {arrived.errors[-1]:.2g}", f"typical standard error, {source.unit}", arrived.errors)]
    if arrived.reliabilities:
        last = f"{arrived.reliabilities[-1]:.3f}"
        said.append((last, "reliability (1: another seed agrees)", arrived.reliabilities))
    return [figure(html("{} {}", value, drawing.line(series)), name) for value, name, series in said]
