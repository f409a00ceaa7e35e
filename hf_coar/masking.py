"""Ablating components, three ways that give the same answer: hooks (per example, with gates), weights, or both.

*Ablation* sets a component's slice of its weight to zero; bias and normalisation stay as they are. Instead of the
weight a hook can change what the slice produces: `output = bias + gate * (output - bias)`, with one gate an example.
A gate of 1 leaves the value bit for bit, a gate of 0 leaves the bias bit for bit (both are ends of `torch.lerp`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.components import Components, Group
from hf_coar.errors import CoarError, ModelMismatchError

Install = Callable[[nn.Module, Sequence[tuple[Group, Tensor]], Callable[[Group], None]], Callable[[], None]]


@contextmanager
def ablate(model: nn.Module, components: Components, kept: Any, how: str = "auto") -> Iterator[nn.Module]:
    """Inside the `with` block the model runs with components ablated; afterwards it is as it was, whatever happens.

    Args:
        model: changed only inside the block.
        components: from `find_components(model)`.
        kept: bool or float, [components] for all examples alike, or [examples, components], one row an example of the
            batch. True or 1 = left in place, False or 0 = ablated; a float between is the fraction that stays.
        how: "hooks", "weights" (only for [components]), or "auto": weights for one mask, hooks for one mask an example.

    Yields:
        The model.

    Raises:
        CoarError: a wrong shape or gates outside 0 … 1; a module with gates that did not run as a module; a batch that
            the rows do not fit.
        ModelMismatchError: the components are not this model's.
    """
    kept = components.check_kept(kept)
    if how not in ("auto", "hooks", "weights"):
        raise CoarError(f"how={how!r}; there are 'auto', 'hooks' and 'weights'")
    if how == "auto":
        shared_and_final = kept.dim() == 1 and not kept.requires_grad and not _offloaded(model, components)
        how = "weights" if shared_and_final else "hooks"
    check_same_model(model, components)
    if how == "hooks":
        with gated(model, components, kept.split(components.sizes(), dim=-1)) as fired:
            yield model
        if fired.ran:
            fired.check()
    else:
        if kept.dim() != 1:
            raise CoarError(
                f"kept has one row an example ({list(kept.shape)}), and weights are the same for all of them; "
                "use how='hooks', or one mask at a time"
            )
        with _zeroed(model, components, kept):
            yield model


def check_same_model(model: nn.Module, components: Components) -> None:
    """The model has every parameter that the components name, with the right shape.

    Raises:
        ModelMismatchError: it has not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in components.groups:
        parameter = parameters.get(group.parameter)
        shape = None if parameter is None else tuple(parameter.shape)
        if shape is None or len(shape) <= group.axis or shape[group.axis] != group.size * group.block:
            raise ModelMismatchError(
                f"the components are not this model's: {group.size} × {group.block} rows are expected on axis "
                f"{group.axis} of {group.parameter!r}, and {type(model).__name__} has "
                + ("no such parameter" if shape is None else f"shape {shape}")
            )


def _offloaded(model: nn.Module, components: Components) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return any(getattr(parameters.get(g.parameter), "device", None) == torch.device("meta") for g in components.groups)


# ------------------------------------------------------------------------------------------------------- by weights


@contextmanager
def _zeroed(model: nn.Module, components: Components, kept: Tensor) -> Iterator[None]:
    """The slices of ablated components are zero (or scaled by their gate) inside the block."""
    undo: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, axis, rows, factors in _changed_slices(model, components, kept):
                saved = weight.index_select(axis, rows)
                undo.append((weight, axis, rows, saved))
                if factors is None:
                    weight.index_fill_(axis, rows, 0)
                else:
                    weight.index_copy_(axis, rows, saved * factors)
        yield
    finally:
        with torch.no_grad():
            for weight, axis, rows, saved in undo:
                weight.index_copy_(axis, rows, saved)


