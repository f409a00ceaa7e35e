"""Solvers: from masks and outputs to weights (`ridge`, `lasso`, `ard`), and the linear algebra under them (`design`)."""

from hf_coar.solvers.ard import ARD
from hf_coar.solvers.base import Solver
from hf_coar.solvers.lasso import Lasso
from hf_coar.solvers.ridge import Ridge

__all__ = ["ARD", "Lasso", "Ridge", "Solver"]
