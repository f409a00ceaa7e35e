"""Make the demo that ships with hf_coar: a small trained timm convnet and 2,000 real test images.

Reads the four raw Fashion-MNIST files, trains a small residual network on the 60,000 training images and writes
into the output folder:

    images.parquet   2,000 test images, 200 of each class (columns: image, label)
    model/           config.json and model.safetensors in timm's own format, for timm.create_model("local-dir:...")
    metrics.json     what was trained, for how long, and how accurate it is

The test images play no part in training, and no setting was chosen by looking at them.

Command to paste, from the root of the repository (about six minutes on two CPU cores; the Debian package
dataset-fashion-mnist installs the raw files into the folder that is the default):

    python scripts/train_demo_model.py --fashion-mnist /usr/share/datasets/fashion-mnist --out hf_coar/demo
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger("train_demo_model")

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SIZE = 28
IMAGES_PER_CLASS = 200

ARCHITECTURE = "resnet18"
# Chosen for few operations and few bytes: the 3x3 stem and its max pooling bring 28x28 down to 7x7 at once.
# The last stage has no blocks because it would work on 1x1 maps, where eight of the nine weights of each 3x3
# kernel only ever meet padding; its channel number must then repeat the one before it, for the classifier.
MODEL_ARGS: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": len(CLASS_NAMES),
    "layers": [2, 2, 2, 0],
    "channels": [32, 56, 72, 72],
    "stem_type": "deep",
    "stem_width": 16,
}

BATCH_SIZE = 256
EVAL_BATCH_SIZE = 1000
PEAK_LR = 0.2
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
CROP_PADDING = 2


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder with train-images-idx3-ubyte.gz and the three files beside it (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("hf_coar/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads torch may use (default: %(default)s)")
    return parser.parse_args()


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes (the MNIST format)."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    # Magic number: two zero bytes, the element type (8 is unsigned byte), the number of dimensions.
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    dims = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=dims, offset=4).astype(int)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 28, 28) and labels (N,) of one split; prefix is "train" or "t10k"."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if images.shape != (len(labels), IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"{folder}: {prefix} images {images.shape} and labels {labels.shape} do not belong together")
    return images, labels


def to_png(image: np.ndarray) -> bytes:
    """Encode one grey image losslessly, as small as PNG allows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def choose_balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Draw the same number of images of each class, without repeats, and shuffle them."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(len(CLASS_NAMES))]
    return rng.permutation(np.concatenate(chosen))


def as_dataset(images: np.ndarray, labels: np.ndarray) -> datasets.Dataset:
    """Wrap raw images and labels as a dataset with named classes and PNG-encoded images."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))},
    )
    rows = {
        "image": [{"bytes": to_png(image), "path": None} for image in images],
        "label": labels.tolist(),
    }
    return datasets.Dataset.from_dict(rows, features=features)


def build_model(mean: float, std: float) -> nn.Module:
    """Create the untrained network, with a pretrained_cfg of its own.

    Without one, timm would attach the card of its ImageNet resnet18 (licence, paper, 224x224 inputs) to our weights.
    """
    pretrained_cfg = {
        "architecture": ARCHITECTURE,
        "tag": "hf_coar_demo_fashion_mnist",
        "num_classes": len(CLASS_NAMES),
        "label_names": list(CLASS_NAMES),
        "input_size": (1, IMAGE_SIZE, IMAGE_SIZE),
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (mean,),
        "std": (std,),
        "first_conv": "conv1.0",
        "classifier": "fc",
        "description": "Demo network of hf_coar, trained from scratch on the Fashion-MNIST training images.",
    }
    return timm.create_model(ARCHITECTURE, pretrained=False, pretrained_cfg=pretrained_cfg, **MODEL_ARGS)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Turn uint8 images (B, 28, 28) into what timm's evaluation transform would give: (B, 1, 28, 28) floats."""
    return images.unsqueeze(1).float().div_(255).sub_(mean).div_(std)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each uint8 image by up to CROP_PADDING pixels and mirror half of them, in one indexing step."""
    batch = len(images)
    padded = nn.functional.pad(images, [CROP_PADDING] * 4)
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    pixels = torch.arange(IMAGE_SIZE)
    rows = offsets[0] + pixels
    columns = offsets[1] + torch.where(mirrored, pixels.flip(0), pixels)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with weight decay on the weights proper, not on batch-norm parameters and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=PEAK_LR, momentum=MOMENTUM, nesterov=True)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, mean: float, std: float, epochs: int, generator: torch.Generator
) -> None:
    """One-cycle training with plain cross-entropy; leaves the model in evaluation mode."""
    # The smaller last batch of an epoch is left out: its batch-norm statistics would be noisier than the others.
    steps_per_epoch = len(images) // BATCH_SIZE
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LR, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    model.train()
    progress = tqdm(range(epochs), desc="training", unit="epoch")
    for _ in progress:
        order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * BATCH_SIZE]
        loss_sum = 0.0
        for index in order.split(BATCH_SIZE):
            batch = normalise(augment(images[index], generator), mean, std)
            loss = nn.functional.cross_entropy(
                model(batch.contiguous(memory_format=torch.channels_last)), labels[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        progress.set_postfix(loss=f"{loss_sum / steps_per_epoch:.4f}")
    model.eval()


@torch.inference_mode()
def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the most likely class of each input."""
    return torch.cat([model(batch).argmax(dim=1) for batch in inputs.split(EVAL_BATCH_SIZE)])


