"""How fast a class is learned again from a few examples: what is only hidden is back at once."""

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.editing.tasks import descending, probing
from hf_coar.editing.tasks.setting import BATCH, Setting
from hf_coar.models import calling

EACH = 10  # examples of every class
STEPS = 8
# Of the rival's rates, the fastest that leaves the other classes: in 16 steps three networks that were never edited
# lose one point of them, and 2 to 9 at the next rate, at which the class comes and goes from step to step.
RATE = descending.RATES[1]
_SEED = 0


def lesson(labels: Tensor, rows: Tensor) -> Tensor | None:
    """Which examples are learned from, int64 [any], ascending: ten of every class, drawn the same way every time.

    Args:
        labels: of the examples, int64 [rows].
        rows: what there is to draw from, int64 [rows]; None is returned where a class has fewer.
    """
    generator, found = torch.Generator().manual_seed(_SEED), []
    for label in labels.unique():
        own = rows[labels == label]
        if len(own) < EACH:
            return None
        found.append(own[torch.randperm(len(own), generator=generator)[:EACH]])
    return torch.cat(found).sort().values


def trainable(model: nn.Module) -> bool:
    """Whether small steps change all parameters: not where these are quantised, in half precision or offloaded."""
    parameters = list(model.parameters())
    wide = all(one.dtype in (torch.float32, torch.float64) and one.device.type != "meta" for one in parameters)
    return wide and len(parameters) > 0


def relearned(of: Setting, model: nn.Module, label: int, rows: Tensor, judged: Tensor) -> Tensor | None:
    """After what share of the first steps a model says a class, float32 [examples].

    A copy is fine-tuned on all classes. Whoever wants a class back begins with what costs nothing, so the constant on
    its logit that serves best is added first: no number of small steps makes up for a logit of -1,000.

    Args:
        of: how the model is looked at, and where the examples are.
        model: it stays as it was.
        label: of the class.
        rows: of the examples to learn from.
        judged: of those that judge, all of the class; None is returned where the model has no logits of classes, or
            parameters that cannot be trained.
    """
    if not trainable(model):
        return None
    seen = of.see(model, rows)
    if seen.logits is None:
        return None
    shift = torch.zeros(seen.logits.shape[1])
    shift[label] = probing.best_bias(seen.logits, of.held.labels[rows], label)
    tuned = models.copy_with_record(model)
    device = models.device_of(tuned)
    batches = [data_module.to_device(batch, device) for batch in of.held.at(rows, BATCH)]
    moved = shift.to(device)

    def losses(tuned: nn.Module) -> Iterator[Tensor]:
        for batch in batches:
            logits = calling.logits_of(of.looker.output.call(tuned, batch)).float() + moved
            yield F.cross_entropy(logits, batch["labels"].long(), reduction="sum") / len(rows)

    said = torch.zeros(len(judged))
    for _ in islice(descending.steps(tuned, losses, RATE), STEPS):
        said += (of.see(tuned, judged).logits + shift).argmax(1) == label
    return said / STEPS
