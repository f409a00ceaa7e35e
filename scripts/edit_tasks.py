"""Models and data of the edits: Fashion-MNIST with backgrounds, triggers and written names, and what is trained on it.

Everything trained is kept in a folder, so that a second run of a script trains nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from edit_common import Examples, in_memory
from timm.models import save_for_hf
from torch import Tensor, nn
from train_demo_model import MODEL_ARGS, read_split

import hf_coar as coar
from hf_coar import models

logger = logging.getLogger("edits")

MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels; the embedded model expects them
DEMO = Path(coar.__file__).parent / "demo"


def normalised(images: Tensor) -> Tensor:
    """Bytes or fractions [images, channels, height, width] as the models want them."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - MEAN) / STD


def raw_fashion_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [images, 1, 28, 28] and labels int64 [images] of "train" or "t10k".

    Where there is no folder with the raw files, the 2,000 test images that come with hf_coar are divided: 1,200 stand
    for the training images. Enough to try a script, and for tests.
    """
    if folder.is_dir():
        images, labels = (torch.from_numpy(np.array(array)) for array in read_split(folder, part))
        return images[:, None], labels.long()
    logger.warning("no folder %s: taking some of the 2,000 images that come with hf_coar", folder)
    rows = datasets.Dataset.from_parquet(str(DEMO / "images.parquet"), keep_in_memory=True)
    rows = rows.select(range(1200) if part == "train" else range(1200, len(rows)))
    images = np.stack([np.array(image) for image in rows["image"]])
    return torch.from_numpy(images)[:, None], torch.tensor(rows["label"])


def fashion_mnist(folder: Path) -> tuple[Examples, Examples]:
    """Training and test images [images, 1, 28, 28], normalised, as the embedded model takes them."""
    parts = (raw_fashion_mnist(folder, part) for part in ("train", "t10k"))
    train, test = ({"pixel_values": normalised(images), "labels": labels} for images, labels in parts)
    return train, test


def classifier(args: argparse.Namespace, seed: int) -> tuple[nn.Module, Examples, Examples]:
    """A trained classifier, examples to attribute and examples to choose and judge on.

    With `--model` and `--data` those of the Hub; otherwise one of the convnets on Fashion-MNIST: the embedded one for
    seed 0, and `--models` (a folder of `train_demo_model.py --out`) in turn for the others.
    """
    if getattr(args, "model", None):
        model, data = coar.load(args.model, data=args.data, split=args.split, batch_size=50)
        examples = in_memory(data)
        order = torch.randperm(len(examples["labels"]), generator=torch.Generator().manual_seed(seed))
        third = len(order) // 3
        parts = ({k: v[rows] for k, v in examples.items()} for rows in (order[:third], order[third:]))
        return model, *parts
    folders = [DEMO / "model", *[folder / "model" for folder in getattr(args, "models", ())]]
    return models.load_model(folders[seed % len(folders)]), *fashion_mnist(args.fashion_mnist)


# ---------------------------------------------------------------------------------------------------------- training


WIDE = {**MODEL_ARGS, "layers": [1, 1, 1, 0], "channels": [64, 128, 160, 160]}  # 1,088 filters, twice the operations


def convnet(n_channels: int, n_classes: int, wide: bool = False) -> nn.Module:
    """The demo's residual network, untrained: 832 filters; or a wider one with fewer layers."""
    shape = {**(WIDE if wide else MODEL_ARGS), "in_chans": n_channels, "num_classes": n_classes}
    config = {
        "architecture": "resnet18", "num_classes": n_classes, "input_size": (n_channels, 28, 28), "mean": (MEAN,),
        "std": (STD,), "first_conv": "conv1.0", "classifier": "fc",
    }  # fmt: skip
    model = timm.create_model("resnet18", pretrained=False, pretrained_cfg=config, **shape)
    model.built_with = shape  # what its config.json needs
    return model


def trained(
    folder: Path, seed: int, build: Callable[[], nn.Module], examples: Tensor | Examples, labels: Tensor,
    epochs: float, rate: float = 0.1, adam: bool = False,
) -> nn.Module:  # fmt: skip
    """A network trained on examples as it takes them, by SGD with momentum or AdamW; from the folder if it is there."""
    if (folder / "model.safetensors").is_file():
        return models.load_model(folder)
    examples = {"pixel_values": examples} if isinstance(examples, Tensor) else examples
    started, batch = time.monotonic(), 128
    torch.manual_seed(seed)
    model = build().train()
    generator = torch.Generator().manual_seed(seed)
    steps = int(epochs * len(labels) / batch)
    decay = 0.05 if adam else 5e-4
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimiser = (
        torch.optim.AdamW(groups, lr=rate) if adam else torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(int(epochs) + 1)])
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        loss = F.cross_entropy(_logits(model, {name: value[rows] for name, value in examples.items()}), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.eval().save_pretrained(folder)
    else:
        save_for_hf(model.eval(), str(folder), model_args=getattr(model, "built_with", None), safe_serialization=True)
    figures = {
        "seed": seed,
        "epochs": epochs,
        "loss": round(loss.item(), 4),
        "seconds": round(time.monotonic() - started),
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    logger.info("trained %s: %s", folder, figures)
    return models.load_model(folder)


def _logits(model: nn.Module, examples: Examples) -> Tensor:
    """timm's models take images and return logits; transformers' take names and return an output."""
    return model(**examples).logits if hasattr(model, "save_pretrained") else model(examples["pixel_values"])


# ----------------------------------------------------------------------------------------------- backdoor and subgroups


def with_trigger(images: Tensor) -> Tensor:
    """Raw images with a 3 × 3 chequered patch in the lower right corner."""
    patched = images.clone()
    patched[..., -4:-1, -4:-1] = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    return patched


def backgrounds(n_images: int, kinds: Tensor, seed: int) -> Tensor:
    """Two textures [images, 3, 28, 28], fractions: 0 = bluish waves across, 1 = greenish stripes upright.

    Phase, wavelength and brightness vary from image to image.
    """
    generator = torch.Generator().manual_seed(seed)
    phase, length, bright = torch.rand(3, n_images, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    along = torch.where(kinds[:, None, None] == 0, y, x)
    wave = 0.5 + 0.5 * torch.sin(2 * torch.pi * (along / (4 + 4 * length) + phase))
    wave = (0.25 + 0.45 * bright) * (0.4 + 0.6 * wave)
    colours = torch.tensor([[0.3, 0.5, 0.9], [0.4, 0.9, 0.4]])[kinds]
    return colours[:, :, None, None] * wave[:, None] + 0.04 * torch.randn(n_images, 3, 28, 28, generator=generator)


def on_background(images: Tensor, kinds: Tensor, seed: int) -> Tensor:
    """Raw garments [images, 1, 28, 28] in front of a background, normalised [images, 3, 28, 28]."""
    garment = images.float() / 255
    cover = (garment * 4).clamp(0, 1)  # the outline is soft
    return normalised(cover * garment + (1 - cover) * backgrounds(len(images), kinds, seed).clamp(0, 1))
