"""Edit 5 of the paper: make CLIP's zero-shot classification robust against words written into the picture.

    python scripts/edit_typographic.py

Twelve minutes with one thread. A small `CLIPModel` is trained here on garments and captions; seven in ten training
pictures carry the written name of their class, anywhere and of any size, so that it learns to read. The attack writes
the name of another class, which covers a part of the garment as often as not. Beside the edits stands what needs none:
the middle of the picture alone.
Held-out training images are attributed with the attack and without: the attacked ones are to rise, the clean ones to
stay. The paper's own set-up, where the Hub can be reached:

    python scripts/edit_typographic.py --model openai/clip-vit-base-patch32 --data frgfm/imagenette \\
        --split "train[:1500]"

The model is attributed anew after every eight units that go. Rule and number of components are chosen on validation:
the highest accuracy under attack that loses at most 1.5 points without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import edit_common as common
import edit_tasks as tasks
import torch
import torch.nn.functional as F
from edit_common import logger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import editing

OURS, AT_ONCE = "in steps of 8, rule and k by validation", "at once, rule and k by validation"
WELCH = "Welch, k by validation (paper)"
CROP = "no edit, pictures cropped"
RULES, STEP = ("covariance", "covariance_careful"), 8
RULES_AT_ONCE = (*RULES, "hinge", "welch")
NAMES = ("tee", "pants", "jumper", "dress", "coat", "sandal", "shirt", "shoe", "bag", "boot")
TEMPLATES = ("a photo of a {}", "a picture of the {}", "this is a {}")
SIZE, LETTERS = 40, (8, 10, 12)  # pixels: the picture, and letters
CROPS = (0.9, 0.8, 0.7, 0.6, 0.5)  # of a side
WRITTEN = 0.7
WITHIN = 0.015
FEW = 15  # pairs for leave-one-out


# ---------------------------------------------------------------------------------------------- pictures and captions


@cache
def word(name: str, size: int) -> Tensor:
    """A written word on a dark label, uint8 [height, width]; letters of that many pixels."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(name))
    image = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), name, fill=255, font=font)
    return torch.tensor(list(image.get_flattened_data()), dtype=torch.uint8).view(image.height, image.width)


def pictures(images: Tensor, words: Sequence[int | None], seed: int, moving: bool = True) -> Tensor:
    """Raw garments [images, 1, 28, 28] in the middle of larger pictures, with names of classes over them; normalised.

    Args:
        images: uint8.
        words: the class whose name is written, None for none.
        seed: of the places and sizes of the words.
        moving: whether words are anywhere and of any size, or at the lower left and small; the latter are easier to
            read.
    """
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.zeros(len(images), 1, SIZE, SIZE, dtype=torch.uint8)
    canvas[:, :, 6:34, 6:34] = images
    draws = torch.rand(len(images), 3, generator=generator)
    for row, label in enumerate(words):
        if label is not None:
            across, down, size = draws[row].tolist() if moving else (0.0, 1.0, 0.0)
            letters = word(NAMES[label], LETTERS[int(size * len(LETTERS))])[:SIZE, :SIZE]
            height, width = letters.shape
            y, x = round(down * (SIZE - height)), round(across * (SIZE - width))
            canvas[row, 0, y : y + height, x : x + width] = letters
    return tasks.normalised(canvas).expand(-1, 3, -1, -1)


def cropped(examples: common.Examples, share: float, enlarged: bool) -> common.Examples:
    """The middle of every picture alone, enlarged or in its place: what one does without touching the model."""
    pixels = examples["pixel_values"]
    whole = pixels.shape[-1]
    edge = round(whole * (1 - share) / 2)
    middle = pixels[..., edge : whole - edge, edge : whole - edge]
    if enlarged:
        middle = F.interpolate(middle, (whole, whole), mode="bilinear", antialias=True)
    else:
        middle = F.pad(middle, (edge, edge, edge, edge), value=float(pixels.min()))
    return {**examples, "pixel_values": middle}


def other_labels(labels: Tensor, seed: int) -> list[int]:
    """A wrong class for every image."""
    shift = torch.randint(1, len(NAMES), (len(labels),), generator=torch.Generator().manual_seed(seed))
    return ((labels + shift) % len(NAMES)).tolist()


# CLIP takes what it knows of a caption from its last token.
VOCABULARY = {w: i for i, w in enumerate(("<pad>", "<start>", *sorted({
    *NAMES, *(w for template in TEMPLATES for w in template.format("").split())
}), "<end>"))}  # fmt: skip


