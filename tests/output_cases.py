"""What every registered output takes: six examples of it, made up, in tensors whose first axis is the example."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

N = 6


@dataclass
class Given:
    """What a model returned, and its batch.

    Attributes:
        tensors: of what it returned, first axis = example.
        batch: of the examples.
        join: makes of the tensors what the output takes; the first of them by default.
        right: what, added to the tensors of these names, makes the right answer likelier.
    """

    tensors: dict[str, Tensor]
    batch: dict[str, Any]
    join: Callable[[dict[str, Tensor]], Any] = lambda tensors: next(iter(tensors.values()))
    right: Callable[[dict[str, Any]], dict[str, Tensor]] | None = None

    @property
    def found(self) -> Any:
        return self.join(self.tensors)

    def take(self, index: Tensor) -> "Given":
        """Some of the examples, in another order."""
        batch = {name: [value[i] for i in index] if isinstance(value, list) else value[index]
                 for name, value in self.batch.items()}  # fmt: skip
        return Given({name: value[index] for name, value in self.tensors.items()}, batch, self.join, self.right)

    def moved(self, step: float) -> "Given":
        """With the right answer so much likelier."""
        towards = self.right(self.batch)
        moved = {name: value + step * towards.get(name, 0) for name, value in self.tensors.items()}
        return Given(moved, self.batch, self.join, self.right)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed))


def _ints(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, (N, *shape), generator=torch.Generator().manual_seed(seed))


def _fields(tensors: dict[str, Tensor]) -> Any:
    return SimpleNamespace(**tensors)


def _pair(tensors: dict[str, Tensor]) -> Any:
    return tuple(tensors.values())


def classifier() -> Given:
    batch = {"labels": torch.tensor([0, 1, 2, 3, 1, 0])}
    return Given({"logits": _randn(4)}, batch, right=lambda batch: {"logits": F.one_hot(batch["labels"], 4)})


def language() -> Given:
    attended = torch.ones(N, 5, dtype=torch.long)
    attended[1, 3:] = 0
    attended[2, :2] = 0
    batch = {"input_ids": _ints(7, 5), "attention_mask": attended}
    return Given({"logits": _randn(5, 7)}, batch, right=lambda b: {"logits": F.one_hot(b["input_ids"].roll(-1, 1), 7)})


def answers() -> Given:
    labels, foils = _ints(7, 5), _ints(7, 5, seed=2)
    labels[:, :3], foils[:, :3] = -100, -100

    def right(batch: dict[str, Any]) -> dict[str, Tensor]:
        marked = {name: batch[name].clamp_min(0).roll(-1, 1) for name in ("labels", "foil_labels")}
        return {"right": F.one_hot(marked["labels"], 7), "foil": -F.one_hot(marked["foil_labels"], 7)}

    tensors = {"right": _randn(5, 7), "foil": _randn(5, 7, seed=3)}
    return Given(tensors, {"input_ids": _ints(7, 5), "labels": labels, "foil_labels": foils}, _pair, right)


def spans() -> Given:
    batch = {"start_positions": _ints(5), "end_positions": _ints(5, seed=2)}

    def right(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {f"{end}_logits": F.one_hot(batch[f"{end}_positions"], 5) for end in ("start", "end")}

    return Given({"start_logits": _randn(5), "end_logits": _randn(5, seed=3)}, batch, _fields, right)


def transcripts() -> Given:
    def join(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        count = len(tensors["logits"])
        arguments = {
            "log_probs": tensors["logits"].log_softmax(-1).transpose(0, 1), "targets": tensors["targets"],
            "input_lengths": torch.full((count,), 8), "target_lengths": torch.full((count,), 3), "blank": 0,
        }  # fmt: skip
        return [arguments]

    targets = 1 + _ints(4, 3)
    return Given({"logits": _randn(8, 5), "targets": targets}, {"labels": targets}, join)


def objects() -> Given:
    boxes = 0.4 + 0.2 * torch.rand(N, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = [
        {"class_labels": _ints(3, seed=i)[:2], "boxes": 0.4 + 0.05 * _randn(4, seed=i).abs()[:2]} for i in range(N)
    ]
    return Given({"log_probs": _randn(5, 3).log_softmax(-1), "boxes": boxes}, {"x": _randn(1), "labels": labels}, _pair)


def pixels() -> Given:
    batch = {"labels": _ints(3, 4, 4)}
    batch["labels"][:, 0, 0] = 255

    def right(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": F.one_hot(batch["labels"] % 255, 3).movedim(-1, 1)}

    return Given({"logits": _randn(3, 4, 4)}, batch, right=right)


def segments() -> Given:
    masks = [torch.stack([torch.arange(16).view(4, 4) < 5 + i, torch.arange(16).view(4, 4) > 9]) for i in range(N)]
    batch = {
        "x": _randn(1),
        "mask_labels": [m.float() for m in masks],
        "class_labels": [_ints(3, seed=i)[:2] for i in range(N)],
    }
    tensors = {"class_queries_logits": _randn(5, 4), "masks_queries_logits": _randn(5, 4, 4, seed=3)}
    return Given(tensors, batch, _fields)


def floats(name: str, entry: str, *shape: int) -> Callable[[], Given]:
    """A prediction and the true values of the same shape."""
    return lambda: Given({name: _randn(*shape)}, {entry: _randn(*shape, seed=5).abs()}, _fields)


def one_number() -> Given:
    return Given({"logits": _randn(1)}, {"x": _randn(1)})


def two_numbers() -> Given:
    tensors = {"chosen": _randn(1), "rejected": _randn(1, seed=3)}
    both = {"chosen": torch.ones(1), "rejected": -torch.ones(1)}
    return Given(tensors, {"x": _randn(1)}, _pair, lambda batch: both)


GIVEN: dict[str, Callable[[], Given]] = {
    **dict.fromkeys(("margin", "logit", "log_prob", "loss", "entropy"), classifier),
    **dict.fromkeys(("token_margin", "token_log_prob", "answer_log_prob"), language),
    "answer_difference": answers,
    "multi_label": lambda: Given({"logits": _randn(4)}, {"labels": _ints(2, 4).float()}),
    "regression": lambda: Given({"logits": _randn(1)}, {"labels": _randn(seed=4)}),
    "score": one_number,
    "similarity": one_number,
    "preference": two_numbers,
    "own_loss": lambda: Given({"losses": _randn()}, {"x": _randn(1)}),
    **dict.fromkeys(("span_margin", "span_log_prob"), spans),
    "ctc_log_prob": transcripts,
    "detection": objects,
    **dict.fromkeys(("pixel_margin", "pixel_log_prob"), pixels),
    "segment_log_prob": segments,
    "depth": floats("predicted_depth", "labels", 4, 4),
    "reconstruction": floats("reconstruction", "labels", 3, 4, 4),
    "denoising": floats("sample", "noise", 3, 4, 4),
    "action": floats("action_preds", "labels", 5, 3),
    "mask_log_prob": lambda: Given({"pred_masks": _randn(2, 3, 4, 4)}, {"labels": _ints(2, 2, 4, 4).float()}, _fields),
}
