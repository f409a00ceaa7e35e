"""Gate rounds: passes in which every component is read once, and sums over the rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Components
from hf_coar.estimators.gate_passes import GatePasses
from hf_coar.models.outputs import Output
from hf_coar.runs import sampling
from hf_coar.runs.measuring import check_finite

# In standard deviations of what goes into a nonlinearity. Found on the demo's network, once and for all models.
_SMOOTHING, _SMOOTHING_OF_ONE_PASS = 0.6, 0.8


def n_blocks(ablated_fraction: float) -> int:
    """Blocks, and so passes, a round."""
    return max(1, round(1 / (2 * ablated_fraction))) if ablated_fraction <= 0.1 else math.ceil(1 / ablated_fraction)


@dataclass(frozen=True)
class Reads:
    """What a round, or a single pass, tells of some examples.

    Attributes:
        soft: float32 [examples, components], read while the component's gate was drawn between 0 and 1.
        hard: float32 [examples, components], mean of what was read while its gate was 1.
        gates: float32 [examples, components], the mean gate.
        output: float32 [examples], the mean output.
    """

    soft: Tensor
    hard: Tensor
    gates: Tensor
    output: Tensor


class GateRounds:
    """The rounds of one model, drawn as a pure function of seed, example and round."""

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        output: Output,
        ablated_fraction: float,
        seed: int,
        delta: bool = True,
        smooth: bool = True,
    ) -> None:
        """Prepare; the arguments are those of `attribute` and `PathGradient`."""
        self.components, self.output, self.fraction, self.seed = components, output, ablated_fraction, seed
        self.passes = GatePasses(model, components, output, delta)
        self.smooth = delta and smooth
        self.blocks = n_blocks(ablated_fraction)
        gated = 1 / self.blocks
        # On average half of a gated block is off; what is missing to the fraction is switched off in the background.
        self.background = 0.0 if ablated_fraction <= 0.1 else max(0.0, (ablated_fraction - gated / 2) / (1 - gated))

    def begin_batch(self) -> None:
        """Other examples come."""
        self.passes.begin_batch()

    def single(self, batch: data_module.Batch, examples: Sequence[int]) -> Reads:
        """One pass with all gates at one minus the fraction: no draw, and no noise but that of being one point."""
        level = 1 - self.fraction
        gates = torch.full((len(examples), len(self.components)), level, device=_device(batch))
        values, reads = self.passes(batch, gates, _SMOOTHING_OF_ONE_PASS if self.smooth else 0.0)
        check_finite(values, examples[0], f"all gates at {level:.3g}", self.output)
        return Reads(reads, reads, gates, values)

    def round(
        self, batch: data_module.Batch, examples: Sequence[int], index: int, apart: Tensor | None = None
    ) -> Reads:
        """One round.

        Args:
            batch: of the examples.
            examples: their numbers in the data set.
            index: of the round, from 0.
            apart: components that stay in place and are not read, bool [examples, components].
        """
        levels, block = self._draw(examples, index)
        levels, block = levels.to(_device(batch)), block.to(_device(batch))
        if apart is not None:
            block[apart] = -1
        soft, hard, gates = (torch.zeros_like(levels) for _ in range(3))
        outputs = torch.zeros(len(examples), device=levels.device)
        # Early rounds have few slopes to average over; later ones, that have more, need less smoothing, and its bias.
        smoothing = _SMOOTHING / math.sqrt(1 + index) if self.smooth else 0.0
        for b in range(self.blocks):
            in_block = block == b
            level = torch.where(in_block, levels, self._others(examples, levels, index, b))
            level = level if apart is None else level.masked_fill(apart, 1.0)
            values, reads = self.passes(batch, level, smoothing)
            check_finite(values, examples[0], f"round {index}, pass {b}", self.output)
            soft += reads * in_block
            hard += reads * ~in_block
            gates += level / self.blocks
            outputs += values / self.blocks
        hard = hard / max(self.blocks - 1, 1)
        return Reads(soft, hard if apart is None else hard.masked_fill_(apart, 0.0), gates, outputs)

    def _draw(self, examples: Sequence[int], index: int) -> tuple[Tensor, Tensor]:
        """Gate levels float32 and block numbers int32, both [examples, components]."""
        seed, count, levels, blocks = self.seed, len(self.components), [], []
        for example in examples:
            # Rounds 2k and 2k + 1 are antithetic: the same draw and its complement.
            draw = sampling.uniforms(seed, sampling.PATHS, example, 2 * (index // 2), count)
            levels.append(1 - draw if index % 2 else draw)
            blocks.append(sampling.balanced_split(seed, sampling.PATHS, example, 2 * index + 1, count, self.blocks))
        return torch.from_numpy(np.stack(levels)), torch.from_numpy(np.stack(blocks))

    def _others(self, examples: Sequence[int], levels: Tensor, index: int, b: int) -> Tensor:
        """Gates of the components outside the block: 1, or a random background of 0 and 1."""
        if not self.background:
            return torch.ones_like(levels)
        draw = [
            sampling.uniforms(self.seed, sampling.BACKGROUND, example, index * self.blocks + b, len(self.components))
            for example in examples
        ]
        return (torch.from_numpy(np.stack(draw)).to(levels.device) >= self.background).to(levels.dtype)


def _device(batch: data_module.Batch) -> torch.device:
    return next(iter(batch.values())).device


class Sums:
    """Sums over the rounds of a batch; the memory does not grow with their number."""

    def __init__(self, n_examples: int, n_components: int, device: torch.device) -> None:
        """No rounds yet."""
        self.soft, self.squared, self.hard, self.gates = (
            torch.zeros(n_examples, n_components, device=device) for _ in range(4)
        )
        self.output = torch.zeros(n_examples, device=device)
        self.rounds = torch.zeros(n_examples, device=device)

    def add(self, rows: Sequence[int], reads: Reads) -> None:
        """A round of some examples, given by their rows in the batch."""
        index = torch.as_tensor(rows, device=self.soft.device)
        parts = ((self.soft, reads.soft), (self.squared, reads.soft.square()), (self.hard, reads.hard))
        for total, part in (*parts, (self.gates, reads.gates), (self.output, reads.output)):
            total.index_add_(0, index, part)
        self.rounds[index] += 1

    def means(self) -> dict[str, Tensor]:
        """`soft`, `hard`, `gates` and `variance` (of the mean of the soft reads; from two rounds on), float32
        [examples, components], `output` and `rounds`, float32 [examples]."""
        rounds = self.rounds[:, None]
        found = {name: getattr(self, name) / rounds for name in ("soft", "hard", "gates")}
        found |= {"output": self.output / self.rounds, "rounds": self.rounds}
        if bool((self.rounds > 1).all()):
            spread = (self.squared / rounds - found["soft"].square()).clamp_min(0)
            found["variance"] = spread / (rounds - 1)
        return found

    def reliability(self) -> Tensor:
        """Expected correlation of an example's mean soft reads with those of as many other rounds, float32 [examples].

        1 - noise / variance over the components (classical test theory; Lord, Novick 1968); 0 where nothing varies.
        """
        means = self.means()
        noise, variance = means["variance"].mean(1), means["soft"].var(1, correction=0)
        return torch.where(variance > 0, 1 - noise / variance, 0.0)
