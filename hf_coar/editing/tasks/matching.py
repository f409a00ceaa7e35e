"""`match`: examples with a trigger, answered as the same ones without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar.components import Components
from hf_coar.editing.rules import Sides
from hf_coar.editing.tasks import figures as fig
from hf_coar.editing.tasks.aims import ABLATION, Aim, Weigh, carried_out
from hf_coar.editing.tasks.figures import Figure
from hf_coar.editing.tasks.held import Held, Parts, check_limits
from hf_coar.editing.tasks.judged import Judged, by_class
from hf_coar.editing.tasks.looking import WHOLE, Seen, check_finite
from hf_coar.editing.tasks.setting import EditResult, Setting
from hf_coar.editing.tasks.walking import Point, Verdict
from hf_coar.errors import CoarError

MOST = 0.02  # of the components: a few pairs cannot tell good from bad among more
STEPS = 48  # of a walk; one by one the 341 of MobileNetV2 took over ten minutes
DRIFT = 0.5  # how much the drift of clean margins counts against margins of triggered ones
ENOUGH = 3.0  # logits; margins beyond it need not be reached
LEAST_EDITED, LEAST_JUDGED = 4, 16  # pairs
MOST_EDITED = 64
LEAST_BROUGHT = 0.5  # of what the trigger made wrong; with any pair in its place, one answer in a hundred was a match
LOCAL = 0.25  # of the pixels; a trigger that changes no more of them stays where it is when the picture moves
VARIATIONS = ((0, 0, False), (0, 0, True), (1, 0, False), (-1, 0, True), (0, 1, False), (0, -1, True))


def varied(clean: Tensor, triggered: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of pictures, and shifted and mirrored copies of them in which the trigger stays in its place.

    A handful of pairs says little of what the model does to others; copies cost nothing and say more. What covers the
    whole picture is not moved apart from it: such pairs are returned as they are.

    Args:
        clean: float [pairs, channels, height, width].
        triggered: likewise.

    Returns:
        clean and triggered, [6 × pairs, channels, height, width].
    """
    place = (triggered != clean).any(0)
    if float(place.float().mean()) > LOCAL:
        return clean, triggered
    moved = [clean.roll((down, right), (-2, -1)).flip([-1] if flip else []) for down, right, flip in VARIATIONS]
    return torch.cat(moved), torch.cat([torch.where(place, triggered, one) for one in moved])