def zero_slices(model: nn.Module, components: Components, kept: Tensor) -> None:
    """Ablate for good: set the slices of all components that are not kept to zero (or scale them by their gate)."""
    with torch.no_grad():
        for weight, axis, rows, factors in _changed_slices(model, components, components.check_kept(kept)):
            scaled = weight.index_select(axis, rows) * (0 if factors is None else factors)
            weight.index_copy_(axis, rows, scaled)


def _changed_slices(
    model: nn.Module, components: Components, kept: Tensor
) -> Iterator[tuple[Tensor, int, Tensor, Tensor | None]]:
    """For every group with a gate below 1: its weight, the axis, the rows and their factors (None = all zero)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = kept.detach().cpu()
    for group, gates in zip(components.groups, kept.split(components.sizes()), strict=True):
        rows = (gates != 1).nonzero().flatten()
        if not len(rows):
            continue
        weight = parameters[group.parameter].data
        values = gates[rows].to(weight.dtype).repeat_interleave(group.block)
        rows = (rows[:, None] * group.block + torch.arange(group.block)).flatten().to(weight.device)
        factors = None
        if bool(values.any()):
            shape = [1] * weight.dim()
            shape[group.axis] = -1
            factors = values.to(weight.device).view(shape)
        yield weight, group.axis, rows, factors


# --------------------------------------------------------------------------------------------------------- by hooks


class FiredGroups:
    """Which of the gated groups were reached by a forward pass: a hook that never fires ablates nothing."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Of `groups`, none has fired yet."""
        self.expected = {group.parameter: group for group in groups}
        self.seen: set[str] = set()
        self.ran = False
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
    active: dict[str, list[tuple[Group, Tensor]]] = {}
    for group, gate in zip(components.groups, gates, strict=True):
        if gate.requires_grad or not bool((gate == 1).all()):
            for module in (group.module, *group.shared_by):
                active.setdefault(module, []).append((group, gate))
    fired = FiredGroups(model, [group for pairs in active.values() for group, _ in pairs])
    with ExitStack() as stack:

        def note_run(module: nn.Module, inputs: Any, output: Any) -> None:
            fired.ran = True

        stack.callback(model.register_forward_hook(note_run).remove)
        for name, pairs in active.items():
            module = model.get_submodule(name)
            for site in sorted({_site_family(group) for group, _ in pairs}):
                of_site = [(group, gate) for group, gate in pairs if _site_family(group) == site]
                stack.callback(SITES[site](module, of_site, fired))
        yield fired


def _site_family(group: Group) -> str:
    """`"attention"` for its two sides `"attention input"` and `"attention output"`, which one patch handles."""
    return "attention" if group.site.startswith("attention") else group.site


