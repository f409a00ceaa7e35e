"""Ablating components, three ways that give the same answer: hooks (per example, with gates), weights, or both.

*Ablation* sets a component's slice of its weight to zero; bias and normalisation stay as they are. Instead of the
stored weight, a hook can change what the slice produces, with one gate an example (`sites` says how). Where the
examples of the batch are in what a module sees, the model itself is asked once (`layout`); modules that mix examples or
see none run once an example, inside the nearest module around them that can be divided.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_coar import models
from hf_coar.components import Components, Group
from hf_coar.errors import CoarError, ModelMismatchError
from hf_coar.masking import layout, weights
from hf_coar.masking.layout import Layout, Layouts
from hf_coar.masking.sites import (
    SITES,
    Pairs,
    Pass,
    Undivided,
    cannot_tell,
    loop_over_examples,
    one_by_one,
    replace_forward,
    with_scaled_weights,
)


@contextmanager
def ablate(model: nn.Module, components: Components, kept: Any, how: str = "auto") -> Iterator[nn.Module]:
    """Inside the `with` block the model runs with components ablated; afterwards it is as it was, whatever happens.

    Args:
        model: changed only inside the block.
        components: from `find_components(model)`.
        kept: bool or float, [components] for all examples alike, or [examples, components], one row an example of the
            batch. True or 1 = left in place, False or 0 = ablated; a float between is the fraction that stays.
        how: "hooks", "weights" (only for [components]), or "auto": weights for one mask, hooks for one mask an example
            and for weights that cannot be changed (quantised, offloaded).

    Yields:
        The model. With one mask an example, the first batch of a new shape is preceded by two runs on two and three of
        its examples, which show where the examples are in what each module sees.

    Raises:
        CoarError: a wrong shape or gates outside 0 … 1; a module with gates that did not run as a module; a batch that
            the rows do not fit; a weight that cannot be changed.
        ModelMismatchError: the components are not this model's.
    """
    kept = components.check_kept(kept)
    if how not in ("auto", "hooks", "weights"):
        raise CoarError(f"how={how!r}; there are 'auto', 'hooks' and 'weights'")
    tensors = weights.handles(model, components)
    _check_fingerprint(model, components)
    if how == "auto":
        offloaded = any(tensor.device.type == "meta" for tensor in tensors)
        by_weights = kept.dim() == 1 and not kept.requires_grad and not offloaded
        how = "weights" if by_weights and weights.editable(components, kept) else "hooks"
    if how == "hooks":
        with gated(model, components, kept.split(components.sizes(), dim=-1)) as fired:
            yield model
        if fired.ran:
            fired.check()
    elif kept.dim() != 1:
        raise CoarError(
            f"kept has one row an example ({list(kept.shape)}), and weights are the same for all of them; "
            "use how='hooks', or one mask at a time"
        )
    else:
        with _zeroed(model, components, kept, tensors):
            yield model


# Model -> the fingerprint that it was found to have. Taken once a model, as `ablate` runs once a mask.
_found_to_have: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _check_fingerprint(model: nn.Module, components: Components) -> None:
    """Components of attributions belong to one set of weights; those of `find_components` go by shapes alone."""
    if components.fingerprint is None or _found_to_have.get(model) == components.fingerprint:
        return
    found = models.fingerprint(model)
    if found != components.fingerprint:
        raise ModelMismatchError(
            f"these components come with attributions of a model with weights {components.fingerprint[:12]}…, and the "
            f"{type(model).__name__} given has weights {found[:12]}…; load the model that was attributed, or take "
            "components from find_components(model)"
        )
    _found_to_have[model] = found


def check_same_model(model: nn.Module, components: Components) -> None:
    """The model has every parameter that the components name, with the right shape.

    Raises:
        ModelMismatchError: it has not.
    """
    weights.handles(model, components)


@contextmanager
def _zeroed(model: nn.Module, components: Components, kept: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """The slices of ablated components are zero (or scaled by their gate) inside the block."""
    undo: list[weights.Edit | weights.NormalisedEdit] = []
    try:
        with torch.no_grad():
            for edit in weights.edits(model, components, kept, tensors):
                undo.append(edit)
                edit.apply()
        yield
    finally:
        with torch.no_grad():
            for edit in undo:
                edit.undo()


def zero_slices(model: nn.Module, components: Components, kept: Tensor) -> None:
    """Ablate for good: set the slices of all components that are not kept to zero (or scale them by their gate).

    Raises:
        CoarError: a weight that cannot be changed; nothing has been changed then.
        ModelMismatchError: the components are not this model's.
    """
    with torch.no_grad():
        kept = components.check_kept(kept)
        # All of them are made, and so checked, before the first is applied.
        for edit in list(weights.edits(model, components, kept, weights.handles(model, components))):
            edit.apply()


class FiredGroups:
    """Which of the gated groups were reached by a forward pass: a hook that never fires ablates nothing."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Of `groups`, none has fired yet."""
        # An expert that no token was sent to does not run, and rightly so.
        self.expected = {group.parameter: group for group in groups if not group.routed}
        self.seen: set[str] = set()
        self.ran = False
        # Where it is set: called with (gated output, what the gate multiplied, gates as they were spread over it).
        self.observe: Callable[[Tensor, Tensor, Tensor], None] | None = None
        self._model = type(model).__name__

    def __call__(self, group: Group) -> None:
        """Note that the gates of a group were applied."""
        self.seen.add(group.parameter)

    def missing(self) -> list[Group]:
        """The groups whose gates were never applied."""
        return [group for name, group in self.expected.items() if name not in self.seen]

    def check(self) -> None:
        """Raises `CoarError` if some gates were never applied."""
        missing = self.missing()
        if missing:
            raise CoarError(
                f"{len(missing)} gated modules of {self._model} did not run as modules, so hooks cannot reach them: "
                f"{', '.join(group.module for group in missing[:8])}; use how='weights' or exclude them"
            )


