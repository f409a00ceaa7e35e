"""Cost against correlation, side by side: the paper's procedure, ridge, ARD, the baselines, PathGradient.

    python scripts/benchmark_estimators.py conv conv10 vit gpt2 --models models --seeds 0 1 2
    python scripts/benchmark_estimators.py mobilenet smollm2-a smollm2-b --models models --seeds 0 --most-masks 0

`conv` is the embedded demo model, ablated by 5 %, and `conv10` by the paper's 10 %; `vit` and `gpt2` come from
`scripts/train_benchmark_models.py` (in `--models`), `mobilenet` (on photographs) and `smollm2` (two disjoint sets of 16
sequences of 32 tokens) from `scripts/convert_benchmark_models.py`. One unit of cost is one forward pass of one example.
The evaluation masks are of seeds that no fit uses, and nothing is chosen by them. *Least squares* is the paper's
procedure: independent masks and least squares with early stopping, the number of steps chosen on a tenth of the masks
that is held out from the fit. Where five masks a component cannot be afforded, as many as `--most-masks` are taken.

Everything measured is kept in `--cache` and not measured again, and tasks can be run one by one: figures are added to
`estimators.json` in `--out`, of which `estimators.md` and `estimators.png` are made.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import data, demo, models, plots
from hf_coar.estimators import ESTIMATORS, live, outliers
from hf_coar.estimators.gates import GatePasses
from hf_coar.estimators.registry import FORWARD_AND_BACKWARD
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import sampling
from hf_coar.runs.fidelity import correlation
from hf_coar.runs.problem import Problem
from hf_coar.runs.store import Store

logger = logging.getLogger("benchmark_estimators")

ROUNDS = (0, 2, 4, 8)
MASKS_PER_COMPONENT = (0.5, 1, 2, 5)
MOST_COMPONENTS_ONE_BY_ONE = 5000  # for leave-one-out


@dataclass(frozen=True)
class Task:
    """A model, examples that no training saw, and what is attributed."""

    name: str
    model: nn.Module
    data: Any
    output: str
    ablated_fraction: float = 0.05
    n_evaluation_masks: int = 100
    rounds: tuple[int, ...] = ROUNDS


def task(name: str, folder: Path, n_examples: int) -> Task:
    """One of the benchmark's tasks."""
    if name.startswith("conv"):
        model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{n_examples}]", batch_size=n_examples)
        return Task(name, model, data, "margin", 0.1 if name == "conv10" else 0.05, rounds=(*ROUNDS, 16))
    folder = folder / name.partition("-")[0]
    model, examples = models.load_model(folder), load_file(folder / "examples.safetensors")
    if name.startswith("smollm2"):
        first = 16 * (name == "smollm2-b")
        batch = {"input_ids": examples["input_ids"][first : first + 16]}
        return Task(name, model, [batch], "token_margin", 0.025, 300, (0, 2, 4))
    batch = {key: value[:n_examples] for key, value in examples.items()}
    rounds = (0, 2, 4) if name == "mobilenet" else ROUNDS
    return Task(name, model, [batch], "token_margin" if name == "gpt2" else "margin", rounds=rounds)


@dataclass(frozen=True)
class Judge:
    """Fresh masks and the model's outputs under them, at the fraction and a quarter of it."""

    measured: dict[float, tuple[Tensor, Tensor]]
    outliers: Tensor  # int64 [any], components that are an outlier of some example

    def figures(self, weights: Tensor) -> dict[str, float]:
        """Mean correlation at both fractions; at the first also the slope of measured on predicted, and the mean
        correlation over the masks that touch no outlier of any example (if any do)."""
        found = {}
        for key, (kept, measured) in zip(("correlation", "quarter"), self.measured.values(), strict=False):
            predicted = kept.float() @ weights.T
            found[key] = float(correlation(predicted, measured).nanmean())
            if key == "correlation":
                p, m = predicted - predicted.mean(0), measured - measured.mean(0)
                found["slope"] = float((p * m).sum() / p.square().sum().clamp_min(1e-30))
                untouched = kept[:, self.outliers].all(1)
                if not untouched.all():
                    found["without outliers"] = float(correlation(predicted[untouched], measured[untouched]).nanmean())
        return found


def measured_under(task: Task, components: coar.Components, masks: sampling.Masks, cache: Path) -> Tensor:
    """Outputs [masks, examples], measured once."""
    settings = {"task": task.name, "fraction": masks.ablated_fraction, "seed": masks.seed, "purpose": masks.purpose}
    folder = cache / f"{task.name}-{masks.ablated_fraction:g}-{masks.purpose}-{masks.seed}"
    store = Store(folder, {**settings, "model": models.fingerprint(task.model)})
    masked, output = MaskedModel(task.model, components), outputs.get(task.output)
    return Problem(masked, task.data, output, masks.ablated_fraction, masks.seed, store).measure(masks)


