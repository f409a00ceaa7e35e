"""Gates: passes that read the effect of every component of every example, rounds of such passes, and their sums."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Components
from hf_coar.errors import ModelError
from hf_coar.estimators.delta_reads import DeltaReads, followed
from hf_coar.estimators.trying import elementwise_modules, normalising_modules
from hf_coar.masking import MaskedModel
from hf_coar.models.calling import sent
from hf_coar.models.outputs import Output
from hf_coar.runs import captured, sampling
from hf_coar.runs.measuring import check_finite

# In standard deviations of what goes into a nonlinearity. Found on the demo's network, once and for all models.
_SMOOTHING, _SMOOTHING_OF_ONE_PASS = 0.6, 0.8
_SOFT_UP_TO = 0.1  # ablated fraction; above it a part of the components is switched off outright
NODES = 3  # on the way of all gates together; with five strong sets are predicted no better, with one or two less well


class GatePasses:
    """The passes of one model; call it with a batch and gates."""

    def __init__(self, masked: MaskedModel, output: Output, delta: bool = False) -> None:
        """Prepare.

        Args:
            masked: the model, whose parameters need no gradients, with its components.
            output: what is differentiated.
            delta: read exact differences where they can be had, see `delta_reads`, and not derivatives.
        """
        self.masked, self.output, self.delta = masked, output, delta
        self._sizes = masked.components.sizes()
        self._activations = elementwise_modules(masked.model) if delta else {}
        self._norms = normalising_modules(masked.model) if delta else []
        self._inert: set[str] = set()
        stand_in = masked.components.stand_in
        alone = stand_in is None or not stand_in.of_partners
        what = (masked.components, output.identity, delta)
        self._passes = captured.CapturedPasses(self._run, masked.model, captured.GATES, what, possible=alone)

    def begin_batch(self) -> None:
        """Other examples come: which modules run may depend on them."""
        self._inert = set()
        self._passes.begin_batch()

    def __call__(self, batch: data_module.Batch, gates: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            batch: of examples.
            gates: float32 [examples, components], on the device of the batch.
            smoothing: see `delta_reads.followed`; only with `delta`.

        Returns:
            outputs float32 [examples] and what was read of every gate, float32 [examples, components]: the derivative
            of the example's output, or the exact difference; 0 for modules that do not run.

        Raises:
            ModelError: the forward blocks all gradients, or the model reads a weight without running its module.
        """
        # As precise as Python's own, and no constant of a captured pass.
        width = torch.full((), smoothing, dtype=torch.float64, device=gates.device) if smoothing else None
        return self._passes(batch, gates, width)

    def _run(self, batch: data_module.Batch, gates: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
        # One leaf a group: a slice of a single leaf would cost a full-sized gradient for every group.
        leaves = [part.contiguous().requires_grad_() for part in gates.split(self._sizes, dim=1)]
        reads = DeltaReads()
        with torch.enable_grad():
            with self.masked.gated(leaves) as fired, ExitStack() as stack:
                if self.delta:
                    stack.enter_context(followed(self._activations, fired, reads, smoothing, self._norms))
                values = self.output.of(self.masked.model, batch)
            check_differentiable(values, self.masked.model)
            derivatives = torch.autograd.grad(values.sum(), leaves, allow_unused=True, retain_graph=self.delta)
        self._check_reached({group.parameter for group in fired.missing()}, batch)
        corrections = reads.corrections(leaves)
        parts = [c if d is None else d + c for d, c in zip(derivatives, corrections, strict=True)]
        return values.detach(), torch.cat(parts, dim=1)

    def energies(self, batch: data_module.Batch) -> tuple[Tensor, Tensor]:
        """One forward pass with everything in place.

        Returns:
            outputs float32 [examples] and energies, float32 [examples, components]: the sum of the squares of what the
            component adds to its module's output; 0 where gates enter elsewhere.
        """
        count, device = data_module.size(batch), data_module.device_of(batch)
        leaves = [torch.ones(count, size, device=device, requires_grad=True) for size in self._sizes]
        energies = DeltaReads()

        def note(gated: Tensor, plain: Tensor, end: Tensor | None, level: Tensor) -> None:
            part = plain if end is None else plain - end
            energy = part.detach().float().square().sum_to_size(level.shape)
            # Half precision ends at 65,504; such a row is an outlier all the same.
            most = min(torch.finfo(dtype).max for dtype in (level.dtype, energy.dtype)) / 64
            energies.add(level, energy.clamp_max(most).to(level.dtype))

        with torch.enable_grad(), self.masked.gated(leaves) as fired:
            fired.observe = note
            values = self.output.of(self.masked.model, batch)
        check_differentiable(values, self.masked.model)
        return values.detach(), torch.cat(energies.corrections(leaves), dim=1)

    def _check_reached(self, missing: set[str], batch: data_module.Batch) -> None:
        """Modules that do not run for a batch have no effect on it; weights read without their module are an error."""
        if missing <= self._inert:
            return
        groups, model = self.masked.components.groups, self.masked.model
        kept = torch.cat([torch.full((group.size,), group.parameter not in missing) for group in groups])
        with torch.no_grad():
            plain = self.output.of(model, batch)
            with self.masked.zeroing.ablated(kept, how="weights"):
                changed = self.output.of(model, batch)
        if not torch.equal(plain, changed):
            raise ModelError(
                f"gates cannot reach {', '.join(sorted(missing)[:8])}: the model reads these weights without running "
                "their modules; exclude them, or use method=hf_coar.Regression()"
            )
        self._inert |= missing


def one_pass(
    model: nn.Module, components: Components, output: Output, example: data_module.Batch
) -> Callable[[], object]:
    """A gate pass of one example, as rounds make it, to see what it takes; the model may be on the meta device."""
    passes = GatePasses(MaskedModel(model, components), output, delta=True)

    def run() -> object:
        passes.begin_batch()
        return passes(example, torch.ones(1, len(components), device=_device(example)), _SMOOTHING)

    return run


def check_differentiable(values: Tensor, model: nn.Module) -> None:
    """Raises `ModelError` unless a gradient leads from the outputs back to the gates."""
    if not values.requires_grad:
        raise ModelError(
            f"no gradient reaches the gates of {type(model).__name__}: its forward blocks it (integer kernels, no_grad "
            "or numpy inside); use a method that needs none, such as hf_coar.Regression()"
        )


def n_blocks(ablated_fraction: float) -> int:
    """Blocks, and so passes, a round."""
    soft = ablated_fraction <= _SOFT_UP_TO
    return max(1, round(1 / (2 * ablated_fraction))) if soft else math.ceil(1 / ablated_fraction)


@dataclass(frozen=True)
class Reads:
    """What a round, or a single pass, tells of some examples.

    Attributes:
        soft: float32 [examples, components], read while the component's gate was drawn between 0 and 1.
        hard: float32 [examples, components], mean of what was read while its gate was 1.
        gates: float32 [examples, components], the mean gate.
        output: float32 [examples], the mean output.
        outputs: float32 [passes, examples], of every pass.
    """

    soft: Tensor
    hard: Tensor
    gates: Tensor
    output: Tensor
    outputs: Tensor


class GateRounds:
    """The rounds of one model, drawn as a pure function of seed, example and round."""

    def __init__(
        self,
        masked: MaskedModel,
        output: Output,
        ablated_fraction: float,
        seed: int,
        delta: bool = True,
        smooth: bool = True,
    ) -> None:
        """Prepare; the arguments are those of `attribute` and `PathGradient`."""
        self.n_components, self.output, self.fraction, self.seed = len(masked), output, ablated_fraction, seed
        self.passes = GatePasses(masked, output, delta)
        self.smooth = delta and smooth
        self.blocks = n_blocks(ablated_fraction)
        gated = 1 / self.blocks
        # On average half of a gated block is off; what is missing to the fraction is switched off in the background.
        outright = ablated_fraction > _SOFT_UP_TO
        self.background = max(0.0, (ablated_fraction - gated / 2) / (1 - gated)) if outright else 0.0

    def single(self, batch: data_module.Batch, examples: Sequence[int]) -> Reads:
        """One pass with all gates at one minus the fraction: no draw, and no noise but that of being one point."""
        level = 1 - self.fraction
        gates = torch.full((len(examples), self.n_components), level, device=_device(batch))
        values, reads = self.passes(batch, gates, _SMOOTHING_OF_ONE_PASS if self.smooth else 0.0)
        check_finite(values, examples[0], f"all gates at {level:.3g}", self.output)
        return Reads(reads, reads, gates, values, values[None])

    def context(
        self, batch: data_module.Batch, examples: Sequence[int], index: int, apart: Tensor | None = None
    ) -> Reads:
        """One pass in a random context, the definition's own: every component is ablated with the fraction's chance.

        All components are read. Arguments as for `round`, `hard` is nothing.
        """
        gates = (self._uniforms(sampling.CONTEXTS, examples, index, _device(batch)) >= self.fraction).float()
        gates = gates if apart is None else gates.masked_fill(apart, 1.0)
        values, reads = self.passes(batch, gates, self._smoothing(index))
        return Reads(reads, torch.zeros_like(reads), gates, values, values[None])

    def along(
        self, batch: data_module.Batch, examples: Sequence[int], reach: float, apart: Tensor | None = None
    ) -> Tensor:
        """The mean of what is read while all gates go from 1 to 1 - reach together, float32 [examples, components].

        `NODES` passes, placed by Gauss and Legendre. These are integrated gradients (Sundararajan, Taly, Yan 2017) in
        the gates, along the diagonal of Aumann and Shapley. Arguments as for `round`.
        """
        found = torch.zeros(len(examples), self.n_components, device=_device(batch))
        for place, share in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
            level = 1 - reach * float(place + 1) / 2
            gates = torch.full_like(found, level)
            gates = gates if apart is None else gates.masked_fill(apart, 1.0)
            values, reads = self.passes(batch, gates, self._smoothing(0))
            check_finite(values, examples[0], f"all gates at {level:.3g}", self.output)
            found += float(share) / 2 * reads
        return found

    def _smoothing(self, index: int) -> float:
        """Early rounds have few slopes to average over; later ones, that have more, need less of it, and its bias."""
        return _SMOOTHING / math.sqrt(1 + index) if self.smooth else 0.0

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
        levels, block = self._draw(examples, index, _device(batch))
        if apart is not None:
            block.masked_fill_(apart, -1)
        soft, hard, gates = (torch.zeros_like(levels) for _ in range(3))
        outputs = []
        for b in range(self.blocks):
            in_block = block == b
            level = torch.where(in_block, levels, self._others(examples, levels, index, b))
            level = level if apart is None else level.masked_fill(apart, 1.0)
            values, reads = self.passes(batch, level, self._smoothing(index))
            soft += reads * in_block
            hard += reads * ~in_block
            gates += level / self.blocks
            outputs.append(values)
        hard = hard / max(self.blocks - 1, 1)
        every = torch.stack(outputs)
        return Reads(soft, hard if apart is None else hard.masked_fill_(apart, 0.0), gates, every.mean(0), every)

    def check_finite(self, outputs: Tensor, first: int, index: int) -> None:
        """Raises `NonFiniteOutputError` where an output [passes, examples] of a round, or a context, is not finite.

        Called once all rounds of a batch are on their way: on an accelerator every look waits for what is under way,
        and the next round is drawn while this one is computed.
        """
        if not bool(outputs.isfinite().all()):
            for b, values in enumerate(outputs):
                check_finite(values, first, f"round {index}, pass {b}", self.output)

    def _draw(self, examples: Sequence[int], index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gate levels float32 and block numbers int32, both [examples, components]."""
        # Rounds 2k and 2k + 1 are antithetic: the same draw and its complement.
        levels = self._uniforms(sampling.PATHS, examples, 2 * (index // 2), device)
        return 1 - levels if index % 2 else levels, self._blocks(examples, 2 * index + 1, device)

    def _uniforms(self, purpose: int, examples: Sequence[int], sub_index: int, device: torch.device) -> Tensor:
        """Uniform numbers, float32 [examples, components]."""
        seed, count = self.seed, self.n_components
        if device.type == "cuda":
            return sampling.uniforms_of(sampling.words_of(seed, purpose, examples, sub_index, count, device))
        draws = [sampling.uniforms(seed, purpose, example, sub_index, count) for example in examples]
        return torch.from_numpy(np.stack(draws)).to(device)

    def _blocks(self, examples: Sequence[int], sub_index: int, device: torch.device) -> Tensor:
        """The block of every component, int32 [examples, components]."""
        seed, count, blocks = self.seed, self.n_components, self.blocks
        if device.type == "cuda":
            words = sampling.words_of(seed, sampling.PATHS, examples, sub_index, count, device)
            return sampling.balanced_splits_of(words, blocks)
        splits = [sampling.balanced_split(seed, sampling.PATHS, one, sub_index, count, blocks) for one in examples]
        return torch.from_numpy(np.stack(splits)).to(device)

    def _others(self, examples: Sequence[int], levels: Tensor, index: int, b: int) -> Tensor:
        """Gates of the components outside the block: 1, or a random background of 0 and 1."""
        if not self.background:
            return torch.ones_like(levels)
        draw = self._uniforms(sampling.BACKGROUND, examples, index * self.blocks + b, levels.device)
        return (draw >= self.background).to(levels.dtype)


def _device(batch: data_module.Batch) -> torch.device:
    return data_module.device_of(batch)


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
        index = sent(torch.as_tensor(rows), self.soft.device)
        parts = ((self.soft, reads.soft), (self.squared, reads.soft.square()), (self.hard, reads.hard))
        for total, part in (*parts, (self.gates, reads.gates), (self.output, reads.output)):
            total.index_add_(0, index, part)
        self.rounds.index_add_(0, index, torch.ones_like(reads.output))

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
