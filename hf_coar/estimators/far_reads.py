"""Far reads: the strongest components read once more, while all gates go from 1 to a half together.

Strong sets take the model where components count for something else, see `attributions.far`. Three passes along the
diagonal of the gates tell what: `scripts/benchmark_rivals.py` and `benchmark_forecasts.py` have forecasts of strong and
of large sets beside those of the weights alone. To a half is better than to 0.7 or to nothing at all, where most
networks are in a state that no set of anybody's leads to. Only the components that strong sets may hold are kept, which
loses nothing; of the others a ratio is.
"""

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.attributions.far import Far
from hf_coar.estimators import flips, outliers
from hf_coar.estimators.gates import NODES, GateRounds
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD
from hf_coar.runs.engine import Part
from hf_coar.runs.problem import Estimates, Problem, Size

_REACH = 0.5
_TIMES, _MOST = 4, 1024  # components by those that the fraction ablates; half as many forecast strong sets less well
_FURTHEST = 0.25  # ablated fraction up to which the end of the way is anything new


def is_far(ablated_fraction: float) -> bool:
    """Whether there is anything between that fraction and the end of the way."""
    return ablated_fraction <= _FURTHEST


def cost(avoids_outliers: bool) -> float:
    """Forward passes an example: `NODES` gate passes, and one to see which components are outliers."""
    return FORWARD_AND_BACKWARD * NODES + avoids_outliers


def parts(size: Size, avoids_outliers: bool) -> list[Part]:
    """All passes are one part."""
    return [Part("far", 0, NODES, cost(avoids_outliers), 2 * _number(size), differentiates=True)]


def _number(size: Size) -> int:
    return min(size.n_components, _MOST, max(1, round(_TIMES * size.ablated_fraction * size.n_components)))


def read(problem: Problem, gates: GateRounds, estimates: Estimates, max_outliers: int) -> Far:
    """Effects on the way to half a model; outliers, without which there is none, stay in place and keep their weights.

    Args:
        problem: whose examples are read.
        gates: that make the passes.
        estimates: of the weights.
        max_outliers: of an example.
    """
    indices = flips.strongest(estimates.weights, estimates.errors, _number(problem.size))

    def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        gates.passes.begin_batch()
        apart = None
        if max_outliers:
            _, found = outliers.located(gates.passes, batch, max_outliers)
            apart = outliers.mask(found, gates.n_components)
        examples = range(first, first + data_module.size(batch))
        reads = gates.along(batch, examples, _REACH, apart)[:, indices.to(data_module.device_of(batch))]
        stayed = torch.zeros_like(reads) if apart is None else apart[:, indices.to(reads.device)].to(reads.dtype)
        return {"effects": reads, "stayed": stayed}

    found = problem.compute(parts(problem.size, bool(max_outliers)), compute, "far reads")
    weights = estimates.of(indices).weights
    return Far.of(indices, torch.where(found["stayed"] > 0, weights, found["effects"]), _REACH, weights)
