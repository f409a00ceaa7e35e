"""The last layer fitted anew: logistic regression on the features, every group counting alike."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.editing.tasks.looking import Seen

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the pull towards the layer as it was
_STEPS = 100  # of L-BFGS


Layer = tuple[Tensor, Tensor | None]  # weight [classes, features] and bias [classes]


def reads(head: nn.Linear, seen: Seen) -> bool:
    """Whether a layer gives the logits from the features: not where it runs at every position and one is picked."""
    if seen.features is None or seen.logits is None:
        return False
    weight, bias = (None if one is None else one.detach().float().cpu() for one in (head.weight, head.bias))
    return torch.allclose(F.linear(seen.features, weight, bias), seen.logits, rtol=1e-3, atol=1e-3)


def candidates(
    head: nn.Linear, seen: Seen, labels: Tensor, strata: Tensor, choose: Seen
) -> Iterator[tuple[Layer, Tensor]]:
    """Last layers of several strengths, and the logits that they give to the examples to choose on.

    Args:
        head: the layer as it is.
        seen: what the model makes of the examples to fit it to.
        labels: their labels, int64 [examples].
        strata: number of every one's group, int64 [examples].
        choose: what it makes of the examples to choose on.
    """
    for strength in STRENGTHS:
        layer = fitted(head, seen.features, labels, strata, strength)
        yield layer, F.linear(choose.features, *layer)


def fitted(head: nn.Linear, features: Tensor, labels: Tensor, strata: Tensor, strength: float) -> Layer:
    """A last layer fitted to features, every stratum counting alike, and pulled towards the layer as it was.

    Args:
        head: the layer as it is.
        features: float32 [examples, features].
        labels: int64 [examples].
        strata: number of every example's group, int64 [examples].
        strength: of the pull, in nats for a change of the weights by one standardised unit.
    """
    scale = features.std(0).clamp_min(1e-6)
    weight, bias = head.weight.detach().float().cpu(), head.bias
    bias = None if bias is None else bias.detach().float().cpu()
    moved = torch.zeros_like(weight, requires_grad=True)
    shift = torch.zeros(len(weight), requires_grad=True)
    counts = torch.bincount(strata)
    share = 1 / counts[strata].float() / int((counts > 0).sum())
    parameters = [moved] if bias is None else [moved, shift]
    optimiser = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = F.linear(features, weight + moved / scale, None if bias is None else bias + shift)
        found = (share * F.cross_entropy(logits, labels, reduction="none")).sum() + strength * moved.square().sum() / 2
        found.backward()
        return found

    with torch.enable_grad():
        optimiser.step(loss)
    return (weight + moved / scale).detach(), None if bias is None else (bias + shift).detach()


def put(head: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Writes a layer."""
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
