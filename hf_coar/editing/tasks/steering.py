"""`steer`: outputs of some examples up, of others down, and the rest as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_coar.components import Components
from hf_coar.editing.rules import Sides
from hf_coar.editing.tasks import figures as fig
from hf_coar.editing.tasks.aims import ABLATION, Aim, Weigh, carried_out
from hf_coar.editing.tasks.figures import Figure, Figures
from hf_coar.editing.tasks.held import Held, Parts, check_enough, check_limits, divided, indices_of
from hf_coar.editing.tasks.judged import Judged, by_class
from hf_coar.editing.tasks.looking import Looker
from hf_coar.editing.tasks.setting import EditResult, Setting
from hf_coar.editing.tasks.walking import WALK, Point, Verdict, margin
from hf_coar.errors import CoarError
from hf_coar.masking import MaskedModel
from hf_coar.models import tasks


@dataclass(frozen=True)
class Steering(Aim):
    """Outputs of some examples are to move.

    Attributes:
        signs: +1 for those to rise, -1 for those to fall, 0 for the rest, int64 [examples].
        others_within: what the rest may lose: of its accuracy, from 0 to 1; where no value of the output is right or
            wrong, of its mean output, in standard deviations.
    """

    signs: Tensor
    others_within: float
    kind: ClassVar[str] = "steer"
    shows: ClassVar[tuple[str, int]] = ("moved", 1)

    @property
    def task(self) -> str:
        """In words."""
        counts = {verb: int((self.signs == sign).sum()) for sign, verb in ((1, "raise"), (-1, "lower"))}
        sides = ", ".join(f"{verb} {count} examples" for verb, count in counts.items() if count)
        return f"steer outputs ({sides})"

    @cached_property
    def boundary(self) -> float | None:
        """Where right turns into wrong; None where so few are right that these could all go within the limit.

        As of texts whose mean token is never right: a limit on their accuracy is none, and their mean output is kept.
        """
        part = "choose" if len(self.parts.choose) else "judge"
        rest, boundary = self.signs[getattr(self.parts, part)] == 0, self.of.looker.output.boundary
        if boundary is None or not bool(rest.any()):
            return boundary
        right = self.before[part].values[rest] > boundary
        return boundary if float(right.float().mean()) > self.others_within else None

    @cached_property
    def scale(self) -> float:
        """The standard deviation of the others' outputs that a limit is in: of those to choose on, which it binds."""
        rest = self.signs[self.parts.choose] == 0
        return float(self.before["choose"].values[rest].std()) or 1.0

    @property
    def wanted(self) -> str:
        """What an edit must do."""
        return f"moves the targets the right way and keeps the others within {self.others_within:.3g}"

    def entries(self) -> dict[str, Any]:
        """What goes into the record."""
        rows = self.parts.attribute
        sides = {"increase": 1, "decrease": -1}
        numbers = self.of.held.numbers[rows]
        return {side: numbers[self.signs[rows] == sign].tolist() for side, sign in sides.items()}

    def points(self) -> list[Point]:
        """A walk until the allowance is spent."""
        return self.walked()

    def sides(self, weigh: Weigh, model: nn.Module) -> Sides:
        """Those to move against the rest."""
        output, signs = self.of.looker.output, self.signs[self.parts.attribute]
        batches = self.of.held.at(self.parts.attribute, self.of.batch)
        found = weigh(output, batches)
        values = self.of.looker.look(model, batches).values.double()
        sets = [(sign, found[signs == sign]) for sign in (1, -1) if bool((signs == sign).any())]
        return Sides(sets, found[signs == 0], values[signs == 0], self.boundary)

    def loss(self, model: nn.Module) -> Tensor:
        """Minus the outputs of those to rise, plus those of those to fall, plus the squared drift of the rest."""
        found = torch.cat([self.of.looker.output.of(model, batch) for batch in self.inputs])
        signs = self.signs[self.parts.attribute].to(found.device)
        drift = (found - self.before["attribute"].values.to(found))[signs == 0].square().mean()
        return drift - (found * signs)[signs != 0].mean()

    def judge(self, model: nn.Module) -> Verdict:
        """What the examples to choose on say of a model."""
        signs, was = self.signs[self.parts.choose], self.before["choose"]
        seen = self.of.see(model, self.parts.choose)
        moved = ((seen.values - was.values) * signs)[signs != 0]
        error = float(moved.std()) / len(moved) ** 0.5
        lost, lost_error, others = self._lost(was.values[signs == 0], seen.values[signs == 0])
        mean, spent = float(moved.mean()), lost + lost_error - self.others_within
        safe = lost + margin(WALK) * lost_error <= self.others_within
        missing = error - mean if bool(moved.any()) else fig.ROUNDING  # where nothing moves, nothing is there
        short = "" if bool(moved.any()) else "nothing moves"
        return Verdict(mean, others, missing, spent, mean if safe else -1 - lost, short)

    def _lost(self, was: Tensor, now: Tensor) -> tuple[float, float, float]:
        """By how much the rest is worse, the standard error of that, and how it is."""
        boundary = self.boundary
        if boundary is not None:
            return *fig.fall(was > boundary, now > boundary), float((now > boundary).float().mean())
        lost, error = fig.fall(was / self.scale, now / self.scale)
        return abs(lost), error, float(now.mean())

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """On the examples to judge on."""
        rows, before = self.parts.judge, self.before["judge"]
        seen, signs = self.of.see(model, rows), self.signs[rows]
        unit, found = self.of.looker.output.unit, {}
        for name, sign, what in (("target", 1, "those to rise"), ("target_lowered", -1, "those to fall")):
            if bool((signs == sign).any()):
                key = name if "target" in found else "target"
                of = signs == sign
                found[key] = fig.of_means(f"mean output of {what}", before.values[of], seen.values[of], unit)
        rest, boundary = signs == 0, self.boundary
        moved = ((seen.values - before.values) * signs)[~rest]
        what = "how far the targets moved the way that they were to"
        found["moved"] = fig.of_means(what, torch.zeros(len(moved)), moved, unit)
        if boundary is None:
            allowed = f", which may move by {self.limits['others']:.2g}" if len(self.parts.choose) else ""
            what = f"mean output of the others{allowed}"
            found["others"] = fig.of_means(what, before.values[rest], seen.values[rest], unit)
            return found
        was, now = before.values > boundary, seen.values > boundary
        found["others"] = fig.of_shares("others that are right", was[rest], now[rest])
        labels = self.labels(rows)
        if bool((labels[rest] >= 0).all()):
            lose = "others of {!r} that are right, which lose most"
            found["worst_other"] = fig.of_worst(lose, self.of.held.name, labels[rest], was[rest], now[rest])
        return found

    @property
    def limits(self) -> dict[str, float]:
        """What is asked for."""
        if self.boundary is not None:
            return {"others": self.others_within}
        return {"others": self.others_within * self.scale}

    def judged(self, model: nn.Module) -> list[Judged]:
        """Those to rise, those to fall, and the others by class."""
        rows = self.parts.judge
        groups, names = by_class(self.of.held, rows)
        signs = self.signs[rows]
        moved = {-2: (1, "to rise"), -3: (-1, "to fall")}
        for group, (sign, _) in moved.items():
            groups = torch.where(signs == sign, group, groups)
        names = {-1: "the others"} if set(names) == {-1} else {one: f"others, {name}" for one, name in names.items()}
        named = {group: name for group, (_, name) in moved.items()} | names
        return [self.shown(model, signs != 0, (groups, named))]


