"""A gated forward pass: what the places where gates enter share while it runs, and what they do to an activation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_coar import models
from hf_coar.components import Group, StandIn, positions
from hf_coar.errors import CoarError
from hf_coar.masking.places import Layout, Layouts
from hf_coar.masking.recording import Recording


class Pass:
    """What the sites share while gates are in: which example runs, where the examples are, which groups were reached.

    Attributes:
        n_examples: rows of the gates; None where all examples share one mask.
        example: the example that runs now, inside a loop over examples; then its row of the gates holds for all.
        idle: gates are off while the model is being probed.
        layouts: from the probe.
        weights: of the gated groups, by the parameter's name.
        fired: called with every group whose gates were applied; `fired.observe` with what came of it.
        note: where it is set, activations are shown to it and left as they are.
        replayed: what stands in, where it is what the model computed for other examples.
        by_weights: parameters that are gated themselves, so that no activation is.
    """

    def __init__(
        self, n_examples: int | None, fired: Any, weights: Mapping[str, Tensor], stand_in: StandIn | None = None
    ) -> None:
        """No forward pass has begun."""
        self.n_examples, self.fired, self.weights = n_examples, fired, weights
        self.note: Callable[[Group, Tensor, slice], None] | None = None
        self.replayed: Recording | None = None
        self.by_weights: set[str] = set()
        self._stand_in, self._ends = stand_in, {}
        self.example: int | None = None
        self.idle = False
        self.layouts: Layouts = {}
        self._runs: dict[str, int] = {}

    def begin(self, layouts: Layouts) -> None:
        """A forward pass of the whole model begins."""
        self.layouts, self._runs = layouts, {}

    def run(self, name: str) -> int:
        """The number of this run of a module within the pass."""
        index = self._runs.get(name, 0)
        self._runs[name] = index + 1
        return index

    def place(self, name: str, run: int, side: str, leaf: int = 0) -> Layout | None:
        """Where the examples are in one input or output of a module's run; None if that is not known."""
        places = []
        for call in self.layouts.get(name, ()):
            of_side = getattr(call, side)
            places.append(of_side[leaf] if leaf < len(of_side) else None)
        if not places:
            return None
        same = all(place == places[0] for place in places)
        place = places[0] if same else places[run] if run < len(places) else None
        return place if isinstance(place, Layout) else None

    def shared(self, gate: Tensor) -> Tensor | None:
        """The gates [size] that hold for whatever runs now, or None if every example has its own."""
        if gate.dim() == 1:
            return gate
        if gate.shape[0] == 1:
            return gate[0]
        return None if self.example is None else gate[self.example]

    def spread(self, gate: Tensor, activation: Tensor, group: Group, where: Callable[[], Layout | None]) -> Tensor:
        """Gates [size] or [examples, size] in a shape that multiplies an activation.

        Raises:
            CoarError: every example has gates of its own, and where the examples are is not known, or their number is
                another one.
        """
        if group.at:
            return self._spread_over_tokens(gate, activation, group, where)
        shared = self.shared(gate)
        rows = (gate if shared is None else shared).to(activation.device, activation.dtype)
        if group.block > 1 and group.size > 1:
            rows = rows.repeat_interleave(group.block, dim=-1)
        feature_axis = activation.dim() + group.feature_axis
        shape = [1] * activation.dim()
        shape[feature_axis] = rows.shape[-1]
        if shared is not None:
            return rows.view(shape)
        layout = where()
        if layout is None or layout.axis == feature_axis or layout.axis >= activation.dim():
            raise cannot_tell(group)
        entries = activation.shape[layout.axis]
        if not layout.fits(entries, rows.shape[0]):
            raise CoarError(
                f"kept has {rows.shape[0]} rows, and {group.module!r} sees {entries} entries; "
                "give one row an example of the batch"
            )
        rows = layout.spread(rows, entries)
        shape[layout.axis] = entries
        return (rows if layout.axis < feature_axis else rows.T).reshape(shape)

    def _spread_over_tokens(
        self, gate: Tensor, activation: Tensor, group: Group, where: Callable[[], Layout | None]
    ) -> Tensor:
        """Gates of components at positions, [examples or 1, tokens, features]."""
        by_token = activation.dim() == 3 and group.feature_axis == -1
        if not by_token or (activation.shape[0] > 1 and where() != Layout(0)):
            raise CoarError(
                f"{group.module!r} sees {list(activation.shape)}, which is not [examples, tokens, features], so that "
                "its components have no positions; leave it out with find_components(model, exclude=[…])"
            )
        shared = self.shared(gate)
        rows = (gate if shared is None else shared).to(activation.device, activation.dtype)
        roles = positions.roles_of(group, models.batch_under_way(), activation.shape[1])
        if self.example is not None and len(roles) > 1:
            roles = roles[self.example : self.example + 1]
        return positions.spread(rows, group, roles)

    def end(self, group: Group, activation: Tensor) -> Tensor | None:
        """What stands in for the components of a group, in a shape that goes with the activation; None for zero.

        Raises:
            CoarError: it is of other activations than these.
        """
        if self._stand_in is None:
            return None
        if self.replayed is not None:
            return self.replayed.next(group, activation)
        key = (group.parameter, activation.device, activation.dtype)
        if key not in self._ends:
            self._ends[key] = self._stand_in.values[group.parameter].to(activation.device, activation.dtype)
        values = self._ends[key]
        if values.dim() == 1:
            return _along_features(values, activation, group.feature_axis)
        if values.shape != activation.shape[1:]:
            raise CoarError(
                f"what stands in at {group.module!r} was taken at every position of {list(values.shape)}, and the "
                f"examples there now have {list(activation.shape[1:])}; give examples of the same length, or "
                "Mean(data) without per_position"
            )
        return values

    def gated(
        self,
        group: Group,
        gate: Tensor,
        activation: Tensor,
        where: Callable[[], Layout | None],
        bias: Any = None,
        told: bool = False,
        of: slice = slice(None),
    ) -> Tensor:
        """An activation with the gates of a group applied.

        Args:
            group: whose gates they are.
            gate: [size] or [examples, size].
            activation: the module's output or input.
            where: finds out where the examples are.
            bias: of the module, which stays when the slice of the weight is zero.
            told: whether `fired.observe` hears of it.
            of: the features that go on from here; others of the activation are thrown away.
        """
        if self.note is not None:
            self.note(group, activation, of)
            return activation
        if group.parameter in self.by_weights:
            return activation
        with torch._C.DisableTorchFunction():  # who follows the model's operations has no business with these
            rows = self.spread(gate, activation, group, where)
            end = self.end(group, activation)
            if end is None and isinstance(bias, Tensor):
                end = _along_features(bias.to(activation.device, activation.dtype), activation, group.feature_axis)
            found = activation * rows if end is None else torch.lerp(end, activation, rows)
            self.fired(group)
            if told and self.fired.observe is not None and torch.is_grad_enabled():  # else a look beside
                self.fired.observe(found, activation, end, rows)
        return found


class Undivided(CoarError):
    """What a module sees cannot be divided into examples."""


def cannot_tell(group: Group) -> Undivided:
    """The error where a mask an example cannot be applied."""
    return Undivided(
        f"which part of what {group.module!r} sees belongs to which example cannot be told, so that every example "
        "cannot have a mask of its own there; use one mask for all, [components], or exclude the module"
    )


def _along_features(values: Tensor, activation: Tensor, feature_axis: int) -> Tensor:
    shape = [1] * activation.dim()
    shape[activation.dim() + feature_axis] = -1
    return values.view(shape)
