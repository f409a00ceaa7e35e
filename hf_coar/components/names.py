"""Names of components: the short ones that people read, such as `L2 mlp.up 1265`, and finding components by any name.

A short name says the numbered block, what is inside it, and a number: `L7 head 3`, `stage3.1 conv2 7`. Blocks of
several towers are told apart (`decoder L2`). No part is ever cut off: what can be left out without two matrices being
called the same is left out, and where that fails the whole path stays. The full name, `str(component)`, is the dotted
path with the kind, such as `model.layers.2.mlp.up_proj neuron 1265`; both find the component.
"""

import contextlib
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hf_coar.components.summary import layer_of
from hf_coar.errors import CoarError, NoComponentsError

if TYPE_CHECKING:
    from hf_coar.components.groups import Components, Group

_STAGE = re.compile(r"(?:layer|stage|block)s?_?(\d+)$")  # `layer3` of a ResNet, before the number of a block
_CONTAINERS = {"layers", "layer", "blocks", "block", "h", "stages", "stage", "resblocks", "transformer", "model"}
_PLAIN = {"filter", "neuron"}  # what every output of a matrix is; goes without saying


@dataclass(frozen=True)
class _Block:
    """Where a numbered block lies: `model.layers.2` is 2 in `model.layers`, `stages.2.blocks.5` 2.5 in `stages`."""

    container: str
    number: str
    of_stages: bool
    holds_modules: bool  # and is none itself


def place(group: "Group") -> str:
    """The dotted path that full names begin with: of the module, or of the parameter where a module has several."""
    return group.module if group.site in ("output", "input") else group.parameter.removesuffix(".weight")


class Names:
    """All names of some components; made once."""

    def __init__(self, components: "Components") -> None:
        """Nothing but the groups is looked at."""
        self.components, groups = components, components.groups
        self.layers = layer_of(names := [group.module for group in groups])
        blocks = {layer: block for layer in set(self.layers.values()) if (block := _block(layer, names)) is not None}
        self._blocks = {layer: block for layer, block in blocks.items() if _is_a_tower(block, blocks.values())}
        self._towers = _towers(list(self._blocks.values()))
        inside = {place(group): self._inside(group) for group in groups}
        self._short = _injective(inside, _common_word(list(inside)))
        self._heads = Counter(self.layers[group.module] for group in groups if group.head_block or group.kind == "head")
        self._kinds = defaultdict(set)
        for group in groups:
            self._kinds[place(group)].add(group.kind)
        self.labels = self._labels()
        self.spans = self._spans()

    def _inside(self, group: "Group") -> str:
        """The path of a group within its block, or the whole of it."""
        layer = self.layers[group.module]
        return place(group).removeprefix(layer).removeprefix(".") if layer in self._blocks else place(group)

    def _labels(self) -> list[str]:
        """What the short names of every group's components begin with, such as `L2 mlp.up`; each is another."""
        groups = self.components.groups
        found = [self._label(group) for group in groups]
        taken = Counter(found) + Counter(map(_full, groups))
        return [label if taken[label] == 1 + (label == _full(group)) else _full(group)
                for label, group in zip(found, groups, strict=True)]  # fmt: skip

    def _label(self, group: "Group") -> str:
        if group.kind == "head":
            return self._head(group)
        where = self.matrix(group)
        plain = group.kind in _PLAIN or (group.kind == "module" and group.size == 1)
        goes_without_saying = plain and len(self._kinds[place(group)]) == 1 and where
        return where if goes_without_saying else f"{where} {group.kind.removesuffix(' feature')}".strip()

    def _head(self, group: "Group") -> str:
        layer = self.layers[group.module]
        alone = self._heads[layer] == 1 and layer in self._blocks
        return f"{self.layer(layer) if alone else self.matrix(group)} head"

    def matrix(self, group: "Group") -> str:
        """Such as `L2 mlp.up`."""
        layer = self.layers[group.module]
        block = self._towers[self._blocks[layer]] if layer in self._blocks else ""
        return f"{block} {self._short[place(group)]}".strip()

    def _module(self, group: "Group") -> str:
        """The module of a group, where several matrices may be one module's."""
        layer = self.layers[group.module]
        if place(group) == group.module or layer not in self._blocks:
            return self.matrix(group) if place(group) == group.module else group.module
        return f"{self.layer(layer)} {group.module.removeprefix(layer).removeprefix('.')}".strip()

    def layer(self, layer: str) -> str:
        """A layer of `regroup("layer")` as people call it, such as `L2`."""
        if layer in self._blocks:
            return self._towers[self._blocks[layer]]
        return self._short.get(layer, layer) or "(the model itself)"

    def name(self, index: int) -> str:
        """The short name of a component, such as `L2 mlp.up 1265`."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        alone = self.components.groups[place].kind == "module" and self.components.groups[place].size == 1
        return self.labels[place] if alone else f"{self.labels[place]} {index - self._starts[place]}"

    def all(self) -> list[str]:
        """The short names of all components."""
        return [self.name(index) for index in range(len(self.components))]

    def of(self, by: str) -> list[str]:
        """The short names of the layers, modules or heads of `regroup(by)`, in its order."""
        names, _ = self.components.regroup(by)
        if by == "layer":
            return [self.layer(name) for name in names]
        labels = {group.module: self._module(group) for group in self.components.groups}
        if by == "module":
            shared = Counter(labels.values())
            return [labels[name] if shared[labels[name]] == 1 else name for name in names]
        heads = {group.module: self._head(group) for group in self.components.groups}
        return [f"{heads[module]} {number}" for module, _, number in (name.rpartition(" head ") for name in names)]

    def _spans(self) -> dict[str, range]:
        """The components of every matrix by the beginnings of their short and full names, and by the matrix's place."""
        found: dict[str, range] = {}
        places: dict[str, list[range]] = defaultdict(list)
        self._starts = []
        for (group, start, stop), label in zip(self.components.spans(), self.labels, strict=True):
            self._starts.append(start)
            found[_full(group)] = found[label] = range(start, stop)
            for where in (place(group), self.matrix(group)):
                places[where].append(range(start, stop))
        return {**{where: one[0] for where, one in places.items() if len(one) == 1}, **found}

    def groups(self) -> dict[str, list[int]]:
        """The components of every layer, module and head by their short and full names."""
        found: dict[str, list[int]] = {}
        for by in ("layer", "module", "head"):
            with contextlib.suppress(NoComponentsError):  # no heads
                names, index = self.components.regroup(by)
                for number, both in enumerate(zip(names, self.of(by), strict=True)):
                    members = (index == number).nonzero().flatten().tolist()
                    found |= {name: members for name in both if name not in found}
        return found


