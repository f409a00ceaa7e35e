"""What a component is: a slice of a model's parameters, and where a gate on it acts during a forward pass."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hf_coar.components import summary
from hf_coar.components.names import Names, indices, place
from hf_coar.components.stand_ins import StandIn
from hf_coar.errors import CoarError, CorruptFileError, OutOfRangeError

GRANULARITIES = ("unit", "input", "head", "expert", "module")


@dataclass(frozen=True)
class Group:
    """Components that sit side by side in one parameter: component i is rows `i * block … (i + 1) * block - 1`.

    Attributes:
        module: dotted name of the module whose forward a gate enters.
        kind: what one component is: "filter", "neuron", "input feature", "head", "expert", "module", …
        parameter: dotted name of the parameter, from the root of the model.
        axis: the axis of the parameter that the components divide.
        size: how many components.
        block: rows a component.
        site: where the gates act: the "output" or "input" of the module, its "weight" while it runs, or a projection
            inside ("attention input", "attention output").
        feature_axis: axis of the features in the gated activation, counted from the end.
        shared_by: further modules that use the very same parameter; ablated there as well, counted once.
        stack_axis: axis along which several matrices are stacked (experts, groups of a convolution); the components
            run over the matrices, and within each over `axis`. None for a single matrix.
        stacks: how many matrices are stacked there.
        by_weights: what may be done to the stored weight: "scale" it, only "zero" it, or "never" change it.
        routed: the module runs on chosen tokens only (an expert), so that its rows do not tell the examples.
        head_block: input columns of one attention head, where the parameter is an attention's output projection.
        scope: of a shared parameter, the module around all its users, whose forward the gates enter; else None.
        guessed: nothing but the parameter's name tells its output axis from its input axis, see `unknown`.
        at: positions or roles, where every component is one at each of them by itself, see `positions`: component i is
            number i // n at the (i % n)-th of the n; none where a component is one at all positions.
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
    stack_axis: int | None = None
    stacks: int = 1
    by_weights: str = "scale"
    routed: bool = False
    head_block: int | None = None
    scope: str | None = None
    guessed: bool = field(default=False, compare=False)
    at: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether there is one component that makes all that the module puts out, however many features that is."""
        return self.size == max(1, len(self.at))

    @property
    def n_features(self) -> int:
        """How many features of the gated activation the components divide."""
        return self.size * self.block // max(1, len(self.at))

    @property
    def place(self) -> str:
        """Name of the module whose forward the gates enter."""
        return self.module if self.scope is None else self.scope

    def rows(self, weight: Tensor) -> Tensor:
        """A view of the weight whose first axis (or, for stacked matrices, first two) the components divide."""
        if self.stack_axis is None:
            return weight.movedim(self.axis, 0)
        axis = self.axis + (self.axis > self.stack_axis)
        return weight.unflatten(self.stack_axis, (self.stacks, -1)).movedim((self.stack_axis, axis), (0, 1))

    def n_rows(self, shape: Sequence[int]) -> int:
        """How many rows a weight of this shape has for the components to divide; 0 if it cannot be divided so."""
        if len(shape) <= max(self.axis, self.stack_axis or 0):
            return 0
        if self.stack_axis is None:
            return shape[self.axis]
        return 0 if shape[self.stack_axis] % self.stacks else self.stacks * shape[self.axis]

    def factors(self, gates: Tensor, weight: Tensor) -> Tensor:
        """Gates [size] in a shape that multiplies `rows(weight)`; differentiable."""
        gates = gates.to(weight.device, weight.dtype)
        if self.block > 1:
            gates = gates.repeat_interleave(self.block)
        lead = [gates.numel()] if self.stack_axis is None else [self.stacks, gates.numel() // self.stacks]
        return gates.view(lead + [1] * (weight.dim() - 1))

    def scaled(self, weight: Tensor, gates: Tensor) -> Tensor:
        """The weight with every component's slice multiplied by its gate; differentiable."""
        if self.stack_axis is None:
            return weight * self.factors(gates, weight).movedim(0, self.axis)
        axis = self.axis + (self.axis > self.stack_axis)
        factors = self.factors(gates, weight).movedim((0, 1), (self.stack_axis, axis))
        return (weight.unflatten(self.stack_axis, (self.stacks, -1)) * factors).view(weight.shape)


@dataclass(frozen=True)
class Component:
    """One component: its place in its group."""

    index: int
    group: Group
    position: int

    def __str__(self) -> str:
        """Such as `layer1.0.conv1 filter 17`."""
        group = self.group
        if not group.at:
            return f"{place(group)} {group.kind} {self.position}".strip()
        number, where = divmod(self.position, len(group.at))
        at = group.at[where]
        return f"{place(group)} {group.kind} {number} at {f'token {at}' if at.isdigit() else at}".strip()


@dataclass(frozen=True)
class Skipped:
    """Weights that hold no components, and why."""

    module: str
    module_class: str
    n_parameters: int
    reason: str


