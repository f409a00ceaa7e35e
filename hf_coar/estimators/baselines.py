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

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Components
from hf_coar.errors import CoarError
from hf_coar.estimators import input_paths as gradients
from hf_coar.estimators.gate_passes import FORWARD_AND_BACKWARD, GatePasses
from hf_coar.runs import sampling
from hf_coar.runs.engine import Part, run
from hf_coar.runs.measuring import check_finite, measure
from hf_coar.runs.problem import Fit, Problem


class _Baseline:
    """What all of them share; the cost is that of one pass, for the bias, unless a subclass says otherwise."""

    name = ""

    def settings(self) -> dict:
        """What determines the numbers, for `run.json`."""
        return {"name": self.name, **asdict(self)}

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example."""
        return 1.0


@dataclass(frozen=True)
class _Masks:
    """Some masks in the order in which a baseline wants them; measured like `sampling.Masks`."""

    n_components: int
    count: int

    @property
    def ablated_fraction(self) -> float:
        """Of the masks that ablate something."""
        return 1 / self.n_components

    def rows(self, start: int, stop: int) -> Tensor:
        """Mask 0 keeps all, mask i + 1 all but component i; bool [stop - start, n_components]."""
        component = torch.arange(start, stop)[:, None] - 1
        return component != torch.arange(self.n_components)


def _measure(problem: Problem, count: int) -> tuple[Tensor, data_module.Identity]:
    masks = _Masks(len(problem.components), count)
    return measure(
        problem.store, problem.model, problem.data, problem.components, problem.output, masks, "singles",
        problem.progress,
    )  # fmt: skip


def _fit(weights: Tensor, complete: Tensor, identity: data_module.Identity) -> Fit:
    """The bias makes the prediction with everything in place the model's own output."""
    bias = complete.double() - weights.double().sum(1)
    return Fit(weights.float(), bias.float(), None, identity)


@dataclass(frozen=True)
class LeaveOneOut(_Baseline):
    """Ablate one component at a time: y(all) - y(all but i), exact. The cost is one pass a component, and one."""

    name = "leave_one_out"

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """Forward passes an example.

        Raises:
            CoarError: the number of components is not given.
        """
        if n_components is None:
            raise CoarError("the cost of LeaveOneOut depends on the number of components; give n_components")
        return n_components + 1.0

    def fit(self, problem: Problem) -> Fit:
        """Measure every component's own effect."""
        outputs, identity = _measure(problem, len(problem.components) + 1)
        return _fit((outputs[:1] - outputs[1:]).T, outputs[0], identity)


@dataclass(frozen=True)
class WeightNorm(_Baseline):
    """The Frobenius norm of every component's slice of its weight, the same for all examples."""

    name = "weight_norm"

    def fit(self, problem: Problem) -> Fit:
        """Read the norms off the weights."""
        outputs, identity = _measure(problem, 1)
        norms = torch.cat(list(weight_norms(problem.model, problem.components)))
        return _fit(norms.expand(outputs.shape[1], -1).clone(), outputs[0], identity)


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


@dataclass(frozen=True)
class RandomWeights(_Baseline):
    """Independent standard normal numbers, a pure function of the run's seed."""

    name = "random"

    def fit(self, problem: Problem) -> Fit:
        """Draw."""
        outputs, identity = _measure(problem, 1)
        n_components = len(problem.components)
        rows = [
            sampling.uniforms(problem.seed, sampling.BASELINES, example, 0, n_components)
            for example in range(outputs.shape[1])
        ]
        normal = torch.special.ndtri(torch.from_numpy(np.stack(rows)).double())
        return _fit(normal, outputs[0], identity)


@dataclass(frozen=True)
class GradientTimesParameter(_Baseline):
    """Σ of ∂y/∂θ · θ over a component's slice of the weight: the derivative of the output to its gate at 1.

    With a gate g on the slice, y(g θ) has the derivative Σ ∂y/∂θ · θ at g = 1, for every example from one backward.
    """

    name = "gradient_times_parameter"

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """One forward and backward pass."""
        return FORWARD_AND_BACKWARD

    def fit(self, problem: Problem) -> Fit:
        """Differentiate.

        Raises:
            ModelError: no gradient reaches the gates.
        """
        passes = GatePasses(problem.model, problem.components, problem.output)

        def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            device = next(iter(batch.values())).device
            passes.begin_batch()
            values, weights = passes(batch, torch.ones(data_module.size(batch), len(problem.components), device=device))
            check_finite(values, first, "no mask", problem.output)
            return {"weights": weights.cpu(), "outputs": values.cpu()}

        return _computed(problem, compute, "gradients", self.cost(problem.ablated_fraction))


