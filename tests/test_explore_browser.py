"""The explorer in a headless Chromium: every feature clicked through, by mouse and by keyboard; links reopen views.

Opt-in: `pytest -m browser tests/test_explore_browser.py`. It needs `pip install playwright` and a Chromium.
"""

import re
import shutil
import zipfile

import pytest
from test_explore import N, folder, texts  # noqa: F401 (fixtures)

import hf_coar as coar
from hf_coar import demo, explore

pytestmark = pytest.mark.browser
LINK = "#link textarea, #link input"


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(folder):  # noqa: F811
    address = explore.launch(folder, block=False)
    yield address
    address.close()


@pytest.fixture
def page(chromium, address):
    """A page; errors on its console fail the test."""
    errors = []
    page = chromium.new_page(viewport={"width": 1300, "height": 1000}, accept_downloads=True)
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    broken_off = re.compile(
        "abort|Connection errored out|ERR_ABORTED|network error", re.IGNORECASE
    )  # by going elsewhere

    def opened(query=""):
        page.goto(f"{address}?{query}")
        page.wait_for_selector("#example h2, .coar-card, .coar-warning, #component h2, #own .coar")

    page.opened = opened
    yield page
    page.close()
    assert not [error for error in errors if not broken_off.search(error)]


def settled(page, pattern):
    """The link of the page, as soon as it matches."""
    page.wait_for_function(
        "([css, pattern]) => new RegExp(pattern).test(document.querySelector(css).value)", arg=[LINK, pattern]
    )
    return page.input_value(LINK)


def at_rest(page):
    """The text of the tab, as soon as nothing in it is on its way any more."""
    before = None
    while before != (before := page.locator("#tabs").inner_text()):
        page.wait_for_timeout(1000)
    return before


def test_examples_are_chosen_filtered_and_turned(page):
    page.opened()
    page.click("#gallery .coar-card >> nth=7")
    page.wait_for_selector("#example h2:has-text('Example 7')")
    settled(page, "example=7$")
    page.click("#gallery button:has-text('Next')")
    page.wait_for_selector("#gallery :text('page 2 of 2')")
    page.check("#wrong input")
    page.wait_for_selector(f"#gallery :text('of {N} examples')")
    assert page.locator("#gallery .coar-wrong").count() == page.locator("#gallery .coar-card").count() > 0
    page.fill("#number input", "12")
    page.press("#number input", "Enter")
    page.wait_for_selector("#example h2:has-text('Example 12')")


def test_ticks_and_k_run_the_live_model(page):
    page.opened("example=5")
    page.wait_for_selector("#change :text('Move k')")
    page.click("#example [data-act=tick] >> nth=0")
    page.wait_for_selector("#change :text('Example 5 with 1 component ablated')")
    page.click("#example [data-act=tick] >> nth=1")
    page.wait_for_selector("#change :text('Example 5 with 2 components ablated')")
    assert page.locator("#example [data-act=tick]:checked").count() == 2
    settled(page, "ticked=")
    page.fill("#k input[type=number]", "12")
    page.wait_for_selector("#change :text('Example 5 with 12 components ablated')")
    assert "ticked" not in settled(page, "k=12")
    assert page.locator("#change tbody tr").count() == 10  # accuracy of every class
    assert page.locator("#change .coar-scatter circle").count() == N
    flips = page.locator("#change h3:has-text('Predictions that flip')").inner_text()
    assert int(re.search(r"(\d+) of", flips)[1]) > 0 and page.locator("#change .coar-card").count() > 0
    page.click("#side label:has-text('hurt')")
    settled(page, "side=hurt")


def test_a_component_opens_from_the_list_and_from_the_heat_map(page):
    page.opened("example=3")
    page.locator("#example .coar-strip").nth(3).hover(position={"x": 30, "y": 6})
    page.wait_for_function("document.querySelector('#example .coar-hover').textContent.includes('logits')")
    page.locator("#example .coar-strip").nth(3).click(position={"x": 30, "y": 6})
    page.wait_for_selector("#component h2:has-text('layer1.0.conv1')")
    page.wait_for_selector("#component-list .coar-name")
    page.click("#component-list .coar-name >> nth=4")
    name = page.locator("#component-list .coar-name[aria-current=true]").get_attribute("aria-label")
    page.wait_for_selector(f"#component h2:text-is('{name}')")
    page.click("#component [data-act=try]")
    page.wait_for_selector("#change :text('with 1 component ablated')")


def test_an_edit_is_previewed_saved_and_loads(page, tmp_path):
    import timm

    page.opened("view=edit")
    page.wait_for_selector("#edit-gallery .coar-card")
    page.click("#edit-gallery .coar-card >> nth=8")
    page.wait_for_selector("#edit-gallery .coar-mark-lower")
    page.click("#marking label:has-text('spare')")
    page.click("#edit-gallery .coar-card >> nth=0")
    page.wait_for_selector("#edit-gallery .coar-mark-spared")
    page.click("#edit-gallery .coar-card >> nth=0")
    page.wait_for_selector("#marks :text('none marked')")
    page.fill("#n-components input[type=number]", "6")
    settled(page, "n_components=6")
    page.click("#preview")
    page.wait_for_selector("#edit :text('6 components ablated')")
    page.click("#save")
    with page.expect_download() as download:
        page.click("#file a[download], #file a[href*=zip]")
    download.value.save_as(tmp_path / "edited.zip")
    zipfile.ZipFile(tmp_path / "edited.zip").extractall(tmp_path)
    timm.create_model(f"local-dir:{tmp_path / 'edited-model'}", pretrained=True)
    assert "held out" in (tmp_path / "edited-model" / "README.md").read_text()


