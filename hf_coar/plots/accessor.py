"""What `attributions.plot` has: pictures of attributions by short names; each registers itself."""

from collections.abc import Sequence

import torch

from hf_coar.attributions import Attributions
from hf_coar.attributions.looking import PLOTS
from hf_coar.errors import CoarError
from hf_coar.judging.evaluation import Report
from hf_coar.plots import contributions
from hf_coar.plots import fidelity as against
from hf_coar.plots.canvas import Figure


@PLOTS.register("layers")
def layers(attributions: Attributions, examples: Sequence[int] | None = None) -> Figure:
    """`contribution_by_layer`."""
    return contributions.contribution_by_layer(attributions, examples)


@PLOTS.register("top")
def top(attributions: Attributions, example: int = 0, n: int = 15) -> Figure:
    """`top_components`."""
    return contributions.top_components(attributions, example, n)


@PLOTS.register("fidelity")
def fidelity(attributions: Attributions, report: Report | None = None, fraction: float | None = None) -> Figure:
    """Predicted against measured outputs; without a report, the correlations that were found by ablated fraction.

    Args:
        attributions: that were evaluated.
        report: from `evaluate`.
        fraction: one of the report's; the first by default.

    Raises:
        CoarError: no report, and no evaluation that was saved with the attributions.
    """
    if report is not None:
        first = next(iter(report.correlation)) if fraction is None else fraction
        return against.predicted_against_measured(report, first, attributions.provenance.unit or "its own unit")
    found = attributions.evaluation
    if not found:
        raise CoarError("these attributions were not evaluated; give plot.fidelity(coar.evaluate(attributions, …))")
    entries = {entry["ablated_fraction"]: entry for entry in found["fractions"] if entry["correlation"] is not None}
    unknown = torch.full((len(attributions),), torch.nan)
    return against.correlation_by_fraction(
        Report(
            {fraction: entry["correlation"] for fraction, entry in entries.items()},
            {fraction: tuple(entry["interval"]) for fraction, entry in entries.items()},
            {fraction: entry["slope"] for fraction, entry in entries.items()},
            dict.fromkeys(entries, unknown), {}, {}, found["n_masks"], found["seed"],
        )
    )  # fmt: skip
