"""A head's own loss of every example in one pass of all: the library's losses keep the examples apart while it runs."""

import inspect
from collections.abc import Callable, Mapping
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
        if func not in _SIGNATURES:
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


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


def losses(model: nn.Module, batch: Mapping[str, Any], loss_of: Call) -> Tensor:
    """The loss of every example by itself, float32 [examples].

    In one pass, where that gives what every example gives alone, which is tried once for a model and the entries of its
    batches; heads that mix examples or draw random numbers run once an example.

    Args:
        model: any module.
        batch: of examples.
        loss_of: (model, batch) -> the loss of a batch, a number, or [examples] where the library's losses are.
    """

    def alone() -> Tensor:
        return torch.stack([one.mean() for one in calling.alone(model, batch, loss_of)])

    n, known, names = calling.n_examples(batch), _KNOWN.setdefault(model, {}), tuple(sorted(batch))
    if n == 1 or known.get(names) is False:
        return alone()
    together = _together(model, batch, loss_of, n)
    if names in known and together is not None:
        return together
    each = alone()
    known[names] = together is not None and _alike(together, each)
    return each


def _together(model: nn.Module, batch: Mapping[str, Any], loss_of: Callable[..., Tensor], n: int) -> Tensor | None:
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
