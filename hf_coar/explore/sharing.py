"""A page to share: one HTML file without a server or an outside request, with forecasts in plain JavaScript.

Its data are JSON in the page; the script writes texts as text, never as HTML. What was measured on the model (the claim
at its head, predictions, where units act) is measured while the page is made.
"""

import base64
import io
import json
import logging
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from string import Template
from typing import Any

from hf_coar.attributions import Attributions
from hf_coar.data.showing import image_column
from hf_coar.errors import CoarError
from hf_coar.explore import acts, claims, columns, drawing, forecasting
from hf_coar.explore.claims import Claim
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.source import Source, open_source
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output, OutputFunction
from hf_coar.storage import cards, files
from hf_coar.storage.texts import shortened
from hf_coar.storage.versions import version_of

logger = logging.getLogger(__name__)

LARGEST = 5_000_000  # bytes
_SIZES = (112, 80, 56)  # of pictures, in pixels; smaller ones where the page would be too large
_COMPONENTS = 24
_EXAMPLES = 160
_ACTS = 6  # examples beside a component
_EXTREMES = 4
_FLIPS = 12
_TOKENS = 80  # of a text
_LAYERS = 64  # rows


def share(
    attributions: str | Path | Attributions,
    path: str | Path,
    model: Any = None,
    data: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: Output | OutputFunction | None = None,
    call: Call | None = None,
) -> Path:
    """Write a page of attributions, one HTML file of 5 MB at most that needs no server.

    Args:
        attributions: folder or Hub id, or loaded.
        path: of the file, which is replaced.
        model: Hub id, folder or loaded; by default as the attributions name it.
        data: Hub id, folder or file, or loaded; by default as the attributions name it.
        revision: of the model: branch, tag or commit.
        trust_remote_code: run code that comes with the model.
        output: the attributed output; needed only if it was a function of your own.
        call: how the model was run; needed only if it was a function of your own.

    Returns:
        The path of the page.

    Raises:
        CoarError: the attributions, model or data cannot be opened, or the file cannot be written.
        ModelMismatchError: another model than was attributed.
        DataError: other data than were attributed.
    """
    if Path(path).is_dir():
        raise CoarError(f"{path} is a folder; give the name of a file, such as {Path(path) / 'page.html'}")
    return write(open_source(attributions, model, data, revision, trust_remote_code, output, call), path)


def write(source: Source, path: str | Path, progress: Progress = no_progress) -> Path:
    """Write the page.

    Args:
        source: attributions with model and data.
        path: of the file, which is replaced.
        progress: told of what takes a while.

    Returns:
        The path.

    Raises:
        CoarError: the file cannot be written, or the model cannot be run.
    """
    claim = claims.find(source, progress)
    found = acts.of(source, progress)
    sizes = source.sizes(progress)
    chosen = list(dict.fromkeys([*claim.components, *sizes.argsort(descending=True)[:_COMPONENTS].tolist()]))
    rows = _rows(source, claim, found, chosen)
    source.predictions(rows, progress)
    for size in _SIZES:
        page = _page(source, claim, found, chosen, rows, size)
        if len(page) <= LARGEST:
            break
        logger.warning("the page has %.1f MB with pictures of %d pixels; making them smaller", len(page) / 1e6, size)
    files.write_bytes(Path(path), page)
    return Path(path)


