"""How fast a class is learned again from a few examples: what is only hidden is back at once."""

import logging
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.editing.tasks import descending
from hf_coar.editing.tasks.setting import Setting
from hf_coar.errors import NonFiniteOutputError
from hf_coar.models import calling

logger = logging.getLogger(__name__)

EACH = 10  # examples of every class
STEPS = 8
# Of the rival's rates, those at which it happens: at the lower one a last layer that was turned round is not back in
# time (.1 % of a class of which the higher finds 69), and the higher one shakes networks that need no more than the
# lower (it cost three that were never edited 2 to 9 points of the others in 16 steps). The highest destroys them.
RATES = descending.RATES[1:3]
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


def relearned(of: Setting, model: nn.Module, label: int, bias: Tensor, rows: Tensor, judged: Tensor) -> Tensor | None:
    """After what share of the first steps a model says a class, float32 [examples]; None where it says no numbers.

    A copy is fine-tuned on all classes, at the rate at which most of these examples are right on the way. Whoever wants
    a class back begins with what costs nothing, a constant on its logit: no number of small steps makes up for -1,000.
    A rate at which logits turn into NaN or infinity teaches nothing, and is passed by.

    Args:
        of: how the model is looked at, and where the examples are.
        model: it stays as it was.
        label: of the class.
        bias: the constant, a scalar; that of `probing.best_bias` of more examples than are learned from, as of these
            few it may leave less of a class than there was.
        rows: of the examples to learn from.
        judged: of those that judge, all of the class.
    """
    found = []
    for rate in RATES:
        try:
            found.append(_relearned_at(rate, of, model, label, bias, rows, judged))
        except NonFiniteOutputError as error:
            logger.info("edit: relearning at a rate of %g is passed by: %s", rate, error)
    if not found:
        logger.warning("edit: relearning is not measured, as at every rate the model gives NaN or infinity on the way")
        return None
    _, said = max(found, key=lambda one: one[0])  # of equals the lower rate
    return (said == label).float().mean(0)


def _relearned_at(
    rate: float, of: Setting, model: nn.Module, label: int, bias: Tensor, rows: Tensor, judged: Tensor
) -> tuple[int, Tensor]:
    """How many of the lesson were right when each step began, and what is said of those that judge after each.

    The latter is int64 [steps, examples]; the arguments are those of `relearned`.

    Raises:
        NonFiniteOutputError: on the way the model gives no numbers.
    """
    tuned = models.copy_with_record(model)
    device, n_right = models.device_of(tuned), 0
    batches = [data_module.to_device(batch, device) for batch in of.held.at(rows, of.batch)]

    def shifted(logits: Tensor) -> Tensor:
        return logits + bias.to(logits) * F.one_hot(torch.tensor(label, device=logits.device), logits.shape[1])

    def losses(tuned: nn.Module) -> Iterator[Tensor]:
        nonlocal n_right
        for batch in batches:
            logits = shifted(calling.logits_of(of.looker.output.call(tuned, batch)).float())
            n_right += int((_said(logits) == batch["labels"]).sum())
            yield F.cross_entropy(logits, batch["labels"].long(), reduction="sum") / len(rows)

    steps = islice(descending.steps(tuned, losses, rate), STEPS)
    said = [_said(shifted(of.looker.look(tuned, of.held.at(judged, of.batch)).logits)) for _ in steps]
    return n_right, torch.stack(said)


def _said(logits: Tensor) -> Tensor:
    """The class that is said of each example, int64 [examples]; `argmax` takes NaN for the largest of all."""
    largest, said = logits.max(1)  # a logit of -inf below a number is a class that is never said
    if bad := int((~largest.isfinite()).sum()):
        raise NonFiniteOutputError(f"the logits of {bad} of {len(said)} examples are NaN or infinite")
    return said
