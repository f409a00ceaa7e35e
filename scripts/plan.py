"""What a run would cost on paper: passes, operations, disk, memory, hours; checked against runs that were measured.

    python scripts/plan.py timm/resnet50.a1_in1k imagenet-1k --examples 50000 --devices 8 --teraflops 100
    python scripts/plan.py --table                  # ResNet-50, ViT-B/16, GPT-2, a Llama-class 8B: nothing is loaded
    python scripts/plan.py --check                  # a small run, predicted and measured; fails beyond a factor of 1.5
    python scripts/plan.py --table --check --write  # also writes scripts/results/plan.md

MODEL is a Hub id or a folder: only its configuration is used, on the meta device. DATASET is only named: its size is
--examples. --teraflops is what one device does of the model's operations in a second, not what its data sheet says.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import hf_coar as coar
from hf_coar import models
from hf_coar.errors import CoarError
from hf_coar.estimators import Size
from hf_coar.estimators.gates import one_pass
from hf_coar.models import outputs
from hf_coar.runs.engine import duration
from hf_coar.runs.plan import Plan, plan, size_text
from hf_coar.storage import files

DEMO = Path(coar.__file__).parent / "demo"
RESULTS = Path(__file__).parent / "results" / "plan.md"
TERAFLOPS = 50.0  # assumed of a data-centre GPU: a tenth to a third of what it does in large bfloat16 products
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def pixels(size: int = 224) -> dict[str, torch.Tensor]:
    """One image on the meta device."""
    return {"pixel_values": torch.empty(1, 3, size, size, device="meta")}


def tokens(length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One sequence on the meta device."""
    with torch.device("meta"):
        # With a mask of four axes the model looks at no value, and so runs without any.
        mask = torch.zeros(1, 1, length, length, dtype=dtype)
        return {"input_ids": torch.zeros(1, length, dtype=torch.long), "attention_mask": mask}


def from_timm(name: str) -> tuple[Any, dict]:
    """A timm architecture without weights."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name).eval(), pixels()


def from_config(config: Any, length: int) -> tuple[Any, dict]:
    """A transformers language model without weights."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.eval(), tokens(length, torch.bfloat16)


def gpt2() -> tuple[Any, dict]:
    """GPT-2, 124 M parameters, sequences of 256 tokens."""
    import transformers

    return from_config(transformers.GPT2Config(), 256)


def llama_8b() -> tuple[Any, dict]:
    """A Llama-class model of 8 B parameters, sequences of 512 tokens."""
    import transformers

    return from_config(transformers.LlamaConfig(**LLAMA_8B), 512)


# name -> (model and example, examples, devices)
TABLE = {
    "ResNet-50": (lambda: from_timm("resnet50"), 50_000, 8),
    "ViT-B/16": (lambda: from_timm("vit_base_patch16_224"), 5_000, 8),
    "GPT-2": (gpt2, 500, 1),
    "Llama-class 8B": (llama_8b, 1_000, 8),
}
METHODS = {
    "PathGradient(rounds=8)": coar.PathGradient(rounds=8),
    "Regression(n_masks=100000)": coar.Regression(100_000),
}


def table(teraflops: float) -> list[str]:
    """The four models under both methods."""
    lines = [
        "| model | components | method | examples | passes an example | FLOPs a pass | FLOPs in all | disk "
        "| memory a device | devices | time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (build, n_examples, devices) in TABLE.items():
        model, example = build()
        n_components = len(coar.find_components(model))
        for label, method in METHODS.items():
            try:
                parts = method.parts(Size(n_components, 0.05))
            except CoarError as error:
                lines.append(f"| {name} | {n_components:,} | {label} | refused: {error} |" + " |" * 7)
                continue
            found = plan(model, example, n_examples, n_components, parts, 32, devices, gated(model, example, method))
            lines.append(
                f"| {name} | {n_components:,} | {label} | {n_examples:,} | {found.passes:,g} | {found.flops:.3g} | "
                f"{found.total_flops:.3g} | {size_text(found.disk_bytes)} | {size_text(found.memory_bytes)} | "
                f"{devices} | {duration(found.seconds(teraflops * 1e12))} |"
            )
    return lines


def gated(model: Any, example: dict, method: Any) -> Any:
    """A gate pass, where the method makes such, whose output looks at no mask."""
    if not method.differentiates:
        return None
    name = "token_log_prob" if "input_ids" in example else "margin"
    targets = {"labels": example.get("input_ids", torch.zeros(1, dtype=torch.long, device="meta"))}
    output = outputs.Output(name, "", lambda logits, batch: outputs.get(name)(logits, targets))
    return one_pass(model, coar.find_components(model), output, example)


def model_on_paper(name: str) -> tuple[Any, dict]:
    """Any model by the configuration in its folder or Hub repository, without its weights."""
    if Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, "config.json"))
    config = files.read_json(path)
    if "architecture" in config:
        import timm

        with torch.device("meta"):
            model = timm.create_model(config["architecture"], **config.get("model_args", {}))
        channels, height, width = config["pretrained_cfg"]["input_size"]
        return model.eval(), {"pixel_values": torch.empty(1, channels, height, width, device="meta")}
    import transformers

    loaded = transformers.AutoConfig.from_pretrained(name)
    architecture = getattr(transformers, loaded.architectures[0])
    with torch.device("meta"):
        model = architecture._from_config(loaded)
    if model.main_input_name == "pixel_values":
        return model.eval(), pixels(getattr(loaded, "image_size", 224))
    return model.eval(), tokens(min(512, getattr(loaded, "max_position_embeddings", 512)), model.dtype)


