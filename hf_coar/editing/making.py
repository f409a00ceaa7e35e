"""`edit`: a copy of the model in which what a rule ranks first is ablated, with the record of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.attributions import Attributions, labelled
from hf_coar.components import Components
from hf_coar.data import numbers
from hf_coar.editing import stepwise, unchecked
from hf_coar.editing.choosing import Candidate, Constraint, Goal, choose
from hf_coar.editing.rules import AUTO, RULES, Rule, Sides
from hf_coar.errors import CoarError, is_count
from hf_coar.masking import MaskedModel, constants, fingerprint_of
from hf_coar.masking.weights import lengths

# Indices, or several sets of them; a class name or {"label": name or number} is all examples of the class.
Examples = Sequence[int] | Sequence[Sequence[int]] | Tensor | str | Sequence[str] | Mapping[str, Any]
_Indices = tuple[list[list[int]], list[list[int]], list[int] | None]  # to rise, to fall, to stay (None: all others)
Attribute = Callable[[nn.Module], Attributions]  # attributes the model that it is given, always the same examples

N_COMPONENTS = 10  # where neither a number nor a validation is given
_NONE = torch.empty(0, dtype=torch.long)  # of the components


def rank_components(
    attributions: Attributions,
    increase: Examples | None = None,
    decrease: Examples | None = None,
    reference: Examples | None = None,
    rule: str | Rule = "welch",
) -> Tensor:
    """All components, the best to ablate first, int64 [components].

    Args:
        attributions: of the model.
        increase: indices (or a mask) of examples whose outputs are to rise; or several lists of them, of which each
            counts alike; or a class name such as "three", `{"label": 3}`, or several names.
        decrease: examples whose outputs are to fall, given likewise.
        reference: examples whose outputs are to stay, given likewise; all others by default.
        rule: one of `RULES`, or a function of `Sides`.

    Raises:
        CoarError: no targets, no references, an index out of range, an example on both sides, or an unknown rule.
    """
    return _rule(rule)(_sides(attributions, *_by_index(attributions, increase, decrease, reference)))


def _by_index(attributions: Attributions, increase: Any, decrease: Any, reference: Any) -> _Indices:
    """The sides with indices in the place of class names and masks."""
    raised, lowered, spared = (
        _sets(labelled.chosen(attributions, one), len(attributions)) for one in (increase, decrease, reference)
    )
    return raised, lowered, None if reference is None else _joined(spared)


def _rule(rule: str | Rule) -> Rule:
    if callable(rule):
        return rule
    return RULES[rule]


def _sides(
    attributions: Attributions, raised: Sequence[list[int]], lowered: Sequence[list[int]], reference: list[int] | None
) -> Sides:
    """The weights of both sides, checked."""
    reference = _spared(len(attributions), _joined(raised), _joined(lowered), reference)
    weights = attributions.weights
    of_reference, known = weights[reference].double(), attributions.forecast
    in_place = (
        attributions.bias[reference].double() + of_reference.sum(1) if known is None else known.unablated[reference]
    )
    return Sides(
        [(sign, weights[one].double()) for sign, sets in ((1, raised), (-1, lowered)) for one in sets],
        of_reference,
        in_place.double(),
        unchecked.boundary_of(attributions),
    )


def _sets(examples: Examples | None, n_examples: int) -> list[list[int]]:
    """Sets of plain integers, also from tensors, arrays and masks; empty ones are left out."""
    if examples is None:
        return []
    several = len(examples) > 0 and all(hasattr(one, "__len__") and getattr(one, "ndim", 1) for one in examples)
    return [found for one in (examples if several else [examples]) if (found := numbers(one, n_examples))]


def _joined(sets: Sequence[list[int]]) -> list[int]:
    return [index for one in sets for index in one]


def check_sides(attributions: Attributions, increase: Any, decrease: Any, reference: Any) -> None:
    """Raises `CoarError` where `edit` would, for examples that there are not, or that are on two sides."""
    raised, lowered, spared = _by_index(attributions, increase, decrease, reference)
    _spared(len(attributions), _joined(raised), _joined(lowered), spared)


def _spared(n_examples: int, increase: list[int], decrease: list[int], reference: list[int] | None) -> list[int]:
    """The reference, by default all that are no targets; checked."""
    targets = {*increase, *decrease}
    if not targets:
        raise CoarError("nothing to edit for: give the indices of examples to increase or to decrease")
    if reference is None:
        reference = [index for index in range(n_examples) if index not in targets]
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
    return reference


def edit(
    model: nn.Module,
    attributions: Attributions | Attribute | Sequence[Attributions | Attribute],
    increase: Examples | None = None,
    decrease: Examples | None = None,
    reference: Examples | None = None,
    n_components: int | Sequence[int] | None = None,
    rule: str | Rule | Sequence[str] = "welch",
    validation: Goal | None = None,
    constraint: "Goal | Constraint | Sequence[Goal | Constraint]" = (),
    gate: float | Sequence[float] = 0.0,
    step: int | None = None,
) -> nn.Module:
    """A copy of the model in which a few components are ablated; the model itself stays as it was.

    For most purposes `forget`, `fix`, `lift`, `match` and `steer` are the better calls: they choose and measure on
    examples of their own. Without `validation` this one checks nothing, and says so in a warning. With it, the number
    of components is chosen by it, under the constraints; with `rule="auto"` the rule, too.

    The copy is an ordinary model: save it with its own library (or `edited.save`) and it loads without hf_coar. `undo`
    makes the original of it again.

    Given a function in the place of attributions, the edit goes in steps: after every `step` components the model
    without them is attributed anew, and the others are ranked by that. One pass a step is enough, and where many
    components go it often does better (figures of both: `scripts/results/edits/`)::

        def attribute(model):
            return coar.attribute(model, data, components, method=coar.PathGradient(rounds=0))

        coar.edit(model, attribute, decrease=bags, rule="covariance", n_components=40, step=4)

    Args:
        model: the model that was attributed.
        attributions: of it, or a function (model) -> attributions; or several, of the same components and examples and
            with other outputs, among which `validation` chooses.
        increase: indices (or a mask) of examples whose outputs are to rise; or several lists of them, of which each
            counts alike; or a class name such as "three", `{"label": 3}`, or several names.
        decrease: examples whose outputs are to fall, given likewise.
        reference: examples whose outputs are to stay, given likewise; all others by default.
        n_components: how many components to ablate, 10 by default; with `validation`, the numbers to try, by default up
            to a fifth of all components; with `validation` and in steps, the largest number.
        rule: which components come first: one of `editing.RULES` (the paper's is "welch"), a function of
            `editing.Sides`, several names for `validation` to choose from, or "auto", which tries `editing.AUTO`.
        validation: a function of the edited model, more is better, such as `editing.accuracy(data)`; on examples that
            judge nothing else.
        constraint: see `editing.choose`, such as `editing.Keep(editing.accuracy(others), within=0.01)`.
        gate: the fraction of the ablated components that stays, from 0 to below 1; with `validation` several to try.
            Not in steps.
        step: components between two attributions, by default 1 in 200 of all; only with functions.

    Raises:
        CoarError: targets or references that make no sense, `n_components` out of range, a choice without
            `validation`, constraints that nothing satisfies, or a mixture of attributions and functions.
        ModelMismatchError: another model.
    """
    single = isinstance(attributions, Attributions | str) or callable(attributions)
    given = [attributions] if single else list(attributions)
    if not given:
        raise CoarError("no attributions given")
    if odd := [one for one in given if not isinstance(one, Attributions) and not callable(one)]:
        raise CoarError(f"{odd[0]!r} is neither attributions nor a function that attributes a model")
    in_steps = [not isinstance(one, Attributions) for one in given]
    if any(in_steps) and not all(in_steps):
        raise CoarError("attributions and functions that make them in one edit; give one or the other")
    if (any(in_steps) and gate != 0) or (step is not None and not any(in_steps)):
        raise CoarError(f"gate={gate!r}, step={step!r}: steps need a function that attributes the model, and gate 0")
    rules = _rules(rule)
    if validation is None and len(rules) * len(given) > 1:
        raise CoarError(
            f"{len(rules) * len(given)} rules or attributions to choose from, and no validation; give validation=…, "
            "such as editing.accuracy(data), or one rule"
        )
    sources = [_Source(one, model) for one in given]
    components = sources[0].of_whole.components
    # Attributions that were given are of whatever was attributed then; a function has just attributed this model.
    fingerprint_of(model, anew=True)
    _check_attributions([one.of_whole for one in sources], model)
    sides = _by_index(sources[0].of_whole, increase, decrease, reference)
    rankers = {
        _label(name, place, sources): _Ranker(name, by, source, sides)
        for name, by in rules.items()
        for place, source in enumerate(sources)
    }
    if validation is not None:  # else what is chosen is known at once, and its own weights tell
        constants.check_says(model, components.groups, components.stand_in)
    models.check_saved(model, {group.parameter for group in sources[0].of_whole.components.groups})
    if any(in_steps):
        made = _in_steps(model, components, rankers, n_components, step, validation, constraint)
    else:
        made = _at_once(model, components, rankers, n_components, gate, validation, constraint)
    ranker = rankers[made.best.rule]
    if validation is None:
        raised, lowered = _joined(sides[0]), _joined(sides[1])
        how = made.best.rule, made.best.gate
        unchecked.tell(ranker.source.given, ranker.source.of_whole, made.ablated, how, (raised, lowered), sides[2])
    kept, gate = kept_without(len(components), made.ablated), made.best.gate
    gates = torch.where(kept, 1.0, gate) if gate else kept
    return with_ablated(model, components, gates, _entries(ranker, made, sides))


def with_ablated(model: nn.Module, components: Components, kept: Tensor, entries: Mapping[str, Any]) -> nn.Module:
    """A copy of a model in which components are ablated for good, with the record of it.

    Args:
        model: stays as it was.
        components: of it.
        kept: bool or float, [components].
        entries: of the record.

    Raises:
        CoarError: what stands in for them cannot be written into the weights; says why.
    """
    entries, stand_in = dict(entries), components.stand_in
    parts = zip(components.groups, kept.split(components.sizes()), strict=True)
    groups = [group for group, gates in parts if bool((gates != 1).any())]
    more = lengths(model, groups)  # `undo` puts back what the record names, and nothing else
    if stand_in is not None:
        more.update(constants.names(model, groups, stand_in))
        entries["ablation"] = dict(stand_in.record)
    entries["parameters"] = sorted({*entries.get("parameters", ()), *more})
    edited = models.copy_with_record(model, edit=entries)
    MaskedModel(edited, replace(components, fingerprint=None)).ablate_for_good(kept)
    return edited


class _Source:
    """Attributions, or the function that makes them; of the whole model they are made once."""

    def __init__(self, given: Attributions | Attribute, model: nn.Module) -> None:
        self.given = given
        self.of_whole = given if isinstance(given, Attributions) else _made_by(given, model)

    def of(self, model: nn.Module, ablated: Tensor) -> Attributions:
        """Attributions of the model, which is given without those ablated, int64 [any]."""
        if not callable(self.given) or len(ablated) == 0:
            return self.of_whole
        found = _made_by(self.given, model)
        _check_attributions([found], model)
        _check_alike(found, self.of_whole)
        return found


def _made_by(attribute: Attribute, model: nn.Module) -> Attributions:
    found = attribute(model)
    if not isinstance(found, Attributions):
        raise CoarError(f"the function given for attributions returned {found!r}; it must return those of its model")
    return found


@dataclass(frozen=True)
class _Ranker:
    """A rule on a source, as `stepwise.Ranker`."""

    name: str
    rule: str | Rule
    source: _Source
    sides: _Indices

    def __call__(self, model: nn.Module, ablated: Tensor) -> Tensor:
        return rank_components(self.source.of(model, ablated), *self.sides, self.rule)


@dataclass(frozen=True)
class _Made:
    """The best candidate, the components that it ablates, int64 [any], and all candidates."""

    best: Candidate
    ablated: Tensor
    tried: Sequence[Candidate] = ()
    step: int | None = None


def _at_once(
    model: nn.Module,
    components: Components,
    rankers: Mapping[str, _Ranker],
    n_components: Any,
    gate: Any,
    validation: Goal | None,
    constraint: Any,
) -> _Made:
    """By attributions of the whole model."""
    rankings = {label: rank(model, _NONE) for label, rank in rankers.items()}
    if validation is None:
        ((label, ranking),) = rankings.items()
        best = _plain(label, len(components), n_components, gate)
        return _Made(best, ranking[: best.n_components])
    numbers = [n_components] if isinstance(n_components, Integral) else n_components
    gates = [gate] if isinstance(gate, int | float) else list(gate)
    choice = choose(model, components, rankings, validation, constraint, numbers, gates)
    return _Made(choice.best, rankings[choice.best.rule][: choice.best.n_components], choice.tried)


def _in_steps(
    model: nn.Module,
    components: Components,
    rankers: Mapping[str, _Ranker],
    n_components: Any,
    step: int | None,
    validation: Goal | None,
    constraint: Any,
) -> _Made:
    """Attributing anew between the steps."""
    if validation is None and n_components is None:
        n_components = N_COMPONENTS
    most, step = stepwise.checked_steps(len(components), n_components, step)
    if validation is None:
        ((label, rank),) = rankers.items()
        *_, ablated = stepwise.steps(model, components, rank, most, step)
        return _Made(Candidate(label, most, 0.0, None, None), ablated, (), step)
    choice, ablated = stepwise.choose_in_steps(model, components, rankers, validation, constraint, most, step)
    return _Made(choice.best, ablated[choice.best.rule][: choice.best.n_components], choice.tried, step)


def _check_attributions(candidates: Sequence[Attributions], model: nn.Module) -> None:
    """Raises unless all are of this model as it is now, and of the same components and examples."""
    fingerprint, record = fingerprint_of(model), models.record(model)
    for one in candidates:
        one.check_model(fingerprint, record)
        _check_alike(one, candidates[0])


def _check_alike(one: Attributions, other: Attributions) -> None:
    if one.components.to_json() != other.components.to_json() or len(one) != len(other):
        raise CoarError(f"{one} and {other} differ in components or examples; attribute the same ones")
    other.identity.check(one.identity)


def _rules(rule: str | Rule | Sequence[str | Rule]) -> dict[str, str | Rule]:
    """Those to try, by name."""
    given = AUTO if isinstance(rule, str) and rule == "auto" else rule
    given = given if isinstance(given, list | tuple) else [given]
    return {one if isinstance(one, str) else getattr(one, "__qualname__", "of your own"): _rule(one) for one in given}


def _label(name: str, place: int, sources: Sequence[_Source]) -> str:
    """A rule's name; where there are several attributions, with the output of the one that it ranks by."""
    return name if len(sources) == 1 else f"{name} on {sources[place].of_whole.provenance.output} ({place})"


def _plain(label: str, n_all: int, n_components: Any, gate: Any) -> Candidate:
    """What was asked for, where there is nothing to choose."""
    n_components = N_COMPONENTS if n_components is None else n_components
    if not is_count(n_components, most=n_all):
        raise CoarError(
            f"n_components={n_components!r}; must be a whole number from 1 to {n_all}, or several with validation=…"
        )
    if not isinstance(gate, int | float) or not 0 <= gate < 1:
        raise CoarError(f"gate={gate!r}; must be the fraction that stays, from 0 (ablated) to below 1")
    return Candidate(label, int(n_components), float(gate), None, None)


def _entries(ranker: _Ranker, made: _Made, sides: _Indices) -> dict[str, Any]:
    """The record of an edit, JSON values: what was ablated and why, and all that `undo` needs."""
    attributions, (increase, decrease, reference) = ranker.source.of_whole, sides
    components = [attributions.components[int(index)] for index in made.ablated]
    parameters = {name for c in components for name in (c.group.parameter, *c.group.shared_by)}
    entries = {
        "rule": ranker.name,
        "output": attributions.provenance.output,
        "granularity": attributions.components.granularity,
        "data": dict(attributions.provenance.data),
        "increase": _joined(increase),
        "decrease": _joined(decrease),
        "reference": "all others" if reference is None else reference,
        "classes": {
            side: names
            for side, examples in (("increase", increase), ("decrease", decrease))
            if (names := labelled.classes(attributions, _joined(examples)))
        },
        "base": dict(attributions.provenance.model),
        "components": [str(component) for component in components],
        "indices": made.ablated.tolist(),
        "parameters": sorted(parameters),
    }
    if made.best.gate:
        entries["gate"] = made.best.gate
    if made.step:
        entries["step"] = made.step
    if made.tried:
        entries["tried"] = [list(astuple(candidate)) for candidate in made.tried]
    return entries


def kept_without(n_components: int, ablated: Tensor | Sequence[int]) -> Tensor:
    """The mask bool [components] that ablates just these components."""
    kept = torch.ones(n_components, dtype=torch.bool)
    kept[torch.as_tensor(ablated, dtype=torch.long)] = False
    return kept
