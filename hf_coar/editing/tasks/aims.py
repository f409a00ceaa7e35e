"""What an edit is for: an aim says what to ablate next, how far to go, and what comes out; here it is carried out."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.editing.making import kept_without, with_ablated
from hf_coar.editing.rules import RULES, Sides
from hf_coar.editing.tasks import refitting
from hf_coar.editing.tasks.figures import Figure, Figures
from hf_coar.editing.tasks.held import Parts
from hf_coar.editing.tasks.judged import Judged, by_class
from hf_coar.editing.tasks.looking import WHOLE, Seen, weights
from hf_coar.editing.tasks.setting import EditResult, Setting, common_entries, counts
from hf_coar.editing.tasks.walking import NO_NUMBERS, Point, Verdict, best, walk
from hf_coar.errors import CoarError, NonFiniteOutputError, UnsatisfiedError
from hf_coar.models import calling
from hf_coar.models.outputs import Output
from hf_coar.storage.registry import Registry

logger = logging.getLogger(__name__)

ABLATION = "ablation"

Weigh = Callable[[Output, Sequence[data_module.Batch]], Tensor]


@dataclass(frozen=True)
class Aim(ABC):
    """An edit's aim, for one model and its data.

    Attributes:
        of: model and data.
        parts: which examples do what.
        before: what the model as it was makes of every part that has examples, by its name.
        kind: such as "forget".
        quick: rivals that are measured unless others are asked for.
        shows: the figure that the edit is for, and which way it is to go: 1 up, -1 down.
        rules: names of the rankings that are tried, one after the other.
    """

    of: Setting
    parts: Parts
    before: dict[str, Seen] = field(init=False, repr=False, compare=False)
    kind: ClassVar[str] = ""
    quick: ClassVar[tuple[str, ...]] = ()
    shows: ClassVar[tuple[str, int]] = ("target", 1)
    rules: ClassVar[tuple[str, ...]] = ("covariance",)

    def __post_init__(self) -> None:
        """Looks at the model while it is whole: a look on first use fell into a block that ablates, where it isn't."""
        found = {part: rows for part, rows in vars(self.parts).items() if len(rows)}
        seen = {part: self.of.see(self.of.model, rows, WHOLE) for part, rows in found.items()}
        object.__setattr__(self, "before", seen)

    @property
    @abstractmethod
    def task(self) -> str:
        """In words, such as "forget 'Bag'"."""

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What an edit must do, in words that follow "no edit found that …"."""

    @abstractmethod
    def judge(self, model: nn.Module) -> Verdict:
        """What the examples to choose on say of a model."""

    @abstractmethod
    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """What the examples to judge on say of a model, beside what they said before the edit."""

    @abstractmethod
    def judged(self, model: nn.Module) -> Sequence[Judged]:
        """The examples to judge on one by one, before and after the edit."""

    @property
    @abstractmethod
    def limits(self) -> dict[str, float]:
        """What is asked for, as of `EditResult`."""

    @abstractmethod
    def sides(self, weigh: Weigh, model: nn.Module) -> Sides:
        """What rules rank by, of the model as it is now.

        Args:
            weigh: (output, batches) -> what every component does to every example, float64 [examples, components].
            model: some of whose components may be ablated.
        """

    @abstractmethod
    def points(self) -> list[Point]:
        """Models without some components, measured."""

    @abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """What fine-tuning, the rival, would descend: a scalar, of the examples that are attributed."""

    def met(self, before: Verdict) -> str:
        """Why there is nothing to do, in words; empty where there is.

        Args:
            before: of the model as it was.
        """
        if before.missing > 0:
            return ""
        found = f"target {before.target:.3g}, others {before.others:.3g}"
        return f"with nothing ablated the examples to choose on are where they are to be ({found})"

    def untold(self) -> str:
        """Why no model could be seen to keep the limits, whatever is done, in words; empty where one could."""
        return ""

    def entries(self) -> dict[str, Any]:
        """What goes into the record of the edit."""
        return {}

    def plain(self) -> "Aim":
        """This aim with what the paper attributes: nothing but the output of the task."""
        return self

    @property
    def boundary(self) -> float | None:
        """Where right turns into wrong among the others; None where their outputs themselves are what is to stay."""
        return self.of.looker.output.boundary

    # ---------------------------------------------------------------------------------------------- what aims have

    def doubts(self, figures: Mapping[str, Figure]) -> list[str]:
        """What examples that chose nothing say against an edit: that it is none for them, or costs more than it may.

        A limit counts as broken where chance does not explain it: choosing keeps a margin, judging has an error, too.
        """
        (name, sign), found = self.shows, []
        shown, others = figures[name], figures["others"]
        if sign * shown.change <= 0:
            found.append(f"{_moved(shown)}: the edit does not carry over to them; more data may help")
        lost = -others.change if self.boundary is not None else abs(others.change)
        if lost - (others.spread or 0.0) > self.limits["others"]:
            found.append(f"{_moved(others)}: that is more than was allowed; more data to choose on may help")
        return found

    def shown(self, model: nn.Module, target: Tensor, grouped: tuple[Tensor, dict[int, str]] | None = None) -> Judged:
        """The examples to judge on, by class or by other groups.

        Args:
            model: edited.
            target: which of them the edit is for, bool [examples].
            grouped: groups int64 [examples] and their names; classes by default.
        """
        rows, unit = self.parts.judge, self.of.looker.output.unit
        groups, names = by_class(self.of.held, rows) if grouped is None else grouped
        seen = self.before["judge"], self.of.see(model, rows)
        return Judged(self.of.held, rows, *seen, self.boundary, unit, target, groups, names)

    def labels(self, rows: Tensor) -> Tensor:
        """Labels of examples, int64 [any]."""
        return self.of.held.labels[rows]

    @cached_property
    def inputs(self) -> list[data_module.Batch]:
        """The examples that are attributed, on the model's device."""
        device = models.device_of(self.of.model)
        return [data_module.to_device(batch, device) for batch in self.of.held.at(self.parts.attribute, self.of.batch)]

    def outputs(self, model: nn.Module) -> Tensor:
        """The logits of these, float32 [examples, classes], differentiable."""
        return torch.cat([self._logits(model, batch) for batch in self.inputs])

    def cross_entropy(self, model: nn.Module, batches: Sequence[data_module.Batch]) -> Tensor:
        """The mean over batches of the cross-entropy of their labels, differentiable."""
        moved = (data_module.to_device(batch, next(model.parameters()).device) for batch in batches)
        return torch.stack([F.cross_entropy(self._logits(model, batch), batch["labels"]) for batch in moved]).mean()

    def _logits(self, model: nn.Module, batch: data_module.Batch) -> Tensor:
        return calling.logits_of(self.of.looker.output.call(model, batch)).float()

    def weigh(self, output: Output, batches: Sequence[data_module.Batch]) -> Tensor:
        """Attributions by one pass, float64 [examples, components]."""
        return weights(self.of.masked, output, batches, self.of.fraction).double()

    def walked(self, **options: Any) -> list[Point]:
        """By every rule a walk that ends when the allowance is spent, with what `sides` says after every step."""
        return [point for rule in self.rules for point in self._walked(rule, **options)]

    def _walked(self, rule: str, **options: Any) -> list[Point]:
        def rank(model: nn.Module, ablated: Tensor) -> Tensor:
            try:
                return RULES[rule](self.sides(self.weigh, model))
            except NonFiniteOutputError:
                if not len(ablated):
                    raise
                logger.info("edit: %s, %d components: what is attributed gives no numbers", rule, len(ablated))
                return ablated[:0]  # nothing can be ranked any more, which ends the walk

        def measure(model: nn.Module, ablated: Tensor) -> Sequence[Point]:
            try:
                return self.measured(model, ablated, rule)
            except NonFiniteOutputError:
                return [Point(ablated, rule, NO_NUMBERS)]

        return walk(self.of.masked, rank, measure, **options)

    def measured(self, model: nn.Module, ablated: Tensor, rule: str) -> list[Point]:
        """A model on the way, without some components, int64 [any]: as it is, and with what else there is to try."""
        return [Point(ablated, rule, self.judge(model))]

    def candidate(self, ablated: Tensor, rule: str) -> Point:
        """One model without some components, int64 [any], measured."""
        with self.of.masked.ablated(kept_without(len(self.of.masked), ablated)) as model:
            try:
                return Point(ablated, rule, self.judge(model))
            except NonFiniteOutputError:
                return Point(ablated, rule, NO_NUMBERS)


