"""`lift`: the group that fares worst, lifted at little cost to the average."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.data import Examples
from hf_coar.editing.rules import Sides
from hf_coar.editing.tasks import figures as fig
from hf_coar.editing.tasks.aims import ABLATION, Weigh, carried_out
from hf_coar.editing.tasks.figures import Figure
from hf_coar.editing.tasks.heads import HeadAim, check_refit
from hf_coar.editing.tasks.held import LEAST, Held, check_limits, divided
from hf_coar.editing.tasks.judged import Judged
from hf_coar.editing.tasks.looking import Seen
from hf_coar.editing.tasks.setting import EditResult, Setting
from hf_coar.editing.tasks.walking import Point, Verdict, margin
from hf_coar.errors import CoarError
from hf_coar.models.outputs import Output
from hf_coar.storage.texts import and_more

TEMPERATURE = 2.0
STEP_FRACTION = 0.02  # of the components: a tenth or more of them go, and two walks at 1 in 100 take minutes
MOST_TRIED = 12  # models measured on a walk
REFITTED = 4  # models on the way whose last layer is fitted anew, beside the one with nothing ablated
_NONE = torch.empty(0, dtype=torch.long)
_SHOWN = 8  # groups that an error names


def softened(logits: Tensor, batch: Any) -> Tensor:
    """Probability of the label at temperature 2, from 0 to 1, float32 [examples].

    Its slope is largest where an example is undecided, so that it stands for accuracy, which has no slope.
    """
    return (logits / TEMPERATURE).softmax(1).gather(1, batch["labels"][:, None])[:, 0]


SOFTENED = Output("softened", "probability", softened)


@dataclass(frozen=True)
class Lifting(HeadAim):
    """The worst groups are to fare better.

    Attributes:
        groups: number of every example's group, int64 [examples].
        average_within: what the average accuracy may fall by, from 0 to 1.
        smooth: attribute softened probabilities.
        names: of the groups.
    """

    groups: Tensor
    average_within: float
    smooth: bool = True
    names: Mapping[int, str] = field(default_factory=dict)
    kind: ClassVar[str] = "lift"
    rules: ClassVar[tuple[str, ...]] = ("welch", "covariance")
    quick: ClassVar[tuple[str, ...]] = ("last_layer",)

    @property
    def task(self) -> str:
        """In words."""
        return "lift the worst group"

    @property
    def wanted(self) -> str:
        """What an edit must do."""
        return f"lifts the worst group and costs the average {100 * self.average_within:.3g} points at most"

    def by_group(self, right: Tensor, part: Tensor) -> dict[int, float]:
        """Accuracy of every group."""
        groups = self.groups[part]
        return {group: float(right[groups == group].float().mean()) for group in self.groups.unique().tolist()}

    @cached_property
    def failing(self) -> list[int]:
        """Groups below the mean of all groups: those that are to rise."""
        found = self.by_group(self.of.right(self.before["attribute"]), self.parts.attribute)
        mean = sum(found.values()) / len(found)
        return [group for group, share in found.items() if share < mean] or [min(found, key=found.__getitem__)]

    def met(self, before: Verdict) -> str:
        """Whether no group is below the others by more than a standard error, of all examples that choose anything."""
        right = torch.cat([self.of.right(self.before[part]) for part in ("attribute", "choose")])
        groups = self.groups[torch.cat([self.parts.attribute, self.parts.choose])]
        shares = {group: fig.share_and_error(right[groups == group]) for group in groups.unique().tolist()}
        worst = min(shares, key=lambda group: shares[group][0])
        share, error = shares[worst]
        others, others_error = fig.share_and_error(right[groups != worst])
        if others - share > math.hypot(error, others_error):
            return ""
        return (
            f"all groups fare alike as it is: the worst, {self.names.get(worst, worst)}, has {100 * share:.1f} % of "
            f"{int((groups == worst).sum())} examples right and the others {100 * others:.1f} %, which is within a "
            "standard error. Give more data, or other groups"
        )

    def entries(self) -> dict[str, Any]:
        """What goes into the record."""
        rows = self.parts.attribute
        rows = rows[torch.isin(self.groups[rows], torch.tensor(self.failing))]
        return {"increase": self.of.held.numbers[rows].tolist()}

    def points(self) -> list[Point]:
        """A walk by either rule, on probabilities that are softened."""
        step = max(1, round(STEP_FRACTION * len(self.of.masked)))
        points = self.walked(step=step, tried=MOST_TRIED)
        if self.refit is None:
            return points
        # The layer is fitted to few of them: what ranks high without it does so with it.
        ranked = sorted(points, key=lambda one: (one.verdict.spent <= 0, one.verdict.merit), reverse=True)
        some = [Point(_NONE, ranked[0].rule, ranked[0].verdict), *ranked[:REFITTED]]
        return [*points, *(self.refitted(one.ablated, f"{one.rule}, last layer refitted") for one in some)]

    def plain(self) -> "Lifting":
        """The output of the task in the place of probabilities."""
        return replace(self, smooth=False)

    def sides(self, weigh: Weigh, model: nn.Module) -> Sides:
        """Every failing group against all others."""
        batches, groups = self.of.held.at(self.parts.attribute, self.of.batch), self.groups[self.parts.attribute]
        output = self.of.looker.output
        found = weigh(replace(SOFTENED, call=output.call) if self.smooth else output, batches)
        values = self.of.looker.look(model, batches).values.double()
        spared = ~torch.isin(groups, torch.tensor(self.failing))
        sets = [(1, found[groups == group]) for group in self.failing]
        return Sides(sets, found[spared], values[spared], output.boundary)

    def loss_of(self, logits: Tensor) -> Tensor:
        """Cross-entropy, every group counting alike."""
        groups, labels = self.groups[self.parts.attribute], self.labels(self.parts.attribute)
        each = F.cross_entropy(logits, labels.to(logits.device), reduction="none")
        return torch.stack([each[groups == group].mean() for group in groups.unique()]).mean()

    def verdict(self, seen: Seen) -> Verdict:
        """Judges by what a model makes of the examples to choose on."""
        part, was = self.parts.choose, self.of.right(self.before["choose"])
        now = self.of.right(seen)
        z = margin(len(self.rules))
        lost, error = fig.fall(was, now)
        groups = self.groups[part]
        # The lower bound of the group that fares worst: groups of few examples look good or bad by chance.
        shares = [fig.share_and_error(now[groups == group]) for group in self.groups.unique().tolist()]
        worst = min(share - e for share, e in shares)
        start = min(self.by_group(was, part).values())
        low = min(share for share, _ in shares)
        missing = max(start - low, 1 / len(part)) if fig.unmoved(start, low) else start - low
        short = f"the worst group had {start:.1%} before"
        return Verdict(low, float(now.float().mean()), missing, lost + z * error - self.average_within, worst, short)

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """The worst group before against the worst one after, and every group, on the examples to judge on."""
        part = self.parts.judge
        was, now = self.of.right(self.before["judge"]), self.of.right(self.of.see(model, part))
        shares = self.by_group(was, part), self.by_group(now, part)
        lows = [min(share, key=share.__getitem__) for share in shares]
        groups = self.groups[part]
        after = fig.of_shares("accuracy of the worst group", now[groups == lows[1]], now[groups == lows[1]])
        found = {"target": fig.Figure(after.what, shares[0][lows[0]], after.after, after.low, after.high, after.n)}
        found["others"] = fig.of_shares("average accuracy", was, now)
        loses = "accuracy of {}, which loses most"
        found["worst_other"] = fig.of_worst(loses, lambda group: self.names.get(group, str(group)), groups, was, now)
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for."""
        return {"others": self.average_within}

    def judged(self, model: nn.Module) -> list[Judged]:
        """By group; those that are to rise are what the edit is for."""
        groups = self.groups[self.parts.judge]
        return [self.shown(model, torch.isin(groups, torch.tensor(self.failing)), (groups, dict(self.names)))]


