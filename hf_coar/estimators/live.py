"""Live attributions: of a few examples, round by round, as they become better."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import Components
from hf_coar.data import Batch
from hf_coar.errors import CoarError
from hf_coar.estimators.path_gradient import BatchReader, PathGradient
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD, is_whole
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs, tasks
from hf_coar.models.outputs import Output
from hf_coar.runs import sampling
from hf_coar.runs.engine import placed
from hf_coar.runs.problem import Problem
from hf_coar.runs.workers import processes


@dataclass(frozen=True)
class Round:
    """What is known so far.

    Attributes:
        weights: float32 [examples, components], positive = keeping the component raises the output.
        standard_errors: float32 [examples, components]; None before the second round.
        output: float32 [examples], the mean output under the random gates so far.
        rounds: complete ones; 0 after the first single pass.
        cost: forward passes an example so far, a forward and backward pass counted as three.
        reliability: float32 [examples], correlation to be expected between the plain means of these rounds and those of
            as many others; None before the second round.
    """

    weights: Tensor
    standard_errors: Tensor | None
    output: Tensor
    rounds: int
    cost: float
    reliability: Tensor | None


def rounds(
    model: nn.Module,
    batch: Batch,
    components: Components,
    output: "str | Output | outputs.OutputFunction" = "auto",
    ablated_fraction: float = 0.05,
    seed: int = 0,
    max_rounds: int = 16,
) -> Iterator[Round]:
    """Attributions of one batch by `PathGradient`, after a single pass and then after every round.

    The model is frozen and on the accelerator while a round is computed, and as it was in between.

    Args:
        model: any module.
        batch: a mapping of tensors whose first axis is the example, with the `labels` that the output needs.
        components: of the model.
        output: as for `attribute`.
        ablated_fraction: as for `attribute`.
        seed: of the draws.
        max_rounds: how many rounds to go.

    Yields:
        What is known so far, from the first forward and backward pass on.

    Raises:
        CoarError: arguments that make no sense.
        ModelError: no gradient reaches the gates.
        NonFiniteOutputError: the model gave NaN or infinity.
    """
    sampling.check_fraction(ablated_fraction)
    sampling.check_seed(seed)
    if not is_whole(max_rounds, 0):
        raise CoarError(f"max_rounds={max_rounds!r}; must be a whole number, 0 or more")
    method, device = PathGradient(), processes().device
    batch = data_module.as_batch(batch)
    problem = Problem(
        MaskedModel(model, components), None, tasks.bind(model, output, batch=batch), ablated_fraction, seed
    )
    reader: BatchReader | None = None
    for _ in range(1 + max_rounds):
        with models.frozen(model), placed(model, device) as place:
            if reader is None:
                reader = BatchReader(method, method.gates(problem), data_module.to_device(batch, place), 0)
                found, cost = reader.single(), FORWARD_AND_BACKWARD
            else:
                reader.next_round()
                found = reader.means()
                cost = FORWARD_AND_BACKWARD + round(method.spent(found, reader.gates.blocks), 1)
        found = {name: value.cpu() for name, value in found.items()}
        weights, errors = method.estimate(found, components.sizes())
        reliability = reader.sums.reliability().cpu() if reader.rounds > 1 else None
        yield Round(weights, errors, found["output"], reader.rounds, cost, reliability)
