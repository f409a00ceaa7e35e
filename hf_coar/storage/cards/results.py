"""The Hub's files of results, and what an evaluation must hold to be shown."""

from collections.abc import Mapping
from typing import Any

from hf_coar.errors import CorruptFileError
from hf_coar.storage.cards.pieces import hub_id, percent

RESULTS = ".eval_results/hf_coar.yaml"


def fidelity_table(evaluation: Mapping[str, Any] | None) -> str:
    """What an evaluation found, as Markdown: a row for every ablated fraction."""
    if evaluation is None:
        return "Not measured when this card was written; `coar.evaluate` does it."
    rows = [
        f"| {percent(row['ablated_fraction'])} | {row['correlation']:.3f} | {row['interval'][0]:.3f} to "
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
            f"masks, {percent(row['ablated_fraction'])} of the components ablated, seed {evaluation['seed']}, "
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


def check_evaluation(value: Any) -> dict[str, Any]:
    """An evaluation as it is saved, checked for all that a card needs.

    Raises:
        CorruptFileError: it is something else.
    """
    try:
        if not isinstance(value.get("of"), str | None):
            raise TypeError("its 'of' is no text")
        fidelity_table(value)
        evaluation_entries({"id": "a/b", "revision": "0" * 40}, value)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"this is no evaluation as `Report.to_json` gives it: {error!r}") from error
    return value
