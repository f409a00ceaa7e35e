"""Baselines: what attributions are compared with. Methods like any other, for `attribute(method=baselines.…)`.

Each gives one weight an example and component, and a bias with which nothing ablated is predicted as it is. The paper's
Figure 1 compares COAR with five of them; random weights are the floor.

| method | weight of component i | cost |
|---|---|---|
| `LeaveOneOut` | y(all) - y(all but i) | n + 1 |
| `GradientTimesParameter` | Σ of ∂y/∂θ · θ over the slice | 3 |
| `NeuronConductance` | Σ of ∫ ∂y/∂h ∂h/∂t dt over its activations h | 5 a step |
| `InternalInfluence` | Σ of ∫ ∂y/∂h dt over its activations h | 3 a step |
| `WeightNorm` | Frobenius norm of the slice | 1 |
| `RandomWeights` | standard normal | 1 |
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Components
from hf_coar.errors import CoarError
from hf_coar.estimators import input_paths
from hf_coar.estimators.flips import one_by_one
from hf_coar.estimators.gates import GatePasses
from hf_coar.estimators.leave_one_out import LeaveOneOut  # noqa: F401 (a baseline, too)
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD, Estimator, is_whole, register, single_part
from hf_coar.runs import sampling
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import check_finite, parts_of
from hf_coar.runs.problem import Fit, Problem, Size


def _unablated(problem: Problem) -> Tensor:
    """Outputs with everything in place, float32 [examples]."""
    return problem.measure(one_by_one(len(problem.components), range(0)), "singles")[0]


def _fit(weights: Tensor, complete: Tensor) -> Fit:
    """The bias makes the prediction with everything in place the model's own output."""
    bias = complete.double() - weights.double().sum(1)
    return Fit(weights.float(), bias.float())


class _OnePass(Estimator):
    """A method that needs one forward pass, for the bias."""

    def parts(self, size: Size) -> list[Part]:
        """One pass with everything in place."""
        return parts_of(1, "singles")


@register("weight_norm")
@dataclass(frozen=True)
class WeightNorm(_OnePass):
    """The Frobenius norm of every component's slice of its weight, the same for all examples."""

    def fit(self, problem: Problem) -> Fit:
        """Read the norms off the weights."""
        outputs = _unablated(problem)
        norms = torch.cat(list(weight_norms(problem.model, problem.components)))
        return _fit(norms.expand(len(outputs), -1).clone(), outputs)


def weight_norms(model: nn.Module, components: Components) -> list[Tensor]:
    """Frobenius norms of the slices, float32 [size] for every group.

    Raises:
        CoarError: a weight is packed (quantised) and has no slices.
    """
    found = []
    for group in components.groups:
        weight = model.get_parameter(group.parameter) if _is_parameter(model, group.parameter) else None
        if weight is None or not weight.is_floating_point() or group.n_rows(weight.shape) != group.size * group.block:
            raise CoarError(f"the weight {group.parameter!r} is packed or derived, and has no norms; exclude it")
        rows = group.rows(weight.detach().float())
        squares = rows.flatten(1 if group.stack_axis is None else 2).square().sum(-1).flatten()
        found.append(squares.view(group.size, group.block).sum(1).sqrt().cpu())
    return found


