"""`hf-coar MODEL DATA` alone, and `hf-coar show`: what a person reads in the terminal."""

import json

import pytest
from test_cli import IMAGES, MODEL, hf_coar, run  # noqa: F401 (a fixture)

import hf_coar as coar
from hf_coar import cli
from hf_coar.cli import config
from hf_coar.cli.whole import default_folder


def test_a_model_and_data_alone_do_the_sensible_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = hf_coar(MODEL, IMAGES, "--n-examples", 12, "--budget", 61, "--include", "layer3.*")
    assert code == 0, err
    folder = tmp_path / "runs" / "demo-images"
    assert "12 examples × 360 components" in out and "correlation" in out and "the 10 strongest" in out
    assert f"hf-coar show {folder.relative_to(tmp_path)} --example 0" in out
    assert (
        (folder / "report.html").is_file()
        and (folder / "evaluation.json").is_file()
        and (folder / "run.yaml").is_file()
    )
    assert max(len(line) for line in out.splitlines() if "hf-coar" not in line) <= 100
    loaded = coar.Attributions.from_pretrained(folder)
    assert loaded.evaluation["fractions"] and loaded.provenance.data["n_examples"] == 12
    code, out, _ = hf_coar(MODEL, IMAGES, "--n-examples", 12, "--budget", 61, "--include", "layer3.*", "--json")
    told = json.loads(out)
    assert code == 0 and told["n_components"] == 360 and len(told["top"]) == 10 and told["next"]


def test_a_budget_that_affords_too_little_takes_fewer_examples(tmp_path, monkeypatch, caplog):
    from hf_coar import api
    from hf_coar.errors import BudgetError

    real, asked = api.attribute, []

    def attribute(model, data, *others, **settings):
        asked.append(len(data.dataset))
        if len(data.dataset) > 16:
            raise BudgetError("too small")
        return real(model, data, *others, **settings)

    monkeypatch.setattr(api, "attribute", attribute)
    code, out, err = hf_coar(
        MODEL, IMAGES, "--out", tmp_path / "run", "--budget", 3, "--include", "layer3.1.conv2", "--split", "train[:40]"
    )
    assert code == 0, err
    assert asked == [40, 16] and "16 examples" in out


@pytest.mark.parametrize(
    ("words", "verb"),
    [(["m", "d"], "run"), (["show", "x"], "show"), (["atribute", "m"], "atribute"), (["m"], "m"), (["-h"], "-h")],
)  # fmt: skip
def test_what_is_no_verb_is_a_model_only_before_data(words, verb):
    assert config.with_verb(cli.parser(), words)[0] == verb


def test_folders_are_named_after_model_and_data():
    assert str(default_folder("timm/resnet18.a1_in1k", "uoft-cs/cifar10")) == "runs/resnet18.a1_in1k-cifar10"


def test_show_tells_of_all_of_an_example_and_of_a_class(run):  # noqa: F811
    code, out, _ = hf_coar("show", run)
    assert code == 0 and "labels: " in out and "mean over 24 examples: of 832 components, the 10 strongest" in out
    attributions = coar.Attributions.from_pretrained(run)
    table = attributions.top(3, k=4)
    code, out, _ = hf_coar("show", run, "--example", 3, "--k", 4)
    assert code == 0 and all(row.name in out for row in table) and table[0].name in out.splitlines()[-5]
    code, out, _ = hf_coar("show", run, "--example", 3, "--k", 4, "--json")
    assert [row["component"] for row in json.loads(out)["top"]] == [row.component for row in table]
    label = attributions[0].labels[0]
    code, out, _ = hf_coar("show", run, "--label", label, "--by", "layer")
    assert code == 0 and label in out and "stage3.1" in out


def test_show_tells_of_a_component(run):  # noqa: F811
    attributions = coar.Attributions.from_pretrained(run)
    row = attributions.top(k=1)[0]
    for name in (row.name, row.component, str(row.index)):
        code, out, _ = hf_coar("show", run, "--component", name)
        assert code == 0 and out.startswith(f"{row.name}  ({row.component}, number {row.index})")
    code, out, _ = hf_coar("show", run, "--component", row.name, "--json")
    told = json.loads(out)
    assert told["mean"] == pytest.approx(row.weight) and told["helped"][0]["weight"] >= told["helped"][-1]["weight"]
    code, out, _ = hf_coar("show", run, "--component", "stage3.1")
    assert code == 0 and "stage3.1 conv" in out
    code, _, err = hf_coar("show", run, "--component", "stage9.1")
    assert code == 2 and "no component 'stage9.1'" in err


def test_the_page_to_share_comes_from_the_command_line(run, tmp_path):  # noqa: F811
    code, out, _ = hf_coar("explore", run, "--html", tmp_path / "page.html")
    assert code == 0 and "needs no server" in out and (tmp_path / "page.html").stat().st_size > 50_000
