"""Forecasts for sets of any size: correlation, slope and miss beside linear predictions, and whether intervals hold.

    python scripts/benchmark_forecasts.py demo --first 160 --n-examples 16 --n-masks 60 --seeds 0 1 2 3
    python scripts/benchmark_forecasts.py vit --first 60 --n-examples 16 --n-masks 60 --seeds 0 1 2 3
    python scripts/benchmark_forecasts.py models/mobilenet --n-examples 16 --fraction 0.01 --rounds 2
    python scripts/benchmark_forecasts.py models/smollm2 --n-examples 8 --fraction 0.025 --output token_margin

`demo` is the embedded model, `vit` a small one trained here in seconds; the others come from
`convert_benchmark_models.py` and `train_benchmark_models.py`. Masks
and sets are of seeds that no fit uses. For every size: random masks that all examples share, as `evaluate` takes them.
For intervals: fresh random sets and strongest sets of every example, which no calibration saw, sets larger than any
that one saw, and all layers, one at a time.
"""

import argparse
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_growth
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import data, demo, models
from hf_coar.attributions import Attributions
from hf_coar.attributions.forecast import largest_checked
from hf_coar.attributions.layers import layers_of
from hf_coar.estimators import checking
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import fidelity, sampling

logger = logging.getLogger("benchmark_forecasts")

RESULTS = Path(__file__).parent / "results" / "forecasts.json"
MASK_SEED = 12_345
SIZES = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4)  # of the fitted fraction
N_SETS = 40
LARGER, N_LARGER = (2, 4), 6


def load(name: str, first: int, count: int) -> tuple[nn.Module, Any]:
    """Model and data."""
    if name == "demo":
        return coar.load(demo.MODEL, demo.IMAGES, split=f"train[{first}:{first + count}]", batch_size=count)
    if name == "vit":
        model, pixels, labels = small_vit()
        some = slice(first, first + count)
        return model, [{"pixel_values": pixels[some], "labels": labels[some]}]
    examples = load_file(Path(name) / "examples.safetensors")
    return models.load_model(name), [{key: value[first : first + count] for key, value in examples.items()}]


@functools.cache
def small_vit() -> tuple[nn.Module, Tensor, Tensor]:
    """The vision transformer of width 48 of `benchmark_growth.py`, and the images and labels that it never saw."""
    pixels, labels = benchmark_growth.images()
    model = benchmark_growth.trained(48, pixels[:-200], labels[:-200])
    return model, pixels[-200:], labels[-200:]


def linear(found: Attributions) -> Attributions:
    """The same without its forecast."""
    provenance = found.provenance.to_json()
    provenance.pop("forecast", None)
    return Attributions(found.weights, found.bias, found.standard_errors, found.components, found.identity, provenance)


def by_size(found: Attributions, model: nn.Module, batches: Any, n_masks: int) -> list[dict[str, float]]:
    """Figures at every size that ablates something; linear predictions are judged on the same masks."""
    fitted, count = found.provenance.ablated_fraction, len(found.components)
    fractions = [fitted * size for size in SIZES if fitted * size * count >= 1]
    report = coar.evaluate(
        found, model, batches, fractions=fractions, n_masks=n_masks, seed=MASK_SEED, progress=False
    )  # fmt: skip
    rows = []
    for fraction in fractions:
        kept = sampling.Masks(count, fraction, n_masks, MASK_SEED, sampling.EVALUATION).rows(0, n_masks)
        measured = report.measured[fraction]
        row: dict[str, float] = {"fraction": fraction, "spread": float(measured.std(0).mean())}
        for name, predicted in (("linear", linear(found).predict(kept)), ("forecast", report.predicted[fraction])):
            row[f"{name} correlation"] = float(fidelity.correlation(predicted, measured).nanmean())
            row[f"{name} slope"] = fidelity.slope(predicted, measured)
            row[f"{name} miss"] = float((predicted - measured).abs().mean())
        rows.append(row)
    return rows


@torch.no_grad()
def coverage(found: Attributions, model: nn.Module, batches: Any, level: float) -> dict[str, float]:
    """The share of fresh sets inside their intervals, by kind of set, and half the mean width."""
    batch = data.as_batch(next(iter(batches)))
    masked, output = MaskedModel(model, found.components), outputs.get(found.provenance.output)
    inside: dict[str, list[Tensor]] = {}
    half: dict[str, list[Tensor]] = {}
    for kind, kept in (*checked_sets(found), *larger_sets(found), *layer_sets(found)):
        with masked.ablated(kept, how="hooks"):
            truth = output.of(model, batch)
        low, high = (end.diagonal() for end in found.predict(kept, level=level)[1:])
        inside.setdefault(kind, []).append((low <= truth) & (truth <= high))
        half.setdefault(kind, []).append((high - low) / 2)
    figures = {f"{kind} inside": float(torch.cat(values).float().mean()) for kind, values in inside.items()}
    return figures | {f"{kind} half width": float(torch.cat(values).mean()) for kind, values in half.items()}


