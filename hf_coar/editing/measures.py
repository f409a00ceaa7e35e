"""Ready-made measures of a model on validation examples, and constraints on them.

A measure is a function (model) -> float. A constraint is one too (at least 0, or True, = satisfied), or one of
`Keep`, `AtMost`, `AtLeast`::

    others, bags = editing.accuracy(validation, keep_others), editing.accuracy(validation, bag_indices)
    coar.edit(
        model, attributions, decrease=bags_attributed, rule="auto",
        validation=others, constraint=editing.AtMost(bags, 0.05),
    )

Examples are read once and kept in memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.models import outputs, tasks

Measure = Callable[[nn.Module], float]

MARGIN = 1.0  # standard errors that constraints on means keep from their limit


@dataclass(frozen=True)
class MeanOver:
    """The mean of one number an example, as a measure that knows how certain it is.

    Attributes:
        each: (model) -> float32 [examples].
    """

    each: Callable[[nn.Module], Tensor]

    def __call__(self, model: nn.Module) -> float:
        """The mean."""
        return float(self.each(model).mean())


def _lower_bound(values: Tensor, errors: float) -> float:
    """The mean less so many standard errors; of one example the value itself."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()) - errors * error


def _read(data: Any, indices: Sequence[int] | Tensor | None) -> list[data_module.Batch]:
    """The chosen examples in batches, decoded."""
    batches = [data_module.as_batch(batch) for batch in data_module.batches(data)]
    if indices is None:
        return batches
    n_examples = sum(data_module.size(batch) for batch in batches)
    wanted = data_module.numbers(indices, n_examples)
    outside = [index for index in wanted if not 0 <= index < n_examples]
    if outside or not wanted:
        raise CoarError(f"indices {outside[:8] or '[]'}: give one or more from 0 to {n_examples - 1}")
    return data_module.some(batches, torch.tensor(sorted(set(wanted))))


def _outputs(
    model: nn.Module, batches: Sequence[data_module.Batch], output: "str | outputs.Output | outputs.OutputFunction"
) -> tuple[Tensor, outputs.Output]:
    """Float32 [examples], and the output as the model's task has it."""
    device, found = models.device_of(model), []
    bound = tasks.bind(model, output, batch=batches[0])
    with models.frozen(model), torch.no_grad():
        for batch in batches:
            found.append(bound.of(model, data_module.to_device(batch, device)).cpu())
    return torch.cat(found), bound


def _right(model: nn.Module, batches: Sequence[data_module.Batch]) -> Tensor:
    """Which examples the model gets right, by the default output of its task: 0 or 1, float32 [examples].

    Raises:
        CoarError: the task knows no right and wrong.
        NonFiniteOutputError: of some examples the model makes no number.
    """
    values, output = _outputs(model, batches, tasks.AUTO)
    if bad := int((~values.isfinite()).sum()):
        raise NonFiniteOutputError(
            f"{output.name!r} of {bad} of {len(values)} examples is NaN or infinite, which is neither right nor wrong; "
            "where the model as it was gives numbers, ablate less, or let something else stand in "
            "(find_components(…, ablation=…))"
        )
    if output.boundary is None:
        raise CoarError(
            f"no value of {output.name!r} says that {type(models.wrapped(model)).__name__} is right; use "
            "editing.mean_output(data, output)"
        )
    return (values > output.boundary).float()


def accuracy(data: Any, indices: Sequence[int] | Tensor | None = None) -> Measure:
    """Measures the share of examples that a model gets right, from 0 to 1.

    Right is what lies above the boundary of the default output of the model's task, such as a margin above 0.

    Args:
        data: as for `attribute`, with labels.
        indices: of the examples that count; all of them by default.

    Raises:
        CoarError: no examples, or a task without right and wrong.
    """
    batches = _read(data, indices)
    return MeanOver(lambda model: _right(model, batches))


def worst_accuracy(data: Any, groups: Sequence[int] | Tensor) -> Measure:
    """Measures the accuracy of the group that fares worst, from 0 to 1.

    Args:
        data: as for `attribute`, with labels.
        groups: the number of every example's group, in the order of the data.

    Raises:
        CoarError: not one number an example.
    """
    batches, groups = _read(data, None), torch.as_tensor(groups)
    n_examples = sum(data_module.size(batch) for batch in batches)
    if groups.shape != (n_examples,):
        raise CoarError(f"groups have shape {tuple(groups.shape)} for {n_examples} examples; give each its group")

    def measure(model: nn.Module) -> float:
        right = _right(model, batches)
        return min(float(right[groups == group].mean()) for group in groups.unique())

    return measure


def mean_output(
    data: Any, output: "str | outputs.Output | outputs.OutputFunction", indices: Sequence[int] | Tensor | None = None
) -> Measure:
    """Measures the mean of an output over examples, in its unit.

    Args:
        data: as for `attribute`.
        output: a name, or a function (logits, batch) -> [examples].
        indices: of the examples that count; all of them by default.

    Raises:
        CoarError: an unknown output, or no examples.
    """
    function = tasks.AUTO if output == tasks.AUTO else outputs.get(output)
    batches = _read(data, indices)
    return MeanOver(lambda model: _outputs(model, batches, function)[0])


@dataclass(frozen=True)
class Keep:
    """Constraint: a measure falls by no more than `within` from what it was before the edit.

    Of means over examples (`accuracy`, `mean_output`) the fall and `errors` of its standard errors count, example by
    example: with few examples an edit may look harmless by luck.
    """

    measure: Measure
    within: float
    errors: float = MARGIN

    def bind(self, model: nn.Module) -> Measure:
        """The slack, at least 0 = satisfied, as a function of the edited model; `model` is the one before the edit."""
        if isinstance(self.measure, MeanOver):
            before = self.measure.each(model)
            return lambda edited: _lower_bound(self.measure.each(edited) - before, self.errors) + self.within
        least = float(self.measure(model)) - self.within
        return lambda edited: float(self.measure(edited)) - least


@dataclass(frozen=True)
class AtMost:
    """Constraint: a measure is no more than `bound` after the edit; of means with `errors` standard errors to spare."""

    measure: Measure
    bound: float
    errors: float = MARGIN

    def bind(self, model: nn.Module) -> Measure:
        """The slack, at least 0 = satisfied, as a function of the edited model."""
        if isinstance(self.measure, MeanOver):
            return lambda edited: self.bound + _lower_bound(-self.measure.each(edited), self.errors)
        return lambda edited: self.bound - float(self.measure(edited))


@dataclass(frozen=True)
class AtLeast:
    """Constraint: a measure is no less than `bound` after the edit; of means with `errors` standard errors to spare."""

    measure: Measure
    bound: float
    errors: float = MARGIN

    def bind(self, model: nn.Module) -> Measure:
        """The slack, at least 0 = satisfied, as a function of the edited model."""
        if isinstance(self.measure, MeanOver):
            return lambda edited: _lower_bound(self.measure.each(edited), self.errors) - self.bound
        return lambda edited: float(self.measure(edited)) - self.bound
