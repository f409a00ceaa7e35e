"""What rivals make of the same processor time: every one on the same gates, judged on the same fresh sets.

    pip install captum
    python scripts/benchmark_rivals.py demo --seeds 10 11 12 13 14
    python scripts/benchmark_rivals.py vit --n-examples 8 --seeds 3 4 5 6 7
    python scripts/benchmark_rivals.py models/mobilenet --n-examples 4 --fraction 0.01 --seeds 0 1 2
    python scripts/benchmark_rivals.py models/gpt2 --n-examples 8 --seeds 0 1 2
    python scripts/benchmark_rivals.py models/smollm2 --granularity head --n-examples 4 --seeds 0 1 2

`demo` is the embedded model, `vit` a small one trained here in seconds; the others come from
`convert_benchmark_models.py` and `train_benchmark_models.py`. A seed
has examples, fits and judging sets of its own. First `attribute` runs as it does by default; what it took in processor
time (one thread) is what each rival may take: captum's GradientShap from 1 to random masks, integrated gradients to all
gates at 0 (as in EAP-IG) and to one minus twice the fraction, and regressions on as many masks as fit. Leave-one-out
and one gradient (attribution patching) take what they take. captum's FeatureAblation is leave-one-out.

Judged by the mean correlation within an example of predicted and measured outputs: over random masks of the fraction
and of a quarter of it, and over strong sets, of 1 to as many components as the fraction ablates, drawn from twice as
many that all methods together hold for the largest. Figures are added to `rivals.json`, of which `rivals.md` is made.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_forecasts import load
from captum.attr import GradientShap, IntegratedGradients
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import data
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import sampling
from hf_coar.runs.fidelity import correlation

logger = logging.getLogger("benchmark_rivals")

RESULTS = Path(__file__).parent / "results" / "rivals.json"
JUDGES = 70_000  # seeds of judging masks begin here; no fit uses them
N_STRONG = 30
MOST_ONE_BY_ONE = 3000  # components, for leave-one-out
MOST_REGRESSED = 20_000  # components; a ridge over more has nothing to go by in so few passes
OURS, ALONE = "hf_coar", "hf_coar, weights alone"

Predict = Callable[
    [Tensor], Tensor
]  # kept, bool [sets, components] or [sets, examples, components] -> [sets, examples]


@dataclass(frozen=True)
class Task:
    """One model with the examples of one seed."""

    model: nn.Module
    batches: Any
    components: coar.Components
    output: str
    fraction: float
    seed: int

    @property
    def batch(self) -> data.Batch:
        """All examples."""
        return data.as_batch(next(iter(self.batches)))

    def attribute(self, method: Any = "auto") -> coar.Attributions:
        """By a method of the package, through the ordinary call."""
        return coar.attribute(
            self.model, self.batches, self.components, output=self.output, method=method,
            ablated_fraction=self.fraction, seed=self.seed, progress=False,
        )  # fmt: skip

    def masks(self, purpose: int, seed: int, count: int, fraction: float) -> Tensor:
        """Random masks, bool [count, components]."""
        return sampling.Masks(len(self.components), fraction, count, seed, purpose).rows(0, count)


def gate_function(task: Task) -> Callable[..., Tensor]:
    """The output [examples] as a differentiable function of all gates, one tensor [examples, size] a group."""
    masked, output, batch = MaskedModel(task.model, task.components), outputs.get(task.output), task.batch

    def call(*gates: Tensor) -> Tensor:
        with masked.gated([part.contiguous() for part in gates]):
            return output.of(task.model, batch)

    return call


def gradient_shap(task: Task, seconds: float) -> tuple[Tensor, float]:
    """captum's GradientShap from random masks to everything in place, one draw after the other until time is up."""
    torch.manual_seed(task.seed)
    method, count = GradientShap(gate_function(task)), data.size(task.batch)
    sizes, end = task.components.sizes(), time.process_time() + seconds
    total, draws = torch.zeros(count, len(task.components)), 0
    while not draws or time.process_time() < end:
        masks = (torch.rand(count, len(task.components)) >= task.fraction).float()
        ones = tuple(torch.ones(count, size) for size in sizes)
        found = method.attribute(ones, baselines=masks.split(sizes, 1), n_samples=1)
        total += torch.cat([part.detach() for part in found], 1)
        draws += 1
    # A baseline has a component off with the fraction's chance, and only then says something of it.
    return total / draws / task.fraction, 3.0 * draws