def judge(task: Task, components: coar.Components, seed: int, cache: Path) -> Judge:
    """The evaluation of one seed; its masks are of seeds that no fit uses."""
    measured = {}
    # A quarter of 2.5 % would be another hour for a language model.
    fractions = (task.ablated_fraction, task.ablated_fraction / 4)[: 1 if task.name.startswith("smollm2") else 2]
    for fraction in fractions:
        masks = sampling.Masks(len(components), fraction, task.n_evaluation_masks, 10_000 + seed, sampling.EVALUATION)
        measured[fraction] = (masks.rows(0, masks.count), measured_under(task, components, masks, cache))
    return Judge(measured, outliers_of(task, components))


def outliers_of(task: Task, components: coar.Components) -> Tensor:
    """Components that are an outlier of at least one example."""
    batch = data.as_batch(next(iter(task.data)))
    with models.frozen(task.model):
        found = outliers.find(
            GatePasses(MaskedModel(task.model, components), outputs.get(task.output)), batch, 16
        ).indices
    return found[found >= 0].unique()


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


Fits = Iterator[tuple[str, float, Tensor]]  # method, cost, weights


def regressions(task: Task, components: coar.Components, seed: int, cache: Path, most: int) -> Fits:
    """Every fit on random masks; smaller numbers of masks are the first of the larger."""
    n = len(components)
    numbers = sorted({min(round(multiple * n), most) for multiple in MASKS_PER_COMPONENT})
    if not most:
        return
    masks = sampling.Masks(n, task.ablated_fraction, numbers[-1], seed, sampling.MASKS)
    measured = measured_under(task, components, masks, cache)
    kept = torch.cat([masks.rows(i, min(i + 1024, masks.count)) for i in range(0, masks.count, 1024)])
    for m in numbers:
        yield "least squares (paper)", m, least_squares_with_early_stopping(kept[:m], measured[:m])
        yield "ridge", m, coar.Ridge().fit(kept[:m], measured[:m])[0]
        if m <= 2 * n:  # beyond, it takes longer than the passes
            yield "ARD", m, coar.ARD().fit(kept[:m], measured[:m])[0]


def paths(task: Task, components: coar.Components, seed: int, cache: Path) -> Fits:
    """PathGradient round by round, which are the weights of `PathGradient(rounds=…)`; and without some of its parts."""
    file = cache / f"{task.name}-live-{seed}.safetensors"
    if not file.exists():
        found = {}
        batch = data.as_batch(next(iter(task.data)))
        rounds = live.rounds(task.model, batch, components, task.output, task.ablated_fraction, seed, max(task.rounds))
        for known in rounds:
            if known.rounds in task.rounds:
                found[f"{known.cost:g}"] = known.weights.contiguous()
                save_file(found, f"{file}.partial")
        Path(f"{file}.partial").rename(file)
    for cost, weights in load_file(file).items():
        # Live rounds begin with a single pass, which the method itself does without.
        single = FORWARD_AND_BACKWARD if float(cost) > FORWARD_AND_BACKWARD else 0.0
        yield "path gradient", float(cost) - single, weights
    if len(components) <= MOST_COMPONENTS_ONE_BY_ONE:
        plain = coar.PathGradient(rounds=4, delta=False, shrink=False, max_outliers=0)
        yield from attributed(task, components, seed, cache, "path gradient, plain", plain)
        unsmoothed = coar.PathGradient(rounds=4, smooth=False)
        yield from attributed(task, components, seed, cache, "path gradient, slopes not smoothed", unsmoothed)


def references(task: Task, components: coar.Components, seed: int, cache: Path) -> Fits:
    """The baselines."""
    for name, method in ESTIMATORS.items():
        if method.__module__ != coar.baselines.__name__:
            continue
        if name != "leave_one_out" or len(components) <= MOST_COMPONENTS_ONE_BY_ONE:
            yield from attributed(task, components, seed, cache, name.replace("_", " "), method())


def attributed(task: Task, components: coar.Components, seed: int, cache: Path, name: str, method: Any) -> Fits:
    """One method, through the ordinary `attribute`."""
    folder = cache / f"{task.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    found = coar.attribute(
        task.model, task.data, components, output=task.output, method=method.bare(),  # the weights alone are judged
        ablated_fraction=task.ablated_fraction, seed=seed, out=folder, progress=False,
    )  # fmt: skip
    yield name, found.config["cost"], found.weights


def rows_of(task: Task, seed: int, cache: Path, most_masks: int) -> list[dict[str, Any]]:
    """All figures of one task and seed."""
    components = coar.find_components(task.model)
    judging = judge(task, components, seed, cache)
    rows = []
    small = len(components) <= MOST_COMPONENTS_ONE_BY_ONE
    sources = [paths(task, components, seed, cache), regressions(task, components, seed, cache, most_masks)]
    # Most of the baselines draw nothing; one seed tells.
    sources += [references(task, components, seed, cache)] if small and seed == 0 else []
    for source in sources:
        for method, cost, weights in source:
            row = {"task": task.name, "n_components": len(components), "seed": seed, "method": method, "cost": cost}
            rows.append(row | judging.figures(weights))
            logger.info("%s", rows[-1])
    return rows


