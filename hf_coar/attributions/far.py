"""Far reads: what components are worth where much of the model is gone.

A weight is the effect of a component while a random few are ablated. Strong sets, such as the twenty strongest, take
the model as far from itself as large random ones do, and there components count for something else. So the strongest
components are read again while all gates close together, half way, and a set is forecast between the two by the share
of all weights that it takes. A component does not count among what is gone beside it, so that alone it keeps its single
effect. Where pairs are known instead, the far end are the weights themselves: the interactions of a strong set's many
pairs add up to more than there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-12


def taken(gone: Tensor, values: Tensor) -> Tensor:
    """What sets take of values, float32 [sets, examples].

    Args:
        gone: float32 [sets, components], 1 for what is ablated; or [sets, examples, components], where every example
            has sets of its own.
        values: float32 [examples, components].
    """
    return gone @ values.T if gone.dim() == 2 else torch.einsum("sec,ec->se", gone, values)


@dataclass(frozen=True)
class Far:
    """Effects on the way to a model of which much is gone.

    Attributes:
        indices: int64 [read], components that were read there.
        effects: float32 [examples, read], their mean effects on the way, in the unit of the output.
        reach: the share of the model that is gone at its end, between the fitted fraction and 1.
        ratio: effects of the other components, as multiples of their weights.
        trust: how much of them forecasts take, 0 to 1, as fresh strong sets say.
    """

    indices: Tensor
    effects: Tensor
    reach: float
    ratio: float = 1.0
    trust: float = 1.0

    @classmethod
    def of(cls, indices: Tensor, effects: Tensor, reach: float, weights: Tensor) -> "Far":
        """With the ratio that the read components show; weights, float32 [examples, read], are theirs."""
        square = float(weights.double().square().sum())
        product = float((weights.double() * effects.double()).sum())
        return cls(indices, effects, reach, product / square if square > _TINY else 1.0)

    @classmethod
    def of_weights(cls, n_examples: int, reach: float) -> "Far":
        """With the weights themselves as effects on the way."""
        return cls(torch.zeros(0, dtype=torch.long), torch.zeros(n_examples, 0), reach)

    def mixed(self, drops: Tensor, weights: Tensor, gone: Tensor, fraction: float) -> Tensor:
        """Drops of sets, nearer to those far away the more of all weights a set takes, and the more these are trusted.

        Args:
            drops: float32 [sets, examples], as the weights have them.
            weights: float32 [examples, components].
            gone: what is ablated, as for `taken`.
            fraction: the one that the weights are for, of which random sets take that share.

        Returns:
            float32 [sets, examples].
        """
        return drops + self.trust * self.leaning(drops, weights, gone, fraction)

    def leaning(self, drops: Tensor, weights: Tensor, gone: Tensor, fraction: float) -> Tensor:
        """What full trust adds to drops, float32 [sets, examples]; arguments as for `mixed`."""
        share = ((self.beside(weights, gone) - fraction) / (self.reach - fraction)).clamp(0, 1)
        excess = self.effects - self.ratio * weights[:, self.indices]
        far = self.ratio * taken(gone, weights) + taken(gone[..., self.indices], excess)
        return share * (far - drops)

    @staticmethod
    def beside(weights: Tensor, gone: Tensor) -> Tensor:
        """The share of all weights that is gone beside a component of a set, on average, float32 [sets, examples]."""
        size = Far.sizes(weights)
        share = taken(gone, size)
        return share - taken(gone, size.square()) / share.clamp_min(_TINY)

    @staticmethod
    def sizes(weights: Tensor) -> Tensor:
        """Every component's share of all weights of its example, float32 [examples, components]; 0 where all are 0."""
        return weights.abs() / weights.abs().sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)

    def at(self, rows: Sequence[int]) -> "Far":
        """Those of some of the examples alone."""
        return replace(self, effects=self.effects[list(rows)])

    def to(self, device: torch.device) -> "Far":
        """These effects on a device."""
        return replace(self, indices=self.indices.to(device), effects=self.effects.to(device))

    def to_json(self) -> dict[str, Any]:
        """All but the effects."""
        return {"indices": self.indices.tolist(), "reach": self.reach, "ratio": self.ratio, "trust": self.trust}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], effects: Tensor) -> "Far":
        """What `to_json` gave, with the effects."""
        indices = torch.tensor(value["indices"], dtype=torch.long)
        return cls(indices, effects, float(value["reach"]), float(value["ratio"]), float(value["trust"]))