def groups_of(held: Held, data: Any, groups: Any) -> tuple[Tensor, dict[int, str]]:
    """The number of every example's group, int64 [examples], and what the groups are called.

    Args:
        held: the examples.
        data: from which they were read.
        groups: an entry of the batches or a column of the data set, which divides every class; or every example's group
            by its number or name.

    Raises:
        CoarError: no such entry or column, another number of groups than examples, one group, or one with too few.
    """
    found, name = _named(held, data, groups)
    if found.shape != (len(held),):
        raise CoarError(f"groups of shape {list(found.shape)} for {held.n_all} examples; give each a whole number")
    numbers, found = found.unique(return_inverse=True)
    if len(numbers) < 2:
        raise CoarError(f"all {len(held)} examples are of one group; there is nothing to lift one against")
    names = {place: name(number) for place, number in enumerate(numbers.tolist())}
    counts = {names[place]: held.n_different(found == place) for place in names}
    small = {name: count for name, count in counts.items() if count < sum(LEAST)}
    if small:
        shown = dict(list(small.items())[:_SHOWN])
        raise CoarError(
            f"groups with fewer than {sum(LEAST)} examples (group: examples): {shown}{and_more(len(small), _SHOWN)}, "
            f"of {len(names)}; that many are needed to attribute, to choose on and to judge on; give more data, or put "
            "groups together"
        )
    return found, names


