"""What a model makes of some examples: outputs, logits and the features that its last layer reads, from one pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import NonFiniteOutputError
from hf_coar.estimators.gates import GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import calling, tasks
from hf_coar.models.outputs import Output
from hf_coar.runs import hints, preflight


@dataclass(frozen=True)
class Seen:
    """One pass over some examples.

    Attributes:
        values: the output, float32 [examples].
        logits: float32 [examples, classes]; None where the model has no such logits.
        features: what the last linear layer reads, float32 [examples, features]; None where there is none.
    """

    values: Tensor
    logits: Tensor | None
    features: Tensor | None


WHOLE = "with nothing ablated", "look at what the example holds, leave it out, or try a higher precision"
EDITED = (
    "after the edit",
    "a layer may divide by what is gone: let something else stand in (find_components(…, ablation=…)), or leave out "
    "such components (exclude=…)",
)


def check_finite(seen: Seen, output: Output, numbers: Tensor | None = None, state: tuple[str, str] = EDITED) -> None:
    """Refuses NaN and infinity, which are neither right nor wrong, and of which no mean is one.

    Args:
        seen: what a model makes of some examples.
        output: that it was looked at by.
        numbers: of these examples in the data set, int64 [examples]; None where they are of pairs.
        state: of the model, `WHOLE` or `EDITED`: in words, and what to do.

    Raises:
        NonFiniteOutputError: some outputs are no numbers; says of which examples.
    """
    bad = (~seen.values.isfinite()).nonzero()[:, 0]
    if len(bad):
        which = "of a pair" if numbers is None else f"of example {int(numbers[bad[0]])}"
        more = f" (and of {len(bad) - 1} more it is no number)" if len(bad) > 1 else ""
        raise NonFiniteOutputError(
            f"output {output.name!r} {which} is {float(seen.values[bad[0]])} {state[0]}{more}: {state[1]}"
        )


def last_linear(model: nn.Module, n_classes: int | None) -> str | None:
    """The name of the linear layer that gives the logits; None where no module is known to."""
    if n_classes is None:
        return None
    inside = {id(module) for head in models.output_modules(model) for module in head.modules()}
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named = [(name, module) for name, module in named if not inside or id(module) in inside]
    wide = [name for name, module in named if module.out_features == n_classes]
    return wide[-1] if wide else None


@contextmanager
def _caught(model: nn.Module, head: str | None) -> Iterator[list[Tensor]]:
    """The inputs of a module while the block runs."""
    found: list[Tensor] = []
    if head is None:
        yield found
        return
    handle = model.get_submodule(head).register_forward_pre_hook(lambda module, given: found.append(given[0]))
    try:
        yield found
    finally:
        handle.remove()


def _flat(features: Tensor) -> Tensor:
    """[examples, features]; of several positions, the mean."""
    return features.float() if features.dim() == 2 else features.float().flatten(1, -2).mean(1)


@dataclass(frozen=True)
class Looker:
    """How a model is looked at.

    Attributes:
        output: with a boundary between right and wrong, where the task has one.
        head: name of the last linear layer; None where there is none.
    """

    output: Output
    head: str | None

    @classmethod
    def of(
        cls, model: nn.Module, batch: data_module.Batch, output: Any = tasks.AUTO, names: Sequence[str] = ()
    ) -> "Looker":
        """By the task of the model, and a first look at a batch.

        Args:
            model: any module.
            batch: of examples.
            output: as for `attribute`.
            names: of the classes, as the data have them.

        Raises:
            CoarError: no such output, one that needs what the batch lacks, or a model that does not run on it.
        """
        device = models.device_of(model)
        bound = preflight.bound(model, [batch], output)
        few = data_module.to_device(data_module.rows(batch, 0, 1), device)
        with models.frozen(model), torch.no_grad():
            logits = _logits(bound.call(model, few), bound)
        if logits is not None:
            hints.tell_of_names(model, bound, logits, names)
        return cls(bound, last_linear(model, None if logits is None else logits.shape[1]))

    def look(self, model: nn.Module, batches: Sequence[data_module.Batch]) -> Seen:
        """All that the model makes of these."""
        device = models.device_of(model)
        values, logits, features = [], [], []
        with models.frozen(model), torch.no_grad():
            for batch in batches:
                moved = data_module.to_device(batch, device)
                with _caught(model, self.head) as caught:
                    found = self.output.call(model, moved)
                values.append(self.output(found, moved).cpu())
                if (some := _logits(found, self.output)) is not None:
                    logits.append(some.cpu())
                features += [_flat(one).cpu() for one in caught[-1:]]
        whole = len(values)
        return Seen(
            torch.cat(values),
            torch.cat(logits) if len(logits) == whole else None,
            torch.cat(features) if len(features) == whole else None,
        )

    def of_features(self, direction: Tensor, centre: Tensor) -> Output:
        """The output that is a linear function of the features: (features - centre) · direction."""

        def call(model: nn.Module, batch: data_module.Batch) -> Tensor:
            with _caught(model, self.head) as caught:
                self.output.call(model, batch)
            return _flat(caught[-1])

        def project(features: Tensor, batch: data_module.Batch) -> Tensor:
            return (features - centre.to(features)) @ direction.to(features)

        return Output("separability", "spreads of the class", project, takes="output", call=call)


def _logits(found: Any, output: Output) -> Tensor | None:
    """Logits of classes, float32 [examples, classes]."""
    if output.takes != "logits":
        return None
    logits = calling.logits_of(found)
    return logits.float() if logits.dim() == 2 and logits.shape[1] > 1 else None


def weights(
    masked: MaskedModel, output: Output, batches: Sequence[data_module.Batch], fraction: float, delta: bool = True
) -> Tensor:
    """How much every component contributes to an output now, from one pass: float32 [examples, components].

    What `PathGradient(rounds=0)` gives, kept in memory: an edit attributes a dozen times.

    Args:
        masked: the model with its components, some of them ablated.
        output: to attribute.
        batches: the examples.
        fraction: at which they are read.
        delta: as of `PathGradient`; without it a pass takes half the time.

    Raises:
        ModelError: no gradient reaches the gates.
        NonFiniteOutputError: the model gave NaN or infinity.
    """
    device, found, first = models.device_of(masked.model), [], 0
    with models.frozen(masked.model):
        gates = GateRounds(masked, output, fraction, 0, delta)
        for batch in batches:
            count = data_module.size(batch)
            gates.passes.begin_batch()
            found.append(gates.single(data_module.to_device(batch, device), range(first, first + count)).soft.cpu())
            first += count
    return torch.cat(found)
