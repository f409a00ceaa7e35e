"""How much memory a default gate pass takes beside a plain forward and backward pass.

    python scripts/benchmark_memory.py            # all models, prints a table
    python scripts/benchmark_memory.py --write    # also writes scripts/results/memory.md

Every figure is of a process of its own: the growth of the peak of its resident memory (Linux) while the second pass of
a batch runs, over what it held before. Weights are random. The pass is what `PathGradient` does by default: a gate for
every component of every example, exact differences, smoothed slopes. "planned" is what `attribute --dry-run` says of
such a pass beforehand, counted tensor by tensor in a pass of one example, over what the gate pass then took (a fit of
1 / 1.3 to 1.3 is wanted); "captured" is a pass that is replayed as one graph, see `runs.captured`.
"""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from hf_coar import find_components
from hf_coar.estimators.gates import GatePasses, one_pass
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs import captured
from hf_coar.runs.memory import peak_bytes
from hf_coar.runs.running import running
from hf_coar.storage import files

RESULTS = Path(__file__).parent / "results" / "memory.md"
MODELS = ("vit_small", "resnet50", "gpt2", "llama")
_HEAD = """\
# Memory of a gate pass beside a plain forward and backward pass

{doc}
Machine: two CPU cores, one thread, float32. An accelerator: not run.

| model | batch | plain, MiB | gate pass, MiB | ratio (≤ 2.2) | planned | captured, MiB |
|---|---|---|---|---|---|---|
{rows}
"""


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], str]:
    """A model of this name, a batch, and the output."""
    torch.manual_seed(0)
    if name in ("vit_small", "resnet50"):
        import timm

        size, count = (112, 16) if name == "vit_small" else (160, 8)
        settings = {"img_size": 112, "depth": 6} if name == "vit_small" else {}
        model = timm.create_model("vit_small_patch16_224" if settings else name, num_classes=10, **settings)
        labels = torch.zeros(count, dtype=torch.int64)
        return model, {"x": torch.randn(count, 3, size, size), "labels": labels}, "margin"
    import transformers

    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4))
    else:
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=4000, **sizes))
    return model, {"input_ids": torch.randint(0, 4000, (8, 64))}, "token_margin"


def growth(run: Callable[[], None]) -> float:
    """By how many MiB the peak of resident memory exceeds what was held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(name: str, what: str) -> float:
    """MiB of a plain pass or of a gate pass."""
    torch.set_num_threads(1)
    model, batch, output = build(name)
    model.eval().requires_grad_(False)
    output = outputs.get(output)
    if what == "plain":
        weight = model.get_input_embeddings().weight if name in ("gpt2", "llama") else batch["x"]

        def run() -> None:
            weight.requires_grad_()
            torch.autograd.grad(output.of(model, batch).sum(), weight)
    else:
        components = find_components(model)
        count, size = len(next(iter(batch.values()))), len(components)
        if what == "planned":
            example = {key: value[:1] for key, value in batch.items()}
            return count * peak_bytes(one_pass(model, components, output, example)) / 2**20
        captured.GATES = replace(captured.GATES, after=0.0)
        passes = GatePasses(MaskedModel(model, components), output, delta=True)
        passes.begin_batch()

        def run() -> None:
            with running(compile="auto" if what == "captured" else False):
                passes(batch, torch.rand(count, size), smoothing=0.6)

        if what == "captured":  # a graph is made, and then looked at
            run()
            run()
    run()
    return growth(run)


def main() -> None:
    """Measure each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*arguments.one))
        return
    # Large tensors have pages of their own, which go back at once.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    rows = []
    for name in arguments.models:
        plain, gates, replayed, planned = [
            float(subprocess.run([sys.executable, __file__, "--one", name, what], env=settings, check=True,
                                 capture_output=True, text=True).stdout.split()[-1])
            for what in ("plain", "gates", "captured", "planned")
        ]  # fmt: skip
        count = len(next(iter(build(name)[1].values())))
        rows.append(
            f"| {name} | {count} | {plain:.0f} | {gates:.0f} | {gates / plain:.2f} | {planned / gates:.2f} | "
            f"{replayed:.0f} |"
        )
        print(rows[-1], flush=True)
    if arguments.write:
        text = _HEAD.format(doc=__doc__.split("\n", 1)[1].strip(), rows="\n".join(rows))
        files.write_bytes(RESULTS, text.encode())


if __name__ == "__main__":
    main()
