"""Report pages: what a run found on one page, `report.html`, which needs nothing else, and `report.md` with pictures.

The pages are for people; what programs want is in `config.json` and `evaluation.json`. Without matplotlib they have the
numbers alone.
"""

import base64
import html
import io
import logging
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files as resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import torch

from hf_coar import plots
from hf_coar.attributions import Attributions, artefact, labelled, looks
from hf_coar.data import showing
from hf_coar.errors import CoarError
from hf_coar.judging.evaluation import Report
from hf_coar.plots.canvas import Figure
from hf_coar.storage import cards, files, folders, labels
from hf_coar.storage.escaping import for_markdown
from hf_coar.storage.texts import first_few
from hf_coar.storage.versions import version_of

logger = logging.getLogger(__name__)

PAGE, MARKDOWN = "report.html", "report.md"

_AVERAGED = 256  # examples, evenly spaced, that means over examples are taken of; a picture needs no more
_TOP = 12  # components in the table
_WORST = 5  # examples
_QUOTED = 400  # letters of an example
_ROWS = 90  # more layers than this make a picture that nobody reads

Draw = Callable[[], Figure]


@dataclass(frozen=True)
class _Table:
    """Rows of text; columns in `numbers` are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class _Section:
    title: str
    text: str = ""
    tables: Sequence[_Table] = ()
    pictures: Mapping[str, tuple[str, Draw]] = field(default_factory=dict)  # name -> (what it shows, how to draw it)
    code: str = ""


def write(
    folder: str | Path, attributions: Attributions, evaluation: Report | None = None, data: Iterable | None = None
) -> Path:
    """Write `report.html`, `report.md` and `pictures/`.

    Args:
        folder: for the pages; those of an earlier run are replaced.
        attributions: what the pages are of.
        evaluation: from `evaluate`; without it, the figures (not the pictures) of `attributions.evaluation`, if any.
        data: the examples, to show the first of them.

    Returns:
        The path of `report.html`.

    Raises:
        CoarError: the folder holds other things, or cannot be written.
    """
    folder = folders.claim(folder, folders.ATTRIBUTIONS)
    sections = [section for section in _sections(attributions, evaluation, data) if section is not None]
    drawn = _drawn(folder / artefact.PICTURES, sections)
    files.write_bytes(folder / MARKDOWN, _markdown(attributions, evaluation, sections, drawn).encode())
    files.write_bytes(folder / PAGE, _html(attributions, evaluation, sections, drawn).encode())
    return folder / PAGE


def write_first(folder: str | Path, attributions: Attributions, data: Iterable | None = None) -> None:
    """`write`, unless the folder has a page with an evaluation on it: a run that is repeated gives the same numbers."""
    folder = Path(folder)
    if not ((folder / PAGE).is_file() and (folder / artefact.EVALUATION).is_file()):
        write(folder, attributions, data=data)


# --------------------------------------------------------------------------------------------------------- what is said


def _title(attributions: Attributions) -> str:
    return f"Attributions of {cards.short_name(attributions.provenance.model)}"


def _subtitle(attributions: Attributions) -> str:
    data = attributions.provenance.data
    name = cards.public_name(data) or "batches of tensors"
    return name + (f", split {data['split']}" if data.get("split") else "")


def _tiles(attributions: Attributions, evaluation: Report | None) -> list[tuple[str, str]]:
    provenance, stability = attributions.provenance, attributions.stability()
    tiles = [
        ("examples", f"{len(attributions):,}"),
        ("components", f"{len(attributions.components):,}"),
        ("output", str(provenance.output)),
        ("passes an example", "unknown" if provenance.cost is None else f"{provenance.cost:g}"),
    ]
    right = looks.accuracy(attributions)
    tiles += [] if right is None else [("right, all in place", f"{100 * right:.1f} %")]
    tiles += [] if stability is None else [("reliability", f"{stability:.3f}")]
    checked = provenance.checked or {}
    if isinstance(left := checked.get("decisions"), int | float) and provenance.ablated_fraction:
        tiles.append((f"decisions kept, {100 * provenance.ablated_fraction:.3g} % ablated", f"{left:.0%}"))
    for entry in _figures(attributions, evaluation):
        name = f"correlation, {100 * entry['ablated_fraction']:.3g} % ablated"
        tiles.append((name, _number(entry["correlation"], ".3f")))
    return tiles


def _figures(attributions: Attributions, evaluation: Report | None) -> Sequence[Mapping[str, Any]]:
    found = evaluation.to_json() if evaluation is not None else attributions.evaluation or {}
    return found.get("fractions", ())


def _sections(
    attributions: Attributions, evaluation: Report | None, data: Iterable | None
) -> Iterator[_Section | None]:
    yield _warned(attributions)
    yield _fidelity(attributions, evaluation)
    yield _where(attributions)
    yield _one_example(attributions, data)
    yield _left_out(attributions)
    yield _settings(attributions)
    yield _next(attributions, bool(_figures(attributions, evaluation)))


def _warned(attributions: Attributions) -> _Section | None:
    """What a person must know first."""
    rows = [[line] for line in attributions.provenance.warnings]
    return _Section("Take care", "", [_Table(["what, and what to do"], rows, frozenset())]) if rows else None


def _fidelity(attributions: Attributions, evaluation: Report | None) -> _Section | None:
    """Predicted against measured."""
    figures = _figures(attributions, evaluation)
    if not figures:
        return None
    rows = [
        [
            f"{100 * entry['ablated_fraction']:.3g} %",
            _number(entry["correlation"], ".3f"),
            "–".join(_number(end, ".3f") for end in entry["interval"]),
            _number(entry["slope"], ".2f"),
        ]
        for entry in figures
    ]
    tables = [_Table(["ablated", "correlation", "95 % interval", "slope"], rows, frozenset({0, 1, 2, 3}))]
    pictures: dict[str, tuple[str, Draw]] = {}
    if evaluation is not None:
        for fraction in list(evaluation.correlation)[:2]:
            name = "predicted_against_measured" + (f"_{fraction:g}" if pictures else "")
            pictures[name] = (
                f"predicted against measured outputs, {100 * fraction:.3g} % ablated",
                lambda fraction=fraction: plots.predicted_against_measured(
                    evaluation, fraction, attributions.provenance.unit or "its own unit"
                ),
            )
        if len(evaluation.correlation) > 2:
            pictures["correlation_by_fraction"] = (
                "correlation by ablated fraction",
                lambda: plots.correlation_by_fraction(evaluation),
            )
        tables += _worst(attributions, evaluation)
    text = (
        "Random sets of components that no fit has seen were ablated. Correlation: of predicted and measured outputs "
        "over these sets, mean over the examples; the interval is a bootstrap over the examples. Slope: of measured on "
        "predicted outputs; 1 = the scale is right."
    )
    return _Section("Predicted against measured", text, tables, pictures)


def _worst(attributions: Attributions, evaluation: Report) -> list[_Table]:
    """The examples that are predicted worst, if there are many more than these."""
    fraction, values = next(iter(evaluation.per_example.items()))
    if len(values) < 3 * _WORST:
        return []
    order = [index for index in values.argsort().tolist() if not values[index].isnan()][:_WORST]
    rows = [[str(index), labelled.label_name(attributions, index), f"{values[index]:.3f}"] for index in order]
    head = ["example", "label", "correlation"]
    caption = f"The examples that are predicted worst, {100 * fraction:.3g} % ablated"
    return [_Table(head, rows, frozenset({0, 1, 2}), caption)]


def _where(attributions: Attributions) -> _Section:
    """Which layers and components contribute."""
    n_examples = len(attributions)
    some = looks.evenly(n_examples, _AVERAGED)
    sizes, means = (attributions.matrix().mean(some, of) for of in (torch.abs, torch.positive))
    errors = None
    if attributions.has_standard_errors:
        errors = attributions.matrix("standard_errors").mean(some, torch.square).sqrt()
    rows = []
    for index in sizes.argsort(descending=True, stable=True)[:_TOP].tolist():
        error = [] if errors is None else [f"{errors[index]:.3g}"]
        rows.append([attributions.components.names.name(index), f"{sizes[index]:.3g}", f"{means[index]:+.3g}", *error])
    head = ["component", "mean |attribution|", "mean attribution", *([] if errors is None else ["standard error"])]
    layers, index = attributions.components.regroup("layer")
    modules = {(group.module, group.kind) for group in attributions.components.groups}
    pictures: dict[str, tuple[str, Draw]] = {}
    if len(layers) > 1 and len(modules) > len(layers):
        pictures["contribution_heat_map"] = (
            "contribution by layer and kind of module",
            lambda: plots.contribution_heat_map(attributions, some),
        )
    if len(modules) <= _ROWS:
        pictures["contribution_by_layer"] = (
            "contribution by module",
            lambda: plots.contribution_by_layer(attributions, some),
        )
    text = (
        f"In {attributions.provenance.unit_text}; a positive attribution means that keeping the component raises the "
    )
    text += "output. "
    text += "Means are over all examples." if len(some) == n_examples else f"Means are over {len(some)} examples."
    return _Section("Where it comes from", text, [_Table(head, rows, frozenset({1, 2, 3}))], pictures)


def _one_example(attributions: Attributions, data: Iterable | None) -> _Section:
    label, looks_like = labelled.label_name(attributions, 0), _looks_like(attributions, data)
    text = "The first example" + (f", {label}" if label else "")
    quoted = isinstance(looks_like, str)
    text += f": “{textwrap.shorten(looks_like, _QUOTED, placeholder=' …')}”" if quoted else "."
    pictures = {
        "top_components_0": ("the largest attributions to example 0", partial(plots.top_components, attributions, 0))
    }
    if looks_like is not None and not quoted:
        pictures = {artefact.FIRST_EXAMPLE: ("example 0", partial(plots.example, looks_like)), **pictures}
    return _Section("One example", text, pictures=pictures)


def _looks_like(attributions: Attributions, data: Iterable | None) -> Any:
    """The example of the first row as an image or a text, or None."""
    try:
        return None if data is None else showing.shown(data, attributions.places[0])
    except Exception as error:  # whatever reading a data set again may raise: a picture is not worth the run
        logger.warning("the first example is not in the report, since it could not be read again: %r", error)
        return None


def _left_out(attributions: Attributions) -> _Section | None:
    reasons = attributions.components.tree_json()["skipped"]
    if not reasons:
        return None
    rows = []
    for entry in reasons:
        rows.append([entry["reason"], first_few(entry["modules"], 4), f"{entry['weights']:,}"])
    return _Section("Left out", "", [_Table(["why", "modules", "parameters"], rows, frozenset({2}))])


def _settings(attributions: Attributions) -> _Section:
    """What determines the numbers."""
    of = attributions.provenance
    model, data = of.model, of.data
    said = {
        "model": _joined(cards.short_name(model), model.get("revision"), model.get("class"), model.get("library")),
        "fingerprint of its weights": str(model.get("fingerprint"))[:16],
        "data": _joined(cards.public_name(data), data.get("revision"), data.get("split")) or "batches of tensors",
        "examples": looks.examples_text(attributions),
        "granularity": attributions.components.granularity,
        "what stands in for ablated ones": str(attributions.components.stand_in or "zero"),
        "output": f"{of.output}, in {of.unit_text}",
        "method": _joined(*(f"{key} {value}" if key != "name" else str(value) for key, value in of.method.items())),
        "ablated fraction": "" if of.ablated_fraction is None else f"{100 * of.ablated_fraction:g} %",
        "precision": of.dtype or "",
        "seed": "" if of.seed is None else str(of.seed),
        "versions": _joined(*(f"{name} {number}" for name, number in of.versions.items())),
    }
    return _Section("How it was made", "", [_Table(["setting", "value"], [[k, v] for k, v in said.items() if v])])


def _next(attributions: Attributions, evaluated: bool) -> _Section:
    """What to do with it."""
    lines = [
        "import hf_coar as coar",
        "",
        'attributions = coar.Attributions.from_pretrained("FOLDER")  # where this page lies',
        "attributions.weights  # [examples, components]",
        "attributions.predict(kept)  # outputs with the components outside kept ablated",
    ]
    lines += [] if evaluated else ["", "# in a shell: hf-coar evaluate FOLDER"]
    label = labelled.label_name(attributions, 0)
    known = label in labels.label_names(attributions.provenance)
    target = shlex.quote(f"label={label}") if known else "label=3"
    lines += [f"# in a shell: hf-coar edit FOLDER --decrease {target} --out edited"]
    return _Section("What next", code="\n".join(lines))


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def _number(value: float | None, form: str) -> str:
    return "undefined" if value is None else format(value, form)


# ------------------------------------------------------------------------------------------------------------- pictures


def _drawn(folder: Path, sections: Sequence[_Section]) -> dict[str, bytes]:
    """Every picture as SVG, and in the folder as PNG; without matplotlib there are none."""
    found: dict[str, bytes] = {}
    if find_spec("matplotlib") is None:
        return found
    for section in sections:
        for name, (_, draw) in section.pictures.items():
            try:
                figure = draw()
                plots.save(figure, folder / f"{name}.png")
                figure.set_layout_engine("none")  # as it is laid out now, which takes a third of the time of drawing
                found[name] = _svg(figure, name)
            except CoarError:
                raise
            except Exception as error:  # the attributions are saved; a picture is not worth the run
                logger.warning("the picture %s of the report could not be drawn: %r", name, error)
    return found


def _svg(figure: Figure, name: str) -> bytes:
    """The figure as SVG, the same bytes every time."""
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the ids in it are random otherwise
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def _without_pictures(drawn: Mapping[str, bytes]) -> str:
    return "" if drawn else 'Pictures need matplotlib: pip install "hf_coar[plots]", and run the same command again.'


# --------------------------------------------------------------------------------------------------------------- pages


def _html(
    attributions: Attributions, evaluation: Report | None, sections: Sequence[_Section], drawn: Mapping[str, bytes]
) -> str:
    text = html.escape
    tiles = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in _tiles(attributions, evaluation)
    )
    body = [f'<dl class="tiles">{tiles}</dl>']
    if _without_pictures(drawn):
        body.append(f"<p>{text(_without_pictures(drawn))}</p>")
    for section in sections:
        pictures = {name: what for name, (what, _) in section.pictures.items() if name in drawn}
        if not (section.tables or section.code or pictures):
            continue
        body.append(f"<h2>{text(section.title)}</h2>")
        body += [f"<p>{text(section.text)}</p>"] if section.text else []
        body += [_html_table(table) for table in section.tables]
        images = [
            f'<figure><img alt="{text(what)}" src="data:image/svg+xml;base64,{base64.b64encode(drawn[name]).decode()}">'
            "</figure>"
            for name, what in pictures.items()
        ]
        body += [f'<div class="figures">{"".join(images)}</div>'] if images else []
        body += [f"<pre><code>{text(section.code)}</code></pre>"] if section.code else []
    template = (resources("hf_coar.storage") / "templates" / "report.html.template").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=text(_title(attributions)),
        subtitle=text(_subtitle(attributions)),
        body="\n".join(body),
        version=version_of("hf_coar"),
    )


def _html_table(table: _Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if place in table.numbers else "" for place in range(len(cells))]
        inner = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{inner}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="scroll"><table>{caption}{row(table.head, "th")}{rows}</table></div>'


def _markdown(
    attributions: Attributions, evaluation: Report | None, sections: Sequence[_Section], drawn: Mapping[str, bytes]
) -> str:
    tiles = _Table(["", ""], [list(tile) for tile in _tiles(attributions, evaluation)])
    parts = [f"# {for_markdown(_title(attributions))}", for_markdown(_subtitle(attributions)), _markdown_table(tiles)]
    parts += [_without_pictures(drawn)]
    for section in sections:
        pictures = [
            f"![{for_markdown(what)}]({artefact.PICTURES}/{name}.png)"
            for name, (what, _) in section.pictures.items()
            if name in drawn
        ]
        if section.tables or section.code or pictures:
            parts += [
                f"## {section.title}",
                for_markdown(section.text),
                *map(_markdown_table, section.tables),
                *pictures,
            ]
            parts += [f"```python\n{section.code}\n```"] if section.code else []
    parts.append(f"Made by hf_coar {version_of('hf_coar')}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: _Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(for_markdown, cells))} |"

    ruler = ["--:" if place in table.numbers else "---" for place in range(len(table.head))]
    caption = [f"{for_markdown(table.caption)}:", ""] if table.caption else []
    return "\n".join([*caption, row(table.head), f"| {' | '.join(ruler)} |", *map(row, table.rows)])
