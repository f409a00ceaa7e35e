"""The demo: the whole job on an embedded model (a small timm ResNet) and 2,000 Fashion-MNIST test images.

The first 200 images are attributed. Of the others one half chooses how many components the edit ablates, and the
figures are from the other half.
"""

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_coar import api as pipeline
from hf_coar import data, editing, models, plots
from hf_coar.attributions import Attributions
from hf_coar.attributions.folders import add_evaluation
from hf_coar.components import find_components
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.estimators.path_gradient import PathGradient
from hf_coar.judging import evaluation
from hf_coar.plots import page as pages
from hf_coar.storage import files, folders

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
MODEL, IMAGES = FOLDER / "model", FOLDER / "images.parquet"

N_ATTRIBUTED, N_CHOOSING = 200, 900
FORGOTTEN = "Trouser"
FORGOTTEN_BELOW = 0.06  # accuracy; a class counts as forgotten then, and the edit need not go on
CANDIDATES = (1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80)

# Run by a fresh interpreter in which hf_coar cannot be imported.
_RELOAD = """
import sys
sys.modules["hf_coar"] = None
import timm, torch
from safetensors.torch import load_file, save_file
folder, inputs, outputs = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(inputs)["pixel_values"])}, outputs)
"""


@dataclass(frozen=True)
class DemoReport:
    """What the demo found.

    Attributes:
        text: for a person, some 30 lines.
        figures: for a program, JSON values.
    """

    text: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Forgetting:
    """Accuracies of all classes, from 0 to 1, before and after the edit that forgets one of them."""

    names: Sequence[str]
    target: int
    before: Sequence[float]
    after: Sequence[float]

    @property
    def of_target(self) -> tuple[float, float]:
        return self.before[self.target], self.after[self.target]

    @property
    def of_others(self) -> tuple[float, float]:
        return _mean_of_others(self.before, self.target), _mean_of_others(self.after, self.target)


def run(out: str | Path = "coar-demo", forget: str = FORGOTTEN, progress: bool = True) -> DemoReport:
    """Find components, attribute, evaluate, edit, save, reload, draw: about half a minute on two cores.

    Args:
        out: folder for everything that is made; an interrupted demo resumes there.
        forget: name of the class to forget.
        progress: show progress bars.

    Raises:
        CoarError: an unknown class, or a folder that cannot be written.
    """
    started, out = time.monotonic(), Path(out)
    names = files.read_json(MODEL / "config.json")["label_names"]
    if forget not in names:
        raise CoarError(f"no class {forget!r}; there are {', '.join(names)}")
    target = names.index(forget)
    folders.claim(out, folders.DEMO)
    model, images = pipeline.load(MODEL, IMAGES, batch_size=100)
    attributed, choosing, held_out = _three_parts(images)
    components = find_components(model)

    attributions = pipeline.attribute(
        model, attributed, components, method=PathGradient(rounds=8), ablated_fraction=0.05, out=out / "attributions",
        progress=progress,
    )  # fmt: skip
    report = pipeline.evaluate(attributions, model, attributed, out=out / "evaluation", progress=progress)

    logger.info("edit: choosing how many components to ablate to forget %s", forget)
    decrease = (attributions.labels == target).nonzero().flatten().tolist()
    changed, sweep = _forget(model, attributions, decrease, choosing, target)
    n_components = len(models.record(changed)["edit"]["components"])

    before, after = (class_accuracies(each, held_out, len(names)) for each in (model, changed))
    forgetting = _Forgetting(names, target, before, after)
    pictures = _draw(out / "pictures", attributions, report, forgetting, sweep, n_components)
    pages.write(out / "attributions", attributions, report)
    add_evaluation(out / "attributions", report)
    edited.save(changed, out / "edited", _rows(forgetting), pictures=out / "pictures")
    logger.info("edit: loading the saved model with timm alone")
    figures = {
        "n_components": len(components),
        "cost": attributions.provenance.cost,
        "correlation": report.to_json()["fractions"],
        "forgotten": forget,
        "ablated": n_components,
        "forgotten_accuracy": forgetting.of_target,
        "others_accuracy": forgetting.of_others,
        "reloaded_without_hf_coar": _reloads(changed, next(iter(held_out)), out / "edited"),
    }
    figures["seconds"] = round(time.monotonic() - started, 1)
    files.write_json(out / "figures.json", figures)
    return DemoReport(_text(len(attributed.dataset), report, forgetting, figures, pictures, out), figures)


def _three_parts(images: data.Examples) -> tuple[data.Examples, data.Examples, data.Examples]:
    """Images to attribute, to choose on, and to report on."""
    bounds = (0, N_ATTRIBUTED, N_ATTRIBUTED + N_CHOOSING, len(images.dataset))
    attributed, choosing, held_out = (images.select(range(a, b)) for a, b in pairwise(bounds))
    return attributed, choosing, held_out


