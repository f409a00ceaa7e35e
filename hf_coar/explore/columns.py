"""Reading attributions by component: a column, and one pass over the rows. Never the whole matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_coar.attributions import Attributions

Progress = Callable[[float, str], None]  # (fraction done, what is being done)


def no_progress(done: float, what: str) -> None:
    """For calls that nobody watches."""


def column(attributions: Attributions, component: int, of: str = "weights") -> Tensor:
    """One component's weights (or standard errors) over all examples, float32 [examples].

    The files are mapped, so that this reads one page of a file an example.
    """
    return torch.cat([part[:, component].float() for part in attributions.matrix(of).parts])


def sizes(attributions: Attributions, progress: Progress = no_progress) -> Tensor:
    """Every component's mean absolute weight over the examples, float32 [components]; one pass over the files."""
    n_components, done = len(attributions.components), 0
    total = torch.zeros(n_components)
    n_rows = max(1, 2**22 // n_components)  # 16 MB a block
    for part in attributions.matrix().parts:
        for block in part.split(n_rows):
            total += block.float().abs().sum(0)
            done += len(block)
            progress(done / len(attributions), f"reading example {done:,} of {len(attributions):,}")
    return total / done