def _rows(source: Source, claim: Claim, found: acts.Acts, chosen: Sequence[int]) -> list[int]:
    """The examples on the page: evenly spaced ones, and all that something is shown of."""
    n = min(_EXAMPLES, len(source))
    rows = {i * len(source) // n for i in range(n)}
    rows |= {claim.change.rows[place] for place in claim.flipped[:_FLIPS]}
    for component in chosen:
        rows |= {found.rows[at] for at in acts.ranked(found, component, _ACTS)}
        order = columns.column(source.attributions, component).argsort().tolist()
        rows |= {*order[:_EXTREMES], *order[-_EXTREMES:]}
    return sorted(rows)


def _page(
    source: Source, claim: Claim, found: acts.Acts, chosen: Sequence[int], rows: Sequence[int], size: int
) -> bytes:
    content = {
        "about": _about(source),
        "claim": _claim(source, claim, rows),
        "layers": _layers(source),
        "components": [_component(source, found, component, rows) for component in chosen],
        "examples": [_example(source, row, size) for row in rows],
        "forecast": forecasting.arrays(source.attributions, chosen, rows),
    }
    # A text may hold `</script>`, and some separators end a line in JavaScript.
    data = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    template = (resources("hf_coar.storage") / "templates" / "share.html.template").read_text(encoding="utf-8")
    return Template(template).substitute(data=data, version=version_of("hf_coar")).encode()


def _about(source: Source) -> dict[str, Any]:
    of, evaluation = source.attributions.provenance, source.attributions.evaluation or {}
    fidelity = [
        {"fraction": entry["ablated_fraction"], "correlation": entry["correlation"], "interval": entry["interval"]}
        for entry in evaluation.get("fractions", ())
        if entry.get("correlation") is not None
    ]
    return {
        "model": cards.short_name(of.model),
        "data": cards.public_name(of.data) or "batches of tensors",
        "output": source.output.name, "unit": source.unit, "fidelity": fidelity,
        "examples": len(source), "components": len(source.components), "kind": source.kind,
        "fraction": of.ablated_fraction, "boundary": of.boundary,
    }  # fmt: skip


def _claim(source: Source, claim: Claim, rows: Sequence[int]) -> dict[str, Any]:
    place_of, cards_shown = {row: place for place, row in enumerate(rows)}, []
    for place in claim.flipped[:_FLIPS]:
        cards_shown.append({"example": place_of[claim.change.rows[place]], "said": _turned(source, claim, place)})
    return {
        "text": claim.text, "detail": claim.detail, "cards": cards_shown, "flipped": len(claim.flipped),
        "components": [source.components.names.name(i) for i in claim.components],
    }  # fmt: skip


def _turned(source: Source, claim: Claim, place: int) -> list[str]:
    """What an example was and what it turns into."""
    before, after = claim.change.before, claim.change.after
    if before.classes is not None and after.classes is not None:
        return [source.class_name(int(side.classes[place])) for side in (before, after)]
    if before.tokens:
        where = (before.tokens[place] != after.tokens[place]).nonzero().flatten().tolist()[0]
        return [repr(source.token(int(side.tokens[place][where]))) for side in (before, after)]
    values = [float(side.outputs[place]) for side in (before, after)]
    return [drawing.number(value, drawing.digits(max(map(abs, values))), False) for value in values]


def _layers(source: Source) -> list[dict[str, Any]]:
    names, sizes = source.components.names.of("layer"), source.sizes()
    _, index = source.components.regroup("layer")
    totals = sizes.new_zeros(len(names)).index_add_(0, index, sizes)
    both = list(zip(names, totals.tolist(), strict=True))[:_LAYERS]
    return [{"name": name, "total": _short(total)} for name, total in both]


def _component(source: Source, found: acts.Acts, component: int, rows: Sequence[int]) -> dict[str, Any]:
    """What a component does, whom it helps and whom it hurts; examples by their places on the page."""
    place_of = {row: place for place, row in enumerate(rows)}
    weights = columns.column(source.attributions, component)
    order, shape = weights.argsort().tolist(), acts.shape_of(source, component)
    seen = [
        {"example": place_of[found.rows[at]], **_where(source, found.rows[at], int(found.place[at, component]), shape)}
        for at in acts.ranked(found, component, _ACTS)
    ]
    return {
        "name": source.components.names.name(component), "full": str(source.components[component]),
        "mean": _short(float(weights.mean())), "size": _short(float(weights.abs().mean())), "acts": seen,
        "helped": [[place_of[i], _short(float(weights[i]))] for i in order[::-1][:_EXTREMES] if weights[i] > 0],
        "hurt": [[place_of[i], _short(float(weights[i]))] for i in order[:_EXTREMES] if weights[i] < 0],
    }  # fmt: skip


def _where(source: Source, row: int, place: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """A box on the picture, or the tokens around the place."""
    if acts.as_seen(source, row) is not None:
        box = acts.box(place, shape)
        return {} if box is None else {"box": [round(100 * x, 1) for x in box]}
    words, at = acts.tokens(source, row, place, shape)
    return {"words": words, "at": at} if words else {}


def _example(source: Source, row: int, size: int) -> dict[str, Any]:
    found, label = source.predictions([row])[0], source.label(row)
    entry: dict[str, Any] = {"row": source.attributions.places[row], "output": _short(float(found.outputs[0]))}
    entry |= {"label": source.class_name(label)} if label >= 0 else {}
    if found.classes is not None:
        entry["predicted"] = source.class_name(int(found.classes[0]))
    picture, raw = acts.as_seen(source, row), source.raw(row)
    if picture is None and image_column(raw) is not None:
        picture = raw[image_column(raw)]
    if picture is not None:
        entry |= {"picture": _uri(picture, size), "crisp": max(picture.size) < 64}
    elif texts := source.texts(row):
        entry["text"] = "\n".join(shortened(text, 4 * _TOKENS) for text in texts)
    return entry


def _uri(image: Any, size: int) -> str:
    """A small picture as the address of itself: exact where it is tiny, else JPEG."""
    small, kind = image.copy(), "PNG" if max(image.size) < 64 else "JPEG"
    small.thumbnail((size, size))
    small = small if small.mode in ("L", "RGB") else small.convert("RGB")
    written = io.BytesIO()
    small.save(written, format=kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"


def _short(value: float) -> float | None:
    """Four significant digits; None for what is no number."""
    return float(f"{value:.4g}") if value == value and abs(value) != float("inf") else None
