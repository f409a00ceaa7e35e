"""Forecasts: what ablating any set of components does, for sets of any size, with an interval that was measured.

Attributions are made for one ablated fraction a. What a component is worth depends on how much else is gone: w(0) is
its single effect, everything else in place, and w(a) its weight. Between them

    w(s) = single + (weight - single) · min(1, s / a)

and the drop of the output, counted from the unablated output, is the first-order expansion around the mean mask of the
set's size s. Single effects are exact for the components that were *flipped* (ablated alone), and for the others their
weights times one ratio, which the flipped ones show. Where pairs are known, their interactions take the place of w(s).

A set of strong components is no random set: its effects are not additive, and outputs saturate. So where effects far
from the whole model were read, see `far`, drops of such sets lean on these, and what fresh sets taught (`calibration`)
bends them and says how far they may be off.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions.calibration import STEEPEST, WHEREVER, Calibration, Said
from hf_coar.attributions.far import Far, taken
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.rows import Rows, check_finite
from hf_coar.errors import CorruptFileError

MATRICES = ("effects", "interactions", "far_effects")  # the names of those with one row an example
_TINY = 1e-12
# Sets that take this multiple of their share of all weights are strong. In trials on seven models 1.7 to 3 were alike.
STRONG = 2
_MANY = 8  # components, or half of fewer than sixteen, are ablated at once whatever the fitted fraction


def largest_checked(fraction: float, n_components: int, fewest: int) -> float:
    """Components of the largest sets that teach forecasts their misses: twice the fitted fraction, or a few."""
    return max(2 * fraction * n_components, min(_MANY, n_components / 2), fewest)


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

    @classmethod
    def of_unablated(cls, unablated: Tensor) -> "Forecast":
        """A forecast that knows no more than where predictions start, float32 [examples]."""
        return cls(unablated, torch.zeros(0, dtype=torch.long), torch.zeros(len(unablated), 0))

    def missed(self, weights: Tensor, bias: Tensor) -> Tensor:
        """What weights and bias, which are of the fitted fraction, miss of the unablated output, float32 [examples].

        Sets of the fitted size are that much lower than the weights say, smaller ones in proportion. 0 where single
        effects or fresh sets tell of sizes.
        """
        if len(self.flipped) or self.calibration is not None:
            return torch.zeros_like(self.unablated)
        return self.unablated - bias - weights.sum(1)

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

    def said(self, drops: Tensor, weights: Tensor, errors: Tensor | None, kept: Tensor, fraction: float) -> Said:
        """What calibrations take of sets, from their drops and from what `drops` and `norms` take."""
        norms, strong = self.norms(weights, errors, kept), self.strong(weights, kept)
        return Said(drops, self.shares(kept, fraction), norms, strong, *self.farthest)

    @property
    def farthest(self) -> tuple[Tensor, Tensor]:
        """How far a single component is known to lower outputs, and to raise them, float32 [examples]; 0 for none."""
        if not len(self.flipped):
            return torch.zeros_like(self.unablated), torch.zeros_like(self.unablated)
        return self.effects.amax(1).clamp_min(0), (-self.effects).amax(1).clamp_min(0)

    def times(self, kept: Tensor, fraction: float) -> Tensor:
        """How many times as large as the largest near sets others are, 1 at least, float32, as `shares` are."""
        gone = (1 - kept).sum(-1, keepdim=kept.dim() == 2)
        return (gone / largest_checked(fraction, kept.shape[-1], 1 + self.largest_known)).clamp_min(1)

    def most_measured(self, fraction: float, n_components: int) -> float:
        """Components of the largest sets on which intervals were measured, near or distant."""
        reach = 0.0 if self.calibration is None else self.calibration.reach
        return max(largest_checked(fraction, n_components, 1 + self.largest_known), reach * n_components)

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

    def times_unit(self, unit: float) -> "Forecast":
        """This forecast of outputs that were measured in a unit, for the outputs themselves."""
        names = ("unablated", "effects", "interactions")
        found = {name: value * unit for name in names if (value := getattr(self, name)) is not None}
        found["calibration"] = self.calibration and self.calibration.times_unit(unit)
        found["far"] = self.far and replace(self.far, effects=self.far.effects * unit)
        return replace(self, **found)

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
        # In a power of two near the largest, which changes no digit: squares of float32 end at 1e-38 and 1e38.
        sizes = (float(one.abs().max()) for one in (weights, self.effects) if one.numel())
        unit = 2.0 ** math.frexp(max([1e-30, *sizes]))[1]
        squares = (weights / unit).square() * max(1.0, self.ratio**2)
        known = torch.maximum((weights[:, self.flipped] / unit).square(), (self.effects / unit).square())
        squares = squares.index_copy(1, self.flipped, known)
        squares = squares if errors is None else squares + (errors / unit).square()
        gone = 1 - kept
        return taken(gone, squares).sqrt() * unit + _sizes(gone) * weights.sum(1).abs()

    def to_json(self) -> dict[str, Any]:
        """All but the tensors that have one row an example."""
        found: dict[str, Any] = {"flipped": self.flipped.tolist(), "ratio": self.ratio}
        if len(self.pairs):
            found["pairs"] = self.pairs.tolist()
        if self.far is not None:
            found["far"] = self.far.to_json()
        if self.calibration is not None:
            found["calibration"] = {key: list(getattr(self.calibration, key)) for key in _ENTRIES}
            found["calibration"] |= {key: getattr(self.calibration, key) for key in ("level", *_NUMBERS)}
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
            entries = {key: tuple(map(float, found.get(key, getattr(Calibration, key)))) for key in _ENTRIES}
            numbers = {key: float(found.get(key, 0.0)) for key in _NUMBERS}
            calibration = Calibration(**entries, level=float(found["level"]), **numbers)

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


_ENTRIES = ("limits", "spread", "strong", "growth", "until", "scores")
_LATER = ("strong", "growth", "until")  # which forecasts of earlier versions lack
_NUMBERS = ("reach", "layers")  # as well


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
    if not isinstance(calibration, Mapping):
        return False
    numbers = [calibration.get(key, 0) for key in _NUMBERS]
    if not _are_numbers([calibration.get("level"), *numbers]) or min(numbers) < 0:
        return False
    entries = [calibration.get(key, getattr(Calibration, key) if key in _LATER else None) for key in _ENTRIES]
    if not all(map(_are_numbers, entries)) or numbers[0] > 1 or numbers[1] > WHEREVER:
        return False
    limits, spread, strong, growth, until, scores = entries
    if tuple(map(len, entries[:-1])) != (2, 3, 3, 2, 2) or min(*strong, *until) < 1:
        return False
    if max(growth) > STEEPEST or max(until) > WHEREVER:
        return False
    return all(x >= 0 for x in (*limits, *spread, *growth, *scores))


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
