"""A refitted last layer, with nothing ablated."""

from torch import nn

from hf_coar.editing.rivals.biases import linear
from hf_coar.editing.tasks.aims import Aim, changed_copy, note_changed, rival
from hf_coar.editing.tasks.refitting import put
from hf_coar.errors import UnsatisfiedError


@rival("last_layer", ("forget", "fix", "lift"))
def last_layer(aim: Aim) -> nn.Module:
    """The last layer is fitted anew: to balanced groups, or to the model's own answers without a class or an error.

    The first is deep feature reweighting (Kirichenko, Izmailov, Wilson 2023).

    Raises:
        UnsatisfiedError: no strength of the pull towards the layer as it was keeps the limits.
        CoarError: the last layer is not known.
    """
    changed = changed_copy(aim, "last_layer")
    head = linear(aim, changed)
    point = aim.with_new_head_alone()
    if not point.verdict.satisfies:
        raise UnsatisfiedError(f"no refitted last layer {aim.wanted}")
    put(head, *point.head)
    return note_changed(aim, changed)
