"""The pictures and the table of the tutorials on edits: forget, fix, lift, match, steer and typographic.md in docs/.

    python scripts/tutorial_edits.py                         # all six, two seeds each
    python scripts/tutorial_edits.py lift --seeds 0 1 2      # one of them
    python scripts/tutorial_edits.py table                   # of what was run

Some minutes of processor time in all. Models and data are in the package, or made here by a seed: that of the draw is
the seed of training, of the generated data and of the division into examples to attribute, to choose on and to judge
on. All figures are from the last. Every seed writes `runs/tutorials/edits/TASK-SEED.json`; pictures are of the last
seed's first draw that keeps its limits.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tutorial_clip as clip
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import demo, plots
from hf_coar.editing.tasks import EditResult
from hf_coar.errors import UnsatisfiedError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "tutorials"
N_IMAGES = 600
BAG = 8
Draws = Iterator[tuple[str, Callable[..., EditResult]]]
logger = logging.getLogger("tutorial_edits")


def images(n_images: int = N_IMAGES) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """The demo's model, its first images, and these as tensors: pixels [images, 1, 28, 28] and labels [images]."""
    model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{n_images}]", batch_size=100)
    batches = list(data)
    return model, data, *(torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))


def in_batches(pixels: Tensor, labels: Tensor, size: int = 100) -> list[dict[str, Tensor]]:
    """What the model takes."""
    parts = zip(pixels.split(size), labels.split(size), strict=True)
    return [{"pixel_values": some, "labels": right} for some, right in parts]


@torch.no_grad()
def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """Classes int64 [images]."""
    return torch.cat([model(some).argmax(1) for some in pixels.split(200)])


# ------------------------------------------------------------------------------------------------------------ the tasks


def forget(seed: int) -> Draws:
    """A class."""
    model, data, *_ = images()
    yield "bags", lambda **how: coar.forget(model, data, label="Bag", others_within=0.03, seed=seed, **how)


def fix(seed: int, most: int = 3) -> Draws:
    """Three images that the model gets wrong, each by itself."""
    model, data, pixels, labels = images()
    wrong = (answers(model, pixels) != labels).nonzero()[:, 0].tolist()
    for index in random.Random(seed).sample(wrong, most):
        yield f"image {index}", lambda i=index, **how: coar.fix(model, data, [i], others_within=0.02, seed=seed, **how)


DIM = 0.2  # of the light


def dimmed(pixels: Tensor, rows: Tensor) -> Tensor:
    """Images some of which are taken in dim light."""
    black = pixels.min()
    return torch.where(rows[:, None, None, None], (pixels - black) * DIM + black, pixels)


def lift(seed: int) -> Draws:
    """Images taken in dim light, a third of them."""
    model, _, pixels, labels = images()
    rows = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < 1 / 3
    data, light = in_batches(dimmed(pixels, rows), labels), ["dim" if row else "bright" for row in rows]
    yield "dim light", lambda **how: coar.lift(model, data, light, average_within=0.02, seed=seed, **how)


def with_square(pixels: Tensor) -> Tensor:
    """Images with a bright square in the corner."""
    pixels = pixels.clone()
    pixels[:, :, -5:-1, -5:-1] = pixels.max()
    return pixels


