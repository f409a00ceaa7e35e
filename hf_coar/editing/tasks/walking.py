"""Ablating step by step until the allowance is spent, and which of the models on the way is the best."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_coar.editing.choosing import LARGEST_FRACTION, Candidate
from hf_coar.editing.making import kept_without
from hf_coar.editing.stepwise import Ranker
from hf_coar.errors import UnsatisfiedError
from hf_coar.masking import MaskedModel

logger = logging.getLogger(__name__)

STEP_FRACTION = 0.01  # of the components go before the others are ranked anew; fewer where the allowance ends
# Independent candidates that a walk counts for (most of what one model on it lacks, the next one lacks, too). Where the
# one is taken that goes furthest, that many standard errors must fit into the allowance; with one, the others lost 2.5
# points of 1.5 on the demo.
WALK = 4
MOST_TRIED = 24  # models measured on a walk, whatever is left of the allowance


@dataclass(frozen=True)
class Verdict:
    """What the examples to choose on say of a model.

    Attributes:
        target: what is to be changed, as measured, such as an accuracy from 0 to 1.
        others: what is to stay, likewise.
        missing: how far the target is from where it shall be, with one standard error on the safe side; at most 0 =
            there.
        spent: by how much the others fall below what is allowed, likewise; at most 0 = allowed.
        merit: of two that satisfy both, the better one has more.
        short: what the target lacks, in words, where that is no number with a standard error; else empty.
        over: likewise, what the others lost too much.
    """

    target: float
    others: float
    missing: float
    spent: float
    merit: float
    short: str = ""
    over: str = ""

    @property
    def satisfies(self) -> bool:
        """Both limits."""
        return self.missing <= 0 and self.spent <= 0

    @property
    def has_numbers(self) -> bool:
        """Whether all outputs are numbers; a model of which some are none is never taken, and is not shown."""
        return self is not NO_NUMBERS


NO_NUMBERS = Verdict(math.nan, math.nan, math.inf, math.inf, -math.inf)  # of a model that gives NaN or infinity


@dataclass(frozen=True)
class Point:
    """A model on the way: what it lacks, int64 [any], by which ranking, the verdict, and a last layer fitted anew."""

    ablated: Tensor
    rule: str
    verdict: Verdict
    head: tuple[Tensor, Tensor | None] | None = None

    def as_candidate(self) -> Candidate:
        """As the record of an edit holds it."""
        if not self.verdict.has_numbers:
            return Candidate(self.rule, len(self.ablated), 0.0, None, None)
        slack = -max(self.verdict.missing, self.verdict.spent)
        return Candidate(self.rule, len(self.ablated), 0.0, slack, self.verdict.merit if slack >= 0 else None)


Measure = Callable[[nn.Module, Tensor], Sequence[Point]]  # (model, ablated): as it is, and with what else was tried


def margin(n_candidates: int) -> float:
    """Standard errors that are kept from a limit: one, and more the more models there are to choose from.

    The best of m equal ones looks better than it is by about sqrt(2 log m) of them.
    """
    return math.sqrt(1 + 2 * math.log(max(1, n_candidates)))


def walk(
    masked: MaskedModel, rank: Ranker, measure: Measure, most: int | None = None, step: int | None = None,
    tried: int = MOST_TRIED, passing_by: int = 0,
) -> list[Point]:  # fmt: skip
    """Ablates a step of components, ranks the others anew, and so on, until the allowance of the others is spent.

    A step that spends more than there is, is halved. Where the smallest is still too dear, the walk ends, or leaves its
    components in place for good and goes on past them.

    Args:
        masked: the model with its components.
        rank: (model, ablated) -> int64 [components], the best to ablate first.
        measure: a model without some components, in one way or several; what is cheapest counts.
        most: components in all; by default a fifth of them.
        step: components at a time; by default 1 in 100.
        tried: models that are measured at most.
        passing_by: steps that are gone past at most.
    """
    n_all = len(masked)
    most = max(1, int(LARGEST_FRACTION * n_all)) if most is None else most
    step = max(1, round(STEP_FRACTION * n_all)) if step is None else step
    smallest = max(1, step // 4)  # smaller ones bring little, and cost as much
    points: list[Point] = []
    n_tried = 0
    kept, ablated = torch.ones(n_all, dtype=torch.bool), torch.empty(0, dtype=torch.long)
    barred, size, passed_by = torch.zeros(n_all, dtype=torch.bool), step, 0
    ranking: Tensor | None = None
    while len(ablated) < most and n_tried < tried and passed_by <= passing_by:
        if ranking is None:
            with masked.ablated(kept):
                ranking = rank(masked.model, ablated)
        best = ranking[kept[ranking] & ~barred[ranking]]
        if not len(best):
            break
        taken = best[: min(size, most - len(ablated))]  # of the last ones there may be fewer than a step
        found = _measured(masked, torch.cat([ablated, taken]), measure)
        points += found
        n_tried += 1
        if min(point.verdict.spent for point in found) <= 0:
            ablated, ranking = found[0].ablated, None
            kept[ablated] = False
        elif len(taken) // 2 >= smallest:
            size = len(taken) // 2
        else:
            barred[taken] = True
            size, passed_by = step, passed_by + 1
    return points


def _measured(masked: MaskedModel, ablated: Tensor, measure: Measure) -> Sequence[Point]:
    with masked.ablated(kept_without(len(masked), ablated)) as model:
        points = measure(model, ablated)
    for point in points:
        found = point.verdict
        if not found.has_numbers:
            logger.info("edit: %s, %d components: some outputs are no numbers", point.rule, len(ablated))
            continue
        logger.info(
            "edit: %s, %d components: target %.3f, others %.3f (missing %.3f, over the allowance %.3f)",
            point.rule, len(ablated), found.target, found.others, max(0.0, found.missing), max(0.0, found.spent),
        )  # fmt: skip
    return points


def best(points: Sequence[Point], wanted: str, before: Verdict) -> Point:
    """The best of those that keep all limits; of equals, the one that ablates fewest.

    Args:
        points: of all walks.
        wanted: in words, for the error.
        before: of the model with nothing ablated.

    Raises:
        UnsatisfiedError: none does; says what the nearest reach, and what they cost.
    """
    allowed = [one for one in points if one.verdict.satisfies]
    if allowed:
        return max(allowed, key=lambda one: (one.verdict.merit, -len(one.ablated)))
    cheap = min((one for one in points if one.verdict.spent <= 0), key=lambda one: one.verdict.missing, default=None)
    there = min((one for one in points if one.verdict.missing <= 0), key=lambda one: one.verdict.spent, default=None)
    said = [f"without an edit: target {before.target:.3g}, others {before.others:.3g}"]
    said += [f"within the limits the best is {_said(cheap)}"] if cheap else []
    said += [f"the target is met at {_said(there)}"] if there else ["no model on the way meets the target"]
    if not cheap and not there and points:
        said += [f"nearest comes {_said(min(points, key=lambda one: one.verdict.missing))}"]
    error = UnsatisfiedError(
        f"no edit found that {wanted} on the examples to choose on. "
        f"{'; '.join(said)}. Allow more, ask for less, or give more data"
    )
    error.best = there or cheap
    raise error


def _said(point: Point) -> str:
    """A model in words."""
    verdict = point.verdict
    if not verdict.has_numbers:
        return f"NaN or infinity, which some outputs are ({len(point.ablated)} components)"
    found = ", ".join([f"{len(point.ablated)} components", *_lacking(verdict)])
    return f"target {verdict.target:.3g}, others {verdict.others:.3g} ({found})"


def _lacking(verdict: Verdict) -> list[str]:
    """What a model lacks, in words: what is measured may look well within limits that its margin for chance exceeds."""
    gaps = [
        (f"{value:.2g} {what}", words)
        for value, what, words in (
            (verdict.missing, "short of the target", verdict.short),
            (verdict.spent, "over the allowance", verdict.over),
        )
        if value > 0
    ]
    guarded = " and ".join(said for said, words in gaps if not words)
    return [words for _, words in gaps if words] + ([f"with its margin for chance {guarded}"] if guarded else [])
