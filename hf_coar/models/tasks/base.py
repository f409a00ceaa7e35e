"""Tasks: what a head is for, how it is run, and which outputs of it can be explained; found by the head's class.

A new task is one call, beside the outputs that it brings::

    from hf_coar.models import outputs, tasks

    @outputs.register("brightness", unit="grey levels", takes="output")
    def brightness(found, batch):
        return found.image.float().mean((1, 2, 3))

    tasks.register("painting", outputs=("brightness",), heads=("MyPainter",), columns=("text",))
"""

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import calling, outputs
from hf_coar.models.calling import Call
from hf_coar.models.libraries import library, wrapped
from hf_coar.models.outputs import NEXT, SAME, Output, OutputFunction
from hf_coar.storage.registry import Registry

AUTO = "auto"
Batch = Mapping[str, Any]
Choice = Callable[[nn.Module, Batch], str]


@dataclass(frozen=True)
class Task:
    """A kind of head.

    Attributes:
        name: such as "token_classification".
        outputs: names of the outputs that make sense, the default first.
        heads: names of head classes, of their mappings in transformers ("MODEL_FOR_…_MAPPING_NAMES"), or of a library,
            for all of its models.
        call: runs the model, a function (model, batch); None for `models.call`, which gives it all that its forward
            names but the targets.
        alignment: whether the logits at a position are for the next target (`outputs.NEXT`) or for the one there
            (`outputs.SAME`, `outputs.DECODED`); None where there are no positions.
        targets: entries that hold what is to be predicted, and that the forward must not see.
        needs: entries without which the default output cannot be had.
        columns: kinds of columns of a data set that such batches are made of.
        choose: (model, batch) -> the default output, where the head's configuration or the targets decide.
        only: whether the task speaks for this model, where the class alone does not tell.
        units: of outputs by name, where the task's call gives them in another unit than they are registered with.
    """

    name: str
    outputs: tuple[str, ...]
    heads: tuple[str, ...] = ()
    call: Call | None = None
    alignment: str | None = None
    targets: tuple[str, ...] = calling.TARGETS
    needs: tuple[str, ...] = calling.TARGETS
    columns: tuple[str, ...] = ()
    choose: Choice | None = None
    only: Callable[[nn.Module], bool] | None = None
    units: Mapping[str, str] = field(default_factory=dict)

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """All that the model returns for a batch."""
        if self.call is not None:
            return self.call(model, batch)
        return calling.call(model, batch, self.targets)

    def default(self, model: nn.Module, batch: Batch | None = None) -> str:
        """The name of the output that "auto" stands for.

        Raises:
            DataError: the batch lacks what the output needs; says which entries and columns.
            CoarError: the head can be read in several ways.
        """
        if self.choose is not None and batch is not None:
            return self.choose(model, batch)
        missing = [name for name in self.needs if batch is not None and name not in batch]
        if missing:
            raise DataError(
                f"{self.outputs[0]!r}, the output of {type(wrapped(model)).__name__} ({self.name}), needs the entries "
                f"{', '.join(missing)}, and the batch has {', '.join(batch)}"
                + (f"; they are made of the columns {', '.join(self.columns)}" if self.columns else "")
            )
        return self.outputs[0]


TASKS: Registry[Task] = Registry("task")


