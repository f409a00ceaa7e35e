"""How attributions look: in two lines of text, and in a notebook. Nothing here is read but a few rows."""

import html
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_coar.storage import cards, labels
from hf_coar.storage.texts import and_more, count

if TYPE_CHECKING:
    from hf_coar.attributions.attributions import Attributions
    from hf_coar.attributions.looking import Part

_AVERAGED = 64  # examples, evenly spaced
_STRIPS = 160  # cells of the strip; more layers than that are nothing to look at
_LABELS = 12
_BLUE, _ORANGE = "0,114,178", "213,94,0"


def fidelity(attributions: "Attributions") -> str:
    """What was found on fresh masks, such as `correlation 0.885 at 5 %, 0.932 at 1.25 % ablated`; "" if nothing was."""
    figures = (attributions.evaluation or {}).get("fractions", ())
    said = [
        f"{entry['correlation']:.3f} at {100 * entry['ablated_fraction']:.3g} %"
        for entry in figures
        if entry.get("correlation") is not None
    ]
    return f"correlation {', '.join(said)} ablated" if said else ""


def accuracy(attributions: "Attributions") -> float | None:
    """The share of examples that the model gets right with everything in place; None where that is not known."""
    boundary, forecast = attributions.provenance.boundary, attributions.forecast
    if boundary is None or forecast is None:
        return None
    return float((forecast.unablated > boundary).float().mean())


def label_counts(attributions: "Attributions") -> list[tuple[str, int]]:
    """How many examples have which label, the most frequent first; none where there are no labels."""
    counts = Counter(attributions.labels.tolist())
    return [(labels.label_name(attributions.provenance, one), n) for one, n in counts.most_common() if one >= 0]


def examples_text(attributions: "Attributions") -> str:
    """What the examples are, such as `200; Bag 18, Coat 16 and 8 more; 91.5 % right with everything in place`."""
    counts, right, said = label_counts(attributions), accuracy(attributions), [f"{len(attributions):,}"]
    if counts:
        said.append(", ".join(f"{name} {n:,}" for name, n in counts[:_LABELS]) + and_more(len(counts), _LABELS))
    said += [] if right is None else [f"{100 * right:.1f} % right with everything in place"]
    return "; ".join(said)


def _where(attributions: "Attributions") -> str:
    """Model and data, the latter where they have a name."""
    of = attributions.provenance
    return " on ".join(filter(None, [cards.short_name(of.model), cards.public_name(of.data)]))


def attributions_text(attributions: "Attributions") -> str:
    """Two lines: sizes and output; model, data and fidelity."""
    of = attributions.provenance
    where = _where(attributions)
    n, said = len(attributions), fidelity(attributions) or "not evaluated yet"
    sizes = f"{n:,} examples × {len(attributions.components):,} components"
    return f"Attributions({sizes}, output {of.output!r} ({of.unit_text}),\n             {where}, {said})"


def part_text(part: "Part") -> str:
    """Two lines: what it is, and the strongest components."""
    n, m = part.shape
    of = f"example {part.rows[0]}{f', {part.labels[0]}' if part.labels[0] else ''}" if n == 1 else f"{n:,} examples"
    head = f"Part({of} × {count(m, 'component')}"
    if not n or not m:
        return f"{head})"
    rows = part.top(min(3, m))
    return f"{head},\n     strongest: {', '.join(f'{row.name} {row.weight:+.3g}' for row in rows)})"


def attributions_html(attributions: "Attributions") -> str:
    """What a notebook shows: what it is, label counts, fidelity, a strip of layers, the strongest components."""
    of, n = attributions.provenance, len(attributions)
    part = attributions[evenly(n, _AVERAGED)]
    facts = [f"{n:,} examples × {len(attributions.components):,} components", f"output {of.output} ({of.unit_text})"]
    facts.append(fidelity(attributions) or "not evaluated yet: coar.evaluate(attributions, model, data)")
    right = accuracy(attributions)
    facts += [] if right is None else [f"right on {100 * right:.1f} % of the examples"]
    counts = label_counts(attributions)
    said = " · ".join(f"{name} {n}" for name, n in counts[:_LABELS]) + and_more(len(counts), _LABELS)
    lines = [
        f"<b>Attributions</b> {html.escape(_where(attributions))}",
        *map(html.escape, facts),
        *([html.escape(said)] if said else []),
    ]
    return f"<div>{'<br>'.join(lines)}{_strip(part)}{part.top(5)._repr_html_()}</div>"


def part_html(part: "Part") -> str:
    """What a notebook shows of a part."""
    if not all(part.shape):
        return html.escape(part_text(part))
    return f"<div>{_strip(part)}{part.top(10)._repr_html_()}</div>"


def evenly(n_examples: int, most: int) -> list[int]:
    """At most so many of the examples, evenly spread."""
    most = min(n_examples, most)
    return [i * n_examples // most for i in range(most)]


def _strip(part: "Part") -> str:
    """A cell a layer, in the order of the network: the sum of its weights, blue where positive."""
    components = part.attributions.components
    full, index = components.regroup("layer")
    index = index[part.components]
    totals = torch.zeros(len(full)).index_add_(0, index, part.weights.mean(0))
    present = sorted(set(index.tolist()))
    if not 1 < len(present) <= _STRIPS:
        return ""
    names, largest = components.names.of("layer"), float(totals.abs().max()) or 1.0
    cells = "".join(_cell(names[i], full[i], totals[i], largest) for i in present)
    first, last = (html.escape(names[i]) for i in (present[0], present[-1]))
    ends = "<span style='display:flex;justify-content:space-between;font-size:80%'>"
    ends += f"<span>{first}</span><span>{last}</span></span>"
    return f"<div style='max-width:40em;margin:.5em 0'><div style='display:flex;height:1.4em'>{cells}</div>{ends}</div>"


def _cell(name: str, full: str, total: Tensor, largest: float) -> str:
    colour, strength = _BLUE if total >= 0 else _ORANGE, 0.08 + 0.92 * abs(float(total)) / largest
    said = html.escape(f"{name} ({full}): {float(total):+.3g}", quote=True)
    return f"<span title=\"{said}\" style='flex:1;background:rgba({colour},{strength:.2f})'></span>"