def _named(held: Held, data: Any, groups: Any) -> tuple[Tensor, Callable[[int], str]]:
    """A number for every example, as they are given, and what a number is called."""
    if isinstance(groups, str):
        column = _column(data, groups)
        if column is None:
            found, places = held.entry(groups).unique(return_inverse=True)
            values = found.tolist()
        else:
            places, values = held.some(column[0]), column[1]
        labels, classes = held.labels.unique(return_inverse=True)

        def of_both(number: int) -> str:
            label, place = divmod(number, len(values))
            return f"{held.name(int(labels[label]))}, {groups} {values[place]}"

        return classes * len(values) + places, of_both
    if not isinstance(groups, Tensor) and any(isinstance(one, str) for one in groups):
        found, words = _numbered(groups)
        return held.some(found), lambda number: str(words[number])
    try:
        found = torch.as_tensor(groups).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_floating_point() or found.is_complex():
        kind = "" if found is None else " of fractions"
        raise CoarError(
            f"groups given by a {type(groups).__name__}{kind}; give the name of a column or of an entry of the "
            "batches, or every example's group by a whole number or a word"
        )
    found = held.some(found)
    classes = found.shape == held.labels.shape and torch.equal(found.long(), held.labels)
    return found, held.name if classes else lambda number: f"group {number}"


def _column(data: Any, name: str) -> tuple[Tensor, list] | None:
    """Places 0, 1, … of a column of the data set, int64 [examples], and its values; None where there is none."""
    dataset = data.dataset if isinstance(data, Examples) else data  # one of `datasets` may be given as it is
    if name not in (getattr(dataset, "column_names", None) or ()):
        return None
    return _numbered(list(dataset[name]))


def _numbered(values: Sequence[Any]) -> tuple[Tensor, list]:
    """Places 0, 1, … of values in their order as words, int64 [values], and the different ones."""
    different = sorted(set(values), key=str)
    known = {value: place for place, value in enumerate(different)}
    return torch.tensor([known[value] for value in values]), different


def lift(
    model: nn.Module,
    data: Any,
    groups: Any,
    *,
    average_within: float = 0.02,
    refit: str | None = "head",
    method: str = ABLATION,
    rivals: str | Sequence[str] | None = "quick",
    components: Components | None = None,
    seed: int = 0,
) -> EditResult:
    """A copy of a classifier whose worst group fares better, and the average hardly worse.

    Groups below the mean of all groups are to rise, the others to stay; softened probabilities are attributed anew
    after each step, by two rules, until the average's allowance is spent. Examples of their own choose the model with
    the best lower bound of the worst group; yet others judge.

    Args:
        model: a classifier; it stays as it was.
        data: labelled examples, as `attribute` takes them; read once and kept in memory.
        groups: a column of whole numbers or words that divides every class into groups; or every example's group, by
            its number or name.
        average_within: what the average accuracy may fall by, from 0 to 1.
        refit: "head" also fits the last layer anew, to the examples that are attributed; None ablates alone.
        method: "ablation", or a rival instead: see `editing.rivals`.
        rivals: which to measure beside it: "quick" (a refitted last layer), "all", names, or None.
        components: from `find_components(model)`, which is the default.
        seed: of the division.

    Raises:
        CoarError: no such column, groups that are too small, or a model that is edited already.
        UnsatisfiedError: nothing lifts the worst group within the limit.
    """
    check_limits(average_within=average_within)
    check_refit(refit)
    of = Setting.of(model, data, components)
    numbers, names = groups_of(of.held, data, groups)
    targets = numbers == int(numbers[0])  # every group is divided alike, and each is large enough
    parts = divided(of.held.firsts, numbers, targets, seed, "a group", every=True)
    aim = Lifting(of, parts, numbers, average_within, names=names, refit=refit)
    return carried_out(aim.refitting_if_possible(), method, rivals)
