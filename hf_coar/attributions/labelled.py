"""Examples by their labels: `"three"` means all examples of that class."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_coar.attributions.attributions import Attributions
from hf_coar.errors import CoarError
from hf_coar.storage import labels


def label_name(attributions: Attributions, example: int) -> str:
    """What an example's label is called; "" where it has none."""
    return labels.label_name(attributions.provenance, int(attributions.labels[example]))


def with_label(attributions: Attributions, label: int | str) -> list[int]:
    """The examples of a class, by its name or number, see `Attributions.with_label`."""
    return attributions.with_label(label)


def chosen(attributions: Attributions, examples: Any) -> Any:
    """Examples as indices, where they were given by their classes.

    Args:
        attributions: of the examples.
        examples: a class name, `{"label": name or number}`, or several names (or numbers, under "label") in whatever
            holds them, each of which is a set of examples; anything else is returned as it is.

    Raises:
        CoarError: as of `with_label`, or a mapping with other keys.
    """
    if isinstance(examples, Mapping):
        if list(examples) != ["label"]:
            raise CoarError(f"examples given by {sorted(map(str, examples))}; give {{'label': name or number}}")
        return [with_label(attributions, one) for one in labels.each(examples["label"])]
    if isinstance(examples, str) or labels.are_names(examples):
        named = labels.each(examples)
        return [with_label(attributions, one) if isinstance(one, str) else one for one in named]
    return examples


def classes(attributions: Attributions, examples: Sequence[int], most: int = 5) -> list[str]:
    """The names of the classes of some examples; none where there are more than `most`, or no labels."""
    found = sorted({int(attributions.labels[index]) for index in examples} - {-1})
    return [labels.label_name(attributions.provenance, label) for label in found] if len(found) <= most else []
