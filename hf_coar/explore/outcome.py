"""What a model says of some examples: outputs, predicted classes or tokens, probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_coar.models import outputs

_MOST_LIKELY = 5  # classes or tokens that are kept with their probabilities


@dataclass(frozen=True)
class Outcome:
    """What the model says of some examples."""

    outputs: Tensor  # float32 [examples], the output that was attributed
    classes: Tensor | None  # int64 [examples], the classes predicted; None where an example has none as a whole
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # the most likely classes (or tokens at the end)
    tokens: list[Tensor] = field(default_factory=list)  # predicted at positions, int64 [targets] an example
    targets: list[Tensor] = field(default_factory=list)  # what was to be predicted there, like `tokens`
    places: list[Tensor] = field(default_factory=list)  # the positions of the targets, like `tokens`

    @classmethod
    def joined(cls, parts: Sequence["Outcome"]) -> "Outcome":
        """One after the other."""
        classes = None if parts[0].classes is None else torch.cat([part.classes for part in parts])
        lists = ([one for part in parts for one in getattr(part, name)] for name in _LISTS)
        return cls(torch.cat([part.outputs for part in parts]), classes, *lists)

    @classmethod
    def of(
        cls, logits: Tensor | None, values: Tensor, batch: Mapping[str, Any], alignment: str | None = None
    ) -> "Outcome":
        """From logits [examples, classes], or of positions [examples, positions, classes], and the outputs [examples].

        Whatever else a model gives (a number, a picture, boxes) leaves the outputs alone.
        """
        if logits is not None and alignment is not None and logits.dim() == 3:
            return cls(values, None, *_at_positions(logits, batch, alignment))
        labels = batch.get("labels")
        no_class = isinstance(labels, Tensor) and (labels.is_floating_point() or labels.dim() != 1)
        if logits is None or alignment is not None or logits.dim() != 2 or logits.shape[1] < 2 or no_class:
            return cls(values, None, [[] for _ in values])
        return cls(values, logits.argmax(-1).cpu(), _top(logits.softmax(-1).cpu()))

    def at(self, place: int) -> "Outcome":
        """The outcome of one of the examples alone."""
        stretch = slice(place, place + 1)
        classes = None if self.classes is None else self.classes[stretch]
        return Outcome(self.outputs[stretch], classes, *(getattr(self, name)[stretch] for name in _LISTS))


_LISTS = ("top", "tokens", "targets", "places")  # with one entry an example


def _at_positions(logits: Tensor, batch: Mapping[str, Any], alignment: str) -> tuple[list, ...]:
    """The most likely at the end, what is predicted, what was to be, and where, of every example."""
    said, targets, real = outputs.aligned(logits, batch, alignment)
    moved = logits.shape[1] - said.shape[1]  # what follows a text comes after its last target
    last = real.long().cumsum(1).argmax(1) + moved
    ends = logits[torch.arange(len(logits), device=logits.device), last]
    rows = [
        (said[i].argmax(-1)[real[i]], targets[i][real[i]], real[i].nonzero()[:, 0] + moved) for i in range(len(real))
    ]
    return _top(ends.softmax(-1).cpu()), *([row[part].cpu() for row in rows] for part in range(3))


def _top(probabilities: Tensor) -> list[list[tuple[int, float]]]:
    values, indices = probabilities.topk(min(_MOST_LIKELY, probabilities.shape[-1]), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
