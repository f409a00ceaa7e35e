"""PathGradient: attributions as gradients averaged along random gate paths, for a hundredth of the regression's passes.

Every component i has a gate g_i that multiplies its ablated slice. Because the integral of ∂y/∂g_i over g_i from 0 to 1
is y(i in place) - y(i ablated), the mean gradient at uniformly drawn g_i, with a fraction of the *other* components
ablated in the background, is what the regression on random masks estimates. One backward pass reads the gradients of a
whole block of components at once; its cost does not depend on how many there are.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.errors import CoarError
from hf_coar.estimators.gates import GateRounds, Sums, n_blocks
from hf_coar.estimators.outliers import Outliers, find
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD, Estimator, is_whole, register, single_part
from hf_coar.estimators.shrinkage import BLOCK, shrink
from hf_coar.runs.engine import Part
from hf_coar.runs.fidelity import correlation, slope
from hf_coar.runs.measuring import parts_of
from hf_coar.runs.problem import Fit, Problem, Size
from hf_coar.runs.sampling import CHECKS, Masks

logger = logging.getLogger(__name__)

_FEWEST_CHECKS = 8
_LOW = 0.5  # correlation below which attributions predict too little to be used as they are
_NUMBERS = 4  # written for every component and example: soft, hard, gates and variance


@register("path_gradient")
@dataclass(frozen=True)
class PathGradient(Estimator):
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
    differentiates = True
    sizable = True

    def __post_init__(self) -> None:
        """Check the rounds."""
        if self.rounds != "auto" and not _is_even(self.rounds, 0):
            raise CoarError(f"PathGradient(rounds={self.rounds!r}): must be an even number, 0 or more, or 'auto'")
        if not is_whole(self.max_outliers, 0):
            raise CoarError(f"PathGradient(max_outliers={self.max_outliers!r}): must be a whole number, 0 or more")
        if not is_whole(self.check_masks, 0) or 0 < self.check_masks < _FEWEST_CHECKS:
            raise CoarError(
                f"PathGradient(check_masks={self.check_masks!r}): must be 0, or a whole number from {_FEWEST_CHECKS} on"
            )
        if not _is_even(self.max_rounds, 2):
            raise CoarError(f"PathGradient(max_rounds={self.max_rounds!r}): must be an even number, at least 2")
        if not isinstance(self.reliability, int | float) or not 0 < self.reliability < 1:
            raise CoarError(f"PathGradient(reliability={self.reliability!r}): must lie between 0 and 1, such as 0.8")

    def settings(self) -> dict:
        """What determines the numbers, as JSON values; what only rules `rounds="auto"` is left out of other runs."""
        found = super().settings()
        idle = () if self.rounds == "auto" else ("reliability", "max_rounds")
        return {name: value for name, value in found.items() if name not in idle}

    def parts(self, size: Size) -> list[Part]:
        """All rounds on a batch are one part, and there are the checks; the most of it, where rounds vary."""
        cost = FORWARD_AND_BACKWARD * max(self._most_rounds * n_blocks(size.ablated_fraction), 1)
        n_numbers = (_NUMBERS if self._most_rounds else 2) * size.n_components
        rounds = single_part("rounds", cost, n_numbers, True, stop=max(self._most_rounds, 1))
        return rounds + parts_of(self.check_masks, "checks")

    def sized(self, passes: float, size: Size) -> "PathGradient":
        """With an even number of rounds, or one single pass where two rounds are too dear."""
        if replace(self, rounds=2).cost(size) > passes:
            single = replace(self, rounds=0)
            single.check_affordable(passes, size)
            return single
        return self.largest("rounds", 2, 2, passes, size)

    def fit(self, problem: Problem) -> Fit:
        """Estimate the attributions.

        Returns:
            Weights, bias and standard errors (over the rounds) of every example.

        Raises:
            ModelError: no gradient reaches the gates.
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        gates = self.gates(problem)
        (part,) = (part for part in self.parts(problem.size) if part.kind == "rounds")

        def read(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            reader = BatchReader(self, gates, batch, first)
            return reader.all_rounds() if self._most_rounds else reader.single()

        # Blocks of examples are estimated one by one: all reads together take three times what comes out of them.
        n_examples, blocks = problem.stream(part, read, "gate paths", BLOCK)
        shape = (n_examples, len(problem.components))
        weights, bias, errors, spent = torch.empty(shape), torch.empty(n_examples), None, 0.0
        for number, reads in enumerate(blocks):
            rows = slice(number * BLOCK, number * BLOCK + len(reads["output"]))
            weights[rows], some = self.estimate(reads, problem.components.sizes())
            bias[rows] = reads["output"] - (weights[rows] * reads["gates"]).sum(1)
            spent += self.spent(reads, gates.blocks) * len(reads["output"]) / n_examples
            if some is not None:
                errors = torch.empty(shape) if errors is None else errors
                errors[rows] = some
        fit = Fit(weights, bias, errors, round(spent, 1) + self.check_masks)
        return self._checked(fit, problem) if self.check_masks else fit

    def gates(self, problem: Problem) -> GateRounds:
        """The rounds of a problem."""
        return GateRounds(
            problem.masked, problem.output, problem.ablated_fraction, problem.seed, self.delta, self.smooth
        )

    def _checked(self, fit: Fit, problem: Problem) -> Fit:
        """Scaled by what fresh masks show, and judged by them."""
        masks = Masks(len(problem.components), problem.ablated_fraction, self.check_masks, problem.seed, CHECKS)
        measured = problem.measure(masks, "checks")
        predicted = masks.rows(0, masks.count).float() @ fit.weights.T
        scale, agreement = slope(predicted, measured), float(correlation(predicted, measured).nanmean())
        if not agreement > _LOW:
            logger.warning(
                "the attributions predict %d fresh masks with a correlation of %.2f only; more rounds, a smaller "
                "ablated_fraction, or hf_coar.Regression(prior=%r) may do better",
                masks.count, agreement, replace(self, check_masks=0),
            )  # fmt: skip
        scale = scale if scale > 0 else 1.0
        return replace(
            fit,
            weights=fit.weights * scale,
            bias=(measured - scale * predicted).mean(0),
            standard_errors=None if fit.standard_errors is None else fit.standard_errors * scale,
            checked={"n_masks": masks.count, "correlation": agreement, "scale": scale},
        )

    @staticmethod
    def spent(reads: Mapping[str, Tensor], blocks: int) -> float:
        """Forward passes that the reads of an example took on average."""
        if "rounds" not in reads:
            return FORWARD_AND_BACKWARD
        passes = FORWARD_AND_BACKWARD * blocks * float(reads["rounds"].mean())
        if "outliers" in reads:
            passes += 1 + float((reads["outliers"] >= 0).sum(1).float().mean())
        return passes

    @property
    def _most_rounds(self) -> int:
        return self.max_rounds if self.rounds == "auto" else self.rounds

    def estimate(self, reads: Mapping[str, Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weights and standard errors, float32 [examples, components], from what was read of the examples.

        Args:
            reads: `gates.Sums.means` with the fields of `Outliers` as `outliers` and `effects` if there are any,
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


class BatchReader:
    """What is read of one batch, round by round."""

    def __init__(self, method: PathGradient, gates: GateRounds, batch: data_module.Batch, first: int) -> None:
        """Nothing was read yet; `first` is the number of the batch's first example."""
        self.method, self.gates, self.batch, self.first = method, gates, batch, first
        self.rounds = 0
        self.sums: Sums | None = None
        self.outliers: Outliers | None = None
        self._rows = list(range(data_module.size(batch)))
        gates.passes.begin_batch()

    def single(self) -> dict[str, Tensor]:
        """What one pass with all gates at one minus the fraction tells: `soft`, `gates`, `output`."""
        reads = self.gates.single(self.batch, range(self.first, self.first + len(self._rows)))
        return {"soft": reads.soft, "gates": reads.gates, "output": reads.output}

    def all_rounds(self) -> dict[str, Tensor]:
        """As many rounds as the method wants, or as every example needs."""
        wanted = self.method.max_rounds if self.method.rounds == "auto" else self.method.rounds
        while self.rounds < wanted and self._rows:
            self.next_round()
            if self.method.rounds == "auto" and self.rounds % 2 == 0:
                enough = (self.sums.reliability() >= self.method.reliability).tolist()
                self._rows = [row for row in self._rows if not enough[row]]
        return self.means()

    def next_round(self) -> None:
        """One more round of the examples that have not enough yet."""
        count, n_components = data_module.size(self.batch), self.gates.n_components
        if self.sums is None:
            self.sums = Sums(count, n_components, data_module.device_of(self.batch))
            if self.method.max_outliers:
                self.outliers = find(self.gates.passes, self.batch, self.method.max_outliers)
        rows, apart = self._rows, None if self.outliers is None else self.outliers.mask(n_components)[self._rows]
        whole = len(rows) == count
        some = self.batch if whole else data_module.take(self.batch, rows)
        self.sums.add(rows, self.gates.round(some, [self.first + row for row in rows], self.rounds, apart))
        self.rounds += 1

    def means(self) -> dict[str, Tensor]:
        """What the rounds so far tell, see `gates.Sums.means`; with `outliers` and `effects` if they are set apart."""
        found = self.sums.means()
        if self.outliers is None:
            return found
        return found | {"outliers": self.outliers.indices, "effects": self.outliers.effects}


def _is_even(value: object, least: int) -> bool:
    return is_whole(value, least) and value % 2 == 0