@contextmanager
def gated(model: nn.Module, components: Components, gates: Sequence[Tensor]) -> Iterator[FiredGroups]:
    """Inside the block every forward pass applies the gates, differentiably.

    Args:
        model: changed only inside the block.
        components: its components.
        gates: one tensor a group, [size] or [examples, size]. Groups whose gates are all 1 and need no gradient get no
            hook, so that with nothing ablated the model runs as it is.

    Yields:
        Which groups were reached.
    """
    pairs = [
        (group, gate)
        for group, gate in zip(components.groups, gates, strict=True)
        if gate.requires_grad or not bool((gate == 1).all())
    ]
    fired = FiredGroups(model, [group for group, _ in pairs])
    rows = {gate.shape[0] for _, gate in pairs if gate.dim() == 2}
    if len(rows) > 1:
        raise CoarError(f"the gates have different numbers of rows: {sorted(rows)}")
    tensors = zip(components.groups, weights.handles(model, components), strict=True)
    state = Pass(rows.pop() if rows else None, fired, {group.parameter: tensor for group, tensor in tensors})
    with ExitStack() as stack:

        def note_run(module: nn.Module, inputs: Any, output: Any) -> None:
            fired.ran = fired.ran or not state.idle

        stack.callback(model.register_forward_hook(note_run).remove)
        for (name, site), of_site in _by_place(pairs).items():
            stack.callback(SITES[site](name, model.get_submodule(name), of_site, state))
        if state.n_examples is not None:
            stack.callback(replace_forward(model, lambda forward: _divided(model, forward, components, pairs, state)))
        yield fired


def _by_place(pairs: Pairs) -> dict[tuple[str, str], list[tuple[Group, Tensor]]]:
    """Groups with their gates by module and kind of site; one patch handles both sides of an attention."""
    places: dict[tuple[str, str], list[tuple[Group, Tensor]]] = {}
    for group, gate in pairs:
        site = "attention" if group.site.startswith("attention") else group.site
        places.setdefault((group.place, site), []).append((group, gate))
    return places


