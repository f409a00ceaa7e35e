"""Gated forward passes: what a component's slice of the weight produces is scaled, with one gate an example if wanted.

Where the gates enter, `sites` says. Where the examples of the batch are in what a module sees, the model itself is
asked once (`layout`); modules that mix examples or see none run once an example, inside the nearest module around them
that can be divided, and so does the model where it reads a weight outside of its module (`outside`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_coar import models
from hf_coar.components import Components, Group
from hf_coar.errors import CoarError
from hf_coar.masking import layout, outside, weights
from hf_coar.masking.partners import Partners
from hf_coar.masking.passing import Pass, Undivided, cannot_tell
from hf_coar.masking.places import Layout, Layouts, bound
from hf_coar.masking.sites import (
    SITES,
    Pairs,
    loop_over_examples,
    one_by_one,
    replace_forward,
    with_scaled_weights,
)
from hf_coar.models import calling, ragged


class FiredGroups:
    """Which of the gated groups were reached by a forward pass: a hook that never fires ablates nothing."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """None of the groups has fired yet."""
        # An expert that no token was sent to does not run, and rightly so.
        self.expected = {group.parameter: group for group in groups if not group.routed}
        self.seen: set[str] = set()
        self.ran = False
        # Where it is set: called with (gated output, the same ungated, what it is at gates of zero or None for zero,
        # gates as they were spread over it).
        self.observe: Callable[[Tensor, Tensor, Tensor | None, Tensor], None] | None = None
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
def gated(
    model: nn.Module,
    components: Components,
    tensors: Sequence[Tensor],
    gates: Sequence[Tensor],
    partners: Partners | None = None,
) -> Iterator[FiredGroups]:
    """Inside the block every forward pass applies the gates, differentiably.

    Args:
        model: changed only inside the block.
        components: its components.
        tensors: the weight of every group, from `weights.handles`.
        gates: one tensor a group, [size] or [examples, size]. Groups whose gates are all 1 and need no gradient get no
            hook, so that with nothing ablated the model runs as it is.
        partners: where the values of other examples stand in.

    Yields:
        Which groups were reached.
    """
    ablating = _ablating(gates)
    every = list(zip(components.groups, _sent(gates, models.device_of(model)), strict=True))
    pairs = [pair for pair, one in zip(every, ablating, strict=True) if one]
    fired = FiredGroups(model, [group for group, _ in pairs])
    if partners is not None and pairs:
        pairs = every  # what the partners give is kept for the next mask, which may be of other groups
    rows = {gate.shape[0] for _, gate in pairs if gate.dim() == 2}
    if len(rows) > 1:
        raise CoarError(f"the gates have different numbers of rows: {sorted(rows)}")
    state = Pass(rows.pop() if rows else None, fired, _by_parameter(components, tensors), components.stand_in)
    with ExitStack() as stack:
        stack.enter_context(models.held(model))
        if state.n_examples is not None:
            stack.enter_context(calling.own_gates())

        def note_run(module: nn.Module, inputs: Any, output: Any) -> None:
            fired.ran = fired.ran or not state.idle

        stack.callback(model.register_forward_hook(note_run).remove)
        _enter(stack, model, pairs, state)
        reads = outside.Reads(components.groups, tensors, partial(_reaches, model, components, tensors))
        if state.n_examples is not None or any(group.at for group, _ in pairs):
            divided = partial(_divided, model, components, tensors, pairs, state, reads)
            stack.callback(replace_forward(model, divided))
        elif pairs:
            stack.callback(replace_forward(model, partial(_refusing, model, pairs, state, reads)))
        if partners is not None and pairs:
            stack.callback(replace_forward(model, partial(partners.first, state)))
        yield fired


def _ablating(gates: Sequence[Tensor]) -> list[bool]:
    """Which gates are not all 1, or need a gradient; looked at once, as on an accelerator every look waits."""
    plain = [gate for gate in gates if not gate.requires_grad]
    # A bool compared with a number is made a number first, which took longer than the pass of a ViT-B/16 on a GPU.
    open_ = [gate.all() if gate.dtype == torch.bool else (gate == 1).all() for gate in plain]
    together = len({one.device for one in open_}) == 1
    looked_at = iter(torch.stack(open_).tolist() if together else map(bool, open_))
    return [gate.requires_grad or not next(looked_at) for gate in gates]


def _sent(gates: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The gates on a CUDA device in one transfer; what is elsewhere goes, group by group, where it is wanted."""
    if device.type != "cuda" or any(gate.device.type != "cpu" or gate.requires_grad for gate in gates):
        return gates
    return calling.sent(torch.cat(list(gates), dim=-1), device).split([gate.shape[-1] for gate in gates], dim=-1)