def test_an_uploaded_image_is_attributed_round_by_round(page, tmp_path):
    _, data = coar.load(demo.MODEL, demo.IMAGES, split="train[300:301]")
    data.dataset[0]["image"].resize((112, 112)).save(tmp_path / "own.png")
    page.opened("view=own")
    page.click("#start")
    page.wait_for_selector("#own :text('upload an image first')")
    page.set_input_files("#own-image input[type=file]", tmp_path / "own.png")
    page.wait_for_selector("#own-image img")
    page.click("#start")
    page.wait_for_selector("#own :text('more is arriving')")
    page.wait_for_selector("#own b:text('round 16 of 16')")
    assert page.locator("#own .coar-spark").count() == 2
    page.goto(settled(page, "image="))
    page.wait_for_selector("#own b:text('round 16 of 16')")
    page.click("#start")
    page.wait_for_selector("#own b:text-matches('round [1-8] of')")
    page.click("#stop")
    page.wait_for_timeout(1500)
    stopped = page.locator("#own .coar-figure b").first.inner_text()
    page.wait_for_timeout(1500)
    assert page.locator("#own .coar-figure b").first.inner_text() == stopped != "round 16 of 16"


LINKS = {
    "example": (
        "view=examples&example=9&k=6&side=hurt&label=1&wrong=0",
        "#change :text('Example 9 with 6 components')",
    ),
    "ticks": ("view=examples&example=9&ticked=3,26-28", "#change :text('4 components')"),
    "component": ("view=components&component=321&layer=layer2.0", "#component h2:has-text('layer2.0')"),
    "edit": ("view=edit&lower=2,7&higher=1&n_components=5", "#edit :text('5 components ablated')"),
    "nothing": ("", "#example h2:has-text('Example 0')"),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_reopens_its_view(page, name):
    query, shown = LINKS[name]
    page.opened(query)
    page.wait_for_selector(shown)
    link = settled(page, "view=")
    before = at_rest(page)
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(shown)
    assert at_rest(page) == before
    assert settled(page, "view=") == link == page.url


def test_a_link_that_makes_no_sense_says_so(page):
    page.opened("example=99999")
    page.wait_for_selector("#message :text('it runs from 0 to')")


def test_all_works_by_keyboard(page):
    page.opened()
    page.wait_for_selector("#change :text('Move k')")
    page.focus("#number input")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.act") == "example":
            break
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#example h2:has-text('Example 1 ')")
    page.wait_for_timeout(500)
    assert page.evaluate("document.activeElement.dataset.value") == "1"  # the focus survived the redrawing
    page.focus("#example [data-act=tick] >> nth=0")
    page.keyboard.press("Space")
    page.wait_for_selector("#change :text('1 component ablated')")
    page.focus("#k input[type=range]")
    page.keyboard.press("ArrowRight")
    settled(page, "k=1$")
    page.focus("button[role=tab]:has-text('Examples')")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#component h2")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1300])
def test_nothing_overflows_and_text_is_readable(page, theme, width):
    page.set_viewport_size({"width": width, "height": 900})
    for query, shown in LINKS.values():
        page.opened(f"{query}&__theme={theme}")
        page.wait_for_selector(shown)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        ink, paper = page.evaluate(
            """() => {
              let node = document.querySelector('.coar h2');
              const ink = getComputedStyle(node).color, clear = 'rgba(0, 0, 0, 0)';
              while (node.parentElement && getComputedStyle(node).backgroundColor === clear) node = node.parentElement;
              const paper = getComputedStyle(node).backgroundColor;
              return [ink, paper === clear ? 'rgb(255, 255, 255)' : paper];
            }"""
        )
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ink, paper)]
        assert (brightness[0] > brightness[1]) == (theme == "dark") and abs(brightness[0] - brightness[1]) > 120


@pytest.mark.parametrize("name", ["classifier", "language"])
def test_texts_are_browsed_and_typed(chromium, texts, name):  # noqa: F811
    address = explore.launch(texts / name, block=False)
    page = chromium.new_page()
    try:
        page.goto(f"{address}?example=2&k=3")
        page.wait_for_selector("#example .coar-text:has-text('good')")
        page.wait_for_selector("#change :text('3 components')")
        page.click("button[role=tab]:has-text('Your own')")
        page.fill("#own-text textarea", "a very bad film")
        page.click("#start")
        page.wait_for_selector("#own b:text('round 16 of 16')")
        page.goto(settled(page, "text=a%20very%20bad%20film"))
        page.wait_for_selector("#own b:text('round 16 of 16')")
        assert page.input_value("#own-text textarea") == "a very bad film"
        if name == "language":
            page.click("#own .coar-token >> nth=1")
            page.wait_for_selector("#own :text('of token 2')")
            settled(page, "explained=2")
            page.wait_for_selector("#own b:text('round 16 of 16')")
    finally:
        page.close()
        address.close()
