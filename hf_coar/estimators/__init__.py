"""Estimators: `PathGradient`, `Regression` and the baselines, all of them by name, and what sizes them to a budget."""

from hf_coar.estimators.baselines import (
    GradientTimesParameter,
    InternalInfluence,
    NeuronConductance,
    RandomWeights,
    WeightNorm,
)
from hf_coar.estimators.leave_one_out import LeaveOneOut
from hf_coar.estimators.path_gradient import PathGradient
from hf_coar.estimators.registry import ESTIMATORS, Estimator, Fit, Part, Problem, Size, get, register
from hf_coar.estimators.regression import Regression
from hf_coar.estimators.solvers import ARD, Lasso, Ridge
from hf_coar.runs.measuring import parts_of

__all__ = [
    "ARD",
    "ESTIMATORS",
    "Estimator",
    "Fit",
    "GradientTimesParameter",
    "InternalInfluence",
    "Lasso",
    "LeaveOneOut",
    "NeuronConductance",
    "Part",
    "PathGradient",
    "Problem",
    "RandomWeights",
    "Regression",
    "Ridge",
    "Size",
    "WeightNorm",
    "get",
    "parts_of",
    "register",
]
