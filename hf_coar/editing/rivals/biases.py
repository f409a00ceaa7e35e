"""The cheapest rival of forgetting: a constant on the logit, so low that the class is never said."""

import torch
from torch import nn

from hf_coar.editing.tasks.aims import Aim, changed_copy, note_changed, rival
from hf_coar.errors import CoarError

_LOW = -1e3  # a half-precision number, and below any logit


@rival("logit_bias", ("forget",))
def logit_bias(aim: Aim) -> nn.Module:
    """The bias of the class in the last layer is set to -1,000: it hides all and removes nothing."""
    changed = changed_copy(aim, "logit_bias")
    head = linear(aim, changed)
    with torch.no_grad():
        if head.bias is None:
            head.weight[aim.label] = 0  # a logit of 0 is low where there are many others; the figures say how low
        else:
            head.bias[aim.label] = _LOW
    return note_changed(aim, changed)


def linear(aim: Aim, model: nn.Module) -> nn.Linear:
    """The last layer of a model.

    Raises:
        CoarError: none is known to give the logits.
    """
    if aim.of.looker.head is None:
        raise CoarError(f"no linear layer of the {type(model).__name__} is known to give its logits")
    return model.get_submodule(aim.of.looker.head)
