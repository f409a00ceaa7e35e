"""What a component is: a slice of a model's parameters, and where a gate on it acts during a forward pass."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_coar.errors import CoarError, CorruptFileError

GRANULARITIES = ("unit", "input", "module")


@dataclass(frozen=True)
class Group:
    """Components that sit side by side in one parameter: component i is rows `i * block … (i + 1) * block - 1`.

    Attributes:
        module: dotted name of the module whose forward a gate enters.
        kind: what one component is: "filter", "neuron", "input feature", "module", …
        parameter: dotted name of the parameter, from the root of the model.
        axis: the axis of the parameter that the components divide.
        size: how many components.
        block: rows a component.
        site: where the gates act, a key of `masking.SITES`: "output" or "input" of the module, or a projection inside.
        feature_axis: axis of the features in the gated activation, counted from the end.
        shared_by: further modules that use the very same parameter; ablated there as well, counted once.
    """

    module: str
    kind: str
    parameter: str
    axis: int
    size: int
    block: int = 1
    site: str = "output"
    feature_axis: int = -1
    shared_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """One component: its place in its group."""

    index: int
    group: Group
    position: int

    def __str__(self) -> str:
        """Such as `layer1.0.conv1 filter 17`."""
        return f"{self.group.module} {self.group.kind} {self.position}"


@dataclass(frozen=True)
class Skipped:
    """Weights that hold no components, and why."""

    module: str
    module_class: str
    n_parameters: int
    reason: str


@dataclass(frozen=True)
class Components:
    """All components of a model, in the order of its modules; `kept` and `weights` index their last axis by it.

    Attributes:
        groups: the groups, laid out one after the other.
        granularity: "unit", "input" or "module".
        skipped: weights that were left out, with the reason.
    """

    groups: tuple[Group, ...]
    granularity: str = "unit"
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        """How many components."""
        return sum(group.size for group in self.groups)

    def __getitem__(self, index: int) -> Component:
        """Component `index`; negative ones count from the end.

        Raises:
            IndexError: out of range.
        """
        n_components = len(self)
        if not -n_components <= index < n_components:
            raise IndexError(f"component {index} of {n_components}")
        index %= n_components
        for group, start, stop in self.spans():
            if index < stop:
                return Component(index, group, index - start)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Component]:
        """All components in order."""
        for group, start, stop in self.spans():
            for index in range(start, stop):
                yield Component(index, group, index - start)

    def spans(self) -> Iterator[tuple[Group, int, int]]:
        """Every group with the half-open range of its components' indices."""
        start = 0
        for group in self.groups:
            yield group, start, start + group.size
            start += group.size

    def sizes(self) -> list[int]:
        """The number of components of every group, for `Tensor.split`."""
        return [group.size for group in self.groups]

    def check_kept(self, kept: Any) -> Tensor:
        """`kept` as a checked tensor: bool or float, [components] or [examples, components], gates in 0 … 1.

        Raises:
            CoarError: another shape or dtype, or gates outside 0 … 1.
        """
        kept = torch.as_tensor(kept)
        if kept.dim() not in (1, 2) or kept.shape[-1] != len(self):
            raise CoarError(
                f"kept has shape {list(kept.shape)}; expected [{len(self)}] or [examples, {len(self)}]: "
                "one entry a component, True = left in place"
            )
        if kept.dtype == torch.bool:
            return kept
        if not kept.is_floating_point():
            raise CoarError(f"kept has dtype {kept.dtype}; use bool (True = left in place) or float gates from 0 to 1")
        low, high = (float(x) for x in kept.detach().aminmax())
        if not (low >= 0 and high <= 1):  # also False for NaN
            raise CoarError(f"gates run from {low} to {high}; they must lie in 0 (ablated) … 1 (in place)")
        return kept

    def to_json(self) -> dict[str, Any]:
        """A plain mapping, for `components.json`."""
        return {"granularity": self.granularity, "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Components":
        """The inverse of `to_json`.

        Raises:
            CorruptFileError: not such a mapping.
        """
        try:
            groups = [Group(**{**entry, "shared_by": tuple(entry.get("shared_by", ()))}) for entry in value["groups"]]
            components = cls(tuple(groups), str(value["granularity"]))
            sane = all(type(g.size) is int and type(g.block) is int and g.size > 0 and g.block > 0 for g in groups)
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptFileError(f"this is no list of components: {error!r}") from error
        if not sane:
            raise CorruptFileError("this is no list of components: a group's size or block is not a positive integer")
        return components
