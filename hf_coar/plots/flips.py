"""The examples that an edit has changed the answer to: images side by side, texts one under the other."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_coar.data import showing
from hf_coar.editing.tasks import EditResult
from hf_coar.editing.tasks.judged import Judged
from hf_coar.errors import CoarError, check_count
from hf_coar.plots import canvas
from hf_coar.plots.canvas import Figure

_ACROSS, _SIDE = 8, 0.86  # images in a row, and inches of each with its margin
_LETTERS, _LINES = 112, 2  # of a text
_HEAD, _CAPTION, _LINE = 0.34, 0.36, 0.17  # inches of height

Show = Callable[[int], Any]  # an example's index in the data -> an image, or a text


@dataclass(frozen=True)
class _Section:
    """Examples under one heading: whether they turned out well, and (image or text, before, after) of each."""

    heading: str
    colour: str
    shown: Sequence[tuple[Any, str, str]]

    @property
    def pictures(self) -> bool:
        return not any(isinstance(content, str) for content, _, _ in self.shown)

    @property
    def height(self) -> float:
        """Inches."""
        if self.pictures:
            return _HEAD + -(-len(self.shown) // _ACROSS) * (_SIDE + _CAPTION)
        return _HEAD + sum(_LINE * (len(_wrapped(text)) + 0.5) for text, _, _ in self.shown)


def flips(result: EditResult, most: int = _ACROSS, show: Show | None = None, tokenizer: Any = None) -> Figure:
    """The examples whose answer an edit has changed: from wrong to right, and from right to wrong.

    Of those to judge on, the ones that the edit is for apart from the others. Where no answer is right or wrong, those
    whose output moved most.

    Args:
        result: of `coar.forget`, `fix`, `lift`, `match` or `steer`.
        most: examples under each heading, spread over all that there are.
        show: (index of an example in the data) -> an image or a text; by default the image or text of the data set,
            the pixels that the model was given, or its tokens.
        tokenizer: turns tokens into text; the model's own by default, where its files are at hand.

    Raises:
        CoarError: no answer changed, nothing that can be shown, or no matplotlib.
    """
    check_count(most, "most")
    read = _Reader(result, show, tokenizer)
    sections, counts = [], [0, 0]
    for judged in result.judged:
        for heading, colour, places in _kinds(judged):
            if len(places):
                chosen = places[torch.linspace(0, len(places) - 1, min(most, len(places))).round().long()].tolist()
                some = "" if len(chosen) == len(places) else f", {len(chosen)} of them shown"
                shown = [(read(judged, place), *judged.change(place)) for place in chosen]
                sections.append(_Section(f"{heading}{some}", colour, shown))
                counts[colour == canvas.VERMILLION] += len(places)
    n_judged = sum(len(judged.rows) for judged in result.judged)
    if not sections:
        raise CoarError(f"no answer to any of the {n_judged:,} examples to judge on changed; there is nothing to show")
    if result.judged[0].boundary is None:
        said = f"those that moved most, of {n_judged:,} examples"
    else:
        said = f"of {n_judged:,} examples {counts[0]:,} from wrong to right and {counts[1]:,} from right to wrong"
    return _drawn(sections, f"What changed by the edit: {result.task}", said)


def _kinds(judged: Judged) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(heading, colour, places) of every kind of change, best first."""
    after = f", {judged.said}" if judged.said else ""
    for target in (True, False):
        n_all = int((judged.target == target).sum())
        who = f"{'what the edit is for' if target else 'others'}{after}"
        if judged.boundary is None:
            change = (judged.after.values - judged.before.values).abs()
            order = change.masked_fill(judged.target != target, -1).argsort(descending=True)[: min(n_all, _ACROSS)]
            yield f"{who}, before → after ({judged.unit})", canvas.INK, order
            continue
        for better in (True, False):
            places = judged.flipped(target, better)
            way = "wrong → right" if better else "right → wrong"
            colour = canvas.GREEN if better else canvas.VERMILLION
            unit = "" if judged.says_classes else f" ({judged.unit})"
            yield f"{who}, {way}: {len(places):,} of {n_all:,}{unit}", colour, places