# ------------------------------------------------------------------------------------------------------------- checking


def check() -> tuple[list[str], float]:
    """Predicted and measured seconds of small runs of the demo model; and the worst ratio, at least 1."""
    torch.set_num_threads(1)
    model, data = coar.load(DEMO / "model", DEMO / "images.parquet", split="train[:128]", batch_size=32)
    batches, components = list(data), coar.find_components(model)
    example = {"pixel_values": batches[0]["pixel_values"][:1]}
    lines, worst = ["| method | predicted, s | measured, s |", "|---|---|---|"], 1.0
    for method in (coar.Regression(n_masks=256), coar.PathGradient(rounds=8)):
        found = plan(model, example, 128, len(components), method.parts(Size(len(components), 0.05)), 32)
        pairs = []
        for _ in range(3):  # rate and run side by side, since others may use the machine
            rate = _rate(model, batches, found)
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                coar.attribute(model, batches, components, method=method, out=folder, progress=False)
            pairs.append((found.seconds(rate), time.perf_counter() - started))
        predicted, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(p / m for p, m in pairs)
        worst = max(worst, ratio, 1 / ratio)
        lines.append(f"| {method.name} | {predicted:.1f} | {measured:.1f} |")
    return lines, worst


def _rate(model: Any, batches: list[dict], found: Plan) -> float:
    """Operations a second of plain forward passes."""
    with models.frozen(model), torch.no_grad():
        models.logits(model, batches[0])
        started = time.perf_counter()
        for _ in range(10):
            for batch in batches:
                models.logits(model, batch)
    return 10 * found.n_examples * found.flops / (time.perf_counter() - started)


def main() -> int:
    """Print what was asked for; exit code 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--method", choices=("path_gradient", "regression"), default="path_gradient")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--n-masks", type=int, default=100_000)
    parser.add_argument("--ablated-fraction", type=float, default=0.05)
    parser.add_argument("--granularity", default="unit")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--teraflops", type=float, default=TERAFLOPS, help="of one device, achieved")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    parts, worst = [], 1.0
    if args.model:
        model, example = model_on_paper(args.model)
        method = coar.PathGradient(args.rounds) if args.method == "path_gradient" else coar.Regression(args.n_masks)
        n_components = len(coar.find_components(model, args.granularity))
        parts = method.parts(Size(n_components, args.ablated_fraction))
        run = gated(model, example, method)
        found = plan(model, example, args.examples, n_components, parts, args.batch_size, args.devices, run)
        hours = duration(found.seconds(args.teraflops * 1e12))
        parts.append(f"{args.model} on {args.dataset}\n{found}\ntime        {hours} at {args.teraflops:g} TFLOP/s each")
    if args.table:
        assumed = (
            f"Assumed of every device: {args.teraflops:g} TFLOP/s of the model's own operations; batches of 32; images "
            "of 224 × 224, 256 tokens for GPT-2, 512 for the 8B model, whose weights are bfloat16. Nothing was run."
        )
        parts.append("\n".join([*table(args.teraflops), "", assumed]))
    if args.check:
        lines, worst = check()
        parts.append(
            "\n".join([*lines, "", f"worst factor {worst:.2f} (limit 1.5), demo model, one thread of two cores"])
        )
    sys.stdout.write("\n\n".join(parts) + "\n")
    if args.write:
        title = f"# Cost on paper\n\n    python scripts/plan.py {' '.join(sys.argv[1:])}\n\n"
        files.write_bytes(RESULTS, (title + "\n\n".join(parts) + "\n").encode())
    return int(worst > 1.5)


if __name__ == "__main__":
    sys.exit(main())
