"""Whole layers: sets that take most of a layer are of another kind than random ones and an example's strongest.

Of the whole layers of the demo, a small ViT and a small GPT-2, one by one, .76 to .84 were inside intervals of 95 %
that the other two kinds had taught, of some none (one seed each). So fresh sets hold layers as well, which have a
factor of their own, and sets that are mostly such layers take it. An example's strongest components, which are checked
by themselves, may take all of a thin layer and much else beside it: with that factor intervals of the demo's were two
thirds wider, and held no better.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_coar.components import Components

OF_LAYER, CROWDED, OF_SET, _A_LAYER = 0.75, 3, 0.5, 8


class Layer(NamedTuple):
    """A group of components that counts as a layer: neither a few of them nor all.

    Attributes:
        module: whose they are.
        start: the first of them.
        stop: the one after the last.
    """

    module: str
    start: int
    stop: int


def layers_of(components: Components) -> list[Layer]:
    """All layers that count."""
    found, start = [], 0
    for group in components.groups:
        if _A_LAYER <= group.size < len(components):
            found.append(Layer(group.module, start, start + group.size))
        start += group.size
    return found


def taken(layers: list[Layer], kept: Tensor) -> Tensor:
    """Which sets take most of a layer, far more of it than of all that is not in it, and are mostly that.

    Args:
        layers: of `layers_of`.
        kept: float32 [masks, components].

    Returns:
        bool [masks, layers].
    """
    gone = 1 - kept
    if not layers:
        return torch.zeros(len(gone), 0, dtype=torch.bool)
    all_gone, sizes = gone.sum(1, keepdim=True), torch.tensor([layer.stop - layer.start for layer in layers])
    here = torch.stack([gone[:, layer.start : layer.stop].sum(1) for layer in layers], dim=1)
    elsewhere = (all_gone - here) / (gone.shape[1] - sizes)
    found = (here >= OF_LAYER * sizes) & (here >= CROWDED * elsewhere * sizes)
    return found & ((here * found).sum(1, keepdim=True) >= OF_SET * all_gone)
