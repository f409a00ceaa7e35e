"""What a call without settings gives: the method and fraction that it takes, what they cost, and how well it predicts.

    python scripts/benchmark_defaults.py demo vit models/gpt2
    python scripts/benchmark_defaults.py models/mobilenet --n-examples 8 --seeds 2 3
    python scripts/benchmark_defaults.py models/smollm2 --granularity head --n-examples 4 --seeds 5

`coar.attribute(model, data)` and `coar.evaluate` of that, on examples and with masks of each seed's own. `demo` is the
embedded model, `vit` a small one trained here in seconds; the others come from `convert_benchmark_models.py` and
`train_benchmark_models.py`. Rows are added to `results/defaults.md`.
"""

import argparse
from pathlib import Path

import tables
import torch
from benchmark_forecasts import load

import hf_coar as coar

RESULTS = Path(__file__).parent / "results" / "defaults.md"
JUDGES = 700  # seeds of the masks that judge begin here
HEADER = [
    "| model | examples | seed | taken | passes an example | at that fraction | decisions kept | at a quarter |",
    "|:-|:-|:-|---|---|---|---|---|",
]
NOTE = (
    "Correlation of predicted and measured outputs on 100 fresh masks, with its 95 % interval over masks and examples. "
    "One thread of two CPU cores."
)


def row(path: str, granularity: str, n_examples: int, seed: int) -> str:
    """One seed of one model."""
    model, batches = load(path, seed * n_examples, n_examples)
    components = coar.find_components(model, granularity=granularity)
    found = coar.attribute(model, batches, components, seed=seed, progress=False)
    report = coar.evaluate(found, model, batches, seed=JUDGES + seed, progress=False)
    fraction = found.provenance.ablated_fraction
    quarter = min(report.correlation, key=lambda one: abs(one - fraction / 4))

    def told(at: float) -> str:
        low, high = report.interval[at]
        return f"{report.correlation[at]:.2f} ({low:.2f}–{high:.2f})"

    _, kept = report.left(fraction)
    cells = [
        f"{Path(path).name}, {len(components):,} {granularity}s", str(n_examples), str(seed),
        f"{found.provenance.method_name} at {100 * fraction:.3g} %", f"{found.provenance.cost:,.0f}", told(fraction),
        "–" if kept is None else f"{kept:.0%}", told(quarter),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure some models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="demo, vit, or folders")
    parser.add_argument("--granularity", default="unit")
    parser.add_argument("--n-examples", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for path in args.models:
        for seed in args.seeds:
            rows = [row(path, args.granularity, args.n_examples, seed)]
            print(*rows, flush=True)
            command = "python scripts/benchmark_defaults.py MODEL …"
            tables.write(RESULTS, "Calls without settings", command, HEADER, rows, [NOTE])


if __name__ == "__main__":
    main()
