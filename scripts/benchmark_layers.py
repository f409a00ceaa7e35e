"""Networks of many small layers: what every group of components costs, however small.

    python scripts/benchmark_engine.py --layers

Default gate passes of 32 examples over plain forward and backward passes to the one input, alternating, in processor
time of one thread, the quickest of each. With a nonlinearity behind every layer most of it are the operations of its
smoothed slope and exact differences, some forty of 3,200 numbers each.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tables
import torch
from torch import nn

import hf_coar as coar
from hf_coar import models
from hf_coar.estimators.gates import GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import captured, heap
from hf_coar.runs.running import running

NETWORKS = {
    "200 × (Linear(100), ReLU)": lambda: nn.Sequential(
        *[layer for _ in range(200) for layer in (nn.Linear(100, 100), nn.ReLU())]
    ),
    "200 × Linear(100)": lambda: nn.Sequential(*[nn.Linear(100, 100) for _ in range(200)]),
}


def compare(name: str, repeats: int) -> str:
    """A row of the table of small layers."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    batch = {"inputs": torch.randn(32, 100), "labels": torch.arange(32)}
    components, output = coar.find_components(model), outputs.get("margin")
    leaf = batch["inputs"].clone().requires_grad_()

    def plain() -> None:
        values = output(models.logits(model, {"inputs": leaf}), batch)
        torch.autograd.grad(values.sum(), leaf)

    seconds = quickest(MaskedModel(model, components), output, batch, plain, repeats)
    return row(name, len(components), seconds, limit=3)


def quickest(
    masked: MaskedModel, output: outputs.Output, batch: Any, plain: Callable[[], Any], repeats: int
) -> dict[str, float]:
    """Processor time of this thread in the quickest pass of every side, in seconds."""
    gates = torch.rand(len(next(iter(batch.values()))), len(masked))

    def passes(compile: bool | str) -> Callable[[], Any]:
        rounds = GateRounds(masked, output, 0.05, 0)
        rounds.passes.begin_batch()

        def run() -> Any:
            with running(compile=compile):
                return rounds.passes(batch, gates, 0.6)

        return run

    captured.GATES = replace(captured.GATES, after=0.0)  # at once
    sides = {"plain": plain, "own code": passes(False), "captured": passes("auto"), "compiled": passes(True)}
    found = dict.fromkeys(sides, float("inf"))
    with models.frozen(masked.model), heap.kept():  # as runs have it
        for number in range(3 + 10 * repeats):  # the first ones make the graph
            for side, run in sides.items():
                begun = time.thread_time()
                run()
                spent = time.thread_time() - begun
                found[side] = min(found[side], spent) if number >= 3 else found[side]
    return found


def row(name: str, n_components: int, seconds: dict[str, float], limit: float) -> str:
    """A row of a table: every side over the plain one."""
    ratios = [spent / seconds["plain"] for side, spent in seconds.items() if side != "plain"]
    cells = (
        name, f"{n_components:,}", f"{seconds['plain'] * 1e3:.1f} ms", *(f"{ratio:.2f}" for ratio in ratios),
        *(tables.said(ratio, limit) for ratio in ratios),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
