"""Many masks in a row on one model: what `ablate` looks up and checks for every mask is done once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.masking import weights
from hf_coar.masking.ablation import ablate


class Repeated:
    """`ablate`, prepared for one model and its components: `with repeated(kept): model(**batch)`, mask after mask.

    Weights that can simply be zeroed are; for any other model every mask goes through `ablate`. A model must not be
    moved or get new parameters in between.
    """

    def __init__(self, model: nn.Module, components: Components) -> None:
        """Find the slices.

        Raises:
            ModelMismatchError: the components are not this model's.
        """
        self._model, self._components = model, components
        tensors = weights.handles(model, components)
        self._tensors = [tensor.data for tensor in tensors]
        self._simple = all(
            group.by_weights != "never" and group.stack_axis is None and not tensor.is_meta
            and weights._normalised(model, group) is None
            for group, tensor in zip(components.groups, tensors, strict=True)
        )  # fmt: skip
        self._bounds = np.cumsum([0, *components.sizes()])
        self._places = np.concatenate([np.arange(size) for size in components.sizes()])

    def __call__(self, kept: Tensor) -> AbstractContextManager[None]:
        """Inside the block the components are ablated for which `kept`, bool [components], is False."""
        return self._zeroed(kept) if self._simple else ablate(self._model, self._components, kept)

    @contextmanager
    def _zeroed(self, kept: Tensor) -> Iterator[None]:
        undo: list[tuple[Tensor, int, Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for weight, axis, rows in self._rows(kept):
                    undo.append((weight, axis, rows, weight.index_select(axis, rows)))
                    weight.index_fill_(axis, rows, 0)
            yield
        finally:
            with torch.no_grad():
                for weight, axis, rows, saved in reversed(undo):
                    weight.index_copy_(axis, rows, saved)

    def _rows(self, kept: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(weight, axis, rows to zero) of every group with an ablated component."""
        ablated = np.flatnonzero(~kept.cpu().numpy())
        places = torch.from_numpy(self._places[ablated])
        sent: dict[torch.device, Tensor] = {}  # one transfer a device, not one a group
        cuts = np.searchsorted(ablated, self._bounds).tolist()
        for group, weight, low, high in zip(self._components.groups, self._tensors, cuts, cuts[1:], strict=False):
            if low == high:
                continue
            if weight.device not in sent:
                sent[weight.device] = places.to(weight.device)
            rows = sent[weight.device][low:high]
            if group.block > 1:
                rows = (rows[:, None] * group.block + torch.arange(group.block, device=rows.device)).flatten()
            yield weight, group.axis, rows
