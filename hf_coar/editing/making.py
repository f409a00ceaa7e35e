"""`edit`: a copy of the model in which what a rule ranks first is ablated, with the record of it."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import masking, models
from hf_coar.attributions import Attributions
from hf_coar.editing.choosing import Candidate, Constraint, Goal, choose
from hf_coar.editing.rules import AUTO, RULES, Rule, Sides
from hf_coar.errors import CoarError

Examples = Sequence[int] | Sequence[Sequence[int]] | Tensor  # indices, or several sets of them

N_COMPONENTS = 10  # where neither a number nor a validation is given


def rank_components(
    attributions: Attributions,
    increase: Examples | None = None,
    decrease: Examples | None = None,
    reference: Sequence[int] | None = None,
    rule: str | Rule = "welch",
) -> Tensor:
    """All components, the best to ablate first, int64 [components].

    Args:
        attributions: of the model.
        increase: indices of examples whose outputs are to rise; or several lists of them, of which each counts alike.
        decrease: indices of examples whose outputs are to fall; or several lists of them.
        reference: indices of examples whose outputs are to stay; all others by default.
        rule: one of `RULES`, or a function of `Sides`.

    Raises:
        CoarError: no targets, no references, an index out of range, an example on both sides, or an unknown rule.
    """
    return _rule(rule)(_sides(attributions, increase, decrease, reference))


def _rule(rule: str | Rule) -> Rule:
    if callable(rule):
        return rule
    if rule not in RULES:
        raise CoarError(f"unknown rule {rule!r}; there are {', '.join(sorted(RULES))}")
    return RULES[rule]


def _sides(
    attributions: Attributions, increase: Examples | None, decrease: Examples | None, reference: Sequence[int] | None
) -> Sides:
    """The weights of both sides, checked."""
    n_examples = len(attributions)
    raised, lowered = _sets(increase), _sets(decrease)
    targets = {index for one in (*raised, *lowered) for index in one}
    if not targets:
        raise CoarError("nothing to edit for: give the indices of examples to increase or to decrease")
    if reference is None:
        reference = [index for index in range(n_examples) if index not in targets]
    reference = _indices(reference)
    _check_indices(n_examples, _joined(raised), _joined(lowered), reference)
    weights = attributions.weights
    of_reference = weights[reference].double()
    return Sides(
        [(sign, weights[one].double()) for sign, sets in ((1, raised), (-1, lowered)) for one in sets],
        of_reference,
        attributions.bias[reference].double() + of_reference.sum(1),
    )


def _sets(examples: Examples | None) -> list[list[int]]:
    """Sets of plain integers, also from tensors and arrays; empty ones are left out."""
    if examples is None:
        return []
    several = len(examples) > 0 and all(hasattr(one, "__len__") and getattr(one, "ndim", 1) for one in examples)
    return [found for one in (examples if several else [examples]) if (found := _indices(one))]


def _joined(sets: Sequence[list[int]]) -> list[int]:
    return [index for one in sets for index in one]


def _indices(examples: Sequence[int] | None) -> list[int]:
    return [] if examples is None else [int(index) for index in examples]


def _check_indices(n_examples: int, increase: list[int], decrease: list[int], reference: list[int]) -> None:
    if not reference:
        raise CoarError(f"no references: all {n_examples} examples are targets; give fewer targets")
    outside = [index for index in (*increase, *decrease, *reference) if not 0 <= index < n_examples]
    if outside:
        raise CoarError(
            f"examples {outside[:8]} are out of range: the attributions are of examples 0 to {n_examples - 1}"
        )
    groups = {"increase": set(increase), "decrease": set(decrease), "reference": set(reference)}
    for a, b in (("increase", "decrease"), ("increase", "reference"), ("decrease", "reference")):
        if both := groups[a] & groups[b]:
            raise CoarError(f"examples {sorted(both)[:8]} are in both {a} and {b}")


def edit(
    model: nn.Module,
    attributions: Attributions | Sequence[Attributions],
    increase: Examples | None = None,
    decrease: Examples | None = None,
    reference: Sequence[int] | None = None,
    n_components: int | Sequence[int] | None = None,
    rule: str | Rule | Sequence[str] = "welch",
    validation: Goal | None = None,
    constraint: "Goal | Constraint | Sequence[Goal | Constraint]" = (),
    gate: float | Sequence[float] = 0.0,
) -> nn.Module:
    """A copy of the model in which a few components are ablated; the model itself stays as it was.

    With `validation`, the number of components is chosen by it, under the constraints; with `rule="auto"` the rule,
    too. It is an ordinary model: save it with its own library (or `edited.save`) and it loads without hf_coar. `undo`
    makes the original of it again.

    Args:
        model: the model that was attributed.
        attributions: of it; or several, of the same components and examples and with other outputs, among which
            `validation` chooses.
        increase: indices of examples whose outputs are to rise; or several lists of them, of which each counts alike.
        decrease: indices of examples whose outputs are to fall; or several lists of them.
        reference: indices of examples whose outputs are to stay; all others by default.
        n_components: how many components to ablate, 10 by default; with `validation`, the numbers to try, by default up
            to a fifth of all components.
        rule: which components come first: one of `editing.RULES` (the paper's is "welch"), a function of
            `editing.Sides`, several names for `validation` to choose from, or "auto", which tries `editing.AUTO`.
        validation: a function of the edited model, more is better, such as `editing.accuracy(data)`; on examples that
            judge nothing else.
        constraint: see `editing.choose`, such as `editing.Keep(editing.accuracy(others), within=0.01)`.
        gate: the fraction of the ablated components that stays, from 0 to below 1; with `validation` several to try.

    Raises:
        CoarError: targets or references that make no sense, `n_components` out of range, a choice without
            `validation`, or constraints that nothing satisfies.
        ModelMismatchError: another model.
    """
    candidates = [attributions] if isinstance(attributions, Attributions) else list(attributions)
    _check_attributions(candidates, model)
    rules = list(AUTO) if isinstance(rule, str) and rule == "auto" else [rule]
    rules = list(rule) if isinstance(rule, list | tuple) else rules
    rankings = {
        (_name(one), place): rank_components(found, increase, decrease, reference, one)
        for one in rules
        for place, found in enumerate(candidates)
    }
    if validation is None:
        best, tried = _plain(rankings, len(candidates[0].components), n_components, gate), ()
        ranking = next(iter(rankings.values()))
        used = candidates[0]
    else:
        named = {_label(key, candidates): ranking for key, ranking in rankings.items()}
        numbers = [n_components] if isinstance(n_components, int) else n_components
        gates = [gate] if isinstance(gate, int | float) else list(gate)
        choice = choose(model, candidates[0].components, named, validation, constraint, numbers, gates)
        best, tried, ranking = choice.best, choice.tried, named[choice.best.rule]
        rule_name, place = next(key for key in rankings if _label(key, candidates) == best.rule)
        best, used = Candidate(rule_name, *astuple(best)[1:]), candidates[place]
    chosen = ranking[: best.n_components]
    entries = _entries(used, chosen, best, tried, increase, decrease, reference)
    edited = models.copy_with_record(model, edit=entries)
    kept = kept_without(len(used.components), chosen)
    masking.zero_slices(edited, used.components, kept if best.gate == 0 else torch.where(kept, 1.0, best.gate))
    return edited


def _check_attributions(candidates: Sequence[Attributions], model: nn.Module) -> None:
    if not candidates:
        raise CoarError("no attributions given")
    fingerprint, record = models.fingerprint(model), models.record(model)
    for one in candidates:
        one.check_model(fingerprint, record)
        if one.components.to_json() != candidates[0].components.to_json() or len(one) != len(candidates[0]):
            raise CoarError(f"{one} and {candidates[0]} differ in components or examples; attribute the same ones")


def _name(rule: str | Rule) -> str:
    return rule if isinstance(rule, str) else getattr(rule, "__qualname__", "of your own")


def _label(key: tuple[str, int], candidates: Sequence[Attributions]) -> str:
    """A rule's name; where there are several attributions, with the output of the one that it ranks by."""
    name, place = key
    return name if len(candidates) == 1 else f"{name} on {candidates[place].config.get('output')} ({place})"


def _plain(rankings: dict, n_all: int, n_components: Any, gate: Any) -> Candidate:
    """What was asked for, where there is nothing to choose."""
    if len(rankings) > 1:
        raise CoarError(
            f"{len(rankings)} rules or attributions to choose from, and no validation; give validation=…, such as "
            "editing.accuracy(data), or one rule"
        )
    n_components = N_COMPONENTS if n_components is None else n_components
    if isinstance(n_components, bool) or not isinstance(n_components, int) or not 1 <= n_components <= n_all:
        raise CoarError(
            f"n_components={n_components!r}; must be a whole number from 1 to {n_all}, or several with validation=…"
        )
    if not isinstance(gate, int | float) or not 0 <= gate < 1:
        raise CoarError(f"gate={gate!r}; must be the fraction that stays, from 0 (ablated) to below 1")
    return Candidate(next(iter(rankings))[0], n_components, float(gate), None, None)


def _entries(
    attributions: Attributions,
    chosen: Tensor,
    best: Candidate,
    tried: Sequence[Candidate],
    increase: Examples | None,
    decrease: Examples | None,
    reference: Sequence[int] | None,
) -> dict[str, Any]:
    """The record of an edit, JSON values: what was ablated and why, and all that `undo` needs."""
    components = [attributions.components[int(index)] for index in chosen]
    parameters = {name for c in components for name in (c.group.parameter, *c.group.shared_by)}
    entries = {
        "rule": best.rule,
        "output": attributions.config.get("output"),
        "granularity": attributions.components.granularity,
        "data": attributions.config.get("data"),
        "increase": _joined(_sets(increase)),
        "decrease": _joined(_sets(decrease)),
        "reference": "all others" if reference is None else _indices(reference),
        "base": attributions.config["model"],
        "components": [str(component) for component in components],
        "indices": chosen.tolist(),
        "parameters": sorted(parameters),
    }
    if best.gate:
        entries["gate"] = best.gate
    if tried:
        entries["tried"] = [list(astuple(candidate)) for candidate in tried]
    return entries


def kept_without(n_components: int, ablated: Tensor | Sequence[int]) -> Tensor:
    """The mask bool [components] that ablates just these components."""
    kept = torch.ones(n_components, dtype=torch.bool)
    kept[torch.as_tensor(ablated, dtype=torch.long)] = False
    return kept
