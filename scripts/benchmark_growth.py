"""Accuracy against cost as models grow: one family of vision transformers, from 500 to 8,000 components.

Every model has four blocks and is trained on the demo's images for some epochs; images that it was not trained on are
attributed by the path gradient and by regression at fixed costs, and judged on fresh masks at 5 % ablated. One line a
model is written as it goes, and what has a line is not done again; `report` makes the table.

    python scripts/benchmark_growth.py run /tmp/growth               # ten minutes with one thread
    python scripts/benchmark_growth.py run /tmp/growth --language SmolLM2-135M    # a folder of it; a quarter hour more
    python scripts/benchmark_growth.py report /tmp/growth            # writes scripts/results/growth.md
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_coar as coar
from hf_coar import demo, models

RESULT = Path(__file__).resolve().parent / "results" / "growth.md"
WIDTHS = (12, 24, 48, 96, 192)
METHODS = {
    "path gradient": (coar.PathGradient(rounds=0), coar.PathGradient(rounds=2), coar.PathGradient(rounds=4)),
    "regression": (coar.Regression(n_masks=61, solver=coar.ARD()), coar.Regression(n_masks=240, solver=coar.ARD())),
}  # fmt: skip
SIZES = ("one pass", "path gradient, 2 rounds", "4 rounds", "regression, 61 masks", "240 masks")
ATTRIBUTED, N_MASKS = 16, 40
logger = logging.getLogger("benchmark_growth")


def images() -> tuple[Tensor, Tensor]:
    """The demo's images as its own model reads them, and labels."""
    _, data = coar.load(demo.MODEL, demo.IMAGES)
    batches = list(data.with_batch_size(500))
    return tuple(torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))


def trained(width: int, pixels: Tensor, labels: Tensor, epochs: int = 12) -> nn.Module:
    """A vision transformer of four blocks."""
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "depth": 4, "embed_dim": width, "num_heads": max(1, width // 24)}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=pixels.shape[1], num_classes=10, **sizes)
    steps = epochs * len(labels) // 64
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[some]), labels[some]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def judged(model: nn.Module, batch: dict[str, Tensor], exclude: list[str] | None = None) -> dict[str, Any]:
    """Costs and correlations of all methods."""
    components, found = coar.find_components(model, exclude=exclude), {}
    for family, methods in METHODS.items():
        found[family] = []
        for method in methods:
            start = time.process_time()
            attributions = coar.attribute(model, [batch], components, method=method, progress=False)
            seconds = time.process_time() - start
            report = coar.evaluate(attributions, model, [batch], fractions=(0.05,), n_masks=N_MASKS, progress=False)
            found[family].append([attributions.provenance.cost, report.correlation[0.05], seconds])
    return {"components": len(components), "methods": found}


def of_width(width: int) -> dict[str, Any]:
    """One vision transformer."""
    pixels, labels = images()
    model = trained(width, pixels[:-200], labels[:-200])
    with torch.no_grad():
        right = float((model(pixels[-200:]).argmax(1) == labels[-200:]).float().mean())
    batch = {"pixel_values": pixels[-ATTRIBUTED:], "labels": labels[-ATTRIBUTED:]}
    return {"name": f"ViT, width {width}", "accuracy": right, **judged(model, batch)}


def of_language(folder: str) -> dict[str, Any]:
    """A causal language model in a folder, on lines of this script."""
    from transformers import AutoTokenizer

    model = models.load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (__doc__ or "").split(". ")[:4]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = dict(tokenizer(lines, padding=True, truncation=True, max_length=48, return_tensors="pt"))
    return {"name": Path(folder).name, "accuracy": None, **judged(model, batch)}


def run(folder: Path, language: str | None) -> None:
    """All models that have no line yet."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "growth.jsonl"
    done = {json.loads(line)["name"] for line in table.read_text().splitlines()} if table.exists() else set()
    jobs: list[tuple[str, Any]] = [(f"ViT, width {width}", lambda width=width: of_width(width)) for width in WIDTHS]
    jobs += [(Path(language).name, lambda: of_language(language))] if language else []
    for name, job in jobs:
        if name not in done:
            result = job()
            logger.info("%s", result)
            with table.open("a") as lines:
                lines.write(json.dumps(result) + "\n")


def report(folder: Path) -> str:
    """The table."""
    entries = [json.loads(line) for line in (folder / "growth.jsonl").read_text().splitlines()]
    head = " | ".join(SIZES)
    rows = [
        "# Growth",
        "",
        f"Made by `scripts/benchmark_growth.py` with torch {torch.__version__} on {platform.machine()}, one thread. "
        f"Vision transformers of four blocks, trained on 1,800 of the demo's images; {ATTRIBUTED} others are "
        f"attributed. Correlation of predicted and measured margins over {N_MASKS} fresh masks, 5 % ablated, mean over "
        "the images, and in brackets the cost, in forward passes an image (measured effects are part of it, and their "
        "number grows with the components). SmolLM2 is attributed on four texts of 48 tokens."
        + ("" if any(entry["accuracy"] is None for entry in entries) else " SmolLM2 (`--language`) was not run."),
        "",
        f"| model | components | accuracy | {head} |",
        "|---|---|---|" + "---|" * len(SIZES),
    ]
    for entry in entries:
        values = " | ".join(f"{row[1]:.3f} ({row[0]:g})" for rows_ in entry["methods"].values() for row in rows_)
        said = "" if entry["accuracy"] is None else f"{entry['accuracy']:.2f}"
        rows.append(f"| {entry['name']} | {entry['components']:,} | {said} | {values} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language", help="folder of a causal language model, such as SmolLM2")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("hf_coar").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    if arguments.step == "run":
        run(arguments.folder, arguments.language)
    else:
        RESULT.write_text(report(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
