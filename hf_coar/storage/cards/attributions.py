"""The card of attributions."""

import json
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
    percent,
    public_name,
    snippet,
    template,
    yaml_head,
)
from hf_coar.storage.cards.results import fidelity_table
from hf_coar.storage.escaping import all_for_markdown, code_span, for_markdown


def attributions_card(
    config: Mapping[str, Any],
    n_examples: int,
    source: str = ".",
    evaluation: Mapping[str, Any] | None = None,
    stability: float | None = None,
    pictures: Sequence[str] = (),
    examples: str = "",
) -> str:
    """The card of attributions, as Markdown.

    Args:
        config: of the attributions.
        n_examples: how many there are.
        source: from where the reader loads them: Hub id, or "." for the folder in which the card is.
        evaluation: `Report.to_json()` of an evaluation on fresh masks.
        stability: `Attributions.stability()`.
        pictures: paths of pictures, relative to the card.
        examples: what they are: labels, accuracy.
    """
    model, data = mapping(config, "model"), mapping(config, "data")
    metadata = {"library_name": "hf_coar", "tags": ["coar", "component-attribution", "interpretability"]}
    # Of the relations that the Hub knows, an adapter's is the nearest: of no use without the base model.
    metadata |= {"base_model": model_id(model), "base_model_relation": "adapter"} if model_id(model) else {}
    metadata |= licence(model)
    metadata |= {"datasets": [hub_id(data)]} if hub_id(data) else {}
    snippets = snippet("attributions", source=json.dumps(source)), _next_snippet(model, data)
    config = all_for_markdown(config)  # from here on it is shown, and may come from anybody
    model, data, fraction = mapping(config, "model"), mapping(config, "data"), config.get("ablated_fraction")
    text = template("attributions").substitute(
        metadata=yaml_head(metadata),
        model=model_name(model),
        model_line=model_line(model),
        data_line=data_line(data),
        n_examples=f"{n_examples:,}",
        examples_line=for_markdown(examples or f"{n_examples:,}"),
        n_components=f"{config.get('n_components') or 0:,}",
        granularity=f"granularity *{config.get('granularity')}*",
        components_line=f"{config.get('n_components') or 0:,}, granularity {config.get('granularity')}; listed in "
        f"`components.json`{_stands_in(mapping(config, 'ablation'))}",
        output=config.get("output"),
        unit=config.get("unit") or "its own unit",
        method=_method(mapping(config, "method")),
        ablated_fraction=percent(fraction),
        seed=config.get("seed"),
        cost=_cost(config.get("cost"), n_examples),
        versions=", ".join(f"{name} {version}" for name, version in mapping(config, "versions").items()),
        fidelity=fidelity_table(evaluation),
        stability=_stability(stability) + _warned(config.get("warnings")),
        snippet=snippets[0],
        next_snippet=snippets[1],
        pictures=gallery(pictures),
        fingerprint=code_span(model.get("fingerprint")),
        citation=CITATION,
    )
    return marked(text)


def _stands_in(ablation: Mapping[str, Any]) -> str:
    """What an ablated component is replaced by, for a sentence; nothing for zero."""
    if not ablation:
        return ""
    data = mapping(ablation, "data")
    among = f" of {public_name(data)}" if data.get("id") else ""
    count = ablation.get("n_examples")
    of = f" ({count:,} examples{among})" if type(count) is int else ""
    return f". For one that is ablated stands in: {ablation.get('name')}{of}"


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


def _warned(warnings: Any) -> str:
    """What a person must know first, one line each, escaped before."""
    lines = [line for line in warnings if isinstance(line, str)] if isinstance(warnings, list | tuple) else []
    return "".join(f"\n\n**Take care:** {' '.join(line.split())}" for line in lines)


def _stability(stability: float | None) -> str:
    if stability is None:
        return "Stability: unknown, as the estimator gave no standard errors."
    return (
        f"Stability: {max(stability, 0):.2f}. That is the correlation expected between an example's weights here and "
        "in a second run with another seed, by the standard errors."
    )


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
