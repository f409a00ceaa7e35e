"""The last layer fitted anew to the features, by whatever an edit is to make of them."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.editing.tasks.looking import Seen

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the pull towards the layer as it was
_STEPS = 100  # of L-BFGS; with its own tolerances it takes them all, twice as long, for losses that are as low


Layer = tuple[Tensor, Tensor | None]  # weight [classes, features] and bias [classes]


def reads(head: nn.Linear, seen: Seen) -> bool:
    """Whether a layer gives the logits from the features: not where it runs at every position and one is picked."""
    if seen.features is None or seen.logits is None:
        return False
    weight, bias = (None if one is None else one.detach().float().cpu() for one in (head.weight, head.bias))
    scale = float(seen.logits.std())
    near = max(1e-3, 4 * torch.finfo(head.weight.dtype).eps)  # half precision rounds more
    return torch.allclose(F.linear(seen.features, weight, bias), seen.logits, rtol=near, atol=near * max(1.0, scale))


def candidates(
    head: nn.Linear, seen: Seen, loss: Callable[[Tensor], Tensor], choose: Seen
) -> Iterator[tuple[Layer, Tensor]]:
    """Last layers of several strengths, and the logits that they give to the examples to choose on.

    Args:
        head: the layer as it is.
        seen: what the model makes of the examples to fit it to.
        loss: of their logits [examples, classes], a scalar in nats.
        choose: what it makes of the examples to choose on.
    """
    dtype = head.weight.dtype
    for strength in STRENGTHS:
        # As the model will hold it: an example that is right by a hundredth is wrong again where a layer rounds more.
        weight, bias = (None if one is None else one.to(dtype) for one in fitted(head, seen.features, loss, strength))
        yield (weight, bias), F.linear(choose.features.to(dtype), weight, bias).float()


def fitted(head: nn.Linear, features: Tensor, of: Callable[[Tensor], Tensor], strength: float) -> Layer:
    """A last layer that makes least of a loss, pulled towards the layer as it was.

    Args:
        head: the layer as it is.
        features: float32 [examples, features].
        of: the loss of logits [examples, classes], a scalar in nats.
        strength: of the pull, in nats for a change of the weights by one standardised unit.
    """
    scale = features.std(0).clamp_min(1e-6)
    weight, bias = head.weight.detach().float().cpu(), head.bias
    bias = None if bias is None else bias.detach().float().cpu()
    moved = torch.zeros_like(weight, requires_grad=True)
    shift = torch.zeros(len(weight), requires_grad=True)
    parameters = [moved] if bias is None else [moved, shift]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=_STEPS, tolerance_grad=1e-5, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = F.linear(features, weight + moved / scale, None if bias is None else bias + shift)
        found = of(logits) + strength * moved.square().sum() / 2
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
