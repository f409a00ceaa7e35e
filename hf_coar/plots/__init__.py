"""Pictures: fidelity, contributions and edits, as matplotlib figures that can be told apart without colour.

Every function returns a `matplotlib.figure.Figure` and touches no global state; `save` writes it, and a notebook shows
it after `%matplotlib inline`::

    from hf_coar import plots

    plots.save(plots.predicted_against_measured(report, 0.05), "pictures/fidelity.png")

matplotlib comes with `pip install "hf_coar[plots]"`.
"""

from hf_coar.plots import accessor, results  # noqa: F401 (register `attributions.plot` and `result.plot`)
from hf_coar.plots.canvas import save
from hf_coar.plots.contributions import contribution_by_layer, contribution_heat_map, example, top_components
from hf_coar.plots.costs import cost_against_correlation, cost_to_reach
from hf_coar.plots.edits import class_accuracies, edit_sweep, group_accuracies
from hf_coar.plots.fidelity import correlation_by_fraction, predicted_against_measured
from hf_coar.plots.frontiers import edit_frontier

__all__ = [
    "class_accuracies",
    "contribution_by_layer",
    "contribution_heat_map",
    "correlation_by_fraction",
    "cost_against_correlation",
    "cost_to_reach",
    "edit_frontier",
    "edit_sweep",
    "example",
    "group_accuracies",
    "predicted_against_measured",
    "save",
    "top_components",
]
