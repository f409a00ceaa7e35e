"""What a unit does: the examples, and the places in them, where it acts strongest.

How strongly a component acts at a place is the size of what it writes there, which is what ablating it takes away: of a
filter or neuron its output without the bias, of a head or an input feature the length of its part of what the module
reads. One pass over the attributed examples tells it of all components at once, and of every example the strongest
place is kept.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.components import Group
from hf_coar.data.showing import image_of
from hf_coar.explore import drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.drawing import Html, button, heading, html, joined, note
from hf_coar.explore.source import Source
from hf_coar.models.calling import forward_names

SHOWN = 8  # examples
_CONTEXT = 9  # tokens on either side of the strongest
_MOST_NUMBERS = 2**24  # that are kept: 128 MB
_MOST_EXAMPLES = 256
_SMALLEST_BOX = 0.12  # of an image, so that a place can be seen


@dataclass(frozen=True)
class Acts:
    """How strongly every component acts on some examples.

    Attributes:
        rows: the examples.
        strength: float32 [examples, components]; NaN where it cannot be told.
        place: int32 [examples, components], the strongest place, in the module's own order of places; of texts among
            the tokens that are no padding, those of a second text after the first one's.
        shapes: by group, the shape of its places: () for none, (tokens,) or (height, width).
    """

    rows: list[int]
    strength: Tensor
    place: Tensor
    shapes: list[tuple[int, ...] | None]


def of(source: Source, progress: Progress = no_progress) -> Acts:
    """Measured once a source; later calls give what is known."""
    with source.lock:
        if source.acts is None:
            source.acts = _measured(source, progress)
        return source.acts


def _measured(source: Source, progress: Progress) -> Acts:
    components, n = source.components, len(source)
    n_rows = max(1, min(n, _MOST_EXAMPLES, _MOST_NUMBERS // len(components)))
    rows = sorted({i * n // n_rows for i in range(n_rows)})
    strength = torch.full((len(rows), len(components)), torch.nan)
    place, shapes = torch.zeros(strength.shape, dtype=torch.int32), [None] * len(components.groups)
    done = 0
    for chunk in source.chunks(rows):
        batch = source.batch(chunk)
        texts = _texts(source, batch)
        there = slice(done, done + len(chunk))
        with _watched(source.model, components.groups) as seen:
            source.run(batch)
        for number, (group, start, stop) in enumerate(components.spans()):
            found = _of_runs(group, seen.get(number, []), texts, len(chunk))
            if found is not None:
                strength[there, start:stop], place[there, start:stop], shapes[number] = found
        done += len(chunk)
        progress(done / len(rows), f"watching the units: {done} of {len(rows)} examples")
    return Acts(rows, strength, place, shapes)


@contextmanager
def _watched(model: nn.Module, groups: Sequence[Group]) -> Iterator[dict[int, list[Tensor]]]:
    """What every group's module reads or writes in the passes inside the block, by the group's number."""
    seen: dict[int, list[Tensor]] = {}
    handles, modules = [], dict(model.named_modules())
    try:
        for number, group in enumerate(groups):
            module = modules.get(group.module) if group.site in ("output", "input") else None
            if module is not None:
                handles.append(module.register_forward_hook(_note(seen, number, group), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: dict[int, list[Tensor]], number: int, group: Group) -> Any:
    def note(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        value = result if group.site == "output" else next(iter((*args, *kwargs.values())), None)
        value = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        value = value.detach()
        bias = getattr(module, "bias", None)
        if group.site == "output" and isinstance(bias, Tensor) and bias.dim() == 1 and group.feature_axis < 0:
            shape = [1] * value.dim()
            shape[group.feature_axis] = len(bias)
            value = value - bias.detach().view(shape) if value.shape[group.feature_axis] == len(bias) else value
        seen.setdefault(number, []).append(value)

    return note


def _texts(source: Source, batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a batch holds for each run of the model: one entry, or two of pairs, whose second has names of its own."""
    own = set(forward_names(source.model)[0])
    starts = [name.removesuffix("input_ids") for name in batch if name.endswith("input_ids") and name not in own]
    cut = {start: {n.removeprefix(start): v for n, v in batch.items() if n.startswith(start)} for start in starts}
    return [batch, *cut.values()]


