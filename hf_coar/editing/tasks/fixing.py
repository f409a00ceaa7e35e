"""`fix`: wrong examples that the model gets right from now on, at the least cost to all others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.editing.choosing import LARGEST_FRACTION
from hf_coar.editing.making import kept_without
from hf_coar.editing.rules import RULES, Sides
from hf_coar.editing.tasks import figures as fig
from hf_coar.editing.tasks.aims import ABLATION, Weigh, carried_out
from hf_coar.editing.tasks.figures import Figure
from hf_coar.editing.tasks.heads import HeadAim, check_refit
from hf_coar.editing.tasks.held import check_limits, divided
from hf_coar.editing.tasks.judged import Judged
from hf_coar.editing.tasks.looking import WHOLE, Seen
from hf_coar.editing.tasks.setting import EditResult, Setting
from hf_coar.editing.tasks.walking import Point, Verdict, margin
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.storage.texts import first_few

SMALL = 60  # components that may go of any network, all of one that has no more
SURE = 0.01  # above the boundary, in the unit of the output, from which an example counts as fixed
# Nats for a squared unit that an example is short of three times as far, which a new last layer pays, so that it ends
# in between. With 100 the search for it stopped short, and others fared worse; cross-entropy has no end and cost more.
# No script or figure of these trials is kept, and of other values nothing is known.
INSISTENCE = 10.0
NEIGHBOURS = 10  # wrong examples nearest to those fixed, among those to judge on


@dataclass(frozen=True)
class Fixing(HeadAim):
    """Some examples are to come right.

    Attributes:
        examples: where they are held, ascending.
        others_within: what the accuracy on all others may fall by, from 0 to 1.
    """

    examples: tuple[int, ...]
    others_within: float
    kind: ClassVar[str] = "fix"
    quick: ClassVar[tuple[str, ...]] = ("fine_tuning", "last_layer")

    @property
    def task(self) -> str:
        """In words."""
        return f"fix example{'' if len(self.examples) == 1 else 's'} {first_few(self.numbers, 4)}"

    @property
    def wanted(self) -> str:
        """What an edit must do."""
        allowed = f"{100 * self.others_within:.3g} points"
        return f"makes {'it' if len(self.examples) == 1 else 'all of them'} right and costs others {allowed} at most"

    def entries(self) -> dict[str, Any]:
        """What goes into the record."""
        return {"increase": self.numbers}

    @property
    def numbers(self) -> list[int]:
        """Their indices in the data set, ascending."""
        return self.of.held.numbers[list(self.examples)].tolist()

    @cached_property
    def targets(self) -> Tensor:
        """Where they are held, int64 [examples]."""
        return torch.tensor(self.examples)

    def sides(self, weigh: Weigh, model: nn.Module) -> Sides:
        """The examples against others."""
        batches, targets = self.of.held.at(self.parts.attribute, self.of.batch), self.own(self.parts.attribute)
        of_all = weigh(self.of.looker.output, batches)
        values = self.of.looker.look(model, batches).values.double()
        sets = [(1, one[None]) for one in of_all[targets]]
        goal = float((self.of.boundary + SURE - values[targets]).clamp_min(0).mean())
        return Sides(sets, of_all[~targets], values[~targets], self.of.looker.output.boundary, goal)

    def points(self) -> list[Point]:
        """The fewest components that fix; where they cost too much, a new last layer in their place, too.

        Not both: on a layer fitted anew to what the fewest components or half of them leave, the others fared worse
        than with none ablated.
        """
        found = self._fewest()
        if any(one.verdict.satisfies for one in found) or self.refitting_if_possible().refit is None:
            return found
        return [*found, self.with_new_head_alone()]

    def _fewest(self) -> list[Point]:
        """By every ranking the fewest components that fix, measured."""
        sides = self.sides(self.weigh, self.of.model)
        found = []
        for rule in self.rules:
            ranking = RULES[rule](sides)
            expected = len(sides.until_goal(ranking))
            count = fewest(lambda k, order=ranking: self._fixed(order[:k]), expected, len(ranking))
            found.append(self.candidate(ranking[:count], rule))
        return found

    def _fixed(self, ablated: Tensor) -> bool:
        try:
            with self.of.masked.ablated(kept_without(len(self.of.masked), ablated)) as model:
                return self._lacking(self.of.see(model, self.targets).values) <= 0
        except NonFiniteOutputError:
            return False

    def own(self, rows: Tensor) -> Tensor:
        """Which examples are to come right, bool [any]."""
        return torch.isin(rows, self.targets)

    def _lacking(self, values: Tensor) -> float:
        """What the example that is furthest from right lacks, in the unit of the output; of the outputs of all."""
        return self.of.boundary + SURE - float(values.min())

    def verdict(self, seen: Seen) -> Verdict:
        """Judges by what a model makes of the examples to choose on."""
        own = self.own(self.parts.choose)
        was, now = self.of.right(self.before["choose"])[~own], self.of.right(seen)[~own]
        lost, error = fig.fall(was, now)
        lacking = self._lacking(seen.values[own])
        # Accuracy alone is coarse: an edit changes a handful of a thousand predictions.
        smooth = torch.sigmoid(seen.values[~own] - self.of.boundary).mean()
        spent = lost + margin(len(self.rules)) * error - self.others_within
        short = f"an example is {lacking:.3g} {self.of.looker.output.unit} from right"
        return Verdict(float(lacking <= 0), float(now.float().mean()), lacking, spent, float(smooth), short)

    def loss_of(self, logits: Tensor) -> Tensor:
        """The others as they were, by the distance to the model's own answers, and the examples just right."""
        rows = self.parts.attribute
        own, was = self.own(rows), self.before["attribute"].logits.to(logits)
        others = F.kl_div(logits[~own].log_softmax(1), was[~own].softmax(1), reduction="batchmean")
        values = self.of.looker.output(logits[own], {"labels": self.labels(rows[own]).to(logits.device)})
        return others + INSISTENCE * (self.of.boundary + 3 * SURE - values).clamp_min(0).square().sum()

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy of the examples."""
        return self.cross_entropy(model, self.of.held.at(self.targets))

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """On the examples themselves, for which it was made, and on those to judge on, which chose nothing."""
        rows, before = self.parts.judge, self.before["judge"]
        seen, was = self.of.see(model, rows), self.of.right(before)
        now, labels = self.of.right(seen), self.labels(rows)
        own = self.of.see(self.of.model, self.targets), self.of.see(model, self.targets)
        loses = "accuracy on {!r}, which loses most"
        found = {
            "target": fig.of_shares("the examples to fix, for which it was made", *(self.of.right(one) for one in own)),
            "others": fig.of_shares("accuracy on all others", was, now),
            "worst_other": fig.of_worst(loses, self.of.held.name, labels, was, now),
        }
        near = self._neighbours(own[0].features, before.features, was)
        if near is not None:
            found["neighbours"] = fig.of_shares("wrong ones nearest to it in the features", was[near], now[near])
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for."""
        return {"others": self.others_within}

    def judged(self, model: nn.Module) -> list[Judged]:
        """Those to fix, which it was made for, and all others by class."""
        rows, none = self.targets, torch.zeros(len(self.targets), dtype=torch.long)
        seen = self.of.see(self.of.model, rows), self.of.see(model, rows)
        output, names = self.of.looker.output, {0: "to fix"}
        own = Judged(self.of.held, rows, *seen, output.boundary, output.unit, none == 0, none, names)
        return [own, self.shown(model, torch.zeros(len(self.parts.judge), dtype=torch.bool))]

    def _neighbours(self, own: Tensor | None, others: Tensor | None, right: Tensor) -> Tensor | None:
        """The wrong examples nearest to the fixed ones, by the cosine of the features."""
        wrong = (~right).nonzero()[:, 0]
        if own is None or others is None or not len(wrong):
            return None
        near = F.cosine_similarity(others[wrong][:, None], own[None], dim=2).max(1).values
        return wrong[near.topk(min(NEIGHBOURS, len(wrong))).indices]


