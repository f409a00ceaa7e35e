"""How much the engine costs beside the model: masked and gate passes against plain loops and the paper's procedure.

    python scripts/benchmark_engine.py                                # all models, one thread, prints a table
    python scripts/benchmark_engine.py --models demo --repeats 15
    python scripts/benchmark_engine.py --processes                    # two processes of one thread against one
    python scripts/benchmark_engine.py --whole demo_512 vit_s gpt2_4 mobilenetv2      # default runs beside plain passes
    python scripts/benchmark_engine.py --whole demo_512 --compile      # and compiled: minutes first
    python scripts/benchmark_engine.py --whole vit_s --batches 1       # fewer batches
    python scripts/benchmark_engine.py --gates demo_512 vit_s gpt2_4 mobilenetv2      # gate passes alone
    python scripts/benchmark_engine.py --layers                       # networks of many small layers
    python scripts/benchmark_engine.py … --write                      # these rows also into scripts/results/engine.md

In one run, alternating, so that a noisy machine disturbs all sides alike; a figure is the median of the ratios.

    a  plain      for every mask: model(**batch), batch in memory, no gradients
    b  masked     the same number of masked passes through the engine, mask drawing, outputs and shards included
    e  gradient   plain forward and backward to the one input
    c  gates      the same number of gate passes through the engine
    f  delta      the same with what PathGradient does by default: exact differences, smoothed slopes, outliers
    d  paper      for every mask: deep copy of the model, rows zeroed one by one, all the data read and run once

`--whole` times default runs of `coar.attribute`, from the model to what is saved, in processor time, over that of as
many plain passes: forward and backward for every gate pass, forward for every other. "own code": `compile=False`;
"captured": `compile="auto"`, making the graph included; "compiled": `compile=True` after one such run of the same
model, whose graphs it uses, so without the minutes that compiling takes. "draws" is the share of the first that goes
into drawing gates and masks.

`--processes`: runs without their page as well, which one process draws; beside them plain passes, shared by as many
processes, which say what the machine makes of two.

`--gates` and `--layers`: single gate passes as PathGradient makes them, over plain forward and backward passes to the
one input, see `benchmark_layers`; a graph is made before.

Weights are random but for the demo's trained network; ResNet-50, ViT-B/16, GPT-2 and MobileNetV2 have their real sizes;
`vit_s` is six blocks of ViT-S at 112 × 112, `gpt2_4` four blocks of GPT-2.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import benchmark_layers
import tables
import torch

import hf_coar as coar
from hf_coar import models
from hf_coar.estimators.gates import n_blocks
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import sampling
from hf_coar.runs.engine import running
from hf_coar.runs.problem import Problem
from hf_coar.runs.store import Store

DEMO = Path(coar.__file__).parent / "demo"
RESULTS = Path(__file__).parent / "results" / "engine.md"
FRACTION = 0.05


def resnet50() -> tuple[Any, Any]:
    """ResNet-50, 224 × 224."""
    import timm

    return timm.create_model("resnet50"), [_pixels(4)]


def vit_b16() -> tuple[Any, Any]:
    """ViT-B/16, 224 × 224."""
    import timm

    return timm.create_model("vit_base_patch16_224"), [_pixels(2)]


def gpt2() -> tuple[Any, Any]:
    """GPT-2 (124 M), sequences of 128 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()), [{"input_ids": torch.randint(0, 50257, (4, 128))}]


def demo() -> tuple[Any, Any]:
    """The demo's small residual network, 28 × 28, read from its Parquet file."""
    return coar.load(DEMO / "model", DEMO / "images.parquet", split="train[:256]", batch_size=128)


def demo_512() -> tuple[Any, Any]:
    """The same network on more images, in batches of 64."""
    return coar.load(DEMO / "model", DEMO / "images.parquet", split="train[:512]", batch_size=64)


def vit_s() -> tuple[Any, Any]:
    """Six blocks of ViT-S, 112 × 112."""
    import timm

    model = timm.create_model("vit_small_patch16_224", img_size=112, depth=6, num_classes=10)
    return model, [_pixels(8, 112) for _ in range(4)]


