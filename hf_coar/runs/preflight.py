"""Preflight: an output is tried on a few examples, and what is wrong with it is said, before anything is paid for."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import CoarError, DataError, ModelError, NonFiniteOutputError
from hf_coar.models import calling, failing, offloading, tasks
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output, OutputFunction
from hf_coar.runs import checks, hints
from hf_coar.runs.engine import placed
from hf_coar.runs.workers import processes

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST = 16  # examples that are looked at
# What an example gives alone and in a batch differs by rounding, which half precision makes a few per cent.
_SAME = 0.05
_SIDES = (
    "foil_",
    "pair_",
    "rejected_",
    models.PARTNER,
    models.calling.POSITIONS,
)  # what a second run of the model gets


class First:
    """The first examples of some data, read once for all that is tried on them before the first pass."""

    def __init__(self, data: Iterable) -> None:
        """Nothing is read yet; `data` is what `data.batches` gives."""
        self._data = data
        self._batch: data_module.Batch | None = None
        self.names: Sequence[str] = data_module.describe(data).get("label_names") or ()  # of the classes

    def batch(self, count: int) -> data_module.Batch:
        """So many of them, or as many as there are.

        Raises:
            DataError: there are none.
        """
        if self._batch is None:
            self._batch = data_module.few(self._data, _MOST)
        return data_module.rows(self._batch, 0, count)

    def release(self) -> None:
        """Let them go, once all was tried."""
        self._batch = None

    def tried(self, model: nn.Module, work: Callable[[data_module.Batch], T], count: int) -> T:
        """What some work gives on the first examples, on the model's device.

        Args:
            model: frozen meanwhile.
            work: takes a batch.
            count: examples at most; where they do not fit into memory, one.

        Raises:
            DataError: there are no examples.
            RuntimeError: not even one example fits into memory.
        """
        while True:
            examples = self.batch(count)
            try:
                with models.frozen(model), placed(model, processes().device) as device:
                    return work(data_module.to_device(examples, device))
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not models.is_out_of_memory(error):
                    raise
            count = 1


def bound(
    model: nn.Module,
    data: Iterable | First,
    output: "str | Output | OutputFunction" = tasks.AUTO,
    call: Call | None = None,
) -> Output:
    """The output with the call and the alignment of the model's task, tried on the first examples; see `tasks.bind`.

    Args:
        model: any module; runs a few times on its first two examples.
        data: what `data.batches` gives, or its first examples.
        output: as for `attribute`.
        call: as for `attribute`.

    Raises:
        DataError: no examples, a batch without what the output needs, or examples that depend on each other.
        ModelError: the model does not run on them, or has no weights.
        CoarError: the output cannot be had of this model; says which can.
    """
    offloading.check_held(model)
    first = data if isinstance(data, First) else First(data)
    if call is None:
        hints.tell_of_inputs(model, first.batch(_MOST))
    try:
        found = first.tried(model, lambda batch: _bound(model, batch, output, call, first.names), 2)
        if call is None:
            _tell_padding(model, found, first.batch(_MOST))
        return found
    except (RuntimeError, MemoryError) as error:
        if not models.is_out_of_memory(error):
            raise
    return tasks.bind(model, output, call, first.batch(1))  # the run itself says what does not fit


def _bound(
    model: nn.Module,
    batch: data_module.Batch,
    output: "str | Output | OutputFunction",
    call: Call | None,
    names: Sequence[str] = (),
) -> Output:
    with torch.no_grad():
        found = tasks.bind(model, output, call, batch)
        seen = checks.Seen(found)
        values = _tried(model, seen.noting, batch)
        _check_finite(model, found, values)
        hints.tell_of_logits(model, found, seen.logits)
        if seen.logits:
            hints.tell_of_names(model, found, seen.logits[0], names)
        if len(values) == 2:
            _check_alone(model, found, batch, values, seen)
    if call is None:
        _tell_unread(model, found, batch)
    return found


def _tried(model: nn.Module, output: Output, batch: data_module.Batch) -> Tensor:
    """Outputs of the batch; what goes wrong becomes an error that says what to do."""
    try:
        return output.of(model, batch)
    except CoarError as error:
        end = "" if str(error).endswith(("?", ".")) else "."
        error.args = (f"{error}{end} {tasks.explain(model, output)}",)
        raise
    except failing.RAISED as error:
        if models.is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(models.wrapped(model)).__name__} with output {output.name!r} does not run on the first examples "
            f"{failing.failure(error, batch)}. {_by_itself(model, output, batch) or tasks.explain(model, output)}"
        ) from error


def _by_itself(model: nn.Module, output: Output, batch: data_module.Batch) -> str:
    """What to do where examples run one by one and not beside each other; empty where not even one does."""
    if data_module.size(batch) == 1:
        return ""
    try:
        output.of(model, data_module.rows(batch, 0, 1))
    except (CoarError, *failing.RAISED):
        return ""
    config = getattr(models.wrapped(model), "config", None)
    if "input_ids" in batch and hasattr(config, "pad_token_id") and config.pad_token_id is None:
        return (
            "It runs on one of them alone: its config names no padding, by which it would tell where texts end. Set "
            "model.config.pad_token_id = tokenizer.pad_token_id, or its eos_token_id where it has none"
        )
    return "It runs on one of them alone: give batches of one example (batch_size=1), or make it take several"


def _check_finite(model: nn.Module, output: Output, values: Tensor) -> None:
    """Raises `NonFiniteOutputError` where the model gives NaN or infinity before anything is ablated."""
    if bool(values.isfinite().all()):
        return
    place = int((~values.isfinite()).nonzero()[0])
    state = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, value in state if value.is_floating_point() and not bool(value.isfinite().all())]
    why = f"{len(broken)} of its weights are not finite, such as {broken[0]!r}" if broken else "its weights are finite"
    raise NonFiniteOutputError(
        f"output {output.name!r} of example {place} is {float(values[place])} with nothing ablated: look at what the "
        f"example holds, and at {type(models.wrapped(model)).__name__} ({why}), or try a higher precision"
    )


def _check_alone(
    model: nn.Module, output: Output, batch: data_module.Batch, together: Tensor, seen: checks.Seen
) -> None:
    """Every example's output must be its own, or batches of another size would change the numbers.

    What is far off beside one is an error; beside outputs that are small themselves, and more than rounding of the
    logits, a warning.
    """
    alone = torch.cat([_tried(model, output, data_module.rows(batch, place, place + 1)) for place in range(2)])
    same = (alone == together) | (alone.isnan() & together.isnan())  # infinite alike: the run says where
    far = (alone - together).abs().masked_fill(same, 0.0)
    off, largest = float(far.max()), checks.largest(together)
    tolerance = checks.rounding(model)
    if off <= _SAME * largest or off <= min(_SAME, seen.moved(tolerance) if seen.logits else tolerance):
        return
    checks.check_repeats(model, output, batch)  # a model that draws random numbers differs as well
    place = int(far.argmax())
    said = (
        f"output {output.name!r} of example {place} is {float(together[place]):.4g} beside another one and "
        f"{float(alone[place]):.4g} alone, so that it is not its own; give batches of one example, or an output that "
        "looks at every example by itself"
    )
    if off > _SAME * max(1.0, largest):
        raise DataError(said)
    logger.warning("%s", said)


def _tell_padding(model: nn.Module, output: Output, batch: data_module.Batch) -> None:
    """Warns where the output of a text depends on its padding, as where positions are counted from there."""
    mask = batch.get("attention_mask")
    masks = [name for name in batch if name.endswith("attention_mask")]
    if masks != ["attention_mask"] or "input_ids" not in batch or mask.dim() != 2:
        return
    row = int((attended := mask.bool()).sum(1).argmin())
    if bool(attended[row].all()) or not bool(attended[row].any()):
        return
    padded = data_module.rows(batch, row, row + 1)
    bare = {name: _without(value, attended[row]) for name, value in padded.items()}
    logits: list[Tensor] = []
    noting = checks.noting(output, logits)
    try:
        with torch.no_grad():
            values = [float(noting.of(model, one)[0]) for one in (padded, bare)]
    except (CoarError, *failing.RAISED):  # what is wrong with an example is said where it is attributed
        return
    # Positions that padding shifts may move an output by a hundredth and turn what every component does to it round.
    of_logits = checks.rounding(model) * max(1.0, *map(checks.largest, logits)) if logits else torch.inf
    if abs(values[0] - values[1]) > min(_SAME * max(1.0, abs(values[1])), of_logits):
        logger.warning(
            "output %r of example %d is %.3g with its padding and %.3g without its padding: where that is on the left, "
            "give position_ids that leave it out, (attention_mask.cumsum(1) - 1).clamp(min=0), or pad on the right; or "
            "give batches of examples of one length",
            output.name, row, *values,
        )  # fmt: skip


def _without(value: Any, attended: Tensor) -> Any:
    """An entry of one example without the places of padding, where it has as many as the mask."""
    along = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == len(attended)
    return value[:, attended.to(value.device)] if along else value


class _NotingBatch(dict):
    """A batch that notes which entries were asked for."""

    def __init__(self, entries: data_module.Batch) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)


def _tell_unread(model: nn.Module, output: Output, batch: data_module.Batch) -> None:
    """Warns of entries that neither the forward nor the output takes, such as a misspelled one."""
    names, takes_any = calling.forward_names(model)
    targets = tasks.of(model).targets
    known = names | {"inputs", "pixel_values", calling.by_position(batch, targets)} | set(targets)
    rest = [name for name in batch if name not in known and not name.startswith(_SIDES)]
    if not rest or (takes_any and models.library(models.wrapped(model)) == "torch") or len(batch) == 1:
        return
    noting = _NotingBatch(batch)
    with torch.no_grad():
        output.of(model, noting)
    if unread := [name for name in rest if name not in noting.read]:
        logger.warning(
            "%s takes no entry %s of the batch, and neither does output %r; if it is no misspelled one, leave it out. "
            "The forward takes %s",
            type(models.wrapped(model)).__name__, ", ".join(unread), output.name, ", ".join(sorted(names)),
        )  # fmt: skip