@dataclass(frozen=True, repr=False)
class Components:
    """All components of a model, in the order of its modules; `kept` and `weights` index their last axis by it.

    Attributes:
        groups: the groups, laid out one after the other.
        granularity: one of `GRANULARITIES`.
        skipped: weights that were left out, with the reason.
        fingerprint: of the weights of the model that they belong to, where they come with attributions; `ablate`
            refuses another model then.
        stand_in: what stands in for those that are ablated; None for zero.
    """

    groups: tuple[Group, ...]
    granularity: str = "unit"
    skipped: tuple[Skipped, ...] = field(default=(), compare=False)
    fingerprint: str | None = field(default=None, compare=False)
    stand_in: StandIn | None = None

    def __repr__(self) -> str:
        """Such as `Components(832 in 14 groups, granularity 'unit')`."""
        ablation = f", ablation {str(self.stand_in)!r}" if self.stand_in else ""
        return f"Components({len(self)} in {len(self.groups)} groups, granularity {self.granularity!r}{ablation})"

    @functools.cached_property
    def names(self) -> Names:
        """The names that people read, such as `L2 mlp.up 1265`; made when they are first asked for."""
        return Names(self)

    def indices(self, which: Any) -> list[int]:
        """The indices of components that are given by index or by name; each once, in the order given.

        Args:
            which: one or several of: an index; a name, short or full (`"L7 head 3"`, `"layer1.0.conv1 filter 17"`); the
                name of a matrix, a layer or a head, which means all its components (`"L7"`, `"layer1.0.conv1"`).

        Raises:
            CoarError: no such component; the message says what is near.
        """
        return indices(self, which)

    def kept_without(self, which: Any) -> Tensor:
        """The mask that ablates these components and no others, bool [components]; see `indices`."""
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.indices(which)] = False
        return kept

    def __len__(self) -> int:
        """How many components."""
        return sum(group.size for group in self.groups)

    def __getitem__(self, index: int) -> Component:
        """Component `index`; negative ones count from the end.

        Raises:
            OutOfRangeError: there is no such component.
        """
        n_components = len(self)
        if not -n_components <= index < n_components:
            raise OutOfRangeError(f"component {index} of {n_components}: give a number from 0 to {n_components - 1}")
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
        try:
            kept = torch.as_tensor(kept)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CoarError(f"kept is no tensor ({error}); give bool or float, one entry a component") from error
        if kept.dim() not in (1, 2) or kept.shape[-1] != len(self) or not kept.numel():
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

    def regroup(self, by: str) -> tuple[list[str], Tensor]:
        """To which layer, module or attention head each component belongs.

        Args:
            by: "layer" (the numbered block), "module" or "head".

        Returns:
            names of the layers, modules or heads, and for every component the index of its name, int64 [components];
            -1 for a component that belongs to none.

        Raises:
            CoarError: another `by`.
            NoComponentsError: "head", and no component belongs to one.
        """
        return summary.regroup(self, by)

    def tree(self) -> str:
        """The components by layer and kind, with counts, and what was left out and why: text to read."""
        return summary.tree(self)

    def tree_json(self) -> dict[str, Any]:
        """What `tree` shows as JSON values: layers with their groups, and what was left out by reason."""
        return summary.summary(self)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping, for `components.json`; a group's entries that are the defaults are left out."""
        stands_in = {"ablation": dict(self.stand_in.record)} if self.stand_in else {}
        return {"granularity": self.granularity, "groups": [_stored(group) for group in self.groups], **stands_in}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Components":
        """The inverse of `to_json`.

        Raises:
            CorruptFileError: not such a mapping.
        """
        try:
            groups = tuple(_restored(entry) for entry in value["groups"])
            stand_in = StandIn.from_json(value["ablation"]) if value.get("ablation") is not None else None
            components = cls(groups, value["granularity"], stand_in=stand_in)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise CorruptFileError(f"this is no list of components: {error!r}") from error
        if type(components.granularity) is not str or not groups:
            raise CorruptFileError("this is no list of components: it names no granularity, or holds none")
        return components


def _stored(group: Group) -> dict[str, Any]:
    entries = {field.name: (getattr(group, field.name), field.default) for field in fields(Group)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in entries.items()
        if value != default
    }


def _restored(entry: Mapping[str, Any]) -> Group:
    """A group from JSON, from whomever it comes: every entry must have the right type."""
    kinds = {field.name: field.type for field in fields(Group)}
    for name, value in entry.items():
        if not _is_a(value, kinds[name]):
            raise ValueError(f"a group's {name} is {value!r:.80}")
    group = Group(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})
    if min(group.size, group.block, group.stacks, group.axis + 1) < 1 or max(group.size, group.block) > 2**40:
        raise ValueError(f"a group of {group.parameter!r:.80} has size {group.size}, block {group.block}")
    if group.at and group.size % len(group.at):
        raise ValueError(f"a group of {group.parameter!r:.80} has size {group.size} at {len(group.at)} positions")
    return group


def _is_a(value: Any, kind: Any) -> bool:
    if kind == tuple[str, ...]:
        return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
    if kind == int | None:
        return value is None or type(value) is int
    return type(value) is kind
