"""What stands in for an ablated component, side by side: zero, its mean, its value for another example.

    python scripts/benchmark_ablations.py demo vit mobilenet gpt2 smollm2 smollm2_units --models models

`vit` is a small vision transformer trained in seconds on some of the demo's images. `demo` is the embedded network on
its images; `mobilenet` (on photographs), `smollm2` (its attention heads, on sequences of a novel) and `smollm2_units`
(its rows) come from `scripts/convert_benchmark_models.py`, `gpt2` (on the same novel) from
`scripts/train_benchmark_models.py`. Means are taken over other examples than those that are attributed, where there
are any. For every stand-in: attributions made at one fraction (by the path gradient; heads by leave-one-out), and
five sizes of fresh random masks, of which the table says how many decisions survive (outputs above 0 that stay there)
and how well the attributions predict the outputs (mean correlation over the masks). Beside it, how the weights
correlate with those of zero, and what a gate pass costs: processor time over that of zero, both measured in turns.

Figures are added to `ablations.json` in `--out`, of which `ablations.md` is made.
"""

import argparse
import functools
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark_forecasts
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import demo, models
from hf_coar.estimators.gates import GatePasses
from hf_coar.masking import MaskedModel
from hf_coar.models import tasks

logger = logging.getLogger("benchmark_ablations")


@dataclass(frozen=True)
class Case:
    """A model, examples to attribute, others to take means of, and the sizes of the masks."""

    model: nn.Module
    data: Any
    others: Any
    granularity: str
    output: str
    fraction: float
    sizes: tuple[float, ...]
    method: Any
    n_masks: int


def rounds(number: int) -> Any:
    """The path gradient, so many rounds."""
    return coar.PathGradient(rounds=number)


def said(method: Any) -> str:
    """A method in words."""
    many = isinstance(method, coar.PathGradient)
    return f"the path gradient, {method.rounds} rounds" if many else "leave-one-out"


def embedded(args: argparse.Namespace) -> Case:
    """The demo's network and images."""
    model, images = coar.load(demo.MODEL, demo.IMAGES, batch_size=64)
    data, others = images.select(range(64)), images.select(range(200, 456))
    return Case(model, data, others, "unit", "margin", 0.05, (0.0125, 0.025, 0.05, 0.1, 0.2), rounds(8), args.masks)


def mobilenet(args: argparse.Namespace) -> Case:
    """MobileNetV2 on crops of photographs; the decisions are its own. Means are of the other crops."""
    folder = args.models / "mobilenet"
    model, examples = models.load_model(folder), load_file(folder / "examples.safetensors")
    first = {name: value[::4][:8] for name, value in examples.items()}
    rest = {name: value[[i for i in range(len(value)) if i % 4]] for name, value in examples.items()}
    sizes = (0.0025, 0.005, 0.01, 0.02, 0.05)
    return Case(model, [first], [rest], "unit", "margin", 0.01, sizes, rounds(4), min(args.masks, 40))


