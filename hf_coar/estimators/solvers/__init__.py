"""Solvers: from masks and outputs to weights: `Ridge`, `Lasso`, `ARD`; and what is under them (`design`, `systems`)."""

from hf_coar.estimators.solvers.ard import ARD
from hf_coar.estimators.solvers.base import SOLVERS, Solver, get, register, settings
from hf_coar.estimators.solvers.lasso import Lasso
from hf_coar.estimators.solvers.ridge import Ridge

__all__ = ["ARD", "SOLVERS", "Lasso", "Ridge", "Solver", "get", "register", "settings"]
