"""The engine on a CUDA device: passes and whole default runs beside plain ones, and a large ridge.

    python scripts/benchmark_accelerator.py --write
    python scripts/benchmark_accelerator.py --models vit_b16 --dtypes bfloat16 --batches 8
    python scripts/benchmark_accelerator.py --ridge 83000 50000

ViT-B/16 and ResNet-50 on 224 × 224 images and SmolLM2-135M on sequences of 128 tokens, of real size with random
weights; the data lie in memory. Sides take turns; a figure is the median over the repeats. "own code" is
`compile=False`, "recorded" `compile="auto"` with graphs from the second pass on: gate passes captured, what lies
between products compiled, and all of it launched as one; masked passes launched as one.

    plain        forward, and forward with backward to the one input, milliseconds a pass of a batch
    masked       a masked pass of the same batch (20 a unit, as checks are), over the plain forward
    gate         a gate pass as PathGradient makes it, with its share of the draws of a round, over the plain forward
                 with backward
    host         of a gate pass: the time until all its work is handed to the device, over what the pass takes
    busy         of gate passes: the time that kernels run, over all
    made in      seconds from the first gate pass until a recording of it can be launched
    memory       the most that a gate pass takes beside the weights, over the same of the plain forward with backward
    whole        a default run of `coar.attribute` at 5 %, from the model to what is saved, over as many plain passes
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import torch
from benchmark_engine import resnet50, vit_b16

import hf_coar as coar
from hf_coar import models
from hf_coar.estimators.gates import GateRounds, n_blocks
from hf_coar.estimators.regression import solve
from hf_coar.masking import MaskedModel
from hf_coar.models import launched
from hf_coar.runs import captured, preflight, sampling
from hf_coar.runs.engine import Part, autocast, running
from hf_coar.runs.measuring import MaskedPasses

RESULTS = Path(__file__).parent / "results" / "accelerator.md"
FRACTION, N_MASKS = 0.05, 20
WAYS: list[tuple[str, bool | str]] = [("own", False), ("recorded", "auto")]
DTYPES = {"float32": None, "tf32": "tf32", "bfloat16": "bfloat16"}


def smollm2() -> tuple[Any, Any]:
    """A language model of SmolLM2-135M's size, sequences of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)), [{"input_ids": torch.randint(0, 49152, (1, 128))}]


NETWORKS = {"vit_b16": (vit_b16, 64), "resnet50": (resnet50, 64), "smollm2": (smollm2, 16)}