class _Reader:
    """(part, place) -> an image or a text."""

    def __init__(self, result: EditResult, show: Show | None, tokenizer: Any) -> None:
        self.result, self.show, self.tokenizer = result, show, tokenizer

    def __call__(self, judged: Judged, place: int) -> Any:
        """What a person can look at.

        Raises:
            CoarError: nothing.
        """
        index = int(judged.rows[place])
        number = int(judged.held.numbers[index])
        if self.show is not None:
            return self.show(number)
        raw = judged.held.raw[number] if judged.held.raw is not None else {}
        if (column := showing.image_column(raw) or showing.text_column(raw)) is not None:
            return raw[column]
        batch = judged.held.at([index])[0]
        pixels = batch.get("pixel_values")
        if (image := showing.image_of(None if pixels is None else pixels[0])) is not None:
            return image
        if "input_ids" in batch:
            return self._text(batch["input_ids"][0], batch.get("attention_mask"))
        raise CoarError(
            f"the examples are neither images nor texts (entries: {', '.join(batch)}); give show=…, a function of an "
            "example's index that returns an image or a text"
        )

    def _text(self, tokens: torch.Tensor, attended: torch.Tensor | None) -> str:
        if self.tokenizer is None:
            self.tokenizer = showing.tokenizer_of(self.result.model)
        if self.tokenizer is None:
            raise CoarError("the examples are tokens and the model's tokenizer is not at hand; give tokenizer=…")
        kept = tokens if attended is None else tokens[attended[0].bool()]
        return self.tokenizer.decode(kept.flatten().tolist(), skip_special_tokens=True)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _LETTERS, max_lines=_LINES, placeholder=" …") or ["(empty)"]


def _drawn(sections: Sequence[_Section], statement: str, detail: str) -> Figure:
    width = _ACROSS * _SIDE + 0.2
    height = 0.62 + sum(section.height for section in sections)
    figure = canvas.blank(height, width)
    canvas.title(figure, statement, detail)
    top = height - 0.6
    for section in sections:
        figure.text(0.1 / width, (top - 0.2) / height, canvas.plain(section.heading), fontsize=9, color=section.colour,
                    fontweight="bold")  # fmt: skip
        (_images if section.pictures else _texts)(figure, section, top - _HEAD, (width, height))
        top -= section.height
    return figure


def _images(figure: Figure, section: _Section, top: float, size: tuple[float, float]) -> None:
    width, height = size
    for place, (image, before, after) in enumerate(section.shown):
        row, column = divmod(place, _ACROSS)
        left, bottom = 0.1 + column * _SIDE, top - row * (_SIDE + _CAPTION) - _SIDE
        axes = figure.add_axes((left / width, bottom / height, (_SIDE - 0.06) / width, (_SIDE - 0.06) / height))
        axes.imshow(image, cmap="gray" if getattr(image, "mode", "L") == "L" else None)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(section.colour)
        said = f"{canvas.shortened(before, 14)}\n→ {canvas.shortened(after, 12)}"
        axes.set_xlabel(canvas.plain(said), fontsize=6.5, color=canvas.INK, labelpad=2)


def _texts(figure: Figure, section: _Section, top: float, size: tuple[float, float]) -> None:
    width, height = size
    for text, before, after in section.shown:
        lines = _wrapped(text)
        figure.text(0.1 / width, top / height, canvas.plain("\n".join(lines)), fontsize=7.5, color="black", va="top")
        figure.text(1 - 0.1 / width, top / height, canvas.plain(f"{before} → {after}"), fontsize=7.5,
                    color=section.colour, va="top", ha="right")  # fmt: skip
        top -= _LINE * (len(lines) + 0.5)
