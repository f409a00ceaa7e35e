"""Choosing: the ablated fraction and the method, by what the model shows on a few examples before a run begins."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import Group
from hf_coar.errors import CoarError
from hf_coar.estimators import budget as budgets
from hf_coar.estimators import detached, faint
from hf_coar.estimators.checking import DEFAULT_CHECKS
from hf_coar.estimators.leave_one_out import LeaveOneOut, n_pairs
from hf_coar.estimators.path_gradient import BatchReader, PathGradient
from hf_coar.estimators.registry import Estimator
from hf_coar.estimators.regression import Regression
from hf_coar.estimators.solvers import ARD
from hf_coar.masking import MaskedModel
from hf_coar.models.outputs import Output
from hf_coar.runs import checks, sampling
from hf_coar.runs.problem import Problem, Size
from hf_coar.storage import files

logger = logging.getLogger(__name__)

FRACTIONS = (0.05, 0.02, 0.01, 0.005, 0.0025)  # tried from the largest on
_MASKS, _EXAMPLES, _SURVIVING = 8, 16, 0.5
# Up to so many times as many components as path gradient takes passes, leave-one-out is taken where gradients are
# mostly noise. Of the 270 heads of a language model two rounds have a reliability of .56 and less: there path gradient
# has .75 at 5 % and .54 on strong sets, leave-one-out with pairs among 16 (+ 120 passes) .80 and .74. Of 400 filters of
# a convnet and 576 neurons of a GPT-2 it is above .9, and path gradient, at less than half the passes, as good.
_DEARER, _NOISE, _AMONG = 5, 0.75, 16
# Rounds of a model that is fragile and noisy: on four photographs and the 17,056 filters of a MobileNetV2, ablated by
# 1 %, fresh masks are predicted with .65 by four rounds (reliability .75) and with .74 by eight (.89).
_MORE_ROUNDS, _TRIED_FOR_ROUNDS = 8, 4
# In trials with 8 to 13 components, of which there is no script, weights by leave-one-out with pairs were off by .25 to
# .34 of their norm at a fraction of .3 and .5 to .7 at .5, those by a regression on 128 or 200 masks by .14 to .32.
# Fresh masks were predicted better than by these at .3, and at .5 about as well (8 to 58: .80, .36, .54;
# by a regression .83, .39, .50), so that the method is kept.
_FAR, _FEWEST_MASKS = 0.25, 200
_LOOKED_AT = 8  # examples whose two rounds say how much is noise

_FILE = "chosen.json"
_SETTINGS = ("pairs_among", "rounds")  # of methods, that are chosen as well

Reasons = dict[str, str]  # of what was chosen: "ablated_fraction", "method"


def settled(problem: Problem, method: Estimator | None, budget: float | str | None = None) -> tuple[Estimator, Reasons]:
    """The method of a run, and why what was chosen was; the problem gets its fraction. Some passes on a few examples.

    Args:
        problem: its `ablated_fraction` may be None.
        method: None to choose one.
        budget: of the run, see `budget.choose`, which comes after.

    Returns:
        the method, and the reasons of what was chosen, by "ablated_fraction" and "method".

    Raises:
        ModelError: the model does not repeat itself, or lets no gradient through to a method that needs it.
    """
    reasons: Reasons = {}
    try:
        first = problem.first.tried(problem.model, lambda batch: _look(problem, method, batch), checks.N_EXAMPLES)
        if problem.ablated_fraction is None:
            problem.ablated_fraction, reasons["ablated_fraction"] = fraction(problem)
        if getattr(problem.output.call, "shares_pass", False):
            chosen, reason = _of_shared_passes(problem, method)
        else:
            chosen, reason = (method, "") if method is not None else best_method(problem, first, budget)
        if method is None:
            method, reasons["method"] = chosen, f"method={chosen.name!r}: {reason}"
        if method.differentiates and first.faint:
            _warn(problem, faint.warning(first.faint, len(problem.components.groups)))
        if method.differentiates and first.detached:
            _warn(problem, detached.warning(first.detached, len(problem.components.groups)))
        exact_up_to = 2 if isinstance(method, LeaveOneOut) and method.pairs_among >= 2 else 1  # components
        if isinstance(method, LeaveOneOut) and problem.ablated_fraction > _FAR and len(problem.masked) > exact_up_to:
            _warn(problem, _far_from_whole(method, problem.size))
    except (RuntimeError, MemoryError) as error:
        if not models.is_out_of_memory(error):
            raise
        problem.ablated_fraction = problem.ablated_fraction or FRACTIONS[0]
        method = method or PathGradient()  # the run itself says what does not fit
    for reason in reasons.values():
        logger.info("chosen: %s", reason)
    return method, reasons


def _warn(problem: Problem, line: str) -> None:
    problem.warnings += (line,)
    logger.warning("%s", line)


def _far_from_whole(method: LeaveOneOut, size: Size) -> str:
    what = "single effects and pairs" if method.pairs_among else "single effects"
    return (
        f"weights that are made of {what} hold near the whole model: at ablated_fraction={size.ablated_fraction:.3g} "
        "they may be off by half, more than what is predicted of sets tells; for the weights themselves take "
        f"method=hf_coar.Regression(n_masks={max(_FEWEST_MASKS, 5 * size.n_components)})"
    )


def kept(folder: Path, problem: Problem, method: Estimator, reasons: Reasons) -> tuple[Estimator, Reasons]:
    """What the one who began a run in a folder chose, so that it resumes, and all processes agree.

    Args:
        folder: of the run.
        problem: gets that fraction, if one was chosen.
        method: of the run.
        reasons: of what was chosen just now, see `settled`.

    Raises:
        CoarError: the file of the choice holds something else.
    """
    if not reasons:
        return method, reasons
    path = folder / _FILE
    settings = {name: getattr(method, name, 0) for name in _SETTINGS}
    found = {"ablated_fraction": {"value": problem.ablated_fraction}, "method": {"name": method.name, **settings}}
    if not path.exists():
        mine = {what: {**found[what], "reason": reason} for what, reason in reasons.items()}
        files.write_json(path, mine, replace=False)
    known = files.read_json(path)
    try:
        begun = {what: known[what] for what in reasons if what in known}
        if "ablated_fraction" in begun:
            problem.ablated_fraction = float(begun["ablated_fraction"]["value"])
            sampling.check_fraction(problem.ablated_fraction)
        if "method" in begun:
            settings = {name: n for name in _SETTINGS if (n := begun["method"].get(name))}
            method = replace(_chosen()[begun["method"]["name"]], **settings)
        return method, reasons | {what: str(one["reason"]) for what, one in begun.items()}
    except (TypeError, KeyError, ValueError) as error:
        said = f"{path} holds {str(known)[:80]}, which is no choice; take another folder, or delete the file"
        raise CoarError(said) from error


def _chosen() -> dict[str, Estimator]:
    """All that may be chosen."""
    one_by_one, forward_only = LeaveOneOut(check_masks=DEFAULT_CHECKS), Regression(solver=ARD())
    return {one.name: one for one in (PathGradient(), one_by_one, forward_only)}


class Look(NamedTuple):
    """What a few examples say of a model before its run.

    Attributes:
        blocked: the groups that no gradient reaches although they matter.
        faint: those that matter, and of which next to nothing arrives at the gates.
        detached: others of which the gradient leaves out a part.
    """

    blocked: Sequence[Group] = ()
    faint: Sequence[Group] = ()
    detached: Sequence[Group] = ()


def _look(problem: Problem, method: Estimator | None, batch: data_module.Batch) -> Look:
    """A look at a model that repeats itself, and that lets gradients through to a method that needs them."""
    checks.check_repeats(problem.model, problem.output, batch)
    if getattr(problem.output.call, "shares_pass", False) or (method is not None and not method.differentiates):
        return Look()
    reads = faint.reads(problem, batch)
    if reads is None or any(not of_group.any() for of_group in reads.split(problem.components.sizes(), dim=1)):
        if method is not None:
            checks.check_reached(problem.masked, problem.output, batch)
        elif blocked := checks.blocked(problem.masked, problem.output, batch):
            return Look(blocked)
    if reads is None:
        return Look()
    untold = faint.found(problem, batch, reads)
    in_part = detached.found(problem.masked, problem.output, batch)
    return Look((), untold, [group for group in in_part if group not in untold])


def fraction(problem: Problem) -> tuple[float, str]:
    """The largest fraction at which the model still is a model, and what was seen.

    A few random masks of each size on the first examples: the first size at which half of the decisions survive, or for
    outputs without a boundary, at which half is left of what all components together contribute.
    """
    masked, output, seed = problem.masked, problem.output, problem.seed
    seen = problem.first.tried(problem.model, lambda batch: shares_left(masked, output, batch, seed), _EXAMPLES)
    what = "of the decisions" if problem.output.boundary is not None else "of the output"
    said = ", ".join(f"{share:.0%} at {value:.3g}" for value, share in seen)
    reason = f"ablated_fraction={seen[-1][0]:.3g}: what is left {what} under random masks is {said}"
    if seen[-1][1] < _SURVIVING:
        logger.warning("%s: even so few destroy the model; exclude its most sensitive layers", reason)
    return seen[-1][0], reason


def shares_left(masked: MaskedModel, output: Output, batch: data_module.Batch, seed: int) -> list[tuple[float, float]]:
    """Fractions, and what is left of the model at each, down to the first at which enough is.

    Args:
        masked: the model with its components, in evaluation mode.
        output: whose decisions are to survive, or what all components together contribute to it.
        batch: of some examples, where the model is.
        seed: of the masks.
    """
    n_components, boundary, seen = len(masked), output.boundary, []
    whole = _outputs(masked, output, batch, torch.ones(1, n_components, dtype=torch.bool))
    nothing = None
    if boundary is None:
        nothing = _outputs(masked, output, batch, torch.zeros(1, n_components, dtype=torch.bool))
    for value in [value for value in FRACTIONS if value * n_components >= 1] or [min(0.5, 1 / n_components)]:
        masks = sampling.Masks(n_components, value, _MASKS, seed, sampling.CHECKS)
        found = _outputs(masked, output, batch, masks.rows(0, _MASKS))
        seen.append((value, _surviving(found, whole, nothing, boundary)))
        if seen[-1][1] >= _SURVIVING:
            break
    return seen


def _surviving(found: Tensor, whole: Tensor, nothing: Tensor | None, boundary: float | None) -> float:
    """A share from 0 to 1, from outputs [masks, examples], [1, examples] and [1, examples]."""
    found = found.nan_to_num(-math.inf if nothing is None else 0.0)
    if boundary is not None:
        return float(((found > boundary) == (whole > boundary)).float().mean())
    whole_drop = (whole - nothing).abs().mean()
    if not (whole_drop.isfinite() and whole_drop > 0):
        return 1.0
    return max(0.0, 1 - float((whole - found).abs().mean() / whole_drop))


@torch.no_grad()
def _outputs(masked: MaskedModel, output: Output, batch: data_module.Batch, masks: Tensor) -> Tensor:
    found = []
    for kept in masks:
        with masked.ablated(kept):
            found.append(output.of(masked.model, batch).cpu())
    return torch.stack(found)


def best_method(
    problem: Problem, first: Look | None = None, budget: float | str | None = None
) -> tuple[Estimator, str]:
    """The best method for a problem, and why.

    Without a gradient, leave-one-out for few components and ARD regression for many. With one, leave-one-out wherever
    it costs no more than path gradient, the rest of the passes going into pairs; and for somewhat more components, with
    pairs among the strongest, where gates tell next to nothing of some modules, or two rounds on a few examples show
    that gradients are mostly noise; where that is out of reach and less is ablated than as a rule, twice the rounds. A
    budget has to afford it; one in minutes is timed on a few examples, where leave-one-out is within reach.

    Args:
        problem: of which the first examples are looked at.
        first: what was seen of it.
        budget: in forward passes an example, or a time, or None.
    """
    first = first or Look()
    n_components, path = len(problem.masked), PathGradient()
    amount, timed = (None, False) if budget is None else budgets.parse(budget)
    usual, exact = _usual(problem.size), n_components + 1 + DEFAULT_CHECKS
    if first.blocked:
        found = _chosen()["regression"]
        found = _chosen()["leave_one_out"] if budget is None and exact <= found.n_masks / 2 else found
        return found, _without_gradient(problem, first.blocked, found)
    if timed and exact <= _DEARER * usual:
        amount = budgets.affordable(path, amount, problem)
    if amount is not None and exact > amount:
        return path, "its rounds can be as many as the budget affords"
    expected = without_a_look(problem.size, amount)
    if expected != path:
        return expected, f"{n_components} components ablated one by one cost no more than path gradient ({usual:g})"
    if exact > _DEARER * usual:
        return _with_rounds(path, problem, f"{n_components} components are too many to be ablated one by one")
    one_by_one = _with_pairs(n_components, math.inf if amount is None else amount - exact, _AMONG)
    among = one_by_one.pairs_among
    are_exact = f"and {exact} passes are exact" + (f", beside pairs among the {among} strongest" if among else "")
    if first.faint:
        few = f"next to nothing of what {len(first.faint)} modules do arrives at gates"
        return one_by_one, f"{few}, {are_exact}"
    reliability = _reliability(path, problem, _LOOKED_AT)
    seen = f"two rounds of path gradient have a reliability of {reliability:.2f}"
    if reliability < _NOISE:
        return one_by_one, f"{seen}, {are_exact}"
    return path, f"{seen}, and {exact} passes one by one would tell less"


def _with_rounds(path: PathGradient, problem: Problem, reason: str) -> tuple[PathGradient, str]:
    """Path gradient with more rounds than usual where the model is fragile, and two of them are mostly noise."""
    if problem.ablated_fraction >= FRACTIONS[0]:
        return path, reason
    reliability = _reliability(path, problem, _TRIED_FOR_ROUNDS)
    if reliability >= _NOISE:
        return path, reason
    seen = f"two rounds of path gradient have a reliability of {reliability:.2f}, so that {_MORE_ROUNDS} are taken"
    return replace(path, rounds=_MORE_ROUNDS), f"{reason}; {seen}"


def without_a_look(size: Size, passes: float | None = None) -> Estimator:
    """The method that is taken as a rule, where gradients have little noise; for so many passes, or as usual."""
    usual, exact = _usual(size), size.n_components + 1 + DEFAULT_CHECKS
    if exact > usual:
        return PathGradient()
    return _with_pairs(size.n_components, (usual if passes is None else passes) - exact, size.n_components)


def _with_pairs(n_components: int, left: float, most: int) -> LeaveOneOut:
    """Leave-one-out with pairs among as many, `most` of them, as the passes that are left afford."""
    among = max((k for k in range(2, min(n_components, most) + 1) if n_pairs(k) <= left), default=0)
    return LeaveOneOut(pairs_among=among, check_masks=DEFAULT_CHECKS)


def _usual(size: Size) -> float:
    """What the weights of path gradient cost; far reads change no weight, and the rules were found without them."""
    return PathGradient(far_reads=False).cost(size)


def _of_shared_passes(problem: Problem, method: Estimator | None) -> tuple[Estimator, str]:
    """Where all examples of a batch come out of one pass, masks that they share may cost less than gates of their own.

    Without a method takes the cheaper one; warns of one that costs more.
    """
    shared, own = _chosen()["regression"], method or without_a_look(problem.size)
    count = data_module.size(next(iter(problem.data)))
    costs = {one.name: one.cost(problem.size) * (count if one.differentiates else 1) for one in (own, shared)}
    cheaper = min((own, shared), key=lambda one: costs[one.name])
    said = " and ".join(f"{name} {cost:g}" for name, cost in costs.items())
    said = f"all {count} examples of a batch share a pass, unless each has gates of its own: passes a batch are {said}"
    if method is not None and cheaper is not method:
        logger.warning("%s; method=%r is the cheaper one", said, cheaper.name)
    elif method is not None:
        logger.info("%s", said)
    return method or cheaper, said


def _without_gradient(problem: Problem, blocked: Sequence[Group], found: Estimator) -> str:
    said = (
        f"no gradient reaches the gates of {type(problem.model).__name__} ({len(blocked)} modules, such as "
        f"{blocked[0].module}), so that the default method cannot run; taking method={found.name!r}, which needs "
        "forward passes only, and as a rule more of them"
    )
    if len(blocked) < len(problem.components.groups):
        said += f"; components without these (exclude=[{blocked[0].module!r}, …]) have the default"
    logger.warning("%s", said)
    return said


def _reliability(path: PathGradient, problem: Problem, n_examples: int) -> float:
    """Reliability of the weights of two rounds, mean over a few examples."""

    def look(batch: data_module.Batch) -> float:
        reader = BatchReader(path, path.gates(problem), batch, 0)
        for _ in range(2):
            reader.next_round()
        return float(reader.sums.reliability().mean())

    return problem.first.tried(problem.model, look, n_examples)
