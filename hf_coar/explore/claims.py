"""The one claim that a shared page begins with: a few components, and what turns into something else without them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_coar.explore import drawing
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.measuring import Change, measured_rows, what_if
from hf_coar.explore.source import Source

N_COMPONENTS = 3
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
    """The largest change that a few components make, of those tried: of classes the one that loses most examples."""
    labels = source.attributions.labels
    known = Counter(label for label in labels.tolist() if label >= 0)
    frequent = [label for label, n in known.most_common(_MOST_CLASSES) if n >= _FEWEST_EXAMPLES]
    if source.n_classes and frequent and source.predictions([0])[0].classes is not None:
        tried = [_of_class(source, label, i, len(frequent), progress) for i, label in enumerate(frequent)]
        return max(tried, key=lambda one: (_share(one), len(one.flipped)))
    rows = measured_rows(source)[:_MOST_EXAMPLES]
    components = _strongest(source, rows)
    change = what_if(source, components, rows, progress)
    return _of_tokens(source, components, change) if change.before.tokens else _of_outputs(source, components, change)


def _share(claim: Claim) -> float:
    return len(claim.flipped) / max(1, len(claim.change.rows))


def _strongest(source: Source, rows: Sequence[int]) -> tuple[int, ...]:
    """The components that help some examples most on average; it reads these rows only."""
    total = torch.zeros(len(source.components))
    for row in rows:
        total += source.attributions.row(row)
    return tuple(total.topk(min(N_COMPONENTS, len(total))).indices.tolist())


def _named(source: Source, components: Sequence[int]) -> str:
    kinds = {source.components[i].group.kind for i in components}
    kind = f"{kinds.pop()}s" if len(kinds) == 1 else "components"
    return f"{len(components)} of {len(source.components):,} {kind}"


def _of_class(source: Source, label: int, number: int, count: int, progress: Progress) -> Claim:
    rows = (source.attributions.labels == label).nonzero().flatten().tolist()[:_MOST_EXAMPLES]
    components = _strongest(source, rows)
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
        "help it most on average."
    )
    return Claim(components, text, detail, change, order)


def _of_tokens(source: Source, components: tuple[int, ...], change: Change) -> Claim:
    n = sum(len(targets) for targets in change.before.targets)
    changed = sum(int((a != b).sum()) for a, b in zip(change.before.tokens, change.after.tokens, strict=True))
    text = f"Without {_named(source, components)}, {changed:,} of {n:,} next tokens are others."
    return Claim(components, text, _means(source, change), change, change.flips())


def _of_outputs(source: Source, components: tuple[int, ...], change: Change) -> Claim:
    text = f"Without {_named(source, components)}, {_means(source, change, '').rstrip('.')}."
    order = change.measured.argsort().tolist() if bool(change.measured.isfinite().all()) else []
    return Claim(components, text, "Measured on the model.", change, order)


def _means(source: Source, change: Change, start: str = "Measured on the model: ") -> str:
    before, after = float(change.before.outputs.mean()), float(change.after.outputs.mean())
    places = drawing.digits(max(abs(before), abs(after)))
    return (
        f"{start}the mean {source.output.name} of {len(change.rows)} examples goes from {before:.{places}f} to "
        f"{after:.{places}f} {source.unit}."
    )