# ------------------------------------------------------------------------------------------------------------ rivals

Rival = Callable[[Aim], nn.Module]  # an edited copy of the model, with the record of what was done

RIVALS: Registry[Rival] = Registry("rival")
_OF_TASKS: dict[str, tuple[str, ...]] = {}


def rival(name: str, tasks: Sequence[str]) -> Callable[[Rival], Rival]:
    """Decorator: makes a function (aim) -> edited model known as a rival of edits of some kinds."""

    def add(function: Rival) -> Rival:
        RIVALS.add(name, function)
        _OF_TASKS[name] = tuple(tasks)
        return function

    return add


def rivals_of(kind: str) -> list[str]:
    """The names of all rivals of a kind of edit."""
    return [name for name in RIVALS.names() if kind in _OF_TASKS[name]]


def changed_copy(aim: Aim, rule: str) -> nn.Module:
    """A copy of the model for a rival to change, with the record of it; `note_changed` completes that."""
    record = common_entries(aim.of) | {"rule": rule, "components": [], "indices": [], "examples": counts(aim.parts)}
    return models.copy_with_record(aim.of.model, edit={**record, "task": aim.task, **aim.entries()})


def note_changed(aim: Aim, changed: nn.Module) -> nn.Module:
    """Writes into the record which parameters a rival has changed, so that `undo` can put them back."""
    was = dict(aim.of.model.named_parameters())
    names = [name for name, value in changed.named_parameters() if not torch.equal(value, was[name])]
    getattr(changed, models.records.RECORD)["edit"]["parameters"] = sorted(names)
    return changed


# --------------------------------------------------------------------------------------------------- carrying it out


