"""Tutorial: a diffusion model forgets a digit.

A class-conditional `UNet2DModel` of diffusers is trained on the 1,797 handwritten digits of scikit-learn, 8 × 8
pixels. What is explained is the class margin, by a small guide, of what six steps of DDIM make of noise: gradients go
through the sampler and the guide. The filters that sevens need are ablated in steps, eight at a time and attributed
anew, as long as the guide on other noise still finds the other digits; an independent judge, of another architecture
and trained on the other half of the digits, says what is made then of new noise. The denoising loss of given sevens,
explained and edited in the same steps, stands beside it.

    pip install 'hf_coar[diffusion]' scikit-learn
    python scripts/tutorial_diffusion.py        # ten minutes; writes scripts/results/tutorials/diffusion.md

The rule of the edit was chosen with seed 0; the figures are of seeds 1 to 3, which train their own networks.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

import hf_coar as coar

RESULT = Path(__file__).resolve().parent / "results" / "tutorials" / "diffusion.md"
FORGOTTEN, STEPS, CLASSES = 7, 6, 10
OTHERS_LOSE = 0.06  # of the other digits at most, by the guide
STEP, MOST = 8, 160  # filters at a time, and in all
GONE = -2.0  # a margin of the guide below which a sample is no seven any more, and need not go on
SEEDS = (1, 2, 3)
logger = logging.getLogger("tutorial_diffusion")


def digits() -> tuple[Tensor, Tensor]:
    """Images in -1 … 1, [1797, 1, 8, 8], and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)


def classifier(images: Tensor, labels: Tensor, model: nn.Module, steps: int) -> nn.Module:
    """A classifier, trained with a little noise on the images."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        some = torch.randint(len(labels), (128,))
        noisy = images[some] + 0.3 * torch.randn(128, 1, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(noisy), labels[some]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def guide_and_judge(images: Tensor, labels: Tensor, steps: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Two classifiers that share neither digits nor architecture."""
    torch.manual_seed(1000 + seed)
    convnet = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(48 * 16, CLASSES),
    )  # fmt: skip
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, CLASSES))
    first, second = slice(0, None, 2), slice(1, None, 2)
    guide = classifier(images[first], labels[first], convnet, steps)
    return guide, classifier(images[second], labels[second], dense, steps)


def scheduler() -> DDIMScheduler:
    """Of training and sampling."""
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=False)


