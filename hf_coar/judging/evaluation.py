"""Evaluation: predicted against measured outputs, on fresh random masks that no fit has seen."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.attributions import Attributions
from hf_coar.errors import CoarError
from hf_coar.judging import stability
from hf_coar.masking import MaskedModel, paired
from hf_coar.models import outputs, tasks
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output
from hf_coar.runs import engine, preflight, sampling, workers
from hf_coar.runs.fidelity import correlation, slope
from hf_coar.runs.problem import Problem
from hf_coar.runs.store import Store
from hf_coar.runs.witness import Witness
from hf_coar.storage import files, folders
from hf_coar.storage.registry import dotted

logger = logging.getLogger(__name__)

_RESAMPLES = 1000
_EDITED = 4  # components of a typical edit
_FEW_DECISIONS, _LOW_CORRELATION = 0.25, 0.5


@dataclass(frozen=True)
class Report:
    """Fidelity by ablated fraction.

    Attributes:
        correlation: fraction -> mean over the examples of the Pearson correlation, over the masks, of predicted and
            measured outputs.
        interval: fraction -> (low, high), bootstrap 95 % interval of that mean over masks and examples.
        slope: fraction -> slope of measured on predicted outputs, pooled over examples after centring each; 1 = the
            scale is right.
        per_example: fraction -> correlations, float32 [examples]; NaN where an example's outputs do not vary.
        predicted: fraction -> float32 [masks, examples].
        measured: fraction -> float32 [masks, examples].
        n_masks: masks a fraction.
        seed: of the masks.
        reliability: float32 [examples], the share of the weights' variance that is not noise of the estimate, see
            `stability.reliability`; None for methods without standard errors.
        of: `Attributions.fingerprint()` of what was judged.
        unablated: float32 [examples], outputs with everything in place, where the attributions know them.
        boundary: the value at which right turns into wrong, where there is one.
    """

    correlation: dict[float, float]
    interval: dict[float, tuple[float, float]]
    slope: dict[float, float]
    per_example: dict[float, Tensor]
    predicted: dict[float, Tensor]
    measured: dict[float, Tensor]
    n_masks: int
    seed: int
    reliability: Tensor | None = None
    of: str | None = None
    unablated: Tensor | None = None
    boundary: float | None = None

    def left(self, fraction: float) -> tuple[float, float | None]:
        """What is left under the masks of a fraction: the mean output, and the share of decisions that are kept."""
        measured = self.measured[fraction]
        if self.unablated is None or self.boundary is None:
            return float(measured.mean()), None
        kept = (measured > self.boundary) == (self.unablated > self.boundary)
        return float(measured.mean()), float(kept.float().mean())

    @property
    def mean_reliability(self) -> float | None:
        """Mean over the examples whose weights vary."""
        known = self.reliability is not None and bool((~self.reliability.isnan()).any())
        return float(self.reliability.nanmean()) if known else None

    def to_json(self) -> dict[str, Any]:
        """The figures without the arrays, as JSON values."""
        return {
            "of": self.of,
            "n_masks": self.n_masks,
            "seed": self.seed,
            "reliability": self.mean_reliability,
            "fractions": [
                {
                    "ablated_fraction": fraction,
                    "correlation": _finite(self.correlation[fraction]),
                    "interval": [_finite(end) for end in self.interval[fraction]],
                    "slope": _finite(self.slope[fraction]),
                    "n_undefined": int(self.per_example[fraction].isnan().sum()),
                    "output": _finite(self.left(fraction)[0]),
                    "decisions": self.left(fraction)[1],
                }
                for fraction in self.correlation
            ],
        }

    def __repr__(self) -> str:
        """Two lines: correlations and slopes; on what."""
        figures = [
            f"{mean:.3f} at {100 * fraction:.3g} %, slope {self.slope[fraction]:.2f}"
            for fraction, mean in self.correlation.items()
        ]
        n = len(next(iter(self.per_example.values()), ()))
        known = "" if self.mean_reliability is None else f", reliability {self.mean_reliability:.3f}"
        return (
            f"Report(correlation {'; '.join(figures)},\n       {n:,} examples, {self.n_masks} masks a fraction{known})"
        )

    def __str__(self) -> str:
        """A small table."""
        lines = [f"{'ablated':>8}  {'correlation':>11}  {'95 % interval':>15}  {'slope':>6}  {'output':>7}  decisions"]
        for fraction, mean in self.correlation.items():
            (low, high), (output, kept) = self.interval[fraction], self.left(fraction)
            figures = f"{mean:>11.3f}  {low:>7.3f}–{high:.3f}  {self.slope[fraction]:>6.2f}  {output:>7.3g}"
            lines.append(f"{fraction:>8.2%}  {figures}" + ("" if kept is None else f"  {kept:>6.0%} kept"))
        if self.mean_reliability is not None:
            lines.append(f"reliability of the weights {self.mean_reliability:.3f} (1 = another seed gives the same)")
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    """JSON has no NaN: where nothing varies there is no correlation."""
    return value if math.isfinite(value) else None


def evaluate(
    attributions: Attributions,
    model: nn.Module,
    data: Any,
    fractions: Sequence[float] | float | None,
    n_masks: int,
    seed: int,
    output: "str | Output | outputs.OutputFunction | None" = None,
    call: Call | None = None,
    out: str | Path | None = None,
) -> Report:
    """The figures of `hf_coar.evaluate`, whose arguments these are, saved as `evaluation.json` in `out`.

    Raises:
        CoarError: a fraction outside (0, 1), or fewer than 3 masks.
        ModelMismatchError: another model.
        DataError: other data.
    """
    if isinstance(fractions, Real):
        fractions = [fractions]
    if fractions is None:
        fractions = default_fractions(attributions.provenance.ablated_fraction or 0.05, len(attributions.components))
    _check(fractions, n_masks, seed, len(attributions.components))
    fingerprint = models.fingerprint(model)
    attributions.check_model(fingerprint, models.record(model))
    masked = MaskedModel(model, attributions.components)
    options, of = engine.current(), attributions.provenance
    _check_call(of.call, call)
    data = paired(attributions.components, data)
    batches = data_module.batches(data, options.batch_size)
    first = preflight.First(batches)
    output = output or (outputs.recorded(of.output) if of.output else tasks.AUTO)
    output = preflight.bound(model, first, output, call)
    if of.alignment is not None:
        output = replace(output, alignment=of.alignment)
    witness = Witness.of(model, output, first)
    first.release()
    if attributions.forecast is not None:
        witness.check_attributed(attributions.forecast.unablated, attributions.identity, of.dtype)
    settings = {"task": "evaluate", "seed": seed, "n_masks": n_masks, "model": {"fingerprint": fingerprint}}
    settings |= {"output": output.name, "components": attributions.components.to_json()}
    settings |= {"dtype": options.dtype} if options.dtype else {}
    batches = data_module.batches(data, options.batch_size)
    predicted, measured = {}, {}
    if out is not None:
        folders.claim(out, folders.ATTRIBUTIONS)
    with workers.folder(out) as folder:
        for fraction in fractions:
            store = Store(folder / f"fraction-{fraction:g}", {**settings, "ablated_fraction": fraction})
            witness.check_run(store.folder)
            store.expect(attributions.identity, attributions.provenance.skipped)
            problem = Problem(masked, batches, output, fraction, seed, store, attributions.identity)
            masks = sampling.Masks(len(masked), fraction, n_masks, seed, sampling.EVALUATION)
            measured[fraction] = problem.measure(masks)
            predicted[fraction] = attributions.predict(masks.rows(0, n_masks))
    reliability = None if attributions.standard_errors is None else stability.reliability(attributions)
    forecast = attributions.forecast
    report = replace(
        _report(predicted, measured, n_masks, seed),
        reliability=reliability,
        of=attributions.fingerprint(),
        unablated=None if forecast is None else forecast.unablated,
        boundary=output.boundary,
    )
    _warn(report, attributions.provenance.ablated_fraction)
    if out is not None and workers.processes().is_main_process:
        files.write_json(Path(out) / "evaluation.json", report.to_json())
    return report


def _check_call(recorded: str | None, given: Call | None) -> None:
    """Raises `CoarError` unless the model is run as it was when it was attributed."""
    found = given and dotted(given)
    if found != recorded:
        raise CoarError(
            f"the model was attributed with {f'call={recorded}' if recorded else 'the call of its task'}, and is to be "
            f"run with {f'call={found}' if found else 'no call of your own'}; give the same"
        )


def default_fractions(fitted: float, n_components: int) -> tuple[float, ...]:
    """The fitted fraction, a quarter of it, and the size of typical edits: four components.

    Those that are near an earlier one are left out.
    """
    found: list[float] = []
    for fraction in (fitted, fitted / 4, _EDITED / n_components):
        useful = fraction * n_components >= 1 and fraction < 1
        if not found or (useful and all(max(fraction, f) / min(fraction, f) >= 1.5 for f in found)):
            found.append(fraction)
    return tuple(found)


def _warn(report: Report, fitted: float | None) -> None:
    for fraction, mean in report.correlation.items():
        output, kept = report.left(fraction)
        if kept is not None and kept < _FEW_DECISIONS:
            logger.warning(
                "at %.3g ablated %.0f %% of the decisions are left (mean output %.3g, with everything in place %.3g): "
                "hardly a model; attribute and evaluate with a smaller ablated_fraction",
                fraction, 100 * kept, output, float(report.unablated.mean()),
            )  # fmt: skip
        if mean < _LOW_CORRELATION:
            advice = "attribute with more passes, or by another method"
            if fitted is None or abs(fraction / fitted - 1) > 0.01:
                advice += f", or attribute with ablated_fraction={fraction:.3g}"
            logger.warning(
                "at %.3g ablated the predictions have a correlation of %.2f only; %s", fraction, mean, advice
            )


def _check(fractions: Sequence[float], n_masks: int, seed: int, n_components: int) -> None:
    sampling.check_seed(seed)
    for fraction in fractions:
        sampling.check_fraction(fraction)
        sampling.check_some_ablated(fraction, n_components)
    if not fractions:
        raise CoarError("fractions is empty; give at least one ablated fraction, such as (0.05,)")
    if n_masks < 3:
        raise CoarError(f"n_masks={n_masks}; a correlation needs at least 3")


def _report(predicted: dict[float, Tensor], measured: dict[float, Tensor], n_masks: int, seed: int) -> Report:
    per_example = {fraction: correlation(predicted[fraction], measured[fraction]) for fraction in predicted}
    return Report(
        correlation={fraction: float(values.nanmean()) for fraction, values in per_example.items()},
        interval={f: bootstrap_interval(predicted[f], measured[f], seed) for f in predicted},
        slope={fraction: slope(predicted[fraction], measured[fraction]) for fraction in predicted},
        per_example=per_example,
        predicted=predicted,
        measured=measured,
        n_masks=n_masks,
        seed=seed,
    )


def bootstrap_interval(predicted: Tensor, measured: Tensor, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean correlation over resampled masks and resampled examples (Owen 2007).

    All examples share the masks, so that examples alone would tell too little: on the demo other masks move the mean
    half as far again as such an interval is wide.

    Args:
        predicted: float [masks, examples].
        measured: the same.
        seed: of the resampling.
        level: such as 0.95.

    Returns:
        The ends; NaN where no example's outputs vary.
    """
    p, m = (x.double() - x.double().mean(0) for x in (predicted, measured))
    varying = (p.square().sum(0) > 0) & (m.square().sum(0) > 0)
    p, m = p[:, varying], m[:, varying]
    if not p.shape[1]:
        return (float("nan"), float("nan"))
    masks, examples = _counts(seed, 0, len(p)), _counts(seed, 1, p.shape[1])
    mean_p, mean_m = masks @ p, masks @ m
    covariance = masks @ (p * m) - mean_p * mean_m
    scale = (masks @ p.square() - mean_p.square()) * (masks @ m.square() - mean_m.square())
    found = torch.where(scale > 1e-12 * scale.max(), covariance / scale.clamp_min(1e-300).sqrt(), torch.nan)
    known = ~found.isnan()
    weights = examples * known
    means = ((found.nan_to_num() * weights).sum(1) / weights.sum(1).clamp_min(1e-300))[weights.sum(1) > 0]
    # Resampled masks are fewer different ones, and correlate a little differently: the width counts, not the middle.
    ends = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype))
    middle = float(correlation(p, m).nanmean()) - float(means.mean())
    low, high = (min(1.0, max(-1.0, float(end) + middle)) for end in ends)
    return low, high


def _counts(seed: int, axis: int, count: int) -> Tensor:
    """How often each of `count` things is drawn, as shares of the draws, float64 [resamples, count]."""
    rows = [
        np.bincount(sampling.words(seed, sampling.BOOTSTRAP, i, axis, count) % np.uint32(count), minlength=count)
        for i in range(_RESAMPLES)
    ]
    return torch.from_numpy(np.stack(rows)).double() / count