def gpt2_4() -> tuple[Any, Any]:
    """Four blocks of GPT-2, sequences of 64 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=4, vocab_size=2000, bos_token_id=0, eos_token_id=0))
    return model, [{"input_ids": torch.randint(0, 2000, (4, 64))} for _ in range(4)]


def mobilenetv2() -> tuple[Any, Any]:
    """MobileNetV2, 224 × 224."""
    import timm

    return timm.create_model("mobilenetv2_100"), [_pixels(4) for _ in range(4)]


MODELS = {"resnet50": resnet50, "vit_b16": vit_b16, "gpt2": gpt2, "demo": demo}
WHOLE = {"demo_512": demo_512, "vit_s": vit_s, "gpt2_4": gpt2_4, "mobilenetv2": mobilenetv2}
GATE_ROUNDS = {"demo": 8}  # of five passes each, at a fraction of 10 %; two for large models
MASKS = {"demo": 64}  # passes a measurement; small models need more of them to be timed


def _pixels(count: int, size: int = 224) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size), "labels": torch.arange(count)}


class Bench:
    """One model, its data, and the sides that are compared."""

    def __init__(self, name: str, device: torch.device, n_batches: int | None = None) -> None:
        """Build the model and its components; of the data, so many batches."""
        torch.manual_seed(0)
        self.model, self.data = {**MODELS, **WHOLE}[name]()
        self.model = self.model.eval().to(device)
        self.batches = [{k: v.to(device) for k, v in batch.items()} for batch in self.data][:n_batches]
        self.components = coar.find_components(self.model)
        self.output = outputs.get("token_margin" if name.startswith("gpt2") else "margin")
        self.n_masks, self.n_rounds, self.device = MASKS.get(name, 4), GATE_ROUNDS.get(name, 2), device

    def plain(self, n_passes: int | None = None) -> None:
        """Side a."""
        with models.frozen(self.model), torch.no_grad():
            for batch in self.batches:
                for _ in range(n_passes or self.n_masks):
                    models.logits(self.model, batch)

    def masked(self) -> None:
        """Side b."""
        masks = sampling.Masks(len(self.components), FRACTION, self.n_masks, 0, sampling.MASKS)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder, {})
            self.problem(store).measure(masks)

    def gradient(self, n_passes: int | None = None) -> None:
        """Side e, with as many passes as `gates` has; language models take the gradient to their embedded tokens."""
        with models.frozen(self.model):
            for batch in self.batches:
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                if "input_ids" in inputs:
                    embedded = self.model.get_input_embeddings()(inputs.pop("input_ids"))
                    inputs["inputs_embeds"] = embedded
                leaf = next(iter(inputs.values())).detach().requires_grad_()
                inputs[next(iter(inputs))] = leaf
                for _ in range(n_passes or 5 * self.n_rounds):
                    values = self.output(models.logits(self.model, inputs), batch)
                    torch.autograd.grad(values.sum(), leaf)

    def gates(self, delta: bool = False) -> None:
        """Side c, or f."""
        outliers = coar.PathGradient.max_outliers if delta else 0
        # Flips and fresh sets are masked passes, of which the other side has none.
        method = coar.PathGradient(rounds=self.n_rounds, delta=delta, shrink=False, max_outliers=outliers).bare()
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder, {})
            method.fit(self.problem(store))

    def whole(self, compile: bool | str, model: Any = None) -> float:
        """A default run at 5 %, without its page; the cost, in forward passes an example."""
        with tempfile.TemporaryDirectory() as folder, running(compile=compile, report=False):
            found = coar.attribute(
                model or self.model, self.batches, self.components, output=self.output, ablated_fraction=0.05,
                out=folder, progress=False,
            )  # fmt: skip
        return found.provenance.cost

    def problem(self, store: Store) -> Problem:
        """What both sides of a comparison look at."""
        return Problem(MaskedModel(self.model, self.components), self.batches, self.output, 0.1, 0, store)

    def paper(self) -> None:
        """Side d."""
        masks = sampling.Masks(len(self.components), FRACTION, self.n_masks, 0, sampling.MASKS)
        with torch.no_grad():
            for kept in masks.rows(0, self.n_masks):
                ablated = copy.deepcopy(self.model)
                parameters = dict(ablated.named_parameters())
                for group, gates in zip(self.components.groups, kept.split(self.components.sizes()), strict=True):
                    rows = parameters[group.parameter].data.movedim(group.axis, 0)
                    for row in (~gates).nonzero().flatten().tolist():
                        rows[row] = 0
                for batch in self.data:
                    self.output(models.logits(ablated, {k: v.to(self.device) for k, v in batch.items()}), batch)

    def seconds(self, side: Callable[[], None]) -> float:
        """Wall time of one side."""
        started = time.perf_counter()
        side()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started


def compare(name: str, device: torch.device, repeats: int) -> str:
    """A row of the table."""
    bench = Bench(name, device)
    sides = {"a": bench.plain, "b": bench.masked, "d": bench.paper, "e": bench.gradient, "c": bench.gates}
    sides["f"] = lambda: bench.gates(delta=True)
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for key, side in sides.items():
            times[key].append(bench.seconds(side))
    ratio = {
        pair: statistics.median(x / y for x, y in zip(times[pair[0]], times[pair[1]], strict=True))
        for pair in ("ab", "ec", "ef", "db")
    }
    n_examples = sum(len(batch[next(iter(batch))]) for batch in bench.batches)
    rate = n_examples * bench.n_masks / statistics.median(times["b"])
    return (
        f"| {name} | {len(bench.components):,} | {len(bench.batches)} × {n_examples // len(bench.batches)} | "
        f"{rate:,.1f} | {ratio['ab']:.2f} | {ratio['ec']:.2f} | {ratio['ef']:.2f} | {ratio['db']:.2f} | "
        f"{tables.said(0.97, round(ratio['ab'], 2))} |"
    )


def compare_gates(name: str, device: torch.device, repeats: int) -> str:
    """A row of the table of gate passes."""
    bench = Bench(name, device, 1)
    masked = MaskedModel(bench.model, bench.components)
    plain = lambda: bench.gradient(1)  # noqa: E731
    seconds = benchmark_layers.quickest(masked, bench.output, bench.batches[0], plain, repeats)
    return benchmark_layers.row(name, len(bench.components), seconds, limit=1.35)


def compare_whole(name: str, device: torch.device, repeats: int, compile: bool, n_batches: int | None) -> str:
    """A row of the table of default runs."""
    bench = Bench(name, device, n_batches)
    n_gated = coar.PathGradient().rounds * n_blocks(0.05)
    sides: dict[str, Callable[[], Any]] = {
        "own code": lambda: bench.whole(False),
        "plain": lambda: (bench.gradient(n_gated), bench.plain(round(cost - 3 * n_gated))),
        "captured": lambda: bench.whole("auto", copy.deepcopy(bench.model)),  # of which there is no graph yet
    }
    if compile:
        bench.whole(True)
        sides["compiled"] = lambda: bench.whole(True)
    bench.plain(1)
    times: dict[str, list[float]] = {side: [] for side in sides}
    with _clocked(sampling, "uniforms", "balanced_split") as draws:
        for _ in range(repeats):
            for side, run in sides.items():
                begun = time.process_time()
                found = run()
                times[side].append(time.process_time() - begun)
                if side == "own code":
                    cost, drawing = found, sum(draws)
                draws.clear()
    ratio = {
        side: statistics.median(x / y for x, y in zip(times[side], times["plain"], strict=True))
        for side in times
    }  # fmt: skip
    shown = [f"{ratio[side]:.2f}" if side in ratio else "not run" for side in ("own code", "captured", "compiled")]
    said = [tables.said(ratio["own code"], 1.35), tables.said(ratio["compiled"], 1.15) if compile else "not run"]
    n_examples = sum(len(next(iter(batch.values()))) for batch in bench.batches)
    cells = (
        name, f"{len(bench.components):,}", f"{len(bench.batches)} × {n_examples // len(bench.batches)}", f"{cost:.0f}",
        f"{statistics.median(times['plain']):.1f} s", *shown, f"{drawing / times['own code'][-1]:.1%}", *said,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


@contextmanager
def _clocked(module: Any, *names: str) -> Iterator[list[float]]:
    """Inside the block the processor time of every call of these functions is noted."""
    seconds: list[float] = []
    originals = {name: getattr(module, name) for name in names}

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            found = function(*args, **kwargs)
            seconds.append(time.thread_time() - begun)
            return found

        return run

    try:
        for name, function in originals.items():
            setattr(module, name, clocked(function))
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


# ----------------------------------------------------------------------------------------------------- two processes

_BEGIN = """
import sys, time
import torch
import hf_coar as coar
from hf_coar.runs.engine import running
torch.set_num_threads(1)
model, data = coar.load(sys.argv[1] + "/model", sys.argv[1] + "/images.parquet", batch_size=32, split="train[:512]")
"""
_WORKER = f"""{_BEGIN}
coar.attribute(model, list(data)[:1], method=coar.PathGradient(rounds=2), ablated_fraction=0.05, progress=False)  # warm
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
with running(worker=sys.argv[3], report=False):
    method = coar.PathGradient(rounds=2, shrink=False)
    coar.attribute(model, data, method=method, ablated_fraction=0.05, out=sys.argv[2], progress=False)