def before_and_after(
    model: nn.Module,
    edited: nn.Module,
    data: Any,
    components: Components,
    increase: Sequence[int],
    decrease: Sequence[int],
    output: Any,
) -> Figures:
    """What an edit has done to examples, whatever these were used for before: the same figures as of `steer`.

    Args:
        model: as it was.
        edited: as it is.
        data: examples, as `attribute` takes them.
        components: of the model.
        increase: indices of those that were to rise.
        decrease: of those that were to fall.
        output: as for `attribute`.
    """
    held = Held.read(model, data)
    of = Setting(MaskedModel(model, components), held, Looker.of(model, held.batches[0], output))
    signs, none = torch.zeros(len(held), dtype=torch.long), torch.empty(0, dtype=torch.long)
    for side, given, sign in (("increase", increase, 1), ("decrease", decrease, -1)):
        signs[held.places(given, side) if given else []] = sign
    aim = Steering(of, Parts(none, none, torch.arange(len(held))), signs, 0.0)
    return Figures(aim.figures(edited))


def steer(
    model: nn.Module,
    data: Any,
    increase: Any = None,
    decrease: Any = None,
    *,
    others_within: float = 0.015,
    output: Any = tasks.AUTO,
    method: str = ABLATION,
    rivals: str | Sequence[str] | None = None,
    components: Components | None = None,
    seed: int = 0,
) -> EditResult:
    """A copy of the model whose outputs rise on some examples, fall on others, and stay on the rest.

    Works for any model and output. The targets are divided like all other examples: some are attributed, some choose
    how far to go, and the rest judges, so that what is said of them is said of others of their kind.

    Args:
        model: it stays as it was.
        data: examples, as `attribute` takes them; read once and kept in memory.
        increase: examples whose outputs are to rise: indices, a class name, or `{"label": 3}`.
        decrease: examples whose outputs are to fall, given likewise.
        others_within: what the rest may lose: of its accuracy, from 0 to 1; where no value of the output is right or
            wrong, or no more of the rest than this is right, of its mean output, in standard deviations.
        output: as for `attribute`.
        method: "ablation", or a rival instead: see `editing.rivals`.
        rivals: which to measure beside it: "all", names, or None.
        components: from `find_components(model)`, which is the default.
        seed: of the division.

    Raises:
        CoarError: no targets, an example on both sides, too few of them, or a model that is edited already.
        UnsatisfiedError: nothing moves the targets within the limit.
    """
    check_limits(others_within=others_within)
    of = Setting.of(model, data, components, output)
    signs = torch.zeros(len(of.held), dtype=torch.long)
    for side, given, sign in (("increase", increase, 1), ("decrease", decrease, -1)):
        if given is not None:
            chosen = indices_of(given, of.held, side)
            if both := [index for index in chosen if signs[index]]:
                both = of.held.numbers[both].tolist()
                raise CoarError(f"examples {both[:8]} are in both increase and decrease")
            signs[chosen] = sign
    if not bool(signs.any()):
        raise CoarError("nothing to steer: give increase=… or decrease=…, indices of examples or a class name")
    # Either side is divided by itself, whatever its classes; the others class by class.
    strata = torch.where(signs == 0, of.held.labels, signs - 9)
    for sign, side in ((1, "increase"), (-1, "decrease")):
        if bool((signs == sign).any()):
            check_enough(of.held.n_different(signs == sign), side)
    parts = divided(of.held.firsts, strata, signs != 0, seed, "targets")
    return carried_out(Steering(of, parts, signs, others_within), method, rivals)
