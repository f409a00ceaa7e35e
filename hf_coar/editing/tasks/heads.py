"""Aims that may also fit the last layer anew, to what ablation leaves of the features."""

import logging
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from hf_coar.editing.making import kept_without
from hf_coar.editing.tasks import refitting
from hf_coar.editing.tasks.aims import Aim
from hf_coar.editing.tasks.looking import Seen
from hf_coar.editing.tasks.walking import NO_NUMBERS, Point, Verdict
from hf_coar.errors import CoarError, NonFiniteOutputError

logger = logging.getLogger(__name__)

REFITS = ("head", None)


def check_refit(refit: str | None) -> None:
    """Refuses what is neither "head" nor None.

    Raises:
        CoarError: it is.
    """
    if refit not in REFITS:
        raise CoarError(f"refit={refit!r}: give 'head', or None")


@dataclass(frozen=True)
class HeadAim(Aim):
    """An aim that judges by logits, so that the last layer can be fitted to it.

    Attributes:
        refit: "head" fits the last layer anew to what ablation leaves of the features; None ablates alone.
    """

    refit: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def verdict(self, seen: Seen) -> Verdict:
        """Judges by what a model makes of the examples to choose on."""

    @abstractmethod
    def loss_of(self, logits: Tensor) -> Tensor:
        """A scalar in nats, of the logits [examples, classes] of the examples that are attributed."""

    def judge(self, model: nn.Module) -> Verdict:
        """What the examples to choose on say of a model."""
        return self.verdict(self.of.see(model, self.parts.choose))

    def loss(self, model: nn.Module) -> Tensor:
        """What fine-tuning descends."""
        return self.loss_of(self.outputs(model))

    @cached_property
    def unfit(self) -> str:
        """Why the last layer can't be fitted anew; empty where it can. Asked for before anything is ablated."""
        name, model = self.of.looker.head, self.of.model
        if name is None:
            return f"no linear layer of the {type(model).__name__} is known to give its logits"
        if not refitting.reads(model.get_submodule(name), self.before["choose"]):
            return f"what {name} makes of its inputs are not the logits"
        parameters = {f"{name}.{one}" for one, _ in model.get_submodule(name).named_parameters()}
        groups = self.of.masked.components.groups
        if any(parameters & {one.parameter, *one.shared_by} for one in groups):
            return f"{name} holds components: what is ablated in it would be fitted anew"
        own = {id(one) for one in model.get_submodule(name).parameters()}
        users = {one for one, value in model.named_parameters(remove_duplicate=False) if id(value) in own} - parameters
        return f"{name} shares its weight with {', '.join(sorted(users))}" if users else ""

    def refitting_if_possible(self) -> Self:
        """This aim, without a new last layer where none can be had; says so."""
        if self.refit is None or not self.unfit:
            return self
        logger.warning("edit: the last layer is left as it is: %s", self.unfit)
        return replace(self, refit=None)

    def refitted(self, ablated: Tensor, rule: str) -> Point:
        """The model without some components, int64 [any], and with the last layer that does best on other examples."""
        with self.of.masked.ablated(kept_without(len(self.of.masked), ablated)) as model:
            try:
                return self.with_new_head(ablated, rule, *self.seen(model))
            except NonFiniteOutputError:
                return Point(ablated, rule, NO_NUMBERS)

    def with_new_head_alone(self) -> Point:
        """The model with nothing ablated and a last layer of its own."""
        return self.refitted(torch.empty(0, dtype=torch.long), "a new last layer alone")

    def seen(self, model: nn.Module) -> tuple[Seen, Seen]:
        """What a model makes of the examples that are attributed, and of those to choose on."""
        return self.of.see(model, self.parts.attribute), self.of.see(model, self.parts.choose)

    def with_new_head(self, ablated: Tensor, rule: str, attributed: Seen, choose: Seen) -> Point:
        """A model without some components, and with the last layer that does best, by what it makes of the examples.

        Args:
            ablated: which components, int64 [any].
            rule: name of the ranking.
            attributed: the examples to fit the layer to.
            choose: the examples to choose on.

        Raises:
            CoarError: no linear layer is known to give the logits, or it holds components or others' weights.
        """
        if self.unfit:
            raise CoarError(f"the last layer can't be fitted anew: {self.unfit}")
        head = self.of.model.get_submodule(self.of.looker.head)
        found = [
            Point(ablated, rule, self.verdict(self._with_logits(choose, logits)), layer)
            for layer, logits in refitting.candidates(head, attributed, self.loss_of, choose)
        ]
        return max(found, key=lambda one: (one.verdict.satisfies, one.verdict.spent <= 0, one.verdict.merit))

    def _with_logits(self, seen: Seen, logits: Tensor) -> Seen:
        values = self.of.looker.output(logits, {"labels": self.labels(self.parts.choose)})
        return Seen(values, logits, seen.features)
