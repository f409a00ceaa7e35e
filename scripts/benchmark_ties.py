"""Ties: in how many examples reads differ between a model's own code and its graph, fused, in bfloat16.

    python scripts/benchmark_ties.py --write

A margin takes the largest other logit. Where two are equal up to rounding, its gradient goes to one or the other, so
that what is the same up to rounding reads something else there; a log-probability has no such ties. This is what
`models.launched` allows for: reads may differ in 1 of 16 examples, outputs never. A ViT of two blocks and 1,000 classes
with random weights, a batch of noise, one gate pass both ways.

    off          examples whose reads differ by more than a twentieth of the largest read of the batch
    of those     the largest difference, over the largest read
    the others   the same of all other examples
"""

import argparse
from pathlib import Path

import tables
import timm
import torch
from torch import Tensor

import hf_coar as coar
from hf_coar.estimators.gates import GatePasses
from hf_coar.masking import MaskedModel
from hf_coar.models import graphs, outputs
from hf_coar.runs.engine import autocast

RESULTS = Path(__file__).parent / "results" / "ties.md"
OFF = 0.05  # of the largest read, from which an example counts
HEADER = ("| output | seed | device | off | of those | the others |", "|:--|:--|:--|--:|--:|--:|")


def main() -> None:
    """Run and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}")
    args = parser.parse_args()
    rows = [row(args, output, seed) for output in ("margin", "log_prob") for seed in args.seeds]
    print(*HEADER, *rows, sep="\n")
    if args.write:
        title, command, *notes = __doc__.strip().split("\n\n")
        tables.write(RESULTS, title, command.strip(), HEADER, rows, notes)


def row(args: argparse.Namespace, output: str, seed: int) -> str:
    """One batch both ways."""
    difference = differences(args, output, seed)
    off = difference > OFF
    worst = [f"{float(some.max()):.3f}" if len(some) else "–" for some in (difference[off], difference[~off])]
    return f"| {output} | {seed} | {args.device} | {int(off.sum())} of {len(off)} | {' | '.join(worst)} |"


def differences(args: argparse.Namespace, output: str, seed: int) -> Tensor:
    """By how much the reads of each example differ, over the largest read of the batch, [examples]."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval().requires_grad_(False)
    batch = {"x": torch.randn(args.examples, 3, 64, 64), "labels": torch.arange(args.examples)}
    components = coar.find_components(model)
    gates = torch.rand(args.examples, len(components)) * 0.2 + 0.8
    masked = MaskedModel(model.to(args.device), components)
    passes, names = GatePasses(masked, outputs.get(output), delta=True), list(batch)
    inputs = [one.to(args.device) for one in (*batch.values(), gates, torch.tensor(0.5, dtype=torch.float64))]

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return passes._run(dict(zip(names, inputs, strict=False)), *inputs[-2:])

    with coar.running(dtype="bfloat16"), autocast(torch.device(args.device), "bfloat16"):
        own = run(*inputs)[1]
        graph = graphs.compiled(graphs.captured(run, inputs, model), inputs, True, 0)
        fused = graphs.replay(graph, inputs)(*inputs)[1]
    return ((fused - own).abs().amax(1) / own.abs().max()).cpu()


if __name__ == "__main__":
    main()