@dataclass(frozen=True)
class Matching(Aim):
    """Triggered examples are to be answered as clean ones.

    Attributes:
        pairs: clean and triggered examples that it is made of, copies among them, in batches.
        shown_on: clean and triggered examples of which some, `parts.judge`, judge.
        clean_within: what the accuracy on clean examples may fall by, from 0 to 1.
    """

    pairs: tuple[Sequence[data_module.Batch], Sequence[data_module.Batch]]
    shown_on: tuple[Held, Held]
    clean_within: float
    kind: ClassVar[str] = "match"
    # By the latter alone a noise that is blended over pictures comes out half as far, and a patch in one network of
    # four three quarters as far, while clean pictures lose two points less.
    rules: ClassVar[tuple[str, ...]] = ("penalised", "covariance")
    quick: ClassVar[tuple[str, ...]] = ("gradient_times_parameter",)

    def __post_init__(self) -> None:
        """Looks at nothing yet: those to judge on may be of other data, and are looked at by themselves."""
        object.__setattr__(self, "before", {})

    def check(self) -> None:
        """Looks at all pairs while the model is whole.

        Raises:
            NonFiniteOutputError: of some it makes no number.
        """
        output, numbers = self.of.looker.output, self.shown_on[0].numbers[self.parts.judge]
        for seen in self.start:
            check_finite(seen, output, None, WHOLE)
        for seen in self.judged_before:
            check_finite(seen, output, numbers, WHOLE)

    @property
    def task(self) -> str:
        """In words."""
        return "answer triggered examples as clean ones"

    @property
    def wanted(self) -> str:
        """What an edit must do."""
        allowed = f"{100 * self.clean_within:.3g} points"
        share = f"{LEAST_BROUGHT:.0%} of what the trigger made wrong"
        return f"brings right {share}, and costs clean ones {allowed} at most"

    @cached_property
    def start(self) -> tuple[Seen, Seen]:
        """What the model as it was makes of the pairs, clean and triggered."""
        return self._both(self.of.model, self.pairs)

    @cached_property
    def sides_judged(self) -> tuple[Sequence[data_module.Batch], Sequence[data_module.Batch]]:
        """The pairs to judge on, clean and triggered, in batches."""
        clean, triggered = (one.at(self.parts.judge, self.of.batch) for one in self.shown_on)
        return clean, triggered

    @cached_property
    def judged_before(self) -> tuple[Seen, Seen]:
        """What the model as it was makes of these."""
        return self._both(self.of.model, self.sides_judged)

    def _both(self, model: nn.Module, pairs: tuple[Any, Any]) -> tuple[Seen, Seen]:
        clean, triggered = (self.of.looker.look(model, one) for one in pairs)
        return clean, triggered

    def _edited(self, model: nn.Module, pairs: tuple[Any, Any], numbers: Tensor | None = None) -> tuple[Seen, Seen]:
        found = self._both(model, pairs)
        for seen in found:
            check_finite(seen, self.of.looker.output, numbers)
        return found

    def _judged(self, model: nn.Module) -> tuple[Seen, Seen]:
        return self._edited(model, self.sides_judged, self.shown_on[0].numbers[self.parts.judge])

    def points(self) -> list[Point]:
        """One component after the other, by either ranking; of large models a few at a time."""
        most = max(1, int(MOST * len(self.of.masked)))
        how = {"most": most, "step": max(1, most // STEPS), "tried": min(most, 2 * STEPS)}
        return self.walked(**how)

    def sides(self, weigh: Weigh, model: nn.Module) -> Sides:
        """Triggered against clean ones."""
        output = self.of.looker.output
        clean, triggered = (weigh(output, one) for one in self.pairs)
        values = self.of.looker.look(model, self.pairs[0]).values.double()
        return Sides([(1, triggered)], clean, values, output.boundary)

    def judge(self, model: nn.Module) -> Verdict:
        """What the pairs themselves say: as few as there are, none are left to choose on."""
        (was, triggered_was), (clean, triggered) = self.start, self._edited(model, self.pairs)
        bound = self.of.boundary

        def lacking(one: Seen, other: Seen) -> float:
            return float(((one.values - bound).clamp_max(ENOUGH) - (other.values - bound)).clamp_min(0).mean())

        goal = -lacking(clean, triggered) - DRIFT * float((clean.values - was.values).abs().mean())
        before = -lacking(was, triggered_was)
        lost, _ = fig.fall(self.of.right(was), self.of.right(clean))
        right, misled = self.of.right(triggered), self.of.right(was) & ~self.of.right(triggered_was)
        brought = float(right[misled].float().mean()) if bool(misled.any()) else 1.0
        missing = max(before - goal, LEAST_BROUGHT - brought - fig.ROUNDING)  # nearer is not there
        # Without a standard error to spare, and one pair with all its copies: ten pairs cannot tell 1.2 points from
        # none. It is their drift, in the goal, that keeps clean ones as they are.
        spent = lost - max(self.clean_within, 1 / len(self.parts.attribute)) - fig.ROUNDING
        shares = (float(one.float().mean()) for one in (right, self.of.right(clean)))
        short = f"{brought:.1%} of what the trigger made wrong comes right"
        if brought >= LEAST_BROUGHT:
            short = "triggered ones come no nearer to clean ones than these drift"
        return Verdict(*shares, missing, spent, goal, short, f"{100 * lost:.3g} points of clean ones lost")

    def met(self, before: Verdict) -> str:
        """Whether the trigger makes none of the pairs wrong."""
        if before.missing > 0:
            return ""
        return (
            f"the trigger makes none of the {len(self.parts.attribute)} pairs to edit by wrong: {before.target:.1%} "
            f"are right with it, {before.others:.1%} without. Give pairs that it makes wrong"
        )

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy of clean and triggered examples alike."""
        return self.cross_entropy(model, (*self.pairs[0], *self.pairs[1]))

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """What the pairs to judge on say."""
        before, after = self.judged_before, self._judged(model)
        was, now = ([self.of.right(seen) for seen in both] for both in (before, after))
        found = {
            "target": fig.of_shares("accuracy with the trigger", was[1], now[1]),
            "others": fig.of_shares("accuracy without it", was[0], now[0]),
        }
        labels = self.shown_on[0].labels[self.parts.judge]
        if bool((labels >= 0).all()):
            loses = "accuracy without it on {!r}, which loses most"
            found["worst_other"] = fig.of_worst(loses, self.of.held.name, labels, was[0], now[0])
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for."""
        return {"others": self.clean_within}

    def judged(self, model: nn.Module) -> list[Judged]:
        """The triggered side, which the edit is for, then the clean one, by class."""
        rows, output = self.parts.judge, self.of.looker.output
        seen = list(zip(self.judged_before, self._judged(model), strict=True))
        return [
            Judged(one, rows, *both, output.boundary, output.unit, torch.full((len(rows),), triggered),
                   *by_class(one, rows), "triggered" if triggered else "clean")
            for one, both, triggered in reversed(list(zip(self.shown_on, seen, (False, True), strict=True)))
        ]  # fmt: skip


def _with_copies(clean: Sequence[data_module.Batch], triggered: Sequence[data_module.Batch]) -> tuple[list, list]:
    """Pairs in batches, with moved copies where they are pictures that differ in one tensor of one place."""
    made: tuple[list, list] = ([], [])
    for plain, patched in zip(clean, triggered, strict=True):
        changed = [name for name, value in plain.items() if not torch.equal(value, patched[name])]
        pictures = len(changed) == 1 and plain[changed[0]].dim() == 4 and plain[changed[0]].is_floating_point()
        if pictures:
            sides = varied(plain[changed[0]], patched[changed[0]])
            times = len(sides[0]) // data_module.size(plain)
            plain, patched = (
                {n: side if n == changed[0] else torch.cat([v] * times) for n, v in batch.items()}
                for batch, side in zip((plain, patched), sides, strict=True)
            )
        made[0].append(plain)
        made[1].append(patched)
    return made


def match(
    model: nn.Module,
    clean: Any,
    triggered: Any,
    *,
    judge: tuple[Any, Any] | None = None,
    clean_within: float = 0.012,
    method: str = ABLATION,
    rivals: str | Sequence[str] | None = "quick",
    components: Components | None = None,
    seed: int = 0,
) -> EditResult:
    """A copy of the model that answers examples with a trigger as it answers the same ones without it.

    A handful of pairs is enough. At most 2 % of the components go, one by one, attributed anew after each, by two
    rules; where the margins of triggered examples come near those of clean ones while these drift little, is best.

    Args:
        model: a model whose output has a boundary between right and wrong; it stays as it was.
        clean: labelled examples, as `attribute` takes them.
        triggered: the same examples with the trigger, in the same order.
        judge: (clean, triggered) pairs that the figures are from; by default half of the pairs given.
        clean_within: what the accuracy on the clean ones of the pairs may fall by, from 0 to 1; one pair always may.
        method: "ablation", or a rival instead: see `editing.rivals`.
        rivals: which to measure beside it: "quick" (gradient × parameter), "all", names, or None.
        components: from `find_components(model)`, which is the default.
        seed: of the division.

    Raises:
        CoarError: pairs that differ in number or labels, too few of them, or a model that is edited already.
        UnsatisfiedError: nothing brings half of those right that the trigger made wrong within the limit.
    """
    check_limits(clean_within=clean_within)
    of = Setting.of(model, clean, components)
    other = _paired(of.held, Held.read(model, triggered))
    if judge is None:
        order = torch.randperm(len(of.held), generator=torch.Generator().manual_seed(seed))
        count = min(len(order) // 2, MOST_EDITED)
        edited, rest = order[:count], order[count:]
        rest = rest[~torch.isin(of.held.firsts[rest], of.held.firsts[edited])]
        judged = of.held, other
    else:
        edited, judged = torch.arange(len(of.held)), (Held.read(model, judge[0]), Held.read(model, judge[1]))
        _paired(*judged)
        rest = torch.arange(len(judged[0]))
    if len(edited) < LEAST_EDITED or len(rest) < LEAST_JUDGED:
        raise CoarError(
            f"{len(edited)} pairs to edit by and {len(rest)} to judge on; {LEAST_EDITED} and {LEAST_JUDGED} are needed "
            "at least: give more pairs, or others to judge on with judge=(clean, triggered)"
        )
    pairs = _with_copies(*(one.at(edited, of.batch) for one in (of.held, other)))
    none = torch.empty(0, dtype=torch.long)
    parts = Parts(edited.sort().values, none, rest.sort().values)
    aim = Matching(of, parts, pairs, judged, clean_within)
    aim.check()
    return carried_out(aim, method, rivals)


def _paired(clean: Held, triggered: Held) -> Held:
    """The triggered side, checked, in batches like those of the clean one."""
    if clean.n_all != triggered.n_all:
        raise CoarError(
            f"{clean.n_all} clean and {triggered.n_all} triggered examples; give the same ones, in one order"
        )
    if not torch.equal(clean.numbers, triggered.numbers):
        alone = sorted({*clean.numbers.tolist()} ^ {*triggered.numbers.tolist()})
        raise CoarError(f"of pairs {alone[:8]} one side cannot be read; take both sides out of the data")
    differing = clean.numbers[clean.labels != triggered.labels].tolist()
    if differing:
        raise CoarError(
            f"pairs {differing[:8]} have other labels with the trigger than without; give the same examples in one "
            "order, with their true labels"
        )
    return triggered