print(time.perf_counter() - begun, flush=True)
"""
# The same share of the batches, without anything of the package: what the machine itself makes of two processes.
_PLAIN = f"""{_BEGIN}
number, count = map(int, sys.argv[3].split("/"))
model.requires_grad_(False)
own = [batch["pixel_values"] for batch in list(data)[number::count]]
def run(pixels):
    leaf = pixels.detach().requires_grad_()
    torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
run(own[0])
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
for pixels in own:
    for _ in range(20):
        run(pixels)
print(time.perf_counter() - begun, flush=True)
"""


def seconds_of(n_processes: int, worker: str = _WORKER) -> float:
    """Wall time of one run shared by processes of one thread each, from the first unit to the saved attributions."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, "-c", worker, str(DEMO), folder, f"{i}/{n_processes}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            )
            for i in range(n_processes)
        ]  # fmt: skip
        for child in children:
            child.stdout.readline()
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        return max(float(child.communicate()[0].split()[-1]) for child in children)


def processes(repeats: int) -> str:
    """A row on two processes against one."""
    found = [[seconds_of(1, of) / seconds_of(2, of) for of in (_WORKER, _PLAIN)] for _ in range(repeats)]
    ratio, plain = map(statistics.median, zip(*found, strict=True))
    return f"| demo, 512 images | {ratio:.2f} | {plain:.2f} | {tables.said(1.9, round(ratio, 2))} |"