@contextmanager
def noted(
    model: nn.Module, components: Components, tensors: Sequence[Tensor], note: Callable[[Group, Tensor, slice], None]
) -> Iterator[FiredGroups]:
    """Inside the block every forward pass shows what the components make (or read), with the bias, to `note`.

    It is called with the group, the activation, and which of its features count.
    """
    pairs = [(group, torch.ones(group.size)) for group in components.groups]
    fired = FiredGroups(model, components.groups)
    state = Pass(None, fired, _by_parameter(components, tensors))
    state.note = note
    with ExitStack() as stack:
        stack.enter_context(models.held(model))
        _enter(stack, model, pairs, state)
        yield fired


def _by_parameter(components: Components, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {group.parameter: tensor for group, tensor in zip(components.groups, tensors, strict=True)}


def _enter(stack: ExitStack, model: nn.Module, pairs: Pairs, state: Pass) -> None:
    """Gates enter at every site, until the stack ends; one patch handles both sides of an attention."""
    places: dict[tuple[str, str], list[tuple[Group, Tensor]]] = {}
    for group, gate in pairs:
        site = "attention" if group.site.startswith("attention") else group.site
        places.setdefault((group.place, site), []).append((group, gate))
    for (name, site), of_site in places.items():
        stack.callback(SITES[site](name, model.get_submodule(name), of_site, state))


def _divided(
    model: nn.Module,
    components: Components,
    tensors: Sequence[Tensor],
    pairs: Pairs,
    state: Pass,
    reads: outside.Reads,
    forward: Callable[..., Any],
) -> Callable[..., Any]:
    """The model's forward where every example has gates of its own: finds out where the examples are, and runs."""
    watched = _watched(model, components)

    def probe(args: tuple, kwargs: dict, n_examples: int | None) -> layout.Probe:
        state.idle = True
        try:
            return layout.probe(
                model,
                forward,
                args,
                kwargs,
                n_examples,
                watched,
                components.groups,
                partial(_inert, model, components, tensors),
                reads,
                None if models.example_alone() is not None else ragged.current(),
            )
        finally:
            state.idle = False

    def run(*args: Any, **kwargs: Any) -> Any:
        alone = models.example_alone()
        count = (state.n_examples or _count(args, kwargs)) if alone is None else 1
        seen = probe(args, kwargs, count)
        state.fired.seen.update(seen.inert)
        packing = None if count == 1 else ragged.current()
        state.begin(bound(seen.layouts, packing))
        loops, bypassed = _plan(pairs, seen, count, components.stand_in is not None)
        state.by_weights = seen.outside
        try:
            state.example = alone
            return run_with(loops, bypassed, args, kwargs, packing)
        except Undivided:
            # A module that ran in none of the probe's examples: one at a time, every example is told apart.
            if "" in loops or not state.layouts.get(""):
                raise
        finally:
            state.example = None
        state.begin(bound(seen.layouts, packing))
        return run_with({""}, bypassed, args, kwargs, packing)

    def run_with(
        loops: set[str], bypassed: dict[str, list], args: tuple, kwargs: dict, packing: ragged.Packing | None
    ) -> Any:
        with ExitStack() as stack:
            # Loops come last, and so around the rest.
            for name, of_name in bypassed.items():
                if name:
                    stack.callback(SITES["weight"](name, model.get_submodule(name), of_name, state))
            for name in loops - {""}:
                stack.callback(loop_over_examples(name, model.get_submodule(name), state))
            whole = with_scaled_weights(model, forward, bypassed[""], state) if "" in bypassed else forward
            return one_by_one("", whole, args, kwargs, state, packing) if "" in loops else whole(*args, **kwargs)

    return run


def _reaches(
    model: nn.Module, components: Components, tensors: Sequence[Tensor], group: Group, run: Callable[[], Any]
) -> bool:
    """Whether gates of a group do what the same mask in its weight does."""
    if group.at or group.by_weights == "never":
        return True
    kept = [outside.every_other(g.size) if g == group else torch.ones(g.size).bool() for g in components.groups]
    plain = replace(components, stand_in=None)
    with weights.zeroed(model, plain, torch.cat(kept), tensors):
        in_weights = run()
    state = Pass(None, FiredGroups(model, [group]), _by_parameter(components, tensors))
    with ExitStack() as stack:
        _enter(stack, model, [(group, outside.every_other(group.size))], state)
        return outside.same(in_weights, run())


_REACHED: WeakKeyDictionary[nn.Module, dict[Any, set[str]]] = WeakKeyDictionary()


def _refusing(
    model: nn.Module, pairs: Pairs, state: Pass, reads: outside.Reads, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """The model's forward where all examples have the same gates: nothing but what its modules give meets them.

    The first time that it is called so, what it reads is looked at.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        known = _REACHED.setdefault(model, {})
        key = (*state.weights, len(args), *sorted(kwargs))
        result = None
        if key not in known:
            with reads.watching(model):
                result = forward(*args, **kwargs)
            state.idle = True
            try:
                with layout.undisturbed(model, pytree.tree_leaves((args, kwargs))):
                    known[key] = reads.outside(lambda: forward(*args, **kwargs))
            finally:
                state.idle = False
        for group, _ in pairs:
            if group.parameter in known[key]:
                raise CoarError(
                    f"the model reads {group.parameter!r} outside of {group.module!r} as well, where no gate reaches; "
                    "use how='weights', or leave it out with find_components(model, exclude=[…])"
                )
        return forward(*args, **kwargs) if result is None else result

    return run


def _count(args: tuple, kwargs: dict) -> int:
    """How many examples the model is given, where the gates do not say it."""
    return next((x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()), 1)


def _watched(model: nn.Module, components: Components) -> dict[str, nn.Module]:
    """All modules with gates and all modules around them, but the model itself."""
    names = {group.place for group in components.groups}
    for name in list(names):
        parts = name.split(".")
        names.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return {name: module for name, module in model.named_modules() if name and name in names}


def _plan(
    pairs: Pairs, seen: layout.Probe, n_examples: int | None, with_values: bool
) -> tuple[set[str], dict[str, list[tuple[Group, Tensor]]]]:
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
        elsewhere = group.parameter in seen.outside
        if group.parameter in seen.inert or (gate.dim() == 1 and not elsewhere):
            continue
        silent = elsewhere or (not seen.layouts.get(group.place) and not _hidden(group))
        around: str | None = ""
        if n_examples != 1 and gate.dim() == 2 and (elsewhere or not _has_layout(group, seen.layouts)):
            around = "" if elsewhere else _nearest_divisible(group, seen.layouts)
            if around is None:
                raise cannot_tell(group)
            loops.add(around)
        if silent and with_values:
            raise CoarError(
                f"the model reads {group.parameter!r} while {group.module!r} does not run, so that nothing but zero "
                "can stand in there; leave it out with find_components(model, exclude=[…])"
            )
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


def _inert(
    model: nn.Module,
    components: Components,
    tensors: Sequence[Tensor],
    layouts: Layouts,
    run_pair: Callable[[], Any],
) -> set[str]:
    """Parameters of groups whose modules did not run, and whose values change nothing."""
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
        with weights.zeroed(model, replace(components, stand_in=None), kept, tensors):
            changed = pytree.tree_leaves(run_pair())
        both = zip(plain, changed, strict=True)
        return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in both)

    return silent if not matters(silent) else {name for name in silent if not matters({name})}
