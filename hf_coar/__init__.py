"""hf_coar: component attribution by regression (COAR) for any Hugging Face or timm model.

It says how much each component (filter, neuron, head, matrix) contributes to each prediction, predicts what ablating
any set of them would do, and edits the model by it.
"""

__version__ = "0.1.0"

from hf_coar.storage import interrupts  # noqa: F401 (by being imported first)

# isort: split

from hf_coar import components, estimators
from hf_coar.api import attribute, evaluate, load, reopen
from hf_coar.attributions import Attributions
from hf_coar.components import Components
from hf_coar.editing import edit, fix, forget, lift, match, steer
from hf_coar.editing.edited import undo
from hf_coar.errors import CoarError
from hf_coar.estimators import baselines
from hf_coar.estimators.path_gradient import PathGradient
from hf_coar.estimators.regression import Regression
from hf_coar.estimators.solvers import ARD, Lasso, Ridge
from hf_coar.judging import stability
from hf_coar.judging.evaluation import Report
from hf_coar.masking import Mean, Patch, Resample, Values, ablate, ablations, find_components
from hf_coar.models import outputs, tasks
from hf_coar.runs.engine import running

__all__ = [
    "ARD",
    "Attributions",
    "CoarError",
    "Components",
    "Lasso",
    "Mean",
    "Patch",
    "PathGradient",
    "Regression",
    "Report",
    "Resample",
    "Ridge",
    "Values",
    "ablate",
    "ablations",
    "attribute",
    "baselines",
    "components",
    "edit",
    "estimators",
    "evaluate",
    "find_components",
    "fix",
    "forget",
    "lift",
    "load",
    "match",
    "outputs",
    "reopen",
    "running",
    "stability",
    "steer",
    "tasks",
    "undo",
]


def __dir__() -> list[str]:
    """What people call; the rooms that it is made of are modules all the same."""
    return [*__all__, "__doc__", "__version__"]
