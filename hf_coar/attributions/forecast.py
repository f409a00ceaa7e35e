"""Forecasts: what ablating any set of components does, for sets of any size, with an interval that was measured.

Attributions are made for one ablated fraction a. What a component is worth depends on how much else is gone: w(0) is
its single effect, everything else in place, and w(a) its weight. Between them

    w(s) = single + (weight - single) · min(1, s / a)

and the drop of the output, counted from the unablated output, is the first-order expansion around the mean mask of the
set's size s. Single effects are exact for the components that were *flipped* (ablated alone), and for the others their
weights times one ratio, which the flipped ones show. Where pairs are known, their interactions take the place of w(s).

A set of strong components is no random set: its effects are not additive, and outputs saturate. So where effects far
from the whole model were read, see `far`, drops of such sets lean on these; they go through a curve with a limit on
either side, and the interval is conformal (Vovk, Gammerman, Shafer 2005): quantiles of what the
forecasts missed on fresh random and strongest sets, relative to a spread that is learnt from others of them
(Papadopoulos 2008; in turns, as in cross-conformal prediction, Vovk 2015).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions.far import Far, taken
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.rows import Rows, check_finite
from hf_coar.errors import CoarError, CorruptFileError

MATRICES = ("effects", "interactions", "far_effects")  # the names of those with one row an example
_KEPT_SCORES = 256
_LIMITS = 26  # tried on either side
_TINY = 1e-12
_TAIL, _FEWEST_SCORES = 0.95, 20  # intervals are of 95 % as a rule; one score lies beyond that of twenty
_FOLDS = 4  # one of which has the scores of a spread that the others taught
# Sets that take this multiple of their share of all weights are strong. In trials on seven models 1.7 to 3 were alike.
STRONG = 2
# Intervals grow by this power of how many times as large a set is as the largest checked. On small nets, the demo and a
# small ViT, sets twice as large wanted up to 1.7 times the width, four times as large up to 2.4 times.
GROWTH = 0.75
_MANY = 8  # components, or half of fewer than sixteen, are ablated at once whatever the fitted fraction
_AS_A_RULE = 1.25  # so much more is missed of strong sets; the median of seven models, for where there are few scores


@dataclass(frozen=True)
class Calibration:
    """How far forecasts are off, learnt from sets that no fit used.

    Attributes:
        limits: 1 / the largest fall, and 1 / the largest rise of an output beyond the norm of a set, in its unit; 0 for
            none.
        level: by how much outputs fall more than forecast under sets of the fitted size, in the unit of the output;
            under smaller ones by the square of their share of that size.
        spread: what makes up the expected miss: the factors of the set's norm, of its forecast change, and of what the
            limits take off it.
        strong: how much more is missed of strong sets, see `Forecast.strong`, by what is forecast of them: a fall or a
            rise of more than their norm, or neither, where effects cancel. One factor for all that are forecast to
            exceed their norm left 83 % of the latter inside intervals of 95 %, and 98 % of random sets.
        scores: sorted ratios of misses to the expected miss.
    """

    limits: tuple[float, float] = (0.0, 0.0)
    level: float = 0.0
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    strong: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scores: tuple[float, ...] = ()

    def limited(self, drops: Tensor, shares: Tensor, norms: Tensor) -> Tensor:
        """The drops after the limits, in their shape.

        Only what exceeds the norm of a set is bent: a single component's effect is its norm, and random sets' effects
        mostly cancel to less, while those of strong components of one sign add up to much more.

        Args:
            drops: of sets, before the limits.
            shares: the sets' sizes by the fitted one, 1 at most.
            norms: see `Forecast.norms`.
        """
        fall, rise = self.limits
        bent = _bent(drops.clamp_min(0), norms, fall) - _bent((-drops).clamp_min(0), norms, rise)
        return bent + self.level * shares.square()

    def expected_miss(self, drops: Tensor, shares: Tensor, norms: Tensor, strong: Tensor) -> Tensor:
        """The spread of sets, from the same as `limited`, and which of them are strong, bool in their shape."""
        spread = torch.tensor(self.spread, dtype=drops.dtype)
        factors = torch.tensor((1.0, *self.strong), dtype=drops.dtype)[kinds(drops, norms, strong)]
        return _features(drops, self.limited(drops, shares, norms), norms) @ spread * factors

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
    def learnt(
        cls, drops: Tensor, shares: Tensor, norms: Tensor, strong: Tensor, measured: Tensor, typical: Tensor
    ) -> "Calibration":
        """From forecast drops, shares, norms of the weights, and measured drops of fresh sets, all in one shape.

        Every score is of a set that its limits and spread did not see: of a single example's twenty sets, five such
        numbers would take the worst misses in.

        Args:
            drops: before the limits, as for `limited`.
            shares: the sets' sizes, as there.
            norms: as there.
            strong: bool, as for `expected_miss`.
            measured: drops of the output itself.
            typical: bool, random sets of the fitted size, which set the level.
        """
        values = [x.flatten().double() for x in (drops, shares, norms, measured)]
        strong, typical = strong.flatten(), typical.flatten()
        shape = cls._shaped(*values, typical)
        which, scores = kinds(values[0], values[2], strong), torch.zeros_like(values[0])
        folds = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)) % _FOLDS
        for number in range(_FOLDS):
            here = folds == number
            of_others = cls._shaped(*(x[~here] for x in (*values, typical)))
            known, found = [x[here] for x in values[:3]], values[3][here]
            expected = of_others.expected_miss(*known, strong[here]).clamp_min(_TINY)
            scores[here] = (found - of_others.limited(*known)).abs() / expected
        factors = _factors(scores, which)
        scores = (scores / torch.tensor((1.0, *factors), dtype=scores.dtype)[which]).sort().values
        if len(scores) > _KEPT_SCORES:
            scores = scores[torch.linspace(0, len(scores) - 1, _KEPT_SCORES).round().long()]
        return replace(shape, strong=factors, scores=tuple(scores.tolist()))

    @classmethod
    def _shaped(cls, drops: Tensor, shares: Tensor, norms: Tensor, measured: Tensor, typical: Tensor) -> "Calibration":
        """Limits, level and spread, from float64 and bool [sets]."""
        square, shape = shares.square(), cls()
        for _ in range(2):  # limits and level depend on each other, a little
            rest = measured - shape.level * square
            shape = cls(tuple(_best_limit(sign * drops, sign * rest, norms) for sign in (1, -1)))
            missing = ((measured - shape.limited(drops, shares, norms)) * square)[typical].sum()
            shape = replace(shape, level=float(missing / square[typical].square().sum().clamp_min(_TINY)))
        limited = shape.limited(drops, shares, norms)
        spread = _non_negative_fit(_features(drops, limited, norms), (measured - limited).abs())
        return replace(shape, spread=tuple(spread.tolist()))


def largest_checked(fraction: float, n_components: int, fewest: int) -> float:
    """Components of the largest sets on which forecasts are checked: twice the fitted fraction, or a few."""
    return max(2 * fraction * n_components, min(_MANY, n_components / 2), fewest)


def kinds(drops: Tensor, norms: Tensor, strong: Tensor) -> Tensor:
    """Kinds of sets: 0 like random ones; strong with a fall, 1, or a rise, 2, of more than the norm, or neither, 3."""
    return torch.where(strong, torch.where(drops > norms, 1, torch.where(drops < -norms, 2, 3)), 0)


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


def _bent(drops: Tensor, norms: Tensor, limit: float) -> Tensor:
    """Drops that are not negative, of which what exceeds the norms cannot exceed 1 / limit."""
    if limit <= 0:
        return drops
    excess = (drops - norms).clamp_min(0)
    return drops - excess - torch.expm1(-excess * limit) / limit


def _features(drops: Tensor, limited: Tensor, norms: Tensor) -> Tensor:
    return torch.stack([norms, limited.abs(), (drops - limited).abs()], dim=-1)


def _best_limit(drops: Tensor, measured: Tensor, norms: Tensor) -> float:
    """The limit of least relative miss among those tried; by absolute values, as a few sets miss by far."""
    there = drops > norms
    if int(there.sum()) < 8:
        return 0.0
    drops, measured, norms = drops[there], measured[there], norms[there].clamp_min(_TINY)
    scale = float((drops - norms).quantile(0.9))
    if scale <= _TINY:
        return 0.0
    tried = [0.0, *(1 / (scale * torch.logspace(-1.5, 1.5, _LIMITS, dtype=drops.dtype))).tolist()]
    return min(tried, key=lambda limit: float(((_bent(drops, norms, limit) - measured).abs() / norms).mean()))


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


@dataclass(frozen=True)
class Forecast:
    """All that forecasts need beside the weights.

    Attributes:
        unablated: float32 [examples], the output with everything in place.
        flipped: int64 [any], components whose single effects are known.
        effects: float32 [examples, flipped], those effects: output with everything in place minus output without it.
        ratio: single effects of the other components, as multiples of their weights.
        pairs: int64 [any, 2], pairs of components whose interactions are known.
        interactions: float32 [examples, pairs]: what ablating both lowers the output by less than the sum of both.
        calibration: None where nothing was checked, and no interval can be had.
        far: what components are worth where much is gone, or None.
    """

    unablated: Tensor
    flipped: Tensor
    effects: Tensor
    ratio: float = 1.0
    pairs: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))
    interactions: Tensor | None = None
    calibration: Calibration | None = None
    far: Far | None = None

    def drops(self, weights: Tensor, kept: Tensor, fraction: float) -> Tensor:
        """By how much ablations lower the output, before the limits.

        Args:
            weights: float32 [examples, components].
            kept: float32 [masks, components]; or [masks, examples, components], where every example has masks of its
                own.
            fraction: the ablated fraction that the weights are for.

        Returns:
            float32 [masks, examples].
        """
        gone = 1 - kept
        size = _sizes(gone)
        by_weight = taken(gone, weights)
        excess = self.effects - self.ratio * weights[:, self.flipped]
        singles = self.ratio * by_weight + taken(gone[..., self.flipped], excess)
        if len(self.pairs):
            both = gone[..., self.pairs[:, 0]] * gone[..., self.pairs[:, 1]]
            near = singles = singles - taken(both, self.interactions)
        else:
            share = (size / fraction).clamp_max(1.0)
            # Mean of min(1, u / fraction) over the sizes u up to that of the set.
            mean_share = torch.where(
                size <= fraction, size / (2 * fraction), 1 - fraction / (2 * size.clamp_min(_TINY))
            )
            total = (1 - self.ratio) * weights.sum(1) - excess.sum(1)
            near = singles + share * (by_weight - singles) - size * (share - mean_share) * total
        found = near if self.far is None else self.far.mixed(near, weights, gone, fraction)
        return torch.where(self.knows(kept), singles, found)

    @property
    def largest_known(self) -> int:
        """The largest sets that were measured themselves: pairs, flipped components alone, or none at all."""
        return 2 if len(self.pairs) else min(1, len(self.flipped))

    def knows(self, kept: Tensor) -> Tensor:
        """Which sets were measured themselves, so that nothing is to be forecast of them, bool, as `shares` are."""
        gone = 1 - kept
        alone = gone[..., self.flipped].sum(-1)
        pairs = (gone[..., self.pairs[:, 0]] * gone[..., self.pairs[:, 1]]).sum(-1)
        size = gone.count_nonzero(-1)
        known = (size == 0) | (size == 1) & (alone == 1) | (size == 2) & (pairs == 1)
        return known if kept.dim() == 3 else known[:, None]

    def growth(self, kept: Tensor, fraction: float) -> Tensor:
        """By how much intervals are wider than checks say, as these had no sets as large, float32, as `shares` are."""
        gone = (1 - kept).sum(-1, keepdim=kept.dim() == 2)
        return (gone / largest_checked(fraction, kept.shape[-1], 1 + self.largest_known)).clamp_min(1) ** GROWTH

    def at(self, rows: Sequence[int]) -> "Forecast":
        """The forecast of some of the examples alone."""
        here = list(rows)
        interactions = None if self.interactions is None else self.interactions[here]
        far = None if self.far is None else self.far.at(here)
        return replace(
            self, unablated=self.unablated[here], effects=self.effects[here], interactions=interactions, far=far
        )

    def to(self, device: torch.device) -> "Forecast":
        """This forecast on a device."""
        names = ("unablated", "flipped", "effects", "pairs", "interactions", "far")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device) for name, value in values.items()})

    def scaled(self, scale: float) -> "Forecast":
        """This forecast for weights that are so many times as large."""
        far = None if self.far is None else replace(self.far, ratio=self.far.ratio / scale)
        return replace(self, ratio=self.ratio / scale, far=far)

    @staticmethod
    def shares(kept: Tensor, fraction: float) -> Tensor:
        """Sizes of sets by the fitted size, 1 at most, float32 [masks, 1]; [masks, examples] of examples' own sets."""
        return (_sizes(1 - kept) / fraction).clamp_max(1.0)

    @staticmethod
    def strong(weights: Tensor, kept: Tensor) -> Tensor:
        """Which sets take much more of an example's weights than random ones of their size, bool [masks, examples]."""
        gone = 1 - kept
        return taken(gone, Far.sizes(weights)) > STRONG * _sizes(gone)

    def norms(self, weights: Tensor, errors: Tensor | None, kept: Tensor) -> Tensor:
        """How far random sets like these go, [masks, examples].

        The norm of what they ablate (of weights or single effects, the larger ones, and errors), and the mean drop
        under sets of their size. Without the latter limits would bend what random sets do where most weights are of one
        sign: on the demo's single pass the correlation at 5 % falls from .73 to .68, with a slope of 1.23.
        """
        squares = weights.square() * max(1.0, self.ratio**2)
        known = torch.maximum(weights[:, self.flipped].square(), self.effects.square())
        squares = squares.index_copy(1, self.flipped, known)
        squares = squares if errors is None else squares + errors.square()
        gone = 1 - kept
        return taken(gone, squares).sqrt() + _sizes(gone) * weights.sum(1).abs()

    def to_json(self) -> dict[str, Any]:
        """All but the tensors that have one row an example."""
        found: dict[str, Any] = {"flipped": self.flipped.tolist(), "ratio": self.ratio}
        if len(self.pairs):
            found["pairs"] = self.pairs.tolist()
        if self.far is not None:
            found["far"] = self.far.to_json()
        if self.calibration is not None:
            found["calibration"] = {key: list(getattr(self.calibration, key)) for key in _ENTRIES}
            found["calibration"]["level"] = self.calibration.level
        return found

    def matrices(self) -> dict[str, Tensor]:
        """The tensors that have one row an example, by the names that they have in files; none without columns."""
        found = {"effects": self.effects} if len(self.flipped) else {}
        found |= {"far_effects": self.far.effects} if self.far is not None and len(self.far.indices) else {}
        return found if self.interactions is None else {**found, "interactions": self.interactions}

    @classmethod
    def from_rows(
        cls, provenance: Provenance, matrices: Mapping[str, Rows], columns: Mapping[str, Tensor]
    ) -> "Forecast":
        """The forecast of attributions that were saved, from whomever the values come.

        Raises:
            CorruptFileError: entries that make no sense, or do not fit the tensors, or damaged rows.
            NonFiniteOutputError: NaN or infinity.
        """
        value, unablated, n_components = provenance.forecast, columns.get("unablated"), provenance.n_components or 0
        widths = {name: matrices[name].shape[1] if name in matrices else 0 for name in MATRICES}
        fraction = provenance.ablated_fraction
        if unablated is None or not fraction or not _is_sane(value, widths, n_components, fraction):
            raise CorruptFileError("the forecast of these attributions is damaged; download or save them again")
        for name in widths.keys() & matrices.keys():  # a few columns, which every prediction reads
            matrices[name].verify()
        check_finite(unablated[:, None], 0)
        found = value.get("calibration")
        calibration = None
        if found is not None:
            if "strong" not in found:  # before there were kinds of strong sets: other scores, without them no interval
                found = {**found, "strong": Calibration.strong, "scores": ()}
            entries = {key: tuple(map(float, found[key])) for key in _ENTRIES}
            calibration = Calibration(**entries, level=float(found["level"]))

        def tensor_of(name: str) -> Tensor:
            return matrices[name].tensor() if widths[name] else torch.zeros(len(unablated), 0)

        return cls(
            unablated,
            torch.tensor(value["flipped"], dtype=torch.long),
            tensor_of("effects"),
            float(value["ratio"]),
            torch.tensor(value.get("pairs", []), dtype=torch.long).view(-1, 2),
            matrices["interactions"].tensor() if widths["interactions"] else None,
            calibration,
            Far.from_json(value["far"], tensor_of("far_effects")) if value.get("far") is not None else None,
        )


