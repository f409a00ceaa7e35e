"""A head's own loss of every example in one pass of all: the library's losses keep the examples apart while it runs."""

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_coar.models import calling
from hf_coar.models.calling import Call

_MEANS = (
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
)  # fmt: skip
_SIGNATURES = {function: inspect.signature(function) for function in _MEANS}
_NEAR = 1e-4  # of the loss: what rounding may move


class _Apart(TorchFunctionMode):
    """Losses that are a mean over the batch become means over each of its examples, [examples]."""

    def __init__(self, n_examples: int) -> None:
        super().__init__()
        self._n = n_examples

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every torch function comes by here."""
        kwargs = kwargs or {}
        if func not in _SIGNATURES or calling.is_probing():
            return func(*args, **kwargs)
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["reduction"] != "mean" or given.get("weight") is not None:
            return func(*args, **kwargs)
        each = func(**{**given, "reduction": "none"}).reshape(self._n, -1)
        if "ignore_index" not in given or given["target"].is_floating_point():
            return each.mean(1)
        real = (given["target"] != given["ignore_index"]).reshape(self._n, -1)
        return torch.where(real, each, 0.0).sum(1) / real.sum(1)


Batch = Mapping[str, Any]
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Any]] = WeakKeyDictionary()  # the last batch, or False


def losses(model: nn.Module, batch: Batch, loss_of: Call) -> Tensor:
    """The loss of every example by itself, float32 [examples].

    In one pass, where that gives what every example gives alone: all of the first batch are compared, and of every
    other batch the last example, which is off as soon as any one before it has more or fewer targets than its share.
    Heads that mix examples or draw random numbers run once an example.

    Args:
        model: any module.
        batch: of examples.
        loss_of: (model, batch) -> the loss of a batch, a number, or [examples] where the library's losses are.
    """

    def alone(model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch).mean()

    n, known, names = calling.n_examples(batch), _KNOWN.setdefault(model, {}), tuple(sorted(batch))
    together = _together(model, batch, loss_of, n) if n > 1 and known.get(names) is not False else None
    if together is not None and names in known:
        if known[names] == _seen(batch):
            return together
        with torch.no_grad():
            last = calling.one_alone(model, batch, alone, n - 1)
        if _alike(together[-1], last):
            known[names] = _seen(batch)
            return together
    each = torch.stack(calling.alone(model, batch, alone))
    if n > 1:
        known[names] = _seen(batch) if together is not None and _alike(together, each) else False
    return each


def _seen(batch: Batch) -> list[tuple]:
    """By what one batch after the other is known again."""
    return [(value.data_ptr(), *value.shape) for value in batch.values() if isinstance(value, Tensor)]


def _together(model: nn.Module, batch: Batch, loss_of: Call, n: int) -> Tensor | None:
    try:
        with _Apart(n):
            found = loss_of(model, batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if calling.is_out_of_memory(error):
            raise
        return None
    return found if found.shape == (n,) else None


def _alike(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach(), other.detach()
    return bool(((one - other).abs() <= _NEAR * other.abs().clamp_min(1.0)).all())