def _of_runs(
    group: Group, seen: Sequence[Tensor], texts: Sequence[Mapping[str, Any]], count: int
) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """`_strongest` over all runs of the model; the tokens of a second text are counted on from the first one's."""
    runs, left = divmod(len(seen), len(texts))
    if not runs or left or len(texts) == 1:
        return _strongest(group, seen[-1] if seen else None, texts[0], count)
    each = zip(seen[runs - 1 :: runs], texts, strict=True)  # the last of a module that a run uses several times
    found = [_strongest(group, value, text, count) for value, text in each]
    if any(one is None for one in found):
        return None
    strength, which = torch.stack([one[0] for one in found]).max(0)
    masks = [text.get("attention_mask") for text in texts]
    if not all(isinstance(mask, Tensor) and one[2] == mask.shape[1:] for mask, one in zip(masks, found, strict=True)):
        return strength, torch.zeros_like(which, dtype=torch.int32), ()
    before = torch.stack([mask.sum(1).cpu() for mask in masks]).cumsum(0).roll(1, 0)
    before[0] = 0
    places = torch.stack([one[1] for one in found]) + before[..., None]
    return strength, places.gather(0, which[None])[0].int(), (sum(mask.shape[1] for mask in masks),)


def _strongest(
    group: Group, value: Tensor | None, batch: Mapping[str, Any], count: int
) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Strength and place of a group's components, [examples, components], and the shape of the places."""
    if value is None or value.dim() < 2 or value.shape[0] % count:
        return None
    value = value.float().movedim(group.feature_axis, -1)
    spatial = tuple(value.shape[1:-1]) if value.shape[0] == count else (-1,)
    value = value.reshape(count, -1, value.shape[-1])  # examples, places, features
    per = value.shape[-1] // group.size
    if not per or group.size * per != value.shape[-1]:
        return None  # several matrices in one output
    value = value.abs() if per == 1 else value.unflatten(-1, (group.size, per)).norm(dim=-1)
    attended = batch.get("attention_mask")
    if isinstance(attended, Tensor) and attended.shape == value.shape[:2]:
        value = value.masked_fill(~attended.bool().to(value.device)[..., None], 0.0)
    strength, place = value.max(1)
    if isinstance(attended, Tensor) and attended.shape == value.shape[:2]:
        place = (attended.long().cumsum(1).to(place.device) - 1).clamp_min(0).gather(1, place)  # among those attended
    # Windows, or tokens of all examples in one list: which place it is does not tell where.
    known = value.shape[:2] == (attended.shape if isinstance(attended, Tensor) else None)
    shape = (value.shape[1],) if spatial == (-1,) and known else () if spatial == (-1,) else spatial
    return strength.cpu(), place.cpu().int(), shape


# ------------------------------------------------------------------------------------------------------------ as shown


def strongest(source: Source, component: int, progress: Progress = no_progress) -> Html:
    """The examples on which a component acts strongest, each with the place."""
    found = of(source, progress)
    order = ranked(found, component)
    title = heading("Where it acts strongest")
    if not order:
        return title + note("the module does not show what this component writes; its weights are below")
    shape = shape_of(source, component)
    cards = joined(_card(source, found, component, at, shape) for at in order)
    said = f"what ablating it takes away is largest here, of {len(found.rows):,} examples"
    classes = " coar-texts" if source.kind != "image" else ""
    return joined([title, note(said), html('<div class="coar-cards coar-acts{}">{}</div>', classes, cards)])


def ranked(found: Acts, component: int, most: int = SHOWN) -> list[int]:
    """Places in `found.rows` of the examples on which a component acts strongest."""
    strength = found.strength[:, component]
    if not bool(strength.isfinite().all()) or not float(strength.max()) > 0:
        return []
    return strength.topk(min(most, len(strength))).indices.tolist()


