"""A small CLIP that reads: shapes and words on generated pictures, and what it is attacked with.

Pictures [3, 24, 24] show a disc, a ring, a box or a plus in noise. On half of those that it is trained on, the first
letters of the shape's name are written anywhere, also across it; in an attack, those of another shape.
`scripts/tutorial_edits.py typographic` edits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

SHAPES = ("disc", "ring", "box", "plus")
WORDS = tuple(name[:2] for name in SHAPES)
SIZE, NOISE, GRID = 24, 0.3, 3  # pixels; words begin at multiples of the last
CAPTIONS = torch.tensor([[1, 2 + shape, 7] for shape in range(len(WORDS))])  # begin, the shape, end
N_TRAINED, N_EDITED, N_JUDGED = 6000, 32, 600

Pairs = tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]


@cache
def letters(word: str) -> Tensor:
    """A written word, 1 where there is ink, float32 [height, width]."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), word, fill=255, font=font)
    ink = torch.tensor(list(image.getdata())).view(bottom - top, right - left) / 255
    return ink[ink.sum(1) > 0]


def shape(kind: int, row: int, column: int, radius: int) -> Tensor:
    """A shape, 1 inside it, float32 [24, 24]."""
    down, right = torch.meshgrid(torch.arange(SIZE) - row, torch.arange(SIZE) - column, indexing="ij")
    distance, widest = (down**2 + right**2).float().sqrt(), torch.maximum(down.abs(), right.abs())
    return (
        distance <= radius,
        (distance <= radius) & (distance >= radius - 2),
        widest <= radius - 1,
        (widest <= radius) & (torch.minimum(down.abs(), right.abs()) <= 1),
    )[kind].float()


def pictures(labels: Tensor, words: Sequence[int | None], seed: int) -> Tensor:
    """Pictures of shapes with words on them, float32 [pictures, 3, 24, 24]; the same seed draws the same shapes."""
    draw, made = torch.Generator().manual_seed(seed), []
    for label, word in zip(labels.tolist(), words, strict=True):
        row, column = torch.randint(8, 16, (2,), generator=draw).tolist()
        radius = int(torch.randint(5, 8, (1,), generator=draw))
        picture = 0.6 * shape(label, row, column, radius) + NOISE * torch.randn(SIZE, SIZE, generator=draw)
        places = torch.rand(2, generator=draw)
        if word is not None:
            ink = letters(WORDS[word])
            top, left = (
                GRID * int(p * ((SIZE - n) // GRID + 1)) for p, n in zip(places.tolist(), ink.shape, strict=True)
            )
            picture[top : top + ink.shape[0], left : left + ink.shape[1]] += 1.6 * ink
        made.append(picture)
    return torch.stack(made)[:, None].expand(-1, 3, -1, -1)


def similarities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [pictures, shapes]: how well each caption goes with a picture."""
    return model(input_ids=CAPTIONS, pixel_values=batch["pixel_values"]).logits_per_image


class ZeroShot(nn.Module):
    """A CLIP as a classifier of shapes."""

    def __init__(self, clip: nn.Module) -> None:
        """Its captions are the four shapes."""
        super().__init__()
        self.clip = clip
        self.pretrained_cfg = {"label_names": SHAPES}  # what classes are called

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [pictures, shapes]."""
        return similarities(self.clip, {"pixel_values": pixel_values})


def trained(seed: int, steps: int = 800) -> nn.Module:
    """Two layers of width 64 that see 16 patches, and one that reads captions."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {
        "vocab_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 6,
    }  # fmt: skip
    model, draw = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)), torch.Generator()
    draw.manual_seed(seed)
    labels = torch.randint(len(WORDS), (N_TRAINED,), generator=draw)
    written = torch.rand(N_TRAINED, generator=draw) < 0.6
    words = [int(label) if there else None for label, there in zip(labels, written, strict=True)]
    pixels = pictures(labels, words, seed + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.15)
    for _ in range(steps):
        rows = torch.randint(N_TRAINED, (64,), generator=draw)
        optimiser.zero_grad()
        F.cross_entropy(similarities(model, {"pixel_values": pixels[rows]}), labels[rows]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def pairs(count: int, seed: int) -> Pairs:
    """The same pictures without a word, and with that of another shape."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(WORDS), (count,), generator=draw)
    wrong = (labels + torch.randint(1, len(WORDS), (count,), generator=draw)) % len(WORDS)
    clean, attacked = (pictures(labels, words, seed) for words in ([None] * count, wrong.tolist()))
    return tuple(
        [{"pixel_values": side[i : i + 100], "labels": labels[i : i + 100]} for i in range(0, count, 100)]
        for side in (clean, attacked)
    )


def prepared(seed: int) -> tuple[nn.Module, Pairs, Pairs]:
    """The classifier, pairs to edit by, and pairs to judge on."""
    return ZeroShot(trained(seed)), pairs(N_EDITED, seed + 10), pairs(N_JUDGED, seed + 20)
