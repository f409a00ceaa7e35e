"""Graphs of gate passes of tiny models of every family: which get one, and whether it gives the same bits.

Every family that has a tiny random model is given gates between 0 and 1, and a graph of that pass is written down. Then
come six other passes, of gates that are soft, and that are 0 and 1, through the graph and through the model's own code.
One line a model is written as it goes, and what has a line is not done again; `report` makes the table.

    python scripts/census_graphs.py run /tmp/graphs        # about 900 tiny models, about 15 minutes on one core
    python scripts/census_graphs.py report /tmp/graphs     # writes scripts/results/graphs.md
"""

import argparse
import logging
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from census import lines_of, sweep, tiny_models
from torch import Tensor

import hf_coar as coar
from hf_coar import models
from hf_coar.estimators.gates import GatePasses
from hf_coar.masking import MaskedModel
from hf_coar.models import graphs

RESULT = Path(__file__).resolve().parent / "results" / "graphs.md"
PASSES = 6
LIMIT = 60  # seconds


class Weighted:
    """All that a model gives, with a weight each, as one number an example."""

    name = identity = "weighted"

    def __init__(self, tiny: tiny_models.TinyModel) -> None:
        """Of a tiny model."""
        self.tiny = tiny

    def of(self, model: torch.nn.Module, batch: dict) -> Tensor:
        """Outputs float32 [examples]."""
        given = tiny_models.primary_output(self.tiny.run(batch)).float().flatten(1)
        return given @ torch.linspace(0.5, 1.5, given.shape[1])


def looked_at(tiny: tiny_models.TinyModel) -> dict:
    """What came of a graph: `refused` with the reason, or of how many passes it gave the same bits."""
    model, batch = tiny.model.eval(), dict(tiny.batch)
    components, generator = coar.find_components(model), torch.Generator().manual_seed(0)
    count = len(next(value for value in batch.values() if isinstance(value, Tensor)))

    def drawn(number: int) -> tuple[Tensor, Tensor]:
        gates = torch.rand(count, len(components), generator=generator)
        return gates if number % 2 == 0 else (gates > 0.3).float(), torch.tensor(0.6 / (1 + number)).double()

    with models.frozen(model):
        passes = GatePasses(MaskedModel(model, components), Weighted(tiny), delta=True)
        passes.begin_batch()
        first = drawn(0)
        if not same(*(passes._run(batch, *first) for _ in range(2))):
            return {"unsteady": True}
        flat = passes._passes._flat(batch, first)
        try:
            graph = graphs.captured(flat, [*batch.values(), *first], model, len(batch))
        except Exception as error:
            return {"refused": str(error).splitlines()[0]}
        equal = []
        for number in range(1, 1 + PASSES):
            given = drawn(number)
            with torch.no_grad():
                replayed = graph(*batch.values(), *given)
            equal.append(same(replayed, passes._run(batch, *given)))
    return {"equal": equal, "operations": len(graph.graph.nodes)}


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether two passes gave the same bits."""
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def jobs() -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every family that has a tiny model."""

    def job(build: Callable[[], tiny_models.TinyModel]) -> dict:
        tiny, reason = tiny_models.try_build(build)
        if tiny is None or not tiny_models.is_deterministic(tiny):
            return {"none": reason or "draws numbers"}
        return looked_at(tiny)

    for head, kind in tiny_models.transformers_pairs():
        yield f"{head}/{kind}", partial(job, partial(tiny_models.tiny_transformers, head, kind))
    for name in tiny_models.timm_families():
        yield f"timm/{name}", partial(job, partial(tiny_models.tiny_timm, name))


def report(folder: Path) -> str:
    """The table."""
    found = [line for line in lines_of(folder, "graphs") if "equal" in line or "refused" in line]
    others = Counter(next(key for key in line if key not in ("name", "seconds")) for line in lines_of(folder, "graphs"))
    equal = [line for line in found if all(line.get("equal", [False]))]
    first_only = [line["name"] for line in found if line.get("equal", [False])[0] and line not in equal]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = (
        f"Tiny random models of every family, {versions}, on a CPU: of {len(found)} that can be attributed and repeat "
        f"themselves, {len(equal)} have a graph that gives the same bits in {PASSES} passes of other gates. A graph is "
        f"used in a batch once it gave the same bits there; of {len(first_only)} it did so in the first pass and not "
        f"in all. Not looked at: {others['none']} without a tiny model or that draw numbers, {others['unsteady']} "
        f"whose own passes do not repeat themselves, {others['error'] + others['built']} that fail or take over "
        f"{LIMIT} s."
    )
    rows = [
        "# Graphs of gate passes",
        "",
        "    python scripts/census_graphs.py run /tmp/graphs",
        "    python scripts/census_graphs.py report /tmp/graphs",
        "",
        *textwrap.wrap(text, 120),
        "",
        "| no graph, or other bits | why |",
        "|---|---|",
        *(f"| {line['name']} | {line.get('refused') or line['equal']} |" for line in found if line not in equal),
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["run", "report"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.step == "report":
        RESULT.write_text(report(args.folder))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    sweep(jobs(), args.folder / "graphs.jsonl", LIMIT)


if __name__ == "__main__":
    main()