def sequences(folder: Path, n_examples: int) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A language model, so many sequences of a novel in one batch, and 16 others."""
    model, tokens = models.load_model(folder), load_file(folder / "examples.safetensors")["input_ids"]
    return model, [{"input_ids": tokens[:n_examples]}], [{"input_ids": tokens[16:32]}]


def smollm2(args: argparse.Namespace) -> Case:
    """The attention heads of SmolLM2-135M on sequences of 32 tokens."""
    model, data, others = sequences(args.models / "smollm2", 4)
    alone = coar.baselines.LeaveOneOut()  # what `method="auto"` takes for so few
    return Case(model, data, others, "head", "token_margin", 0.1, (0.025, 0.05, 0.1, 0.2, 0.4), alone, 24)


def smollm2_units(args: argparse.Namespace) -> Case:
    """The rows of the matrices of SmolLM2-135M, at one in a hundred: at more, no decision is left."""
    model, data, others = sequences(args.models / "smollm2", 4)
    sizes = (0.0025, 0.005, 0.01, 0.02, 0.05)
    return Case(model, data, others, "unit", "token_margin", 0.01, sizes, rounds(2), min(args.masks, 24))


def gpt2(args: argparse.Namespace) -> Case:
    """A small GPT-2 on sequences of a novel that it never saw."""
    model, data, others = sequences(args.models / "gpt2", 16)
    sizes = (0.0125, 0.025, 0.05, 0.1, 0.2)
    return Case(model, data, others, "unit", "token_margin", 0.05, sizes, rounds(8), args.masks)


def vit(args: argparse.Namespace) -> Case:
    """The small vision transformer that `benchmark_growth.py` trains, and images that it never saw."""
    model, pixels, labels = benchmark_forecasts.small_vit()
    first, rest = ({"pixel_values": pixels[rows], "labels": labels[rows]} for rows in (slice(0, 32), slice(32, 200)))
    return Case(model, [first], [rest], "unit", "margin", 0.05, (0.0125, 0.025, 0.05, 0.1, 0.2), rounds(8), args.masks)


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "demo": embedded,
    "gpt2": gpt2,
    "mobilenet": mobilenet,
    "smollm2": smollm2,
    "smollm2_units": smollm2_units,
    "vit": vit,
}


def stand_ins(case: Case) -> dict[str, Any]:
    """Those to compare, by name."""
    return {"zero": "zero", "mean": coar.Mean(case.others), "resample": coar.Resample(case.others, seed=0)}


def figures(case: Case, ablation: Any, seed: int) -> tuple[dict[str, Any], Tensor, coar.Components]:
    """What is measured of one stand-in; the weights, float32 [examples, components]; the components."""
    components = coar.find_components(case.model, case.granularity, ablation=ablation)
    options = {"output": case.output, "method": case.method, "ablated_fraction": case.fraction, "seed": seed}
    begun = time.process_time()
    attributions = coar.attribute(case.model, case.data, components, progress=False, **options)
    spent = time.process_time() - begun
    report = coar.evaluate(
        attributions, case.model, case.data, fractions=case.sizes, n_masks=case.n_masks, seed=seed + 1, progress=False
    )
    complete = attributions.bias + attributions.weights.sum(1)
    right = complete > 0
    found = {
        "n_components": len(components),
        "n_examples": len(attributions),
        "decisions": {
            str(f): float((report.measured[f][:, right] > 0).float().mean()) if right.any() else None
            for f in case.sizes
        },
        "correlation": {str(f): report.correlation[f] for f in case.sizes},
        "slope": {str(f): report.slope[f] for f in case.sizes},
        "processor_seconds": round(spent, 1),
    }
    return found, attributions.weights, components


def gate_pass_ratios(case: Case, components: dict[str, coar.Components], repeats: int = 41) -> dict[str, float]:
    """Processor time of a gate pass over that of zero: the median of passes that take turns."""
    batch = next(iter(case.data))
    batch = {name: value[:8] for name, value in batch.items()}
    output = tasks.bind(case.model, case.output, None, batch)
    passes, spent = {}, {name: [] for name in components}
    for name, of in components.items():
        passes[name] = (GatePasses(MaskedModel(case.model, of), output, delta=True), of)
    with models.frozen(case.model):
        for turn in range(repeats + 1):
            for name, (run, of) in passes.items():
                source = of.stand_in.source if of.stand_in else None
                given = source.joined(batch) if source is not None else batch
                begun = time.process_time()
                run(given, torch.full((len(next(iter(batch.values()))), len(of)), 0.95), 0.6)
                if turn:  # the first one warms up, and finds out where the examples are
                    spent[name].append(time.process_time() - begun)
    medians = {name: sorted(times)[len(times) // 2] for name, times in spent.items()}
    return {name: round(value / medians["zero"], 3) for name, value in medians.items()}


def run(name: str, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """All stand-ins of one case; what was found is saved after each of them."""
    case, found, weights, components = CASES[name](args), {}, {}, {}
    about = {
        "granularity": case.granularity,
        "output": case.output,
        "fraction": case.fraction,
        "method": said(case.method),
        "n_masks": case.n_masks,
        "seed": args.seed,
        "machine": machine(),
    }
    for kind, ablation in stand_ins(case).items():
        found[kind], weights[kind], components[kind] = figures(case, ablation, args.seed)
        pair = torch.stack([weights["zero"].flatten(), weights[kind].flatten()])
        found[kind] |= {"weights_like_zero": float(torch.corrcoef(pair)[0, 1]), "gate_pass": None}
        logger.info("%s, %s: %s", name, kind, found[kind])
        save({**about, "stand_ins": found})
    for kind, ratio in gate_pass_ratios(case, components).items():
        found[kind]["gate_pass"] = ratio
    save({**about, "stand_ins": found})


def machine() -> str:
    """On what the figures were measured."""
    return f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__.split('+')[0]}"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# What stands in for an ablated component", "", *(__doc__ or "").split("\n\n", 1)[1].splitlines(), ""]
    for name, result in results.items():
        first = next(iter(result["stand_ins"].values()))
        sizes = list(first["decisions"])
        lines += [
            f"## {name}",
            "",
            f"{first['n_components']:,} components (granularity {result['granularity']}), {first['n_examples']} "
            f"examples, output {result['output']}, attributed at {result['fraction']:.2%} by {result['method']}, "
            f"{result['n_masks']} masks a size, seed {result['seed']}; {result['machine']}.",
            "",
            "| stand-in | " + " | ".join(f"{float(size):.2%}" for size in sizes) + " | like zero's | gate pass |",
            "|---|" + "---|" * (len(sizes) + 2),
        ]
        for kind, entry in result["stand_ins"].items():
            cells = [
                f"{_share(entry['decisions'][size])} · {entry['correlation'][size]:.3f} · {entry['slope'][size]:.2f}"
                for size in sizes
            ]
            like = f"{entry['weights_like_zero']:.2f}"
            gate_pass = "not run" if entry["gate_pass"] is None else f"{entry['gate_pass']:.2f}"
            lines.append(f"| {kind} | {' | '.join(cells)} | {like} | {gate_pass} |")
        lines += ["", "Cells: decisions that survive · correlation · slope of measured on predicted.", ""]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    """A share in percent; none where no output was above 0, as of language models' mean over all tokens."""
    return "–" if value is None or value != value else f"{100 * value:.0f} %"


def main() -> None:
    """Run some cases, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="nothing makes the table anew")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = args.out / "ablations.json"
    results = json.loads(path.read_text()) if path.is_file() else {}

    def save(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        path.write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "ablations.md").write_text(table(results))

    for name in args.cases:
        run(name, args, functools.partial(save, name))
    (args.out / "ablations.md").write_text(table(results))


if __name__ == "__main__":
    main()