def class_accuracies(model: nn.Module, examples: Any, n_classes: int) -> list[float]:
    """Accuracy of every class, from 0 to 1."""
    right, count = torch.zeros(n_classes), torch.zeros(n_classes)
    with models.frozen(model), torch.no_grad():
        for batch in examples:
            hit = (models.logits(model, batch).argmax(1) == batch["labels"]).float()
            right.index_add_(0, batch["labels"], hit)
            count.index_add_(0, batch["labels"], torch.ones_like(hit))
    return (right / count).tolist()


def _mean_of_others(values: Sequence[float], target: int) -> float:
    return sum(value for i, value in enumerate(values) if i != target) / (len(values) - 1)


def _forget(
    model: nn.Module, attributions: Attributions, decrease: Sequence[int], choosing: data.Examples, target: int
) -> tuple[nn.Module, list[tuple[int, float, float]]]:
    """The edited model; and for each candidate (number, accuracy of the target, mean of the others)."""
    batches, sweep = list(choosing), []  # decoded once, for all candidates
    n_classes = int(max(batch["labels"].max() for batch in batches)) + 1

    def score(ablated: nn.Module) -> float:
        accuracies = class_accuracies(ablated, batches, n_classes)
        others = _mean_of_others(accuracies, target)
        sweep.append((CANDIDATES[len(sweep)], accuracies[target], others))
        return others - max(0.0, accuracies[target] - FORGOTTEN_BELOW)

    numbers = list(CANDIDATES)
    return editing.edit(model, attributions, decrease=decrease, n_components=numbers, validation=score), sweep


def _rows(forgetting: _Forgetting) -> list[tuple[str, str, str]]:
    """Figures for the edited model's card."""
    return [
        (f"accuracy on {forgetting.names[forgetting.target]}", *(f"{x:.1%}" for x in forgetting.of_target)),
        ("mean accuracy on the other classes", *(f"{x:.1%}" for x in forgetting.of_others)),
    ]


def _reloads(changed: nn.Module, batch: data.Batch, folder: Path) -> bool:
    """The saved model, loaded by timm alone in a process of its own, gives the edited model's logits bit for bit."""
    inputs, outputs = folder / "inputs.tmp.safetensors", folder / "outputs.tmp.safetensors"
    files.write_tensors(inputs, {"pixel_values": batch["pixel_values"]})
    try:
        # -P: nothing that happens to lie in the current folder is imported.
        command = [sys.executable, "-P", "-c", _RELOAD, str(folder), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CoarError(f"timm alone cannot load the edited model: {done.stderr.strip().splitlines()[-1]}")
        reloaded = files.read_tensors(outputs, verify=False)["logits"].clone()
    finally:
        inputs.unlink(missing_ok=True)
        outputs.unlink(missing_ok=True)
    with models.frozen(changed), torch.no_grad():
        return torch.equal(models.logits(changed, batch), reloaded)


def _draw(
    folder: Path,
    attributions: Attributions,
    report: evaluation.Report,
    forgetting: _Forgetting,
    sweep: Sequence[tuple[int, float, float]],
    chosen: int,
) -> list[Path]:
    counts, targets, others = zip(*sweep, strict=True)
    names, forgotten = forgetting.names, forgetting.names[forgetting.target]
    figures = {
        "predicted_against_measured": plots.predicted_against_measured(report, next(iter(report.correlation))),
        "correlation_by_fraction": plots.correlation_by_fraction(report),
        "class_accuracies": plots.class_accuracies(names, forgetting.before, forgetting.after, highlight=forgotten),
        "contribution_by_layer": plots.contribution_by_layer(attributions),
        "edit_sweep": plots.edit_sweep(counts, targets, others, chosen, forgotten, "other classes"),
    }
    return [plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _text(
    n_images: int,
    report: evaluation.Report,
    forgetting: _Forgetting,
    figures: dict[str, Any],
    pictures: Sequence[Path],
    out: Path,
) -> str:
    forgotten = forgetting.names[forgetting.target]
    rows = zip(forgetting.names, forgetting.before, forgetting.after, strict=True)
    same = figures["reloaded_without_hf_coar"]
    lines = [
        f"{figures['n_components']} components; {n_images} images attributed, {figures['cost']:g} forward passes each",
        "",
        "predicted against measured outputs, under masks not used before",
        str(report),
        "",
        f"{figures['ablated']} components ablated to forget {forgotten!r}; accuracy on images not used before",
        *[f"  {name:<12} {a:6.1%} → {b:6.1%}{'  forgotten' * (name == forgotten)}" for name, a, b in rows],
        "  {:<12} {:6.1%} → {:6.1%}".format("others' mean", *forgetting.of_others),
        "",
        f"the edited model, loaded by timm alone, gives {'the same logits, bit for bit' if same else 'OTHER LOGITS'}",
        "",
        f"attributions  {out / 'attributions'}",
        f"edited model  {out / 'edited'}",
        *[f"picture       {path}" for path in pictures],
        f"done in {figures['seconds']:.0f} s",
    ]
    return "\n".join(lines)
