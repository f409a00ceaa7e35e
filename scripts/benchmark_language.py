"""SmolLM2's 155,520 rows at 2.5 %: what attributions within 300 forward passes say of three kinds of masks.

    python scripts/benchmark_language.py a b --models models           # an hour and a half with one thread
    python scripts/benchmark_language.py --table

Two sets of sequences of a novel. For each the attributions of `PathGradient` in two sizes, judged by the mean
correlation over the sequences under fresh masks: of all components; of those masks the ones that touch no outlier of
any sequence; and masks that leave the first two layers in place, where the outliers are. Everything that was measured
lies in `--cache` and is not measured again; figures are added to `scripts/results/language.json`, of which
`language.md` is made.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from benchmark_estimators import outliers_of
from benchmark_estimators import task as task_of
from torch import Tensor

import hf_coar as coar
from hf_coar import models
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import sampling
from hf_coar.runs.fidelity import correlation
from hf_coar.runs.problem import Problem
from hf_coar.runs.store import Store

RESULTS = Path(__file__).resolve().parent / "results" / "language.json"
FRACTION, SEED, FIRST_LAYERS = 0.025, 20_001, ("model.layers.0.", "model.layers.1.")
METHODS = {
    "2 rounds, 128 flips": coar.PathGradient(rounds=2, n_flips=128, check_masks=0),
    "4 rounds, no flips": coar.PathGradient(rounds=4, n_flips=0, check_masks=0),
}
KINDS = ("all masks", "without outliers", "but layers 0 and 1")
logger = logging.getLogger("benchmark_language")


class Sparing:
    """Random masks that leave some components in place."""

    def __init__(self, masks: sampling.Masks, spared: Tensor) -> None:
        """Components spared, bool [components]."""
        self.masks, self.spared = masks, spared
        self.ablated_fraction, self.count = masks.ablated_fraction, masks.count

    def rows(self, start: int, stop: int) -> Tensor:
        """As of `sampling.Masks`."""
        return self.masks.rows(start, stop) | self.spared


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of a set of sequences."""
    task = task_of(f"smollm2-{name}", args.models, 0)
    batch = {key: value[: args.sequences] for key, value in task.data[0].items()}
    components, output = coar.find_components(task.model), outputs.get(task.output)
    first = torch.cat(
        [torch.full((group.size,), group.parameter.startswith(FIRST_LAYERS)) for group in components.groups]
    )
    masked, judged = MaskedModel(task.model, components), {}
    for number, (kind, spared) in enumerate((("all", torch.zeros_like(first)), ("later layers", first))):
        masks = Sparing(sampling.Masks(len(first), FRACTION, args.masks, SEED + number, sampling.EVALUATION), spared)
        settings = {"set": name, "kind": kind, "model": models.fingerprint(task.model)}
        store = Store(args.cache / f"{name}-{kind}", settings)
        problem = Problem(masked, [batch], output, FRACTION, SEED, store)
        judged[kind] = masks.rows(0, masks.count), problem.measure(masks)
    outlying = outliers_of(task, components)
    found = {}
    for label, method in METHODS.items():
        attributions = coar.attribute(
            task.model, [batch], components, output=output, method=method, ablated_fraction=FRACTION,
            out=args.cache / f"{name}-{label.replace(', ', '-').replace(' ', '-')}",
        )  # fmt: skip
        kept, measured = judged["all"]
        untouched = kept[:, outlying].all(1)
        figures = [
            _correlation(attributions.weights, kept, measured),
            _correlation(attributions.weights, kept[untouched], measured[untouched]),
            _correlation(attributions.weights, *judged["later layers"]),
        ]
        found[label] = {"cost": attributions.provenance.cost, **dict(zip(KINDS, figures, strict=True))}
        logger.info("%s, %s: %s", name, label, found[label])
    return {"sequences": args.sequences, "masks": args.masks, "outliers": len(outlying), "methods": found}


def _correlation(weights: Tensor, kept: Tensor, measured: Tensor) -> float:
    return float(correlation(kept.float() @ weights.T, measured).nanmean())


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    rows = [
        f"| {name} | {label} | {figures['cost']:.0f} | " + " | ".join(f"{figures[kind]:.3f}" for kind in KINDS) + " |"
        for name, entry in sorted(found.items())
        for label, figures in entry["methods"].items()
    ]
    one = next(iter(found.values()))
    return "\n".join(
        [
            "# SmolLM2-135M, row by row",
            "",
            "Made by `scripts/benchmark_language.py` on two CPU cores. "
            f"Sets of {one['sequences']} sequences of 32 tokens, "
            f"155,520 rows, 2.5 % ablated, {one['masks']} fresh masks of each kind; mean correlation of predicted and "
            "measured token margins over the sequences. Wanted, within a cost of 300: .90, .85, .85.",
            "",
            f"| set | method | cost | {' | '.join(KINDS)} |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=("a", "b"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--cache", type=Path, default=Path("runs/language"))
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--masks", type=int, default=300)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.sets:
        found[name] = measure(name, args)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
