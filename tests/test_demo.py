"""The demo does what the README says, on images that no choice has seen.

With fewer images and rounds by default, and as it is given to people with `-m slow`.
"""

import json

import pytest

import hf_coar as coar
from hf_coar import demo


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small":
            patch.setattr(demo, "N_ATTRIBUTED", 40)
            patch.setattr(demo, "N_CHOOSING", 200)
            patch.setattr(demo, "PathGradient", lambda rounds: coar.PathGradient(rounds // 4))
        return demo.run(folder, progress=False), folder


def test_demo_predicts_edits_and_reloads(report):
    figures = report[0].figures
    assert figures["correlation"][0]["ablated_fraction"] == 0.05
    assert figures["correlation"][0]["correlation"] >= 0.80
    before, after = figures["forgotten_accuracy"]
    assert before - after >= 0.60
    before, after = figures["others_accuracy"]
    assert before - after <= 0.03
    assert figures["reloaded_without_hf_coar"] is True


def test_demo_leaves_everything_it_names(report):
    folder = report[1]
    assert json.loads((folder / "figures.json").read_text())["n_components"] == 832
    assert len(list((folder / "pictures").glob("*.png"))) == 5
    for file in ("attributions/attributions.safetensors", "attributions/README.md", "edited/model.safetensors"):
        assert (folder / file).is_file()
    assert "Trouser" in (folder / "edited" / "README.md").read_text()


def test_demo_ships_at_most_three_megabytes():
    size = sum(path.stat().st_size for path in demo.FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size <= 3_000_000


def test_images_are_credited():
    assert "MIT" in (demo.FOLDER / "LICENSE-fashion-mnist").read_text()
    assert "Zalando" in (demo.FOLDER / "README.md").read_text()
