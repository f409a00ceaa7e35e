"""A gallery of attributed models: for each, attributions, evaluation, report, page to share and card, ready for `push`.

    python scripts/gallery.py prepare --models models      # data for the models that package registries hold
    python scripts/gallery.py run --entries scripts/gallery_local.yaml --out gallery
    python scripts/gallery.py run --entries scripts/gallery_hub.yaml --out gallery     # needs the Hub; not run
    python scripts/gallery.py index --out gallery --to scripts/results/gallery

The entries are a list of mappings with `name`, `model` and `data`, and what of `split`, `text`, `image`, `label`,
`n_examples`, `max_length`, `granularity`, `include`, `output`, `ablated_fraction`, `budget` and `n_masks` is other than
usual. A run that stops goes on where it was, and an entry that is done is left alone. `index` writes what was found as
a page with pictures; weights stay in `--out`, from where `hf-coar push gallery/NAME user/NAME` uploads them.

The models of `gallery_local.yaml` come by way of scripts/convert_benchmark_models.py.
"""

import argparse
import ast
import logging
import sysconfig
import time
from pathlib import Path
from typing import Any

import hf_coar as coar
from hf_coar import models
from hf_coar.attributions import folders
from hf_coar.explore import claims, sharing
from hf_coar.explore.source import Source
from hf_coar.plots import page
from hf_coar.storage import files

logger = logging.getLogger("gallery")

LOADED = ("split", "text", "image", "label", "n_examples", "max_length", "revision", "preprocessor")
FOUND = "finding.json"


def prepare(args: argparse.Namespace) -> None:
    """Photographs with what MobileNetV2 sees in them, passages of Moby-Dick, and functions of the standard library."""
    import datasets
    import torch
    from convert_benchmark_models import crops, from_the_middle, photographs
    from PIL import Image
    from train_benchmark_models import chapters

    images = [crop for photo in photographs() for crop in crops(photo)]
    pictures = [Image.fromarray((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for x in images]
    names = _imagenet_names()
    model = coar.load(args.models / "mobilenet", _saved(args.models / "mobilenet/unlabelled.parquet", pictures, names))
    labels = torch.cat([models.logits(model[0], batch).argmax(1) for batch in model[1]]).tolist()
    _saved(args.models / "mobilenet/photographs.parquet", pictures, names, labels)
    prose = [text for text in map(from_the_middle, chapters(args.moby_dick)) if len(text) > 500]
    texts = {"prose": prose, "code": functions(Path(sysconfig.get_paths()["stdlib"]))}
    for name, content in texts.items():
        datasets.Dataset.from_dict({"text": content}).to_parquet(args.models / f"{name}.parquet")


def _imagenet_names() -> list[str]:
    from timm.data import ImageNetInfo

    names = [name.split(",")[0] for name in ImageNetInfo().label_descriptions()]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]  # two are cranes


def _saved(path: Path, pictures: list[Any], names: list[str], labels: list[int] | None = None) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    content = {"image": pictures, "label": labels or [0] * len(pictures)}
    datasets.Dataset.from_dict(content, features=features).to_parquet(path)
    return path


def functions(folder: Path) -> list[str]:
    """Functions of 400 to 1,500 characters, one a file, in the order of the files' names."""
    found = []
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        pieces = [ast.get_source_segment(source, node) or "" for node in nodes]
        found += [piece for piece in pieces if 400 <= len(piece) <= 1500][:1]
    return found


def run(args: argparse.Namespace) -> None:
    """Every entry that is not done."""
    import yaml

    for entry in yaml.safe_load(args.entries.read_text(encoding="utf-8")):
        folder = args.out / entry["name"]
        if (folder / FOUND).is_file():
            logger.info("%s is done", entry["name"])
            continue
        begun = time.monotonic()
        finding = attributed(entry, folder)
        minutes = round((time.monotonic() - begun) / 60, 1)
        files.write_json(folder / FOUND, {**finding, "entry": entry, "minutes": minutes})
        logger.info("%s: %s", entry["name"], finding["claim"])


def attributed(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One entry, with all its files; what was found, as JSON values."""
    model, data = coar.load(entry["model"], entry["data"], **{key: entry[key] for key in LOADED if key in entry})
    components = coar.find_components(model, entry.get("granularity", "unit"), entry.get("include"))
    attributions = coar.attribute(
        model, data, components, output=entry.get("output", "auto"), out=folder,
        ablated_fraction=entry.get("ablated_fraction", 0.05), budget=entry.get("budget", "10 min"),
    )  # fmt: skip
    report = coar.evaluate(
        attributions, model, data, n_masks=entry.get("n_masks", 50), out=folder / "evaluation",
        fractions=[attributions.provenance.ablated_fraction],
    )  # fmt: skip
    page.write(folder, attributions, report)
    folders.add_evaluation(folder, report)
    attributions.evaluation = report.to_json()
    source = Source(attributions, model, data)
    shared = sharing.write(source, folder / "page.html")
    claim, layers = claims.find(source), attributions.top(by="layer", k=1)
    return {
        "claim": claim.text, "detail": claim.detail, "components": len(components), "examples": len(attributions),
        "without": [components.names.name(i) for i in claim.components], "strongest_layer": layers[0].name,
        "granularity": components.granularity, "output": attributions.provenance.output,
        "cost": attributions.provenance.cost, "evaluation": report.to_json()["fractions"],
        "page_bytes": shared.stat().st_size,
    }  # fmt: skip


def index(args: argparse.Namespace) -> None:
    """The page of what was found: claims, figures and pictures of the pages to share."""
    lines = [
        "# Gallery",
        "",
        "Made by `scripts/gallery.py` on two CPU cores; every figure was measured on the model itself.",
        "",
    ]
    args.to.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.out.glob(f"*/{FOUND}")):
        found, name = files.read_json(path), path.parent.name
        entry, fidelity = found["entry"], found["evaluation"][0]
        low, high = fidelity["interval"]
        picture = _pictured(path.parent / "page.html", args.to / f"{name}.png")
        lines += [f"## {entry.get('title', name)}", "", f"**{found['claim']}**", "", found["detail"], ""]
        lines += [f"![{entry.get('title', name)}]({name}.png)", ""] if picture else []
        lines += [
            "| | |", "|---|---|",
            f"| without | {', '.join(found['without'])} |",
            f"| components | {found['components']:,} ({found['granularity']}), {found['examples']} examples |",
            f"| output | {found['output']}, at {100 * fidelity['ablated_fraction']:.3g} % ablated |",
            f"| correlation with measured outputs | {fidelity['correlation']:.3f} ({low:.3f}–{high:.3f}) |",
            f"| cost | {found['cost']:g} forward passes an example, {found['minutes']} minutes with everything |",
            f"| strongest layer | {found['strongest_layer']} |", "",
        ]  # fmt: skip
    (args.to / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _pictured(shared: Path, path: Path) -> bool:
    """The head of a page as a picture, where there is a browser."""
    try:
        from explorer_screenshots import picture
        from playwright.sync_api import sync_playwright
    except ImportError:
        return path.is_file()
    import shutil

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        seen = browser.new_page(viewport={"width": 1200, "height": 640})
        seen.goto(shared.resolve().as_uri())
        seen.wait_for_selector("#units .unit")
        picture(seen, path)
        browser.close()
    return True


def main() -> None:
    """One of three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "run", "index"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"))
    parser.add_argument("--entries", type=Path, default=Path("scripts/gallery_local.yaml"))
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--to", type=Path, default=Path("scripts/results/gallery"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    {"prepare": prepare, "run": run, "index": index}[args.step](args)


if __name__ == "__main__":
    main()
