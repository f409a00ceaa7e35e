"""PathGradient: attributions as gradients averaged along random gate paths, for a hundredth of the regression's passes.

Every component i has a gate g_i that multiplies its ablated slice. Because the integral of ∂y/∂g_i over g_i from 0 to 1
is y(i in place) - y(i ablated), the mean gradient at uniformly drawn g_i, with a fraction of the *other* components
ablated in the background, is what the regression on random masks estimates. One backward pass reads the gradients of a
whole block of components at once; its cost does not depend on how many there are.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar import masking, models, sampling
from hf_coar.delta_reads import DeltaReads, elementwise_modules, followed
from hf_coar.engine import Part, run
from hf_coar.errors import CoarError, ModelError
from hf_coar.fit import Fit, Problem
from hf_coar.measurement import check_finite
from hf_coar.shrinkage import shrink

FORWARD_AND_BACKWARD = 3.0  # cost of a forward and backward pass to the gates, in forward passes


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
        delta: read exact differences through each component's own nonlinearity, see `delta_reads`, not derivatives.
        shrink: pull noisy reads towards steady ones, see `shrinkage`; without it the weights are plain means over the
            rounds, with the standard errors of those.
    """

    rounds: int = 4
    delta: bool = True
    shrink: bool = True
    name = "path_gradient"

    def __post_init__(self) -> None:
        """Check the rounds."""
        if not isinstance(self.rounds, int) or self.rounds < 2 or self.rounds % 2:
            raise CoarError(f"PathGradient(rounds={self.rounds!r}): must be an even number, at least 2")

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        return {"name": self.name, "rounds": self.rounds, "delta": self.delta, "shrink": self.shrink}

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example, counting a forward and backward pass as three."""
        return FORWARD_AND_BACKWARD * self.rounds * n_blocks(ablated_fraction)

    def fit(self, problem: Problem) -> Fit:
        """Estimate the attributions.

        Returns:
            Weights, bias and standard errors (over the rounds) of every example.

        Raises:
            ModelError: no gradient reaches the gates.
            NonFiniteOutputError: the model gave NaN or infinity.
        """
        blocks = n_blocks(problem.ablated_fraction)
        passes = _Paths(self.rounds, blocks, self.delta, problem)
        part = Part("rounds", 0, self.rounds, self.cost(problem.ablated_fraction))
        n_examples = run(
            problem.store, problem.model, problem.data, [part], passes.compute, "gate paths", problem.progress
        )
        reads = problem.store.gather(part.name, n_examples)
        if self.shrink and self.rounds > 1:
            weights, errors = shrink(reads["soft"], reads["hard"], reads["variance"], problem.components.sizes())
        else:
            weights, errors = reads["soft"], reads["variance"].sqrt()
        bias = reads["output"] - (weights * reads.get("gates", passes.mean_gate)).sum(1)
        return Fit(weights, bias, errors, data_module.Identity.of(reads))


def n_blocks(ablated_fraction: float) -> int:
    """Blocks, and so passes, a round."""
    return max(1, round(1 / (2 * ablated_fraction))) if ablated_fraction <= 0.1 else math.ceil(1 / ablated_fraction)


class _Paths:
    """The passes of one run, over any batch."""

    def __init__(self, rounds: int, blocks: int, delta: bool, problem: Problem) -> None:
        self.rounds, self.blocks, self.delta, self.problem = rounds, blocks, delta, problem
        self.n_components = len(problem.components)
        self.sizes = problem.components.sizes()
        fraction, gated = problem.ablated_fraction, 1 / blocks
        # On average half of a gated block is off; what is missing to the fraction is switched off in the background.
        self.background = 0.0 if fraction <= 0.1 else max(0.0, (fraction - gated / 2) / (1 - gated))
        # A drawn level and its complement average to one half, so without a background this is exact.
        self.mean_gate = 1 - gated / 2
        self._activations = elementwise_modules(problem.model) if delta else []
        self._inert: set[str] = set()

    def compute(self, batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        """All rounds on one batch; only sums over the rounds are held."""
        n_examples = data_module.size(batch)
        self._inert = set()  # which modules run may depend on the examples
        device = next(iter(batch.values())).device
        total = torch.zeros(n_examples, self.n_components, device=device)
        total_squared, total_hard, total_gates = (torch.zeros_like(total) for _ in range(3))
        total_output = torch.zeros(n_examples, device=device)
        for round_index in range(part.start, part.stop):
            soft, hard, gates, outputs = self._round(batch, first, round_index)
            total += soft
            total_squared += soft.square()
            total_hard += hard
            total_gates += gates
            total_output += outputs
        n_rounds = part.stop - part.start
        soft = total / n_rounds
        variance = (total_squared / n_rounds - soft.square()).clamp_min(0) / (n_rounds - 1)
        results = {"soft": soft, "variance": variance, "hard": total_hard / n_rounds, "output": total_output / n_rounds}
        return results | ({"gates": total_gates / n_rounds} if self.background else {})

    def _round(self, batch: data_module.Batch, first: int, round_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Soft reads, hard reads and mean gates, all [examples, components], and mean outputs [examples] of a round."""
        device = next(iter(batch.values())).device
        levels, block = self._draw(first, data_module.size(batch), round_index)
        levels, block = levels.to(device), block.to(device)
        soft, hard, gates = (torch.zeros_like(levels) for _ in range(3))
        outputs = torch.zeros(levels.shape[0], device=device)
        for b in range(self.blocks):
            in_block = block == b
            others = self._others(first, levels, round_index, b)
            level = torch.where(in_block, levels, others)
            values, reads = self._pass(batch, level)
            check_finite(values, first, f"round {round_index}, pass {b}", self.problem.output)
            soft += reads * in_block
            hard += reads * ~in_block
            gates += level / self.blocks
            outputs += values / self.blocks
        return soft, hard / max(self.blocks - 1, 1), gates, outputs

    def _draw(self, first: int, n_examples: int, round_index: int) -> tuple[Tensor, Tensor]:
        """Gate levels float32 and block numbers int32, both [examples, components]."""
        seed, levels, blocks = self.problem.seed, [], []
        for example in range(first, first + n_examples):
            # Rounds 2k and 2k + 1 are antithetic: the same draw and its complement.
            draw = sampling.uniforms(seed, sampling.PATHS, example, 2 * (round_index // 2), self.n_components)
            levels.append(1 - draw if round_index % 2 else draw)
            blocks.append(
                sampling.balanced_split(
                    seed, sampling.PATHS, example, 2 * round_index + 1, self.n_components, self.blocks
                )
            )
        return torch.from_numpy(np.stack(levels)), torch.from_numpy(np.stack(blocks))

    def _others(self, first: int, levels: Tensor, round_index: int, b: int) -> Tensor:
        """Gates of the components outside the block: 1, or a random background of 0 and 1."""
        if not self.background:
            return torch.ones_like(levels)
        draw = [
            sampling.uniforms(
                self.problem.seed, sampling.BACKGROUND, example, round_index * self.blocks + b, self.n_components
            )
            for example in range(first, first + levels.shape[0])
        ]
        return (torch.from_numpy(np.stack(draw)).to(levels.device) >= self.background).to(levels.dtype)

    def _pass(self, batch: data_module.Batch, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [examples] and their gradients to the gates [examples, components] of one forward and backward."""
        problem = self.problem
        # One leaf a group: a slice of a single leaf would cost a full-sized gradient for every group.
        leaves = [part.contiguous().requires_grad_() for part in gates.split(self.sizes, dim=1)]
        reads = DeltaReads()
        with torch.enable_grad():
            with masking.gated(problem.model, problem.components, leaves) as fired, ExitStack() as stack:
                if self.delta:
                    stack.enter_context(followed(self._activations, fired, reads))
                values = problem.output(models.logits(problem.model, batch), batch)
            if not values.requires_grad:
                raise ModelError(
                    f"no gradient reaches the gates of {type(problem.model).__name__}: its forward blocks it (integer "
                    "kernels, no_grad or numpy inside); use method=hf_coar.Regression()"
                )
            derivatives = torch.autograd.grad(values.sum(), leaves, allow_unused=True, retain_graph=self.delta)
        self._check_reached({group.parameter for group in fired.missing()}, batch)
        corrections = reads.corrections(leaves)
        parts = [c if d is None else d + c for d, c in zip(derivatives, corrections, strict=True)]
        return values.detach(), torch.cat(parts, dim=1)

    def _check_reached(self, missing: set[str], batch: data_module.Batch) -> None:
        """Modules that do not run for a batch have no effect on it; weights read without their module are an error."""
        if missing <= self._inert:
            return
        model, components = self.problem.model, self.problem.components
        kept = torch.cat([torch.full((g.size,), g.parameter not in missing) for g in components.groups])
        with torch.no_grad():
            plain = models.logits(model, batch)
            with masking.ablate(model, components, kept, how="weights"):
                changed = models.logits(model, batch)
        if not torch.equal(plain, changed):
            raise ModelError(
                f"gates cannot reach {', '.join(sorted(missing)[:8])}: the model reads these weights without running "
                "their modules; exclude them, or use method=hf_coar.Regression()"
            )
        self._inert |= missing
