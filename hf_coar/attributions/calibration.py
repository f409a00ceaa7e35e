"""Calibration: what is wrong with forecasts, learnt from fresh sets: limits of outputs, and intervals that hold.

The drops of strong sets go through a curve with a limit on either side, and the interval is conformal (Vovk, Gammerman,
Shafer 2005): quantiles of what the forecasts missed on fresh random and strongest sets, relative to a spread that is
learnt from others of them (Papadopoulos 2008; in turns, as in cross-conformal prediction, Vovk 2015).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_coar.errors import CoarError

_KEPT_SCORES = 256
_LIMITS = 26  # tried on either side
_TINY = 1e-12
_TAIL, _FEWEST_SCORES = 0.95, 20  # intervals are of 95 % as a rule; one score lies beyond that of twenty
_FEWEST_LAYERS = 16  # of eight examples; the largest score of sixteen has 94 % of others below it
_FOLDS = 4  # one of which has the scores of a spread that the others taught
# Intervals of larger sets than taught them grow by a power of how many times as large these are; at least by this one
# where few distant sets tell, or none. In trials on small nets, the demo and a small ViT, sets twice as large wanted up
# to 1.7 times the width, four times as large up to 2.4 times; on a GPT-2, random ones wanted 2.2 and 8 times.
GROWTH = 0.75
WHEREVER = 1e6  # times as large; there is no model of that many components beside which so few are ablated
STEEPEST = 64.0  # power that is learnt at most; far more than any output of float32 wants
_UNTIL = (1.5, 2.0, 4.0, WHEREVER)  # times as large, from which on they grow no more: outputs of wrecks are alike
# So much more is missed of strong sets, for where there are few scores: the median of seven models on 27 November 2026;
# there is no script.
_AS_A_RULE = 1.25


class Said(NamedTuple):
    """What is forecast of some sets, tensors of one shape, or of shapes that go together.

    Attributes:
        drops: of the output, before the limits.
        shares: the sets' sizes by the fitted one, 1 at most.
        norms: see `Forecast.norms`.
        strong: bool, see `Forecast.strong`.
        falls: the largest known fall of the example's output by a single component; 0 where none is known.
        rises: the largest such rise.
    """

    drops: Tensor
    shares: Tensor
    norms: Tensor
    strong: Tensor
    falls: Tensor
    rises: Tensor

    def at(self, which: Tensor) -> "Said":
        """What is said of some of the sets, where all tensors have one shape."""
        return Said(*(values[which] for values in self))

    def double(self) -> "Said":
        """All in float64, but for what is bool."""
        return Said(*(values if values.dtype == torch.bool else values.double() for values in self))


@dataclass(frozen=True)
class Calibration:
    """How far forecasts are off, learnt from sets that no fit used.

    Attributes:
        limits: 1 / the largest fall, and 1 / the largest rise of an output beyond the norm of a set, in its unit; 0 for
            none. As far as a single component makes an output go, a set can make it go as well.
        level: by how much outputs fall more than forecast under sets of the fitted size, in the unit of the output;
            under smaller ones by the square of their share of that size.
        spread: what makes up the expected miss: the factors of the set's norm, of its forecast change, and of what the
            limits take off it.
        strong: how much more is missed of strong sets, see `Forecast.strong`, by what is forecast of them: a fall or a
            rise of more than their norm, or neither, where effects cancel. One factor for all that are forecast to
            exceed their norm left 83 % of the latter inside intervals of 95 %, and 98 % of random sets.
        scores: sorted ratios of misses to the expected miss.
        growth: powers of how many times as large sets are as the largest that taught all the others, by which more is
            missed of them: of random sets, and of those that are strong or change outputs by more than their norm.
        until: so many times as large at most, for each of these powers.
        reach: the share of the components that the largest sets take which taught the growth; 0 if none did.
        layers: how much more is missed of whole layers, whatever their size; 0 where too few taught it.
    """

    limits: tuple[float, float] = (0.0, 0.0)
    level: float = 0.0
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    strong: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scores: tuple[float, ...] = ()
    growth: tuple[float, float] = (GROWTH, GROWTH)
    until: tuple[float, float] = (WHEREVER, WHEREVER)
    reach: float = 0.0
    layers: float = 0.0

    def limited(self, said: Said) -> Tensor:
        """The drops after the limits, in their shape.

        Only what exceeds the norm of a set is bent: a single component's effect is its norm, and random sets' effects
        mostly cancel to less, while those of strong components of one sign add up to much more.
        """
        fall, rise = self.limits
        falls = _bent(said.drops.clamp_min(0), said.norms, fall, said.falls)
        return falls - _bent((-said.drops).clamp_min(0), said.norms, rise, said.rises) + self.level * said.shares**2

    def expected_miss(self, said: Said) -> Tensor:
        """The spread of sets, in the shape of their drops."""
        spread = torch.tensor(self.spread, dtype=said.drops.dtype)
        factors = torch.tensor((1.0, *self.strong), dtype=said.drops.dtype)[kinds(said)]
        return _features(said, self.limited(said)) @ spread * factors

    def times_unit(self, unit: float) -> "Calibration":
        """This calibration of outputs that were measured in a unit, for the outputs themselves."""
        fall, rise = self.limits
        return replace(self, limits=(fall / unit, rise / unit), level=self.level * unit)

    def widening(self, said: Said, times: Tensor) -> Tensor:
        """By how much more is missed of sets so many times as large as the largest near ones, in their shape."""
        usual, of_strong = (times.clamp_max(most) ** power for power, most in zip(self.growth, self.until, strict=True))
        return torch.where(_leaning(said), of_strong, usual)

    def reaching(self, said: Said, measured: Tensor, times: Tensor, reach: float) -> "Calibration":
        """With the growth that distant sets teach; flat tensors, as `learnt` and `widening` take them.

        With the power as many of them are inside their intervals as of near sets: quantiles again, of the powers that
        each wants, of the smaller half of them and of the larger one. Of several sizes up to which intervals grow, the
        one with the narrowest is taken.
        """
        if not len(measured) or not self.scores:
            return self
        missed, times = self._missed(said, measured).clamp_min(_TINY).log(), times.double().log()
        at_least = min(STEEPEST, max(GROWTH, float((missed / times).max()))), WHEREVER
        leaning = _leaning(said)
        by_kind = [_growth(missed[kind], times[kind]) or _growth(missed, times) for kind in (~leaning, leaning)]
        growth, until = zip(*(found or at_least for found in by_kind), strict=True)
        return replace(self, growth=growth, until=until, reach=reach)

    def for_layers(self, said: Said, measured: Tensor) -> "Calibration":
        """With what whole layers teach, one set each, drawn at random; flat tensors, as `learnt` takes them."""
        if len(measured) < _FEWEST_LAYERS or not self.scores:
            return self
        return replace(self, layers=min(WHEREVER, max(1.0, _tail(self._missed(said, measured)))))

    def _missed(self, said: Said, measured: Tensor) -> Tensor:
        """Misses by half of an interval of 95 % as near sets have it, or of the largest of few scores; float64."""
        said, tail = said.double(), self.quantile(_TAIL) if self.knows(_TAIL) else self.scores[-1]
        expected = tail * self.expected_miss(said)
        return (measured.double() - self.limited(said)).abs() / expected.clamp_min(_TINY)

    def knows(self, level: float) -> bool:
        """Whether there are enough scores for a level."""
        return self._rank(level) <= len(self.scores)

    def _rank(self, level: float) -> int:
        return math.ceil((len(self.scores) + 1) * level - 1e-9)

    def quantile(self, level: float) -> float:
        """The score that a share `level` of fresh sets stays below.

        Raises:
            CoarError: the level is not between 0 and 1, or there are too few scores for it.
        """
        if not isinstance(level, int | float) or isinstance(level, bool) or not 0 < level < 1:
            raise CoarError(f"level={level!r}; must lie strictly between 0 and 1, such as 0.95")
        rank = self._rank(level)
        if rank > len(self.scores):
            needed = math.ceil(level / (1 - level) - 1e-9)
            raise CoarError(
                f"an interval of level {level:g} needs {needed} fresh sets, and these attributions were checked on "
                f"{len(self.scores)}; attribute with more check_masks or more examples, or take a lower level"
            )
        return self.scores[rank - 1]

    @classmethod
    def learnt(cls, said: Said, measured: Tensor, typical: Tensor) -> "Calibration":
        """From what is forecast of fresh sets, and measured drops, all flat.

        Every score is of a set that its limits and spread did not see: of a single example's twenty sets, five such
        numbers would take the worst misses in.

        Args:
            said: of the sets.
            measured: drops of the output itself.
            typical: bool, random sets of the fitted size, which set the level.
        """
        said, measured = said.double(), measured.double()
        shape = cls._shaped(said, measured, typical)
        which, scores = kinds(said), torch.zeros_like(measured)
        folds = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)) % _FOLDS
        for number in range(_FOLDS):
            here = folds == number
            of_others, own = cls._shaped(said.at(~here), measured[~here], typical[~here]), said.at(here)
            expected = of_others.expected_miss(own).clamp_min(_TINY)
            scores[here] = (measured[here] - of_others.limited(own)).abs() / expected
        factors = _factors(scores, which)
        scores = (scores / torch.tensor((1.0, *factors), dtype=scores.dtype)[which]).sort().values
        if len(scores) > _KEPT_SCORES:
            scores = scores[torch.linspace(0, len(scores) - 1, _KEPT_SCORES).round().long()]
        return replace(shape, strong=factors, scores=tuple(scores.tolist()))

    @classmethod
    def _shaped(cls, said: Said, measured: Tensor, typical: Tensor) -> "Calibration":
        """Limits, level and spread, from float64 and bool [sets]."""
        square, shape = said.shares.square(), cls()
        ways = ((1, said.falls), (-1, said.rises))
        for _ in range(2):  # limits and level depend on each other, a little
            rest = measured - shape.level * square
            shape = cls(tuple(_best_limit(sign * said.drops, sign * rest, said.norms, alone) for sign, alone in ways))
            missing = ((measured - shape.limited(said)) * square)[typical].sum()
            shape = replace(shape, level=float(missing / square[typical].square().sum().clamp_min(_TINY)))
        limited = shape.limited(said)
        spread = _non_negative_fit(_features(said, limited), (measured - limited).abs())
        return replace(shape, spread=tuple(spread.tolist()))


def _leaning(said: Said) -> Tensor:
    """Which sets lean to one side; half of all components take no more than half of all weights, and few are strong."""
    return said.strong | (said.drops.abs() > said.norms)


def _growth(missed: Tensor, times: Tensor) -> tuple[float, float] | None:
    """The power that a share of the sets does not exceed, and until where, from logs; None where they are too few."""
    if len(missed) < _FEWEST_SCORES:
        return None
    smaller, found = times <= times.median(), []
    for until in _UNTIL:
        grown = times.clamp_max(math.log(until))
        powers = missed / grown
        power = min(STEEPEST, max(0.0, *(_tail(powers[half]) for half in (smaller, ~smaller))))
        found.append((power * float(grown.mean()), power, until))
    return min(found)[1:]


def _tail(values: Tensor) -> float:
    """What a share of further values stays below; the largest of few."""
    rank = min(len(values), math.ceil((len(values) + 1) * _TAIL - 1e-9))
    return float(values.sort().values[rank - 1]) if rank else 0.0


def kinds(said: Said) -> Tensor:
    """Kinds of sets: 0 like random ones; strong with a fall, 1, or a rise, 2, of more than the norm, or neither, 3."""
    of_strong = torch.where(said.drops > said.norms, 1, torch.where(said.drops < -said.norms, 2, 3))
    return torch.where(said.strong, of_strong, 0)


def _factors(scores: Tensor, which: Tensor) -> tuple[float, float, float]:
    """What makes the tails of strong sets those of random ones, by kind; of all that are strong where it has few."""
    usual = scores[which == 0]
    of_all = _ratio_of_tails(scores[which > 0], usual) or _AS_A_RULE
    first, second, third = (_ratio_of_tails(scores[which == kind], usual) or of_all for kind in (1, 2, 3))
    return first, second, third


def _ratio_of_tails(scores: Tensor, others: Tensor) -> float | None:
    """What makes their tails alike, 1 at least; None where a tail would be no score."""
    if min(len(scores), len(others)) < _FEWEST_SCORES:
        return None
    tail, of_others = (float(values.quantile(_TAIL)) for values in (scores, others))
    return max(1.0, tail / max(of_others, _TINY))


def _bent(drops: Tensor, norms: Tensor, limit: float, alone: Tensor) -> Tensor:
    """Drops that are not negative, of which what exceeds the norms cannot exceed 1 / limit, or what leads to `alone`.

    Without the latter the norm of a set says all of how far it can go. On SmolLM2, whose largest single effects are as
    large as those of hundreds of components, strong sets without just these were forecast with half of their effect.
    """
    if limit <= 0:
        return drops
    excess, room = (drops - norms).clamp_min(0), (alone - norms).clamp_min(1 / limit)
    return drops - excess - torch.expm1(-excess / room) * room


def _features(said: Said, limited: Tensor) -> Tensor:
    return torch.stack([said.norms, limited.abs(), (said.drops - limited).abs()], dim=-1)


def _best_limit(drops: Tensor, measured: Tensor, norms: Tensor, alone: Tensor) -> float:
    """The limit of least relative miss among those tried; by absolute values, as a few sets miss by far."""
    there = drops > norms
    if int(there.sum()) < 8:
        return 0.0
    drops, measured, norms, alone = drops[there], measured[there], norms[there].clamp_min(_TINY), alone[there]
    scale = float((drops - norms).quantile(0.9))
    if scale <= _TINY:
        return 0.0
    tried = [0.0, *(1 / (scale * torch.logspace(-1.5, 1.5, _LIMITS, dtype=drops.dtype))).tolist()]
    return min(tried, key=lambda limit: float(((_bent(drops, norms, limit, alone) - measured).abs() / norms).mean()))


def _non_negative_fit(features: Tensor, misses: Tensor) -> Tensor:
    """Least squares with factors that are not negative, every set weighted by its size: the best of all subsets.

    One more set is made up for every feature, which has that alone and an average miss: fifteen sets gave factors of 0,
    beside which other sets were missed by a thousand times what was expected.
    """
    size, n_features = features.sum(1).clamp_min(_TINY), features.shape[1]
    x, y = features / size[:, None], misses / size
    average = (x.sum(1) * y).sum() / max(1, len(y))  # sets of no size tell nothing
    x, y = torch.cat([x, torch.eye(n_features, dtype=x.dtype)]), torch.cat([y, average.expand(n_features)])
    best, least = torch.zeros(n_features, dtype=x.dtype), math.inf
    for subset in range(1, 2**n_features):
        chosen = [i for i in range(n_features) if subset >> i & 1]
        factors = torch.linalg.lstsq(x[:, chosen], y[:, None], driver="gelsd").solution[:, 0]
        error = float((x[:, chosen] @ factors - y).square().sum())
        if (factors >= 0).all() and error < least:
            best, least = torch.zeros_like(best).index_put((torch.tensor(chosen),), factors), error
    return best
