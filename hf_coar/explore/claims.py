"""The one claim that a shared page begins with: a few components, and what turns into something else without them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_coar.explore import drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.measuring import Change, measured_rows, what_if
from hf_coar.explore.source import Source

N_COMPONENTS = 3
MORE_COMPONENTS = 6  # where a class survives without three of them, as what attention heads do is done by several
_FEW = 0.1  # of all components, above which a claim is no longer of a few
_MOST_OF_A_CLASS = 0.5
_MOST_CLASSES = 20  # that are tried, the most frequent ones
_MOST_EXAMPLES = 64  # of a class
_FEWEST_EXAMPLES = 3


@dataclass(frozen=True)
class Claim:
    """What was measured on the model itself.

    Attributes:
        components: that were ablated.
        text: the claim, in one sentence.
        detail: how it was found, and what happens to the rest.
        change: of the examples that the claim is of.
        flipped: places in `change.rows` of the examples that changed, the most frequent outcome first.
    """

    components: tuple[int, ...]
    text: str
    detail: str
    change: Change
    flipped: list[int]


def find(source: Source, progress: Progress = no_progress) -> Claim:
    """The largest change that a few components make, of those tried.

    Of classes that are predicted it is the one that loses most examples; of any other output whose examples have labels
    the label whose mean moves most, beyond what the others' mean moves.
    """
    labels = source.attributions.labels
    known = Counter(label for label in labels.tolist() if label >= 0)
    frequent = [label for label, n in known.most_common(_MOST_CLASSES) if n >= _FEWEST_EXAMPLES]
    if source.n_classes and frequent and source.predictions([0])[0].classes is not None:
        return _with_the_rest(source, _largest(source, frequent, progress))
    if len(frequent) > 1 and not source.predictions([0])[0].tokens:
        return max((_of_sort(source, label, len(frequent), progress) for label in frequent), key=_beyond)
    rows = measured_rows(source)[:_MOST_EXAMPLES]
    components = _strongest(source, rows)
    change = what_if(source, components, rows, progress)
    return _of_tokens(source, components, change) if change.before.tokens else _of_outputs(source, components, change)


def _largest(source: Source, labels: Sequence[int], progress: Progress) -> Claim:
    """The class that loses most without three components; without more of them where it loses less than half."""
    found: list[Claim] = []
    for n in (N_COMPONENTS, MORE_COMPONENTS):
        if n == N_COMPONENTS or n <= _FEW * len(source.components):
            found += [_of_class(source, label, n, i, len(labels), progress) for i, label in enumerate(labels)]
        best = max(found, key=lambda one: (_share(one), len(one.flipped), -len(one.components)))
        if _share(best) >= _MOST_OF_A_CLASS:
            break
    return best


def _share(claim: Claim) -> float:
    return len(claim.flipped) / max(1, len(claim.change.rows))


def _beyond(claim: Claim) -> float:
    """By how much the mean of the examples that a claim is of moves more than that of the others; -inf if unknown."""
    own = torch.zeros(len(claim.change.rows), dtype=torch.bool)
    own[claim.flipped] = True
    found = float(claim.change.measured[own].mean().abs() - claim.change.measured[~own].mean().abs())
    return found if math.isfinite(found) else -math.inf


def _strongest(source: Source, rows: Sequence[int], n: int = N_COMPONENTS) -> tuple[int, ...]:
    """The components that help some examples most on average."""
    return tuple(_average(source, rows).topk(min(n, len(source.components))).indices.tolist())


def _peculiar(source: Source, rows: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    """The components that help (or that hurt) some examples most on average, and the others little either way."""
    own, rest, n = _average(source, rows), _average(source, others).abs(), min(N_COMPONENTS, len(source.components))
    sides = [(sign * own - rest).topk(n) for sign in (1, -1)]
    return tuple(max(sides, key=lambda side: float(side.values.sum())).indices.tolist())


def _average(source: Source, rows: Sequence[int]) -> Tensor:
    """Mean weights over some examples, float32 [components]; it reads these rows only."""
    total = torch.zeros(len(source.components))
    for row in rows:
        total += source.attributions.row(row)
    return total / max(1, len(rows))


def _named(source: Source, components: Sequence[int]) -> str:
    kinds = {source.components[i].group.kind for i in components}
    kind = f"{kinds.pop()}s" if len(kinds) == 1 else "components"
    return f"{len(components)} of {len(source.components):,} {kind}"


def _of_class(source: Source, label: int, n: int, number: int, count: int, progress: Progress) -> Claim:
    rows = (source.attributions.labels == label).nonzero().flatten().tolist()[:_MOST_EXAMPLES]
    components = _strongest(source, rows, n)
    change = what_if(source, components, rows)
    progress((number + 1) / count, f"looking for the largest change: class {number + 1} of {count}")
    right = change.before.classes == label
    flipped = (right & (change.after.classes != label)).nonzero().flatten().tolist()
    into = Counter(source.class_name(int(change.after.classes[place])) for place in flipped)
    order = sorted(flipped, key=lambda place: -into[source.class_name(int(change.after.classes[place]))])
    name = source.class_name(label)
    lost = f"Without {_named(source, components)}, {len(flipped)} of {int(right.sum())} “{name}” turn into"
    most = into.most_common(1)
    if len(into) == 1:
        text = f"{lost} “{most[0][0]}”."
    else:
        text = f"{lost} something else{''.join(f', {n} of them into “{other}”' for other, n in most)}."
    detail = (
        f"Measured on the model, on attributed examples of the class (at most {_MOST_EXAMPLES}) that it gets right. "
        f"The class that loses most of the {count} that were tried, each without the {len(components)} components that "
        f"help it most on average{'' if n == N_COMPONENTS else f'; without {N_COMPONENTS}, none loses half'}."
    )
    return Claim(components, text, detail, change, order)


def _of_tokens(source: Source, components: tuple[int, ...], change: Change) -> Claim:
    n = sum(len(targets) for targets in change.before.targets)
    changed = sum(int((a != b).sum()) for a, b in zip(change.before.tokens, change.after.tokens, strict=True))
    text = f"Without {_named(source, components)}, {changed:,} of {n:,} next tokens are others."
    return Claim(components, text, _means(source, change), change, change.flips())


def _of_outputs(source: Source, components: tuple[int, ...], change: Change) -> Claim:
    n = len(change.rows)
    text = f"Without {_named(source, components)}, {_mean(source, change, range(n), f'of {n} examples')}."
    order = change.measured.argsort().tolist() if bool(change.measured.isfinite().all()) else []
    return Claim(components, text, f"Measured on the model, in {source.unit}.", change, order)


def _of_sort(source: Source, label: int, count: int, progress: Progress) -> Claim:
    """What moves one sort of examples and leaves the others, where an output is no class."""
    labels = source.attributions.labels
    rows, others = (_evenly(here.nonzero().flatten().tolist()) for here in (labels == label, labels != label))
    components = _peculiar(source, rows, others)
    change = what_if(source, components, [*rows, *others], progress)
    n, name = len(rows), source.class_name(label)
    text = (
        f"Without {_named(source, components)}, {_mean(source, change, range(n), f'of “{name}”')}, that of the others "
        f"{_from_to(change, range(n, n + len(others)))}."
    )
    detail = (
        f"Measured on the model, in {source.unit}, on {n} examples of “{name}” and {len(others)} others. The label "
        f"that moves most of {count} that were tried, each without the {len(components)} components that matter to it "
        "most and to the others least."
    )
    order = sorted(range(n), key=lambda place: -abs(float(change.measured[place])))
    return Claim(components, text, detail, change, order)


def _evenly(rows: list[int]) -> list[int]:
    n = min(_MOST_EXAMPLES, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def _with_the_rest(source: Source, claim: Claim) -> Claim:
    """A claim of one class, with how many of the others stay right; it says so itself where most do not."""
    own = int(source.attributions.labels[claim.change.rows[0]])
    labels = source.attributions.labels
    others = _evenly(((labels >= 0) & (labels != own)).nonzero().flatten().tolist())
    if not others:
        return claim
    change = what_if(source, claim.components, others)
    right = change.before.classes == labels[others]
    kept = int((right & (change.after.classes == labels[others])).sum())
    said = f" Of {int(right.sum())} examples of other classes that it gets right, {kept} stay right."
    lost, text = int(right.sum()) - kept, claim.text
    if lost > kept:
        text = f"{text.rstrip('.')}, and {lost} of {lost + kept} examples of other classes are wrong as well."
    return replace(claim, text=text, detail=claim.detail + said)


def _means(source: Source, change: Change) -> str:
    n = len(change.rows)
    return f"Measured on the model, in {source.unit}: {_mean(source, change, range(n), f'of {n} examples')}."


def _mean(source: Source, change: Change, places: Sequence[int], of: str) -> str:
    return f"the mean {source.output.name.replace('_', ' ')} {of} goes {_from_to(change, places)}"


def _from_to(change: Change, places: Sequence[int]) -> str:
    before, after = (float(side.outputs[list(places)].mean()) for side in (change.before, change.after))
    digits = drawing.digits(max(abs(before), abs(after)))
    return f"from {drawing.number(before, digits, False)} to {drawing.number(after, digits, False)}"