def _sizes(gone: Tensor) -> Tensor:
    """Shares of the components that sets take, float32 [masks, 1], or [masks, examples] of examples' own."""
    return gone.mean(-1, keepdim=gone.dim() == 2)


_ENTRIES = ("limits", "spread", "strong", "scores")


def _is_sane(value: Any, widths: Mapping[str, int], n_components: int, fraction: float) -> bool:
    if not isinstance(value, Mapping) or not _are_numbers([value.get("ratio")]):
        return False
    flipped, pairs, calibration = value.get("flipped"), value.get("pairs", []), value.get("calibration")
    if not _are_indices(flipped, n_components) or len(flipped) != widths["effects"] or not isinstance(pairs, list):
        return False
    if not all(_are_indices(pair, n_components) and len(pair) == 2 for pair in pairs):
        return False
    if len(pairs) != widths["interactions"]:
        return False
    if not _is_sane_far(value.get("far"), widths["far_effects"], n_components, fraction):
        return False
    if calibration is None:
        return True
    if not isinstance(calibration, Mapping) or not _are_numbers([calibration.get("level")]):
        return False
    entries = [calibration.get(key, Calibration.strong if key == "strong" else None) for key in _ENTRIES]
    if not all(map(_are_numbers, entries)):
        return False
    limits, spread, strong, scores = entries
    lengths = len(limits), len(spread), len(strong)
    return lengths == (2, 3, 3) and min(strong) >= 1 and all(x >= 0 for x in (*limits, *spread, *scores))


def _is_sane_far(value: Any, width: int, n_components: int, fraction: float) -> bool:
    if value is None:
        return not width
    if not isinstance(value, Mapping) or not _are_indices(value.get("indices"), n_components):
        return False
    numbers = [value.get(name) for name in ("reach", "ratio", "trust")]
    if len(value["indices"]) != width or not _are_numbers(numbers):
        return False
    reach, _, trust = numbers
    return fraction < reach <= 1 and 0 <= trust <= 1


def _are_indices(value: Any, n_components: int) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < n_components for i in value)


def _are_numbers(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    return all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
