"""Attributions as an object that one keeps: parts of them, tables, data frames, pictures, what a notebook shows."""

import re

import pytest
import torch

import hf_coar as coar
from hf_coar import demo
from hf_coar.attributions import Attributions, looks
from hf_coar.attributions.forecast import Forecast
from hf_coar.data import Identity
from hf_coar.errors import CoarError

N = 12


@pytest.fixture(scope="module")
def loaded():
    """The demo's model and its first images."""
    return coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{N}]")


@pytest.fixture(scope="module")
def made(loaded):
    """Attributions with made-up weights: what is looked at is arithmetic."""
    model, data = loaded
    components = coar.find_components(model)
    torch.manual_seed(0)
    weights = torch.randn(N, len(components)) * 0.1
    weights[:, 700] += 5.0
    weights[3, 20] = -9.0
    identity = Identity.joined([Identity.of_batch(batch) for batch in data])
    names = data.description["label_names"]
    config = {
        "output": "margin", "unit": "logits", "granularity": "unit", "n_components": len(components),
        "data": {"label_names": names}, "skipped": [5], "ablated_fraction": 0.05,
    }  # fmt: skip
    return Attributions(weights, torch.zeros(N), torch.full_like(weights, 0.02), components, identity, config)


def test_examples_and_components_are_chosen_by_brackets(made):
    assert made.shape == (N, 832)
    assert torch.equal(made[3].weights, made.weights[3:4]) and torch.equal(made[-1].weights, made.weights[-1:])
    assert torch.equal(made[2:5].weights, made.weights[2:5])
    layer = made["layer3.1.conv2"]
    columns = made.components.indices("layer3.1.conv2")
    assert layer.shape == (N, len(columns)) and torch.equal(layer.weights, made.weights[:, columns])
    assert torch.equal(layer[3].weights, made.weights[3:4, columns]) and torch.equal(
        layer[3].weights, made[3]["layer3.1.conv2"].weights
    )
    assert [part.rows for part in made] == [[i] for i in range(N)]
    for wrong in (N, -N - 1, [0, N]):
        with pytest.raises(IndexError, match=f"of {N}"):
            made[wrong]
    with pytest.raises(CoarError, match="did you mean"):
        made["layer3.1.conv9"]
    with pytest.raises(CoarError, match="not in this part"):
        layer["layer1.0.conv1"]


def test_rows_know_where_their_examples_lie_in_the_data_set(made):
    assert made.places == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]  # the sixth could not be read
    assert made[5].places == [6]


def test_the_strongest_of_an_example_a_class_and_all(made):
    table = made.top(example=3, k=4)
    assert (table[0].index, round(table[0].weight, 5)) == (20, -9.0) and table[1].index == 700
    assert table[0].component == str(made.components[20]) and made.components.indices(table[0].name) == [20]
    label = made[0].labels[0]
    of_class = made.top(label=label, k=3)
    rows = made.with_label(label)
    assert of_class[0].index == 700 and of_class[0].weight == pytest.approx(float(made.weights[rows, 700].mean()))
    assert of_class[0].error == pytest.approx(0.02 / len(rows) ** 0.5)
    assert made.top(k=2)[0].index == 700
    with pytest.raises(CoarError, match="give one of them"):
        made.top(example=3, label=label)
    with pytest.raises(CoarError, match="no class is called"):
        made.top(label="zeppelin")


def test_sums_over_layers_and_modules(made):
    table = made.top(example=3, by="module", k=3)
    names, totals = made.sum_by("module")
    largest = int(totals[3].abs().argmax())
    assert table[0].component == names[largest] and table[0].weight == pytest.approx(
        float(totals[3, largest]), rel=1e-4
    )
    size = sum(group.size for group in made.components.groups if group.module == names[largest])
    assert table[0].error == pytest.approx(0.02 * size**0.5, rel=1e-4)
    with pytest.raises(CoarError, match="attention head"):
        made.top(by="head")
    with pytest.raises(CoarError, match="'unit', 'head', 'layer', 'module'"):
        made.top(by="floor")


def test_stability_says_who_stays_among_the_strongest(made):
    """Against the frequency with which noise of that size leaves a component among the strongest."""
    part, k = made[3], 10
    table = part.top(k)
    torch.manual_seed(1)
    noisy = part.weights + 0.02 * torch.randn(400, part.shape[1])
    kept = torch.zeros(part.shape[1]).index_add_(0, noisy.abs().topk(k).indices.flatten(), torch.ones(400 * k)) / 400
    assert table[0].stability > 0.99
    for row in table:
        assert row.stability == pytest.approx(float(kept[row.index]), abs=0.25), row
    assert 0.3 < table[-1].stability < 0.99


