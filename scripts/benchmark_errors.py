"""Whether standard errors hold: how often the definition itself lies within them, above all for large components.

    python scripts/benchmark_errors.py demo --seeds 24 25 26 27
    python scripts/benchmark_errors.py vit --seeds 10 11
    python scripts/benchmark_errors.py models/mobilenet --n-examples 2 --fraction 0.01 --n-contexts 24 --share 0.01

The definition of a weight is a component's mean effect while every other one is ablated with the fraction's chance. It
is measured in random contexts, the same for all components, one masked pass a component and context; its own standard
error is counted with that of the weight. Measured are the `--share` of the components that might be the largest of
some example, by weight plus two standard errors; of them the largest 1 % and 5 % (of all components) are taken by
what was *measured*. Figures are added to `errors.json`, of which `errors.md` is made. Wanted: 90–99 % within 1.96.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from benchmark_forecasts import load
from torch import Tensor

import hf_coar as coar
from hf_coar import data
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs

logger = logging.getLogger("benchmark_errors")

RESULTS = Path(__file__).parent / "results" / "errors.json"
CONTEXT_SEED = 90_000  # contexts' seeds begin here
SIZES = (0.01, 0.05)


@torch.no_grad()
def definition(
    found: coar.Attributions, model: Any, batch: data.Batch, chosen: Tensor, count: int, seed: int
) -> Tensor:
    """Effects of the chosen components in random contexts, float32 [contexts, examples, chosen]."""
    masked, output = MaskedModel(model, found.components), outputs.get(found.provenance.output)
    generator = torch.Generator().manual_seed(CONTEXT_SEED + seed)

    def under(kept: Tensor) -> Tensor:
        with masked.ablated(kept, how="weights"):
            return output.of(model, batch)

    effects = torch.empty(count, len(found), len(chosen))
    for number in range(count):
        kept = torch.rand(len(found.components), generator=generator) >= found.provenance.ablated_fraction
        base = under(kept)
        for place, component in enumerate(chosen.tolist()):
            other = kept.clone()
            other[component] = ~kept[component]
            difference = base - under(other)
            effects[number, :, place] = difference if kept[component] else -difference
    return effects


def candidates(found: coar.Attributions, share: float) -> Tensor:
    """Components that might be among the largest of some example, int64 [any]."""
    optimistic = found.weights.abs() + 2 * found.standard_errors
    most = max(1, round(share * len(found.components)))
    return optimistic.topk(most, dim=1).indices.unique()


def figures(found: coar.Attributions, chosen: Tensor, effects: Tensor) -> dict[str, float]:
    """Shares within 1.96 standard errors, and the slope of what was measured on the weights, by size."""
    truth, noise = effects.mean(0), effects.std(0) / len(effects) ** 0.5
    weights, errors = found.weights[:, chosen], found.standard_errors[:, chosen]
    score = (weights - truth) / (errors.square() + noise.square()).sqrt()
    known: dict[str, float] = {"measured": len(chosen)}
    for size in SIZES:
        count = min(len(chosen), max(1, round(size * len(found.components))))
        rows = truth.abs().topk(count, dim=1).indices
        inside = (score.gather(1, rows).abs() <= 1.96).float()
        known[f"within, {size:.0%}"] = float(inside.mean())
        # What would have to multiply the errors for 95 % to be inside.
        known[f"factor, {size:.0%}"] = float(score.gather(1, rows).abs().flatten().quantile(0.95)) / 1.96
        t, w = truth.gather(1, rows), weights.gather(1, rows)
        known[f"slope, {size:.0%}"] = float((t * w).sum() / w.square().sum())
    known["noise"] = float((noise / errors).square().mean().sqrt())
    return known


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured as Markdown, means over seeds."""
    lines = [
        "# Whether standard errors hold",
        "",
        "Made by `scripts/benchmark_errors.py` on two CPU cores: the share of the largest components (by what was "
        "measured) whose definition lies within 1.96 standard errors, the worst seed in brackets; and the slope of the "
        "definition on the weight. Wanted: 90–99 %.",
        "",
        "| model (components), ablated | seeds, examples | largest 1 % | largest 5 % | slope, 1 % | 5 % |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]

        def told(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [row[key] for row in own]
            mean = sum(values) / len(values)
            return f"{100 * mean:.0f} % ({100 * min(values):.0f})" if key.startswith("within") else f"{mean:.2f}"

        cells = [told(f"{what}, {size:.0%}") for what in ("within", "slope") for size in SIZES]
        first = own[0]
        lines.append(
            f"| {name} ({first['components']:,}), {100 * first['fraction']:.3g} % | {len(own)}, {first['examples']} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="demo, or folders; none: the table anew")
    parser.add_argument("--n-examples", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--share", type=float, default=0.08, help="of the components, an example (default %(default)s)")
    parser.add_argument("--n-contexts", type=int, default=48)
    parser.add_argument("--granularity", default="unit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text()) if args.out.exists() else []
    for path in args.models:
        for seed in args.seeds:
            model, batches = load(path, seed * args.n_examples, args.n_examples)
            batch = data.as_batch(next(iter(batches)))
            components = coar.find_components(model, granularity=args.granularity)
            output = "token_margin" if "input_ids" in batch else "margin"
            found = coar.attribute(
                model, batches, components, output=output, method=coar.PathGradient(),
                ablated_fraction=args.fraction, seed=seed, progress=False,
            )  # fmt: skip
            chosen = candidates(found, args.share)
            effects = definition(found, model, batch, chosen, args.n_contexts, seed)
            name = f"{Path(path).name}, {args.granularity}s"
            known = [row for row in known if (row["model"], row["seed"]) != (name, seed)]
            known.append({"model": name, "seed": seed, "components": len(components), "fraction": args.fraction,
                          "examples": len(found), **figures(found, chosen, effects)})  # fmt: skip
            logger.info("%s", known[-1])
            args.out.write_text(json.dumps(known, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(known))


if __name__ == "__main__":
    main()