def spread(gate: Tensor, activation: Tensor, group: Group, batch_axis: int = 0) -> Tensor:
    """A gate [size] or [examples, size] in a shape that multiplies an activation.

    The activation's batch axis may hold several entries an example (windows, tiles), example after example.

    Raises:
        CoarError: the number of entries is not a multiple of the number of gate rows.
    """
    gate = gate.to(activation.device, activation.dtype)
    if group.block > 1 and group.size > 1:
        gate = gate.repeat_interleave(group.block, dim=-1)
    feature_axis = activation.dim() + group.feature_axis
    shape = [1] * activation.dim()
    shape[feature_axis] = gate.shape[-1]
    if gate.dim() == 2:
        n_examples, entries = gate.shape[0], activation.shape[batch_axis]
        if entries % n_examples or feature_axis == batch_axis:
            raise CoarError(
                f"kept has {n_examples} rows, and {group.module!r} sees a batch of {entries}; "
                "give one row an example of the batch"
            )
        if entries != n_examples:
            gate = gate.repeat_interleave(entries // n_examples, dim=0)
        shape[batch_axis] = entries
    return gate.view(shape)


def _bias_like(bias: Tensor | None, activation: Tensor, feature_axis: int) -> Tensor | None:
    if bias is None:
        return None
    shape = [1] * activation.dim()
    shape[activation.dim() + feature_axis] = -1
    return bias.to(activation.device, activation.dtype).view(shape)


def _apply(gate: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    """Bias + gate * (output - bias), exact at both ends."""
    return output * gate if bias is None else torch.lerp(bias, output, gate)


def _gate_outputs(module: nn.Module, pairs: Sequence[tuple[Group, Tensor]], fired: FiredGroups) -> Callable[[], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        for group, gate in pairs:
            bias = _bias_like(getattr(module, "bias", None), output, group.feature_axis)
            output = _apply(spread(gate, output, group), output, bias)
            fired(group)
        return output

    return module.register_forward_hook(hook).remove


def _gate_inputs(module: nn.Module, pairs: Sequence[tuple[Group, Tensor]], fired: FiredGroups) -> Callable[[], None]:
    def hook(module: nn.Module, inputs: tuple) -> tuple:
        activation, *others = inputs
        for group, gate in pairs:
            activation = activation * spread(gate, activation, group)
            fired(group)
        return (activation, *others)

    return module.register_forward_pre_hook(hook).remove


def _gate_attention(module: nn.Module, pairs: Sequence[tuple[Group, Tensor]], fired: FiredGroups) -> Callable[[], None]:
    """`nn.MultiheadAttention` computes all four projections inside one function, out of every hook's reach.

    Inside the block its `forward` is ours: the projections are made here and gated, and the library's own function does
    the rest with the identity in their place, so that masks, extra keys and returned weights stay its business.
    """
    by_place = {_place(group): (group, gate) for group, gate in pairs}

    def project(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch_axis = 0 if module.batch_first or x.dim() == 2 else 1
        if (name, "input") in by_place:
            group, gate = by_place[name, "input"]
            fired(group)
            x = x * spread(gate, x, group, batch_axis)
        y = F.linear(x, weight, bias)
        if (name, "output") in by_place:
            group, gate = by_place[name, "output"]
            fired(group)
            y = _apply(spread(gate, y, group, batch_axis), y, _bias_like(bias, y, -1))
        return y

    def projections(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        inputs, width = (query, key, value), module.embed_dim
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
        if module.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [project(n, x, getattr(module, n), b) for n, x, b in zip(names, inputs, biases, strict=True)]
        if query is key and key is value:
            return project("in_proj_weight", query, module.in_proj_weight, module.in_proj_bias).split(width, dim=-1)
        whole = [project("in_proj_weight", x, module.in_proj_weight, module.in_proj_bias) for x in inputs]
        return [y.split(width, dim=-1)[i] for i, y in enumerate(whole)]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = projections(query, key, value)
        swap = module.batch_first and query.dim() == 3  # the library's function wants positions first
        q, k, v = (x.transpose(0, 1) for x in (q, k, v)) if swap else (q, k, v)
        identity = torch.eye(module.embed_dim, dtype=q.dtype, device=q.device)
        mixed, weights = F.multi_head_attention_forward(
            q, k, v, module.embed_dim, module.num_heads, None, None, module.bias_k, module.bias_v,
            module.add_zero_attn, module.dropout, identity, None, training=module.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
        )  # fmt: skip
        mixed = mixed.transpose(0, 1) if swap else mixed
        return project("out_proj.weight", mixed, module.out_proj.weight, module.out_proj.bias), weights

    # A fused kernel of the layer around it would pass the module by.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # An instance attribute shadows the class's method; deleting it restores the original.
    module.forward = forward

    def restore() -> None:
        module.__dict__.pop("forward", None)
        torch.backends.mha.set_fastpath_enabled(fused)

    return restore


def _place(group: Group) -> tuple[str, str]:
    """(parameter inside the module, side) of a group of attention projections."""
    return group.parameter.removeprefix(f"{group.module}.") if group.module else group.parameter, group.site.split()[1]


SITES: dict[str, Install] = {"output": _gate_outputs, "input": _gate_inputs, "attention": _gate_attention}
