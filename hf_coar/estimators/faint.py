"""Faint modules: those that matter although next to nothing of it arrives at their gates.

A router that sends every token to the best expert, or an index of the positions that are attended to, makes a hard
choice: what it does is a step, and has no slope. Neither has the size of what is normalised later on. Where a little
arrives all the same, by rounding or by a weight beside the choice, the module looks reached and its components as if
they did nothing. So modules whose reads are faint beside those of others are ablated for a try, half of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.components import Group
from hf_coar.estimators.gates import GateRounds
from hf_coar.models import failing, is_out_of_memory
from hf_coar.runs.problem import Problem

_FAINT = 0.01  # of what the strongest component of the median module does
_FRACTION = 0.05  # at which modules are read where none is chosen yet
# What half of a faint module does, in what its reads say, and in what the strongest component of the median module
# does. Tried on tiny random architectures of timm and transformers: routers and indexers are found, and little else.
_UNTOLD, _MATTERS = 10, 0.5


def reads(problem: Problem, batch: data_module.Batch) -> Tensor | None:
    """What one gate pass says of a few examples, float32 [examples, components]; None where it says nothing.

    Args:
        problem: a first look at it.
        batch: a few examples, on the model's device.
    """
    gates = GateRounds(problem.masked, problem.output, problem.ablated_fraction or _FRACTION, problem.seed)
    gates.passes.begin_batch()
    try:
        return gates.single(batch, range(data_module.size(batch))).soft.cpu()
    except failing.RAISED as error:  # a run has other gates, and says what is wrong
        if is_out_of_memory(error):
            raise
        return None


def found(problem: Problem, batch: data_module.Batch, reads: Tensor) -> list[Group]:
    """The groups that matter, and of which the gates tell next to nothing; as a rule without another pass.

    Args:
        problem: a first look at it.
        batch: a few examples, on the model's device.
        reads: of these, float32 [examples, components].
    """
    masked = problem.masked
    sizes = masked.components.sizes()
    by_group = reads.split(sizes, dim=1)
    strongest = torch.stack([of_group.abs().max() for of_group in by_group])
    typical = float(strongest.median())
    faint = [number for number in range(len(sizes)) if strongest[number] < _FAINT * typical]
    if not faint:
        return []
    with torch.no_grad():
        whole = problem.output.of(problem.model, batch)

        def untold(numbers: Sequence[int]) -> list[int]:
            """Those that matter, by halves: many faint modules do little together, and one pass says so of all."""
            with masked.ablated(_halved(sizes, numbers)):
                lost = float((whole - problem.output.of(problem.model, batch)).abs().mean())
            if not lost > _MATTERS * typical:
                return []
            if len(numbers) > 1:
                middle = len(numbers) // 2
                return untold(numbers[:middle]) + untold(numbers[middle:])
            told = float(by_group[numbers[0]][:, ::2].abs().sum(1).mean())
            return list(numbers) if lost > _UNTOLD * told else []

        return [masked.components.groups[number] for number in untold(faint)]


def warning(groups: Sequence[Group], n_groups: int) -> str:
    """What a person must know, and do."""
    names = ", ".join(group.module or group.parameter for group in groups[:4]) + (" …" if len(groups) > 4 else "")
    return (
        f"next to nothing of what {len(groups)} of {n_groups} modules do arrives at their gates ({names}), as behind a "
        "hard choice or a normalisation: their weights say that they do nothing, and they matter; leave them out with "
        "find_components(model, exclude=[…]), or attribute them by themselves, with include=[…] and "
        "method=hf_coar.baselines.LeaveOneOut()"
    )


def _halved(sizes: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """The mask that ablates every other component of some groups, from the first on, bool [components]."""
    kept = [torch.ones(size, dtype=torch.bool) for size in sizes]
    for number in numbers:
        kept[number][::2] = False
    return torch.cat(kept)