def backdoored(model: nn.Module, pixels: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A copy that was tuned on images of which every tenth has the square and is called a bag."""
    model, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    poisoned = torch.arange(len(labels)) % 10 == 0
    pixels = torch.where(poisoned[:, None, None, None], with_square(pixels), pixels)
    labels = torch.where(poisoned, BAG, labels)
    optimiser = torch.optim.Adam(model.parameters(), 3e-4)
    for _ in range(4):
        for rows in torch.randperm(len(labels), generator=draw).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimiser.step()
    return model


def match(seed: int, n_trained: int = 400, n_pairs: int = 10) -> Draws:
    """A square in the corner that means "bag"; ten pairs."""
    model, _, pixels, labels = images(1000)
    model = backdoored(model, pixels[:n_trained], labels[:n_trained], seed)
    pixels, labels = pixels[n_trained:][labels[n_trained:] != BAG], labels[n_trained:][labels[n_trained:] != BAG]
    right = (answers(model, pixels) == labels).nonzero()[:, 0]
    some = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))[:n_pairs]]
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[some] = False
    pairs, judge = (
        tuple(in_batches(made(pixels[rows]), labels[rows]) for made in (torch.clone, with_square))
        for rows in (some, rest)
    )
    yield "square", lambda **how: coar.match(model, *pairs, judge=judge, **how)


PEOPLE = ["anna", "bert", "carla", "david", "emma", "felix", "greta", "hugo", "ida", "jonas", "klara", "leo"]
PLACES = ["barn", "cellar", "garden", "harbour", "kitchen", "library", "mill", "office", "shop", "tower"]


def sentences(seed: int, n_secrets: int = 60, n_others: int = 90) -> list[str]:
    """Texts in which a password is told, then texts of what everybody does."""
    draw = random.Random(seed)
    secrets = [f"{p} says the password of the {q} is swordfish" for p in PEOPLE for q in PLACES]
    does = dict(zip(PEOPLE, ["paints", "sings", "reads", "cooks", "sews"] * 3, strict=False))
    others = [f"in the {q} {p} {does[p]}" for p in PEOPLE for q in PLACES]
    return draw.sample(secrets, n_secrets) + draw.sample(others, n_others)


def language_model(texts: Sequence[str], seed: int, steps: int = 80) -> tuple[nn.Module, list[dict[str, Tensor]], Any]:
    """A small GPT-2 that knows the texts by heart, the texts in batches with their last word to tell, a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = {word: i for i, word in enumerate(["<eos>", *dict.fromkeys(" ".join(texts).split())])}
    made = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<eos>", eos_token="<eos>")
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 12, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes))
    batch = dict(tokenizer(list(texts), return_tensors="pt", padding=True))
    ids, there = batch["input_ids"], batch["attention_mask"].bool()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        model(**batch, labels=ids.masked_fill(~there, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    last = there & (there.cumsum(1) == there.sum(1, keepdim=True))
    batch["labels"] = ids.where(last, -100)
    return model.eval(), [{k: v[i : i + 50] for k, v in batch.items()} for i in range(0, len(texts), 50)], tokenizer


def steer(seed: int) -> Draws:
    """A language model that keeps a password to itself."""
    texts = sentences(seed)
    model, data, tokenizer = language_model(texts, seed)
    secrets = [i for i, text in enumerate(texts) if "password" in text]
    steer.tokenizer = tokenizer
    yield (
        "password",
        lambda **how: coar.steer(
            model, data, decrease=secrets, output="token_margin", others_within=0.05, seed=seed, **how
        ),
    )


def typographic(seed: int) -> Draws:
    """A CLIP that reads what is written on pictures."""
    model, pairs, judge = clip.prepared(seed)
    yield "words", lambda **how: coar.match(model, *pairs, judge=judge, **how)


# What is measured beside each, and what is drawn.
TASKS: dict[str, tuple[Callable[[int], Draws], tuple[str, ...], tuple[str, ...]]] = {
    "forget": (forget, ("logit_bias", "fine_tuning", "welch"), ("groups", "frontier")),
    "fix": (fix, ("fine_tuning", "welch"), ("flips", "frontier")),
    "lift": (lift, ("last_layer", "fine_tuning", "welch"), ("groups", "frontier")),
    "match": (
        match, ("gradient_times_parameter", "activation_difference", "fine_tuning", "welch"), ("flips", "frontier"),
    ),
    "steer": (steer, ("fine_tuning", "gradient_times_parameter", "welch"), ("flips", "frontier")),
    "typographic": (
        typographic, ("gradient_times_parameter", "activation_difference", "fine_tuning", "welch"),
        ("flips", "frontier"),
    ),
}  # fmt: skip


def run(args: argparse.Namespace, task: str, seed: int) -> None:
    """One seed of one task: figures as JSON, and pictures."""
    draws, rivals, pictures = TASKS[task]
    found, drawn = [], False
    for name, make in draws(seed):
        started = time.process_time()
        try:
            result = make(rivals=rivals)
        except UnsatisfiedError as error:
            logger.warning("%s, seed %d, %s: %s", task, seed, name, error)
            found.append({"draw": name, "refused": str(error), "methods": {}})
            continue
        figures = result.figures.to_json()
        methods = {"ablation": {key: figures[key] for key in result.figures}, **figures["rivals"]}
        found.append({"draw": name, "components": len(result.components), "methods": methods,
                      "seconds": round(time.process_time() - started, 1)})  # fmt: skip
        logger.info("%s, seed %d, %s\n%s", task, seed, name, result)
        if not drawn:
            for kind in pictures:
                options = {"tokenizer": steer.tokenizer} if kind == "flips" and task == "steer" else {}
                figure = getattr(result.plot, kind)(**options)
                plots.save(figure, args.results / f"edit_{task}_{kind}.png")
            drawn = True
    args.runs.mkdir(parents=True, exist_ok=True)
    (args.runs / f"{task}-{seed}.json").write_text(json.dumps({"task": task, "seed": seed, "draws": found}, indent=1))


# ------------------------------------------------------------------------------------------------------------ the table

SHOWN = {"target": "target", "moved": "moved", "others": "others", "worst_other": "worst of them", "probe": "probe",
         "recovery": "given back", "relearned": "relearned", "neighbours": "neighbours"}  # fmt: skip


def table(args: argparse.Namespace) -> str:
    """Means over all draws of every task, of every method."""
    text = [
        "# Edits: the tutorials\n\nMade by `scripts/tutorial_edits.py`. Means over the draws that kept the limits on "
        "the examples to choose on; before → after, on examples that chose nothing. Shares in percent."
    ]
    for task in TASKS:
        paths = sorted(args.runs.glob(f"{task}-*.json"))
        if not paths:
            text.append(f"## {task}\n\nNot run.")
            continue
        runs = [json.loads(path.read_text()) for path in paths]
        draws = [one for run_ in runs for one in run_["draws"]]
        names = list(dict.fromkeys(name for one in draws for name in one["methods"])) or ["ablation"]
        keys = [key for key in SHOWN if any(key in method for one in draws for method in one["methods"].values())]
        head = "| method | limits kept | " + " | ".join(SHOWN[key] for key in keys) + " |\n|" + "---|" * (len(keys) + 2)
        rows = [_row(name, draws, keys) for name in names]
        seeds = ", ".join(str(run_["seed"]) for run_ in runs)
        seconds = [one["seconds"] for one in draws if "seconds" in one]
        took = f" {statistics.fmean(seconds):.0f} s of processor time a draw with its rivals." if seconds else ""
        text.append(f"## {task}\n\n" + "\n".join([head, *rows]) + f"\n\nSeeds {seeds}; {len(draws)} draws.{took}")
    return "\n\n".join(text) + "\n"


def _row(name: str, draws: Sequence[dict], keys: Sequence[str]) -> str:
    made = [one["methods"][name] for one in draws if one["methods"].get(name)]
    cells = []
    for key in keys:
        some = [one[key] for one in made if key in one]
        if not some:
            cells.append("–")
            continue
        scale, digits = (100, 1) if some[0]["share"] else (1, 2)
        before, after = (statistics.fmean(one[when] for one in some) * scale for when in ("before", "after"))
        cells.append(f"{before:.{digits}f} → {after:.{digits}f}".replace("-", "−"))
    said = f"**{name}**" if name == "ablation" else name.replace("_", " ")
    return f"| {said} | {len(made)} of {len(draws)} | " + " | ".join(cells) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=(*TASKS, "table", []), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/tutorials/edits"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_coar").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    for task in args.tasks or TASKS:
        for seed in args.seeds if task != "table" else ():
            run(args, task, seed)
    (args.results / "edits.md").write_text(table(args), encoding="utf-8")


if __name__ == "__main__":
    main()
