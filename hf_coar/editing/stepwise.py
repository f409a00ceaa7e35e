"""Editing in steps: ablate a few components, attribute the model without them, rank the others anew, and so on.

Attributions say what a few ablations do. After some, targets that have given way ask for nothing more, references that
have come near the boundary want sparing, and components that stand in for those that are gone begin to count. None of
it shows in attributions of the whole model, and one pass a step (`PathGradient(rounds=0)`) is enough.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.editing.choosing import LARGEST_FRACTION, Candidate, Choice, Constraint, Goal, Trials
from hf_coar.errors import CoarError, is_count
from hf_coar.masking import MaskedModel

logger = logging.getLogger(__name__)

# (model, ablated) -> all components, the best to ablate first; the model is given without those ablated, int64 [any].
Ranker = Callable[[nn.Module, Tensor], Tensor]

STEP_FRACTION = 0.005  # of the components are ablated before the others are ranked anew
PATIENCE = 3  # steps without anything better, after which a walk ends


def steps(model: nn.Module, components: Components, rank: Ranker, most: int, step: int) -> Iterator[Tensor]:
    """Ablates `step` components at a time, ranking those that are left anew.

    Args:
        model: unchanged afterwards.
        components: its components.
        rank: (model, ablated) -> int64 [components]; it is given the model without those ablated so far, int64 [any].
        most: components in all.
        step: components between two rankings.

    Yields:
        int64 [step], [2 · step], …, [most]: the components ablated so far, in order.
    """
    masked, kept = MaskedModel(model, components), torch.ones(len(components), dtype=torch.bool)
    ablated = torch.empty(0, dtype=torch.long)
    while len(ablated) < most:
        with masked.ablated(kept):
            ranking = rank(model, ablated)
        ablated = torch.cat([ablated, ranking[kept[ranking]][: min(step, most - len(ablated))]])
        kept[ablated] = False
        yield ablated


def choose_in_steps(
    model: nn.Module,
    components: Components,
    rankers: Mapping[str, Ranker],
    validation: Goal,
    constraint: "Goal | Constraint | Sequence[Goal | Constraint]" = (),
    most: int | None = None,
    step: int | None = None,
) -> tuple[Choice, dict[str, Tensor]]:
    """Like `choose`, with rankings that are made anew after every few ablations.

    A walk ends after three steps that bring nothing better on validation. As long as the constraints do not hold, it
    ends after three that lead away from them; where their measure does not move, as a coarse one may not, it goes on.
    Numbers between the steps next to the best one are tried at the end.

    Args:
        model: unchanged afterwards.
        components: its components.
        rankers: by name, (model, ablated) -> int64 [components], the best to ablate first, as of `steps`.
        validation: a function of the edited model, more is better; on examples that judge nothing else.
        constraint: see `choose`.
        most: components in all; by default a fifth of them.
        step: components between two rankings; by default 1 in 200.

    Returns:
        The choice, and by name the components ablated, in order, int64 [any].

    Raises:
        UnsatisfiedError: no candidate satisfies the constraints.
        CoarError: numbers out of range, or a measure that is not a number.
    """
    most, step = checked_steps(len(components), most, step)
    trials = Trials(model, components, validation, constraint)
    ablated: dict[str, Tensor] = {}
    for name, rank in rankers.items():
        walk: list[Candidate] = []
        for ablated[name] in steps(model, components, rank, most, step):
            walk.append(trials.attempt(name, ablated[name]))
            logger.info("edit: rule %s, %d components, %s", name, len(ablated[name]), _said(walk[-1]))
            if _stale(walk):
                break
    best = trials.best()
    last = min(best.n_components + step, len(ablated[best.rule]))
    trials.attempt_between(best, ablated[best.rule], max(0, best.n_components - step), last)
    return trials.choice(), ablated


def checked_steps(n_all: int, most: int | None, step: int | None) -> tuple[int, int]:
    """The numbers, or what is usual.

    Raises:
        CoarError: not whole numbers of 1 or more, or more than there are.
    """
    most = max(1, int(LARGEST_FRACTION * n_all)) if most is None else most
    step = max(1, int(STEP_FRACTION * n_all)) if step is None else step
    for name, value in (("n_components", most), ("step", step)):
        if not is_count(value, most=n_all):
            raise CoarError(f"{name}={value!r}; in steps it must be a whole number from 1 to {n_all}")
    return int(most), int(step)


def _said(candidate: Candidate) -> str:
    if candidate.goal is None:
        return f"constraints missed by {-candidate.slack:.4g}"
    return f"validation {candidate.goal:.4g}"


def _stale(walk: Sequence[Candidate]) -> bool:
    """Whether the last few steps were no better than the best one before."""
    if len(walk) <= PATIENCE:
        return False
    before, last = walk[:-PATIENCE], walk[-PATIENCE:]
    if all(one.goal is None for one in walk):
        return max(one.slack for one in last) < max(one.slack for one in before)
    goals = [[-math.inf if one.goal is None else one.goal for one in part] for part in (before, last)]
    return max(goals[1]) <= max(goals[0])
