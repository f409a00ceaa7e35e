"""PathGradient: attributions as gradients averaged along random gate paths, for a hundredth of the regression's passes.

Every component i has a gate g_i that multiplies its ablated slice. Because the integral of ∂y/∂g_i over g_i from 0 to 1
is y(i in place) - y(i ablated), the mean gradient at uniformly drawn g_i, with a fraction of the *other* components
ablated in the background, is what the regression on random masks estimates. One backward pass reads the gradients of a
whole block of components at once; its cost does not depend on how many there are.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hf_coar import data as data_module
from hf_coar.errors import CoarError
from hf_coar.estimators.gate_passes import FORWARD_AND_BACKWARD
from hf_coar.estimators.gate_rounds import GateRounds, Sums, n_blocks
from hf_coar.estimators.outliers import Outliers, find
from hf_coar.estimators.shrinkage import shrink
from hf_coar.runs.engine import Part, run
from hf_coar.runs.measuring import measure
from hf_coar.runs.problem import Fit, Problem
from hf_coar.runs.sampling import CHECKS, Masks

logger = logging.getLogger(__name__)

_FEWEST_CHECKS = 8
_LOW = 0.5  # correlation below which attributions predict too little to be used as they are


@dataclass(frozen=True)
class PathGradient:
    """Averages gradients along random gate paths; an estimator for `attribute(method=…)`.

    One round is B passes. The components are split at random into B blocks, anew for every example; in pass b the gates
    of block b are drawn uniformly (the next round uses one minus the draw) and read, the others are 1. With
    B = 1 / (2 × ablated_fraction), the ablated fraction is switched off on average in every pass. Above a fraction of
    10 %, B = 1 / ablated_fraction, and the other components are switched off outright with the probability that makes
    up the rest.

    Attributes:
        rounds: an even number; noise falls as 1 / sqrt(rounds). The cost is 3 × B forward passes an example and round.
            0: a single pass, all gates at one minus the ablated fraction, for a cost of 3 and no standard errors.
            "auto": every example gets rounds until its reliability is reached, or `max_rounds`.
        delta: read exact differences through each component's own nonlinearity, not derivatives, see `delta_reads`.
        smooth: average slopes over a window around where a pass finds them, narrower from round to round, see
            `delta_reads`; needs `delta`.
        shrink: pull noisy reads towards steady ones, see `shrinkage`; without it the weights are plain means over the
            rounds, with the standard errors of those.
        max_outliers: components of an example that are set apart at most, see `outliers`; 0 for none. They cost a
            forward pass each, and looking for them one; `cost` leaves these out, the attributions' `config["cost"]`
            counts them.
        check_masks: fresh masked forward passes an example that judge the result: one factor for all weights makes the
            scale of the predictions right, and the correlation goes into the attributions' `config["checked"]`, with a
            warning where it is low. 0 for none; 32 are enough.
        reliability: for "auto": the split-half reliability of an example's plain means over the rounds (before they
            are shrunk) at which it has enough rounds; between 0 and 1.
        max_rounds: for "auto": an even number.
    """

    rounds: int | str = 4
    delta: bool = True
    smooth: bool = True
    shrink: bool = True
    max_outliers: int = 16
    check_masks: int = 0
    reliability: float = 0.8
    max_rounds: int = 32
    name = "path_gradient"

    def __post_init__(self) -> None:
        """Check the rounds."""
        if self.rounds != "auto" and not _is_even(self.rounds, 0):
            raise CoarError(f"PathGradient(rounds={self.rounds!r}): must be an even number, 0 or more, or 'auto'")
        if not _is_whole(self.max_outliers) or self.max_outliers < 0:
            raise CoarError(f"PathGradient(max_outliers={self.max_outliers!r}): must be a whole number, 0 or more")
        if not _is_whole(self.check_masks) or 0 < self.check_masks < _FEWEST_CHECKS or self.check_masks < 0:
            raise CoarError(
                f"PathGradient(check_masks={self.check_masks!r}): must be 0, or a whole number from {_FEWEST_CHECKS} on"
            )
        if not _is_even(self.max_rounds, 2):
            raise CoarError(f"PathGradient(max_rounds={self.max_rounds!r}): must be an even number, at least 2")
        if not isinstance(self.reliability, int | float) or not 0 < self.reliability < 1:
            raise CoarError(f"PathGradient(reliability={self.reliability!r}): must lie between 0 and 1, such as 0.8")

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        found = {"name": self.name, "rounds": self.rounds, "delta": self.delta, "smooth": self.smooth}
        found |= {"shrink": self.shrink, "max_outliers": self.max_outliers, "check_masks": self.check_masks}
        if self.rounds == "auto":
            found |= {"reliability": self.reliability, "max_rounds": self.max_rounds}
        return found

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example, counting a forward and backward pass as three; the most, where rounds vary."""
        return FORWARD_AND_BACKWARD * max(self._most_rounds * n_blocks(ablated_fraction), 1) + self.check_masks

    def fit(self, problem: Problem) -> Fit:
        """Estimate the attributions.

        Returns:
            Weights, bias and standard errors (over the rounds) of every example.

        Raises:
            ModelError: no gradient reaches the gates.
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        rounds = GateRounds(
            problem.model, problem.components, problem.output, problem.ablated_fraction, problem.seed, self.delta,
            self.smooth,
        )  # fmt: skip
        part = Part("rounds", 0, max(self._most_rounds, 1), self.cost(problem.ablated_fraction))

        def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            return self._read(rounds, batch, first)

        count = run(problem.store, problem.model, problem.data, [part], compute, "gate paths", problem.progress)
        reads = problem.store.gather(part.name, count)
        weights, errors = self.estimate(reads, problem.components.sizes())
        bias = reads["output"] - (weights * reads["gates"]).sum(1)
        fit = Fit(weights, bias, errors, data_module.Identity.of(reads), self._spent(reads, rounds.blocks))
        return self._checked(fit, problem) if self.check_masks else fit

    def _checked(self, fit: Fit, problem: Problem) -> Fit:
        """Scaled by what fresh masks show, and judged by them."""
        masks = Masks(len(problem.components), problem.ablated_fraction, self.check_masks, problem.seed, CHECKS)
        measured, _ = measure(
            problem.store, problem.model, problem.data, problem.components, problem.output, masks, kind="checks",
            progress=problem.progress,
        )  # fmt: skip
        predicted = masks.rows(0, masks.count).float() @ fit.weights.T
        p, m = predicted - predicted.mean(0), measured - measured.mean(0)
        scale = float((p * m).sum() / p.square().sum().clamp_min(1e-30))
        scales = p.square().sum(0) * m.square().sum(0)
        correlation = float(((p * m).sum(0) / scales.sqrt())[scales > 0].mean())
        if not correlation > _LOW:
            logger.warning(
                "the attributions predict %d fresh masks with a correlation of %.2f only; more rounds, a smaller "
                "ablated_fraction, or hf_coar.Regression(prior=%r) may do better",
                masks.count, correlation, replace(self, check_masks=0),
            )  # fmt: skip
        scale = scale if scale > 0 else 1.0
        return replace(
            fit,
            weights=fit.weights * scale,
            bias=(measured - scale * predicted).mean(0),
            standard_errors=None if fit.standard_errors is None else fit.standard_errors * scale,
            checked={"n_masks": masks.count, "correlation": correlation, "scale": scale},
        )

    def _spent(self, reads: Mapping[str, Tensor], blocks: int) -> float:
        """Forward passes that an example took on average, to a tenth."""
        if self.rounds == 0:
            return FORWARD_AND_BACKWARD + self.check_masks
        passes = FORWARD_AND_BACKWARD * blocks * float(reads["rounds"].mean()) + self.check_masks
        if "outliers" in reads:
            passes += 1 + float((reads["outliers"] >= 0).sum(1).float().mean())
        return round(passes, 1)

    @property
    def _most_rounds(self) -> int:
        return self.max_rounds if self.rounds == "auto" else self.rounds

    def _read(self, rounds: GateRounds, batch: data_module.Batch, first: int) -> dict[str, Tensor]:
        """All rounds on one batch, whose first example has this number."""
        count = data_module.size(batch)
        rounds.begin_batch()
        if self.rounds == 0:
            single = rounds.single(batch, range(first, first + count))
            return {"soft": single.soft, "gates": single.gates, "output": single.output}
        sums = Sums(count, len(rounds.components), next(iter(batch.values())).device)
        outliers = find(rounds.passes, batch, self.max_outliers) if self.max_outliers else None
        apart = None if outliers is None else outliers.mask(len(rounds.components))
        rows = list(range(count))
        for index in range(self._most_rounds):
            some = batch if len(rows) == count else {name: value[rows] for name, value in batch.items()}
            sums.add(
                rows, rounds.round(some, [first + row for row in rows], index, None if apart is None else apart[rows])
            )
            if self.rounds == "auto" and index % 2:
                enough = (sums.reliability() >= self.reliability).tolist()
                rows = [row for row in rows if not enough[row]]
                if not rows:
                    break
        found = sums.means()
        return found if outliers is None else found | {"outliers": outliers.indices, "effects": outliers.effects}

    def estimate(self, reads: Mapping[str, Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weights and standard errors, float32 [examples, components], from what was read of the examples.

        Args:
            reads: `gate_rounds.Sums.means` with the fields of `Outliers` as `outliers` and `effects` if there are any,
                or what a single pass read as `soft`.
            sizes: components of every layer, in order.
        """
        if "variance" not in reads:
            return reads["soft"], None
        if self.shrink:
            weights, errors = shrink(reads["soft"], reads["hard"], reads["variance"], sizes)
        else:
            weights, errors = reads["soft"].clone(), reads["variance"].sqrt()
        if "outliers" in reads:
            Outliers(reads["outliers"], reads["effects"]).into(weights, errors)
        return weights, errors


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_even(value: object, least: int) -> bool:
    return _is_whole(value) and value >= least and value % 2 == 0
