"""Predicting: outputs after ablations, by weights alone or by a forecast, with an interval where one is known."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar.attributions.forecast import Forecast
from hf_coar.attributions.layers import layers_of, taken
from hf_coar.components import Components
from hf_coar.errors import CoarError

logger = logging.getLogger(__name__)

_NO_INTERVAL = (
    "these attributions were not checked on fresh sets of components, or by an earlier version, and have no intervals; "
    "attribute again with check_masks, such as hf_coar.PathGradient(check_masks=20)"
)
ROUNDING = 1e-4  # of a set's norm: what was measured in other batches, or on another device, is as much off
_BEYOND = 1.25  # times the largest set that was checked; random masks of its size come so near
# Of what the strongest of an example take, as many of them: from here on a set counts as its strongest, if random sets
# hardly ever take as much (in deviations of theirs). On five small nets one random set of six components in a hundred
# counts as some example's, and none of twenty; of an example's strongest four in five and more.
_HELD, _UNLIKELY = 0.5, 4


def _tell_of_layers(modules: list[str], of_layers: Tensor, count: int, are_known: bool) -> None:
    if sets := int(of_layers.any(1).sum()):
        logger.warning(
            "intervals were measured on random sets, on the strongest components%s: %d of %d sets take most of %s "
            "(such as %s), for which they may be far too narrow; measure these with hf_coar.ablate",
            " and on single layers" if are_known else ", and on too few layers (these take eight examples or more)",
            sets, count, "several layers" if are_known else "a layer", modules[int(of_layers.any(0).long().argmax())],
        )  # fmt: skip


def _tell_of_larger(forecast: Forecast, fraction: float, kept: Tensor) -> None:
    most = forecast.most_measured(fraction, kept.shape[1])
    sizes = (1 - kept).sum(1)
    if beyond := int((sizes > _BEYOND * most).sum()):
        logger.warning(
            "intervals were measured on sets of up to %d components: for the %d larger ones, of up to %d, they are "
            "extrapolated and need not hold; measure these with hf_coar.ablate",
            round(most), beyond, round(float(sizes.max())),
        )  # fmt: skip


def _tell_of_chosen_elsewhere(forecast: Forecast, weights: Tensor, kept: Tensor) -> None:
    """Sets of the strongest of some examples, which are asked of others: what these miss nothing has measured."""
    if len(weights) == 1 or not len(kept):
        return
    gone, sizes = 1 - kept, weights.abs()
    counts = gone.count_nonzero(1)
    largest = sizes.topk(max(int(counts.max()), 1), dim=1).values  # to sort all takes eight times as long
    most = largest.cumsum(1)[:, counts.sub(1).clamp_min(0)].T
    taken_of_all, count = gone @ sizes.T, counts[:, None]
    unlikely = taken_of_all - count * sizes.mean(1) > _UNLIKELY * count.sqrt() * sizes.std(1)
    held = (taken_of_all >= _HELD * most) & unlikely & ~forecast.knows(kept)
    if sets := int((held.any(1) & ~held.all(1)).sum()):
        logger.warning(
            "intervals were measured on random sets and on each example's own strongest components: %d of %d sets hold "
            "the strongest of some examples (such as row %d) and not of others, for which intervals of 95 %% held for "
            "60 to 85 %% in trials; measure these with hf_coar.ablate",
            sets, len(kept), int(held.any(0).long().argmax()),
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What ablating some components is expected to do.

    Attributes:
        before: float32 [examples], outputs with everything in place.
        after: float32 [examples], outputs expected without the components.
        low: float32 [examples], the lower end of the interval; None where nothing was checked.
        high: float32 [examples], the upper end.
        level: of the interval, or None.
    """

    before: Tensor
    after: Tensor
    low: Tensor | None
    high: Tensor | None
    level: float | None

    @classmethod
    def joined(cls, parts: "Sequence[Outcome]") -> "Outcome":
        """One outcome of several parts, whose examples come one after the other; at least one."""

        def all_of(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return cls(*map(all_of, ("before", "after", "low", "high")), parts[0].level)

    def __str__(self) -> str:
        """Such as `5.27 → 1.10 (95 %: 0.62 … 1.58)`, means where there are several examples."""
        known = "" if self.low is None else f" ({self.level:.3g}: {self.low.mean():.3g} … {self.high.mean():.3g})"
        return f"{self.before.mean():.3g} → {self.after.mean():.3g}{known}"


@dataclass(frozen=True)
class Known:
    """All that predictions of some examples are made of.

    Attributes:
        components: of the model.
        weights: float32 [examples, components].
        bias: float32 [examples].
        errors: float32 [examples, components], or None.
        forecast: of these examples, or None for linear predictions.
        fraction: the ablated fraction that the weights are for.
    """

    components: Components
    weights: Tensor
    bias: Tensor
    errors: Tensor | None
    forecast: Forecast | None
    fraction: float | None

    @property
    def has_intervals(self) -> bool:
        """Whether fresh sets were measured."""
        calibration = self.forecast and self.forecast.calibration
        return calibration is not None and len(calibration.scores) > 0

    def outputs(self, kept: Tensor, level: float | None) -> "Tensor | tuple[Tensor, Tensor, Tensor]":
        """Outputs [masks, examples] for kept, float32 [masks, components]; with a level also the ends of the interval.

        Raises:
            CoarError: a level, and no interval is known, or too few sets were measured for it.
        """
        if level is not None and not self.has_intervals:
            raise CoarError(_NO_INTERVAL)
        if self.forecast is None:
            return kept @ self.weights.T + self.bias
        forecast, calibration = self.forecast, self.forecast.calibration
        drops = forecast.drops(self.weights, kept, self.fraction)
        drops += forecast.shares(kept, self.fraction) * forecast.missed(self.weights, self.bias)
        if calibration is None:
            return forecast.unablated - drops
        said, known = forecast.said(drops, self.weights, self.errors, kept, self.fraction), forecast.knows(kept)
        values = forecast.unablated - torch.where(known, drops, calibration.limited(said))
        if level is None:
            return values
        half = calibration.quantile(level) * calibration.expected_miss(said)
        wider = calibration.widening(said, forecast.times(kept, self.fraction))
        of_layers = taken(layers_of(self.components), kept).any(1)[:, None]
        half *= torch.where(of_layers, wider.clamp_min(calibration.layers), wider)
        half = torch.where(known, ROUNDING * said.norms, half)
        return values, values - half, values + half

    def tell_of_others(self, kept: Tensor) -> None:
        """Warns of sets, kept float32 [masks, components], of other kinds than intervals were measured on."""
        forecast = self.forecast
        if forecast is None or forecast.calibration is None or self.fraction is None:
            return
        layers, are_known = layers_of(self.components), forecast.calibration.layers > 0
        of_layers = taken(layers, kept) & ~forecast.knows(kept)
        others = ~(of_layers.sum(1) == 1) if are_known else torch.ones(len(kept), dtype=torch.bool)
        _tell_of_larger(forecast, self.fraction, kept[others])
        _tell_of_chosen_elsewhere(forecast, self.weights, kept[others])
        _tell_of_layers([layer.module for layer in layers], of_layers[others], len(kept), are_known)

    def outcome(self, kept: Tensor, level: float | None) -> Outcome:
        """What a single mask, float32 [1, components], does."""
        before = self.outputs(torch.ones_like(kept), None)[0]
        if not self.has_intervals or level is None:
            return Outcome(before, self.outputs(kept, None)[0], None, None, level)
        after, low, high = (end[0] for end in self.outputs(kept, level))
        return Outcome(before, after, low, high, level)