def integrated(task: Task, to: float, steps: int) -> Tensor:
    """captum's integrated gradients along all gates at once, from 1 to `to`: weights [examples, components]."""
    count = data.size(task.batch)
    ones = tuple(torch.ones(count, size) for size in task.components.sizes())
    ends = tuple(torch.full_like(part, to) for part in ones)
    method = IntegratedGradients(gate_function(task))
    found = method.attribute(ones, baselines=ends, n_steps=steps, internal_batch_size=count)
    return torch.cat([part.detach() for part in found], 1) / (1 - to)


def integrated_gradients(to: float) -> Callable[[Task, float], tuple[Tensor, float]]:
    """`integrated` with as many steps as fit."""

    def run(task: Task, seconds: float) -> tuple[Tensor, float]:
        _, taken = timed(lambda: integrated(task, to, 2))
        steps = max(2, min(200, int(2 * seconds / taken)))  # more change nothing any more
        return integrated(task, to, steps), 3.0 * steps

    return run


def regression(solver: Any) -> Callable[[Task, float], tuple[Tensor, float]]:
    """As many masked passes as fit, and the fit."""

    def run(task: Task, seconds: float) -> tuple[Tensor, float]:
        few, more = (timed(lambda n=n: task.attribute(coar.Regression(n, coar.Ridge()).bare()))[1] for n in (10, 30))
        count = max(10, round(10 + 20 * (seconds - few) / max(more - few, 1e-3)))
        found = task.attribute(coar.Regression(count, solver).bare())
        return found.weights, found.provenance.cost

    return run


def by_method(method: Any) -> Callable[[Task, float], tuple[Tensor, float]]:
    """A baseline of the package, whatever it takes."""

    def run(task: Task, seconds: float) -> tuple[Tensor, float]:
        found = task.attribute(method)
        return found.weights, found.provenance.cost

    return run


def rivals(task: Task) -> dict[str, Callable[[Task, float], tuple[Tensor, float]]]:
    """Those that can be had for so many components."""
    found = {
        "captum GradientShap": gradient_shap,
        "captum integrated gradients, to 0": integrated_gradients(0.0),
        "captum integrated gradients, to 1 − 2a": integrated_gradients(1 - 2 * task.fraction),
        "one gradient (attribution patching)": by_method(coar.baselines.GradientTimesParameter()),
        "one pass of hf_coar": by_method(coar.PathGradient(rounds=0).bare()),
    }
    if len(task.components) <= MOST_REGRESSED:
        found["regression, ridge"] = regression(coar.Ridge())
    if len(task.components) <= MOST_ONE_BY_ONE:
        found["regression, ARD"] = regression(coar.ARD())
        found["leave one out (captum FeatureAblation)"] = by_method(coar.baselines.LeaveOneOut())
    return found


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the processor time it took, in seconds."""
    begun = time.process_time()
    return act(), time.process_time() - begun


def fits(task: Task) -> Iterator[tuple[str, Tensor, float, float, Predict]]:
    """Every method: name, weights [examples, components], cost, processor time, and how it predicts."""
    ours, seconds = timed(task.attribute)

    def linear(weights: Tensor) -> Predict:
        return lambda kept: (kept.float() * weights).sum(-1) if kept.dim() == 3 else kept.float() @ weights.T

    def forecast(kept: Tensor) -> Tensor:
        if kept.dim() == 3:  # every example has sets of its own
            return torch.stack([ours.predict(sets).diagonal() for sets in kept])
        return ours.predict(kept)

    yield OURS, ours.weights, ours.provenance.cost, seconds, forecast
    yield ALONE, ours.weights, ours.provenance.cost, seconds, linear(ours.weights)
    for name, rival in rivals(task).items():
        (weights, cost), taken = timed(lambda rival=rival: rival(task, seconds))
        yield name, weights, cost, taken, linear(weights)


def strong_sets(task: Task, weights: list[Tensor]) -> Tensor:
    """Sets an example, bool [N_STRONG, examples, components] of what is kept; no method's own choice is favoured."""
    pooled = sum(w.abs() / w.abs().mean(1, keepdim=True).clamp_min(1e-30) for w in weights)
    order = pooled.argsort(1, descending=True)
    generator = torch.Generator().manual_seed(JUDGES + task.seed)
    most = max(2, round(task.fraction * len(task.components)))
    kept = torch.ones(N_STRONG, *pooled.shape, dtype=torch.bool)
    for number in range(N_STRONG):
        size = max(1, round(math.exp(float(torch.rand(1, generator=generator)) * math.log(most))))
        for example in range(len(pooled)):
            chosen = torch.randperm(2 * size, generator=generator)[:size]
            kept[number, example, order[example, chosen]] = False
    return kept


