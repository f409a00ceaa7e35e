"""Plans: what a run will cost, before it runs: passes, floating-point operations, disk, memory, units of work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.runs.engine import Part
from hf_coar.runs.memory import peak_bytes
from hf_coar.runs.problem import lie_in_a_file

_FLOAT = 4  # bytes
_SUMS = 10  # numbers a component that a round of `estimators.gates` holds beside its pass
# Of gate passes against plain forward and backward passes; scripts/benchmark_engine.py, between e/c and e/f.
_GATE_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Plan:
    """The cost of attributing a model's outputs, from its sizes alone.

    Attributes:
        n_examples: examples.
        n_components: components.
        passes: forward passes an example; a forward and backward pass counts as three.
        flops: floating-point operations of one forward pass of one example; a multiply-add counts as two.
        batch_size: examples a batch.
        n_parts: parts that the passes on a batch are divided in; a unit of work is a batch and a part.
        n_outputs: numbers an example that the units write to the disk.
        parameter_bytes: of the model.
        pass_bytes: that a pass of one example takes at most, beside the parameters.
        differentiates: whether the passes have a backward, and so keep the activations.
        processes: that share the run.
    """

    n_examples: int
    n_components: int
    passes: float
    flops: float
    batch_size: int
    n_parts: int
    n_outputs: int
    parameter_bytes: int
    pass_bytes: int
    differentiates: bool
    processes: int = 1

    @property
    def n_units(self) -> int:
        """Units of work."""
        return -(-self.n_examples // self.batch_size) * self.n_parts

    @property
    def total_flops(self) -> float:
        """Floating-point operations of the whole run."""
        return self.n_examples * self.passes * self.flops

    @property
    def disk_bytes(self) -> int:
        """Shards and the attributions with their standard errors; large ones are made by way of two more files."""
        copies = 3 if self.differentiates and lie_in_a_file(self.n_examples, self.n_components) else 1
        return _FLOAT * self.n_examples * (self.n_outputs + copies * 2 * self.n_components)

    @property
    def memory_bytes(self) -> int:
        """On the device of one process: weights, a pass of a batch, and what rounds of gates draw and add up."""
        sums = _SUMS * _FLOAT * self.n_components if self.differentiates else 0
        return self.parameter_bytes + self.batch_size * (self.pass_bytes + sums)

    def seconds(self, flops_per_second: float) -> float:
        """Wall time, if every process computes at this rate in plain forward passes."""
        if self.differentiates:
            flops_per_second *= _GATE_EFFICIENCY
        # Whole units: the last round of them may leave some processes without work.
        rounds = -(-self.n_units // self.processes)
        return self.total_flops / self.n_units * rounds / flops_per_second

    def __str__(self) -> str:
        """A few lines for a person."""
        n_batches = -(-self.n_examples // self.batch_size)
        return "\n".join(
            [
                f"examples    {self.n_examples:,}, in batches of {self.batch_size}",
                f"components  {self.n_components:,}",
                f"cost        {self.passes:g} forward passes an example, {self.n_examples * self.passes:,.0f} in all",
                f"operations  {self.flops:.3g} a pass, {self.total_flops:.3g} in all",
                f"units       {self.n_units:,}: {n_batches:,} batches × {self.n_parts:,} parts",
                f"processes   {self.processes}, at most {-(-self.n_units // self.processes):,} units each",
                f"disk        {size_text(self.disk_bytes)}",
                f"memory      about {size_text(self.memory_bytes)} on the device of every process",
            ]
        )


def plan(
    model: nn.Module,
    example: Mapping[str, Tensor],
    n_examples: int,
    n_components: int,
    parts: Sequence[Part],
    batch_size: int = 32,
    processes: int = 1,
    one_pass: Callable[[], object] | None = None,
) -> Plan:
    """What a run will cost.

    Args:
        model: may be on the meta device; runs twice.
        example: a batch of one example, on the same device.
        n_examples: to be attributed.
        n_components: of the model.
        parts: of the passes on every batch, as the estimator's `parts` says.
        batch_size: examples a batch.
        processes: that will share the run.
        one_pass: the dearest pass of the run, on the example, whose memory is counted; None for a forward pass.
    """

    def forward() -> None:
        with torch.no_grad():
            models.tasks.of(model).run(model, example)

    with models.frozen(model):
        flops, pass_bytes = _operations(forward), peak_bytes(one_pass or forward)
    return Plan(
        n_examples=n_examples,
        n_components=n_components,
        passes=sum(part.cost for part in parts),
        flops=flops,
        batch_size=min(batch_size, n_examples),
        n_parts=len(parts),
        n_outputs=sum(part.n_numbers for part in parts),
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        pass_bytes=pass_bytes,
        differentiates=any(part.differentiates for part in parts),
        processes=processes,
    )


def _operations(run: Callable[[], object]) -> float:
    """Floating-point operations."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def size_text(n_bytes: float) -> str:
    """Such as `3.1 MB`, `2.5 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
