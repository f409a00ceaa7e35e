"""Pictures of the explorer, made by clicking through it: the embedded demo attributed, served, and seen by a browser.

    python scripts/explorer_screenshots.py --out scripts/results/explorer

It needs `pip install "hf_coar[explore]" playwright` and a Chromium (`playwright install chromium`, or the system's).
Two minutes on two cores. Writes example.png, what_if.png, component.png, edit.png, own_input.png, dark.png, of the
page to share share.png and share_narrow.png, and into speed.md how long a person waits: from the address to the first
view, and from a click to what it asked for, in the browser's own time, the median of five.
"""

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_coar as coar
from hf_coar import demo, explore

logger = logging.getLogger(__name__)

N_ATTRIBUTED = 200
WIDTH, HEIGHT = 1280, 1400
VIEWS = {
    "example": ("view=examples&example=12&k=2&side=hurt", "#change .coar-statement"),
    "what_if": ("view=examples&example=12&k=2&side=hurt", "#change .coar-statement"),
    "component": ("view=components&component=26", "#component .coar-acts"),
    "edit": ("view=edit&label=8&n_components=20&lower={bags}", "#edit .coar-statement"),
    "dark": ("view=examples&example=61&k=3&__theme=dark", "#change .coar-statement"),
}


def attribute(folder: Path) -> coar.Attributions:
    """The demo's first images, attributed."""
    model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{N_ATTRIBUTED}]")
    attributions = coar.attribute(model, data, method=coar.PathGradient(rounds=8))
    attributions.save_pretrained(folder)
    return attributions


# What is clicked (or, for k, filled in), and what is to be seen then.
CLICKS = {
    "another example": ("#gallery .coar-card >> nth={n}", "#example h2:has-text('Example {n}')"),
    "a component ablated": ("#example [data-act=tick] >> nth={n}", "#change :text('component')"),
    "a component opened": ("#example .coar-strip >> nth={n}", "#component .coar-acts"),
}


def waits(browser: Any, address: str) -> str:
    """How long the first view and every click take, as a table."""
    rows: dict[str, list[float]] = {}
    for n in range(1, 6):
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        rows.setdefault("first view", []).append(timed(lambda page=page: page.goto(address), page, "#example h2"))
        page.wait_for_selector("#change :text('Move k')")
        for what, (click, shown) in CLICKS.items():
            target = page.locator(click.format(n=n))
            rows.setdefault(what, []).append(timed(target.click, page, shown.format(n=n)))
        page.close()
    lines = [f"| {what} | {statistics.median(found):.2f} | {max(found):.2f} |" for what, found in rows.items()]
    return "\n".join(["| what | median, s | longest, s |", "|---|---|---|", *lines])


def timed(act: Callable[[], Any], page: Any, shown: str) -> float:
    """Seconds from an act to when something is seen."""
    begun = time.perf_counter()
    act()
    page.wait_for_selector(shown)
    return time.perf_counter() - begun


def take(browser: Any, address: str, attributions: coar.Attributions, own_image: Path, out: Path) -> None:
    """All pictures."""
    bags = ",".join(map(str, (attributions.labels == 8).nonzero().flatten().tolist()))
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    for name, (query, shown) in VIEWS.items():
        page.goto(f"{address}?{query.format(bags=bags)}")
        page.wait_for_selector(shown)
        if name == "what_if":
            page.locator("#side").evaluate("node => node.scrollIntoView()")
        picture(page, out / f"{name}.png")
    page.goto(f"{address}?view=own")
    page.set_input_files("#own-image input[type=file]", own_image)
    page.wait_for_selector("#own-image img")
    page.click("#start")
    page.wait_for_selector("#own b:text('round 16 of 16')", timeout=120_000)
    picture(page, out / "own_input.png")
    page.close()


def take_shared(browser: Any, shared: Path, out: Path) -> None:
    """The page to share, wide and narrow."""
    for name, width, height in (("share", WIDTH, 1000), ("share_narrow", 420, 1000)):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(shared.as_uri())
        page.wait_for_selector("#units .unit")
        picture(page, out / f"{name}.png")
        page.close()


def picture(page: Any, path: Path) -> None:
    """The page as it is seen, in a palette of 256 colours, which makes the file a third."""
    from PIL import Image

    page.wait_for_timeout(1000)  # the fade of the tabs
    page.screenshot(path=path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    logger.info("%s: %d kB", path, path.stat().st_size // 1000)


def main() -> None:
    """Attribute, serve, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scripts/results/explorer"), help="(default %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from playwright.sync_api import sync_playwright

    args.out.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        attributions = attribute(Path(temporary) / "attributions")
        _, others = coar.load(demo.MODEL, demo.IMAGES, split="train[300:301]")
        own_image = Path(temporary) / "own.png"
        others.dataset[0]["image"].save(own_image)
        address = explore.launch(Path(temporary) / "attributions", block=False)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        table = waits(browser, str(address))
        logger.info("%s", table)
        (args.out / "speed.md").write_text(
            "# How long the explorer takes\n\nMade by `scripts/explorer_screenshots.py`: the demo's network, "
            f"{N_ATTRIBUTED} images attributed, two CPU cores. Wanted: first view below 2 s, a click below 1 s.\n\n"
            f"{table}\n"
        )
        take(browser, address, attributions, own_image, args.out)
        shared = explore.share(Path(temporary) / "attributions", Path(temporary) / "page.html")
        take_shared(browser, shared, args.out)
        browser.close()
        address.close()


if __name__ == "__main__":
    main()
