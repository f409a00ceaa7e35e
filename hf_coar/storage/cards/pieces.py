"""What the cards share: the mark of a card that was made here, names that mean something to others, lines of text."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from hf_coar.storage.escaping import code_span, for_markdown
from hf_coar.storage.hub import LICENSE
from hf_coar.storage.labels import label_names, listed
from hf_coar.storage.texts import count

_MARK = re.compile(r"\n<!-- made by hf_coar; sha256 of the text above: ([0-9a-f]{16}) -->\n\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}")
CITATION = """\
The method is COAR: Harshay Shah, Andrew Ilyas, Aleksander Mądry, *Decomposing and Editing Predictions by Modeling Model
Computation*, ICML 2024, [arXiv:2404.11534](https://arxiv.org/abs/2404.11534).

```bibtex
@inproceedings{shah2024decomposing,
  title     = {Decomposing and Editing Predictions by Modeling Model Computation},
  author    = {Shah, Harshay and Ilyas, Andrew and M{\\k{a}}dry, Aleksander},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2404.11534}
}
```"""


def template(name: str) -> Template:
    """A card template by name."""
    return Template((resources("hf_coar.storage") / "templates" / f"{name}.md.template").read_text(encoding="utf-8"))


def is_generated(card: str) -> bool:
    """Whether a card is just as it was made here: nobody has written or changed a word of it."""
    match = _MARK.search(card.replace("\r\n", "\n"))
    return bool(match) and match[1] == _digest(card.replace("\r\n", "\n")[: match.start()])


def may_be_replaced(path: Path) -> bool:
    """Whether there is no card, or one that nobody has changed."""
    return not path.exists() or is_generated(path.read_text(encoding="utf-8", errors="replace"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def marked(text: str) -> str:
    """A card with the mark by which it is known again as made here."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- made by hf_coar; sha256 of the text above: {_digest(text)} -->\n"


def hub_id(entry: Mapping[str, Any]) -> str | None:
    """The Hub id in a record of a model or data set; None if it is a local one, which means nothing to others."""
    name, revision = str(entry.get("id") or ""), str(entry.get("revision") or "")
    known = _COMMIT.fullmatch(revision) or (entry.get("library") == "timm" and name.startswith("timm/"))
    return name if known and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def model_id(model: Mapping[str, Any]) -> str | None:
    """The Hub id in a record of a model, if its weights are what was read from there; None for any others.

    A configuration names where a model began; whether its weights are those, only their fingerprint says. Records of
    before it was kept are believed where they name a commit.
    """
    if "loaded" not in model:
        return hub_id(model) if _COMMIT.fullmatch(str(model.get("revision"))) else None
    return hub_id(model) if model["loaded"] and model["loaded"] == model.get("fingerprint") else None


def public_name(entry: Mapping[str, Any]) -> str | None:
    """The Hub id, or the last part of a local path: the rest of the path is nobody's business."""
    name = str(entry.get("id") or "")
    return hub_id(entry) or re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None


def snippet(name: str, **values: str) -> str:
    """Python from the template of this name."""
    return Template((resources("hf_coar.storage") / "templates" / f"{name}.py.template").read_text("utf-8")).substitute(
        values
    ).rstrip("\n")  # fmt: skip


def yaml_head(values: Mapping[str, Any]) -> str:
    """The metadata at the head of a card."""
    from huggingface_hub import ModelCardData

    return ModelCardData(**values).to_yaml()


def licence(model: Mapping[str, Any]) -> dict[str, str]:
    """The licence in a record of a model, for the head of a card of what was made of it."""
    return {key: model[key] for key in LICENSE if isinstance(model.get(key), str)} if model_id(model) else {}


def mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An entry that is to be a mapping; an empty one where it is something else."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def model_name(model: Mapping[str, Any]) -> str:
    """A model as a reader may call it: its Hub id, or what it is."""
    if model_id(model):
        return str(model_id(model))
    place, kind = public_name(model), f"a {model.get('class') or 'model'}"
    if hub_id(model):
        return f"{kind} (its configuration names {place}; these are not known to be the weights of it)"
    return f"{kind} ({place}, a local folder)" if place else kind


def short_name(model: Mapping[str, Any]) -> str:
    """A model in a few words: its Hub id or folder if its weights are what was read there, else its class and why."""
    place, kind = public_name(model), str(model.get("class") or "a model")
    if model_id(model) or (place and not hub_id(model)):
        return str(place)
    return f"{kind} ({place}, other weights)" if place else kind


def model_line(model: Mapping[str, Any]) -> str:
    """A model with its revision, class and library."""
    parts = [model_name(model)]
    parts += [f"revision {code_span(model['revision'])}"] if model.get("revision") else []
    parts += [f"class {model['class']} of {model.get('library')}"] if model.get("class") and model_id(model) else []
    parts += [f"of {model['library']}"] if model.get("library") and not model_id(model) else []
    return ", ".join(parts)


def data_line(data: Mapping[str, Any]) -> str:
    """A data set with its split, revision, rows and class names."""
    local = f"{public_name(data)} (local)" if public_name(data) else "batches of tensors"
    parts = [hub_id(data) or local]
    parts += [f"split {data['split']}"] if data.get("split") else []
    parts += [f"revision {code_span(data['revision'])}"] if data.get("revision") else []
    selected = data.get("selected")
    parts += [f"{count(len(selected), 'example')} of it"] if isinstance(selected, Sequence) else []
    names = label_names({"data": data})
    parts += [f"classes {listed(names)}"] if names else []
    return ", ".join(parts)


def percent(fraction: Any) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:g} %" if isinstance(fraction, int | float) else "an unknown fraction"


def gallery(pictures: Sequence[str]) -> str:
    """Pictures as a section of a card; empty where there are none."""
    if not pictures:
        return ""
    names = [(re.sub(r"[_-]+", " ", path.rsplit("/", 1)[-1].rsplit(".", 1)[0]), path) for path in pictures]
    shown = [f"![{for_markdown(name)}]({quote(path)})" for name, path in names]
    return "## Pictures\n\n" + "\n\n".join(shown) + "\n\n"