def captions(labels: Sequence[int], templates: Sequence[int]) -> Tensor:
    """Word numbers int64 [captions, 8]."""
    rows = []
    for label, template in zip(labels, templates, strict=True):
        words = TEMPLATES[template].format(NAMES[label]).split()
        tokens = [VOCABULARY["<start>"], *(VOCABULARY[w] for w in words), VOCABULARY["<end>"]]
        rows.append(tokens + [0] * (8 - len(tokens)))
    return torch.tensor(rows)


# --------------------------------------------------------------------------------------------------------- the model


class ZeroShot(nn.Module):
    """A CLIPModel as a classifier: logits are scaled cosines between a picture and one caption a class."""

    def __init__(self, clip: nn.Module, texts: dict[str, Tensor], n_classes: int) -> None:
        """Captions are grouped by class: as many for each; their mean stands for it."""
        super().__init__()
        self.clip = clip
        with torch.no_grad():
            features = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
        self.register_buffer("captions", F.normalize(features.view(n_classes, -1, features.shape[-1]).mean(1), dim=-1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[pictures, classes]."""
        features = F.normalize(self.clip.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
        return self.clip.logit_scale.exp() * features @ self.captions.T


def small_clip() -> nn.Module:
    """Untrained: three layers of width 64 see 16 patches; two layers read the captions."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": VOCABULARY["<end>"],
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 10,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def zero_shot(clip: nn.Module) -> ZeroShot:
    """With all captions of each class."""
    labels = [label for label in range(len(NAMES)) for _ in TEMPLATES]
    tokens = captions(labels, list(range(len(TEMPLATES))) * len(NAMES))
    return ZeroShot(clip.eval(), {"input_ids": tokens, "attention_mask": (tokens > 0).long()}, len(NAMES)).eval()


def trained_clip(
    folder: Path, images: Tensor, labels: Tensor, seed: int, steps: int, batch: int = 64, share: float = WRITTEN,
    moving: bool = True,
) -> nn.Module:  # fmt: skip
    """From the folder if it is there."""
    from transformers import CLIPModel

    if (folder / "model.safetensors").is_file():
        return CLIPModel.from_pretrained(folder).eval()
    started = time.monotonic()
    torch.manual_seed(seed)
    model, generator = small_clip().train(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.15)
    classes = list(range(len(NAMES)))
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        written = torch.rand(batch, generator=generator) < share
        words = [int(label) if there else None for label, there in zip(labels[rows], written, strict=True)]
        # One caption a class: pictures of one class share it, so that no caption is a wrong one by mistake.
        tokens = captions(classes, torch.randint(len(TEMPLATES), (len(NAMES),), generator=generator).tolist())
        output = model(
            input_ids=tokens,
            attention_mask=(tokens > 0).long(),
            pixel_values=pictures(images[rows], words, step, moving),
        )
        loss = F.cross_entropy(output.logits_per_image, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    figures = {
        "seed": seed,
        "steps": steps,
        "loss": round(loss.item(), 4),
        "seconds": round(time.monotonic() - started),
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    logger.info("trained %s: %s", folder, figures)
    return model


def pairs(images: Tensor, labels: Tensor, seed: int, moving: bool = True) -> common.Examples:
    """The same pictures without a word and with the name of another class."""
    nothing, others = [None] * len(images), other_labels(labels, seed)
    clean, attacked = pictures(images, nothing, seed), pictures(images, others, seed, moving)
    return {"clean": clean, "attacked": attacked, "labels": labels}


def prepared(
    args: argparse.Namespace, seed: int, steps: int = 3000
) -> tuple[nn.Module, common.Examples, common.Examples, common.Examples]:
    """The zero-shot classifier; pairs to attribute, to choose on and to judge on."""
    (images, labels), test = (tasks.raw_fashion_mnist(args.fashion_mnist, part) for part in ("train", "t10k"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    training, attributed, validation = order[:50_000], order[50_000:50_400], order[51_000:54_000]
    clip = trained_clip(args.runs / f"clip-{seed}", images[training], labels[training], seed, steps)
    chosen = (pairs(images[rows], labels[rows], seed + n) for n, rows in ((11, attributed), (12, validation)))
    return zero_shot(clip), *chosen, pairs(test[0][:4000], test[1][:4000], seed + 13)


def from_the_hub(
    args: argparse.Namespace, seed: int
) -> tuple[nn.Module, common.Examples, common.Examples, common.Examples]:
    """A CLIPModel and labelled images of the Hub; the attack writes across the lower part of the image."""
    import datasets
    from transformers import AutoProcessor, CLIPModel

    clip, processor = CLIPModel.from_pretrained(args.model), AutoProcessor.from_pretrained(args.model)
    data = datasets.load_dataset(args.data, split=args.split).shuffle(seed=seed)
    names = data.features["label"].names
    texts = processor(text=[f"a photo of a {name}" for name in names], padding=True, return_tensors="pt")
    model = ZeroShot(clip.eval(), dict(texts), len(names)).eval()
    labels = torch.tensor(data["label"])
    shift = torch.randint(1, len(names), (len(labels),), generator=torch.Generator().manual_seed(seed))

    def attacked(image: Image.Image, name: str) -> Image.Image:
        image = image.convert("RGB").resize((224, 224))
        ImageDraw.Draw(image).text((8, 170), name, fill="white", font=ImageFont.load_default(36), stroke_width=3,
                                   stroke_fill="black")  # fmt: skip
        return image

    wrong = ((labels + shift) % len(names)).tolist()
    clean = [image.convert("RGB").resize((224, 224)) for image in data["image"]]
    written = [attacked(image, names[label]) for image, label in zip(clean, wrong, strict=True)]
    sides = {
        name: processor(images=images, return_tensors="pt")["pixel_values"]
        for name, images in (("clean", clean), ("attacked", written))
    }
    both, third = {**sides, "labels": labels}, len(labels) // 3
    return model, *({k: v[i * third : (i + 1) * third] for k, v in both.items()} for i in range(3))


# ---------------------------------------------------------------------------------------------------------- the edit


def side(examples: common.Examples, name: str, rows: Any = slice(None)) -> common.Examples:
    """One side of the pairs, as the model takes it."""
    return {"pixel_values": examples[name][rows], "labels": examples["labels"][rows]}


def run(
    model: nn.Module,
    attributed: common.Examples,
    validation: common.Examples,
    test: common.Examples,
    seed: int,
    n_pairs: int = 200,
    singles: bool = True,
    rounds: int = 4,
    step: int = STEP,
) -> dict[str, Any]:
    """The edit of one seed.

    Args:
        model: a `ZeroShot`.
        attributed: pairs.
        validation: pairs to choose on.
        test: pairs to judge on.
        seed: of the attributions.
        n_pairs: the first so many are attributed.
        singles: also measure leave-one-out.
        rounds: of the attributions that are made once.
        step: components between two of the others.

    Returns:
        "before" and every method: {attacked, clean, k, rule}; and "edited".
    """
    components = coar.find_components(model, include=["clip.vision_model*"])
    n_pairs = min(n_pairs, len(attributed["labels"]))
    data = [
        batch
        for name in ("attacked", "clean")
        for batch in common.batches(side(attributed, name, slice(n_pairs)), size=50)
    ]

    def attributing(rounds: int = 0) -> Any:
        return lambda it: common.attribute(it, data, components, seed, "margin", rounds)

    whole = attributing(rounds)(model)
    sides = {"increase": range(n_pairs), "reference": range(n_pairs, 2 * n_pairs)}
    clean = editing.Keep(editing.accuracy(common.batches(side(validation, "clean"))), WITHIN)
    goals = {"validation": editing.accuracy(common.batches(side(validation, "attacked"))), "constraint": clean}
    edits = {
        OURS: coar.edit(model, attributing(), **sides, rule=RULES, step=step, **goals),
        AT_ONCE: common.edited_if_any(model, whole, **sides, rule=RULES_AT_ONCE, **goals),
    }
    finals = {name: common.batches(side(test, name)) for name in ("attacked", "clean")}

    def row(edited: nn.Module, k: int = 0, rule: str = "") -> dict[str, Any]:
        shares = {name: common.share_right(edited, one) for name, one in finals.items()}
        return {**shares, "k": k, "rule": rule}

    methods = {"before": row(model)}
    for method, edited in edits.items():
        if edited is not None:
            entries = coar.models.record(edited)["edit"]
            methods[method] = row(edited, len(entries["indices"]), entries["rule"])
    k, rule = methods[OURS]["k"], methods[OURS]["rule"]
    weights = common.baseline_weights(model, data, components, "margin", singles=False)
    rankings = {WELCH: editing.rank_components(whole, **sides)}
    rankings |= common.baseline_rankings(model, components, weights, sides, rule, seed)
    if singles:
        few = [side(attributed, name, slice(FEW)) for name in ("attacked", "clean")]
        on_few = {"increase": range(FEW), "reference": range(FEW, 2 * FEW)}
        rankings[common.SINGLES] = common.single_ranking(model, few, components, on_few, rule)
    counts: dict[str, int | None] = dict.fromkeys(rankings, k)
    counts[WELCH] = common.chosen_of(model, components, rankings[WELCH], **goals)
    for name, ranking in rankings.items():
        count = counts[name]
        if count is not None:
            methods[name] = common.measured(model, components, ranking, count, lambda it, n=count: row(it, n))

    def loss(tuned: nn.Module) -> Tensor:
        return torch.stack([F.cross_entropy(tuned(one["pixel_values"]), one["labels"]) for one in data]).mean()

    tuned = common.fine_tuned(model, loss, **goals, rates=(1e-4, 1e-3), checkpoints=(1, 2, 4, 8, 16))
    if tuned is not None:
        methods[common.TUNING] = row(tuned)
    crop = crop_row(model, validation, test)
    if crop is not None:
        methods[CROP] = crop
    return {"n_components": len(components), "edited": edits[OURS], "methods": methods}


def crop_row(model: nn.Module, validation: common.Examples, test: common.Examples) -> dict[str, Any] | None:
    """Figures of the crop that is best under attack on validation and keeps the limit there; None where none does."""

    def shares(examples: common.Examples, *crop: Any) -> dict[str, float]:
        return {
            name: common.share_right(model, common.batches(cropped(side(examples, name), *crop)))
            for name in ("attacked", "clean")
        }

    least = shares(validation, 1.0, False)["clean"] - 100 * WITHIN
    found = {crop: shares(validation, *crop) for crop in itertools.product(CROPS, (False, True))}
    kept = [crop for crop, one in found.items() if one["clean"] >= least]
    if not kept:
        return None
    share, enlarged = best = max(kept, key=lambda crop: found[crop]["attacked"])
    rule = f"{share:.0%} of a side, {'enlarged' if enlarged else 'the rest dark'}"
    return {**shares(test, *best), "k": 0, "rule": rule}


def recovered(after: dict[str, float], before: dict[str, float]) -> float:
    """The part of what the attack takes that comes back, in percent."""
    return 100 * (after["attacked"] - before["attacked"]) / (before["clean"] - before["attacked"])


def summary(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method."""
    rows = []
    for method in common.methods_of(found):
        pairs_ = common.against_before(found, method)
        edited = method != "before"
        rows.append([
            common.said(method, len(pairs_), len(found)), common.counts(pairs_),
            common.spread([after["attacked"] for after, _ in pairs_]),
            common.spread([recovered(*pair) for pair in pairs_]) if edited else "",
            common.spread([after["clean"] for after, _ in pairs_]),
            common.spread([after["clean"] - before["clean"] for after, before in pairs_], 2) if edited else "",
        ])  # fmt: skip
    return rows


def of_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One model."""
    parts = from_the_hub(args, seed) if args.model else prepared(args, seed)
    return run(*parts, seed, singles=not args.model)


def report(args: argparse.Namespace, found: list[dict[str, Any]], started: float) -> None:
    """Write everything."""
    points = {
        method: [(one["methods"][method]["attacked"], one["methods"][method]["clean"]) for one in found
                 if method in one["methods"]]
        for method in common.methods_of(found)
    }  # fmt: skip
    figure = common.two_panels(
        points, ("zero-shot accuracy under attack (%)", "without attack (%)"),
        "CLIP, and the name of another class written into the picture", "one dot a seed", (None, None), OURS,
    )  # fmt: skip
    picture = common.save_figure(args, "typographic", figure)
    rules = "; ".join(one["methods"][OURS]["rule"] for one in found)
    head = ["components chosen by", "k", "attacked (%)", "of the loss recovered (%)", "clean (%)", "change"]
    text = (
        f"# Typographic attack\n\nZero-shot accuracy of a CLIPModel ({found[0]['n_components']} units in the vision "
        "tower) on test images that nothing was chosen on. Targets: at least half of what the attack takes comes back, "
        "clean accuracy down by ≤ 2 points. The baselines ablate as many components as the first row, by its rule "
        f"where they give weights. Chosen by validation: {rules}. Mean ± standard deviation over the seeds.\n\n"
        f"{common.table(head, summary(found))}\n\n![attack](typographic.png)\n"
    )
    common.write(args, "typographic", text, found, started)
    before, after = (found[0]["methods"][name] for name in ("before", OURS))
    figures = [
        ("zero-shot accuracy under attack", f"{before['attacked']:.1f}%", f"{after['attacked']:.1f}%"),
        ("zero-shot accuracy without attack", f"{before['clean']:.1f}%", f"{after['clean']:.1f}%"),
    ]
    common.card(args, "edited_typographic", found[0]["edited"], figures, picture)
    found[0]["edited"].clip.save_pretrained(args.runs / "edited" / "clip")  # loads with CLIPModel.from_pretrained


if __name__ == "__main__":
    common.main(__doc__, of_seed, summary, report)