def shape_of(source: Source, component: int) -> tuple[int, ...]:
    """The shape of the places that a component acts at."""
    number = next(i for i, (_, _, stop) in enumerate(source.components.spans()) if component < stop)
    return source.acts.shapes[number] or ()


def _card(source: Source, found: Acts, component: int, at: int, shape: tuple[int, ...]) -> Html:
    row, place = found.rows[at], int(found.place[at, component])
    label = source.label(row)
    said = html('<span class="coar-said"><span class="coar-faint">{}</span> {}</span>', row,
                source.class_name(label) if label >= 0 else "")  # fmt: skip
    return button("example", row, joined([seen(source, row, place, shape), said]), "coar-card", f"example {row}")


def seen(source: Source, row: int, place: int, shape: tuple[int, ...]) -> Html:
    """An example with a place marked: a box on the picture, or a token in its context."""
    picture = as_seen(source, row)
    shown = None if picture is None else drawing.thumbnail(picture, 128)
    if shown is not None:
        return html('<span class="coar-seen">{}{}</span>', shown, _box(box(place, shape)))
    words, at = tokens(source, row, place, shape)
    if not words:
        return html("")
    marked = joined(html('<mark class="coar-here">{}</mark>', w) if i == at else w for i, w in enumerate(words))
    return html('<span class="coar-context">{}</span>', marked)


def as_seen(source: Source, row: int) -> Any:
    """An example's image as the model sees it, cut and scaled, so that places in it are where they are; or None."""
    pixels = source.batch([row]).get("pixel_values")
    return image_of(pixels[0]) if isinstance(pixels, Tensor) and pixels.dim() == 4 else None


def box(place: int, shape: tuple[int, ...]) -> tuple[float, float, float, float] | None:
    """Left, top, width and height of a place on an image, as fractions; None where it is nowhere, or everywhere.

    Tokens of an image are the cells of a square, with others (a class token) before them.
    """
    if len(shape) == 1:
        side = math.isqrt(shape[0])
        place, shape = place - (shape[0] - side * side), (side, side)
    if len(shape) != 2 or place < 0 or shape[0] * shape[1] <= 1:
        return None
    sizes = [max(_SMALLEST_BOX, 1 / n) for n in shape]
    centres = [(place // shape[1] + 0.5) / shape[0], (place % shape[1] + 0.5) / shape[1]]
    top, left = (min(max(c - s / 2, 0.0), 1 - s) for c, s in zip(centres, sizes, strict=True))
    return left, top, sizes[1], sizes[0]


def _box(where: tuple[float, float, float, float] | None) -> Html:
    if where is None:
        return html("")
    style = "left:{:.1f}%;top:{:.1f}%;width:{:.1f}%;height:{:.1f}%".format(*(100 * x for x in where))
    return html('<span class="coar-box" style="{}"></span>', style)


def _attended(text: Mapping[str, Any]) -> list[int]:
    """The tokens of the first example that are no padding; none where there are no tokens."""
    ids, mask = text.get("input_ids"), text.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return []
    known = isinstance(mask, Tensor) and mask.shape == ids.shape
    return (ids[0][mask[0].bool()] if known else ids[0]).tolist()


def tokens(source: Source, row: int, place: int, shape: tuple[int, ...]) -> tuple[list[str], int]:
    """The tokens around a place as text, and which of them it is; nothing where there are none, -1 where it is none."""
    each = [_attended(text) for text in _texts(source, source.batch([row]))]
    ids = each[0]
    while len(shape) == 1 and len(each) > 1 and place >= len(ids):  # it lies in the next text
        place, each = place - len(ids), each[1:]
        ids = each[0]
    if len(shape) != 1 or not 0 <= place < len(ids):
        return source.words(ids[: 2 * _CONTEXT]), -1
    first = max(0, place - _CONTEXT)
    words = source.words(ids[first : place + _CONTEXT + 1])
    return words, place - first
