"""Answers inside a text, and transcripts of a sound."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_coar.errors import CoarError, DataError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import wrapped
from hf_coar.models.tasks.base import Batch, labels_of, register


def _ends(found: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(logits float32 [examples, positions], true position int64 [examples]) of the start and of the end."""
    ends = []
    for name in ("start", "end"):
        logits = getattr(found, f"{name}_logits", None)
        if not isinstance(logits, Tensor):
            raise CoarError(f"the model returned a {type(found).__name__} without {name}_logits; use output='own_loss'")
        places = labels_of(batch, f"{name}_positions")
        if places.shape != logits.shape[:1] or int(places.min()) < 0 or int(places.max()) >= logits.shape[1]:
            raise DataError(
                f"{name}_positions are {places.tolist()[:8]}; expected one position an example, 0 to "
                f"{logits.shape[1] - 1}: an answer that was cut off with its text must be left out"
            )
        ends.append((logits.float(), places.long()))
    return ends


@outputs.register("span_margin", unit="logits", takes="output", boundary=0.0)
def span_margin(found: Any, batch: Batch) -> Tensor:
    """Margin of the true start and of the true end of an answer, the smaller of both; above 0 = both are right."""
    margins = [outputs.margin(logits, {"labels": places}) for logits, places in _ends(found, batch)]
    return torch.minimum(*margins)


@outputs.register("span_log_prob", unit="nats", takes="output")
def span_log_prob(found: Any, batch: Batch) -> Tensor:
    """Log-probability of the true start plus that of the true end: minus twice the head's loss (at most 0)."""
    return sum(-F.cross_entropy(logits, places, reduction="none") for logits, places in _ends(found, batch))


class _Heard(TorchFunctionMode):
    """Notes what the head gives to the library's CTC loss: which frames are real and which token is the blank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[inspect.BoundArguments] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every torch function comes by here."""
        if func is F.ctc_loss:
            self.calls.append(_CTC.bind(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


_CTC = inspect.signature(F.ctc_loss)


def _transcribe(model: nn.Module, batch: Batch) -> list[Mapping[str, Any]]:
    """The arguments of the head's own CTC loss: once for all examples, or once for every one of them."""
    labels_of(batch)
    with _Heard() as heard:
        calling.call(model, batch, without=())
    # The last ones: the model may have run on a few examples before, to see where they are.
    calls, left = [], calling.n_examples(batch)
    while heard.calls and left > 0:
        calls.insert(0, heard.calls.pop().arguments)
        left -= calls[0]["log_probs"].shape[1]
    if left:
        raise CoarError(f"{type(wrapped(model)).__name__} computes no CTC loss of labels; use another output")
    return calls


@outputs.register("ctc_log_prob", unit="nats", takes="output", call=_transcribe)
def ctc_log_prob(found: Sequence[Mapping[str, Any]], batch: Batch) -> Tensor:
    """Log-probability of the transcript by connectionist temporal classification: minus the summed loss (at most 0)."""
    counts, frames = (
        torch.cat([torch.as_tensor(one[n]) for one in found]) for n in ("target_lengths", "input_lengths")
    )
    short = ((counts == 0) | (counts > frames)).nonzero().flatten().tolist()
    if short:
        raise DataError(f"examples {short} of the batch have no transcript, or more tokens in it than frames of sound")
    return torch.cat([-_ctc_losses(**one) for one in found])


def _ctc_losses(log_probs: Tensor, **options: Any) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):  # its kernel takes no gradient of single losses
        return F.ctc_loss(log_probs.float(), **{**options, "reduction": "none", "zero_infinity": False})


register(
    "question_answering",
    ("span_margin", "span_log_prob", "own_loss"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES"),
    targets=("start_positions", "end_positions"),
    columns=("question", "context", "answers"),
)
register("ctc", ("ctc_log_prob", "own_loss"), ("MODEL_FOR_CTC_MAPPING_NAMES",), columns=("audio", "text"))