def checked_sets(found: Attributions) -> Iterator[tuple[str, Tensor]]:
    """Fresh sets like those that intervals were learnt from, by kind: bool [examples, components]."""
    sets = checking.Sets(seed=54_321, fraction=found.provenance.ablated_fraction)
    for number in range(N_SETS):
        if sets.is_distant(number, found.weights.shape[1]):  # `larger_sets` are those
            continue
        kind = "strongest" if number % 5 in (1, 3) else "random"
        yield kind, sets.kept(found.weights[:], range(len(found)), number)


def larger_sets(found: Attributions) -> Iterator[tuple[str, Tensor]]:
    """Sets of twice and four times the size of the largest near ones; how intervals grow with it is learnt."""
    weights, generator = found.weights[:], torch.Generator().manual_seed(54_321)
    known = 1 + found.forecast.largest_known
    most = largest_checked(found.provenance.ablated_fraction, weights.shape[1], known)
    for times in LARGER:
        size = min(round(times * most), weights.shape[1] - 1)
        orders = {"random": [torch.rand(weights.shape, generator=generator) for _ in range(N_LARGER)]}
        orders["strongest"] = [weights, -weights, weights.abs()]
        for kind, values in ((kind, one) for kind, several in orders.items() for one in several):
            gone = values.topk(size, dim=1).indices
            yield f"{kind} × {times}", torch.ones_like(weights, dtype=torch.bool).scatter_(1, gone, False)


def layer_sets(found: Attributions) -> Iterator[tuple[str, Tensor]]:
    """Every layer, of which checks draw some."""
    for layer in layers_of(found.components):
        kept = torch.ones_like(found.weights[:], dtype=torch.bool)
        kept[:, layer.start : layer.stop] = False
        yield "layers", kept


def tables(known: list[dict[str, Any]]) -> str:
    """What was measured as Markdown, means over the seeds of each model."""
    lines = [
        "Means over seeds, on two CPU cores; made by `scripts/benchmark_forecasts.py`, whose masks and sets no fit has "
        "seen. Garments (demo, vit), a novel (gpt2) and photographs (mobilenet; made at 1 %): 16 examples a seed, 8 "
        "photographs; 60 masks a size, 20 random and 12 strongest near sets an example.",
        "",
        "| model, cost | ablated | linear: correlation, slope, miss | forecast: correlation, slope, miss | spread |",
        "|---|---|---|---|---|",
    ]
    for (model, fraction), rows in _grouped(known, "model", "fraction").items():
        mean = _mean(rows)
        figures = [
            ", ".join(f"{mean[f'{name} {what}']:.{n}f}" for what, n in (("correlation", 3), ("slope", 2), ("miss", 2)))
            for name in ("linear", "forecast")
        ]
        lines.append(
            f"| {model}, {mean['cost']:.0f} | {fraction:.2%} | {figures[0]} | {figures[1]} | {mean['spread']:.2f} |"
        )
    sizes = ("", *(f" × {times}" for times in LARGER))
    kinds = [*(f"{kind}{size}" for size in sizes for kind in ("random", "strongest")), "layers"]
    lines += [
        "",
        "Shares of sets inside their intervals, and half of the mean width; × 2 and × 4: sets so many times as large "
        "as the largest near ones; two checks in ten are larger than near ones. Layers: every one by itself, of which "
        "one check in ten is.",
        "",
    ]
    lines += [f"| model | level | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for (model, level), rows in _grouped(known, "model", "level").items():
        mean = _mean(rows)
        figures = [f"{mean[f'{kind} inside']:.3f}, {mean[f'{kind} half width']:.2f}" for kind in kinds]
        lines.append(f"| {model} | {level:g} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _grouped(known: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in known:
        if all(key in row for key in keys):
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    numbers = [key for key, value in rows[0].items() if isinstance(value, int | float)]
    return {key: sum(row[key] for row in rows) / len(rows) for key in numbers}


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, or a folder")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--n-examples", type=int, default=32)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", default="margin")
    parser.add_argument("--granularity", default="unit")
    parser.add_argument("--n-masks", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = json.loads(args.out.read_text()) if args.out.exists() else []
    model, batches = load(args.model, args.first, args.n_examples)
    components = coar.find_components(model, granularity=args.granularity)
    name = Path(args.model).name
    for seed in args.seeds:
        found = coar.attribute(
            model, batches, components, output=args.output, method=coar.PathGradient(args.rounds),
            ablated_fraction=args.fraction, seed=seed, progress=False,
        )  # fmt: skip
        known = [row for row in known if (row["model"], row["seed"]) != (name, seed)]
        for level in (0.8, 0.95):
            figures = coverage(found, model, batches, level)
            known.append({"model": name, "seed": seed, "level": level, **figures})
            logger.info("%s", known[-1])
        for row in by_size(found, model, batches, args.n_masks):
            known.append({"model": name, "seed": seed, "cost": found.provenance.cost, **row})
            logger.info("%s", known[-1])
        args.out.write_text(json.dumps(known, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(tables(known))


if __name__ == "__main__":
    main()
