"""Model cards, from the templates in `model_cards/` (shipped inside the wheel)."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from string import Template
from typing import Any


def template(name: str) -> Template:
    """A card template by name."""
    return Template((resources("hf_coar.model_cards") / f"{name}.md.template").read_text(encoding="utf-8"))


def attributions_card(config: Mapping[str, Any], n_examples: int) -> str:
    """The card of attributions, as Markdown."""
    model, data = config.get("model", {}), config.get("data", {})
    return template("attributions").substitute(
        metadata=_metadata({"library_name": "hf_coar", "tags": ["coar", "component-attribution"], **_base(model)}),
        model=model.get("id") or f"a {model.get('class', 'model')} of {model.get('library', 'unknown origin')}",
        data=data.get("id") or "data given as batches",
        split=data.get("split") or "all",
        n_examples=n_examples,
        n_components=config.get("n_components"),
        granularity=config.get("granularity"),
        output=config.get("output"),
        unit=config.get("unit"),
        method=_inline(config.get("method", {})),
        ablated_fraction=config.get("ablated_fraction"),
        seed=config.get("seed"),
        cost=config.get("cost"),
        versions=_inline(config.get("versions", {})),
    )


def edited_model_card(
    record: Mapping[str, Any], load_snippet: str, figures: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The card of an edited model, as Markdown.

    Args:
        record: `models.record` of the edited model.
        load_snippet: the line of Python that loads it.
        figures: (what, before, after) on held-out examples.
    """
    edit = record["edit"]
    rows = [f"| {what} | {before} | {after} |" for what, before, after in figures]
    table = ["| measured on examples not used by the edit | before | after |", "|---|---|---|", *rows]
    return template("edited_model").substitute(
        metadata=_metadata({"library_name": record["library"], "tags": ["coar", "edited"], **_base(record)}),
        model=record.get("id") or f"a {record['class']}",
        n_components=len(edit["components"]),
        components="\n".join(f"- `{component}`" for component in edit["components"]),
        rule=edit["rule"],
        output=edit["output"],
        table="\n".join(table) if rows else "No figures were given when this card was written.",
        load_snippet=load_snippet,
    )


def _base(model: Mapping[str, Any]) -> dict[str, Any]:
    """`base_model` only where it is a Hub id: a local path means nothing to a reader and fails the Hub's validation."""
    name = str(model.get("id") or "")
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return {"base_model": name} if is_hub_id else {}


def _metadata(values: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(**values).to_yaml()


def _inline(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(entry)}" for key, entry in value.items())