def _is_parameter(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


@register("random")
@dataclass(frozen=True)
class RandomWeights(_OnePass):
    """Independent standard normal numbers, a pure function of the run's seed."""

    def fit(self, problem: Problem) -> Fit:
        """Draw."""
        outputs = _unablated(problem)
        n_components = len(problem.components)
        rows = [
            sampling.uniforms(problem.seed, sampling.BASELINES, example, 0, n_components)
            for example in range(len(outputs))
        ]
        normal = torch.special.ndtri(torch.from_numpy(np.stack(rows)).double())
        return _fit(normal, outputs)


@register("gradient_times_parameter")
@dataclass(frozen=True)
class GradientTimesParameter(Estimator):
    """Σ of ∂y/∂θ · θ over a component's slice of the weight: the derivative of the output to its gate at 1.

    With a gate g on the slice, y(g θ) has the derivative Σ ∂y/∂θ · θ at g = 1, for every example from one backward.
    """

    differentiates = True

    def parts(self, size: Size) -> list[Part]:
        """One forward and backward pass."""
        return single_part("gradients", FORWARD_AND_BACKWARD, size.n_components, True)

    def fit(self, problem: Problem) -> Fit:
        """Differentiate.

        Raises:
            ModelError: no gradient reaches the gates.
        """
        passes = GatePasses(problem.masked, problem.output)

        def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            device = data_module.device_of(batch)
            passes.begin_batch()
            values, weights = passes(batch, torch.ones(data_module.size(batch), len(problem.components), device=device))
            check_finite(values, first, "no mask", problem.output)
            return {"weights": weights.cpu(), "outputs": values.cpu()}

        return _computed(self, problem, compute)


def _computed(method: Estimator, problem: Problem, compute: Callable) -> Fit:
    results = problem.compute(method.parts(problem.size), compute, method.name.replace("_", " "))
    return _fit(results["weights"], results["outputs"])


@dataclass(frozen=True)
class _AlongThePath(Estimator):
    """Riemann sums (midpoints) along the straight path of the input from zero to the example.

    Token models walk from zero to their embeddings, others from zero to their floating-point inputs. A component's
    activations are the features that its slice produces (or, for input features, that it reads), with the bias.

    Attributes:
        n_steps: midpoints on the path.
    """

    n_steps: int = 16
    differentiates = True
    sizable = True

    def __post_init__(self) -> None:
        """Check the steps."""
        if not is_whole(self.n_steps, 1):
            raise CoarError(f"{type(self).__name__}(n_steps={self.n_steps!r}): must be a whole number, at least 1")

    def sized(self, passes: float, size: Size) -> "_AlongThePath":
        """With as many steps as can be afforded."""
        return self.largest("n_steps", 1, 1, passes, size)

    @abstractmethod
    def _weights(self, path: input_paths.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        """Weights of a step's examples."""

    def fit(self, problem: Problem) -> Fit:
        """Walk.

        Raises:
            CoarError: activations that cannot be watched, or inputs that are not on a line.
            ModelError: no gradient reaches the activations.
        """
        input_paths.check_watchable(problem.components)

        def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            rows, outputs = [], []
            for example in range(data_module.size(batch)):
                one = data_module.rows(batch, example, example + 1)
                path = input_paths.InputPath(problem.masked, problem.output, one, self.n_steps)
                weights, complete = self._weights(path, problem.components)
                check_finite(complete, first + example, "no mask", problem.output)
                rows.append(weights.cpu())
                outputs.append(complete.cpu())
            return {"weights": torch.stack(rows), "outputs": torch.cat(outputs)}

        return _computed(self, problem, compute)


@register("neuron_conductance")
@dataclass(frozen=True)
class NeuronConductance(_AlongThePath):
    """Σ over a component's activations h of ∫ ∂y/∂h · ∂h/∂t dt along the path (Dhamdhere, Sundararajan, Yan 2018).

    In every step ∂h/∂t dt is the difference of h between the ends of the step (Shrikumar, Su, Kundaje 2018), and ∂y/∂h
    is taken at its middle. Over all activations of a layer through which everything passes, the sum is
    y(input) - y(0).
    """

    def parts(self, size: Size) -> list[Part]:
        """A forward and backward pass, and two forward passes, a step; and one."""
        cost = (FORWARD_AND_BACKWARD + 2) * self.n_steps + 1
        return single_part("neuronconductance", cost, size.n_components, True)

    def _weights(self, path: input_paths.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        before, after = path.activations(0.0), path.activations(1.0)
        slopes = path.gradients()
        found = []
        for group, start, end, slope in zip(components.groups, before, after, slopes, strict=True):
            parts = zip(start, end, slope, strict=True)
            found.append(input_paths.total([(b - a) * g for a, b, g in parts], group))
        return torch.cat(found), path.complete()


@register("internal_influence")
@dataclass(frozen=True)
class InternalInfluence(_AlongThePath):
    """Σ over a component's activations h of ∫ ∂y/∂h dt along the path (Leino, Sen, Datta, Fredrikson, Li 2018)."""

    def parts(self, size: Size) -> list[Part]:
        """A forward and backward pass a step; and one forward pass."""
        cost = FORWARD_AND_BACKWARD * self.n_steps + 1
        return single_part("internalinfluence", cost, size.n_components, True)

    def _weights(self, path: input_paths.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        slopes = zip(components.groups, path.gradients(), strict=True)
        found = [input_paths.total(slope, group) / path.n_steps for group, slope in slopes]
        return torch.cat(found), path.complete()
