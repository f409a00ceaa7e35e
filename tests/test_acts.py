"""What a unit does: the places where it acts strongest, on models whose answer is known."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from test_explore import folder, source, texts  # noqa: F401 (fixtures)

from hf_coar import explore
from hf_coar.attributions import forecast, predicting
from hf_coar.components import Group
from hf_coar.explore import acts, claims, forecasting, sharing
from hf_coar.explore.source import open_source
from hf_coar.explore.tab import View
from hf_coar.explore.tabs import components as components_tab
from hf_coar.explore.tabs import layers as layers_tab


def group(**settings):
    return Group(**{"module": "m", "kind": "filter", "parameter": "m.weight", "axis": 0, "size": 3, **settings})


def test_the_strongest_place_of_a_filter():
    value = torch.zeros(2, 3, 4, 5)
    value[0, 1, 2, 3], value[1, 1, 0, 4], value[1, 2, 3, 0] = -7.0, 2.0, 1.0
    strength, place, shape = acts._strongest(group(feature_axis=-3), value, {}, 2)
    assert shape == (4, 5) and strength.tolist() == [[0, 7, 0], [0, 2, 1]]
    assert (place[0, 1], place[1, 1], place[1, 2]) == (2 * 5 + 3, 4, 15)


def test_the_strongest_token_of_a_head_leaves_padding_out():
    value = torch.zeros(2, 4, 6)  # three heads of two features
    value[0, 1, 2:4], value[0, 3, 2:4] = torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    strength, place, shape = acts._strongest(
        group(kind="head", site="input", block=2), value, {"attention_mask": mask}, 2
    )
    assert shape == (4,) and strength[0].tolist() == [0, 5, 0] and place[0, 1] == 1
    left = {"attention_mask": mask.flip(1)}  # places are counted among the tokens that a reader sees
    _, place, _ = acts._strongest(group(kind="head", site="input", block=2), value.flip(1), left, 2)
    assert place[0, 1] == 3 - 1 - 1 and place[1, 1] == 0


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 5), (2, 4, 5)])
def test_what_cannot_be_read_is_not_made_up(shape):
    """Too few axes, rows that are not examples, features that the components do not divide."""
    assert acts._strongest(group(), torch.ones(shape), {}, 2) is None


def test_windows_and_lists_of_tokens_name_no_place():
    strength, _, shape = acts._strongest(group(), torch.rand(8, 7, 3), {}, 2)
    assert shape == () and strength.shape == (2, 3)
    mask = torch.ones(2, 4, dtype=torch.long)
    assert acts._strongest(group(), torch.rand(8, 3), {"attention_mask": mask}, 2)[2] == (4,)


def test_boxes_lie_where_the_place_is():
    left, top, width, height = acts.box(2 * 5 + 4, (4, 5))
    assert left + width == pytest.approx(1) and top + height / 2 == pytest.approx(2.5 / 4) and width == 0.2
    assert acts.box(1 + 9, (1 + 16,)) == acts.box(9, (4, 4))  # the patches of an image follow a class token
    assert acts.box(0, (1 + 16,)) is None and acts.box(0, (1, 1)) is None and acts.box(3, ()) is None
    assert all(0 <= x <= 1 for place in range(49 * 49) for x in acts.box(place, (49, 49)))


def test_strength_is_what_the_module_writes_without_its_bias(source):  # noqa: F811
    found = acts.of(source)
    assert found.strength.shape == (len(found.rows), 832) and bool(found.strength.isfinite().all())
    spans = list(source.components.spans())
    number = next(i for i, (one, _, _) in enumerate(spans) if one.module == "layer2.1.conv1")
    one, start, _ = spans[number]
    seen = []
    handle = source.model.get_submodule(one.module).register_forward_hook(lambda m, a, result: seen.append(result))
    source.run(source.batch(found.rows[:3]))
    handle.remove()
    bias = source.model.get_submodule(one.module).bias
    value = seen[0] - (0 if bias is None else bias[:, None, None])
    assert torch.allclose(found.strength[:3, start + 4], value[:, 4].abs().flatten(1).max(1).values, atol=1e-5)
    assert not any(module._forward_hooks for module in source.model.modules())
    html = components_tab.component(source, View(view="components", component=start + 4))
    assert (
        html.index("Where it acts strongest") < html.index("Most helped") < html.index("Its weight over the examples")
    )
    assert html.count("coar-box") == acts.SHOWN


def test_a_neuron_of_a_language_model_shows_its_token(texts):  # noqa: F811
    shown = acts.strongest(open_source(texts / "language"), 0)
    assert 1 <= shown.count('<mark class="coar-here">') <= acts.SHOWN
    assert re.search(r'<mark class="coar-here"> ?(good|bad|film|very|a)', shown)


def test_layers_and_heads_are_listed(source, texts):  # noqa: F811
    html = layers_tab.layers(source, View(view="layers"))
    assert "stage3.1" in html and 'title="layer3.1"' in html and "by head" in html
    view = layers_tab.Layers.acts["layer"](source, View(), 2, None)
    names, index = source.components.regroup("layer")
    assert view.layer == names[2] and index[view.component] == 2


# ---------------------------------------------------------------------------------------------------- the page to share


@pytest.fixture(scope="module")
def page(source, tmp_path_factory):  # noqa: F811
    return sharing.write(source, tmp_path_factory.mktemp("share") / "page.html")


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]), text


def test_the_shared_page_needs_nothing_else_and_is_small(page):
    _, text = data_of(page)
    assert page.stat().st_size <= sharing.LARGEST
    assert not re.search(r'(?:src|href)\s*=\s*["\'](?!data:)', text) and "fetch(" not in text
    assert "default-src 'none'" in text and "http" not in re.sub(r"http-equiv", "", text)


def test_the_claim_is_what_the_model_does(source, page):  # noqa: F811
    data, _ = data_of(page)
    claim = claims.find(source)
    assert data["claim"]["text"] == claim.text and data["claim"]["flipped"] == len(claim.flipped) > 0
    rows = torch.tensor(claim.change.rows)
    batch = source.batch(rows.tolist())
    kept = source.components.kept_without(list(claim.components))
    from hf_coar import masking

    with torch.no_grad(), masking.ablate(source.model, source.components, kept):
        after = source.run(batch).classes
    before = source.run(batch).classes
    labels = source.attributions.labels[rows]
    assert int(((before == labels) & (after != labels)).sum()) == len(claim.flipped)
    others = (source.attributions.labels != labels[0]).nonzero().flatten().tolist()
    with torch.no_grad(), masking.ablate(source.model, source.components, kept):
        still = source.run(source.batch(others)).classes == source.attributions.labels[others]
    right = source.run(source.batch(others)).classes == source.attributions.labels[others]
    said = (
        f"Of {int(right.sum())} examples of other classes that it gets right, {int((right & still).sum())} stay right."
    )
    assert data["claim"]["detail"].endswith(said)
    most_are_wrong = int((right & still).sum()) < int(right.sum()) / 2
    assert ("of other classes are wrong as well" in claim.text) == most_are_wrong
    for card in data["claim"]["cards"]:
        assert card["said"][0] == data["examples"][card["example"]]["predicted"] != card["said"][1]


def test_a_claim_says_that_everything_goes(source):  # noqa: F811
    claim = claims.find(source)
    everything = replace(claim, components=tuple(range(len(source.components))))
    found = claims._with_the_rest(source, everything)
    assert re.search(r", and (\d+) of \d+ examples of other classes are wrong as well\.$", found.text)


def test_more_components_go_where_no_class_loses_half_without_three(source, monkeypatch):  # noqa: F811
    tried, of_class = [], claims._of_class
    monkeypatch.setattr(claims, "_of_class", lambda *given: tried.append(given[2]) or of_class(*given))
    assert len(claims.find(source).components) == 3 and set(tried) == {3}
    monkeypatch.setattr(claims, "_share", lambda claim: len(claim.components) / 100)
    claim = claims.find(source)
    assert len(claim.components) == 6 and set(tried) == {3, 6} and "without 3, none loses half" in claim.detail
    monkeypatch.setattr(claims, "_FEW", 5 / len(source.components))  # six are no longer few
    assert len(claims.find(source).components) == 3


def test_names_from_elsewhere_cannot_end_the_script(source, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(source, "class_names", ["</script><script>alert(1)</script>"] * 10)
    _, text = data_of(sharing.write(source, tmp_path / "page.html"))
    assert text.count("</script>") == 2 and "alert(1)" in text


@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_texts_are_shared_too(texts, tmp_path, kind):  # noqa: F811
    data, _ = data_of(explore.share(texts / kind, tmp_path / "page.html"))
    assert data["examples"][0]["text"] and data["claim"]["text"].startswith("Without 3 of")
    assert any("words" in seen for one in data["components"] for seen in one["acts"])


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize(
    ("ticked", "case"),
    [
        ([0, 2, 5], ""),
        ([0, 2, 5], "dead"),
        ([0], ""),
        ([0, 1], ""),
        ([0, 2, 5, 7], "larger"),
        ([0, 2, 5], "layer"),
        ([0, 2], "unchecked"),
    ],
)
def test_forecasts_of_the_page_are_those_of_the_package(source, page, tmp_path, ticked, case, monkeypatch):  # noqa: F811
    data, text = data_of(page)
    script = re.search(r"function forecast\(at, ticked\) \{.*?\n\}", text, re.S)[0]
    dead = case == "dead"
    if case == "larger":  # than the largest near sets
        grown = {"growth": (1.3, 0.4), "until": (1.7, 9.0)}
        known = source.attributions.forecast
        data["forecast"] |= {"largest": 1.5}
        data["forecast"]["calibration"] |= grown
        monkeypatch.setattr(forecast, "largest_checked", lambda *of: 1.5)
        wider = replace(known, calibration=replace(known.calibration, **grown))
        monkeypatch.setattr(source.attributions, "forecast", wider)
    if case == "layer":
        data["forecast"] |= {"layer": [0 if i in ticked else -1 for i in range(len(data["components"]))], "layers": [4]}
        data["forecast"]["calibration"]["layers"] = 3.7
        known = source.attributions.forecast
        wider = replace(known, calibration=replace(known.calibration, layers=3.7))
        monkeypatch.setattr(source.attributions, "forecast", wider)
        monkeypatch.setattr(predicting, "taken", lambda layers, kept: torch.ones(len(kept), 1).bool())
    if case == "unchecked":
        known = source.attributions
        monkeypatch.setattr(known, "forecast", forecast.Forecast.of_unablated(known.forecast.unablated))
        chosen = known.components.indices([one["full"] for one in data["components"]])
        rows = [known.places.index(one["row"]) for one in data["examples"]]
        data["forecast"] = forecasting.arrays(known, chosen, rows)
    if dead:  # components that do nothing take no share of anything
        of = data["forecast"]
        of["calibration"], of["total"] = None, [0.0] * len(of["weights"])
        none = [[0.0] * len(row) for row in of["weights"]]
        of["weights"] = of["singles"] = of["sizes"] = none
        of["far"] = (of["far"] or {"reach": 0.5, "trust": 1.0}) | {"of": none}
    code = f"const page = {json.dumps(data)}, about = page.about;\n{script}\n"
    code += f"console.log(JSON.stringify(page.examples.map((one, at) => forecast(at, {ticked}))));"
    (tmp_path / "run.js").write_text(code)
    found = json.loads(subprocess.run(["node", tmp_path / "run.js"], capture_output=True, check=True, text=True).stdout)
    if dead:
        assert [one["drop"] for one in found] == [0] * len(found)
        return
    names = [data["components"][i]["full"] for i in ticked]
    places = {place: row for row, place in enumerate(source.attributions.places)}
    rows = [places[one["row"]] for one in data["examples"]]
    wanted = source.attributions.without(names, rows, 0.95 if source.attributions.has_intervals(0.95) else None)
    assert [one["drop"] for one in found] == pytest.approx((wanted.before - wanted.after).tolist(), abs=2e-3, rel=1e-3)
    if wanted.low is not None:
        assert [one["half"] for one in found] == pytest.approx(
            ((wanted.high - wanted.low) / 2).tolist(), rel=2e-3, abs=2e-6
        )
    else:
        assert all(one["half"] is None for one in found)
