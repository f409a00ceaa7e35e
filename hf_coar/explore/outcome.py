"""What a model says of some examples: outputs, predicted classes or tokens, probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_coar.models import outputs

_MOST_LIKELY = 5  # classes or tokens that are kept with their probabilities


@dataclass(frozen=True)
class Outcome:
    """What the model says of some examples."""

    outputs: Tensor  # float32 [examples], the output that was attributed
    classes: Tensor | None  # int64 [examples], the classes predicted; None for a language model
    top: list[list[tuple[int, float]]] = field(default_factory=list)  # the most likely classes (or next tokens)
    tokens: list[Tensor] = field(default_factory=list)  # that a language model predicts, int64 [positions] an example
    targets: list[Tensor] = field(default_factory=list)  # the tokens that were to be predicted, like `tokens`

    @classmethod
    def joined(cls, parts: Sequence["Outcome"]) -> "Outcome":
        """One after the other."""
        classes = None if parts[0].classes is None else torch.cat([part.classes for part in parts])
        return cls(
            torch.cat([part.outputs for part in parts]), classes, [top for part in parts for top in part.top],
            [t for part in parts for t in part.tokens], [t for part in parts for t in part.targets],
        )  # fmt: skip

    @classmethod
    def of(cls, logits: Tensor | None, values: Tensor, batch: Mapping[str, Tensor], of_tokens: bool) -> "Outcome":
        """From logits [examples, classes], or of tokens [examples, positions, vocabulary], and the outputs [examples].

        Whatever else a model gives (a number, a picture, boxes) leaves the outputs alone.
        """
        if logits is not None and logits.dim() == 2 and logits.shape[1] > 1 and not of_tokens:
            return cls(values, logits.argmax(-1).cpu(), _top(logits.softmax(-1).cpu()))
        if logits is None or logits.dim() != 3 or not of_tokens:
            return cls(values, None, [[] for _ in values])
        targets, real = outputs.next_tokens(logits, batch)
        best, last = logits[:, :-1].argmax(-1), real.long().cumsum(1).argmax(1)
        ends = logits[torch.arange(len(logits)), last.to(logits.device) + 1]
        tokens = [row[mask].cpu() for row, mask in zip(best, real, strict=True)]
        wanted = [row[mask].cpu() for row, mask in zip(targets, real, strict=True)]
        return cls(values, None, _top(ends.softmax(-1).cpu()), tokens, wanted)

    def at(self, place: int) -> "Outcome":
        """The outcome of one of the examples alone."""
        stretch = slice(place, place + 1)
        classes = None if self.classes is None else self.classes[stretch]
        return Outcome(self.outputs[stretch], classes, self.top[stretch], self.tokens[stretch], self.targets[stretch])


def _top(probabilities: Tensor) -> list[list[tuple[int, float]]]:
    values, indices = probabilities.topk(min(_MOST_LIKELY, probabilities.shape[-1]), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
