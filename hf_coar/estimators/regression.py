"""Regression: the paper's estimator. Outputs under random masks, regressed on the masks (Shah, Ilyas, Mądry 2024)."""

import inspect
import logging
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.estimators.solvers import Ridge, Solver
from hf_coar.runs import workers
from hf_coar.runs.engine import is_out_of_memory
from hf_coar.runs.measuring import measure
from hf_coar.runs.problem import Fit, Method, Problem
from hf_coar.runs.sampling import MASKS, Masks

logger = logging.getLogger(__name__)

_MASK_MEMORY = 2**34  # bytes of masks that are held while solving


@dataclass(frozen=True)
class Regression:
    """Regresses the outputs under random masks on the masks; an estimator for `attribute(method=…)`.

    With a prior this is the hybrid: another method's attributions are made first, and only what they leave over is
    regressed. How much of the prior is taken is chosen for every example by leave-one-out error over the masks, from
    none on, so that a useless prior does no harm.

    Attributes:
        n_masks: how many masks, the same for all examples; the cost is one forward pass a mask and example, and the
            prior's. The paper takes 2 to 20 times as many masks as there are components.
        solver: fits the weights of all examples at once: `Ridge()`, `Lasso()`, `ARD()`, or one of your own.
        prior: such as `PathGradient(rounds=4)`, or None.
    """

    n_masks: int = 5000
    solver: Solver = field(default_factory=Ridge)
    prior: Method | None = None
    name = "regression"

    def __post_init__(self) -> None:
        """Check the number of masks, and that the solver takes a prior if there is one."""
        if isinstance(self.n_masks, bool) or not isinstance(self.n_masks, int) or self.n_masks < 3:
            raise CoarError(f"Regression(n_masks={self.n_masks!r}): must be a whole number, at least 3")
        if self.prior is not None and "prior" not in inspect.signature(self.solver.fit).parameters:
            raise CoarError(
                f"Regression(prior={self.prior!r}): the solver {type(self.solver).__name__} takes no prior; use "
                "hf_coar.Ridge() or hf_coar.ARD()"
            )

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        solver = {"name": type(self.solver).__name__, **asdict(self.solver)}
        prior = {} if self.prior is None else {"prior": self.prior.settings()}
        return {"name": self.name, "n_masks": self.n_masks, "solver": solver, **prior}

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example: one a mask, and those of the prior."""
        return self.n_masks + (self.prior.cost(ablated_fraction, n_components) if self.prior else 0.0)

    def fit(self, problem: Problem) -> Fit:
        """Measure and solve.

        Returns:
            Weights and bias; no standard errors.

        Raises:
            CoarError: the masks do not fit into memory.
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        n_components = len(problem.components)
        if self.n_masks * n_components > _MASK_MEMORY:
            raise CoarError(
                f"{self.n_masks} masks × {n_components} components need {self.n_masks * n_components / 2**30:.0f} GiB "
                f"while solving, more than {_MASK_MEMORY / 2**30:.0f}; use fewer masks or hf_coar.PathGradient()"
            )
        prior = None if self.prior is None else self.prior.fit(problem)
        masks = Masks(n_components, problem.ablated_fraction, self.n_masks, problem.seed, MASKS)
        outputs, identity = measure(
            problem.store, problem.model, problem.data, problem.components, problem.output, masks,
            progress=problem.progress,
        )  # fmt: skip
        rows = torch.cat([masks.rows(i, min(i + 1024, masks.count)) for i in range(0, masks.count, 1024)])
        weights, bias = solve(self.solver, rows, outputs, prior.weights if prior else None)
        return Fit(weights, bias, None, identity)


def solve(solver: Solver, masks: Tensor, outputs: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve on the accelerator where there is one and the problem fits into its memory; results on the CPU.

    Args:
        solver: the solver.
        masks: bool [masks, components].
        outputs: float [masks, examples].
        prior: float [examples, components], or None.

    Returns:
        weights float32 [examples, components], bias float32 [examples].
    """
    arguments = (masks, outputs) if prior is None else (masks, outputs, prior)
    device = workers.processes().device
    if device.type in ("cuda", "xpu"):  # others have no float64
        try:
            weights, bias = solver.fit(*(argument.to(device) for argument in arguments))
            return weights.cpu(), bias.cpu()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("the regression does not fit into the memory of %s; solving on the CPU", device)
        torch.accelerator.empty_cache()
    weights, bias = solver.fit(*arguments)
    return weights, bias
