"""Outlier components: a handful that carry most of their layer, and whose loss changes what the model is.

Language models keep massive activations in a few channels (Sun, Chen, Kolter, Liu 2024), and a row that feeds one of
them is unlike any other component: without it the output collapses. In random gate paths a few such rows make nearly
all of the noise, and passes in which one is half off tell little of the others. So they are found beforehand by their
energy, stay in place in all rounds, and get their exact differences, one forward pass each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.estimators.gates import GatePasses

# A row that carries a fiftieth of its layer's energy, hundreds of times as much as the median of enough rows.
_SHARE, _TIMES_MEDIAN, _ROWS = 0.02, 300.0, 32


@dataclass(frozen=True)
class Outliers:
    """The outliers of some examples, each its own.

    Attributes:
        indices: int64 [examples, most], components; -1 where an example has fewer.
        effects: float32 [examples, most], output with everything in place minus output without the component.
        unablated: float32 [examples], the output with everything in place.
    """

    indices: Tensor
    effects: Tensor
    unablated: Tensor

    def mask(self, n_components: int) -> Tensor:
        """True for outliers, bool [examples, components]."""
        return mask(self.indices, n_components)


def into(weights: Tensor, errors: Tensor, indices: Tensor, effects: Tensor) -> None:
    """Write effects of `Outliers` into weights [examples, components], and 0 into their standard errors, in place."""
    rows, places = (indices >= 0).nonzero(as_tuple=True)
    columns = indices[rows, places]
    weights[rows, columns] = effects[rows, places]
    errors[rows, columns] = 0.0


def find(passes: GatePasses, batch: data_module.Batch, most: int) -> Outliers:
    """The outliers of every example of a batch, at most `most`, with their effects.

    Costs one forward pass an example, and one for every outlier.
    """
    outputs, indices = located(passes, batch, most)
    return Outliers(indices, _effects(passes, batch, outputs, indices), outputs)


def mask(indices: Tensor, n_components: int) -> Tensor:
    """True for components that are listed for an example, bool [examples, components]; -1 lists none."""
    found = torch.zeros(len(indices), n_components + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(1, indices.where(indices >= 0, n_components), True)[:, :-1]


def located(passes: GatePasses, batch: data_module.Batch, most: int) -> tuple[Tensor, Tensor]:
    """Which they are, those furthest above their layer's median first; one forward pass an example.

    Returns:
        Outputs with everything in place, float32 [examples], and components, int64 [examples, most]; -1 for none.
    """
    outputs, energies = passes.energies(batch)
    ratios = []
    for of_layer in energies.split(passes.masked.components.sizes(), dim=1):
        median = of_layer.median(dim=1, keepdim=True).values
        outlying = (of_layer > _SHARE * of_layer.sum(1, keepdim=True)) & (of_layer > _TIMES_MEDIAN * median)
        outlying &= (median > 0) & (of_layer.shape[1] >= _ROWS)
        ratios.append(torch.where(outlying, of_layer / median, 0.0))
    values, indices = torch.cat(ratios, dim=1).topk(min(most, energies.shape[1]), dim=1)
    return outputs, indices.where(values > 0, -1)


@torch.no_grad()
def _effects(passes: GatePasses, batch: data_module.Batch, outputs: Tensor, indices: Tensor) -> Tensor:
    effects = torch.zeros(indices.shape, device=indices.device)
    for place in range(indices.shape[1]):
        rows = (indices[:, place] >= 0).nonzero().flatten()
        if not len(rows):
            break
        some = data_module.take(batch, rows)
        kept = torch.ones(len(rows), len(passes.masked), dtype=torch.bool)
        kept[torch.arange(len(rows)), indices[rows, place].cpu()] = False
        with passes.masked.ablated(kept, how="hooks"):
            values = passes.output.of(passes.masked.model, some)
        effects[rows, place] = outputs[rows] - values
    return effects