def _full(group: "Group") -> str:
    return f"{place(group)} {group.kind}".strip()


def _block(layer: str, modules: Collection[str]) -> _Block | None:
    """The numbered block of a layer's path; None where it does not end in a number."""
    parts = layer.split(".")
    if not parts[-1].isdigit():
        return None
    first = next(place for place, part in enumerate(parts) if part.isdigit())
    numbers = [part for part in parts[first:] if part.isdigit()]
    if first and (stage := _STAGE.match(parts[first - 1])):
        return _Block(".".join(parts[: first - 1]), ".".join([stage[1], *numbers]), True, layer not in modules)
    of_stages = len(numbers) > 1 and parts[first + 1] != "layer"
    return _Block(".".join(parts[:first]), ".".join(numbers), of_stages, layer not in modules)


def _is_a_tower(block: _Block, blocks: Iterable[_Block]) -> bool:
    """Numbers count layers in what is named as blocks are, and where several hold modules; else they are of a list."""
    if block.of_stages or block.container.rpartition(".")[2] in {"", *_CONTAINERS}:
        return True
    return len({other.number for other in blocks if other.container == block.container and other.holds_modules}) > 1


def _towers(blocks: Sequence[_Block]) -> dict[_Block, str]:
    """Such as `L2`, `stage3.1`, `decoder L2`, by block."""
    paths = {block.container: block.container.split(".") for block in blocks}
    shared = set.intersection(*(set(parts) for parts in paths.values())) if paths else set()
    qualified = {
        container: ".".join(part.removesuffix("_model") for part in parts if part and part not in shared | _CONTAINERS)
        for container, parts in paths.items()
    }
    several = Counter(qualified.values())
    names = {container: name if several[name] == 1 else container for container, name in qualified.items()}
    staged = {block.container for block in blocks if block.of_stages}
    return {
        block: f"{names[block.container]} {'stage' if block.container in staged else 'L'}{block.number}".strip()
        for block in blocks
    }


def _common_word(paths: Sequence[str]) -> str:
    """The first word of all paths, such as `resnet.`, where they share it."""
    first = {path.partition(".")[0] for path in paths}
    return f"{first.pop()}." if len(first) == 1 and all("." in path for path in paths) and len(paths) > 1 else ""


def _injective(inside: dict[str, str], prefix: str) -> dict[str, str]:
    """Shorter words for paths inside blocks, by place; those that would fall together stay as they are."""
    shorter = {path: ".".join(map(_shorter, path.removeprefix(prefix).split("."))) for path in set(inside.values())}
    several = Counter(shorter.values())
    return {at: shorter[path] if several[shorter[path]] == 1 else path for at, path in inside.items()}


def _shorter(word: str) -> str:
    return re.sub(r"^c_(?=.)|^self_(?=attn)|(?<=.)_proj$", "", word)


# -------------------------------------------------------------------------------------------------------------- finding


def indices(components: "Components", which: Any) -> list[int]:
    """The components that are meant, see `Components.indices`."""
    entries = [which] if isinstance(which, str | int) or not hasattr(which, "__iter__") else which
    entries = entries.tolist() if isinstance(entries, Tensor) else list(entries)
    found: list[int] = []
    for entry in entries:
        found += _named(components, entry) if isinstance(entry, str) else [_numbered(components, entry)]
    return list(dict.fromkeys(found))


def _numbered(components: "Components", entry: Any) -> int:
    n = len(components)
    if not isinstance(entry, Integral) or isinstance(entry, bool) or not -n <= entry < n:
        raise CoarError(
            f"no component {entry!r}; give its index, from 0 to {n - 1}, or its name, {_such_as(components)}"
        )
    return int(entry) % n


def _named(components: "Components", name: str) -> Sequence[int]:
    """The component of this name, or all of a matrix, a layer, or a head of this name."""
    names, words = components.names, " ".join(name.split())
    start, _, number = words.rpartition(" ")
    if number.isdecimal() and len(number) < 10 and int(number) < len(names.spans.get(start, ())):
        return [names.spans[start][int(number)]]
    if words in names.spans:
        return names.spans[words]
    groups = names.groups()
    if words in groups:
        return groups[words]
    if start in names.spans:
        raise CoarError(
            f"no component {name[:80]!r}: the numbers of {start} run from 0 to {len(names.spans[start]) - 1}"
        )
    near = difflib.get_close_matches(start or words, [*names.spans, *groups], 3, 0.5)
    meant = f"did you mean {', '.join(map(repr, near))}? Else " if near else ""
    n = len(components)
    raise CoarError(
        f"no component {name[:80]!r}, and no matrix, layer or head; {meant}give an index, from 0 to {n - 1}, or a "
        f"name, {_such_as(components)}"
    )


def _such_as(components: "Components") -> str:
    return f"such as {components.names.name(0)!r} or {str(components[0])!r}"
