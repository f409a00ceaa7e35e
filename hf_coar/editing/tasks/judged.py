"""The examples that judge an edit, one by one: what the model made of each as it was, and what it makes of it now."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hf_coar.editing.tasks import figures as fig
from hf_coar.editing.tasks.figures import Figure
from hf_coar.editing.tasks.held import Held
from hf_coar.editing.tasks.looking import Seen
from hf_coar.storage.texts import shortened


@dataclass(frozen=True)
class Judged:
    """Some examples before and after an edit.

    Attributes:
        held: where the examples are.
        rows: their indices there, ascending, int64 [examples].
        before: what the model as it was makes of them.
        after: what the edited one makes of them.
        boundary: where right turns into wrong, in the unit of the output; None where nothing is right or wrong.
        unit: of the output.
        target: which of them the edit is for, bool [examples].
        groups: the number of every example's group, int64 [examples].
        names: of the groups, in their order.
        said: what sets these examples apart from others, such as "with the trigger".
    """

    held: Held
    rows: Tensor
    before: Seen
    after: Seen
    boundary: float | None
    unit: str
    target: Tensor
    groups: Tensor
    names: Mapping[int, str] = field(default_factory=dict)
    said: str = ""

    def by_group(self) -> list[tuple[bool, Figure, Figure]]:
        """A row a group: whether the edit is for it, its figure, and that figure with before and after exchanged."""
        found = []
        for group, name in self.names.items():
            of = self.groups == group
            if bool(of.any()):
                sides = [self._counted(seen, of) for seen in (self.before, self.after)]
                name = f"{name}, {self.said}" if self.said else name
                both = (self._figure(name, *sides), self._figure(name, *sides[::-1]))
                found.append((bool(self.target[of].all()), *both))
        return found

    def _counted(self, seen: Seen, of: Tensor) -> Tensor:
        return seen.values[of] if self.boundary is None else seen.values[of] > self.boundary

    def _figure(self, name: str, before: Tensor, after: Tensor) -> Figure:
        if self.boundary is None:
            return fig.of_means(name, before, after, self.unit)
        return fig.of_shares(name, before, after)

    def flipped(self, target: bool, better: bool) -> Tensor:
        """Which turned from wrong to right, or from right to wrong, int64 [any] places in `rows`.

        Args:
            target: of those that the edit is for, or of the others.
            better: from wrong to right.
        """
        was, now = (seen.values > self.boundary for seen in (self.before, self.after))
        found = now & ~was if better else was & ~now
        return (found & (self.target == target)).nonzero()[:, 0]

    @property
    def says_classes(self) -> bool:
        """Whether the model's answers are classes of the examples."""
        known = self.boundary is not None and bool((self.held.labels[self.rows] >= 0).all())
        return known and self.before.logits is not None and self.after.logits is not None

    def change(self, place: int) -> tuple[str, str]:
        """What the model says of an example before and after: a class, or the output."""
        sides = (self.before, self.after)
        if self.says_classes:
            before, after = (self.held.name(int(seen.logits[place].argmax())) for seen in sides)
        else:
            before, after = (f"{float(seen.values[place]):.2f}".replace("-", "−") for seen in sides)
        return shortened(before, 24), shortened(after, 24)


def by_class(held: Held, rows: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Groups and their names: the classes of examples, int64 [any]; one group where there are none."""
    labels = held.labels[rows]
    return labels, {one: held.name(one) if one >= 0 else "all" for one in labels.unique().tolist()}
