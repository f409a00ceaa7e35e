"""Outputs: what a component contributes *to*. One number an example, float32, larger = more of the behaviour.

Its function is given the logits, or with `takes="output"` all that the model returned. A new output takes five lines::

    from hf_coar.models import outputs

    @outputs.register("entropy", unit="nats")
    def entropy(logits, batch):
        probabilities = logits.softmax(-1)
        return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
"""

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError, ModelError
from hf_coar.models import calling
from hf_coar.models.calling import Call
from hf_coar.models.checked import once
from hf_coar.storage.registry import Registry

AS_CLASSES = "if they are classes, give them as whole numbers: labels.long(), table.dropna().astype({'label': int})"
_LOOKED_AT = 1000  # labels that a message takes its values from
IGNORED_LABEL = -100  # the target value that PyTorch's losses and transformers' collators skip

# Which target the logits at position t are for, and which mask says that a position counts.
NEXT = "next"  # token t + 1 of `labels` or else `input_ids`; `attention_mask`: causal language models
SAME = "same"  # label t; `attention_mask`: masked language models, classifiers of tokens and frames
DECODED = "decoded"  # label t; `decoder_attention_mask`: models with a decoder, whose inputs are the labels moved on

OutputFunction = Callable[..., Tensor]  # (logits, batch) or (what the model returned, batch) -> [examples]
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """A named output function.

    Attributes:
        name: as given to `attribute(output=…)`.
        unit: of its values.
        function: (logits, batch) -> [examples]. Classifiers give logits [examples, classes], language models
            [examples, positions, vocabulary]; `batch` is the batch on the model's device.
        boundary: the value at which right turns into wrong; None where no value does.
        takes: "logits", float32, or "output": all that the call returned, as it is.
        alignment: of functions that compare positions with targets, which are then called with `alignment=` as well:
            `NEXT`, `SAME` or `DECODED`; the model's task says which.
        call: how the model is run, a function (model, batch); None for `models.call`.
    """

    name: str
    unit: str
    function: OutputFunction
    boundary: float | None = None
    takes: str = "logits"
    alignment: str | None = None
    call: Call | None = None

    def __post_init__(self) -> None:
        """Check what it takes."""
        if self.takes not in ("logits", "output"):
            raise CoarError(f"takes={self.takes!r}; an output takes 'logits' or 'output', all that the model returns")

    @property
    def identity(self) -> Hashable:
        """What it is, without holding its functions: these may hold a model, and are others once they are gone."""
        plain = (self.name, self.unit, self.boundary, self.takes, self.alignment)
        return *plain, _reference(self.function), _reference(self.call)

    def of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model on a batch: its outputs, float32 [examples].

        Raises:
            ModelError: the batch does not fit the model's forward.
            CoarError: the function returned another shape.
        """
        with calling.under_way(batch):
            found = (self.call or calling.call)(model, batch)
        calling.tell()
        if self.takes == "logits":
            found = _logits(found, type(model).__name__)
        return self(found, batch)

    def __call__(self, found: Any, batch: Batch) -> Tensor:
        """The outputs, float32 [examples], of logits or of what else the function takes.

        Raises:
            CoarError: the function returned another shape.
        """
        logits = calling.logits_of(found).float() if self.takes == "logits" else None
        options = {} if self.alignment is None else {"alignment": self.alignment}
        values = self.function(found if logits is None else logits, batch, **options)
        n_examples = calling.n_examples(batch) if batch else len(logits)
        if not isinstance(values, Tensor) or values.shape != (n_examples,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise CoarError(
                f"output {self.name!r} returned shape {shape} for {n_examples} examples; "
                f"it must return one number an example, shape ({n_examples},)"
            )
        return values.float()


def _logits(found: Any, model: str) -> Tensor:
    """The logits; where there are none, the error says of what an output could be made instead."""
    try:
        return calling.logits_of(found, model)
    except ModelError as error:
        raise ModelError(f"{error}. For example {_example(found)}" if _example(found) else str(error)) from error


def _example(found: Any) -> str:
    """An output of the first numbers in what a model returned, as code; empty where none are known by a name."""
    alone = isinstance(found, list | tuple) and bool(found) and isinstance(found[0], Mapping)  # a mapping an example
    fields = found[0] if alone else found
    if not isinstance(fields, Mapping):
        return ""
    named = [name for name, value in fields.items() if isinstance(value, Tensor) and value.is_floating_point()]
    name = min(named, key=lambda one: fields[one].dim(), default=None) if alone else next(iter(named), None)
    if name is None:
        return ""
    if alone:
        made = f"torch.stack([one[{name!r}].sum() for one in found])"
    else:
        made = f"found[{name!r}].flatten(1).mean(1)"
    return (
        f"output=outputs.Output({name!r}, 'of the model', lambda found, batch: {made}, takes='output'); what is "
        f"returned has {', '.join(fields)}{' for each example' if alone else ''}"
    )


class _Same(weakref.ref):
    """Which object it is, without holding it; once that is gone, no other is the same."""

    __slots__ = ("_number",)

    def __init__(self, one: Any) -> None:
        super().__init__(one)
        self._number = id(one)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Same) and self() is not None and self() is other())


def _reference(function: Callable[..., Any] | None) -> Hashable:
    if function is None:
        return None
    if isinstance(function, MethodType):  # made anew whenever it is asked for
        return _reference(function.__self__), _reference(function.__func__)
    try:
        return _Same(function)
    except TypeError:
        return object()  # what nobody can tell apart is never the same


OUTPUTS: Registry[Output] = Registry("output")


def register(
    name: str,
    unit: str,
    boundary: float | None = None,
    replace: bool = False,
    takes: str = "logits",
    alignment: str | None = None,
    call: Call | None = None,
) -> Callable[[OutputFunction], OutputFunction]:
    """Decorator: makes a function (logits, batch) -> [examples] known as `output=name`; see `Output`.

    A name that is taken is an error, unless the same function is defined again (a cell of a notebook that runs again)
    or `replace=True` puts this one in its place.
    """

    def add(function: OutputFunction) -> OutputFunction:
        OUTPUTS.add(name, Output(name, unit, function, boundary, takes, alignment, call), function, replace)
        return function

    return add


def names() -> list[str]:
    """The names of all outputs."""
    return OUTPUTS.names()


def get(output: "str | Output | OutputFunction") -> Output:
    """An output by its name; a function of (logits, batch) is taken as it is.

    Raises:
        CoarError: an unknown name; the message lists what there is.
    """
    if isinstance(output, Output):
        return output
    if callable(output):
        return Output(getattr(output, "__qualname__", "custom"), "of your own", output)
    return OUTPUTS[output]


def recorded(name: str) -> Output:
    """The output of this name, which attributions were made of.

    Raises:
        CoarError: it is a function of one's own, which no name brings back.
    """
    if name in OUTPUTS.names():
        return OUTPUTS[name]
    raise CoarError(
        f"the attributions are of {name!r}, an output that is not registered here, such as a function of your own: "
        "give that function again as output=…, or import the file that registers it (--import)"
    )


def _labels(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise DataError(
            f"this output needs labels, and the batch has only {sorted(batch)}; give every batch a 'labels' entry"
        )
    if logits.dim() != 2:
        raise CoarError(
            f"this output is for classifiers with logits [examples, classes], and the model's have shape "
            f"{list(logits.shape)}; for language models use 'token_margin' or 'token_log_prob'"
        )
    if labels.shape != logits.shape[:1]:
        raise DataError(f"labels have shape {tuple(labels.shape)}; expected one class an example, ({logits.shape[0]},)")
    n_classes = logits.shape[1]
    once(("classes", n_classes), (labels,), lambda: _check_classes(labels, n_classes))
    return labels.long()


def are_whole(labels: Tensor) -> bool:
    """Whether labels could be classes by their values; NaN and infinity could not."""
    return not labels.is_floating_point() or bool((labels.isfinite() & (labels == labels.round())).all())


def said(labels: Tensor) -> str:
    """Labels in words: their type, and the first different values."""
    values = list(dict.fromkeys(f"{value:g}" for value in labels.flatten()[:_LOOKED_AT].sort().values.tolist()))
    return f"{str(labels.dtype).removeprefix('torch.')}: {', '.join(values[:4])}{', …' if len(values) > 4 else ''}"


def _check_classes(labels: Tensor, n_classes: int) -> None:
    if not are_whole(labels):
        raise DataError(
            f"labels are fractions ({said(labels)}), which name no class; give whole numbers from 0 to {n_classes - 1}"
        )
    low, high = int(labels.min()), int(labels.max())
    if n_classes == 1 and (low, high) in ((0, 1), (1, 1)):
        raise DataError(
            "the model gives one number an example, and labels are no (0) or yes (1): output='multi_label' takes it "
            "for the logit of yes, output='regression' for a number, output='score' for what counts itself"
        )
    if low < 0 or high >= n_classes:
        raise DataError(
            f"labels run from {low} to {high}, and the model has {n_classes} classes (0 to {n_classes - 1}); "
            "is this the data set that the model was trained for?"
        )


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the target minus the largest other logit, over the last axis."""
    if logits.shape[-1] < 2:
        raise CoarError(
            f"a margin needs at least 2 classes, and the model has {logits.shape[-1]}; use 'score' or 'regression'"
        )
    # The best of the others is the second of the two largest where the target itself is the largest.
    top, where = logits.topk(2, dim=-1)
    correct = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    best_other = torch.where(where[..., 0] == targets, top[..., 1], top[..., 0])
    return correct - best_other


