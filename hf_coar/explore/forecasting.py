"""Forecasts as numbers for a page without a server: what `Attributions.without` computes with, for some components.

The page has the same few lines as `attributions.forecast` in JavaScript; a test compares the two.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions import Attributions
from hf_coar.attributions.far import Far
from hf_coar.attributions.forecast import STRONG, Forecast, largest_checked
from hf_coar.attributions.layers import CROWDED, OF_LAYER, OF_SET, layers_of
from hf_coar.attributions.predicting import ROUNDING

LEVEL = 0.95


def arrays(attributions: Attributions, components: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """JSON values, one entry an example: weights of the components and, with a forecast, what it adds to them."""
    index, forecast = torch.tensor(list(components)), attributions.forecast
    found: dict[str, Any] = {"n": len(attributions.components), "weights": []}
    if forecast is not None:
        found |= {name: [] for name in ("singles", "squares", "sizes", "total", "sum", "alone", "missed")}
        fraction = attributions.provenance.ablated_fraction
        found |= {"fraction": fraction, "calibration": _calibration(forecast)}
        found["largest"] = largest_checked(fraction, found["n"], 1 + forecast.largest_known)
        found |= {"flipped": [i in forecast.flipped for i in components]} | _pairs(forecast, list(components), rows)
        found |= _layers(attributions, components)
    far = None if forecast is None else forecast.far
    found |= {"far": None} if far is None else {"far": {"reach": far.reach, "trust": far.trust, "of": []}}
    for row in rows:
        weights = attributions.row(row)
        found["weights"].append(_short(weights[index]))
        if forecast is not None:
            errors = attributions.row(row, "standard_errors") if attributions.has_standard_errors else None
            for name, value in _of_row(forecast, row, weights, errors, index).items():
                found[name].append(value)
            found["missed"].append(float(forecast.at([row]).missed(weights[None], attributions.bias[row])))
        if far is not None:
            effects = (far.ratio * weights).index_copy(0, far.indices, far.effects[row])
            found["far"]["of"].append(_short(effects[index]))
    return found


def _of_row(
    forecast: Forecast, row: int, weights: Tensor, errors: Tensor | None, index: Tensor
) -> dict[str, list[float] | float]:
    """What `Forecast.drops`, `norms` and `strong` sum: of the components by themselves, and of all of them."""
    effects, flipped, ratio = forecast.effects[row], forecast.flipped, forecast.ratio
    singles = (ratio * weights).index_copy(0, flipped, effects)
    squares = weights.square() * max(1.0, ratio**2)
    squares = squares.index_copy(0, flipped, torch.maximum(weights[flipped].square(), effects.square()))
    squares = squares if errors is None else squares + errors.square()
    excess = effects - ratio * weights[flipped]
    return {
        "singles": _short(singles[index]), "squares": _short(squares[index]),
        "sizes": _short(Far.sizes(weights[None])[0, index]),
        "total": float((1 - ratio) * weights.sum() - excess.sum()), "sum": float(weights.sum().abs()),
        "alone": [float(x[row]) for x in forecast.farthest],
    }  # fmt: skip


def _layers(attributions: Attributions, components: Sequence[int]) -> dict[str, Any]:
    """The number of every component's layer, -1 for none that counts, and how many components each layer has."""
    layers = layers_of(attributions.components)

    def of(component: int) -> int:
        return next((k for k, layer in enumerate(layers) if layer.start <= component < layer.stop), -1)

    return {"layer": [of(i) for i in components], "layers": [layer.stop - layer.start for layer in layers]}


def _pairs(forecast: Forecast, components: list[int], rows: Sequence[int]) -> dict[str, Any]:
    """Interactions of the pairs among the components; `paired` says that pairs were measured at all."""
    if not len(forecast.pairs):
        return {"paired": False, "pairs": []}
    place = {component: i for i, component in enumerate(components)}
    there = [k for k, (i, j) in enumerate(forecast.pairs.tolist()) if i in place and j in place]
    pairs = [[place[i], place[j]] for i, j in forecast.pairs[there].tolist()]
    return {"paired": True, "pairs": pairs, "together": [_short(forecast.interactions[row][there]) for row in rows]}


def _calibration(forecast: Forecast) -> dict[str, Any] | None:
    """The limits, and the score of an interval of 95 %; None where nothing was checked."""
    known = forecast.calibration
    if known is None:
        return None
    score = known.quantile(LEVEL) if known.knows(LEVEL) else None
    found = {"limits": list(known.limits), "level": known.level, "spread": list(known.spread)}
    found |= {
        "strong": list(known.strong),
        "strong_from": STRONG,
        "growth": list(known.growth),
        "until": list(known.until),
        "layers": known.layers,
        "layers_from": [OF_LAYER, CROWDED, OF_SET],
    }
    return {**found, "rounding": ROUNDING, "score": score}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
