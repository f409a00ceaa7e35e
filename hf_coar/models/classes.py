"""What a model's head distinguishes: classes with their names, a number, several yes-or-no labels, or nothing."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_coar.models.libraries import library, wrapped

CLASSES, NUMBER, SEVERAL = "classes", "a number", "several labels at once"

_FEWEST_OF_IMAGENET = 1000  # its smallest set of classes; fewer are not worth importing timm for
_GENERIC = re.compile(r"LABEL_\d+")  # what transformers calls a class that nobody has named


@dataclass(frozen=True)
class Head:
    """What the labels of an example must be.

    Attributes:
        kind: `CLASSES`, `NUMBER` or `SEVERAL`; None where the model takes no label of the whole example.
        n: how many classes or labels; None where the model does not say.
        names: of the classes, in order; None where nobody has named them.
        required: whether examples without labels make no sense for it.
    """

    kind: str | None
    n: int | None = None
    names: tuple[str, ...] | None = None
    required: bool = True


def head(model: nn.Module) -> Head:
    """What the labels of a model's examples must be, as its library says.

    transformers: by the class of the head, then `config.problem_type`, `num_labels` and `id2label`; timm: by
    `num_classes` and the `label_names` of its configuration; any other module may have labels of any kind.
    """
    model = wrapped(model)
    if library(model) == "timm":
        n = int(getattr(model, "num_classes", 0) or 0) or None
        return Head(CLASSES, n, class_names(model), required=n is not None)
    if library(model) == "transformers":
        return _transformers_head(model)
    return Head(CLASSES, required=False)


def _transformers_head(model: nn.Module) -> Head:
    config = model.config
    if "NextSentencePrediction" in type(model).__name__:
        return Head(CLASSES, 2)  # 0: the second one follows
    if not re.search(r"(Sequence|Image|Audio|Video)Classification", type(model).__name__):
        return Head(None, required=False)
    n, problem = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return Head(SEVERAL, n, class_names(model))
    if problem == "regression" or (problem is None and n == 1):
        return Head(NUMBER, n)
    return Head(CLASSES, n, class_names(model))


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes, in the order of its logits; None where nobody has named them.

    transformers keeps them in `config.id2label`, where "LABEL_0" and the like are no names; timm in `label_names` of
    `pretrained_cfg`, or it says there that the classes are ImageNet's.
    """
    model = wrapped(model)
    if library(model) == "transformers":
        return _of_config(getattr(model.config, "id2label", None))
    named = getattr(model, "pretrained_cfg", None) or {}
    names = named.get("label_names") if isinstance(named, Mapping) else None
    if isinstance(names, list | tuple) and names:
        return tuple(str(name) for name in names)
    n = getattr(model, "num_classes", None)
    tagged = isinstance(named, Mapping) and re.search(r"_in\d+k", f"_{named.get('tag')}")
    return _of_imagenet(n) if tagged and n == named.get("num_classes") else None


@functools.cache
def _of_imagenet(n: int) -> tuple[str, ...] | None:
    """ImageNet's names of so many classes, as timm tells them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": n})
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


@functools.cache
def wordnet_numbers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The numbers of ImageNet's classes in WordNet ("n01440764"), where these are their names; else nothing."""
    if len(names) < _FEWEST_OF_IMAGENET or _of_imagenet(len(names)) != names:
        return ()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    return tuple(ImageNetInfo(infer_imagenet_subset({"num_classes": len(names)})).label_names())


def _of_config(id2label: Any) -> tuple[str, ...] | None:
    if not isinstance(id2label, Mapping) or not id2label:
        return None
    by_place = {int(place): str(name) for place, name in id2label.items() if str(place).lstrip("-").isdigit()}
    if sorted(by_place) != list(range(len(by_place))):
        return None
    names = tuple(by_place[place] for place in range(len(by_place)))
    return None if not names or all(_GENERIC.fullmatch(name) for name in names) else names
