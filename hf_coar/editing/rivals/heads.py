"""A refitted last layer: logistic regression on the features, every group counting alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.editing.rivals.biases import linear
from hf_coar.editing.tasks.aims import Aim, changed_copy, note_changed, rival
from hf_coar.editing.tasks.looking import Seen
from hf_coar.editing.tasks.walking import Verdict
from hf_coar.errors import CoarError, UnsatisfiedError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the pull towards the layer as it was
_STEPS = 100  # of L-BFGS


@rival("last_layer", ("lift",))
def last_layer(aim: Aim) -> nn.Module:
    """Deep feature reweighting (Kirichenko, Izmailov, Wilson 2023): the last layer is fitted anew to balanced groups.

    Raises:
        UnsatisfiedError: no strength of the pull towards the layer as it was keeps the limits.
        CoarError: the last layer is not known.
    """
    changed = changed_copy(aim, "last_layer")
    head = linear(aim, changed)
    found = best_head(aim, head, aim.before["attribute"], aim.before["choose"])
    if found is None or not found[0].satisfies:
        raise UnsatisfiedError(f"no refitted last layer {aim.wanted}")
    put(head, *found[1])
    return note_changed(aim, changed)


Layer = tuple[Tensor, Tensor | None]  # weight [classes, features] and bias [classes]


def best_head(aim: Aim, head: nn.Linear, fit: Seen, choose: Seen) -> tuple[Verdict, Layer] | None:
    """The last layer that does best on the examples to choose on, among several strengths; None without features."""
    if fit.features is None or choose.features is None:
        raise CoarError(f"no linear layer of the {type(aim.of.model).__name__} is known to give its logits")
    strata = aim.groups[aim.parts.attribute]
    labels, best = aim.labels(aim.parts.attribute), None
    for strength in STRENGTHS:
        layer = fitted(head, fit.features, labels, strata, strength)
        logits = F.linear(choose.features, *layer)
        seen = Seen(_margins(aim, logits), logits, choose.features)
        verdict = aim.verdict(seen)
        key = (verdict.satisfies, verdict.merit if verdict.satisfies else -verdict.spent)
        if best is None or key > best[0]:
            best = key, verdict, layer
    return best[1:]


def _margins(aim: Aim, logits: Tensor) -> Tensor:
    return aim.of.looker.output(logits, {"labels": aim.labels(aim.parts.choose)})


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