def fewest(enough: Callable[[int], bool], start: int, n_all: int) -> int:
    """The smallest number that is enough while one less is not, found from where it is expected to be.

    Args:
        enough: of a number of components; mostly no for few and yes for many.
        start: the expected one.
        n_all: components in all; a fifth of them, or `SMALL` where that is less, is returned where no number up to
            there is enough.
    """
    most = max(int(LARGEST_FRACTION * n_all), min(SMALL, n_all))
    low, high = 0, min(max(1, start), most)
    while not enough(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def fix(
    model: nn.Module,
    data: Any,
    examples: Sequence[int],
    *,
    others_within: float = 0.01,
    refit: str | None = "head",
    method: str = ABLATION,
    rivals: str | Sequence[str] | None = "quick",
    components: Components | None = None,
    seed: int = 0,
) -> EditResult:
    """A copy of the model that gets some wrong examples right, at the least cost to others.

    The fewest components whose ablation makes them right; other examples tell whether these cost too much, and yet
    others judge. Where they do, nothing is ablated and the last layer is fitted anew instead. Whether the wrong
    examples nearest to them come right, too, is among the figures.

    Args:
        model: a model whose output has a boundary between right and wrong; it stays as it was.
        data: labelled examples, as `attribute` takes them; read once and kept in memory.
        examples: indices of those to fix, all of them wrong.
        others_within: what the accuracy on all others may fall by, from 0 to 1.
        refit: "head" fits the last layer anew where ablation costs too much, to the examples and to the model's own
            answers on those that are attributed; None ablates or fails.
        method: "ablation", or a rival instead: see `editing.rivals`.
        rivals: which to measure beside it: "quick" (fine-tuning on the examples, and a new last layer), "all", names,
            or None.
        components: from `find_components(model)`, which is the default.
        seed: of the division.

    Raises:
        CoarError: examples that are right already or not there, too few others, or a model that is edited already.
        UnsatisfiedError: nothing fixes them within the limit; the message says what comes nearest and what it costs.
    """
    check_limits(others_within=others_within)
    check_refit(refit)
    of = Setting.of(model, data, components)
    wanted = of.held.places(examples, "examples")
    none = torch.zeros(len(of.held), dtype=torch.bool)
    # One model is measured, so that all examples there are may say what it costs.
    parts = divided(of.held.firsts, of.held.labels, none, seed, "", wanted, spare=True).made_for(wanted)
    right = of.right(of.see(model, torch.tensor(wanted), WHOLE))
    if bool(right.any()):
        there = of.held.numbers[wanted][right].tolist()
        raise CoarError(f"examples {there[:8]} are right already; name wrong ones")
    return carried_out(Fixing(of, parts, tuple(wanted), others_within, refit=refit), method, rivals)
