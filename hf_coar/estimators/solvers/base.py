"""What a solver is, and the checks that all of them make."""

from typing import Protocol

from torch import Tensor

from hf_coar.errors import CoarError


class Solver(Protocol):
    """Fits outputs ≈ masks · weights + bias for every example at once; all examples share one factorisation.

    A solver that can begin from weights known beforehand takes them as a third argument, `prior`, float [examples,
    components]: it fits what they leave over, and takes as much of them as predicts masks that are left out best.
    """

    def fit(self, masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Fit.

        Args:
            masks: bool [masks, components], True = left in place.
            outputs: float [masks, examples].

        Returns:
            weights float32 [examples, components], bias float32 [examples].
        """
        ...


def check(masks: Tensor, outputs: Tensor, prior: Tensor | None = None) -> None:
    """Raises `CoarError` unless masks, outputs and prior fit together and there are at least 3 masks."""
    n_masks, n_components = masks.shape
    if outputs.shape[0] != n_masks:
        raise CoarError(f"{n_masks} masks and {outputs.shape[0]} rows of outputs; they must be as many")
    if n_masks < 3:
        raise CoarError(f"a regression needs at least 3 masks; got {n_masks}")
    if prior is not None and prior.shape != (outputs.shape[1], n_components):
        raise CoarError(
            f"the prior weights have shape {list(prior.shape)}; expected {[outputs.shape[1], n_components]}, examples "
            "by components"
        )
