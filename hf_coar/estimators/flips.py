"""Flips: components ablated one at a time, everything else in place. Exact, a forward pass each.

The strongest components are flipped, by what was read of them and how it spread. Their single effects say what they are
worth in small ablations, and where reads are too noisy, also in those of the fitted size: heavy-tailed rows, such as
the ones that feed the massive activations of language models, need more rounds than anybody has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar.runs.problem import Estimates, Problem

_FEWEST, _MOST = 8, 128
_TINY = 1e-20
_BLOCK = 64  # examples
# Reads take over a flip only where their noise is most of what tells them apart. Between 0.3 and 0.7 nothing changes;
# without a limit a ViT loses half a hundredth at the fitted size.
_NOISY = 0.5


def default_number(n_components: int) -> int:
    """How many components are flipped: the root of their number, 8 to 128 of them.

    Sixty-four instead of thirty-two of 832 raise the correlation at a quarter of the fitted size from .944 to .951.
    """
    return min(n_components, max(_FEWEST, min(_MOST, round(n_components**0.5))))


@dataclass(frozen=True)
class Without:
    """Masks that ablate listed components, measured like `sampling.Masks`.

    Attributes:
        n_components: length of a mask.
        sets: the components that each mask ablates; an empty one ablates none.
    """

    n_components: int
    sets: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many masks."""
        return len(self.sets)

    @property
    def ablated_fraction(self) -> float:
        """The largest."""
        return max(map(len, self.sets)) / self.n_components

    def rows(self, start: int, stop: int) -> Tensor:
        """Masks start … stop - 1, bool [stop - start, n_components]."""
        kept = torch.ones(stop - start, self.n_components, dtype=torch.bool)
        for row, gone in zip(kept, self.sets[start:stop], strict=True):
            row[list(gone)] = False
        return kept


def one_by_one(n_components: int, indices: Sequence[int]) -> Without:
    """Mask 0 ablates none, mask i + 1 component indices[i] alone."""
    return Without(n_components, ((), *((index,) for index in indices)))


@dataclass(frozen=True)
class Flips:
    """What flipping some components showed.

    Attributes:
        indices: int64 [flipped], the components.
        unablated: float32 [examples], the output with everything in place.
        effects: float32 [examples, flipped], that output minus the one without the component.
    """

    indices: Tensor
    unablated: Tensor
    effects: Tensor

    def ratio(self, estimates: Estimates) -> float:
        """Single effects as multiples of the weights, by least squares."""
        chosen = estimates.of(self.indices).weights.double()
        square = float(chosen.square().sum())
        return float((self.effects.double() * chosen).sum()) / square if square > 0 else 1.0


def strongest(weights: Tensor, errors: Tensor | None, count: int) -> Tensor:
    """The components that matter most, or might: largest mean square of weight and standard error, int64 [count]."""
    power = torch.zeros(weights.shape[1])
    for start in range(0, len(weights), _BLOCK):  # all at once would be as large as the weights again
        power += weights[start : start + _BLOCK].square().sum(0)
        power += 0 if errors is None else errors[start : start + _BLOCK].square().sum(0)
    return power.topk(min(count, weights.shape[1])).indices.sort().values


def flip(problem: Problem, indices: Tensor) -> Flips:
    """Measure the single effects of some components, and the output with everything in place."""
    outputs = problem.measure(one_by_one(len(problem.components), indices.tolist()), "flips")
    return Flips(indices, outputs[0].clone(), (outputs[:1] - outputs[1:]).T.contiguous())


def steadied(estimates: Estimates, flips: Flips) -> Estimates:
    """Weights of the flipped components drawn towards their single effects where reads are too noisy to tell better.

    A single effect differs from a weight, which is an effect with others ablated. How far is learnt from all flipped
    components beyond the noise of their reads; where most of a component's difference is noise, the flip is nearer.
    So nothing is changed where outputs do not survive the fitted fraction, and singles and weights have little in
    common.
    """
    read, noise = (values.double() for values in estimates.of(flips.indices))
    noise, effects = noise.square(), flips.effects.double()
    precision = 1 / (noise + noise.mean() + _TINY)
    scale = float((precision * effects * read).sum() / (precision * effects.square()).sum().clamp_min(_TINY))
    excess = ((read - scale * effects).square() - noise).sum() / effects.square().sum().clamp_min(_TINY)
    # By component, not by example: an effect that happens to be small for one example is not known any better.
    differing = excess.clamp_min(0.0025) * effects.square().mean(0) + _TINY
    gain = noise / (noise + differing)
    gain = torch.where(gain > _NOISY, gain, 0.0)
    weights = (read + gain * (scale * effects - read)).float()
    return estimates.replaced(flips.indices, weights, (noise * (1 - gain)).sqrt().float())
