"""What a gated component contributes to a tensor, and what the tensor is with the component whole and without it.

A sum, a batch normalisation and a multiplication by a number keep contributions linear. A normalisation by what it is
given (of groups, of instances, of layers) does not: where it takes in nothing but one component it forgets how large
that is, so that its gate has no slope anywhere but at nothing, and still the component matters. There the two ends are
known as well: the same normalisation of the two tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Contribution:
    """One group's gated part of a tensor: tensor = ... + level * part; `level` remembers the gates it came from.

    The part is (plain - end) * scale. It is made where it is wanted: what it is made of is there anyway, for the
    derivatives to the gates, and most parts are never wanted.
    """

    plain: Tensor
    end: Tensor | None
    level: Tensor
    scale: Any = None

    def scaled(self, scale: Any) -> "Contribution":
        """What it is in a multiple of the tensor."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor x with the component whole, without it, and the difference, each of the shape of x."""
        part, level = self.plain if self.end is None else self.plain - self.end, self.level.detach()
        part = part if self.scale is None else part * self.scale
        return torch.addcmul(x, part, 1 - level), torch.addcmul(x, part, level, value=-1), part


@dataclass(frozen=True)
class Normalised:
    """A contribution behind a normalisation of nothing but its own component.

    Attributes:
        of: the contribution to what is normalised.
        norm: the normalisation.
        x: what is normalised, detached.
        scale: of what comes out.
    """

    of: "Contribution | Normalised"
    norm: Callable[[Tensor], Tensor]
    x: Tensor
    scale: Any = None

    @property
    def level(self) -> Tensor:
        """The gates."""
        return self.of.level

    def scaled(self, scale: Any) -> "Normalised":
        """What it is in a multiple of the tensor."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor x with the component whole, without it, and the difference, each of the shape of x."""
        whole, without, _ = self.of.ends(self.x)
        now, whole, without = self.norm(self.x), self.norm(whole), self.norm(without)
        above, below = whole - now, now - without
        if self.scale is not None:
            above, below = above * self.scale, below * self.scale
        return x + above, x - below, above + below

    @torch.no_grad()
    def excess(self, gradient: Tensor) -> Tensor:
        """By how much the exact difference exceeds what the derivative to the gates has of it.

        Args:
            gradient: of the output to what comes out of the normalisation.

        Returns:
            Times the gradient, of the shape of x.
        """
        _, _, part = self.of.ends(self.x)
        with torch.enable_grad():
            variable = self.x.detach().requires_grad_()
            back = torch.autograd.grad(self.norm(variable), variable, gradient)[0]
        _, _, difference = self.ends(self.norm(self.x))
        return gradient * difference - back * part


Tracked = Contribution | Normalised
Norm = tuple[Callable[[Tensor], Tensor], tuple[int, ...]]  # a function, and the axes that it takes together


def normalisation(name: str, args: tuple, kwargs: dict) -> Norm | None:
    """A call of one of `NORMALISATIONS`, as a function of that alone, and the axes that it takes together.

    Channels that are normalised each by itself are not taken together. None where it takes means of its own.
    """
    return _MADE[name](*args, **kwargs)


def _group_norm(input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Norm:
    norm = partial(F.group_norm, num_groups=num_groups, weight=_fixed(weight), bias=_fixed(bias), eps=eps)
    first = 2 if num_groups == input.shape[1] else 1
    return norm, tuple(range(first, input.dim()))


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Norm:
    shape = tuple(normalized_shape)
    norm = partial(F.layer_norm, normalized_shape=shape, weight=_fixed(weight), bias=_fixed(bias), eps=eps)
    return norm, tuple(range(input.dim() - len(shape), input.dim()))


def _instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm | None:
    if not use_input_stats:
        return None
    norm = partial(F.instance_norm, weight=_fixed(weight), bias=_fixed(bias), eps=eps)
    return norm, tuple(range(2, input.dim()))


_MADE: dict[str, Callable[..., Any]] = {
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
}


NORMALISATIONS = frozenset(_MADE)


def _fixed(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
