"""Checking: fits judged on fresh sets of components, from which the intervals of forecasts and the warnings come.

Of ten sets, four are random masks of the fitted fraction, which say how good the predictions are and what is left of
the model; two are the strongest components of the example itself, as people ablate them; one is random and of any size
up to twice the fraction; two, one random and one of the strongest, are distant: larger, up to half of the model; and
one is a whole layer. Every example has sets of its own, so that a handful of passes gives many independent ones.
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.attributions.calibration import Calibration, Said, kinds
from hf_coar.attributions.forecast import Forecast, largest_checked
from hf_coar.attributions.layers import Layer, layers_of
from hf_coar.errors import NonFiniteOutputError
from hf_coar.models.calling import sent
from hf_coar.runs import fidelity, sampling
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import OwnMaskedPasses
from hf_coar.runs.problem import Estimates, Fit, Problem
from hf_coar.runs.workers import beside_passes, where_it_fits

logger = logging.getLogger(__name__)

# One more than a single example needs for an interval of 95 %.
DEFAULT_CHECKS = 20
FEWEST_CHECKS = 5
_LOW_CORRELATION, _LOW_RELIABILITY, _FEW_DECISIONS = 0.5, 0.3, 0.25
_STRONG_KINDS = {"lower": 1, "raise": 2}  # sets by what is forecast of them, see `kinds`
_SCALE_PRIOR = 0.15  # how far scales are from 1, from network to network
# A weight is off for other reasons than noise, which no spread of rounds shows: half-open gates stand for closed ones,
# slopes are averaged. None of it is there in a linear network, and so it is taken to grow with what linear predictions
# leave of fresh outputs: this times the root of that share. See `scripts/benchmark_errors.py`.
_UNSEEN = 0.5
_FEWEST_VALUES = 24  # predicted and measured ones, below which a correlation says nothing
_NEAREST, FARTHEST = 1.25, 0.5  # distant sets: times the largest near one, and the share of all components
_TRUSTS = (0.0, 0.5, 1.0)  # in what was read far from the whole model
_TINY = 1e-12
_ROUNDING = 1e-5  # of the largest output
# Of the sets of some examples at a time; several times as much is made of them. More on a CPU are not in its caches.
_BYTES = {"cpu": 2**24, "cuda": 2**28, "xpu": 2**28}
_CPU = torch.device("cpu")
_MOST_CALIBRATING = 256  # examples, evenly spaced, whose sets set the intervals, of which 256 scores are kept


def check_parts(count: int, kind: str = "fresh") -> list[Part]:
    """The passes of so many sets, which give two numbers each."""
    return [Part(kind, 0, count, float(count), 2 * count)] if count else []


class Block(NamedTuple):
    """Some examples, each with sets of its own.

    Attributes:
        columns: where they are among all that were asked for.
        rows: in the estimates.
        weights: float32 [examples, components].
        errors: the same shape, or None.
        kept: what stays in place, float32 [sets, examples, components].
    """

    columns: slice
    rows: Sequence[int]
    weights: Tensor
    errors: Tensor | None
    kept: Tensor


@dataclass(frozen=True)
class Sets:
    """Fresh sets of components, a pure function of seed, example and number.

    Attributes:
        seed: of the run.
        fraction: the fitted one.
        fewest: components of the smallest sets but random masks. Of smaller ones the strongest were measured already.
        layers: of the model, one of which some sets are.
        reaching: whether some are distant, if there are components enough, or whole layers.
    """

    seed: int
    fraction: float
    fewest: int = 1
    layers: Sequence[Layer] = ()
    reaching: bool = True

    @staticmethod
    def is_typical(number: int) -> bool:
        """Whether a set is a random mask of the fitted fraction."""
        return number % 5 in (0, 2)

    def is_distant(self, number: int, count: int) -> bool:
        """Whether a set of so many components is larger than near ones, so that it teaches how intervals grow."""
        nearest, farthest = self._distant(count)
        return self.reaching and number % 10 in (3, 9) and farthest >= nearest + 1

    def is_layer(self, number: int) -> bool:
        """Whether a set is a whole layer, which is neither random nor strong: forecasts miss far more of some."""
        return self.reaching and bool(self.layers) and number % 10 == 6

    def is_usual(self, number: int, count: int) -> bool:
        """Whether a set of so many components is one of those that limits and spread are learnt from."""
        return not self.is_distant(number, count) and not self.is_layer(number)

    def _distant(self, count: int) -> tuple[float, float]:
        return _NEAREST * largest_checked(self.fraction, count, self.fewest), FARTHEST * count

    def kept(self, weights: Tensor, examples: Sequence[int], number: int) -> Tensor:
        """What stays in place in a set of each of some examples, bool [examples, components], where the weights are.

        Args:
            weights: float32 [examples, components].
            examples: their indices in the data.
            number: of the sets.
        """
        count, device = weights.shape[1], weights.device
        words = partial(sampling.words_of, self.seed, sampling.CHECKS, examples, number)
        if self.is_typical(number):
            return words(count, device) >= round(self.fraction * 2**32)
        if self.is_layer(number):
            return self._but_a_layer(words(1, _CPU, start=count)[:, 0], count).to(device)
        least, most = self.fewest, largest_checked(self.fraction, count, self.fewest)
        if self.is_distant(number, count):
            least, most = self._distant(count)
        which, how_many = words(2, _CPU, start=count).T[..., None]
        sizes = (least * (most / least) ** (how_many.double() / 2**32)).round().long().clamp_max(count)
        if number % 5 == 4:
            values = words(count, device)
        else:
            which = sent(which % 3, device)
            values = torch.where(which == 2, weights.abs(), torch.where(which == 1, -weights, weights))
        return ~_largest(values, sent(sizes, device), int(sizes.max()))

    def _but_a_layer(self, words: Tensor, count: int) -> Tensor:
        """All but one layer, that a word of 32 bits of each example draws, bool [examples, components]."""
        bounds = torch.tensor([layer[1:] for layer in self.layers])
        starts, stops = bounds[words.long() * len(bounds) >> 32, :, None].unbind(1)
        place = torch.arange(count)
        return (place < starts) | (place >= stops)

    def blocks(
        self,
        estimates: Estimates,
        examples: Sequence[tuple[int, int]],
        numbers: Sequence[int],
        width: int,
        device: torch.device,
    ) -> Iterator[Block]:
        """Some sets of each example, as many examples at a time as take little memory.

        Args:
            estimates: of the weights.
            examples: for each its row in these, and its index in the data.
            numbers: of the sets.
            width: of what is made of a set: its components, or more.
            device: where they are drawn.
        """
        step = max(1, _BYTES[device.type] // (4 * max(1, len(numbers)) * width))
        for start in range(0, len(examples), step):
            rows, indices = zip(*examples[start : start + step], strict=True)
            weights, errors = estimates.some(rows)
            weights, errors = sent(weights, device), None if errors is None else sent(errors, device)
            kept = torch.stack([self.kept(weights, indices, number) for number in numbers])
            yield Block(slice(start, start + len(rows)), rows, weights, errors, kept.float())


def _largest(values: Tensor, sizes: Tensor, most: int) -> Tensor:
    """The so many largest of every row, of equal ones the first, whatever device finds them.

    Args:
        values: [rows, any].
        sizes: int64 [rows, 1], at least 1.
        most: the largest of these.
    """
    least = values.topk(most, dim=1).values.gather(1, sizes - 1)
    above, equal = values > least, values == least
    return above | equal & (equal.cumsum(1) <= sizes - above.sum(1, keepdim=True))


def measured_sets(problem: Problem, sets: Sets, estimates: Estimates, count: int) -> tuple[Tensor, Tensor]:
    """Outputs of every example under its own sets, and the sums of the weights these keep, float32 [sets, examples]."""
    skipped, estimates = sorted(problem.store.skipped), replace(estimates, errors=None)
    passes = OwnMaskedPasses(problem.masked, problem.output)

    def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        examples = range(first, first + data_module.size(batch))
        weights = estimates.some([_row(i, skipped) for i in examples]).weights
        weights = sent(weights, beside_passes(data_module.device_of(batch)))
        passes.begin_batch(part.stop - part.start)
        outputs, sums = [], []
        for number in range(part.start, part.stop):
            kept = sets.kept(weights, examples, number)
            sums.append((kept * weights).sum(1))
            outputs.append(passes(batch, kept))
        return {name: torch.stack(of, dim=1).cpu() for name, of in {"outputs": outputs, "sums": sums}.items()}

    parts = check_parts(count, "fresh" if sets.reaching else "nearby")
    found = problem.compute(parts, compute, "fresh sets")
    return found["outputs"].T, found["sums"].T


def _finite_sets(problem: Problem, sets: Sets, estimates: Estimates, count: int) -> tuple[Sets, Tensor, Tensor]:
    """What `measured_sets` gives, without distant ones and layers where what they leave makes no numbers; the sets."""
    try:
        return sets, *measured_sets(problem, sets, estimates, count)
    except NonFiniteOutputError as error:
        if all(sets.is_usual(number, estimates.weights.shape[1]) for number in range(count)):
            raise
        logger.warning("how intervals grow with the size of a set is not measured, nor those of layers: %s", error)
    sets = replace(sets, reaching=False)
    return sets, *measured_sets(problem, sets, estimates, count)


def _row(example: int, skipped: list[int]) -> int:
    """Where an example of the data stands among those that could be read."""
    return example - bisect_left(skipped, example)


def checked(problem: Problem, fit: Fit, estimates: Estimates, count: int) -> tuple[Fit, Estimates]:
    """A fit and its estimates with the scale and the forecast's interval that fresh sets tell.

    Args:
        problem: whose sets are measured.
        fit: with a forecast.
        estimates: its weights and standard errors.
        count: sets an example.
    """
    layers = layers_of(problem.masked.components)
    sets = Sets(problem.seed, problem.ablated_fraction, 1 + fit.forecast.largest_known, layers)
    try:
        sets, measured, sums = _finite_sets(problem, sets, estimates, count)
    except NonFiniteOutputError as error:  # which the seed decides; another error may be gone when the run goes on
        logger.warning("forecasts have no interval, as fresh sets cannot be measured: %s", error)
        return fit, estimates
    skipped = set(problem.store.skipped)
    examples = [i for i in range(measured.shape[1] + len(skipped)) if i not in skipped]
    typical = torch.tensor([sets.is_typical(number) for number in range(count)])
    at_fraction = sums[typical]
    scale, uncertain = _scale(at_fraction, measured[typical])
    estimates = estimates.scaled(scale, uncertain)
    forecast, forecasts = _calibrated(sets, estimates, fit.forecast.scaled(scale), examples, measured)
    facts = _facts(at_fraction, measured[typical], forecast.unablated, problem.output.boundary)
    facts |= {"n_sets": count, "scale": scale, "changed": _changed(forecast.unablated, measured), **forecasts}
    facts |= {} if estimates.errors is None else {"uncertain": uncertain}
    bias = (measured[typical] - scale * at_fraction).mean(0)
    return replace(fit, bias=bias, forecast=forecast, checked=facts), estimates


def _scale(predicted: Tensor, measured: Tensor) -> tuple[float, float]:
    """The slope of measured on predicted, within examples, drawn to 1 where few values tell it.

    And by how much of itself a weight with that slope may be off. Examples of large weights count no more than others:
    they are off by as much of theirs, and would be nearly all that is listened to. On a small ViT, whose slope is .96,
    they gave .86.
    """
    p, m = predicted - predicted.mean(0), measured - measured.mean(0)
    norm = p.square().mean(0).sqrt()
    p, m = (values[:, norm > 0] / norm[norm > 0] for values in (p, m))
    power, of_measured = float(p.square().sum()), float(m.square().sum())
    if power <= 0 or of_measured <= 0:
        return 1.0, 0.0
    if p.numel() - p.shape[1] < 2:  # two sets of one example lie on a line, whatever was measured
        return 1.0, _SCALE_PRIOR
    slope = float((p * m).sum()) / power
    left = float((m - slope * p).square().sum())
    noise = left / max(1, p.numel() - p.shape[1]) / power
    trust = _SCALE_PRIOR**2 / (_SCALE_PRIOR**2 + noise)
    slope = 1 + (slope - 1) * trust
    return slope if slope > 0 else 1.0, math.hypot(math.sqrt(trust * noise), _UNSEEN * math.sqrt(left / of_measured))


def _calibrated(
    sets: Sets, estimates: Estimates, forecast: Forecast, examples: list[int], measured: Tensor
) -> tuple[Forecast, dict[str, float]]:
    """The forecast with what sets of every example, or of many, drawn once more, say of it; and `_explained`."""
    count, tried = len(measured), _trusting(forecast)
    rows = range(0, len(examples), math.ceil(len(examples) / _MOST_CALIBRATING))
    made = _forecasts(sets, estimates, tried, [(row, examples[row]) for row in rows], count)
    fallen = (forecast.unablated - measured)[:, list(rows)]
    n_components = estimates.weights.shape[1]
    typical, distant, layers = (
        torch.tensor([found(number) for number in range(count)])[:, None].expand_as(fallen)
        for found in (sets.is_typical, partial(sets.is_distant, count=n_components), sets.is_layer)
    )
    usual, distant, layers = (made.told & here for here in (~distant & ~layers, distant, layers))
    near = [said.at(usual) for said in made.said]
    learnt = [Calibration.learnt(said, fallen[usual], typical[usual]) for said in near]
    misses = [(fallen[usual] - one.limited(said)).abs() for one, said in zip(learnt, near, strict=True)]
    relative = [float((miss / said.norms.clamp_min(_TINY)).mean()) for miss, said in zip(misses, near, strict=True)]
    best = relative.index(min(relative))
    explained = _explained(kinds(near[best]), misses[best], fallen[usual])
    said = made.said[best]
    calibration = learnt[best].reaching(said.at(distant), fallen[distant], made.times[distant], FARTHEST)
    calibration = calibration.for_layers(said.at(layers), fallen[layers])
    found = replace(tried[best], calibration=calibration)
    return found if found.far is None or found.far.trust else replace(found, far=None), explained


class _Forecasts(NamedTuple):
    """What every forecast says of sets, how many times as large as near ones they are, and which tell anything of it.

    Each [sets, examples].
    """

    said: list[Said]
    times: Tensor
    told: Tensor


def _forecasts(
    sets: Sets, estimates: Estimates, tried: list[Forecast], examples: Sequence[tuple[int, int]], count: int
) -> _Forecasts:
    """What some forecasts say of sets of examples, given by their rows and indices, that differ in trust alone."""

    def on(device: torch.device) -> _Forecasts:
        return _forecasts_on(device, sets, estimates, tried, examples, count)

    return where_it_fits(on, "judging the fit")


def _forecasts_on(
    device: torch.device,
    sets: Sets,
    estimates: Estimates,
    tried: list[Forecast],
    examples: Sequence[tuple[int, int]],
    count: int,
) -> _Forecasts:
    forecast, fraction = tried[0], sets.fraction
    blocks, times = [], torch.zeros(count, len(examples))
    told = torch.zeros(count, len(examples), dtype=torch.bool)
    width = max(estimates.weights.shape[1], len(forecast.pairs))
    with torch.autocast(device.type, enabled=False):  # the caller's is for the model: squares of weights are small
        for columns, rows, weights, errors, kept in sets.blocks(estimates, examples, range(count), width, device):
            here = forecast.at(rows).to(device)
            near = replace(here, far=None)
            found, leaning = near.drops(weights, kept, fraction), None
            if here.far is not None:  # once for all trusts
                leaning = here.far.leaning(found, weights, 1 - kept, fraction)
            said = near.said(found, weights, errors, kept, fraction)
            drops = [found if leaning is None else found + one.far.trust * leaning for one in tried]
            said = said._replace(falls=said.falls.expand_as(found), rises=said.rises.expand_as(found))
            blocks.append([Said(*(x.cpu() for x in said._replace(drops=of_one))) for of_one in drops])
            times[:, columns] = near.times(kept, fraction).cpu()
            told[:, columns] = ~near.knows(kept).cpu()
    return _Forecasts([_joined(parts) for parts in zip(*blocks, strict=True)], times, told)


def _joined(parts: Sequence[Said]) -> Said:
    """What is said of all examples, one block after the other."""
    return Said(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


def _explained(which: Tensor, misses: Tensor, fallen: Tensor) -> dict[str, float]:
    """What forecasts say of the changes by strong sets that are to lower or to raise outputs; 1 = all, 0 = nothing."""
    found = {}
    for name, kind in _STRONG_KINDS.items():
        here = which == kind
        if int(here.sum()) >= _FEWEST_VALUES and float(fallen[here].abs().sum()) > 0:
            found[name] = 1 - float(misses[here].sum() / fallen[here].abs().sum())
    return found


def _trusting(forecast: Forecast) -> list[Forecast]:
    """With every trust in far reads that is tried, none first; there may be none of these."""
    if forecast.far is None:
        return [forecast]
    return [replace(forecast, far=replace(forecast.far, trust=trust)) for trust in _TRUSTS]


def _facts(predicted: Tensor, measured: Tensor, unablated: Tensor, boundary: float | None) -> dict[str, float]:
    """What masks of the fitted fraction say: correlation within examples, mean outputs, and the decisions left."""
    facts = {"output": float(measured.mean()), "unablated": float(unablated.mean())}
    correlation = fidelity.pooled(predicted, measured)
    if measured.numel() >= _FEWEST_VALUES and not math.isnan(correlation):
        facts["correlation"] = correlation
        if correlation < _LOW_CORRELATION:
            facts["correlation_at_most"] = fidelity.pooled_at_most(predicted, measured)
            facts["n_values"] = measured.numel()
    if boundary is not None:
        facts["decisions"] = float(((measured > boundary) == (unablated > boundary)).float().mean())
    return facts


def _changed(unablated: Tensor, measured: Tensor) -> float:
    """The share of fresh sets [sets, examples] without which an output is another one, by more than rounding."""
    return float(((measured - unablated).abs() > _ROUNDING * unablated.abs().max()).float().mean())


def said(facts: Mapping[str, Any], fraction: float) -> str:
    """What fresh masks of the fitted fraction showed, in a line."""
    output, whole = facts["output"], facts["unablated"]
    parts = [f"under fresh masks that ablate {fraction:.3g} the mean output is {output:.3g} ({whole:.3g} before)"]
    parts += [f"{facts['decisions']:.0%} of the decisions are kept"] if "decisions" in facts else []
    parts += [f"predictions have a correlation of {facts['correlation']:.2f}"] if "correlation" in facts else []
    return ", ".join(parts)


def warnings_of(
    checked: Mapping[str, Any] | None, reliability: float | None, fraction: float, better: str
) -> tuple[str, ...]:
    """What a person must know before using attributions, one line each: what is wrong, and what to do.

    Args:
        checked: the facts of `checked`, or None.
        reliability: mean over the examples, or None.
        fraction: the ablated one.
        better: what to take instead of the method, see `Estimator`.
    """
    facts, found = checked or {}, []
    decisions, correlation = facts.get("decisions"), facts.get("correlation")
    if facts.get("changed") == 0:
        found.append(
            f"none of {facts['n_sets']} fresh sets of components changes the output of any example: it does not depend "
            "on them; take another output, or components that it passes through"
        )
    if decisions is not None and decisions < _FEW_DECISIONS:
        found.append(
            f"with {fraction:.3g} of the components ablated {decisions:.0%} of the decisions are left (mean output "
            f"{facts['unablated']:.3g}, then {facts['output']:.3g}): hardly a model; take a smaller ablated_fraction"
        )
    if correlation is not None and correlation < _LOW_CORRELATION:
        found.append(f"fresh masks are predicted with a correlation of {correlation:.2f} only; take {better}")
        if (at_most := facts.get("correlation_at_most", correlation)) >= _LOW_CORRELATION:
            found[-1] = (
                f"fresh masks are predicted with a correlation of {correlation:.2f}, which {facts['n_values']} values "
                f"cannot tell from {at_most:.2f}: give more examples, or judge by hf_coar.evaluate; if it is as low, "
                f"take {better}"
            )
    for name in _STRONG_KINDS:
        if facts.get(name, 1.0) < 0:
            found.append(
                f"sets of components whose ablation should {name} the output most: forecasts of these are no better "
                "than that nothing changes; go by the interval, or measure them with hf_coar.ablate"
            )
    if reliability is not None and reliability < _LOW_RELIABILITY:
        found.append(
            f"the weights are mostly noise (reliability {reliability:.2f}; 1 = another seed gives the same); "
            f"take {better}"
        )
    return tuple(found)