def register(
    name: str,
    outputs: Sequence[str],
    heads: Sequence[str] = (),
    call: Call | None = None,
    alignment: str | None = None,
    targets: Sequence[str] = calling.TARGETS,
    needs: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    choose: Choice | None = None,
    only: Callable[[nn.Module], bool] | None = None,
    units: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Task:
    """Make a task known; the arguments are the attributes of `Task`.

    Where several tasks name the class of a model, one that names the class itself comes before those that name a
    mapping, and what was registered first before what comes later.

    Raises:
        CoarError: the name is taken.
    """
    needs = targets if needs is None else needs
    task = Task(
        name, tuple(outputs), tuple(heads), call, alignment, tuple(targets), tuple(needs), tuple(columns), choose, only,
        dict(units or {}),
    )  # fmt: skip
    TASKS.add(name, task, replace=replace)
    head_classes.cache_clear()
    return task


def names() -> list[str]:
    """The names of all tasks."""
    return TASKS.names()


def get(name: str) -> Task:
    """A task by its name.

    Raises:
        CoarError: unknown; the message lists what there is.
    """
    return TASKS[name]


@functools.cache
def head_classes() -> dict[str, list[str]]:
    """Names of tasks by the classes of their heads; a class that is named itself comes before those of a mapping."""
    known: dict[str, list[str]] = {}
    every = [(head.endswith("_MAPPING_NAMES"), name, head) for name, task in TASKS.items() for head in task.heads]
    for is_mapping, name, head in sorted(every, key=operator.itemgetter(0)):
        for class_name in _classes_of(head) if is_mapping else [head]:
            known.setdefault(class_name, []).append(name)
    return known


def _classes_of(mapping: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, mapping, {}).values()  # older versions lack some
    return [name for entry in found for name in ([entry] if isinstance(entry, str) else entry)]


def of(model: nn.Module) -> Task:
    """The task of a model, by the class of its head.

    The nearest class that a task names decides, then the library that the model comes from, then, for a class of one's
    own, how it is called. Heads of transformers that no task names are explained by their own loss; of a plain module
    all is taken for a classifier.
    """
    inner = wrapped(model)
    source = library(inner)
    if source == "torch":
        return TASKS["classification"]
    known = head_classes()
    for key in (*(cls.__name__ for cls in type(inner).__mro__), source):
        for name in known.get(key, ()):
            task = TASKS[name]
            if task.only is None or task.only(inner):
                return task
    alike = _by_ending(inner) if source == "transformers" else None
    if alike is not None:
        return alike
    takes_labels = "labels" in calling.forward_names(inner)[0]
    return TASKS["own_loss" if takes_labels else "embedding"]


def _by_ending(model: nn.Module) -> Task | None:
    """The task of a class of one's own by the end of its name, which transformers' mappings have: `ForMaskedLM`."""
    ending = re.search(r"For([A-Z]\w*)$", type(model).__name__)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", ending[1]).upper() if ending else ""
    found = [task for _, task in TASKS.items() if f"MODEL_FOR_{words}_MAPPING_NAMES" in task.heads]
    return next((task for task in found if task.only is None or task.only(model)), None)


def bind(
    model: nn.Module,
    output: "str | Output | OutputFunction" = AUTO,
    call: Call | None = None,
    batch: Batch | None = None,
) -> Output:
    """An output of a model, with all that running it takes: the call, and which target a position's logits are for.

    Args:
        model: any module.
        output: a name, "auto" for what the task of the model has as its default, an `Output`, or a function.
        call: how the model is run, a function (model, batch) -> whatever the output takes; else the output's own, or
            the task's.
        batch: of at least one example; what "auto" chooses by, and where the head's own loss is asked for the shift.

    Raises:
        CoarError: an unknown output; "auto" where there is a choice that only a person can make.
        DataError: the batch lacks what the default output needs.
    """
    task = of(model)
    chosen = outputs.get(task.default(model, batch) if isinstance(output, str) and output == AUTO else output)
    alignment = chosen.alignment and (task.alignment or chosen.alignment)
    if alignment is not None and call is None and batch is not None:
        alignment = _as_trained(model, task, batch) or alignment
    own = call is None and chosen.call is None  # so that it is the task's call that gives the unit
    unit = task.units.get(chosen.name, chosen.unit) if own else chosen.unit
    return replace(chosen, call=call or chosen.call or task.run, alignment=alignment, unit=unit)


def _as_trained(model: nn.Module, task: Task, batch: Batch) -> str | None:
    """How the head's own loss compares labels and logits of one example; None where it does not say.

    Some causal heads take labels that are moved already (decoders of BART's kind, XLNet), which no mapping tells.
    """
    if task.alignment not in (NEXT, SAME) or "labels" not in batch or library(wrapped(model)) != "transformers":
        return None
    device = calling.device_of(model)
    with calling.frozen(model), torch.no_grad():
        one = calling.to(calling.row(batch, 0), device)
        try:
            found = calling.call(model, one, without=())
            logits, loss = calling.logits_of(found).float(), found.loss
            near = {
                alignment: abs(float(-outputs.token_log_prob(logits, without_mask(one), alignment)) - float(loss))
                for alignment in (NEXT, SAME)
            }
        except (CoarError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return None
    best = min(near, key=near.__getitem__)
    other = SAME if best == NEXT else NEXT
    clear = near[best] < 1e-3 * max(1.0, abs(float(loss))) and near[other] > 10 * near[best]
    return best if clear else None


def without_mask(batch: Batch) -> dict[str, Any]:
    """The batch as the losses of heads see it, which go by the labels alone."""
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def explain(model: nn.Module, output: Output) -> str:
    """A sentence for errors: what else there is for this model."""
    task = of(model)
    return f"{type(wrapped(model)).__name__} is taken for {task.name!r}, whose outputs are {', '.join(task.outputs)}"


def two_sides(batch: Batch, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of a batch but those whose names begin so, and these under what follows."""
    plain = {name: value for name, value in batch.items() if not name.startswith(prefix)}
    return plain, {name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)}


def labels_of(batch: Batch, name: str = "labels") -> Tensor:
    """A tensor of targets.

    Raises:
        DataError: the batch has none of that name.
    """
    found = batch.get(name)
    if not isinstance(found, Tensor):
        what = "none" if found is None else f"a {type(found).__name__}"
        raise DataError(
            f"this output needs a tensor {name!r}, and the batch has {what}; it has {', '.join(batch)}. Give it, or an "
            "output that needs none: a function of (logits, batch), or outputs.Output(name, unit, function, "
            "takes='output') with one of (what the model returns, batch)"
        )
    return found
