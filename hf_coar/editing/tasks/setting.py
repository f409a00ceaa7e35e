"""What all tasks begin with, and what all of them return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import Components, find_components
from hf_coar.editing import edited as edited_model
from hf_coar.editing.tasks import refitting
from hf_coar.editing.tasks.figures import Figures
from hf_coar.editing.tasks.held import Held, Parts
from hf_coar.editing.tasks.judged import Judged
from hf_coar.editing.tasks.looking import EDITED, Looker, Seen, check_finite, weights
from hf_coar.errors import CoarError
from hf_coar.estimators import choosing
from hf_coar.masking import MaskedModel, constants, fingerprint_of
from hf_coar.models import tasks
from hf_coar.runs.memory import peak_bytes
from hf_coar.storage.registry import Bound, Registry

LOOKED_AT = 16  # examples, to find the fraction at which components are read
FRACTION = 0.05  # ablated, to see what a pass takes: all fractions take the same
MOST_BATCH = 128  # examples in one pass, where the data set has smaller batches of one shape
MOST_BYTES = 2**31  # that a gate pass may take with them; 128 images of 224 × 224 at once took MobileNetV2 16 GB
PLOTS: Registry[Callable] = Registry("picture of an edit")  # functions of results; the room `plots` registers them


@dataclass(frozen=True)
class Setting:
    """The model with its components, the examples, and how the model is looked at."""

    masked: MaskedModel
    held: Held
    looker: Looker

    @classmethod
    def of(cls, model: nn.Module, data: Any, components: Components | None, output: Any = None) -> "Setting":
        """Checks a model and reads the data.

        Args:
            model: to edit.
            data: examples.
            components: of the model; all by default.
            output: as for `attribute`; None where the call takes none, and the task's own is meant.

        Raises:
            CoarError: the model was edited already, or has no components or outputs to edit by.
        """
        check_base(model)
        held = Held.read(model, data)
        try:
            names = held.record["data"].get("label_names") or ()
            looker = Looker.of(model, held.batches[0], tasks.AUTO if output is None else output, names)
        except CoarError as error:
            if output is not None or "output=" not in str(error):
                raise
            raise type(error)(f"{error}. This call takes no output=…: coar.steer does") from error
        components = components or _found(model, looker, held.batches[0])
        masked = MaskedModel(model, replace(components, fingerprint=None))
        constants.check_says(model, masked.components.groups, masked.components.stand_in)
        models.check_saved(model, {group.parameter for group in masked.components.groups})
        return cls(masked, held, looker)

    @property
    def model(self) -> nn.Module:
        """The model, never changed for good."""
        return self.masked.model

    @cached_property
    def fraction(self) -> float:
        """The ablated fraction at which components are read: the largest at which half of what the model says survives.

        As `attribute` finds it. Of thin networks nothing survives .05: read there, ten pairs took a trigger out of
        MobileNetV2 for 60 to 81 % of images and cost clean ones 4 to 5 points; at .01 it was 95 %, for nothing.
        """
        rows = torch.linspace(0, len(self.held) - 1, min(len(self.held), LOOKED_AT)).long()
        batch = data_module.to_device(self.held.at(rows, LOOKED_AT)[0], models.device_of(self.model))
        with models.frozen(self.model):
            return choosing.shares_left(self.masked, self.looker.output, batch, seed=0)[-1][0]

    @cached_property
    def batch(self) -> int:
        """Examples in one pass: as in the data set, or more where memory allows, as that is quicker."""
        count = max(map(data_module.size, self.held.batches))
        if count >= MOST_BATCH:
            return MOST_BATCH
        largest = max((data_module.rows(batch, 0, 1) for batch in self.held.batches), key=_numbers)
        device = models.device_of(self.model)
        try:
            one = peak_bytes(
                lambda: weights(self.masked, self.looker.output, [data_module.to_device(largest, device)], FRACTION)
            )
        except CoarError:  # such as of gates that no gradient reaches; said where they are needed, not by every rival
            return count
        fitting = max(1, MOST_BYTES // max(1, one))
        # A power of two, as the peak differs by some bytes from time to time, and other batches round otherwise.
        return min(MOST_BATCH, max(count, 1 << fitting.bit_length() - 1))

    def see(self, model: nn.Module, rows: Tensor, state: tuple[str, str] = EDITED) -> Seen:
        """What a model makes of some examples, int64 [any], in ascending order.

        Raises:
            NonFiniteOutputError: of some it makes no number; `state` is as of `looking.check_finite`.
        """
        seen = self.looker.look(model, self.held.at(rows, self.batch))
        check_finite(seen, self.looker.output, self.held.numbers[rows], state)
        return seen

    def right(self, seen: Seen) -> Tensor:
        """Which of the examples the model gets right, bool [examples]."""
        return seen.values > self.boundary

    @property
    def boundary(self) -> float:
        """Where right turns into wrong.

        Raises:
            CoarError: it has none.
        """
        if self.looker.output.boundary is None:
            raise CoarError(
                f"no value of {self.looker.output.name!r} says that {type(models.wrapped(self.model)).__name__} is "
                "right; coar.steer edits for any output"
            )
        return self.looker.output.boundary


def _found(model: nn.Module, looker: Looker, batch: data_module.Batch) -> Components:
    """All components but those of the layer that gives the logits, whose neurons are the classes themselves.

    Of plain modules no library tells which that is; a pass does.
    """
    head = looker.head
    if models.output_modules(model) or head is None:
        return find_components(model)
    gives = refitting.reads(model.get_submodule(head), looker.look(model, [batch]))
    return find_components(model, exclude=[head] if gives else None)


def _numbers(batch: data_module.Batch) -> int:
    """How many numbers a batch consists of."""
    return sum(value.numel() for value in batch.values() if isinstance(value, Tensor))


def check_base(model: nn.Module) -> None:
    """Raises `CoarError` where the model was edited already: figures would be against that, and no undo leads back."""
    made = models.record(model).get("edit")
    if made:
        raise CoarError(
            f"the {type(model).__name__} given is edited already ({len(made.get('components') or ())} components, rule "
            f"{made.get('rule')}); edit the model as it was: coar.undo(edited, base) gives it, and so does loading it"
        )


@dataclass(frozen=True)
class EditResult:
    """What an edit by task gives.

    Attributes:
        model: the edited model, an ordinary one of its library; `coar.undo(result.model, base)` gives the base back.
        figures: before and after, on examples that chose nothing; `print(result.figures)` shows them.
        components: names of what was ablated, in order; none where a rival was taken instead.
        task: such as "forget 'Bag'".
        frontier: (components ablated, target, others) of the model as it was and of every one that was measured on the
            way, on the examples to choose on; for pictures, not for claims.
        limits: what was asked for, in the unit of the figures: what the "others" may lose, and the "target" to reach.
        look: what `judged` gives, looked at when first asked for.
    """

    model: nn.Module
    figures: Figures
    components: tuple[str, ...] = ()
    task: str = ""
    frontier: tuple[tuple[int, float, float], ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    look: Callable[[], Sequence[Judged]] | None = field(default=None, repr=False)

    @property
    def plot(self) -> Bound:
        """Pictures, which need `pip install "hf_coar[plots]"`: `groups()`, `frontier()`, `flips()`."""
        return Bound(PLOTS, self)

    @cached_property
    def judged(self) -> tuple[Judged, ...]:
        """The examples to judge on one by one, before and after.

        Raises:
            CoarError: they are not at hand: the result was not made by an edit of this session.
        """
        if self.look is None:
            raise CoarError(
                "this result holds no examples to look at; those of coar.forget, fix, lift, match, steer do"
            )
        return tuple(self.look())

    def save(self, folder: str | Path, pictures: str | Path | None = None, overwrite: bool = False) -> None:
        """Save the model as its own library does, with the record of the edit and a card of the figures.

        Args:
            folder: made if it does not exist; otherwise empty, or one that a model was saved to before.
            pictures: a folder of PNG files for the card.
            overwrite: take a folder that holds other things as well.

        Raises:
            CoarError: the folder holds other things or cannot be written.
        """
        edited_model.save(self.model, folder, self.figures.rows(), pictures, overwrite)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save` saves; see `editing.edited.push_to_hub`, whose options these are.

        Returns:
            The address of the commit.
        """
        return edited_model.push_to_hub(self.model, repo_id, self.figures.rows(), **options)

    def __str__(self) -> str:
        """The task, what was done, and its figures."""
        refitted = (models.record(self.model).get("edit") or {}).get("refit")
        done = [f"{len(self.components)} components ablated"] if self.components else []
        done += [f"last layer {refitted} fitted anew"] if refitted else []
        return f"{self.task}{': ' if done else ''}{', '.join(done)}\n{self.figures}"


def common_entries(of: Setting) -> dict[str, Any]:
    """Entries of the record that every edit by task has, and that `undo` needs."""
    base = {**models.record(of.model), "fingerprint": fingerprint_of(of.model, anew=True)}
    data, output = dict(of.held.record["data"]), of.looker.output.name
    return {"output": output, "data": data, "base": base, "reference": "all others", "increase": [], "decrease": []}


def counts(parts: Parts) -> str:
    """How many examples did what, for the record."""
    return f"{len(parts.attribute)} attributed, {len(parts.choose)} to choose on, {len(parts.judge)} to judge on"
