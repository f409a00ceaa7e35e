"""What interactions of a component with whole modules would add to forecasts: read off the passes that were run anyway.

    python scripts/benchmark_layer_pairs.py demo --seeds 30 31 32 33
    python scripts/benchmark_layer_pairs.py vit --seeds 5 6 7 8
    python scripts/benchmark_layer_pairs.py models/gpt2 --n-examples 8 --output token_margin --seeds 7 8 9 10

Every gate pass reads all components in another context. Of every example, ridge regression of what is read of a
component on how much each module has lost in that pass, by the weights, says how its effect depends on the module;
coefficients are shrunk by how much of a component's reads they explain. A forecast of an ablated set S then falls by
the sum over i in S and modules m of c(i, m) · (z(m, S) / 2 - mean of z(m)), z(m, S) being what S ablates of m. Strength
and shrinkage were set on seeds 20 and 21 of the demo, 3 and 4 of the ViT, 5 and 6 of GPT-2; "in hindsight" is the best
of several strengths without shrinkage, by the very masks that judge. The package does without: see the table.
"""

import argparse
import math
from pathlib import Path
from unittest import mock

import tables
import torch
from benchmark_forecasts import MASK_SEED, load
from torch import Tensor

import hf_coar as coar
from hf_coar.attributions import Attributions
from hf_coar.estimators.gates import GatePasses
from hf_coar.runs import fidelity, sampling

RESULTS = Path(__file__).parent / "results" / "layer_pairs.md"
STRENGTH = 1.0  # of the ridge, as a multiple of the number of passes
HINDSIGHT = (0.3, 1.0, 3.0, 10.0)
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, by seeds


def attributed(model: torch.nn.Module, batches: object, output: str, seed: int) -> tuple[Attributions, Tensor, Tensor]:
    """Attributions, and gates and reads of all passes with gates of their own, [passes, examples, components]."""
    passes: list[tuple[Tensor, Tensor]] = []
    run = GatePasses.__call__

    def noted(self: GatePasses, batch: dict, gates: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        values, reads = run(self, batch, gates, smoothing)
        if float(gates.std()) > 0:
            passes.append((gates.double(), reads.detach().double()))
        return values, reads

    with mock.patch.object(GatePasses, "__call__", noted):
        found = coar.attribute(
            model, batches, output=output, method=coar.PathGradient(), ablated_fraction=0.05, seed=seed, progress=False
        )
    whole = [both for both in passes if len(both[0]) == len(found)]  # a look before the run may take fewer examples
    return found, *(torch.stack(side) for side in zip(*whole, strict=True))


def coefficients(lost: Tensor, reads: Tensor, strength: float, shrink: bool) -> Tensor:
    """How what is read of each component depends on the modules, [modules, components], for one example.

    Args:
        lost: [passes, modules], by the weights.
        reads: [passes, components].
        strength: of the ridge.
        shrink: each component's by the share of its reads that they explain.
    """
    spread = lost.std(0).clamp_min(1e-9)
    inputs, targets = (lost - lost.mean(0)) / spread, reads - reads.mean(0)
    pull = strength * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(inputs.T @ inputs + pull, inputs.T @ targets)
    if shrink:
        fitted = inputs @ found
        explained, left = fitted.square().sum(0), (targets - fitted).square().sum(0)
        found = found * explained / (explained + left * inputs.shape[1] / len(inputs)).clamp_min(1e-12)
    return found / spread[:, None]


def corrected(found: Attributions, gates: Tensor, reads: Tensor, kept: Tensor, strength: float, shrink: bool) -> Tensor:
    """Forecasts for masks [masks, components] with those interactions, float64 [masks, examples]."""
    predicted, gone = found.predict(kept).double(), 1 - kept.double()
    modules = torch.repeat_interleave(
        torch.eye(len(found.components.groups)), torch.tensor(found.components.sizes()), 0
    )
    for example, weights in enumerate(found.weights.double()):
        by_module = modules * weights[:, None]
        lost = (1 - gates[:, example]) @ by_module
        change = gone @ coefficients(lost, reads[:, example], strength, shrink).T
        predicted[:, example] -= (change * (gone @ by_module / 2 - lost.mean(0))).sum(1)
    return predicted


def row(args: argparse.Namespace) -> str:
    """One model: means over seeds, with half the 95 % interval of the differences."""
    figures: list[list[float]] = []
    for seed in args.seeds:
        model, batches = load(args.model, seed * args.n_examples, args.n_examples)
        found, gates, reads = attributed(model, batches, args.output, seed)
        fractions = (0.05, 0.0125)
        report = coar.evaluate(
            found, model, batches, fractions=fractions, n_masks=args.n_masks, seed=MASK_SEED, progress=False
        )
        figures.append([])
        for fraction in fractions:
            kept = sampling.Masks(len(found.components), fraction, args.n_masks, MASK_SEED, sampling.EVALUATION)
            masks, measured = kept.rows(0, args.n_masks), report.measured[fraction]

            def judged(predicted: Tensor, measured: Tensor = measured) -> float:
                return float(fidelity.correlation(predicted.float(), measured.float()).nanmean())

            plain = judged(report.predicted[fraction])
            shrunk = judged(corrected(found, gates, reads, masks, STRENGTH, shrink=True)) - plain
            best = max(judged(corrected(found, gates, reads, masks, one, shrink=False)) for one in HINDSIGHT) - plain
            figures[-1] += [plain, shrunk, best]
        print(args.model, seed, [round(one, 4) for one in figures[-1]], flush=True)
    values = torch.tensor(figures)
    half = values.std(0) / math.sqrt(len(values)) * QUANTILES[len(values)]
    cells = [f"{float(values[:, i].mean()):.3f}" if i % 3 == 0 else f"{float(values[:, i].mean()):+.4f} ± {half[i]:.4f}"
             for i in range(6)]  # fmt: skip
    name = f"{Path(args.model).name}, {len(found.components):,} components"
    return f"| {name} | {len(values)} × {args.n_examples} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, vit, or a folder")
    parser.add_argument("--n-examples", type=int, default=16)
    parser.add_argument("--output", default="margin")
    parser.add_argument("--n-masks", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32, 33], help="two to five")
    args = parser.parse_args()
    torch.set_num_threads(1)
    at = "with pairs | in hindsight"
    header = [f"| model | seeds × examples | at 5 % | {at} | at 1.25 % | {at} |", "|:-|---|---|---|---|---|---|---|"]
    notes = ["Default attributions at 5 % ablated: correlation of forecasts with what 200 fresh masks do, and the "
             "change by interactions component × module, ± half the 95 % interval over seeds. They would have to be "
             "kept: as many numbers as weights, times the modules. Two CPU cores."]  # fmt: skip
    tables.write(RESULTS, "Interactions of components with modules", "python scripts/benchmark_layer_pairs.py MODEL",
                 header, [row(args)], notes)  # fmt: skip


if __name__ == "__main__":
    main()
