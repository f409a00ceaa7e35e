"""Class names: read from the data or the model, accepted wherever a label is, and shown."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import build_net
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from tiny_texts import classifier, saved, written
from torch import nn

import hf_coar as coar
from hf_coar import cli, models, outputs
from hf_coar.attributions import labelled
from hf_coar.editing import edited
from hf_coar.editing.tasks.held import Held, indices_of
from hf_coar.editing.tasks.setting import Setting
from hf_coar.plots import page
from hf_coar.runs import hints
from hf_coar.storage import labels

RECORD = {"data": {"label_names": ["one", "two", "Three_B", "7"]}}


def test_names_and_labels():
    assert [labels.label_name(RECORD, label) for label in (0, 3, 9, -1)] == ["one", "7", "class 9", ""]
    assert [labels.label_of(RECORD, name) for name in ("two", "THREE b", "7", "1", 2)] == [1, 2, 3, 1, 2]
    # What figures and pages call a class without a name is taken for it.
    assert labels.label_of({}, labels.label_name({}, 4)) == 4 and labels.label_of(RECORD, "class 9") == 9
    assert labels.label_names({"model": {"label_names": ("a", "b")}, "data": {}}) == ("a", "b")
    assert labels.label_names({"data": {"label_names": [3, None]}}) == labels.label_names({}) == ()
    with pytest.raises(coar.CoarError, match="no class is called 'four'; there are one, two, Three_B, 7"):
        labels.label_of(RECORD, "four")
    with pytest.raises(coar.CoarError, match=r"there are 'good, nice', bad$"):
        labels.label_of({"data": {"label_names": ["good, nice", "bad"]}}, "well")
    assert labels.label_of({"data": {"label_names": ["good, nice", "bad", "good, kind"]}}, "Nice") == 0
    with pytest.raises(coar.CoarError, match=r"the classes \[0, 2\] are all called 'good'"):
        labels.label_of({"data": {"label_names": ["good, nice", "bad", "good, kind"]}}, "good")
    with pytest.raises(coar.CoarError, match="give a number"):
        labels.label_of({}, "four")
    with pytest.raises(coar.CoarError, match=r"the classes \[0, 1\] are all called 'a'"):
        labels.label_of({"data": {"label_names": ["a", "a"]}}, "a")


def test_a_number_that_is_none_of_the_numbers_that_classes_are_called_by():
    """Of 5, 9 and 10 the class "1" is not 9, which is the second of them."""
    numbered = {"data": {"label_names": ["5", "9", "10"]}}
    assert [labels.label_of(numbered, name) for name in ("9", "class 1", 1)] == [1, 1, 1]
    with pytest.raises(coar.CoarError, match="no class is called '1'; there are 5, 9, 10"):
        labels.label_of(numbered, "1")


def test_a_letter_and_its_mark_are_one_letter():
    """Folders of some machines are called so, and look the same."""
    assert labels.label_of({"data": {"label_names": ["small", "gr\u00f6\u00dfer"]}}, "gro\u0308\u00dfer") == 1


@pytest.mark.parametrize("one", [3, "3", [3], (3,), {3}, np.array([3]), torch.tensor([3]), [torch.tensor(3)]], ids=repr)
def test_one_class_in_whatever_holds_it(one):
    assert labels.label_of({}, one) == 3


@pytest.mark.parametrize("truth", [True, False, np.True_, torch.tensor(True), [True], np.array([True])], ids=repr)
def test_a_truth_value_is_no_class(mlp, truth):
    """True is 1 to Python, and who writes it means examples by a mask, or nothing at all."""
    batch = {**mlp.batch, "labels": torch.tensor([0, 1, 2, 1])}
    attributions = coar.attribute(mlp.model, [batch], method=coar.PathGradient(rounds=0), progress=False)
    held = Held.read(mlp.model, [batch])
    for read in (
        lambda: attributions.with_label(truth),
        lambda: held.label_of(truth),
        lambda: labelled.chosen(attributions, {"label": truth}),
        lambda: indices_of({"label": truth}, held, "increase"),
    ):
        with pytest.raises(coar.CoarError, match=r"label (True|False): give the name .* number, [01] for class [01]"):
            read()


@pytest.mark.parametrize("several", [[1, 2], (1, True), np.array([1, 2]), {"a", "b"}], ids=lambda x: type(x).__name__)
def test_one_class_is_not_several(several):
    with pytest.raises(coar.CoarError, match="give the name of one class, or its number; these are 2"):
        labels.label_of({}, several)


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_names_of_the_model_serve_batches_of_tensors(name):
    net = build_net(name)
    names = ["dull", "fine", "long", "short", "odd"][: 3 if name == "bert" else 5]
    if name == "bert":
        net.model.config.id2label = dict(enumerate(names))
    else:
        net.model.pretrained_cfg = {**net.model.pretrained_cfg, "label_names": names}
    assert models.class_names(net.model) == tuple(names)
    attributions = coar.attribute(net.model, [net.batch], method=coar.PathGradient(rounds=0), progress=False)
    label = int(net.batch["labels"][0])
    assert labelled.label_name(attributions, 0) == names[label]
    wanted = (net.batch["labels"] == label).nonzero().flatten().tolist()
    assert labelled.with_label(attributions, names[label].upper()) == wanted


def test_an_edit_by_class_names(demo_pair, demo_attributions, tmp_path):
    model, attributions = demo_pair[0], demo_attributions
    present = attributions.labels.unique().tolist()
    names = [labels.label_name(attributions.config, label) for label in present]
    first, second = ((attributions.labels == label).nonzero().flatten().tolist() for label in present[:2])
    expected = coar.edit(model, attributions, decrease=first, increase=[second], n_components=4)
    for decrease, increase in (
        (names[0], [names[1]]),
        ({"label": names[0].lower()}, {"label": present[1]}),
        ([names[0]], {"label": [names[1]]}),
    ):
        found = coar.edit(model, attributions, decrease=decrease, increase=increase, n_components=4)
        assert models.fingerprint(found) == models.fingerprint(expected)
        assert models.record(found)["edit"] == models.record(expected)["edit"]
    assert torch.equal(
        coar.editing.rank_components(attributions, decrease=names[0], reference=names[1]),
        coar.editing.rank_components(attributions, decrease=first, reference=second),
    )
    edited.save(expected, tmp_path / "edited")
    card = (tmp_path / "edited" / "README.md").read_text()
    assert f"lower the output on {len(first)} example" in card and f"of `{names[0]}`" in card
    with pytest.raises(coar.CoarError, match=r"no class is called 'shoe'; there are T-shirt/top, Trouser"):
        coar.edit(model, attributions, decrease="shoe")
    with pytest.raises(coar.CoarError, match=r"give {'label': name or number}"):
        coar.edit(model, attributions, decrease={"class": "Bag"})
    absent = next(label for label in range(10) if label not in present) if len(present) < 10 else None
    if absent is not None:
        with pytest.raises(coar.CoarError, match=f"no example has the label {absent}"):
            coar.edit(model, attributions, decrease={"label": absent})


SEVERAL = {
    "tuple": tuple,
    "set": set,
    "array": np.array,
    "tensor": torch.tensor,
    "range": lambda numbers: range(numbers[0], numbers[-1] + 1),
    "names": lambda numbers: np.array(["class 1", "class 2"]),
    "a set of names": lambda numbers: {"class 1", "class 2"},
}


@pytest.mark.parametrize("form", SEVERAL)
def test_several_classes_in_whatever_holds_them(mlp, form):
    batch = {**mlp.batch, "labels": torch.tensor([0, 1, 2, 1])}
    attributions = coar.attribute(mlp.model, [batch], method=coar.PathGradient(rounds=0), progress=False)
    held = Held.read(mlp.model, [batch])
    given = SEVERAL[form]([1, 2])
    assert labelled.chosen(attributions, {"label": given}) == [[1, 3], [2]]
    assert indices_of({"label": given}, held, "increase") == [1, 3, 2]
    if "names" in form:  # where numbers are those of examples
        assert labelled.chosen(attributions, given) == [[1, 3], [2]]
        assert indices_of(given, held, "increase") == [1, 3, 2]
    for nothing in ([], set(), torch.tensor([])):
        with pytest.raises(coar.CoarError, match="no class is given"):
            labelled.chosen(attributions, {"label": nothing})
        with pytest.raises(coar.CoarError, match="no class is given"):
            indices_of({"label": nothing}, held, "increase")


class Flowers(nn.Module):
    """A model that says nothing of its classes."""

    def __init__(self, n_classes):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, n_classes))

    def forward(self, petals):
        return self.layers(petals)


FLOWERS = ["rose", "iris", "lily"]


def flowers(names=FLOWERS, n_examples=120):
    features = Features({"petals": Sequence(Value("float32")), "label": ClassLabel(names=names)})
    petals = torch.randn(n_examples, 2, generator=torch.Generator().manual_seed(1)).tolist()
    labels = [place % len(names) for place in range(n_examples)]
    return Dataset.from_dict({"petals": petals, "label": labels}, features=features)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "as it is"])
def test_classes_that_a_data_set_declares_have_its_names_for_any_model(loaded, caplog):
    model, data = coar.load(Flowers(3), flowers()) if loaded else (Flowers(3), flowers().with_format("torch"))
    attributions = coar.attribute(model, data, method=coar.PathGradient(rounds=0), progress=False)
    assert labelled.label_name(attributions, 4) == "iris"
    assert attributions.with_label("lily") == list(range(2, 120, 3))
    held = Setting.of(model, data, attributions.components).held
    assert held.name(0) == "rose" and held.label_of("iris") == 1
    assert "classes" not in caplog.text


@pytest.mark.parametrize("kind", ["attribute", "edit"])
def test_a_data_set_of_more_or_fewer_classes_than_the_model_has_is_told(caplog, kind):
    model, data = coar.load(Flowers(4), flowers())
    if kind == "attribute":
        found = coar.attribute(model, data, method=coar.PathGradient(rounds=0), progress=False)
        assert labelled.label_name(found, 0) == "rose"
    else:
        assert Setting.of(model, data, None).held.name(0) == "rose"
    told = [one.getMessage() for one in caplog.records if "the data name" in one.getMessage()]
    assert len(told) == 1 and "the data name 3 classes (rose, iris, lily), and Flowers has 4: " in told[0]


@pytest.mark.parametrize("names", [FLOWERS, ["0", "1", "7"]], ids=", ".join)
@pytest.mark.parametrize("says", ["no names", "names"])
def test_a_count_of_classes_that_the_model_knows_is_told_once(caplog, says, names):
    """A model of timm says how many classes it has, and may say nothing of their names."""
    model = build_net("timm_vit").model
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    if says == "names":
        model.pretrained_cfg["label_names"] = ["a", "b", "c", "d", "e"]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    pictures = [PIL.Image.new("RGB", (16, 16), (place * 9, 0, 0)) for place in range(6)]
    dataset = Dataset.from_dict({"image": pictures, "label": [0, 1, 2] * 2}, features=features)
    if says == "names" and names is FLOWERS:  # the first of three flowers is not the first of five letters
        with pytest.raises(coar.CoarError, match="the data set has 3 classes"):
            coar.load(model, dataset)
        return
    model, data = coar.load(model, dataset)
    coar.attribute(model, data, method=coar.PathGradient(rounds=0), progress=False)
    told = [one.getMessage() for one in caplog.records if "taken by their numbers" in one.getMessage()]
    assert len(told) == 1 and "3 classes" in told[0] and " 5" in told[0]


def test_classes_that_are_called_by_their_numbers_have_no_names():
    _, data = coar.load(Flowers(3), flowers(["0", "1", "2"]))
    assert "label_names" not in data.description


def test_a_name_that_data_and_model_give_to_other_classes_is_told(caplog):
    net = build_net("timm_vit")
    names = ["rose", "iris", "rose", "lily", "oak"]  # as of ImageNet's cranes, which are two classes
    net.model.pretrained_cfg = {**net.model.pretrained_cfg, "label_names": names}
    logits = torch.zeros(2, 5)
    hints.tell_of_names(net.model, outputs.get("margin"), logits, names)
    assert not caplog.text
    hints.tell_of_names(net.model, outputs.get("margin"), logits, ["rose", "lily", "rose", "iris", "oak"])
    assert "'lily' is class 1 of the data and class 3 of VisionTransformer" in caplog.text


def test_names_on_page_and_card(demo_attributions, tmp_path, pictures):
    demo_attributions.save_pretrained(tmp_path)
    html = page.write(tmp_path, demo_attributions).read_text()
    name = labelled.label_name(demo_attributions, 0)
    assert f"The first example, {name}." in html.replace("&#x27;", "'") and "--decrease" in html and name in html
    assert "`T-shirt/top`, `Trouser`" in (tmp_path / "README.md").read_text()


def test_the_command_line_takes_names(tmp_path, capsys):
    folder = saved(tmp_path / "model", classifier(["dull", "fine"]))
    path = written(tmp_path / "d.csv", "text,label\na dull film,dull\na fine film,fine\nit is dull,dull\n")
    out = str(tmp_path / "run")
    assert cli.main(["attribute", str(folder), str(path), "--out", out, "--rounds", "0"]) == 0
    words = ["edit", out, "--n-components", "2", "--out", str(tmp_path / "edited"), "--decrease"]
    assert cli.main([*words, "label=great"]) == 2
    assert "no class is called 'great'; there are dull, fine" in capsys.readouterr().err
    assert cli.main([*words, "label=fine"]) == 0
    assert models.record(models.load_model(tmp_path / "edited"))["edit"]["decrease"] == [1]


def test_classes_of_imagenet_are_named_where_the_weights_are_its():
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet18")
        other = timm.create_model("resnet18", num_classes=7)
    names = models.class_names(model)
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and models.class_names(other) is None
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "of_mine"}
    assert models.class_names(model) is None
