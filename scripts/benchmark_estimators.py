"""Cost against correlation of every estimator, side by side: the paper's procedure, ridge, the baselines, PathGradient.

    python scripts/benchmark_estimators.py conv vit gpt2 --models models --examples 32 --seeds 0 1 2

`conv` is the embedded demo model; `vit` and `gpt2` come from `scripts/train_benchmark_models.py` (in `--models`).
One unit of cost is one forward pass of one example. The evaluation masks (100 at the fraction, 100 at a quarter) are of
seeds that no fit uses, and nothing is chosen by them. *Least squares* is the paper's procedure: independent masks and
least squares with early stopping, the number of steps chosen on a tenth of the masks that is held out from the fit.

Everything measured is kept in `--cache` and not measured again. Writes `estimators.json`, `.md` and `.png` to `--out`.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import demo, evaluation, models, outputs, sampling
from hf_coar.measurement import measure
from hf_coar.store import Store

logger = logging.getLogger("benchmark_estimators")

N_EVALUATION_MASKS = 100
ROUNDS = (2, 4, 8)
MASKS_PER_COMPONENT = (0.5, 1, 2, 5)


@dataclass(frozen=True)
class Task:
    """A model, examples that no training saw, and what is attributed."""

    name: str
    model: nn.Module
    data: Any
    output: str
    ablated_fraction: float = 0.05


def task(name: str, folder: Path, n_examples: int) -> Task:
    """One of the benchmark's tasks."""
    if name == "conv":
        model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{n_examples}]", batch_size=n_examples)
        return Task(name, model, data, "margin")
    model = models.load_model(folder / name)
    examples = load_file(folder / name / "examples.safetensors")
    batch = {key: value[:n_examples] for key, value in examples.items()}
    return Task(name, model, [batch], "token_margin" if name == "gpt2" else "margin")


@dataclass(frozen=True)
class Judge:
    """Fresh masks and the model's outputs under them, at the fraction and a quarter of it."""

    measured: dict[float, tuple[Tensor, Tensor]]

    def figures(self, weights: Tensor) -> dict[str, float]:
        """Mean correlation at both fractions, and the slope of measured on predicted at the first."""
        found = {}
        for key, (kept, measured) in zip(("correlation", "quarter"), self.measured.values(), strict=True):
            predicted = kept.float() @ weights.T
            found[key] = float(evaluation.pearson(predicted, measured).nanmean())
            if key == "correlation":
                p, m = predicted - predicted.mean(0), measured - measured.mean(0)
                found["slope"] = float((p * m).sum() / p.square().sum().clamp_min(1e-30))
        return found


def measured_under(task: Task, components: coar.Components, masks: sampling.Masks, cache: Path) -> Tensor:
    """Outputs [masks, examples], measured once."""
    settings = {"task": task.name, "fraction": masks.ablated_fraction, "seed": masks.seed, "purpose": masks.purpose}
    folder = cache / f"{task.name}-{masks.ablated_fraction:g}-{masks.purpose}-{masks.seed}"
    store = Store(folder, {**settings, "model": models.fingerprint(task.model)})
    return measure(store, task.model, task.data, components, outputs.get(task.output), masks)[0]


def judge(task: Task, components: coar.Components, seed: int, cache: Path) -> Judge:
    """The evaluation of one seed; its masks are of seeds that no fit uses."""
    measured = {}
    for fraction in (task.ablated_fraction, task.ablated_fraction / 4):
        masks = sampling.Masks(len(components), fraction, N_EVALUATION_MASKS, 10_000 + seed, sampling.EVALUATION)
        measured[fraction] = (masks.rows(0, masks.count), measured_under(task, components, masks, cache))
    return Judge(measured)


