"""What `hf-coar show` prints: attributions as a whole, an example, a class, or a component; and the sensible whole."""

import argparse
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_coar.attributions import Attributions, looks
from hf_coar.attributions.table import aligned, decimals
from hf_coar.errors import CoarError
from hf_coar.storage import labels
from hf_coar.storage.texts import and_more

_LABELS = 12
_EXTREMES = 5  # examples on either side of a component


def show(args: argparse.Namespace) -> str:
    """Attributions in the terminal; with `--json` the same as values."""
    attributions = Attributions.from_pretrained(args.attributions)
    if args.component is not None:
        return _component(attributions, args.component, args)
    table = attributions.top(args.example, args.label, args.k, args.by)
    if args.json:
        return json.dumps(
            {**facts(attributions), "of": table.what, "unit": table.unit, "top": table.to_json()}, indent=2
        )
    return f"{overview(attributions)}\n\n{table}"


def facts(attributions: Attributions) -> dict[str, Any]:
    """What attributions are, as JSON values."""
    of = attributions.provenance
    return {
        "model": of.model.get("id"), "data": of.data.get("id"), "n_examples": len(attributions),
        "n_components": len(attributions.components), "output": of.output, "method": dict(of.method),
        "labels": dict(looks.label_counts(attributions)), "evaluation": attributions.evaluation,
    }  # fmt: skip


def overview(attributions: Attributions) -> str:
    """Sizes, labels, fidelity: some lines of text."""
    lines = [repr(attributions)]
    counts = looks.label_counts(attributions)
    if counts:
        shown = [f"{name} {n}".replace(" ", "\xa0") for name, n in counts[:_LABELS]]
        said = f"labels: {' · '.join(shown)}{and_more(len(counts), _LABELS)}"
        width = min(100, shutil.get_terminal_size((80, 24)).columns)
        lines += [line.replace("\xa0", " ") for line in textwrap.wrap(said, width, subsequent_indent="  ")]
    return "\n".join(lines)


def _component(attributions: Attributions, name: str, args: argparse.Namespace) -> str:
    """One component over all examples; or the strongest of what a layer, matrix or head holds."""
    given = int(name) if re.fullmatch(r"\d+", name) else name
    found = attributions.components.indices(given)
    if args.example is not None or args.label is not None:
        raise CoarError("--component is shown over all examples; leave out --example and --label")
    if len(found) > 1:
        table = attributions[name].top(args.k, args.by)
        return json.dumps({"of": name, "top": table.to_json()}, indent=2) if args.json else f"{name}\n{table}"
    told = component(attributions, found[0])
    if args.json:
        return json.dumps(told, indent=2)
    return _component_text(told)


def component(attributions: Attributions, index: int) -> dict[str, Any]:
    """One component over all examples, as JSON values."""
    weights = attributions.weights[:, index]
    order = weights.argsort(descending=True, stable=True).tolist()
    means = {
        labels.label_name(attributions.provenance, label): float(weights[attributions.labels == label].mean())
        for label in sorted(set(attributions.labels.tolist()) - {-1})
    }

    def entry(row: int) -> dict[str, Any]:
        label = labels.label_name(attributions.provenance, int(attributions.labels[row]))
        return {"row": row, "example": attributions.places[row], "label": label, "weight": float(weights[row])}

    return {
        "name": attributions.components.names.name(index), "component": str(attributions.components[index]),
        "index": index, "mean": float(weights.mean()), "mean_size": float(weights.abs().mean()),
        "unit": attributions.provenance.unit_text,
        "by_class": dict(sorted(means.items(), key=lambda item: -item[1])),
        "helped": [entry(row) for row in order[:_EXTREMES] if weights[row] > 0],
        "hurt": [entry(row) for row in order[::-1][:_EXTREMES] if weights[row] < 0],
    }  # fmt: skip


def _component_text(told: Mapping[str, Any]) -> str:
    digits = decimals([entry["weight"] for side in ("helped", "hurt") for entry in told[side]] or [told["mean_size"]])

    def said(value: float) -> str:
        return f"{value:+.{digits}f}".replace("-", "−")

    lines = [f"{told['name']}  ({told['component']}, number {told['index']})"]
    lines += [f"mean weight {said(told['mean'])}, mean size {told['mean_size']:.{digits}f} {told['unit']}"]
    if len(told["by_class"]) > 1:
        classes = list(told["by_class"].items())
        shown = classes if len(classes) <= 10 else [*classes[:5], *classes[-5:]]
        lines += ["", *aligned([["mean by class", "weight"], *([name, said(mean)] for name, mean in shown)])]
    for side, what in (("helped", "keeping it helps most"), ("hurt", "ablating it would help most")):
        if told[side]:
            named = [f"example {e['row']}, {e['label']}".removesuffix(", ") for e in told[side]]
            rows = [[name, said(entry["weight"])] for name, entry in zip(named, told[side], strict=True)]
            lines += ["", *aligned([[what, "weight"], *rows])]
    return "\n".join(lines)


def next_steps(attributions: Attributions, folder: str | Path) -> list[str]:
    """Commands that go on from a run."""
    where = shlex.quote(str(folder))
    counts = looks.label_counts(attributions)
    strongest = attributions.top(k=1)[0].name
    steps = [f"hf-coar show {where} --example 0", f"hf-coar show {where} --component {shlex.quote(strongest)}"]
    steps += [f"hf-coar explore {where} --open-browser", f"hf-coar explore {where} --html page.html"]
    if counts:
        steps.append(f"hf-coar edit {where} --decrease {shlex.quote(f'label={counts[0][0]}')} --out edited")
    return steps
