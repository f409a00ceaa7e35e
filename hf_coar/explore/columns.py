"""Reading attributions by component: a column, some entries, and one pass over the rows. Never the whole matrix."""

from collections.abc import Callable, Sequence

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


def entries(attributions: Attributions, rows: Sequence[int], components: Tensor, of: str = "weights") -> Tensor:
    """Some components' weights of some examples, float32 [rows, components]."""
    parts, found = attributions.matrix(of).parts, torch.empty(len(rows), len(components))
    for place, row in enumerate(rows):
        for part in parts:
            if row < len(part):
                found[place] = part[row][components].float()
                break
            row -= len(part)
    return found


def sums(
    attributions: Attributions, rows: Sequence[int], components: Tensor, squares_of_errors: bool = False
) -> Tensor:
    """The sum over components of some examples' weights (or of their squared standard errors), float32 [rows]."""
    of, found = ("standard_errors" if squares_of_errors else "weights"), torch.zeros(len(rows))
    for start in range(0, len(components), 4096):
        part = entries(attributions, rows, components[start : start + 4096], of)
        found += (part.square() if squares_of_errors else part).sum(1)
    return found


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