def test_a_table_prints_and_goes_on_as_a_data_frame(made):
    pandas = pytest.importorskip("pandas")
    table = made.top(example=3, k=4)
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80 and "−9.00" in text and "in logits" in text
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.component[0] == str(made.components[20])
    whole = made.to_pandas()
    assert whole.shape == (N, 832) and whole.index.tolist() == made.places and whole.attrs["unit"] == "logits"
    assert whole[str(made.components[20])].iloc[3] == pytest.approx(-9.0)
    long = made["layer3.1.conv2"][:2].to_pandas(long=True)
    assert list(long.columns) == ["example", "label", "component", "name", "weight", "standard_error"]
    assert len(long) == 2 * made["layer3.1.conv2"].shape[1]


def test_a_data_set_of_attributions(made):
    dataset = made[:3].to_dataset()
    assert dataset.column_names == ["example", "label", "weights", "standard_errors"]
    assert dataset[2]["label"] == made[2].labels[0] and torch.equal(
        torch.tensor(dataset[2]["weights"]), made.weights[2]
    )


def test_what_a_notebook_shows_is_escaped_and_says_what_is_known(made):
    page = made._repr_html_()
    assert "832 components" in page and "not evaluated yet" in page
    assert f"{made[0].labels[0]} " in page and "<table>" in page and "background:rgba(" in page
    evil = Attributions(
        made.weights, made.bias, None, made.components, made.identity,
        {**made.config, "output": "<script>x</script>", "data": {"label_names": ["<b>bold</b>"] * 10}},
        {"fractions": [{"ablated_fraction": 0.05, "correlation": 0.875}]},
    )  # fmt: skip
    shown = evil._repr_html_() + evil[0]._repr_html_() + evil.top(0)._repr_html_()
    assert "<script>" not in shown and "<b>bold" not in shown and "correlation 0.875 at 5 % ablated" in shown


def test_the_accuracy_is_that_of_the_unablated_outputs(made):
    forecast = Forecast(torch.tensor([1.0, -2.0] * (N // 2)), torch.zeros(0, dtype=torch.long), torch.zeros(N, 0))
    config = {**made.config, "boundary": 0.0}
    known = Attributions(made.weights, made.bias, None, made.components, made.identity, config, forecast=forecast)
    assert looks.accuracy(known) == 0.5 and looks.accuracy(made) is None
    assert "50.0 % right with everything in place" in looks.examples_text(known)
    assert f"{made[0].labels[0]} {len(made.with_label(made[0].labels[0]))}" in looks.examples_text(made)
    part = known[2].without(known.components.names.name(700))
    assert float(part.before - part.after) == pytest.approx(float(made.weights[2, 700]), rel=0.05)


def test_reprs_take_two_lines(made, loaded):
    report = coar.Report({0.05: 0.9}, {0.05: (0.8, 0.95)}, {0.05: 1.1}, {0.05: torch.ones(4)}, {}, {}, 20, 1)
    for thing, words in (
        (made, "12 examples × 832"),
        (loaded[1], "12 examples"),
        (report, "0.900 at 5 %"),
        (made[3], "strongest"),
    ):
        assert len(repr(thing).splitlines()) == 2 and words in repr(thing), repr(thing)


def test_pictures_by_short_names(made):
    pytest.importorskip("matplotlib")
    assert set(dir(made.plot)) == {"layers", "top", "fidelity"}
    assert made.plot.layers().axes and made.plot.top(3).axes
    with pytest.raises(CoarError, match="not evaluated"):
        made.plot.fidelity()
    with pytest.raises(CoarError, match="there are fidelity, layers, top"):
        made.plot.spectrum()


def test_components_are_ablated_by_name(loaded, made):
    model, data = loaded
    batch = next(iter(data))
    names = [made.components.names.name(700), str(made.components[20]), 3]
    kept = torch.ones(832, dtype=torch.bool)
    kept[[700, 20, 3]] = False
    with torch.no_grad():
        with coar.ablate(model, made.components, kept) as ablated:
            wanted = ablated(batch["pixel_values"])
        with coar.ablate(model, coar.find_components(model), without=names) as ablated:
            assert torch.equal(ablated(batch["pixel_values"]), wanted)
    with pytest.raises(CoarError, match="not both"), coar.ablate(model, made.components, kept, without=[3]):
        pass
    with (
        pytest.raises(CoarError, match="no component 'layer9 7'"),
        coar.ablate(model, made.components, without="layer9 7"),
    ):
        pass


def test_the_package_shows_its_verbs():
    assert set(dir(coar)) == {*coar.__all__, "__doc__", "__version__"}
    assert not re.search(r"\b(api|masking|storage|plots)\b", " ".join(dir(coar)))
