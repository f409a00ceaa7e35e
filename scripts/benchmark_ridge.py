"""Ridge with its leave-one-out strengths against scikit-learn's `Ridge(solver="cholesky")` with one given strength.

Both sides get the same masks (scikit-learn as floats, converted beforehand) and outputs, and take turns.

    python scripts/benchmark_ridge.py --n-components 23000 --n-masks 8000 --n-examples 256
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import Ridge as Reference
from threadpoolctl import threadpool_limits

from hf_coar.estimators.solvers import Ridge
from hf_coar.runs.sampling import MASKS, Masks


def main() -> None:
    """Time both sides and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-components", type=int, default=23000)
    parser.add_argument("--n-masks", type=int, default=8000)
    parser.add_argument("--n-examples", type=int, default=256)
    parser.add_argument("--ablated-fraction", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference-dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)
    masks, outputs, weights = problem(args)
    features = masks.numpy().astype(args.reference_dtype)
    targets = outputs.numpy().astype(args.reference_dtype)
    strength = 0.25 * args.ablated_fraction * (1 - args.ablated_fraction) * max(masks.shape)
    reference = Reference(alpha=strength, solver="cholesky")
    ours, theirs = [], []
    for repeat in range(args.repeats):
        seconds, (fitted, _) = timed(lambda: Ridge().fit(masks, outputs))
        ours.append(seconds)
        seconds, _ = timed(lambda: reference.fit(features, targets))
        theirs.append(seconds)
        found = agree(fitted, weights), agree(torch.from_numpy(reference.coef_), weights)
        print(
            f"round {repeat}: ours {ours[-1]:.1f} s, theirs {theirs[-1]:.1f} s, ratio {theirs[-1] / ours[-1]:.2f}; "
            f"correlation with the planted weights {found[0]:.4f} and {found[1]:.4f}",
            flush=True,
        )
    ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
    print(f"median ratio {ratio:.2f} (above 1: ours is faster), reference in {args.reference_dtype}")


def problem(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, noisy outputs and the weights behind them."""
    source = Masks(args.n_components, args.ablated_fraction, args.n_masks, 0, MASKS)
    masks = torch.cat([source.rows(i, min(i + 1024, args.n_masks)) for i in range(0, args.n_masks, 1024)])
    generator = torch.Generator().manual_seed(0)
    relevance = torch.randn(args.n_components, generator=generator).exp()
    weights = torch.randn(args.n_examples, args.n_components, generator=generator) * relevance
    outputs = torch.cat([chunk.float() @ weights.T for chunk in masks.split(1024)])
    noise = torch.randn(outputs.shape, generator=generator) * outputs.std(0)
    return masks, outputs + 0.5 * noise, weights


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of wall time, and the result."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def agree(fitted: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean correlation over the examples."""
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(fitted.numpy(), weights.numpy(), strict=True)]))


if __name__ == "__main__":
    main()
