"""Regression: the paper's estimator. Outputs under random masks, regressed on the masks (Shah, Ilyas, Mądry 2024)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.estimators import solvers
from hf_coar.estimators.registry import Estimator, get, is_whole, register
from hf_coar.estimators.solvers import Ridge, Solver
from hf_coar.runs import workers
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import parts_of
from hf_coar.runs.problem import Fit, Problem, Size
from hf_coar.runs.sampling import MASKS, Masks

_MASK_MEMORY = 2**34  # bytes of masks that are held while solving


@register("regression")
@dataclass(frozen=True)
class Regression(Estimator):
    """Regresses the outputs under random masks on the masks; an estimator for `attribute(method=…)`.

    With a prior this is the hybrid: another method's attributions are made first, and only what they leave over is
    regressed. How much of the prior is taken is chosen for every example by leave-one-out error over the masks, from
    none on, so that a useless prior does no harm.

    Attributes:
        n_masks: how many masks, the same for all examples; the cost is one forward pass a mask and example, and the
            prior's. The paper takes 2 to 20 times as many masks as there are components.
        solver: fits the weights of all examples at once: `Ridge()`, `Lasso()`, `ARD()`, their names in small letters,
            or one of your own.
        prior: another estimator or its name, such as `PathGradient(rounds=4)`, or None.
    """

    n_masks: int = 5000
    solver: Solver | str = field(default_factory=Ridge)
    prior: Estimator | str | None = None
    sizable = True

    def __post_init__(self) -> None:
        """Check the number of masks, and that the solver takes a prior if there is one."""
        if not is_whole(self.n_masks, 3):
            raise CoarError(f"Regression(n_masks={self.n_masks!r}): must be a whole number, at least 3")
        object.__setattr__(self, "solver", solvers.get(self.solver))  # frozen for everybody else
        if self.prior is not None:
            object.__setattr__(self, "prior", get(self.prior))
            if not self.solver.takes_prior:
                raise CoarError(
                    f"Regression(prior={self.prior!r}): the solver {type(self.solver).__name__} takes no prior; use "
                    "hf_coar.Ridge() or hf_coar.ARD()"
                )

    @property
    def differentiates(self) -> bool:
        """Whether the prior does."""
        return self.prior is not None and self.prior.differentiates

    def settings(self) -> dict:
        """What determines the numbers, as JSON values."""
        prior = {} if self.prior is None else {"prior": self.prior.settings()}
        return {"name": self.name, "n_masks": self.n_masks, "solver": solvers.settings(self.solver), **prior}

    def parts(self, size: Size) -> list[Part]:
        """Those of the prior, and the masks.

        Raises:
            CoarError: the masks would not fit into memory while solving.
        """
        self._check_memory(size.n_components)
        of_prior = [] if self.prior is None else self.prior.bare().parts(size)
        return of_prior + parts_of(self.n_masks)

    def sized(self, passes: float, size: Size) -> "Regression":
        """With as many masks as the prior leaves over."""
        return self.largest("n_masks", 3, 1, passes, size)

    def fit(self, problem: Problem) -> Fit:
        """Measure and solve.

        Returns:
            Weights and bias; no standard errors.

        Raises:
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        prior = None if self.prior is None else self.prior.bare().fit(problem)
        masks = Masks(len(problem.components), problem.ablated_fraction, self.n_masks, problem.seed, MASKS)
        outputs = problem.measure(masks)
        rows = torch.cat([masks.rows(i, min(i + 1024, masks.count)) for i in range(0, masks.count, 1024)])
        return Fit(*solve(self.solver, rows, outputs, prior.weights if prior else None))

    def _check_memory(self, n_components: int) -> None:
        if self.n_masks * n_components > _MASK_MEMORY:
            raise CoarError(
                f"{self.n_masks} masks × {n_components} components need {self.n_masks * n_components / 2**30:.0f} GiB "
                f"while solving, more than {_MASK_MEMORY / 2**30:.0f}; use fewer masks or hf_coar.PathGradient()"
            )


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

    def fitted(device: torch.device) -> tuple[Tensor, Tensor]:
        weights, bias = solver.fit(*(argument.to(device) for argument in arguments))
        return weights.cpu(), bias.cpu()

    return workers.where_it_fits(fitted, "the regression")
