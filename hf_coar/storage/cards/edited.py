"""The card of an edited model."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_coar.storage.cards.pieces import (
    CITATION,
    data_line,
    gallery,
    hub_id,
    licence,
    mapping,
    marked,
    model_id,
    model_line,
    model_name,
    snippet,
    template,
    yaml_head,
)
from hf_coar.storage.escaping import all_for_markdown, code_span, python_name
from hf_coar.storage.labels import of_classes
from hf_coar.storage.texts import count, first_few


def edited_model_card(entries: Mapping[str, Any], source: str = ".", pictures: Sequence[str] = ()) -> str:
    """The card of an edited model, as Markdown.

    Args:
        entries: the record of the edit.
        source: from where the reader loads the model: Hub id, or "." for the folder in which the card is.
        pictures: paths of pictures, relative to the card.
    """
    base, data = mapping(entries, "base"), mapping(entries, "data")
    components, library = list(entries.get("components") or ()), base.get("library") or "torch"
    library = library if re.fullmatch(r"[\w.-]+", str(library)) else "torch"
    metadata = {"library_name": {"torch": "pytorch"}.get(library, library)}
    metadata |= {"tags": ["coar", "model-editing", "component-attribution"]}
    metadata |= {"base_model": model_id(base), "base_model_relation": "finetune"} if model_id(base) else {}
    metadata |= licence(base)
    metadata |= {"datasets": [hub_id(data)]} if hub_id(data) else {}
    revision = f", revision={json.dumps(base['revision'])}" if model_id(base) and base.get("revision") else ""
    snippets = _load_script(base, source), snippet(
        "undo", source=json.dumps(source), revision=revision,
        base=json.dumps(model_id(base) or "PATH OF THE ORIGINAL MODEL"),
    )  # fmt: skip
    entries = all_for_markdown(entries)  # from here on it is shown, and may come from anybody
    base, data = mapping(entries, "base"), mapping(entries, "data")
    text = template("edited_model").substitute(
        metadata=yaml_head(metadata),
        title=_title(entries, len(components)),
        model_line=model_line(base),
        data_line=data_line(data),
        library={"torch": "PyTorch"}.get(library, library),
        aim=_aim(entries),
        increase=_examples(entries.get("increase"), of_classes(entries, "increase")),
        decrease=_examples(entries.get("decrease"), of_classes(entries, "decrease")),
        reference=_examples(entries.get("reference")),
        done=_done(entries, len(components)),
        what="ablated" if components else "changed",
        changed=_changed(entries, components),
        rule=_rule(entries),
        output=entries.get("output"),
        figures=_before_and_after(entries.get("figures") or ()),
        snippet=snippets[0],
        undo_snippet=snippets[1],
        pictures=gallery(pictures),
        citation=CITATION,
    )  # fmt: skip
    return marked(text)


def _title(edit: Mapping[str, Any], n_components: int) -> str:
    how = f"{count(n_components, 'component')} ablated" if n_components else f"changed by {edit.get('rule')}"
    return f"{model_name(mapping(edit, 'base'))}, {how}".removeprefix("a ")


def _done(edit: Mapping[str, Any], n_components: int) -> str:
    """What was done to the model; rivals of ablation change parameters."""
    model = model_name(mapping(edit, "base"))
    if not n_components:
        n_changed = len(edit.get("parameters") or ())
        return f"{count(n_changed, 'parameter tensor')} of\n{model} {_were(n_changed)} changed by *{edit.get('rule')}*"
    also = f", and the last layer {code_span(edit['refit'])} was fitted anew" if edit.get("refit") else ""
    kind = f"{count(n_components, 'component')} (granularity *{edit.get('granularity')}*)"
    return f"{kind} of\n{model} {_were(n_components)} ablated: the weights {_ablated(edit)}{also}"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _changed(edit: Mapping[str, Any], components: Sequence[Any]) -> str:
    first = f"What the rule ranks first, by component attributions of the output *{edit.get('output')}*:\n\n"
    names = components or edit.get("parameters") or ()
    return (first if components else "") + "\n".join(f"- {code_span(name)}" for name in names)


def _load_script(base: Mapping[str, Any], source: str) -> str:
    """The Python that loads an edited model with the library of its base alone."""
    on_hub, library = source != ".", base.get("library")
    if library == "timm":
        name = json.dumps(f"{'hf-hub' if on_hub else 'local-dir'}:{source}")
        return f"import timm\n\nmodel = timm.create_model({name}, pretrained=True).eval()"
    if library == "transformers":
        name = python_name(base.get("class"), "AutoModel")
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({json.dumps(source)})"
    if library == "peft":
        return (
            f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, {json.dumps(source)}).eval()"
            "  # `base_model` as it is without adapters"
        )
    if not on_hub:
        script = 'from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file("model.safetensors"))'
    else:
        script = (
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
            f'model.load_state_dict(load_file(hf_hub_download({json.dumps(source)}, "model.safetensors")))'
        )
    return script + "  # `model` as its own code builds it"


_RULES = {
    "welch": "Welch's t between the targets' and the other examples' weights, a component at a time (COAR-Edit)",
    "penalised": "gain on the targets, minus the mean size of the effect on the others",
    "covariance": "forward selection: most gain on the targets for the least drift of the others",
}


def _rule(edit: Mapping[str, Any]) -> str:
    """In words; whether it was used in steps, and whether it was chosen."""
    said = str(_RULES.get(edit.get("rule"), edit.get("rule")))
    step, tried = edit.get("step"), edit.get("tried")
    if isinstance(step, int) and step:
        said += f", on attributions made anew after every {count(step, 'ablation')}"
    if not isinstance(tried, Sequence) or isinstance(tried, str) or not tried:
        return said
    rules = {str(one[0]).split(" on ")[0] for one in tried if isinstance(one, Sequence) and one}
    chosen = "it and the number of components are" if len(rules) > 1 else "the number of components is"
    return f"{said}; {chosen} the best on validation of {len(tried)} candidates"


def _ablated(edit: Mapping[str, Any]) -> str:
    """What became of the weights."""
    gate, ablation = edit.get("gate"), mapping(edit, "ablation")
    done = f"scaled by {gate:g}" if isinstance(gate, int | float) and gate else "set to zero"
    return f"{done} (the {ablation.get('name')} of what they made went into the biases)" if ablation else done


def _aim(edit: Mapping[str, Any]) -> str:
    """What the edit is for, as its task says it; else by the sides that were given."""
    if edit.get("task"):
        return str(edit["task"])
    sides = [("raise", "increase"), ("lower", "decrease")]
    said = [
        f"{verb} the output on {count(len(edit[side]), 'example')}{of_classes(edit, side)}"
        for verb, side in sides
        if edit.get(side)
    ]
    return " and ".join(said) + " and spare the others" if said else "change its outputs"


def _examples(indices: Any, classes: str = "") -> str:
    if isinstance(indices, str):
        return indices
    indices = list(indices or ())
    if not indices:
        return "none"
    return f"{count(len(indices), 'example')}{classes}: number {first_few(indices, 12)}"


def _before_and_after(figures: Sequence[Sequence[str]]) -> str:
    if not figures:
        return "No figures were given when this card was written."
    rows = [f"| {what} | {before} | {after} |" for what, before, after in figures]
    head = ["| measured on examples that nothing was chosen on | before | after |", "|---|---|---|"]
    return "\n".join(head + rows)