def predict_through_timm_transform(model: nn.Module, data: datasets.Dataset) -> Tensor:
    """Predict the way a user would: PIL images through the transform that timm derives from the model's config."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return predict(model, torch.stack([transform(image) for image in data["image"]]))


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions, to four places."""
    return round((predictions == labels).float().mean().item(), 4)


def accuracy_per_class(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Return, for each class, the share of its images that are recognised."""
    return {
        name: accuracy(predictions[labels == number], labels[labels == number])
        for number, name in enumerate(CLASS_NAMES)
    }


def count_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds of the convolutions and the classifier for one image."""
    total = 0

    def add(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if output.ndim == 4 else 1
        total += module.weight.numel() * positions

    counted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(add) for m in counted]
    with torch.inference_mode():
        model(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE))
    for hook in hooks:
        hook.remove()
    return total


def describe(model: nn.Module) -> dict[str, Any]:
    """Collect the architecture and its sizes for metrics.json."""
    filters = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds_per_image": count_multiply_adds(model),
        "conv_filters": sum(filters.values()),
        "conv_filters_per_layer": filters,
    }


def write_model(model: nn.Module, folder: Path) -> nn.Module:
    """Write the model in timm's format and return it as rebuilt from the folder alone."""
    save_for_hf(
        # The memory layout serves the training only; the file should hold plain contiguous tensors.
        model.to(memory_format=torch.contiguous_format),
        str(folder),
        model_config={"label_names": list(CLASS_NAMES)},
        model_args=MODEL_ARGS,
        safe_serialization=True,
    )
    # safetensors makes files that only their owner may read; inside an installed package others must, too.
    (folder / "model.safetensors").chmod(0o644)
    return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()


def write_images(images: np.ndarray, labels: np.ndarray, seed: int, path: Path) -> datasets.Dataset:
    """Write the shipped choice of test images and return it as read back from the file."""
    chosen = choose_balanced(labels, IMAGES_PER_CLASS, seed)
    as_dataset(images[chosen], labels[chosen]).to_parquet(path)
    features = as_dataset(images[:0], labels[:0]).features
    shipped = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    if shipped.features != features:
        raise RuntimeError(f"{path} lost its features: {shipped.features}")
    return shipped


def main() -> None:
    """Write the images, train and write the model, then measure what was written."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train_images, train_labels = read_split(args.fashion_mnist, "train")
    test_images, test_labels = read_split(args.fashion_mnist, "t10k")
    shipped = write_images(test_images, test_labels, args.seed, args.out / "images.parquet")
    logger.info("Wrote %d test images, %d of each class.", len(shipped), IMAGES_PER_CLASS)

    mean, std = round(float(train_images.mean() / 255), 4), round(float(train_images.std() / 255), 4)
    x_train, y_train = torch.tensor(train_images), torch.tensor(train_labels, dtype=torch.long)
    x_test, y_test = torch.tensor(test_images), torch.tensor(test_labels, dtype=torch.long)

    model = build_model(mean, std).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(args.seed)
    started = time.perf_counter()
    train(model, x_train, y_train, mean, std, args.epochs, generator)
    seconds = time.perf_counter() - started

    # Everything below is measured on what was written, not on what is in memory.
    model = write_model(model, args.out / "model")
    test_predictions = predict(model, normalise(x_test, mean, std))
    metrics = {
        **describe(model),
        "epochs": args.epochs,
        "seed": args.seed,
        "training_seconds": round(seconds),
        "threads": args.threads,
        "train_accuracy": accuracy(predict(model, normalise(x_train, mean, std)), y_train),
        "test_accuracy": accuracy(test_predictions, y_test),
        "test_accuracy_per_class": accuracy_per_class(test_predictions, y_test),
        "shipped_images": len(shipped),
        "shipped_images_accuracy": accuracy(
            predict_through_timm_transform(model, shipped), torch.tensor(shipped["label"])
        ),
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "timm": timm.__version__,
            "datasets": datasets.__version__,
        },
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    logger.info(
        "Trained for %d s. Accuracy: %.4f on the training images, %.4f on all test images, %.4f on those shipped.",
        metrics["training_seconds"],
        metrics["train_accuracy"],
        metrics["test_accuracy"],
        metrics["shipped_images_accuracy"],
    )


if __name__ == "__main__":
    main()