# ------------------------------------------------------------------------------------------------------------- tables

HEADERS = {
    "Passes": "| model | components | data | masked, examples/s | a/b | e/c | e/f | d/b | a/b ≥ 0.97 | run |",
    "Whole default runs": (
        "| model | components | data | cost | plain passes | own code | captured | compiled | draws | "
        "own code ≤ 1.35 | compiled ≤ 1.15 | run |"
    ),
    "Gate passes": (
        "| model | components | plain | own code | captured | compiled | own code ≤ 1.35 | captured ≤ 1.35 | "
        "compiled ≤ 1.35 | run |"
    ),
    "Many small layers": (
        "| model | components | plain | own code | captured | compiled | own code ≤ 3 | captured ≤ 3 | compiled ≤ 3 | "
        "run |"
    ),
    "Two processes": "| model | one process of one thread ÷ two | plain passes alike | ≥ 1.9 | run |",
}


def measure(args: argparse.Namespace) -> dict[str, list[str]]:
    """Rows by table, printed as they are found."""
    found: dict[str, list[str]] = {}

    def add(table: str, row: str) -> None:
        if table not in found:
            header = HEADERS[table]
            sys.stdout.write(f"{header}\n{'|---' * (header.count('|') - 1)}|\n")
        found.setdefault(table, []).append(f"{row} {args.threads} thread(s), {args.repeats} repeats |")
        sys.stdout.write(found[table][-1] + "\n")
        sys.stdout.flush()

    device = torch.device(args.device)
    with running(dtype=args.dtype):
        for name in args.whole:
            add("Whole default runs", compare_whole(name, device, args.repeats, args.compile, args.batches))
        for name in args.gates:
            add("Gate passes", compare_gates(name, device, args.repeats))
        if args.layers:
            for name in benchmark_layers.NETWORKS:
                add("Many small layers", benchmark_layers.compare(name, args.repeats))
        if args.processes:
            add("Two processes", processes(args.repeats))
        if not (args.whole or args.gates or args.layers or args.processes):
            for name in args.models:
                add("Passes", compare(name, device, args.repeats))
    return found


def write(found: dict[str, Sequence[str]]) -> None:
    """The page, with new rows in the places of older ones of the same models; the others stay."""
    parts = [f"# The engine beside the plain forward\n\n{__doc__.strip()}"]
    parts.append(NOTES)
    for table, header in HEADERS.items():
        rows = tables.rows_of(RESULTS, section=table) | {
            (row.split("|")[1].strip(),): row for row in found.get(table, ())
        }
        body = "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows.values()])
        parts.append(f"## {table}\n\n{body if rows else 'Not run.'}")
    RESULTS.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


NOTES = """\
Machine: two CPU cores, other work going on, float32; the last column says how a row was run. On a GPU: see
accelerator.md. c and f include the start of a run: what tells where the examples are in every module, whether every
gate acts, and (f) which components are outliers; batches of two examples are where fixed costs weigh most.

Whole runs of few batches are mostly fixed costs where they are compiled: in the first run of a model making graphs
takes 2 to 7 s beside compiling, later runs of the same model object use them.

Memory, 500 against 5,000 examples of the demo (`pytest tests/test_streaming.py -m slow -s`): 913 MB against 918 MB
while passes run; 938 MB against 1,026 MB afterwards, when the results are in memory."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"))
    parser.add_argument("--whole", nargs="+", choices=WHOLE, default=[], help="measure only default runs of these")
    parser.add_argument("--gates", nargs="+", choices=WHOLE, default=(), help="measure only single gate passes")
    parser.add_argument("--batches", type=int, help="of these, so many batches of the data")
    parser.add_argument("--compile", action="store_true", help="default runs compiled as well")
    parser.add_argument("--layers", action="store_true", help="measure only networks of many small layers")
    parser.add_argument("--processes", action="store_true", help="measure only two processes against one")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args)
    if args.write:
        write(found)


if __name__ == "__main__":
    main()