class Bench:
    """One network with batches of random data."""

    def __init__(self, name: str, n_batches: int) -> None:
        """Build it on the device; batches stay on the host."""
        torch.manual_seed(0)
        make, size = NETWORKS[name]
        model, ((one,)) = make()[0], make()[1][:1]
        self.model = model.eval().to("cuda").requires_grad_(False)
        self.batches = [self._batch(one, size) for _ in range(n_batches)]
        self.components = coar.find_components(self.model)
        # As a run has it, so that its graphs are known to the runs.
        self.output = preflight.bound(self.model, self.batches[:1], "token_margin" if name == "smollm2" else "margin")
        self.size = size

    @staticmethod
    def _batch(one: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
        if "input_ids" in one:
            return {"input_ids": torch.randint(0, 49152, (size, one["input_ids"].shape[1]))}
        return {"pixel_values": torch.randn(size, *one["pixel_values"].shape[1:]), "labels": torch.arange(size)}

    def forwards(self, count: int, batches: list[dict]) -> None:
        """Plain passes."""
        with torch.no_grad():
            for batch in batches:
                there = models.to(batch, torch.device("cuda"))
                for _ in range(count):
                    self.output(models.logits(self.model, there), there)

    def gradients(self, count: int, batches: list[dict]) -> None:
        """Plain passes forward and backward."""
        for batch in batches:
            there = models.to(batch, torch.device("cuda"))
            inputs = {name: one for name, one in there.items() if name != "labels"}
            if "input_ids" in inputs:
                inputs["inputs_embeds"] = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            leaf = next(iter(inputs.values())).detach().requires_grad_()
            inputs[next(iter(inputs))] = leaf
            for _ in range(count):
                values = self.output(models.logits(self.model, inputs), there)
                torch.autograd.grad(values.sum(), leaf)

    def whole(self) -> float:
        """A default run without its page; the cost, in forward passes an example."""
        with tempfile.TemporaryDirectory() as folder:
            found = coar.attribute(
                self.model, self.batches, self.components, output=self.output, ablated_fraction=FRACTION, out=folder,
                progress=False,
            )  # fmt: skip
        return found.provenance.cost


def timed(act: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def most_memory(act: Callable[[], Any]) -> float:
    """Bytes at most, beside those that are there before."""
    act()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def passes(bench: Bench, dtype: str | None, repeats: int) -> dict[str, float]:
    """Plain, masked and gate passes of one batch."""
    batch = models.to(bench.batches[0], torch.device("cuda"))
    masked, one = MaskedModel(bench.model, bench.components), [batch]
    part, examples = Part("masks", 0, N_MASKS, float(N_MASKS), N_MASKS), range(bench.size)
    sides: dict[str, Callable[[], Any]] = {
        "forward": lambda: bench.forwards(N_MASKS, one), "gradient": lambda: bench.gradients(10, one)
    }  # fmt: skip
    rounds, figures = {}, {}
    for name, how in WAYS:
        with running(compile=how):
            masks = MaskedPasses(masked, bench.output, sampling.Masks(len(masked), FRACTION, N_MASKS, 0, 0))
        rounds[name] = GateRounds(masked, bench.output, FRACTION, 0)
        sides[f"masked {name}"] = _running(how, lambda m=masks: m.compute(batch, 0, part))
        sides[f"gate {name}"] = _running(how, lambda r=rounds[name]: r.round(batch, examples, 0))
        rounds[name].passes.begin_batch()
    found: dict[str, list[float]] = {side: [] for side in sides}
    with autocast(torch.device("cuda"), dtype), running(dtype=dtype):
        for side in ("gate own", "gradient"):
            figures[f"memory {side}"] = most_memory(sides[side])
        figures["made"] = timed(sides["gate recorded"])
        recording = next(iter(rounds["recorded"].passes._passes.replays), None)
        if isinstance(recording, launched.Recording):  # whose launches the allocator does not see
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                figures["memory gate recorded"] = most_memory(lambda: recording._operations(*recording._inputs))
        for number in range(repeats + 1):  # the first is for warming up
            for side, act in sides.items():
                seconds = timed(act)
                if number:
                    found[side].append(seconds / (N_MASKS if side.startswith(("forward", "masked")) else 10))
        figures |= {side: statistics.median(times) for side, times in found.items()}
        gates = torch.full((bench.size, len(masked)), 0.9, device="cuda")
        for name, how in WAYS:
            act = _running(how, lambda r=rounds[name]: r.passes(batch, gates, 0.5))
            act()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            act()
            figures[f"host {name}"] = time.perf_counter() - begun
            figures[f"busy {name}"] = busy(lambda act=act: [act() for _ in range(5)])
    figures["recorded at all"] = float(bool(rounds["recorded"].passes._passes.replays))
    return figures


def _running(compile: bool | str, act: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with running(compile=compile):
            return act()

    return run


def busy(act: Callable[[], Any]) -> float:
    """The share of the time in which kernels run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds = timed(act)
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / seconds


def wholes(bench: Bench, dtype: str | None, repeats: int, sides: list[str]) -> dict[str, float]:
    """Default runs, and as many plain passes; recorded runs find the graphs that were made before, as in a long run."""
    n_gated, cost = coar.PathGradient().rounds * n_blocks(FRACTION), 0.0
    device, found = torch.device("cuda"), {side: [] for side in [*sides, "plain"]}

    def plain() -> None:
        with autocast(device, dtype):
            bench.gradients(n_gated, bench.batches)
            bench.forwards(round(cost - 3 * n_gated), bench.batches)

    for _ in range(repeats):
        for side in found:
            if side == "plain":
                found[side].append(timed(plain))
                continue
            with running(dtype=dtype, compile="auto" if side == "recorded" else False, report=False):
                begun = time.perf_counter()
                cost = bench.whole()
                found[side].append(time.perf_counter() - begun)
    return {side: statistics.median(times) for side, times in found.items()} | {"cost": cost}


def ridge(n_components: int, n_masks: int, n_examples: int = 64) -> str:
    """Seconds of a ridge regression."""
    torch.manual_seed(0)
    masks = torch.rand(n_masks, n_components, device="cuda") >= FRACTION
    weights = torch.randn(n_components, n_examples, device="cuda") / n_components**0.5
    values = torch.cat([(~part).float() @ weights for part in masks.split(4096)])
    values += 0.1 * torch.randn_like(values)
    masks, values = masks.cpu(), values.cpu()
    begun = time.perf_counter()
    fitted, _ = solve(coar.Ridge(), masks, values)
    seconds = time.perf_counter() - begun
    right = torch.corrcoef(torch.stack([fitted[0], -weights[:, 0].cpu()]))[0, 1]
    return f"| {n_components:,} × {n_masks:,}, {n_examples} examples | {seconds:.1f} s | {float(right):.3f} |"


HEADERS = {
    "Passes": (
        "| network | precision | forward, ms | forward + backward, ms | masked: own code | recorded | gate: own code | "
        "recorded | host: own code | recorded | busy: own code | recorded | memory: own code | recorded | made in, s |"
    ),
    "Whole default runs": (
        "| network | precision | images or texts | cost | plain, s | own code, s | recorded, s | own code ÷ plain | "
        "recorded ÷ plain |"
    ),
    "Ridge": "| components × masks | time | correlation with the planted weights |",
}
N_KEYS = {"Passes": 2, "Whole default runs": 3, "Ridge": 1}  # cells that say what a row is of


def _share(figures: dict[str, float], what: str, of: str | None, percent: bool = False, digits: int = 2) -> str:
    if what not in figures:
        return "not run"
    value = figures[what] / (figures[of] if of else 1)
    return f"{value:.0%}" if percent else f"{value:.{digits}f}"


def measure(args: argparse.Namespace) -> dict[str, list[str]]:
    """Rows by table, printed as they are found."""
    found: dict[str, list[str]] = {}

    def add(table: str, row: str) -> None:
        found.setdefault(table, []).append(row)
        print(row, flush=True)

    # As in a long run, from the second pass on.
    patient = replace(captured.GATES, fused_after=0.0)
    at_once = captured.GATES = replace(patient, after_launches=0.0)
    if args.ridge:
        add("Ridge", ridge(*args.ridge))
    for name in args.models:
        bench = Bench(name, args.batches)
        for precision in args.dtypes:
            dtype = DTYPES[precision]
            for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
                place.fp32_precision = "ieee"
            one = passes(bench, dtype, args.repeats)
            masked = [_share(one, f"masked {how}", "forward") for how, _ in WAYS]
            gated = [_share(one, f"gate {how}", "gradient") for how, _ in WAYS]
            host = [_share(one, f"host {how}", f"gate {how}", percent=True) for how, _ in WAYS]
            at_work = [_share(one, f"busy {how}", None, percent=True) for how, _ in WAYS]
            memory = [_share(one, f"memory gate {how}", "memory gradient") for how, _ in WAYS]
            add(
                "Passes",
                f"| {name}, {bench.size} | {precision} | {1e3 * one['forward']:.1f} | {1e3 * one['gradient']:.1f} | "
                + " | ".join([*masked, *gated, *host, *at_work, *memory, f"{one['made']:.1f}"])
                + (" |" if one["recorded at all"] else ", not recorded |"),
            )
            if args.no_whole:
                continue
            captured.GATES = patient
            run = wholes(bench, dtype, args.whole_repeats, args.sides)
            captured.GATES = at_once
            data = f"{args.batches} × {bench.size}"
            shown = [_share(run, what, None, digits=1) for what in ("plain", "own", "recorded")]
            shown += [_share(run, what, "plain") for what in ("own", "recorded")]
            add(
                "Whole default runs",
                f"| {name}, {len(bench.components):,} | {precision} | {data} | {run['cost']:.0f} | "
                + " | ".join(shown) + " |",
            )  # fmt: skip
        del bench
        torch.cuda.empty_cache()
    return found


NOTES = """\
Device: NVIDIA H200, torch 2.11 with CUDA 13, transformers 5.17, Python 3.12, 16 CPU cores. Passes are medians of three
(ResNet-50: two, tf32: four) repeats in one process that had the device to itself; rows in tf32 are from before the
mends below. The machine is another one from call to call.

**A gate pass takes 0.97 (ResNet-50), 1.02 (ViT-B/16) and 0.21 (SmolLM2) times plain forward and backward** in bfloat16,
captured, fused and launched as one, where that of our own code takes 4.4, 2.8 and 2.7. Plain passes are the model's own
code: SmolLM2's wait for Python nine tenths of the time, and nobody launched them as one. "made in" is with kernels that
were never compiled on the machine (ViT-B/16: compiled a few minutes before; else 27 to 36 s). `compile="auto"` fuses in
runs of more than a minute alone.

**Whole default runs of 256 images took 12.5 s (ResNet-50) and 13.9 s (ViT-B/16), of 1,024 images 52.4 s (ViT-B/16), and
of 64 texts 14.8 s (SmolLM2)**, from the model to what is saved, alone on the machine, means of two (1,024 images and
SmolLM2: one): 1.30, 1.68, 1.52 and .40 times as many plain passes in the same run. On a CPU 1.15 is wanted of compiled
runs, which these are, and 1.35 of others: **the first is missed by both networks for images, the second by ViT-B/16**.
An earlier version took 16.4 s for 256 images of ViT-B/16 (24.1 s before that), in other runs.

Where ViT-B/16's time goes, by a sampled profile of one run of 256 images (14.2 s), of which there is no script, in s:
4.3 single effects of 128 components and 3.7 gate passes, which the device fills; 1.3 fresh sets, half of them draws;
1.2 judging the fit, most of them draws; .8 shrinking (mended since), .7 far reads, .6 the fingerprint of the weights,
.6 comparing recorded passes with those of our own code, .4 writing what comes out, .3 reading shards, .3 looking for
outliers. The mends: fresh sets are drawn on the device, their passes launched as one, the fit judged there and reads
shrunk there, layers of one size at once; no round waits for a list of rows, a look at all gates is one and not one a
layer, images are hashed once and ahead, rows are hashed by several threads, shards are written by a thread.

An earlier page said that `compile=True` gave other values for ViT-B/16 in bfloat16, by as much as the largest. These
are ties: a margin takes the largest other logit, and where two are equal up to rounding, as in 1 of 64 examples of such
networks with random weights, the gradient goes to one or the other. With log-probabilities all examples agree to 1.3 %
([ties](ties.md): six seeds, on a CPU).

`pytest -m gpu`: 6 of the 27 tests, among them those of fused passes, passed with the code of these rows but the last
change of shrinking (layers of one size at once; the same bits on a CPU), the others with that of earlier rows.

**Not run**: several GPUs (recordings are of one device only, and are filled with NaN before the first launch)."""


def write(found: dict[str, list[str]]) -> None:
    """The page, with new rows in the places of older ones of the same network, precision and data; the others stay."""
    parts = [f"# The engine on a CUDA device\n\n{__doc__.strip()}", NOTES]
    for table, header in HEADERS.items():
        n_keys = N_KEYS[table]
        new = {tuple(cell.strip() for cell in row.split("|")[1:-1])[:n_keys]: row for row in found.get(table, ())}
        rows = tables.rows_of(RESULTS, n_keys, table) | new
        body = "\n".join([header, "|---" * (header.count("|") - 1) + "|", *rows.values()])
        parts.append(f"## {table}\n\n{body if rows else 'Not run.'}")
    RESULTS.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["tf32", "bfloat16"])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole-repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=[way for way, _ in WAYS], default=[way for way, _ in WAYS])
    parser.add_argument("--no-whole", action="store_true")
    parser.add_argument("--ridge", type=int, nargs=2, metavar=("COMPONENTS", "MASKS"))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = measure(args)
    if args.write:
        write(found)


if __name__ == "__main__":
    main()