def trained(images: Tensor, labels: Tensor, steps: int, seed: int = 0) -> UNet2DModel:
    """The diffusion model."""
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(24, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=CLASSES, add_attention=False,
    )  # fmt: skip
    noising, optimizer = scheduler(), torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        some, when = torch.randint(len(labels), (64,)), torch.randint(100, (64,))
        noise = torch.randn(64, 1, 8, 8)
        said = model(noising.add_noise(images[some], noise, when), when, class_labels=labels[some]).sample
        loss = F.mse_loss(said, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            logger.info("step %d: loss %.3f", step, float(loss.detach()))
    return model.eval()


def noises(each: int, seed: int) -> dict[str, Tensor]:
    """Noise for so many samples of every digit."""
    classes = torch.arange(CLASSES).repeat_interleave(each)
    noise = torch.randn(len(classes), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "class_labels": classes}


def margin_output(guide: nn.Module) -> coar.outputs.Output:
    """How surely the guide sees the digit that was asked for in what was made."""

    def margin(sample: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return coar.outputs.margins(guide(sample), batch["class_labels"])

    return coar.outputs.Output("margin of the sample", "logits", margin, takes="output", boundary=0.0)


def noisy_digits(images: Tensor, labels: Tensor, each: int) -> dict[str, Tensor]:
    """Given digits for the denoising loss, so many of each, at timesteps all over."""
    draw = torch.Generator().manual_seed(5)
    places = torch.cat([(labels == digit).nonzero()[:each, 0] for digit in range(CLASSES)])
    noise = torch.randn(len(places), 1, 8, 8, generator=draw)
    when = torch.randint(100, (len(places),), generator=draw)
    sample = scheduler().add_noise(images[places], noise, when)
    return {"sample": sample, "timestep": when, "class_labels": labels[places], "noise": noise}


@torch.no_grad()
def rates(model: nn.Module, sees: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, float]:
    """How many of the samples are the digit that was asked for: of the forgotten one, and of the others."""
    made = coar.tasks.sampling(scheduler(), STEPS)(model, batch)
    right, ours = sees(made).argmax(1) == batch["class_labels"], batch["class_labels"] == FORGOTTEN
    return float(right[ours].float().mean()), float(right[~ours].float().mean())


def sparing(sides: coar.editing.Sides) -> Tensor:
    """A rule for edits: the gain, minus three times what the others would lose."""
    return coar.editing.best_first(sides.gain - 3 * sides.reference.clamp_min(0).mean(0))


def forgetting(
    model: nn.Module, attribute: Callable[[nn.Module], coar.Attributions], sevens: list[int], guide: nn.Module
) -> nn.Module:
    """The edit that makes fewest of the digit, and loses few others, by the guide on noise of its own."""
    batch, call = noises(12, seed=2), coar.tasks.sampling(scheduler(), STEPS)
    ours = batch["class_labels"] == FORGOTTEN

    @torch.no_grad()
    def gone(model: nn.Module) -> float:
        margins = coar.outputs.margins(guide(call(model, batch)), batch["class_labels"])
        return -float(margins[ours].clamp_min(GONE).mean())

    edited = coar.edit(
        model, attribute, decrease=sevens, rule=sparing, n_components=MOST, step=STEP, validation=gone,
        constraint=coar.editing.Keep(lambda model: rates(model, guide, batch)[1], within=OTHERS_LOSE),
    )  # fmt: skip
    logger.info("%d filters", len(coar.models.record(edited)["edit"]["components"]))
    return edited


def reloaded_alike(model: UNet2DModel) -> bool:
    """Whether diffusers alone loads the edited model again, the same."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again, batch = UNet2DModel.from_pretrained(folder).eval(), noises(1, seed=4)
        call = coar.tasks.sampling(scheduler(), STEPS)
        return bool(torch.equal(call(again, batch), call(model, batch)))


def run(training: int = 700, each: int = 8, judged: int = 40, seed: int = 0) -> dict[str, object]:
    """Train, attribute, edit, judge."""
    images, labels = digits()
    guide, judge = guide_and_judge(images, labels, 600 if training > 500 else 300, seed)
    model = trained(images, labels, training, seed)
    components = coar.find_components(model, exclude=["class_embedding*", "conv_out"])
    made, given, fresh = noises(each, seed=1), noisy_digits(images, labels, each), noises(judged, seed=3)
    # One pass a step is enough where there are many steps.
    options = {"components": components, "method": coar.PathGradient(rounds=0), "ablated_fraction": 0.05}
    sampled = {"output": margin_output(guide), "call": coar.tasks.sampling(scheduler(), STEPS)}
    ways = {
        "edited by the margin of the sample": (made, sampled),
        "edited by the denoising loss": (given, {"output": "denoising"}),
    }
    named = {"the model": model}
    for name, (batch, way) in ways.items():
        sevens = (batch["class_labels"] == FORGOTTEN).nonzero()[:, 0].tolist()
        how = {**options, **way, "progress": False}
        named[name] = forgetting(model, lambda m, b=batch, h=how: coar.attribute(m, [b], **h), sevens, guide)
    return {
        "components": len(components), "same": reloaded_alike(named["edited by the margin of the sample"]),
        "rates": {name: rates(one, judge, fresh) for name, one in named.items()}, "judged": judged,
    }  # fmt: skip


def table(found: Sequence[dict]) -> str:
    """The page of results, of one seed or several."""
    first, same = found[0], all(one["same"] for one in found)
    rows = [
        "# A diffusion model forgets sevens",
        "",
        f"Made by `scripts/tutorial_diffusion.py`: {first['components']} filters and neurons of a `UNet2DModel`; "
        f"{first['judged']} samples of each digit, by a judge that had no part in training or edit; means over "
        f"{len(found)} seeds of training (lowest … highest). Reloaded by `UNet2DModel.from_pretrained` it makes "
        f"{'the same samples' if same else 'OTHER SAMPLES'}.",
        "",
        "| | sevens that are sevens | other digits that are what was asked for |",
        "|---|---|---|",
    ]
    for name in first["rates"]:
        rows.append(f"| {name} | {' | '.join(_cell(found, name, side) for side in (0, 1))} |")
    return "\n".join(rows) + "\n"


def _cell(found: Sequence[dict], name: str, side: int) -> str:
    values = [one["rates"][name][side] for one in found]
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def main() -> None:
    """The whole tutorial."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("hf_coar").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in SEEDS:
        found.append(run(seed=seed))
        logger.info("seed %d: %s", seed, found[-1]["rates"])
    RESULT.write_text(table(found), encoding="utf-8")
    logger.info(RESULT.read_text())


if __name__ == "__main__":
    main()
