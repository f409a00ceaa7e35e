"""Report pages: complete, self-contained, true to the figures; and a run goes on without matplotlib."""

import base64
import re
from html.parser import HTMLParser

import datasets
import pytest
import torch
from conftest import drawn
from test_plots import GROUPS, make_attributions, make_report

import hf_coar as coar
from hf_coar.data import Examples
from hf_coar.plots import page as report

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Tags that are closed in order, text, and addresses of what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "srcset") or (tag == "link")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module", autouse=True)
def with_pictures():
    with drawn():
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    evaluation = make_report(fractions=(0.05, 0.0125, 0.2), n_examples=16)
    attributions = make_attributions(n_examples=16, cost=120.0, ablated_fraction=0.05, method={"name": "path_gradient"})
    path = report.write(folder, attributions, evaluation)
    return folder, path, attributions, evaluation


def test_the_page_is_well_formed_and_loads_nothing(written):
    page = Page(written[1].read_text(encoding="utf-8"))
    assert page.open == [] and len(page.loaded) == 6
    for address in page.loaded:
        kind, _, content = address.partition(";base64,")
        assert kind == "data:image/svg+xml" and b"<svg" in base64.b64decode(content)
    assert not re.findall(r"url\((?!#)|@import", written[1].read_text(encoding="utf-8"))


def test_both_pages_say_the_figures(written):
    folder, path, attributions, evaluation = written
    for text in (Page(path.read_text(encoding="utf-8")).text, (folder / "report.md").read_text(encoding="utf-8")):
        for fraction, value in evaluation.correlation.items():
            assert f"{value:.3f}" in text and f"{100 * fraction:.3g} %" in text
        best = attributions.components.names.name(int(attributions.weights.abs().mean(0).argmax()))
        worst = int(evaluation.per_example[0.05].argmin())
        assert best in text and "120" in text and f"{evaluation.per_example[0.05][worst]:.3f}" in text
        assert f"{attributions.stability():.3f}" in text


def test_markdown_shows_pictures_that_are_there(written):
    folder, *_ = written
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert len(shown) == 6 and all((folder / path).read_bytes().startswith(b"\x89PNG") for path in shown)


def test_the_first_example_is_shown_as_a_person_sees_it(tmp_path, demo_pair):
    shown = Page(report.write(tmp_path, make_attributions(), data=demo_pair[1]).read_text(encoding="utf-8")).loaded
    plain = Page(report.write(tmp_path / "plain", make_attributions()).read_text(encoding="utf-8")).loaded
    assert len(shown) == len(plain) + 1
    assert "![example 0](pictures/example_0.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "pictures" / "example_0.png").is_file()


def test_the_first_text_is_quoted(tmp_path):
    rows = datasets.Dataset.from_dict({"first": ["<b>one</b>", "three"], "second": ["two", "four"]})
    pairs = Examples(rows, lambda rows: {}, description={"text": "first", "pair": "second"})
    text = Page(report.write(tmp_path, make_attributions(), data=pairs).read_text(encoding="utf-8")).text
    assert "“<b>one</b> / two”" in text and "three" not in text
    without = make_attributions(skipped=(0,))  # the first example could not be read: another one has the first row
    assert "“three / four”" in Page(report.write(tmp_path, without, data=pairs).read_text(encoding="utf-8")).text


def test_the_same_input_gives_the_same_bytes(written, tmp_path):
    _, path, attributions, evaluation = written
    assert report.write(tmp_path, attributions, evaluation).read_bytes() == path.read_bytes()


def test_text_of_others_is_escaped(tmp_path):
    attributions = make_attributions(
        model={"id": "x/<script>alert(1)</script>&", "class": "<b>"}, data={"id": "a|b", "split": "<i>"}
    )
    text = report.write(tmp_path, attributions).read_text(encoding="utf-8")
    assert "<script>" not in text and "<i>" not in text.split("</style>")[1].split("Made by")[0]
    assert "a|b" not in (tmp_path / "report.md").read_text(encoding="utf-8").split("## How")[1].replace("a\\|b", "")


def test_no_local_path_gets_onto_the_page(tmp_path):
    attributions = make_attributions(
        model={"id": "/home/somebody/secret/model"}, data={"id": "/home/somebody/d.parquet"}
    )
    report.write(tmp_path, attributions)
    for name in ("report.html", "report.md"):
        assert "somebody" not in (tmp_path / name).read_text(encoding="utf-8")


def test_without_matplotlib_there_are_numbers_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    path = report.write(tmp_path, make_attributions(), make_report())
    text = Page(path.read_text(encoding="utf-8")).text
    assert "hf_coar[plots]" in text and "0.9" in text
    assert not (tmp_path / "pictures").exists() and "![" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_picture_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report.plots, "top_components", lambda *arguments: 1 / 0)
    path = report.write(tmp_path, make_attributions())
    assert "could not be drawn" in caplog.text
    assert len(Page(path.read_text(encoding="utf-8")).loaded) == 2


@pytest.mark.parametrize("n_examples", [1, 3])
def test_few_examples_no_errors_no_variation(n_examples, tmp_path):
    attributions = make_attributions(n_examples=n_examples, with_errors=False)
    attributions = coar.Attributions(
        torch.zeros_like(attributions.weights), attributions.bias, None, attributions.components, attributions.identity
    )
    evaluation = make_report(n_examples=n_examples, n_masks=3)
    assert Page(report.write(tmp_path, attributions, evaluation).read_text(encoding="utf-8")).open == []


def test_many_layers_leave_out_the_long_picture(tmp_path):
    from hf_coar.components.groups import Group

    groups = [
        Group(f"blocks.{i}.{name}", "neuron", f"blocks.{i}.{name}.weight", 0, 2) for i in range(60) for name in "ab"
    ]
    path = report.write(tmp_path, make_attributions(groups))
    shown = Page(path.read_text(encoding="utf-8")).loaded
    assert len(shown) == 2 and not (tmp_path / "pictures" / "contribution_by_layer.png").exists()
    assert len(GROUPS) == 3


def test_a_run_without_a_report_gets_one_later(mlp, tmp_path):
    def attribute():
        coar.attribute(mlp.model, [mlp.batch], ablated_fraction=0.1, out=tmp_path, progress=False)

    with coar.running(report=False):
        attribute()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert (tmp_path / "config.json").is_file() and not (tmp_path / "report.html").exists()
    with coar.running(report=True):
        attribute()
    assert (tmp_path / "report.html").is_file() and (tmp_path / "pictures").is_dir()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == shards


@pytest.mark.usefixtures("reports")
def test_attribute_and_evaluate_write_pages(mlp, tmp_path):
    data = [mlp.batch]
    method = coar.PathGradient(rounds=2)
    run = tmp_path / "run"
    attributions = coar.attribute(mlp.model, data, method=method, ablated_fraction=0.25, out=run, progress=False)
    assert "Predicted against measured" not in (run / "report.html").read_text(encoding="utf-8")
    coar.evaluate(attributions, mlp.model, data, fractions=(0.25,), n_masks=5, out=tmp_path / "e", progress=False)
    assert "Predicted against measured" in (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "e" / "pictures" / "predicted_against_measured.png").is_file()


def test_a_repeated_run_keeps_the_page_with_the_evaluation(tmp_path):
    attributions = make_attributions()
    report.write_first(tmp_path, attributions)
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "report.html").write_text("mine")
    report.write_first(tmp_path, attributions)
    assert (tmp_path / "report.html").read_text() == "mine"
    (tmp_path / "evaluation.json").unlink()
    report.write_first(tmp_path, attributions)
    assert (tmp_path / "report.html").read_text() != "mine"
