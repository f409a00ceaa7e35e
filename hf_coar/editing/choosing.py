"""Choosing how much to edit, and by which rule: every candidate ablates, is measured on validation, and is undone."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.errors import CoarError, UnsatisfiedError, is_count
from hf_coar.masking import MaskedModel

logger = logging.getLogger(__name__)

Goal = Callable[[nn.Module], float]  # more is better

LARGEST_FRACTION = 0.2  # of the components that are tried unless the numbers are given
_FINE = 8  # numbers tried between the neighbours of the best one


class Constraint(Protocol):
    """What `measures.Keep` and its friends are."""

    def bind(self, model: nn.Module) -> Goal:
        """The slack, at least 0 = satisfied, as a function of the edited model."""
        ...


@dataclass(frozen=True)
class Candidate:
    """An edit that was tried.

    Attributes:
        rule: name of the ranking.
        n_components: the first so many of it were ablated.
        gate: the fraction of them that stayed.
        slack: the smallest of all constraints, at least 0 = satisfied; None without constraints.
        goal: on validation; None where a constraint was not satisfied.
    """

    rule: str
    n_components: int
    gate: float
    slack: float | None
    goal: float | None


@dataclass(frozen=True)
class Choice:
    """The best candidate and all that were tried.

    Attributes:
        best: satisfies the constraints; of equals, the one that ablates fewest.
        tried: every candidate, in the order in which they were tried.
    """

    best: Candidate
    tried: tuple[Candidate, ...]


def choose(
    model: nn.Module,
    components: Components,
    rankings: Mapping[str, Tensor],
    validation: Goal,
    constraint: "Goal | Constraint | Sequence[Goal | Constraint]" = (),
    numbers: Sequence[int] | None = None,
    gates: Sequence[float] = (0.0,),
) -> Choice:
    """The ranking and the number of components whose ablation does best on validation.

    Coarse numbers first, then those between the neighbours of the best. Constraints are measured first, and the goal
    only where they hold.

    Args:
        model: unchanged afterwards.
        components: its components.
        rankings: components in the order in which they would be ablated, int64 [components], by name.
        validation: a function of the edited model, more is better; on examples that judge nothing else.
        constraint: one or more: a function of the edited model that is at least 0 (or True) where it is satisfied, or
            `Keep`, `AtMost`, `AtLeast`.
        numbers: of components to try; by default 1, 2, 3, 5, 8, … up to a fifth of all, and then finer.
        gates: fractions of the ablated components that stay; 0 = plain ablation.

    Raises:
        UnsatisfiedError: no candidate satisfies the constraints; the message gives the nearest.
        CoarError: numbers out of range, or a measure that is not a number.
    """
    coarse = list(numbers_to_try(len(components)) if numbers is None else numbers)
    _check(components, rankings, coarse, gates)
    trials = Trials(model, components, validation, constraint)
    for rule, ranking in rankings.items():
        for gate in gates:
            for n_components in coarse:
                trials.attempt(rule, ranking[:n_components], gate)
    best = trials.best()
    if numbers is None:
        place = coarse.index(best.n_components)
        low, high = coarse[max(0, place - 1)], coarse[min(len(coarse) - 1, place + 1)]
        trials.attempt_between(best, rankings[best.rule], low, high)
    return trials.choice()


class Trials:
    """Candidates measured one after the other; the model is as it was after each."""

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        validation: Goal,
        constraint: "Goal | Constraint | Sequence[Goal | Constraint]" = (),
    ) -> None:
        """Arguments as of `choose`."""
        given = constraint if isinstance(constraint, Sequence) else (constraint,)
        self.masked, self.validation = MaskedModel(model, components), validation
        self.slacks = [one.bind(model) if hasattr(one, "bind") else one for one in given]
        self.tried: list[Candidate] = []

    def attempt(self, rule: str, ablated: Tensor, gate: float = 0.0) -> Candidate:
        """Measure the model without some components, int64 [any]."""
        kept = torch.ones(len(self.masked))
        kept[ablated] = gate
        with self.masked.ablated(kept) as model:
            slack = min((_slack(one(model)) for one in self.slacks), default=None)
            violated = slack is not None and slack < 0
            goal = None if violated else _number("validation", self.validation(model))
        self.tried.append(Candidate(rule, len(ablated), float(gate), slack, goal))
        return self.tried[-1]

    def attempt_between(self, best: Candidate, ranking: Tensor, low: int, high: int) -> None:
        """Measure numbers between two that were tried, evenly spread."""
        step = max(1, (high - low) // (_FINE + 1))
        for number in range(low + step, high, step):
            if number != best.n_components:
                self.attempt(best.rule, ranking[:number], best.gate)

    def best(self) -> Candidate:
        """The best of those that satisfy the constraints; of equals, the one that ablates fewest."""
        allowed = [one for one in self.tried if one.goal is not None]
        if not allowed:
            nearest = max(self.tried, key=lambda one: one.slack)
            raise UnsatisfiedError(
                f"none of {len(self.tried)} candidates satisfies the constraints; the nearest, rule {nearest.rule} "
                f"with {nearest.n_components} components, misses by {-nearest.slack:.4g}: loosen them, or give other "
                "targets"
            )
        return max(allowed, key=_merit)

    def choice(self) -> Choice:
        """The best and all others."""
        best = self.best()
        logger.info(
            "edit: %s%d components, gate %g, by validation (%g, %d candidates)",
            f"rule {best.rule}, " if best.rule else "", best.n_components, best.gate, best.goal, len(self.tried),
        )  # fmt: skip
        return Choice(best, tuple(self.tried))


def _merit(candidate: Candidate) -> tuple[float, int]:
    return candidate.goal, -candidate.n_components


def numbers_to_try(n_components: int, most: int | None = None) -> list[int]:
    """1, 2, 3, 5, 8, 12, 18, …: each about half as much again, up to `most`, by default a fifth of all components."""
    most = max(1, int(LARGEST_FRACTION * n_components)) if most is None else min(most, n_components)
    found = [1]
    while found[-1] < most:
        found.append(min(most, math.ceil(found[-1] * 1.5)))
    return found


def _check(components: Components, rankings: Mapping[str, Tensor], numbers: Any, gates: Sequence[float]) -> None:
    n_all = len(components)
    if not rankings or not numbers or not all(is_count(k, most=n_all) for k in numbers):
        raise CoarError(f"{len(rankings)} rankings and the numbers {list(numbers)[:8]}: give numbers from 1 to {n_all}")
    for name, ranking in rankings.items():
        if not torch.equal(ranking.sort().values, torch.arange(n_all)):
            raise CoarError(f"the ranking {name!r} is not an order of all {n_all} components")
    if not gates or not all(0 <= gate < 1 for gate in gates):
        raise CoarError(f"gates {list(gates)[:8]}: give fractions that stay, from 0 (ablated) to below 1")


def _slack(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or (getattr(value, "dtype", None) == torch.bool and value.numel() == 1):
        return 0.0 if value else -1.0
    return _number("a constraint", value)


def _number(what: str, value: Any) -> float:
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise CoarError(f"{what} gave a {type(value).__name__} for an edited model; it must be one number") from None
    if not math.isfinite(value):
        raise CoarError(f"{what} gave {value} for an edited model; it must be a finite number")
    return value


def choose_n_components(
    model: nn.Module,
    components: Components,
    ranking: Tensor,
    score: Goal,
    candidates: Sequence[int],
) -> tuple[int, list[float]]:
    """How many components to ablate: the number whose model scores best, the smallest of equals.

    Args:
        model: unchanged afterwards.
        components: its components.
        ranking: from `rank_components`.
        score: judges the ablated model on validation examples, which must judge nothing else; more is better.
        candidates: the numbers to try.

    Returns:
        The best number, and the score of every candidate.

    Raises:
        CoarError: no candidates, or one out of range.
    """
    if not candidates or not all(is_count(k, most=len(components)) for k in candidates):
        raise CoarError(f"candidates {list(candidates)[:8]}: give numbers from 1 to {len(components)}")
    choice = choose(model, components, {"": ranking}, score, numbers=candidates)
    return choice.best.n_components, [candidate.goal for candidate in choice.tried]
