"""Components by layer, by module and by attention head: for totals, and as a tree to read."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_coar.errors import CoarError, NoComponentsError

if TYPE_CHECKING:
    from hf_coar.components.groups import Components, Group

BY = ("layer", "head", "module")
_GUESSED = " (guessed: which axis makes the outputs; say it with hf_coar.components.rule)"


def layer_of(names: Sequence[str]) -> dict[str, str]:
    """The layer of every module: the numbered block that it lies in, such as `encoder.layer.3` or `stages.1.blocks.0`.

    Stages that hold numbered blocks themselves are gone into, lists of experts are not. Modules outside of any numbered
    block are layers of their own.
    """
    return {name: _layer(name, names) for name in dict.fromkeys(names)}


def _layer(name: str, names: Sequence[str]) -> str:
    parts = name.split(".")
    ends = [end for end, part in enumerate(parts, start=1) if part.isdigit()]
    if not ends:
        return name
    chosen = ends[0]
    for end in ends[1:]:
        outer, container = ".".join(parts[:chosen]), ".".join(parts[: end - 1])
        inside = [other for other in names if other.startswith(f"{outer}.")]
        numbered = [other for other in inside if re.match(rf"{re.escape(container)}\.\d+(\.|$)", other)]
        if 2 * len(numbered) <= len(inside) or "expert" in container.lower() or end == len(parts):
            break
        chosen = end
    return ".".join(parts[:chosen])


def regroup(components: "Components", by: str) -> tuple[list[str], Tensor]:
    """Names of layers, modules or heads, and to which each component belongs, see `Components.regroup`."""
    if by not in BY:
        raise CoarError(f"by={by!r}; there are {', '.join(map(repr, BY))}")
    if by == "head":
        return _heads(components)
    layers = layer_of([group.module for group in components.groups])
    of_group = [layers[group.module] if by == "layer" else group.module for group in components.groups]
    names = list(dict.fromkeys(of_group))
    index = [
        torch.full((group.size,), names.index(name)) for group, name in zip(components.groups, of_group, strict=True)
    ]
    return names, torch.cat(index)


def _heads(components: "Components") -> tuple[list[str], Tensor]:
    names: list[str] = []
    index = []
    for group in components.groups:
        per_head = _components_a_head(group)
        if per_head:
            index.append(len(names) + torch.arange(group.size) // per_head)
            names += [f"{group.module} head {head}" for head in range(-(-group.size // per_head))]
        else:
            index.append(torch.full((group.size,), -1))
    if not names:
        raise NoComponentsError(
            f"none of these components (granularity {components.granularity!r}) belongs to an attention head; "
            "find them with granularity='head', or 'input' (columns of the attentions' output projections)"
        )
    return names, torch.cat(index)


def _components_a_head(group: "Group") -> int:
    """How many components of a group one head has; 0 if they belong to no head."""
    if group.kind == "head":
        return max(1, len(group.at))
    reads_heads = group.head_block and group.block == 1 and group.kind == "input feature"
    return group.head_block if reads_heads else 0


def summary(components: "Components") -> dict[str, Any]:
    """Layers with their groups, and what was left out by reason, as JSON values."""
    layers = layer_of([group.module for group in components.groups])
    of_layer: dict[str, list[dict[str, Any]]] = {}
    for group in components.groups:
        entry = {"module": group.module, "parameter": group.parameter, "kind": group.kind, "components": group.size}
        if group.shared_by:
            entry["shared_by"] = list(group.shared_by)
        if group.guessed:
            entry["guessed"] = True
        of_layer.setdefault(layers[group.module], []).append(entry)
    reasons: dict[str, dict[str, Any]] = {}
    for skipped in components.skipped:
        entry = reasons.setdefault(skipped.reason, {"reason": skipped.reason, "weights": 0, "modules": []})
        entry["weights"] += skipped.n_parameters
        entry["modules"].append(skipped.module)
    return {
        "granularity": components.granularity,
        "components": len(components),
        "layers": [
            {"layer": name, "components": sum(entry["components"] for entry in entries), "groups": entries}
            for name, entries in of_layer.items()
        ],
        "skipped": list(reasons.values()),
    }


def tree(components: "Components") -> str:
    """The components as text to read, see `Components.tree`."""
    content = summary(components)
    n_groups = len(components.groups)
    lines = [f"{len(components):,} components of granularity {components.granularity!r} in {n_groups:,} matrices"]
    for _, run in groupby(content["layers"], key=_shape):
        alike = list(run)
        first, last = alike[0], alike[-1]
        name = first["layer"] or "(the model itself)"
        if len(alike) > 1:
            name = f"{name} … {last['layer']} ({len(alike)} alike)"
        lines.append(f"  {name}: {first['components']:,}{' each' if len(alike) > 1 else ''}")
        for (place, kind), entries in groupby(first["groups"], key=lambda e: (_starred(first["layer"], e), e["kind"])):
            first_entry, *_ = run_of = list(entries)
            sizes = [entry["components"] for entry in run_of]
            times = f" ({len(sizes)} matrices)" if len(sizes) > 1 else ""
            guessed = _GUESSED if first_entry.get("guessed") else ""
            lines.append(f"    {place}: {sum(sizes):,} {_plural(kind, sum(sizes))}{times}{guessed}")
    if content["skipped"]:
        lines.append("left out")
        for entry in content["skipped"]:
            modules = list(dict.fromkeys(entry["modules"]))
            shown = ", ".join(module or "(the model itself)" for module in modules[:4])
            more = f", … ({len(modules) - 4} more)" if len(modules) > 4 else ""
            lines.append(f"  {entry['reason']}: {entry['weights']:,} weights in {shown}{more}")
    return "\n".join(lines)


def _starred(layer: str, entry: dict[str, Any]) -> str:
    """The place of a group within its layer, numbers (of experts, of branches) as stars."""
    path = entry["parameter"].removesuffix(".weight").removeprefix(layer).strip(".")
    path = re.sub(r"\.parametrizations\.\w+\.original\d?$", "", path)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or entry["module"] or "weight"


def _shape(layer: dict[str, Any]) -> list:
    return [(_starred(layer["layer"], entry), entry["kind"], entry["components"]) for entry in layer["groups"]]


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