@torch.no_grad()
def measured(task: Task, kept: Tensor) -> Tensor:
    """Outputs [sets, examples]; sets are of all examples or of each."""
    masked, output, batch = MaskedModel(task.model, task.components), outputs.get(task.output), task.batch
    found = []
    for one in kept:
        with masked.ablated(one, how="hooks"):
            found.append(output.of(task.model, batch))
    return torch.stack(found)


def rows_of(task: Task, name: str, n_masks: int) -> list[dict[str, Any]]:
    """All figures of one seed."""
    known = list(fits(task))
    seed, fraction = JUDGES + task.seed, task.fraction
    sets = {
        "at a": task.masks(sampling.EVALUATION, seed, n_masks, fraction),
        "at a/4": task.masks(sampling.EVALUATION, seed + 1000, n_masks, fraction / 4),
        "strong": strong_sets(task, [weights for method, weights, *_ in known if method != ALONE]),
    }
    truth = {what: measured(task, kept) for what, kept in sets.items()}
    rows = []
    for method, _, cost, seconds, predict in known:
        row = {"task": name, "components": len(task.components), "fraction": fraction, "seed": task.seed,
               "examples": data.size(task.batch), "method": method, "cost": cost, "seconds": seconds}  # fmt: skip
        for what, kept in sets.items():
            row[what] = float(correlation(predict(kept), truth[what]).nanmean())
        rows.append(row)
        logger.info("%s", row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured as Markdown: means over seeds, with the interval of the mean where there are three or more."""
    lines = [
        "# Rivals, given the same processor time",
        "",
        "Made by `scripts/benchmark_rivals.py`, one thread of a machine with two CPU cores. Mean over seeds (which "
        "have examples, fits and judging sets of their own) of the correlation of predicted and measured outputs "
        "within an example, ± half the 95 % interval of that mean; a: the ablated fraction. The best of each column "
        "is in bold face. `weights alone`: linear predictions, as the rivals have them.",
    ]
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == name]
        seeds = sorted({row["seed"] for row in own})
        first = own[0]
        lines += [
            "",
            f"## {name}: {first['components']:,} components, a = {first['fraction']:.3g}",
            "",
            f"{len(seeds)} seeds of {first['examples']} examples.",
            "",
            "| method | forward passes | processor time, s | at a | at a/4 | strong sets |",
            "|---|---|---|---|---|---|",
        ]
        grouped = {m: [row for row in own if row["method"] == m] for m in dict.fromkeys(row["method"] for row in own)}
        columns = ("at a", "at a/4", "strong")
        best = {what: max(_mean(found, what) for found in grouped.values()) for what in columns}
        for method, found in grouped.items():
            cells = []
            for what in columns:
                mean = _mean(found, what)
                text = f"{mean:.3f}"
                text = f"**{text}**" if mean > best[what] - 0.0005 else text
                cells.append(text + (f" ± {_half_width(found, what):.3f}" if len(found) >= 3 else ""))
            cost, seconds = _mean(found, "cost"), _mean(found, "seconds")
            lines.append(f"| {method} | {cost:.0f} | {seconds:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], what: str) -> float:
    return sum(row[what] for row in rows) / len(rows)


def _half_width(rows: list[dict[str, Any]], what: str) -> float:
    """Student's 95 % interval of the mean."""
    quantiles = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    values = torch.tensor([row[what] for row in rows])
    return float(values.std() / math.sqrt(len(values)) * quantiles.get(len(values), 2.2))


def main() -> None:
    """Measure, and write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="demo, or folders; none: the table anew")
    parser.add_argument("--n-examples", type=int, default=16)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--output", help="default: margin, of language models token_margin")
    parser.add_argument("--granularity", default="unit")
    parser.add_argument("--n-masks", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text()) if args.out.exists() else []
    for path in args.models:
        for seed in args.seeds:
            model, batches = load(path, seed * args.n_examples, args.n_examples)
            components = coar.find_components(model, granularity=args.granularity)
            text = "input_ids" in data.as_batch(next(iter(batches)))
            task = Task(model, batches, components, args.output or ("token_margin" if text else "margin"),
                        args.fraction, seed)  # fmt: skip
            name = f"{Path(path).name}, {args.granularity}s"
            known = [row for row in known if (row["task"], row["seed"]) != (name, seed)]
            known += rows_of(task, name, args.n_masks)
            args.out.write_text(json.dumps(known, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(known))
    args.out.with_suffix(".md").write_text(table(known))


if __name__ == "__main__":
    main()
