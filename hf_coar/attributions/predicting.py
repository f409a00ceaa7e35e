"""Predicting: outputs after ablations, by weights alone or by a forecast, with an interval where one is known."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar.attributions.forecast import Forecast
from hf_coar.components import Components
from hf_coar.errors import CoarError

logger = logging.getLogger(__name__)

_NO_INTERVAL = (
    "these attributions were not checked on fresh sets of components, or by an earlier version, and have no intervals; "
    "attribute again with check_masks, such as hf_coar.PathGradient(check_masks=20)"
)
ROUNDING = 1e-4  # of a set's norm: what was measured in other batches, or on another device, is as much off
_BEYOND = 1.25  # times the largest set that was checked; random masks of its size come so near


# Of the whole layers of the demo, a small ViT and a small GPT-2, one by one, .76 to .84 were inside intervals of 95 %,
# of some none; of the first halves of layers .84 to .91 (one seed each; a trial of which there is no script). Of an
# example's strongest components, which are checked, half may be half of a layer.
_OF_LAYER, _CROWDED, _A_LAYER = 0.75, 3, 8


def tell_of_others(forecast: Forecast | None, fraction: float | None, components: Components, kept: Tensor) -> None:
    """Warns of sets, kept [masks, components], of other kinds than those that intervals were measured on."""
    if forecast is None or forecast.calibration is None or fraction is None:
        return
    _tell_of_larger(forecast, fraction, kept)
    _tell_of_layers(forecast, components, kept)


def _tell_of_layers(forecast: Forecast, components: Components, kept: Tensor) -> None:
    """Sets that take most of a layer, and far more of it than of all others."""
    gone, known = 1 - kept, forecast.knows(kept)[:, 0]
    crowded, named = torch.zeros_like(known), ""
    for group, here in zip(components.groups, gone.split(components.sizes(), dim=1), strict=True):
        share, elsewhere = here.mean(1), (gone.sum(1) - here.sum(1)) / max(1, gone.shape[1] - group.size)
        taken = (share >= _OF_LAYER) & (share >= _CROWDED * elsewhere) & ~known
        if _A_LAYER <= group.size < gone.shape[1] and bool(taken.any()):
            crowded, named = crowded | taken, named or group.module
    if count := int(crowded.sum()):
        logger.warning(
            "intervals were measured on random sets and on the strongest components: %d of %d sets take most of a "
            "layer (such as %s), for which they may be far too narrow; measure these with hf_coar.ablate",
            count, len(kept), named,
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
        weights: float32 [examples, components].
        bias: float32 [examples].
        errors: float32 [examples, components], or None.
        forecast: of these examples, or None for linear predictions.
        fraction: the ablated fraction that the weights are for.
    """

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
        if calibration is None:
            return forecast.unablated - drops
        shares, norms = forecast.shares(kept, self.fraction), forecast.norms(self.weights, self.errors, kept)
        known = forecast.knows(kept)
        values = forecast.unablated - torch.where(known, drops, calibration.limited(drops, shares, norms))
        if level is None:
            return values
        strong = forecast.strong(self.weights, kept)
        half = calibration.quantile(level) * calibration.expected_miss(drops, shares, norms, strong)
        half *= calibration.widening(forecast.times(kept, self.fraction), drops, norms, strong)
        half = torch.where(known, ROUNDING * norms, half)
        return values, values - half, values + half

    def outcome(self, kept: Tensor, level: float | None) -> Outcome:
        """What a single mask, float32 [1, components], does."""
        before = self.outputs(torch.ones_like(kept), None)[0]
        if not self.has_intervals or level is None:
            return Outcome(before, self.outputs(kept, None)[0], None, None, level)
        after, low, high = (end[0] for end in self.outputs(kept, level))
        return Outcome(before, after, low, high, level)
