"""PathGradient: attributions as gradients averaged along random gate paths, for a hundredth of the regression's passes.

Every component i has a gate g_i that multiplies its ablated slice. Because the integral of ∂y/∂g_i over g_i from 0 to 1
is y(i in place) - y(i ablated), the mean gradient at uniformly drawn g_i, with a fraction of the *other* components
ablated in the background, is what the regression on random masks estimates. One backward pass reads the gradients of a
whole block of components at once; its cost does not depend on how many there are.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import masking, models, sampling
from hf_coar.components import Components
from hf_coar.engine import Part, run
from hf_coar.errors import CoarError, ModelError
from hf_coar.fit import Fit, Problem
from hf_coar.measurement import check_finite

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
    """

    rounds: int = 8
    name = "path_gradient"

    def __post_init__(self) -> None:
        """Check the rounds."""
        if not isinstance(self.rounds, int) or self.rounds < 2 or self.rounds % 2:
            raise CoarError(f"PathGradient(rounds={self.rounds!r}): must be an even number, at least 2")

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        return {"name": self.name, "rounds": self.rounds}

    def cost(self, ablated_fraction: float) -> float:
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
        paths = _Paths(self.rounds, n_blocks(problem.ablated_fraction), problem)
        part = Part("rounds", 0, self.rounds, self.cost(problem.ablated_fraction))
        n_examples = run(
            problem.store, problem.model, problem.data, [part], paths.compute, "gate paths", problem.progress
        )
        results = problem.store.gather(part.name, n_examples)
        return Fit(results["weights"], results["bias"], results["standard_errors"], data_module.Identity.of(results))


def n_blocks(ablated_fraction: float) -> int:
    """Blocks, and so passes, a round."""
    return max(1, round(1 / (2 * ablated_fraction))) if ablated_fraction <= 0.1 else math.ceil(1 / ablated_fraction)


class _Paths:
    """The passes of one run, over any batch."""

    def __init__(self, rounds: int, blocks: int, problem: Problem) -> None:
        self.rounds, self.blocks, self.problem = rounds, blocks, problem
        self.n_components = len(problem.components)
        self.sizes = problem.components.sizes()
        fraction, gated = problem.ablated_fraction, 1 / blocks
        # On average half of a gated block is off; what is missing to the fraction is switched off in the background.
        self.background = 0.0 if fraction <= 0.1 else max(0.0, (fraction - gated / 2) / (1 - gated))
        self._reachable: list[bool] | None = None

    def compute(self, batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        """All rounds on one batch: soft reads summed round by round, nothing else is stored."""
        n_examples = data_module.size(batch)
        if self._reachable is None:
            self._reachable = _reachable(self.problem.model, self.problem.components, batch)
        device = next(iter(batch.values())).device
        total = torch.zeros(n_examples, self.n_components, device=device)
        total_squared, total_output = torch.zeros_like(total), torch.zeros(n_examples, device=device)
        for round_index in range(part.start, part.stop):
            reads, outputs = self._round(batch, first, round_index)
            total += reads
            total_squared += reads.square()
            total_output += outputs
        n_rounds = part.stop - part.start
        weights = total / n_rounds
        variance = (total_squared / n_rounds - weights.square()).clamp_min(0) / (n_rounds - 1)
        bias = total_output / n_rounds - weights.sum(1) * (1 - self._mean_ablated())
        return {"weights": weights, "bias": bias, "standard_errors": variance.sqrt()}

    def _mean_ablated(self) -> float:
        """The fraction that is off on average in a pass; equals the run's fraction but for the rounding of B."""
        gated = 1 / self.blocks
        return gated / 2 + (1 - gated) * self.background

    def _round(self, batch: data_module.Batch, first: int, round_index: int) -> tuple[Tensor, Tensor]:
        """Reads [examples, components] and mean outputs [examples] of one round."""
        device = next(iter(batch.values())).device
        levels, block = self._draw(first, data_module.size(batch), round_index)
        levels, block = levels.to(device), block.to(device)
        reads, outputs = torch.zeros_like(levels), torch.zeros(levels.shape[0], device=device)
        for b in range(self.blocks):
            in_block = block == b
            others = self._others(first, levels, round_index, b)
            values, gradient = self._pass(batch, torch.where(in_block, levels, others))
            check_finite(values, first, f"round {round_index}, pass {b}", self.problem.output)
            reads += gradient * in_block
            outputs += values / self.blocks
        return reads, outputs

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
        leaves = [part.contiguous() for part in gates.split(self.sizes, dim=1)]
        for leaf, reachable in zip(leaves, self._reachable, strict=True):
            leaf.requires_grad_(reachable)
        gated = [leaf if leaf.requires_grad else torch.ones_like(leaf) for leaf in leaves]
        with torch.enable_grad(), masking.gated(problem.model, problem.components, gated):
            values = problem.output(models.logits(problem.model, batch), batch)
            if not values.requires_grad:
                raise ModelError(
                    f"no gradient reaches the gates of {type(problem.model).__name__}: its forward blocks it (integer "
                    "kernels, no_grad or numpy inside); use method=hf_coar.Regression()"
                )
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = iter(torch.autograd.grad(values.sum(), wanted, allow_unused=True))
        parts = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
        parts = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, parts, strict=True)]
        return values.detach(), torch.cat(parts, dim=1)


def _reachable(model: nn.Module, components: Components, batch: data_module.Batch) -> list[bool]:
    """Which groups' gates act. Modules that do not run at all have no effect; modules passed by are an error."""
    off = torch.zeros(len(components))
    with torch.no_grad(), masking.gated(model, components, off.split(components.sizes())) as fired:
        models.logits(model, batch)
    missing = {group.parameter for group in fired.missing()}
    if missing:
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
    return [group.parameter not in missing for group in components.groups]