def _divided(
    model: nn.Module, forward: Callable[..., Any], components: Components, pairs: Pairs, state: Pass
) -> Callable[..., Any]:
    """The model's forward where every example has gates of its own: finds out where the examples are, and runs."""
    watched = _watched(model, components)

    def run(*args: Any, **kwargs: Any) -> Any:
        state.idle = True
        try:
            seen = layout.probe(
                model,
                forward,
                args,
                kwargs,
                state.n_examples,
                watched,
                components.groups,
                lambda layouts, run_pair: _inert(model, components, layouts, run_pair),
            )
        finally:
            state.idle = False
        state.fired.seen.update(seen.inert)
        state.begin(seen.layouts)
        loops, bypassed = _plan(pairs, seen, state)
        try:
            return run_with(loops, bypassed, args, kwargs)
        except Undivided:
            # A module that ran in none of the probe's examples: one at a time, every example is told apart.
            if "" in loops or not state.layouts.get(""):
                raise
        state.begin(seen.layouts)
        return run_with({""}, bypassed, args, kwargs)

    def run_with(loops: set[str], bypassed: dict[str, list], args: tuple, kwargs: dict) -> Any:
        with ExitStack() as stack:
            # Loops come last, and so around the rest.
            for name, of_name in bypassed.items():
                if name:
                    stack.callback(SITES["weight"](name, model.get_submodule(name), of_name, state))
            for name in loops - {""}:
                stack.callback(loop_over_examples(name, model.get_submodule(name), state))
            whole = with_scaled_weights(model, forward, bypassed[""], state) if "" in bypassed else forward
            return one_by_one("", whole, args, kwargs, state) if "" in loops else whole(*args, **kwargs)

    return run


def _watched(model: nn.Module, components: Components) -> dict[str, nn.Module]:
    """All modules with gates and all modules around them, but the model itself."""
    names = {group.place for group in components.groups}
    for name in list(names):
        parts = name.split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return {name: module for name, module in model.named_modules() if name and name in names}


def _plan(pairs: Pairs, seen: layout.Probe, state: Pass) -> tuple[set[str], dict[str, list[tuple[Group, Tensor]]]]:
    """What the sites themselves cannot do.

    Returns:
        names of the modules that have to run once an example: the nearest around each site without a layout; and, by
        the nearest module that runs, the groups whose weights are read without their own module running.

    Raises:
        CoarError: not even the whole model can be divided.
    """
    loops: set[str] = set()
    bypassed: dict[str, list[tuple[Group, Tensor]]] = {}
    for group, gate in pairs:
        if gate.dim() == 1 or group.parameter in seen.inert:
            continue
        silent = not seen.layouts.get(group.place) and not _hidden(group)
        around: str | None = ""
        if state.n_examples != 1 and not _has_layout(group, seen.layouts):
            around = _nearest_divisible(group, seen.layouts)
            if around is None:
                raise cannot_tell(group)
            loops.add(around)
        if silent:
            bypassed.setdefault(around, []).append((group, gate))
    return loops, bypassed


def _hidden(group: Group) -> bool:
    """Whether a module may run although no hook saw it run in the probe."""
    return group.routed or group.site == "weight"


def _has_layout(group: Group, layouts: Layouts) -> bool:
    """Whether the rows of the gates can be laid out along what the site sees."""
    calls = layouts.get(group.place)
    if not calls or group.routed or group.site == "weight":
        return False
    if group.site.startswith("attention"):
        return all(isinstance(place, Layout) for call in calls for place in call.inputs[:3])
    sides = [call.outputs if group.site == "output" else call.inputs for call in calls]
    return all(side and isinstance(side[0], Layout) for side in sides)


def _nearest_divisible(group: Group, layouts: Layouts) -> str | None:
    parts = group.place.split(".") if group.place else []
    # An expert sees the tokens that were sent to it: begin outside of it, at what holds the list of experts.
    for end in range(len(parts) - (1 if group.routed else 0), -1, -1):
        around = ".".join(parts[:end])
        calls = layouts.get(around)
        inside_experts = group.routed and any("expert" in part.lower() for part in parts[:end])
        if calls and not inside_experts and (not around or all(call.divisible() for call in calls)):
            return around
    return None


def _inert(model: nn.Module, components: Components, layouts: Layouts, run_pair: Callable[[], Any]) -> set[str]:
    """Parameters of groups whose modules did not run, and whose values change nothing."""
    tensors = weights.handles(model, components)
    silent = {
        group.parameter
        for group, tensor in zip(components.groups, tensors, strict=True)
        if not layouts.get(group.place)
        and not group.routed
        and group.by_weights != "never"
        and tensor.device.type != "meta"
    }
    if not silent:
        return set()
    plain = pytree.tree_leaves(run_pair())

    def matters(names: set[str]) -> bool:
        kept = torch.cat([torch.full((g.size,), g.parameter not in names) for g in components.groups])
        with _zeroed(model, components, kept, tensors):
            changed = pytree.tree_leaves(run_pair())
        both = zip(plain, changed, strict=True)
        return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in both)

    return silent if not matters(silent) else {name for name in silent if not matters({name})}
