"""Places: along which axis of an activation the examples are, in which order, and which entry is whose."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_coar.models.ragged import Packing


@dataclass(frozen=True)
class Layout:
    """Examples along `axis`: one after the other with all their entries (`example_major`), or taking turns."""

    axis: int
    example_major: bool = True

    def fits(self, entries: int, n_examples: int) -> bool:
        """Whether so many entries can be those of so many examples."""
        return entries % n_examples == 0

    def take(self, x: Tensor, n_examples: int, example: int) -> Tensor:
        """The part of one example, the axis kept."""
        entries = x.shape[self.axis] // n_examples
        if self.example_major:
            return x.narrow(self.axis, example * entries, entries)
        return x.unflatten(self.axis, (entries, n_examples)).select(self.axis + 1, example)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `take` over all examples."""
        if self.example_major:
            return torch.cat(list(parts), dim=self.axis)
        return torch.stack(list(parts), dim=self.axis + 1).flatten(self.axis, self.axis + 1)

    def spread(self, rows: Tensor, entries: int) -> Tensor:
        """Rows [examples, …] as [entries, …], one for every entry of the axis."""
        each = entries // rows.shape[0]
        if each == 1:
            return rows
        return rows.repeat_interleave(each, 0) if self.example_major else rows.repeat(each, *[1] * (rows.dim() - 1))


@dataclass(frozen=True)
class Packed(Layout):
    """Entries along `axis` that were packed, of every example as many as one of the packing's counts says.

    Attributes:
        of: what is counted, such as "nodes".
        owners: the example of every entry of this batch, int64 [entries]; None before the batch is known.
    """

    of: str = ""
    owners: Tensor | None = field(default=None, compare=False)

    def fits(self, entries: int, n_examples: int) -> bool:
        """Whether there are as many entries as the packing says."""
        return self.owners is not None and entries == len(self.owners)

    def take(self, x: Tensor, n_examples: int, example: int) -> Tensor:
        """The part of one example, the axis kept."""
        return x.index_select(self.axis, (self.owners == example).nonzero()[:, 0])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `take` over all examples."""
        places = torch.argsort(torch.argsort(self.owners, stable=True))
        return torch.cat(list(parts), dim=self.axis).index_select(self.axis, places)

    def spread(self, rows: Tensor, entries: int) -> Tensor:
        """Rows [examples, …] as [entries, …], one for every entry of the axis."""
        return rows[self.owners]


SHARED = "shared"  # a tensor that does not grow with the examples
UNKNOWN = "unknown"  # a tensor whose layout cannot be told, or something that is no tensor and cannot be divided
PLAIN = "plain"  # a number, a flag, nothing
Place = Layout | str


@dataclass(frozen=True)
class Call:
    """One run of a module: where the examples are in each of its inputs and outputs, in the order of the tree."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]

    def divisible(self) -> bool:
        """Whether the module can run once an example instead."""
        return (
            any(isinstance(place, Layout) for place in self.inputs)
            and UNKNOWN not in self.inputs
            and all(isinstance(place, Layout) or place == PLAIN for place in self.outputs)
        )


Layouts = dict[str, list[Call]]


def bound(layouts: Layouts, packing: Packing | None) -> Layouts:
    """Layouts that know which entries of this batch are whose."""
    if packing is None:
        return layouts

    def of(places: tuple[Place, ...]) -> tuple[Place, ...]:
        return tuple(replace(p, owners=packing.owners[p.of]) if isinstance(p, Packed) else p for p in places)

    return {name: [Call(of(call.inputs), of(call.outputs)) for call in calls] for name, calls in layouts.items()}
