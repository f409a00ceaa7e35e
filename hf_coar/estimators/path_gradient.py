"""PathGradient: attributions as gradients averaged along random gate paths, for a hundredth of the regression's passes.

Every component i has a gate g_i that multiplies its ablated slice. Because the integral of ∂y/∂g_i over g_i from 0 to 1
is y(i in place) - y(i ablated), the mean gradient at uniformly drawn g_i, with a fraction of the *other* components
ablated in the background, is what the regression on random masks estimates. One backward pass reads the gradients of a
whole block of components at once; its cost does not depend on how many there are. The others of the block are then the
background: gates that are half open instead of half as many closed ones. That is near the definition, and not the same;
on twelve heads whose every mask was measured, endless rounds stay 7 % of the norm away from it at 5 %.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.attributions.far import Far
from hf_coar.attributions.forecast import Forecast
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.estimators import checking, far_reads, flips
from hf_coar.estimators.gates import GateRounds, Reads, Sums, n_blocks
from hf_coar.estimators.outliers import Outliers, find, into
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD, Estimator, is_whole, register, single_part
from hf_coar.estimators.shrinkage import BLOCK, shrink
from hf_coar.models.calling import sent
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import parts_of
from hf_coar.runs.problem import Estimates, Fit, Problem, Size
from hf_coar.runs.workers import where_it_fits

logger = logging.getLogger(__name__)

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
            0: a single pass, all gates at one minus the ablated fraction, for a cost of 3 and no standard errors; one
            more gives the unablated output, from which all predictions start.
            "auto": every example gets rounds until its reliability is reached, or `max_rounds`.
        passes: so many forward and backward passes in the place of rounds, for a cost of 3 each: a single pass, and
            from the second on random contexts, in which every component is ablated with the fraction's chance and all
            are read. They converge to what the regression estimates; rounds are a little better where they are
            affordable. None for rounds.
        delta: read exact differences through each component's own nonlinearity, not derivatives, see `delta_reads`.
        smooth: average slopes over a window around where a pass finds them, narrower from round to round, see
            `delta_reads`; needs `delta`.
        shrink: pull noisy reads towards steady ones, see `shrinkage`; without it the weights are plain means over the
            rounds, with the standard errors of those.
        far_reads: read the strongest components again on the way to half a model, see `far_reads`, so that forecasts of
            strong and of large sets are better; some ten forward passes, where there are rounds and `check_masks`.
        across_examples: let examples tell about each other where reads are shrunk, which is better; but then an
            example's weights depend on its company. Without it they are the same whoever is attributed with it.
        max_outliers: components of an example that are set apart at most, see `outliers`; 0 for none. They cost a
            forward pass each, and looking for them one; `cost` leaves these out, the attributions' `config["cost"]`
            counts them.
        n_flips: components, the strongest over all examples, whose single effects are measured, a forward pass each and
            one, see `flips`; 0 for none, None for the root of their number (none without rounds, or without
            `across_examples`).
        check_masks: forward passes an example under fresh sets of components, which judge the result and give forecasts
            their intervals, see `checking`; 0 for none, None for 20 (none where there are no flips by default).
        reliability: for "auto": the split-half reliability of an example's plain means over the rounds (before they
            are shrunk) at which it has enough rounds; between 0 and 1.
        max_rounds: for "auto": an even number.
    """

    rounds: int | str = 4
    delta: bool = True
    smooth: bool = True
    shrink: bool = True
    across_examples: bool = True
    max_outliers: int = 16
    n_flips: int | None = None
    check_masks: int | None = None
    reliability: float = 0.8
    max_rounds: int = 32
    passes: int | None = None
    far_reads: bool = True
    differentiates = True
    sizable = True
    better = (
        "more rounds, a smaller ablated_fraction, hf_coar.Regression(prior=…), or for few components "
        "hf_coar.baselines.LeaveOneOut()"
    )

    def __post_init__(self) -> None:
        """Check the rounds."""
        if self.rounds != "auto" and not _is_even(self.rounds, 0):
            raise CoarError(f"PathGradient(rounds={self.rounds!r}): must be an even number, 0 or more, or 'auto'")
        if self.passes is not None and not is_whole(self.passes, 1):
            raise CoarError(f"PathGradient(passes={self.passes!r}): must be None, or a whole number from 1 on")
        if not is_whole(self.max_outliers, 0):
            raise CoarError(f"PathGradient(max_outliers={self.max_outliers!r}): must be a whole number, 0 or more")
        if self.n_flips is not None and not is_whole(self.n_flips, 0):
            raise CoarError(f"PathGradient(n_flips={self.n_flips!r}): must be None, or a whole number, 0 or more")
        fewest = checking.FEWEST_CHECKS
        if self.check_masks not in (None, 0) and not is_whole(self.check_masks, fewest):
            raise CoarError(
                f"PathGradient(check_masks={self.check_masks!r}): must be None, 0, or a whole number from {fewest} on"
            )
        if not _is_even(self.max_rounds, 2):
            raise CoarError(f"PathGradient(max_rounds={self.max_rounds!r}): must be an even number, at least 2")
        if not isinstance(self.reliability, int | float) or not 0 < self.reliability < 1:
            raise CoarError(f"PathGradient(reliability={self.reliability!r}): must lie between 0 and 1, such as 0.8")

    def settings(self) -> dict:
        """What determines the numbers, as JSON values; what only rules `rounds="auto"` is left out of other runs."""
        found = super().settings()
        idle = () if self.rounds == "auto" and self.passes is None else ("reliability", "max_rounds")
        idle += ("passes",) if self.passes is None else ("rounds",)
        idle += ("across_examples",) if self.across_examples else ()
        return {name: value for name, value in found.items() if name not in idle}

    def parts(self, size: Size) -> list[Part]:
        """All rounds on a batch are one part, and there are the checks; the most of it, where rounds vary."""
        cost = FORWARD_AND_BACKWARD * (self.passes or max(self._most_rounds * n_blocks(size.ablated_fraction), 1))
        n_numbers = (_NUMBERS if self._most_rounds or self.passes else 2) * size.n_components
        flipped, checks = self._flipped(size.n_components), self._checks
        is_judged = self._is_judged(size.n_components)
        kind = "rounds" if is_judged else "anchored"  # which also hold the unablated outputs
        rounds = single_part(kind, cost, n_numbers, True, stop=self.passes or max(self._most_rounds, 1))
        sets_apart = self.max_outliers and (self._most_rounds or self.passes)
        besides = 1 + self.max_outliers if sets_apart else int(not is_judged)
        rounds = [replace(one, besides=besides) for one in rounds]
        known = parts_of(flipped + 1, "flips") if is_judged else []
        far = far_reads.parts(size, bool(self.max_outliers)) if self._reads_far(size) else []
        return rounds + known + far + checking.check_parts(checks)

    def _reads_far(self, size: Size) -> bool:
        """Whether effects far from the whole model are read, which fresh sets must judge."""
        return self.far_reads and self._most_rounds > 0 and self._checks > 0 and far_reads.is_far(size.ablated_fraction)

    def _is_judged(self, n_components: int) -> bool:
        """Whether the model runs again once there are weights, which tells the unablated outputs as well."""
        return bool(self._flipped(n_components) or self._checks)

    def _flipped(self, n_components: int) -> int:
        if self.n_flips is not None:
            return min(self.n_flips, n_components)
        return flips.default_number(n_components) if self._judged_by_default else 0

    @property
    def _checks(self) -> int:
        if self.check_masks is not None:
            return self.check_masks
        return checking.DEFAULT_CHECKS if self._judged_by_default else 0

    @property
    def _judged_by_default(self) -> bool:
        """Flips are chosen by all examples and checks set one scale; both are dear beside a few passes."""
        return self._most_rounds > 0 and self.across_examples

    def bare(self) -> "PathGradient":
        """Without flips and checks, unless their numbers are given."""
        return replace(self, n_flips=self.n_flips or 0, check_masks=self.check_masks or 0)

    def sized(self, passes: float, size: Size) -> "PathGradient":
        """With an even number of rounds; where two are too dear even without flips and checks, with single passes."""
        for affordable in (self, self.bare()):
            if self.passes is None and replace(affordable, rounds=2).cost(size) <= passes:
                return affordable.largest("rounds", 2, 2, passes, size)
        return self.largest("passes", 1, 1, passes, size)

    def fit(self, problem: Problem) -> Fit:
        """Estimate the attributions.

        Returns:
            Weights, bias and standard errors (over the rounds) of every example.

        Raises:
            ModelError: no gradient reaches the gates.
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        gates = self.gates(problem)
        part = self.parts(problem.size)[0]

        def read(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            reader = BatchReader(self, gates, batch, first)
            if self.passes is not None:
                reads = reader.contexts()
            else:
                reads = reader.all_rounds() if self._most_rounds else reader.single()
            return reads if self._is_judged(gates.n_components) else reads | {"unablated": reader.unablated()}

        def estimate(reads: dict[str, Tensor]) -> dict[str, Tensor]:
            weights, errors = self.estimate(reads, problem.components.sizes())
            bias = reads["output"] - (weights * reads["gates"]).sum(1)
            spent = torch.full_like(bias, self.spent(reads, 1 if self.passes else gates.blocks))
            found = {"weights": weights, "bias": bias, "spent": spent}
            found |= {"unablated": reads["unablated"]} if "unablated" in reads else {}
            return found if errors is None else {**found, "standard_errors": errors}

        # Blocks of examples are estimated one by one: all reads together take three times what comes out of them.
        found = problem.reduce(part, read, "gate paths", BLOCK, estimate)
        spent = round(float(found["spent"].mean()), 1)
        fit = Fit(found["weights"], found["bias"], found.get("standard_errors"), spent)
        if self._is_judged(gates.n_components):
            return self._forecast(problem, gates, fit)
        return replace(fit, forecast=Forecast.of_unablated(found["unablated"]))

    def _forecast(self, problem: Problem, gates: GateRounds, fit: Fit) -> Fit:
        """The fit with single effects and, if it is to be checked, an interval."""
        flipped = self._flipped(len(problem.components))
        estimates = Estimates(fit.weights, fit.standard_errors)
        known = flips.flip(problem, flips.strongest(fit.weights, fit.standard_errors, flipped))
        if flipped and fit.standard_errors is not None:
            estimates = flips.steadied(estimates, known)
            # Gates are one minus the fraction on average.
            moved = (estimates.of(known.indices).weights - fit.weights[:, known.indices]).sum(1)
            fit = replace(fit, bias=fit.bias - (1 - problem.ablated_fraction) * moved)
        forecast = Forecast(known.unablated, known.indices, known.effects, known.ratio(estimates))
        spent = flipped + 1 + self._checks
        if self._reads_far(problem.size):
            forecast = replace(forecast, far=self._far(problem, gates, estimates))
            spent += far_reads.cost(bool(self.max_outliers))
        fit = replace(fit, cost=fit.cost + spent, forecast=forecast)
        if self._checks:
            fit, estimates = checking.checked(problem, fit, estimates, self._checks)
        return replace(fit, **problem.settled(estimates))

    def _far(self, problem: Problem, gates: GateRounds, estimates: Estimates) -> Far | None:
        """What is read far from the whole model; None where there are no finite outputs, which no weight depends on."""
        try:
            return far_reads.read(problem, gates, estimates, self.max_outliers)
        except NonFiniteOutputError as error:
            logger.warning("strong sets are forecast by the weights alone, as nothing is read far away: %s", error)
            return None

    def gates(self, problem: Problem) -> GateRounds:
        """The rounds of a problem."""
        return GateRounds(
            problem.masked, problem.output, problem.ablated_fraction, problem.seed, self.delta, self.smooth
        )

    @staticmethod
    def spent(reads: Mapping[str, Tensor], blocks: int) -> float:
        """Forward passes that the reads of an example took on average."""
        rounds = float(reads["rounds"].mean()) if "rounds" in reads else 1 / blocks
        passes = FORWARD_AND_BACKWARD * blocks * rounds
        if "outliers" in reads:
            return passes + 1 + float((reads["outliers"] >= 0).sum(1).float().mean())
        return passes + ("unablated" in reads)  # looking for outliers tells it as well

    @property
    def _most_rounds(self) -> int:
        if self.passes is not None:
            return 0
        return self.max_rounds if self.rounds == "auto" else self.rounds

    def estimate(self, reads: Mapping[str, Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weights and standard errors, float32 [examples, components], from what was read of the examples.

        Args:
            reads: `gates.Sums.means` with the fields of `Outliers` as `outliers` and `effects` if there are any,
                or what a single pass read as `soft`.
            sizes: components of every layer, in order.
        """
        if "variance" not in reads:  # a single pass, or one and one context
            return (reads["soft"] + reads["hard"]) / 2 if "hard" in reads else reads["soft"], None
        if self.shrink:
            block, noisy = BLOCK if self.across_examples else 1, [reads[name] for name in ("soft", "hard", "variance")]

            def shrunk(device: torch.device) -> list[Tensor]:
                return [found.cpu() for found in shrink(*(sent(part, device) for part in noisy), sizes, block)]

            weights, errors = where_it_fits(shrunk, "shrinking the reads")
        else:
            weights, errors = reads["soft"].clone(), reads["variance"].sqrt()
        if "outliers" in reads:
            into(weights, errors, reads["outliers"], reads["effects"])
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
        self._unchecked: list[tuple[Tensor, int, int]] = []  # outputs of rounds, see `GateRounds.check_finite`
        gates.passes.begin_batch()

    @torch.no_grad()
    def unablated(self) -> Tensor:
        """Outputs with everything in place, float32 [examples], by a forward pass if nothing has told them yet."""
        if self.outliers is not None:
            return self.outliers.unablated
        return self.gates.output.of(self.gates.passes.masked.model, self.batch)

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
                self._check_finite()
                enough = (self.sums.reliability() >= self.method.reliability).tolist()
                self._rows = [row for row in self._rows if not enough[row]]
        return self.means()

    def contexts(self) -> dict[str, Tensor]:
        """A single pass, and as many random contexts as the method wants; the single one serves as the hard read."""
        single, count = self.single(), self.method.passes - 1
        if count < 1:
            return single
        for _ in range(count):
            self.next_round(self.gates.context)
        found = self.means()
        return found | {"hard": single["soft"], "rounds": found["rounds"] + 1}

    def next_round(self, read: "Callable[..., Reads] | None" = None) -> None:
        """One more round of the examples that have not enough yet, or of what else is read."""
        count, n_components = data_module.size(self.batch), self.gates.n_components
        if self.sums is None:
            self.sums = Sums(count, n_components, data_module.device_of(self.batch))
            if self.method.max_outliers:
                self.outliers = find(self.gates.passes, self.batch, self.method.max_outliers)
        rows, some = self._rows, self.batch
        apart = None if self.outliers is None else self.outliers.mask(n_components)
        if len(rows) < count:
            some = data_module.take(self.batch, rows)
            apart = None if apart is None else apart[rows]
        read = read or self.gates.round
        examples = [self.first + row for row in rows]
        reads = read(some, examples, self.rounds, apart)
        self.sums.add(rows, reads)
        self._unchecked.append((reads.outputs, examples[0], self.rounds))
        self.rounds += 1

    def means(self) -> dict[str, Tensor]:
        """What the rounds so far tell, see `gates.Sums.means`; with `outliers` and `effects` if they are set apart."""
        self._check_finite()
        found = self.sums.means()
        if self.outliers is None:
            return found
        return found | {"outliers": self.outliers.indices, "effects": self.outliers.effects}

    def _check_finite(self) -> None:
        while self._unchecked:
            self.gates.check_finite(*self._unchecked.pop(0))


def _is_even(value: object, least: int) -> bool:
    return is_whole(value, least) and value % 2 == 0
