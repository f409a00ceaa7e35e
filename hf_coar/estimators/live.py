"""Live attributions: of a few examples, round by round, as they become better."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import masking, models
from hf_coar.components import Components
from hf_coar.data import Batch
from hf_coar.errors import CoarError
from hf_coar.estimators.gate_passes import FORWARD_AND_BACKWARD
from hf_coar.estimators.gate_rounds import GateRounds, Sums
from hf_coar.estimators.outliers import Outliers, find
from hf_coar.estimators.path_gradient import PathGradient
from hf_coar.models import outputs
from hf_coar.models.outputs import Output
from hf_coar.runs import sampling
from hf_coar.runs.engine import placed
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
    output: "str | Output | outputs.OutputFunction" = "margin",
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
    if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 0:
        raise CoarError(f"max_rounds={max_rounds!r}; must be a whole number, 0 or more")
    masking.check_same_model(model, components)
    batch, method = data_module.as_batch(batch), PathGradient()
    examples = range(data_module.size(batch))
    gate_rounds = GateRounds(model, components, outputs.get(output), ablated_fraction, seed)
    outliers: Outliers | None = None
    sums: Sums | None = None
    cost = 0.0
    for index in range(-1, max_rounds):
        with models.frozen(model), placed(model, processes().device) as device:
            here = data_module.to_device(batch, device)
            if index < 0:
                reads = gate_rounds.single(here, examples)
                means = {name: getattr(reads, name).cpu() for name in ("soft", "output")}
            else:
                if outliers is None:
                    outliers = find(gate_rounds.passes, here, method.max_outliers)
                    cost += 1 + float((outliers.indices >= 0).sum(1).float().mean())
                sums = sums or Sums(len(examples), len(components), device)
                sums.add(examples, gate_rounds.round(here, examples, index, outliers.mask(len(components))))
                found = sums.means() | {"outliers": outliers.indices, "effects": outliers.effects}
                means = {name: value.cpu() for name, value in found.items()}
        cost += FORWARD_AND_BACKWARD * (1 if index < 0 else gate_rounds.blocks)
        weights, errors = method.estimate(means, components.sizes())
        yield Round(weights, errors, means["output"], index + 1, cost, sums.reliability().cpu() if index > 0 else None)
