"""Model cards, from the templates beside this file, and the Hub's files of results.

A card that was made here says so in its last line, with a checksum of the text: it may be replaced by a newer one as
long as no person has changed it, and never afterwards.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from string import Template
from typing import Any

from hf_coar.errors import CorruptFileError
from hf_coar.storage.labels import label_names, listed, of_classes

RESULTS = ".eval_results/hf_coar.yaml"

_MARK = re.compile(r"\n<!-- made by hf_coar; sha256 of the text above: ([0-9a-f]{16}) -->\n\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CITATION = """\
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _marked(text: str) -> str:
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


# --------------------------------------------------------------------------------------------------- attributions


def attributions_card(
    config: Mapping[str, Any],
    n_examples: int,
    source: str = ".",
    evaluation: Mapping[str, Any] | None = None,
    stability: float | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The card of attributions, as Markdown.

    Args:
        config: of the attributions.
        n_examples: how many there are.
        source: from where the reader loads them: Hub id, or "." for the folder in which the card is.
        evaluation: `Report.to_json()` of an evaluation on fresh masks.
        stability: `Attributions.stability()`.
        pictures: paths of pictures, relative to the card.
    """
    model, data = _mapping(config, "model"), _mapping(config, "data")
    metadata = {"library_name": "hf_coar", "tags": ["coar", "component-attribution", "interpretability"]}
    # Of the relations that the Hub knows, an adapter's is the nearest: of no use without the base model.
    metadata |= {"base_model": model_id(model), "base_model_relation": "adapter"} if model_id(model) else {}
    metadata |= {"datasets": [hub_id(data)]} if hub_id(data) else {}
    fraction = config.get("ablated_fraction")
    text = template("attributions").substitute(
        metadata=_yaml_head(metadata),
        model=_model_name(model),
        model_line=_model_line(model),
        data_line=_data_line(data),
        n_examples=f"{n_examples:,}",
        n_components=f"{config.get('n_components') or 0:,}",
        granularity=f"granularity *{config.get('granularity')}*",
        components_line=f"{config.get('n_components') or 0:,}, granularity {config.get('granularity')}; listed in "
        "`components.json`",
        output=config.get("output"),
        unit=config.get("unit") or "its own unit",
        method=_method(_mapping(config, "method")),
        ablated_fraction=_percent(fraction),
        seed=config.get("seed"),
        cost=_cost(config.get("cost"), n_examples),
        versions=", ".join(f"{name} {version}" for name, version in _mapping(config, "versions").items()),
        fidelity=_fidelity(evaluation),
        stability=_stability(stability),
        snippet=_snippet("attributions", source=json.dumps(source)),
        next_snippet=_next_snippet(model, data),
        pictures=_gallery(pictures),
        fingerprint=model.get("fingerprint"),
        citation=_CITATION,
    )
    return _marked(text)


def _next_snippet(model: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """How to load the model and the data, where both are on the Hub."""
    if not (model_id(model) and hub_id(data)) or "selected" in data:
        return ""
    arguments = {"data": data.get("id"), "split": data.get("split"), "revision": model.get("revision")}
    arguments["data_revision"] = data.get("revision")
    given = [f"    {key}={json.dumps(value)}," for key, value in arguments.items() if value]
    lines = [
        "With the model and the data, predictions can be checked on masks of your own, and the model edited:",
        "",
        "```python",
        "model, data = coar.load(",
        f"    {json.dumps(model['id'])},",
        *given,
        ")",
        "print(coar.evaluate(attributions, model, data))",
        "edited = coar.edit(model, attributions, decrease=[0], n_components=10)",
        "```",
        "",
        "",
    ]
    return "\n".join(lines)


def _fidelity(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "Not measured when this card was written; `coar.evaluate` does it."
    rows = [
        f"| {_percent(row['ablated_fraction'])} | {row['correlation']:.3f} | {row['interval'][0]:.3f} to "
        f"{row['interval'][1]:.3f} | {row['slope']:.2f} |"
        for row in evaluation["fractions"]
    ]
    return "\n".join(
        [
            f"Predicted against measured outputs on {evaluation['n_masks']} fresh random masks a fraction (seed "
            f"{evaluation['seed']}), which the fit has not seen: the mean over the examples of the Pearson correlation "
            "over the masks, and the slope of measured on predicted outputs (1 = the scale is right).",
            "",
            "| ablated | correlation | 95 % interval | slope |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def check_evaluation(value: Any) -> dict[str, Any]:
    """An evaluation as it is saved, checked for all that a card needs.

    Raises:
        CorruptFileError: it is something else.
    """
    try:
        _fidelity(value)
        evaluation_entries({"id": "a/b", "revision": "0" * 40}, value)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"this is no evaluation as `Report.to_json` gives it: {error!r}") from error
    return value


def _stability(stability: float | None) -> str:
    if stability is None:
        return "Stability: unknown, as the estimator gave no standard errors."
    return (
        f"Stability: {max(stability, 0):.2f}. That is the correlation expected between an example's weights here and "
        "in a second run with another seed, by the standard errors."
    )


# --------------------------------------------------------------------------------------------------- edited models


def edited_model_card(entries: Mapping[str, Any], source: str = ".", pictures: Sequence[str] = ()) -> str:
    """The card of an edited model, as Markdown.

    Args:
        entries: the record of the edit.
        source: from where the reader loads the model: Hub id, or "." for the folder in which the card is.
        pictures: paths of pictures, relative to the card.
    """
    base, data = _mapping(entries, "base"), _mapping(entries, "data")
    components, library = list(entries.get("components") or ()), base.get("library") or "torch"
    metadata = {"library_name": {"torch": "pytorch"}.get(library, library)}
    metadata |= {"tags": ["coar", "model-editing", "component-attribution"]}
    metadata |= {"base_model": model_id(base), "base_model_relation": "finetune"} if model_id(base) else {}
    metadata |= {"datasets": [hub_id(data)]} if hub_id(data) else {}
    revision = f", revision={json.dumps(base['revision'])}" if model_id(base) and base.get("revision") else ""
    text = template("edited_model").substitute(
        metadata=_yaml_head(metadata),
        title=f"{_model_name(base)}, {_count(len(components), 'component')} ablated".removeprefix("a "),
        model=_model_name(base),
        model_line=_model_line(base),
        data_line=_data_line(data),
        library={"torch": "PyTorch"}.get(library, library),
        aim=_aim(entries),
        increase=_examples(entries.get("increase"), of_classes(entries, "increase")),
        decrease=_examples(entries.get("decrease"), of_classes(entries, "decrease")),
        reference=_examples(entries.get("reference")),
        n_components=_count(len(components), "component"),
        were="was" if len(components) == 1 else "were",
        granularity=entries.get("granularity"),
        components="\n".join(f"- `{component}`" for component in components),
        rule=_rule(entries),
        ablated=_ablated(entries),
        output=entries.get("output"),
        figures=_before_and_after(entries.get("figures") or ()),
        snippet=_load_script(base, source),
        undo_snippet=_snippet(
            "undo", source=json.dumps(source), revision=revision,
            base=json.dumps(model_id(base) or "PATH OF THE ORIGINAL MODEL"),
        ),
        pictures=_gallery(pictures),
        citation=_CITATION,
    )  # fmt: skip
    return _marked(text)


def _load_script(base: Mapping[str, Any], source: str) -> str:
    """The Python that loads an edited model with the library of its base alone."""
    on_hub, library = source != ".", base.get("library")
    if library == "timm":
        name = json.dumps(f"{'hf-hub' if on_hub else 'local-dir'}:{source}")
        return f"import timm\n\nmodel = timm.create_model({name}, pretrained=True).eval()"
    if library == "transformers":
        name = base.get("class")
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({json.dumps(source)})"
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
    "mean_difference": "difference of the mean weights of the targets and the others",
    "penalised": "gain on the targets, minus four times the mean size of the effect on the others",
    "lightly_penalised": "gain on the targets, minus the mean size of the effect on the others",
    "hinge": "gain on the targets, minus three times what the others lose on average",
    "hinge_careful": "gain on the targets, minus six times what the others lose on average",
    "harm_over_spread": "gain on the targets minus three times the harm to the others, over the spread of both",
    "covariance": "forward selection: most gain on the targets for the least drift of the others",
    "covariance_bold": "forward selection: most gain on the targets for the least drift of the others, boldly",
    "covariance_careful": "forward selection: most gain on the targets for the least drift of the others, warily",
    "covariance_hinge": "forward selection: most gain on the targets for the least fall of the others",
}


def _rule(edit: Mapping[str, Any]) -> str:
    """In words; whether it was used in steps, and whether it was chosen."""
    said = str(_RULES.get(edit.get("rule"), edit.get("rule")))
    step, tried = edit.get("step"), edit.get("tried")
    if isinstance(step, int) and step:
        said += f", on attributions made anew after every {_count(step, 'ablation')}"
    if not isinstance(tried, Sequence) or isinstance(tried, str) or not tried:
        return said
    rules = {str(one[0]).split(" on ")[0] for one in tried if isinstance(one, Sequence) and one}
    chosen = "it and the number of components are" if len(rules) > 1 else "the number of components is"
    return f"{said}; {chosen} the best on validation of {len(tried)} candidates"


def _ablated(edit: Mapping[str, Any]) -> str:
    """What became of the weights."""
    gate = edit.get("gate")
    return f"scaled by {gate:g}" if isinstance(gate, int | float) and gate else "set to zero"


def _aim(edit: Mapping[str, Any]) -> str:
    sides = [("raise", "increase"), ("lower", "decrease")]
    said = [
        f"{verb} the output on {_count(len(edit[side]), 'example')}{of_classes(edit, side)}"
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
    listed = ", ".join(map(str, indices[:12])) + (", …" if len(indices) > 12 else "")
    return f"{_count(len(indices), 'example')}{classes}: number {listed}"


def _before_and_after(figures: Sequence[Sequence[str]]) -> str:
    if not figures:
        return "No figures were given when this card was written."
    rows = [f"| {what} | {before} | {after} |" for what, before, after in figures]
    head = ["| measured on examples that nothing was chosen on | before | after |", "|---|---|---|"]
    return "\n".join(head + rows)


# ---------------------------------------------------------------------------------------- the Hub's files of results


def evaluation_entries(data: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The counterfactual evaluation in the form of `.eval_results/*.yaml`; empty unless the data are on the Hub."""
    from huggingface_hub import EvalResultEntry
    from huggingface_hub import eval_result_entries_to_yaml as to_yaml

    name = hub_id(data)
    if name is None:
        return []
    entries = []
    for row in evaluation["fractions"]:
        low, high = row["interval"]
        notes = (
            f"mean Pearson correlation of predicted and measured outputs over {evaluation['n_masks']} fresh random "
            f"masks, {_percent(row['ablated_fraction'])} of the components ablated, seed {evaluation['seed']}, "
            f"split {data.get('split') or 'all'}; 95 % interval {low:.4f} to {high:.4f}"
        )
        entries.append(
            EvalResultEntry(
                dataset_id=name,
                task_id=f"coar_counterfactual_{row['ablated_fraction']:g}",
                value=round(float(row["correlation"]), 6),
                dataset_revision=data.get("revision"),
                notes=notes,
            )
        )
    return to_yaml(entries)


def evaluation_yaml(data: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str | None:
    """The text of `.eval_results/hf_coar.yaml`, None where there is nothing to say or the data are not on the Hub."""
    from huggingface_hub.utils import yaml_dump

    entries = evaluation_entries(data, evaluation) if evaluation is not None else []
    return yaml_dump(entries, sort_keys=False) if entries else None


# ------------------------------------------------------------------------------------------------------------ pieces


def _snippet(name: str, **values: str) -> str:
    return Template((resources("hf_coar.storage") / "templates" / f"{name}.py.template").read_text("utf-8")).substitute(
        values
    ).rstrip("\n")  # fmt: skip


def _yaml_head(values: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(**values).to_yaml()


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _model_name(model: Mapping[str, Any]) -> str:
    if model_id(model):
        return str(model_id(model))
    place, kind = public_name(model), f"a {model.get('class') or 'model'}"
    if hub_id(model):
        return f"{kind} (its configuration names {place}; these are not known to be the weights of it)"
    return f"{kind} ({place}, a local folder)" if place else kind


def _model_line(model: Mapping[str, Any]) -> str:
    parts = [_model_name(model)]
    parts += [f"revision `{model['revision']}`"] if model.get("revision") else []
    parts += [f"class {model['class']} of {model.get('library')}"] if model.get("class") and model_id(model) else []
    parts += [f"of {model['library']}"] if model.get("library") and not model_id(model) else []
    return ", ".join(parts)


def _data_line(data: Mapping[str, Any]) -> str:
    local = f"{public_name(data)} (local)" if public_name(data) else "batches of tensors"
    parts = [hub_id(data) or local]
    parts += [f"split {data['split']}"] if data.get("split") else []
    parts += [f"revision `{data['revision']}`"] if data.get("revision") else []
    selected = data.get("selected")
    parts += [f"{_count(len(selected), 'example')} of it"] if isinstance(selected, Sequence) else []
    names = label_names({"data": data})
    parts += [f"classes {listed(names)}"] if names else []
    return ", ".join(parts)


def _method(method: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in method.items() if key != "name")
    return f"{str(method.get('name')).replace('_', ' ')} ({settings})" if settings else str(method.get("name"))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items()) + "}"
    return str(value) if isinstance(value, str | int | float) else json.dumps(value)


def _cost(cost: Any, n_examples: int) -> str:
    if not isinstance(cost, int | float):
        return "unknown"
    return f"{cost:g} forward passes an example, {cost * n_examples:,.0f} in all"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _percent(fraction: Any) -> str:
    return f"{100 * fraction:g} %" if isinstance(fraction, int | float) else "an unknown fraction"


def _gallery(pictures: Sequence[str]) -> str:
    if not pictures:
        return ""
    names = [(re.sub(r"[_-]+", " ", path.rsplit("/", 1)[-1].rsplit(".", 1)[0]), path) for path in pictures]
    return "## Pictures\n\n" + "\n\n".join(f"![{name}]({path})" for name, path in names) + "\n\n"
