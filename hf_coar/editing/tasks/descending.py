"""Fine-tuning, as the rival and the figures of an edit mean it: Adam on all parameters of a copy of the model."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

RATES = (1e-5, 1e-4, 1e-3, 5e-3)


def steps(model: nn.Module, losses: Callable[[nn.Module], Iterable[Tensor]], rate: float) -> Iterator[int]:
    """Changes a model step by step, and says after each how many it were; it never ends by itself.

    Normalisation keeps its statistics, as the model is put into evaluation mode: a few examples would spoil them.

    Args:
        model: to be changed.
        losses: scalars that add up to what is descended; their graphs are freed one by one.
        rate: of Adam, such as one of `RATES`.
    """
    parameters = [one.requires_grad_() for one in model.eval().parameters() if one.is_floating_point()]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    count = 0
    while True:
        optimiser.zero_grad()
        with torch.enable_grad():
            for loss in losses(model):
                loss.backward()
        optimiser.step()
        count += 1
        yield count