def carried_out(aim: Aim, method: str, rivals: str | Sequence[str] | None) -> EditResult:
    """The edit of an aim, by ablation or by a rival, measured beside other rivals.

    Args:
        aim: of the edit.
        method: "ablation", or the name of a rival.
        rivals: to measure: names, "quick" for those that take no time, "all", or none. Of a group, those are left out
            that this model can't have.

    Raises:
        UnsatisfiedError: nothing keeps the limits, or too few examples could tell.
        CoarError: an unknown method or rival, or a named one that this model can't have; or nothing to do.
    """
    names = _chosen(aim, rivals)
    logger.info("edit: %s, by %s", aim.task, counts(aim.parts))
    if method != ABLATION:
        _check(aim, method)
    before = aim.judge(aim.of.model)
    _check_possible(aim, before)
    if method != ABLATION:
        made = _result(aim, RIVALS[method](aim), (), f"{aim.task} by {method}")
    else:
        made = _ablated(aim, before)
    for doubt in aim.doubts(made.figures):
        logger.warning("%s: by examples that chose nothing, %s", aim.task, doubt)
    against = _measured(aim, [name for name in names if name != method], named=rivals not in _GROUPS)
    return replace(made, figures=Figures(made.figures.measured, against))


def _check_possible(aim: Aim, before: Verdict) -> None:
    """Raises where there is nothing to do, or nothing that could be seen to keep the limits."""
    if why := aim.met(before):
        raise CoarError(f"{aim.task}: there is nothing to do, as {why}")
    if why := aim.untold():
        raise UnsatisfiedError(f"{aim.task}: {why}")
    if aim.boundary is not None and before.others <= aim.limits["others"]:
        raise CoarError(
            f"{aim.task}: of the others {before.others:.1%} are right as it is, so that they could lose no more than "
            f"the limit of {aim.limits['others']:.1%} whatever is done. See that the labels are those that the model "
            "was trained on, or allow less; coar.steer keeps mean outputs where nothing is right"
        )


def _measured(aim: Aim, names: Sequence[str], named: bool) -> dict[str, Mapping[str, Figure]]:
    """The figures of rivals, none of those that keep no limits; one that this model can't have is an error if named."""
    found: dict[str, Mapping[str, Figure]] = {}
    for name in names:
        try:
            found[name] = aim.figures(RIVALS[name](aim))
        except UnsatisfiedError:
            found[name] = {}
        except NonFiniteOutputError as error:  # the edit itself is made, and has its figures
            logger.warning("edit: %s is not measured: %s", name, error)
        except CoarError as error:
            if named:
                raise
            logger.info("edit: %s is not measured: %s", name, error)
    return found


def _moved(figure: Figure) -> str:
    what, before, after = figure.row()
    return f"{what} went from {before} to {after}"


_GROUPS = ("quick", "all")


def _chosen(aim: Aim, rivals: str | Sequence[str] | None) -> list[str]:
    if rivals is None:
        return []
    if isinstance(rivals, str):
        rivals = {"quick": aim.quick, "all": rivals_of(aim.kind)}.get(rivals, (rivals,))
    for name in rivals:
        _check(aim, name)
    return list(rivals)


def _check(aim: Aim, name: str) -> None:
    known = rivals_of(aim.kind)
    if name not in known:
        raise CoarError(f"{aim.kind} knows no rival {name!r}; there are {', '.join(known)}")


def _ablated(aim: Aim, before: Verdict) -> EditResult:
    of, components = aim.of, aim.of.masked.components
    points = aim.points()
    point = best(points, aim.wanted, before)
    named = [components[int(index)] for index in point.ablated]
    parameters = {name for one in named for name in (one.group.parameter, *one.group.shared_by)}
    record = common_entries(of) | {
        "task": aim.task,
        "rule": point.rule,
        "granularity": components.granularity,
        "read_at": of.fraction,
        "components": [str(one) for one in named],
        "indices": point.ablated.tolist(),
        "parameters": sorted(parameters),
        "examples": counts(aim.parts),
        "tried": [list(vars(one.as_candidate()).values()) for one in points],
        **aim.entries(),
    }
    head = of.looker.head
    if point.head is not None:
        layers = {id(value) for value in of.model.get_submodule(head).parameters()}
        names = [name for name, value in of.model.named_parameters() if id(value) in layers]
        record |= {"refit": head, "parameters": sorted({*record["parameters"], *names})}
    edited = with_ablated(of.model, components, kept_without(len(components), point.ablated), record)
    if point.head is not None:
        refitting.put(edited.get_submodule(head), *point.head)
    way = [(0, before.target, before.others)]
    way += [(len(one.ablated), one.verdict.target, one.verdict.others) for one in points if one.verdict.has_numbers]
    return _result(aim, edited, tuple(record["components"]), aim.task, tuple(way))


def _result(aim: Aim, edited: nn.Module, components: tuple[str, ...], task: str, way: tuple = ()) -> EditResult:
    figures = Figures(aim.figures(edited))
    return EditResult(edited, figures, components, task, way, aim.limits, lambda: aim.judged(edited))
