"""What every estimator takes and gives: a problem, and a fit."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.data import Identity
from hf_coar.models.outputs import Output
from hf_coar.runs.store import Store


@dataclass(frozen=True)
class Problem:
    """What is to be attributed.

    Attributes:
        model: the model.
        data: batches that can be iterated again.
        components: the model's components.
        output: the output to attribute.
        ablated_fraction: the fraction of the components that masks ablate.
        seed: of all draws.
        store: of the run; results that it holds are not computed again.
        progress: show a progress bar.
    """

    model: nn.Module
    data: Any
    components: Components
    output: Output
    ablated_fraction: float
    seed: int
    store: Store
    progress: bool = True


@dataclass(frozen=True)
class Fit:
    """Attributions of every example.

    Attributes:
        weights: float32 [examples, components].
        bias: float32 [examples].
        standard_errors: float32 [examples, components], of the weights; None where the estimator gives none.
        identity: of the examples.
        cost: forward passes an example that were spent on average, where `Method.cost` could only say about how many.
        checked: what fresh masks said of the fit, see `PathGradient.check_masks`.
    """

    weights: Tensor
    bias: Tensor
    standard_errors: Tensor | None
    identity: Identity
    cost: float | None = None
    checked: dict[str, float] | None = None


class Method(Protocol):
    """An estimator: `PathGradient`, `Regression`, or one of your own."""

    name: str

    def settings(self) -> dict[str, Any]:
        """What determines the numbers, as JSON values."""
        ...

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example, or the most of them; a forward and backward pass counts as three."""
        ...

    def fit(self, problem: Problem) -> Fit:
        """Estimate."""
        ...
