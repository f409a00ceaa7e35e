"""Networks of many small layers: what every group of components costs, however small.

    python scripts/benchmark_engine.py --layers

Default gate passes of 32 examples over plain forward and backward passes to the one input, alternating, in processor
time of one thread, the quickest of each. With a nonlinearity behind every layer most of it are the operations of its
smoothed slope and exact differences, some forty of 3,200 numbers each.
"""

import time
from collections.abc import Callable
from typing import Any

import tables
import torch
from torch import nn

import hf_coar as coar
from hf_coar import models
from hf_coar.estimators import captured
from hf_coar.estimators.gates import GateRounds
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
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
    gates = torch.rand(32, len(components))
    leaf = batch["inputs"].clone().requires_grad_()

    def plain() -> None:
        values = output(models.logits(model, {"inputs": leaf}), batch)
        torch.autograd.grad(values.sum(), leaf)

    def passes(compile: bool | str) -> Callable[[], Any]:
        rounds = GateRounds(MaskedModel(model, components), output, 0.05, 0)
        rounds.passes.begin_batch()

        def run() -> Any:
            with running(compile=compile):
                return rounds.passes(batch, gates, 0.6)

        return run

    captured._AFTER = 0.0  # at once
    sides = {"plain": plain, "own code": passes(False), "captured": passes("auto"), "compiled": passes(True)}
    quickest = dict.fromkeys(sides, float("inf"))
    with models.frozen(model):
        for number in range(3 + 10 * repeats):  # the first ones make the graph
            for side, run in sides.items():
                begun = time.thread_time()
                run()
                spent = time.thread_time() - begun
                quickest[side] = min(quickest[side], spent) if number >= 3 else quickest[side]
    ratios = [quickest[side] / quickest["plain"] for side in sides if side != "plain"]
    cells = (
        name, f"{len(components):,}", f"{quickest['plain'] * 1e3:.1f} ms", *(f"{ratio:.1f}" for ratio in ratios),
        *(tables.said(ratio, 3) for ratio in ratios),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