@register("margin", unit="logits", boundary=0.0)
def margin(logits: Tensor, batch: Batch) -> Tensor:
    """Correct logit minus the largest other logit (the paper's output for classifiers); above 0 = classified right."""
    return margins(logits, _labels(logits, batch))


@register("logit", unit="logits")
def logit(logits: Tensor, batch: Batch) -> Tensor:
    """Logit of the correct class."""
    return logits.gather(1, _labels(logits, batch)[:, None])[:, 0]


@register("log_prob", unit="nats")
def log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the correct class (at most 0)."""
    return -F.cross_entropy(logits, _labels(logits, batch), reduction="none")


@register("loss", unit="nats")
def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the correct class: the one output of which more is worse."""
    return F.cross_entropy(logits, _labels(logits, batch), reduction="none")


def aligned(logits: Tensor, batch: Batch, alignment: str) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, their targets, and which of them count.

    A target counts if it, and where the next token is predicted the one before it, is inside the attention mask and not
    labelled -100.

    Args:
        logits: [examples, positions, classes].
        batch: with `labels`, int64 [examples, positions] or one-hot [examples, positions, classes]; for `NEXT`,
            `input_ids` will do.
        alignment: `NEXT`, `SAME` or `DECODED`.

    Returns:
        logits [examples, targets, classes], targets int64 [examples, targets], real bool [examples, targets].

    Raises:
        CoarError: logits of another shape.
        DataError: no targets, targets of another shape, or an example without a single real one.
    """
    if logits.dim() != 3:
        raise CoarError(
            f"this output is for language models with logits [examples, positions, vocabulary], and the model's are "
            f"{list(logits.shape)}; for classifiers use 'margin', 'logit', 'log_prob' or 'loss'"
        )
    names = ("labels", "input_ids") if alignment == NEXT else ("labels",)
    tokens = next((batch[name] for name in names if name in batch), None)
    if isinstance(tokens, Tensor) and tokens.dim() == 3 and tokens.shape == logits.shape:
        tokens = tokens.argmax(-1)
    if not isinstance(tokens, Tensor) or tokens.shape != logits.shape[:2]:
        wanted = "'input_ids' (or 'labels')" if alignment == NEXT else "'labels'"
        raise DataError(
            f"this output needs {wanted} of shape {tuple(logits.shape[:2])}, and the batch has "
            f"{ {name: tuple(value.shape) for name, value in batch.items() if hasattr(value, 'shape')} }"
        )
    moved = 1 if alignment == NEXT else 0
    targets = tokens[:, moved:]
    real = targets != IGNORED_LABEL
    attended = batch.get("decoder_attention_mask" if alignment == DECODED else "attention_mask")
    if attended is not None and (moved or attended.shape == real.shape):
        real = real & attended[:, moved:].bool() & attended[:, : attended.shape[1] - moved].bool()
    looked_at = (tokens,) if attended is None else (tokens, attended)
    vocabulary = logits.shape[-1]
    once((alignment, vocabulary), looked_at, lambda: _check_targets(targets, real, vocabulary, bool(moved)))
    return logits[:, : logits.shape[1] - moved], targets.clamp_min(0).long(), real


def _check_targets(targets: Tensor, real: Tensor, vocabulary: int, moved: bool) -> None:
    _check_tokens(targets[targets != IGNORED_LABEL], vocabulary)
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        what = "next token (fewer than two tokens, or" if moved else "target ("
        raise DataError(
            f"examples {empty} of the batch have no real {what} all of them padding or "
            f"labelled {IGNORED_LABEL}); leave such examples out"
        )


def _check_tokens(targets: Tensor, vocabulary: int) -> None:
    low, high = (int(targets.min()), int(targets.max())) if targets.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise DataError(
            f"tokens run from {low} to {high}, and the model's vocabulary from 0 to {vocabulary - 1} (a label may also "
            f"be {IGNORED_LABEL}); is this the tokenizer of the model?"
        )


def _mean_over_real(values: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, values, 0.0).sum(1) / real.sum(1)


@register("token_margin", unit="logits", boundary=0.0, alignment=NEXT)
def token_margin(logits: Tensor, batch: Batch, alignment: str = NEXT) -> Tensor:
    """Margin of the target tokens, mean over the real ones (the paper's output for language models)."""
    predictions, targets, real = aligned(logits, batch, alignment)
    return _mean_over_real(margins(predictions, targets), real)


@register("token_log_prob", unit="nats a token", alignment=NEXT)
def token_log_prob(logits: Tensor, batch: Batch, alignment: str = NEXT) -> Tensor:
    """Log-probability of the target tokens, mean over the real ones (at most 0)."""
    return _mean_over_real(*_log_probs(logits, batch, alignment))


@register("answer_log_prob", unit="nats", alignment=NEXT)
def answer_log_prob(logits: Tensor, batch: Batch, alignment: str = NEXT) -> Tensor:
    """Log-probability of the target tokens all together, a sum: of an answer, where only its tokens are labelled."""
    log_probs, real = _log_probs(logits, batch, alignment)
    return torch.where(real, log_probs, 0.0).sum(1)


def _log_probs(logits: Tensor, batch: Batch, alignment: str) -> tuple[Tensor, Tensor]:
    predictions, targets, real = aligned(logits, batch, alignment)
    return -F.cross_entropy(predictions.transpose(1, 2), targets, reduction="none"), real