def _computed(problem: Problem, compute: Callable, kind: str, cost: float) -> Fit:
    part = Part(kind, 0, 1, cost)
    count = run(problem.store, problem.model, problem.data, [part], compute, kind, problem.progress)
    results = problem.store.gather(part.name, count)
    return _fit(results["weights"], results["outputs"], data_module.Identity.of(results))


@dataclass(frozen=True)
class _AlongThePath(_Baseline):
    """Riemann sums (midpoints) along the straight path of the input from zero to the example.

    Token models walk from zero to their embeddings, others from zero to their floating-point inputs. A component's
    activations are the features that its slice produces (or, for input features, that it reads), with the bias.

    Attributes:
        n_steps: midpoints on the path.
    """

    n_steps: int = 16

    def __post_init__(self) -> None:
        """Check the steps."""
        if isinstance(self.n_steps, bool) or not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise CoarError(f"{type(self).__name__}(n_steps={self.n_steps!r}): must be a whole number, at least 1")

    def _weights(self, path: gradients.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def fit(self, problem: Problem) -> Fit:
        """Walk.

        Raises:
            CoarError: activations that cannot be watched, or inputs that are not on a line.
            ModelError: no gradient reaches the activations.
        """
        gradients.check_watchable(problem.components)

        def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
            rows, outputs = [], []
            for example in range(data_module.size(batch)):
                one = data_module.rows(batch, example, example + 1)
                path = gradients.InputPath(problem.model, problem.components, problem.output, one, self.n_steps)
                weights, complete = self._weights(path, problem.components)
                check_finite(complete, first + example, "no mask", problem.output)
                rows.append(weights.cpu())
                outputs.append(complete.cpu())
            return {"weights": torch.stack(rows), "outputs": torch.cat(outputs)}

        return _computed(problem, compute, self.name.replace("_", ""), self.cost(problem.ablated_fraction))


@dataclass(frozen=True)
class NeuronConductance(_AlongThePath):
    """Σ over a component's activations h of ∫ ∂y/∂h · ∂h/∂t dt along the path (Dhamdhere, Sundararajan, Yan 2018).

    In every step ∂h/∂t dt is the difference of h between the ends of the step (Shrikumar, Su, Kundaje 2018), and ∂y/∂h
    is taken at its middle. Over all activations of a layer through which everything passes, the sum is
    y(input) - y(0).
    """

    name = "neuron_conductance"

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """A forward and backward pass, and two forward passes, a step; and one."""
        return (FORWARD_AND_BACKWARD + 2) * self.n_steps + 1

    def _weights(self, path: gradients.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        before, after = path.activations(0.0), path.activations(1.0)
        slopes = path.gradients()
        found = []
        for group, start, end, slope in zip(components.groups, before, after, slopes, strict=True):
            parts = zip(start, end, slope, strict=True)
            found.append(gradients.total([(b - a) * g for a, b, g in parts], group))
        return torch.cat(found), path.complete()


@dataclass(frozen=True)
class InternalInfluence(_AlongThePath):
    """Σ over a component's activations h of ∫ ∂y/∂h dt along the path (Leino, Sen, Datta, Fredrikson, Li 2018)."""

    name = "internal_influence"

    def cost(self, ablated_fraction: float, n_components: int | None = None) -> float:
        """A forward and backward pass a step; and one forward pass."""
        return FORWARD_AND_BACKWARD * self.n_steps + 1

    def _weights(self, path: gradients.InputPath, components: Components) -> tuple[Tensor, Tensor]:
        slopes = zip(components.groups, path.gradients(), strict=True)
        found = [gradients.total(slope, group) / path.n_steps for group, slope in slopes]
        return torch.cat(found), path.complete()


BASELINES: dict[str, type[_Baseline]] = {
    baseline.name: baseline
    for baseline in (
        LeaveOneOut,
        GradientTimesParameter,
        NeuronConductance,
        InternalInfluence,
        WeightNorm,
        RandomWeights,
    )
}