FIGURES = ("correlation", "quarter", "slope", "without outliers")
Points = list[tuple[float, dict[str, float]]]  # (cost, figures)


def mean_over_seeds(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Points]:
    """(task, method) -> points, means over the seeds."""
    grouped: dict[tuple[str, str, int], list[dict]] = {}
    for row in rows:
        # Seeds may differ by an outlier or two in what a run cost.
        grouped.setdefault((row["task"], row["method"], round(row["cost"])), []).append(row)
    table: dict[tuple[str, str], Points] = {}
    for (name, method, cost), found in sorted(grouped.items()):
        means = {key: sum(row[key] for row in found) / len(found) for key in FIGURES if key in found[0]}
        table.setdefault((name, method), []).append((cost, means))
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and the factors against least squares at its largest number of masks."""
    table = mean_over_seeds(rows)
    sizes = {row["task"]: row["n_components"] for row in rows}
    seeds = {name: len({row["seed"] for row in rows if row["task"] == name}) for name in sizes}
    lines = [
        "# Estimators: cost against correlation",
        "",
        "`python scripts/benchmark_estimators.py`, means over examples and seeds, on two CPU cores. Cost: forward "
        "passes an example, a forward and backward pass counted as three. `without outliers`: over the masks that "
        "touch none.",
        "",
        "| task (components, seeds) | method | cost | correlation | at a quarter of the fraction | slope | "
        "without outliers |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, method), points in table.items():
        for cost, means in points:
            cells = [
                f"{means[key]:.2f}" if key == "slope" else f"{means[key]:.3f}" if key in means else ""
                for key in FIGURES
            ]
            lines.append(f"| {name} ({sizes[name]:,}, {seeds[name]}) | {method} | {cost:g} | {' | '.join(cells)} |")
    lines += [
        "",
        "| task | least squares | reached by path gradient at cost | factor |",
        "|---|---|---|---|",
    ]
    for name in sizes:
        if (name, "least squares (paper)") not in table:
            continue
        for key, where in (("correlation", "at the fraction"), ("quarter", "at a quarter of it")):
            cost, means = max(table[name, "least squares (paper)"], key=lambda point: point[0])
            if key not in means:
                continue
            curve = [(spent, known[key]) for spent, known in table[name, "path gradient"]]
            needed, most = plots.cost_to_reach(curve, means[key]), max(curve)
            reached = f"{needed:.0f}" if needed else f"not reached ({most[1]:.3f} at {most[0]:g})"
            factor = f"{cost / needed:.0f} ×" if needed else "–"
            masks = f"{cost / sizes[name]:.2g} masks a component"
            lines.append(f"| {name}, {where} | {means[key]:.3f} at cost {cost:g} ({masks}) | {reached} | {factor} |")
    return "\n".join(lines) + "\n"


TITLES = {"conv": "ResNet (5 %)", "conv10": "ResNet (10 %)", "vit": "ViT (5 %)", "gpt2": "GPT-2 (5 %)"}


def figure(rows: list[dict[str, Any]]) -> Any:
    """Cost against correlation, a panel a task of which least squares had enough masks."""
    shown = ("path gradient", "ARD", "ridge", "least squares (paper)", "leave one out", "gradient times parameter")
    panels: dict[str, dict[str, list]] = {}
    for (name, method), points in mean_over_seeds(rows).items():
        if method in shown and name in TITLES:
            panels.setdefault(name, {})[method] = [(cost, means["correlation"]) for cost, means in points]
    ordered = {
        title: {m: panels[name][m] for m in shown if m in panels[name]}
        for name, title in TITLES.items()
        if name in panels
    }
    n_seeds = len({row["seed"] for row in rows})
    return plots.cost_against_correlation(ordered, "least squares (paper)", detail=f"{n_seeds} seeds, 32 examples each")


def main() -> None:
    """Run the tasks, write table and figure."""
    names = ("conv", "conv10", "vit", "gpt2", "mobilenet", "smollm2-a", "smollm2-b")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(names)}; none: table and figure anew")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most-masks", type=int, default=20_000, help="0: no regressions")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    args = parser.parse_args()
    if unknown := sorted(set(args.tasks) - set(names)):
        parser.error(f"no task {', '.join(unknown)}; there are {', '.join(names)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "estimators.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for name in args.tasks:
        current = task(name, args.models, args.examples)
        for seed in args.seeds:
            found = rows_of(current, seed, args.cache, args.most_masks)
            rows = [row for row in rows if (row["task"], row["seed"]) != (name, seed)] + found
            rows.sort(key=lambda row: (names.index(row["task"]), row["seed"]))
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "estimators.md").write_text(markdown(rows))
    plots.save(figure(rows), args.out / "estimators.png")


if __name__ == "__main__":
    main()