def least_squares_with_early_stopping(masks: Tensor, outputs: Tensor) -> Tensor:
    """The paper's fit: gradient descent on the squared error, stopped where a held-out tenth of the masks says.

    In the eigenbasis of the Gram matrix, t steps of size η scale a direction of eigenvalue s by 1 - (1 - η s)^t.
    """
    n_held_out = max(10, len(masks) // 10)
    x, y = masks.double(), outputs.double()
    mean, centre = x[n_held_out:].mean(0), y[n_held_out:].mean(0)
    fit, held_out = x[n_held_out:] - mean, x[:n_held_out] - mean
    target, wanted = y[n_held_out:] - centre, y[:n_held_out] - centre
    primal = fit.shape[0] > fit.shape[1]
    values, vectors = torch.linalg.eigh(fit.T @ fit if primal else fit @ fit.T)
    keep = values > values.max() * 1e-10
    values, vectors = values[keep], vectors[:, keep]
    right = vectors if primal else fit.T @ vectors / values.sqrt()
    projected = right.T @ (fit.T @ target) / values[:, None]
    best = torch.full((y.shape[1],), math.inf, dtype=torch.float64)
    weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for exponent in range(0, 60):
        steps = 1.4**exponent
        candidate = right @ ((1 - (1 - values / values.max()).pow(steps))[:, None] * projected)
        error = (held_out @ candidate - wanted).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        weights = torch.where(better, candidate, weights)
    return weights.T.float()


def regressions(task: Task, components: coar.Components, seed: int, cache: Path) -> Iterator[tuple[str, float, Tensor]]:
    """(method, cost, weights) of every fit on random masks; smaller numbers of masks are the first of the larger."""
    n = len(components)
    largest = round(max(MASKS_PER_COMPONENT) * n)
    masks = sampling.Masks(n, task.ablated_fraction, largest, seed, sampling.MASKS)
    measured = measured_under(task, components, masks, cache)
    kept = torch.cat([masks.rows(i, min(i + 1024, largest)) for i in range(0, largest, 1024)])
    for multiple in MASKS_PER_COMPONENT:
        m = round(multiple * n)
        yield "least squares", m, least_squares_with_early_stopping(kept[:m], measured[:m])
        yield "ridge", m, coar.Ridge().fit(kept[:m], measured[:m])[0]


def paths(task: Task, components: coar.Components, seed: int, cache: Path) -> Iterator[tuple[str, float, Tensor]]:
    """(method, cost, weights) of PathGradient, in full and in its plain form."""
    for rounds in ROUNDS:
        for name, options in (("path gradient", {}), ("path gradient, plain", {"delta": False, "shrink": False})):
            method = coar.PathGradient(rounds=rounds, **options)
            folder = cache / f"{task.name}-{name.replace(', ', '-').replace(' ', '-')}-{rounds}-{seed}"
            attributions = coar.attribute(
                task.model, task.data, components, output=task.output, method=method,
                ablated_fraction=task.ablated_fraction, seed=seed, out=folder,
            )  # fmt: skip
            yield name, attributions.config["cost"], attributions.weights


def cost_to_reach(points: list[tuple[float, float]], level: float) -> float | None:
    """The least cost at which a method has a correlation, between its points by the logarithm of the cost."""
    points = sorted(points)
    if points[0][1] >= level:
        return points[0][0]
    for (cost_a, a), (cost_b, b) in pairwise(points):
        if a < level <= b:
            return math.exp(math.log(cost_a) + (level - a) / (b - a) * (math.log(cost_b) - math.log(cost_a)))
    return None


def rows_of(task: Task, seed: int, cache: Path) -> list[dict[str, Any]]:
    """All figures of one task and seed."""
    components = coar.find_components(task.model)
    judging = judge(task, components, seed, cache)
    rows = []
    for source in (paths, regressions):
        for method, cost, weights in source(task, components, seed, cache):
            row = {"task": task.name, "n_components": len(components), "seed": seed, "method": method, "cost": cost}
            rows.append(row | judging.figures(weights))
            logger.info("%s", rows[-1])
    return rows


def mean_over_seeds(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[float, float, float, float]]]:
    """(task, method) -> [(cost, correlation, at a quarter of the fraction, slope)], means over the seeds."""
    grouped: dict[tuple[str, str, float], list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["task"], row["method"], row["cost"]), []).append(row)
    table: dict[tuple[str, str], list] = {}
    for (name, method, cost), found in sorted(grouped.items()):
        means = [sum(row[key] for row in found) / len(found) for key in ("correlation", "quarter", "slope")]
        table.setdefault((name, method), []).append((cost, *means))
    return table


def markdown(rows: list[dict[str, Any]], n_examples: int) -> str:
    """The table, and the factors against least squares at five masks a component."""
    table = mean_over_seeds(rows)
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# Estimators: cost against correlation",
        "",
        f"`python scripts/benchmark_estimators.py`, {n_examples} examples a task, mean over seeds {seeds}, on two CPU "
        "cores. Cost: forward passes an example, a forward and backward pass counted as three.",
        "",
        "| task (components) | method | cost | correlation | at a quarter of the fraction | slope |",
        "|---|---|---|---|---|---|",
    ]
    sizes = {row["task"]: row["n_components"] for row in rows}
    for (name, method), points in table.items():
        lines += [
            f"| {name} ({sizes[name]}) | {method} | {c:g} | {r:.3f} | {q:.3f} | {s:.2f} |" for c, r, q, s in points
        ]
    lines += [
        "",
        "| task | least squares at 5 masks a component | reached by path gradient at cost | factor |",
        "|---|---|---|---|",
    ]
    for name in sizes:
        for column, where in ((1, "at the fraction"), (2, "at a quarter of it")):
            reference = max(table[name, "least squares"])
            level = reference[column]
            cost = cost_to_reach([(point[0], point[column]) for point in table[name, "path gradient"]], level)
            most = max(table[name, "path gradient"])
            reached = f"{cost:.0f}" if cost else f"not reached ({most[column]:.3f} at {most[0]:g})"
            factor = f"{reference[0] / cost:.0f} ×" if cost else "–"
            lines.append(f"| {name}, {where} | {level:.3f} at cost {reference[0]:g} | {reached} | {factor} |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Cost against correlation, a panel a task."""
    from matplotlib.figure import Figure

    table = mean_over_seeds(rows)
    names = list(dict.fromkeys(row["task"] for row in rows))
    styles = {
        "path gradient": ("#0072B2", "o", "-"), "path gradient, plain": ("#56B4E9", "s", "--"),
        "ridge": ("#E69F00", "^", "--"), "least squares": ("#D55E00", "D", "-"),
    }  # fmt: skip
    drawing = Figure(figsize=(3.6 * len(names), 3.6), dpi=150, layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        for method, (colour, marker, line) in styles.items():
            points = table.get((name, method), [])
            axes.plot([p[0] for p in points], [p[1] for p in points], line, color=colour, marker=marker, label=method)
        axes.set(xscale="log", xlabel="cost (forward passes an example)", title=name)
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("mean correlation on fresh masks")
    drawing.axes[-1].legend(fontsize=8, loc="lower left")
    drawing.savefig(path)


def main() -> None:
    """Run the tasks, write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=("conv", "vit", "gpt2"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name in args.tasks:
        current = task(name, args.models, args.examples)
        for seed in args.seeds:
            rows += rows_of(current, seed, args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "estimators.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "estimators.md").write_text(markdown(rows, args.examples))
    figure(rows, args.out / "estimators.png")


if __name__ == "__main__":
    main()
