"""What a forward pass computed at the places where gates enter, played back in the next one."""

from torch import Tensor

from hf_coar.components import Group
from hf_coar.errors import CoarError


class Recording:
    """Activations by group, one a run of its module, in the order in which they were computed."""

    def __init__(self) -> None:
        """Nothing was recorded yet."""
        self._activations: dict[str, list[Tensor]] = {}
        self._played: dict[str, int] = {}

    def note(self, group: Group, activation: Tensor, of: slice = slice(None)) -> None:
        """Keep a copy: what follows in the model may work in place."""
        self._activations.setdefault(group.parameter, []).append(activation.detach().clone())

    def rewind(self) -> None:
        """The next pass begins."""
        self._played = {}

    def next(self, group: Group, like: Tensor) -> Tensor:
        """What was recorded in this run of the group's module.

        Raises:
            CoarError: the module ran less often then, or on something of another shape.
        """
        run = self._played.get(group.parameter, 0)
        self._played[group.parameter] = run + 1
        found = self._activations.get(group.parameter, [])
        if run >= len(found) or found[run].shape != like.shape:
            there = list(found[run].shape) if run < len(found) else "nothing"
            raise CoarError(
                f"{group.module!r} computes {list(like.shape)} in its run {run} for the examples and {there} for "
                "their partners, so that these cannot stand in; give partners of the same shape, or leave the module "
                "out with find_components(model, exclude=[…])"
            )
        return found[run].to(like.device, like.dtype)
