"""Regression: the paper's estimator. Outputs under random masks, regressed on the masks (Shah, Ilyas, Mądry 2024)."""

from dataclasses import asdict, dataclass, field

import torch

from hf_coar.errors import CoarError
from hf_coar.fit import Fit, Problem
from hf_coar.measurement import measure
from hf_coar.sampling import MASKS, Masks
from hf_coar.solvers import Ridge, Solver

_MASK_MEMORY = 2**34  # bytes of masks that are held while solving


@dataclass(frozen=True)
class Regression:
    """Regresses the outputs under random masks on the masks; an estimator for `attribute(method=…)`.

    Attributes:
        n_masks: how many masks, the same for all examples; the cost is one forward pass a mask and example. The paper
            takes 2 to 20 times as many masks as there are components.
        solver: fits the weights of all examples at once.
    """

    n_masks: int = 5000
    solver: Solver = field(default_factory=Ridge)
    name = "regression"

    def __post_init__(self) -> None:
        """Check the number of masks."""
        if not isinstance(self.n_masks, int) or self.n_masks < 3:
            raise CoarError(f"Regression(n_masks={self.n_masks!r}): must be a whole number, at least 3")

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        solver = {"name": type(self.solver).__name__, **asdict(self.solver)}
        return {"name": self.name, "n_masks": self.n_masks, "solver": solver}

    def cost(self, ablated_fraction: float) -> float:
        """Forward passes an example: one a mask."""
        return float(self.n_masks)

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
        masks = Masks(n_components, problem.ablated_fraction, self.n_masks, problem.seed, MASKS)
        outputs, identity = measure(
            problem.store, problem.model, problem.data, problem.components, problem.output, masks,
            progress=problem.progress,
        )  # fmt: skip
        rows = torch.cat([masks.rows(i, min(i + 1024, masks.count)) for i in range(0, masks.count, 1024)])
        weights, bias = self.solver.fit(rows, outputs)
        return Fit(weights, bias, None, identity)
