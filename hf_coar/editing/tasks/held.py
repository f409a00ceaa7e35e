"""Labelled examples in memory, and their division into those that are attributed, chosen on and judged on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.data import identity
from hf_coar.errors import CoarError, DataError
from hf_coar.storage import labels as label_words
from hf_coar.storage.texts import first_few

logger = logging.getLogger(__name__)

# Of every class; what is left is judged on. Fewer to attribute than to choose on: weights are means over hundreds of
# numbers, a choice by too few examples is what goes wrong.
ATTRIBUTED, CHOSEN_ON = 0.25, 0.35
_MOST = (300, 800, 6000)  # examples in all that are attributed, chosen on, judged on, about
_MOST_SHARES = 10  # a tenth of all is the targets' however many classes there are: eight of a thousand's told nothing
SURELY_CHOSEN_ON = _MOST[1] // _MOST_SHARES  # of the targets, where there are enough of them
_NONE = (0, 0, 0)
LEAST = (4, 8, 8)  # examples of the targets to attribute, to choose on, to judge on; others as many and twice that


@dataclass(frozen=True)
class Held:
    """Examples in memory.

    Attributes:
        batches: as the data set has them.
        record: of data and model, where class names stand.
        numbers: the index of every example in the data set, ascending, int64 [examples]: those that cannot be read are
            not held.
        n_all: examples in the data set.
        raw: the data set that the batches were made of, example by example, where there is one.
    """

    batches: Sequence[data_module.Batch]
    record: dict[str, Any]
    numbers: Tensor
    n_all: int
    raw: Any = None

    @classmethod
    def read(cls, model: nn.Module, data: Any) -> "Held":
        """All of a data set that can be read; says what is left out.

        Raises:
            DataError: no examples, or not what `attribute` takes.
        """
        batches, numbers, failed, n_all = [], [], {}, 0
        for chunk in data_module.Chunks(data_module.batches(data)):
            read = chunk.read()
            failed, n_all = failed | read.failed, chunk.stop
            for start, piece in read.pieces:
                batches.append(data_module.as_batch(piece))
                numbers += range(start, start + data_module.size(batches[-1]))
        if failed:
            _tell_left_out(failed, n_all)
        if not batches:
            raise DataError("the data set is empty; nothing to edit by")
        raw = data.dataset if isinstance(data, data_module.Examples) and hasattr(data.dataset, "__len__") else None
        described = data_module.describe(data) | ({"left_out": sorted(failed)} if failed else {})
        return cls(batches, {"data": described, "model": models.record(model)}, torch.tensor(numbers), n_all, raw)

    def __len__(self) -> int:
        """How many examples."""
        return len(self.numbers)

    @cached_property
    def labels(self) -> Tensor:
        """Int64 [examples]; -1 where there is no class of the whole example."""
        found = self._whole_numbers("labels")
        return torch.full((len(self),), -1) if found is None else found

    def _whole_numbers(self, name: str) -> Tensor | None:
        """An entry of the batches, int64 [examples]; None where that is not one whole number an example."""
        found = [batch.get(name) for batch in self.batches]
        if all(isinstance(one, Tensor) and one.dim() == 1 and not one.is_floating_point() for one in found):
            return torch.cat(found).cpu().long()
        return None

    @cached_property
    def firsts(self) -> Tensor:
        """The first example that is the same but for its label, int64 [examples]: for nearly all, themselves."""
        seen: dict[bytes, int] = {}
        found = []
        for batch in self.batches:
            hashes = identity.hashes({name: value for name, value in batch.items() if name != "labels"} or batch)
            rows = torch.cat([hashes[name] for name in sorted(hashes)], dim=1)
            found += [seen.setdefault(row.tobytes(), len(found) + i) for i, row in enumerate(rows.numpy())]
        copies = len(found) - len(seen)
        if copies:
            logger.info("edit: %d examples are copies of others, and go wherever these go", copies)
        return torch.tensor(found)

    def places(self, indices: Sequence[int] | Tensor, what: str) -> list[int]:
        """Where examples are held, ascending, that are given by their indices in the data set.

        Args:
            indices: of examples.
            what: they are, for errors.

        Raises:
            CoarError: none, or some out of range or left out.
        """
        found = checked(indices, self.n_all, what)
        at = {number: place for place, number in enumerate(self.numbers.tolist())}
        if absent := [index for index in found if index not in at]:
            raise CoarError(f"{what}={absent[:8]}: these examples cannot be read; give others")
        return [at[index] for index in found]

    def some(self, values: Tensor) -> Tensor:
        """The values of the examples that are held, of values of all of the data set; others are returned as they are.

        Whoever has left out what cannot be read may give the values of the rest.
        """
        return values[self.numbers] if len(values) == self.n_all else values

    def n_different(self, chosen: Tensor) -> int:
        """How many examples a mask of them names, bool [examples], copies of one another counted once."""
        return len(self.firsts[chosen].unique())

    def entry(self, name: str) -> Tensor:
        """Whole numbers of an entry of the batches, int64 [examples].

        Raises:
            CoarError: no such entry, or not one whole number an example.
        """
        found = self._whole_numbers(name)
        if found is None:
            raise CoarError(
                f"the batches have no entry {name!r} with one whole number an example; they have "
                f"{', '.join(self.batches[0])}; or give the number of every example's group"
            )
        return found

    def label_of(self, label: int | str) -> int:
        """The number of a class that examples have.

        Raises:
            CoarError: no such class, or no example of it; the message says which there are.
        """
        if bool((self.labels < 0).all()):
            raise CoarError(
                f"label={label!r} means nothing, as the examples are of no single class each: {self._labels_are}; "
                "coar.steer takes examples by their indices (on the command line: attribute, then edit --decrease)"
            )
        wanted = label_words.label_of(self.record, label)
        if not bool((self.labels == wanted).any()):
            named = [self.name(one) for one in self.labels.unique().tolist()]
            raise CoarError(f"no example has the label {label!r}; there are {', '.join(named[:30])}")
        return wanted

    @property
    def _labels_are(self) -> str:
        """What the entry `labels` is where it is not one class an example, in words."""
        labels = self.batches[0].get("labels")
        if not isinstance(labels, Tensor):
            return f"their entries are {', '.join(self.batches[0])}"
        kind = "numbers" if labels.is_floating_point() else "whole numbers"
        if labels.dim() > 1:
            return f"their labels are {' × '.join(map(str, labels.shape[1:]))} {kind} each, such as of several classes"
        return f"their labels are {kind} that name no class"

    def name(self, label: int) -> str:
        """What people call a class."""
        return label_words.label_name(self.record, label) or "no label"

    def at(self, indices: Sequence[int] | Tensor, size: int | None = None) -> list[data_module.Batch]:
        """Some examples in batches, in the order of the data set, whatever that of the indices.

        Args:
            indices: of examples.
            size: examples a batch, where they are alike in shape; as in the data set by default.
        """
        chosen = torch.as_tensor(indices, dtype=torch.long).unique()
        found = data_module.some(self.batches, chosen)
        return _joined(found, size) if size else found


def _tell_left_out(failed: dict[int, str], n_all: int) -> None:
    first = min(failed)
    logger.warning(
        "%d of %d examples cannot be read and are left out (%s); number %d: %s",
        len(failed), n_all, first_few(sorted(failed), 8), first, failed[first],
    )  # fmt: skip


def _joined(batches: list[data_module.Batch], size: int) -> list[data_module.Batch]:
    """Batches of just this size, as far as their entries are tensors of one shape."""
    runs: list[list[data_module.Batch]] = []
    for batch in batches:
        if runs and _alike(runs[-1][-1], batch):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    found = []
    for run in runs:
        whole = run[0] if len(run) == 1 else data_module.concatenated(run)
        count = data_module.size(whole)
        found += [data_module.rows(whole, start, min(start + size, count)) for start in range(0, count, size)]
    return found


def _alike(one: data_module.Batch, other: data_module.Batch) -> bool:
    tensors = [*one.values(), *other.values()]
    same = one.keys() == other.keys() and all(isinstance(value, Tensor) for value in tensors)
    return same and all(value.shape[1:] == other[name].shape[1:] for name, value in one.items())


@dataclass(frozen=True)
class Parts:
    """Three parts of the examples, int64 [any], ascending, of which the last has nothing in common with the others.

    Attributes:
        attribute: whose weights say what to ablate.
        choose: by which the number of components is chosen.
        judge: which chose nothing: all figures are from these.
    """

    attribute: Tensor
    choose: Tensor
    judge: Tensor

    def of(self, wanted: Tensor) -> "Parts":
        """Those of them that a mask of all examples names, bool [examples]."""
        return Parts(*(rows[wanted[rows]] for rows in (self.attribute, self.choose, self.judge)))

    def made_for(self, examples: Sequence[int]) -> "Parts":
        """With examples that an edit is made for among those to attribute and to choose on, and not to judge on."""
        own = torch.tensor(examples)
        attribute, choose = (torch.cat([rows, own]).sort().values for rows in (self.attribute, self.choose))
        return replace(self, attribute=attribute, choose=choose)


def divided(
    firsts: Tensor, strata: Tensor, targets: Tensor, seed: int, what: str, apart: Sequence[int] = (),
    spare: bool = False, every: bool = False,
) -> Parts:  # fmt: skip
    """Divides examples at random, every stratum (class or group) alike; copies of an example go where it goes.

    Strata of others that are too small to have a part of each, or too many, are divided as if they were one.

    Args:
        firsts: see `Held.firsts`: a figure of copies of what chose would be none of examples that chose nothing.
        strata: number of every example's class or group, int64 [examples].
        targets: which the edit is for, bool [examples].
        seed: of the draw.
        what: the targets are, for errors, such as "label 'Bag'"; "" where there is nothing to divide of them.
        apart: examples that go into no part.
        spare: whether those that are left over, as many models are to be measured, are to be chosen on, too.
        every: whether not only the targets, but every stratum has as many in each part as targets need.

    Raises:
        CoarError: too few targets or others to attribute, to choose on and to judge on; says how many are needed.
    """
    own = firsts == torch.arange(len(firsts))
    own[firsts[list(apart)]] = False
    if what:
        check_enough(int(targets[own].sum()), what)
    check_enough(int((~targets[own]).sum()), "the others", tuple(2 * count for count in LEAST))
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], [], []]
    keys = strata * 2 + targets.long()
    keys[~own] = keys.min() - 1
    if not every:
        keys = _thrown_together(keys, own, targets)
    present = keys[own].unique().tolist()
    for key in present:
        rows = (keys == key).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        wanted = bool(targets[rows[0]])
        sizes = _sizes(len(rows), len(present), LEAST if wanted or every else _NONE, wanted)
        for part, some in zip(parts, rows.split(sizes), strict=False):
            part.append(some)
    *used, left = parts
    used[1] += left if spare else []
    return Parts(*(torch.isin(firsts, torch.cat(part)).nonzero()[:, 0] for part in used))


def _thrown_together(keys: Tensor, own: Tensor, targets: Tensor) -> Tensor:
    """The strata of others of which a part would have none are one stratum: of a thousand classes no part had any.

    Args:
        keys: of the strata, int64 [examples].
        own: which examples are divided, bool [examples].
        targets: which are no others, bool [examples].
    """
    others, n_strata = own & ~targets, len(keys[own].unique())
    strata, counts = keys[others].unique(return_counts=True)
    small = [0 in _sizes(count, n_strata, _NONE, wanted=False)[:-1] for count in counts.tolist()]
    together = others & torch.isin(keys, strata[torch.tensor(small, dtype=torch.bool)])
    return torch.where(together, keys.max() + 1, keys)


def _sizes(n_rows: int, n_strata: int, least: Sequence[int], wanted: bool) -> list[int]:
    """How many of a stratum, of targets that are `wanted` or of others, go where they go.

    Returns:
        those that are attributed, chosen on, judged on, and left over.
    """
    # A target's stratum may have more than its share of the whole: it is what the edit is for.
    each = min(max(2, n_strata) / 2, _MOST_SHARES) if wanted else max(2, n_strata)
    caps = [max(fewest, round(most / each)) for fewest, most in zip(least, _MOST, strict=True)]
    chosen, judged = (
        min(max(fewest, round(share * n_rows)), cap)
        for fewest, share, cap in zip(least[1:], (CHOSEN_ON, 1 - ATTRIBUTED - CHOSEN_ON), caps[1:], strict=True)
    )
    attributed = min(max(least[0], round(ATTRIBUTED * n_rows)), caps[0], n_rows - chosen - judged)
    return [attributed, chosen, judged, n_rows - attributed - chosen - judged]


def check_enough(count: int, what: str, least: Sequence[int] = LEAST) -> None:
    """Raises `CoarError` where there are too few examples of a side to divide them."""
    if count < sum(least):
        raise CoarError(
            f"{what}: {count} different examples, and {sum(least)} are needed: {least[0]} to attribute, {least[1]} to "
            f"choose on and {least[2]} to judge on; give more data "
            "(or coar.edit or --n-components, which check nothing)"
        )


def indices_of(examples: Any, held: Held, side: str) -> list[int]:
    """Where examples are held, from indices, a class name, `{"label": name or number}`, or several names.

    Raises:
        CoarError: an unknown class, or indices out of range.
    """
    if isinstance(examples, Mapping) and list(examples) != ["label"]:
        raise CoarError(f"{side} given by {sorted(map(str, examples))}; give {{'label': name or number}}")
    if isinstance(examples, Mapping | str) or label_words.are_names(examples):
        classes = label_words.each(examples["label"] if isinstance(examples, Mapping) else examples)
        return [index for one in classes for index in (held.labels == held.label_of(one)).nonzero()[:, 0].tolist()]
    return held.places(examples, side)


def checked(indices: Sequence[int] | Tensor, n_examples: int, what: str) -> list[int]:
    """Indices as plain integers, ascending.

    Raises:
        CoarError: none, or some out of range.
    """
    found = data_module.numbers(indices, n_examples)
    outside = [index for index in found if not 0 <= index < n_examples]
    if outside or not found:
        raise CoarError(f"{what}={outside[:8] or '[]'}: give indices from 0 to {n_examples - 1}, at least one")
    return sorted(set(found))


def check_limits(**limits: float) -> None:
    """Raises `CoarError` unless all are shares between 0 and 1."""
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise CoarError(f"{name}={value!r}: give a share between 0 and 1, such as 0.015 for 1.5 points")
