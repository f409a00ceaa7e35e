"""What `load` reads: which columns, which labels, which tokenizer and which weights; or the error that says why not."""

import logging

import datasets
import pytest
import tiny_texts
import torch
from PIL import Image
from tiny_texts import classifier, saved, written

import hf_coar as coar
from hf_coar import cli, demo, models
from hf_coar import data as data_module
from hf_coar.data import texts
from hf_coar.errors import CorruptFileError, DataError, ModelError

REVIEWS = "id,review,label\ndoc0,a dull film,0\ndoc1,a fine film,1\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Classifiers by name, each in its folder."""
    base = tmp_path_factory.mktemp("models")
    made = {
        "named": classifier(["neg", "pos"]),
        "plain": classifier(num_labels=2),
        "stars": classifier([f"{n} stars" for n in range(1, 6)]),
        "gaps": classifier(["0", "5", "9", "10", "2"]),
        "number": classifier(num_labels=1),
        "several": classifier(["dull", "fine", "long"], problem_type="multi_label_classification"),
        "judge": classifier(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]),
    }
    for name, model in made.items():
        saved(base / name, model)
    saved(base / "mute", made["plain"], with_tokenizer=False)
    return base


def batch_of(data):
    return next(iter(data))


# ------------------------------------------------------------------------------------------------ which column


def test_of_several_texts_the_one_that_is_asked_for(folders, tmp_path):
    path = written(tmp_path / "reviews.csv", REVIEWS)
    with pytest.raises(coar.CoarError, match=r"several columns.*'id' \('doc0'\), 'review' \('a dull film'\).*text='re"):
        coar.load(folders / "named", path)
    _, data = coar.load(folders / "named", path, text="review")
    assert data.description["text"] == "review" and data.description["label"] == "label"
    assert tiny_texts.tokenizer().decode(batch_of(data)["input_ids"][0]) == "[CLS] a dull film [SEP]"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": "rewiev"}, "no such column; it has 'id'"),
        ({"text": "label"}, "must be a text"),
        ({"image": "review"}, "reads text"),
        ({"text": "review", "label": "review"}, "asked for twice"),
    ],
)
def test_a_column_that_cannot_be_it_is_told(folders, tmp_path, given, words):
    path = written(tmp_path / "reviews.csv", REVIEWS)
    with pytest.raises(DataError, match=words):
        coar.load(folders / "named", path, **given)


def test_the_usual_name_decides(folders, tmp_path):
    path = written(tmp_path / "a.csv", "id,text,title,label\n1,a dull film,x,1\n2,a fine film,y,0\n")
    _, data = coar.load(folders / "named", path)
    assert data.description["text"] == "text"
    path = written(tmp_path / "b.csv", "text,sentence,label\na dull film,a film,1\na fine film,it is,0\n")
    with pytest.raises(DataError, match="several columns that could be the text"):
        coar.load(folders / "named", path)


def test_the_second_text_goes_to_the_tokenizer_as_a_pair(folders, tmp_path):
    path = written(tmp_path / "pairs.tsv", "premise\thypothesis\tlabel\na dull film\tit is dull\tneutral\n")
    _, data = coar.load(folders / "judge", path)
    assert (data.description["text"], data.description["pair"]) == ("premise", "hypothesis")
    expected = tiny_texts.tokenizer()("a dull film", "it is dull", return_tensors="pt")
    found = batch_of(data)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["token_type_ids"], expected["token_type_ids"])
    path = written(tmp_path / "own.csv", "a,b,label\na dull film,it is dull,0\n")
    _, data = coar.load(folders / "judge", path, text="b", pair="a")
    assert tiny_texts.tokenizer().decode(batch_of(data)["input_ids"][0]).startswith("[CLS] it is dull [SEP] a dull")


def test_a_second_text_is_not_passed_over(folders, tmp_path):
    """The names that tokenizers and trainers of sentence encoders give them."""
    rows = "a dull film,it is fine,neg\na fine film,it is dull,pos\n"
    for names in ("text,text_pair", "anchor,positive"):
        _, data = coar.load(folders / "named", written(tmp_path / "d.csv", f"{names},label\n{rows}"))
        assert batch_of(data)["token_type_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    path = written(tmp_path / "e.csv", "anchor,positive,negative,label\na film,it,is,neg\na,it,dull,pos\n")
    with pytest.raises(DataError, match="several columns that could be the text"):
        coar.load(folders / "named", path)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_of_texts_does_not_read_images(folders, tmp_path):
    with pytest.raises(DataError, match=r"no column of text.*'image'"):
        coar.load(folders / "named", demo.IMAGES)


def test_what_was_read_is_said_in_a_line(folders, tmp_path, caplog):
    path = written(tmp_path / "reviews.csv", REVIEWS + "doc2,it is dull,0\n")
    with caplog.at_level(logging.INFO, logger="hf_coar"):
        coar.load(folders / "named", path, text="review")
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data:")]
    assert "text from 'review', label from 'label'" in line and "[CLS] a dull film [SEP]" in line
    assert "neg (2), pos (1)" in line


# ------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("model", "column", "entries", "expected"),
    [
        ("named", "sentiment", ["neg", "POS"], [0, 1]),
        ("named", "label", ["pos", "neg"], [1, 0]),
        ("plain", "label", ["0", "1"], [0, 1]),
        ("plain", "label", [False, True], [0, 1]),
        ("plain", "label", [1.0, 0.0], [1, 0]),
        ("plain", "sentiment", [1, 0], [1, 0]),
        ("stars", "stars", [1, 5], [0, 4]),
        ("stars", "stars", [0, 4], [0, 4]),
        ("stars", "label", ["2 stars", "5_stars"], [1, 4]),
        ("gaps", "label", [0, 0], [0, 0]),
        ("number", "score", [0.5, 3.25], [0.5, 3.25]),
        ("number", "label", [2, 3], [2.0, 3.0]),
        ("several", "labels", [[0, 1, 1], [0, 0, 0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ("several", "labels", [["Fine", "long"], []], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
        ("several", "labels", [[2, 0], [1]], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_understood(folders, tmp_path, model, column, entries, expected, streaming):
    import datasets

    rows = {"text": ["a dull film", "a fine film"], column: entries}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    _, data = coar.load(folders / model, tmp_path / "d.parquet", streaming=streaming)
    assert data.description["label"] == column
    labels = batch_of(data)["labels"]
    assert labels.tolist() == expected and labels.dtype == (torch.int64 if type(expected[0]) is int else torch.float32)


def test_lists_of_declared_no_and_yes_are_no_sets_of_classes(folders, tmp_path):
    import datasets

    answers = datasets.List(datasets.ClassLabel(names=["no", "yes"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": answers})
    rows = {"text": ["a dull film", "a fine film"], "labels": [[1, 0, 1], [0, 0, 0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    _, data = coar.load(folders / "several", tmp_path / "d.parquet")
    assert batch_of(data)["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_lists_of_declared_classes_are_matched_by_name(folders, tmp_path):
    """As in GoEmotions: the data set's order of the classes is another than the model's."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["long", "dull", "fine"]))}
    )
    rows = {"text": ["a dull film", "a fine film"], "labels": [[0, 1], [2]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    _, data = coar.load(folders / "several", tmp_path / "d.parquet")
    assert batch_of(data)["labels"].tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("model", "column", "entries", "words"),
    [
        ("plain", "label", ["neg", "pos"], "look like 'neg', 'pos'.*id2label"),
        ("named", "label", ["good", "neg"], "'good' is none of its classes"),
        ("plain", "label", [0, 2], "2 is none of its classes 0 to 1"),
        ("plain", "label", [1, 2], "run from 1 to 2"),
        ("plain", "label", [-1, -1], "choose a split that has labels"),
        ("plain", "label", [0.5, 1.0], "fractions are no classes"),
        ("plain", "label", [None, 1], "1 of 2 entries are empty"),
        ("stars", "label", [True, False], "true and false are two classes"),
        ("stars", "stars", [2, 3], "could be the class '2 stars' or"),
        ("gaps", "label", [0, 2], "a 2 could be the class '2' or the class number 2, '9'"),
        ("number", "label", ["good", "bad"], "'good' is no number"),
        ("several", "label", [[0, 1], [1, 1]], "no list of 3"),
        ("several", "label", [["fine"], ["good"]], "'good' is none of its classes"),
        ("several", "label", [[0], [1, 3]], "3 is none of its classes 0 to 2"),
        ("plain", "opinion", [0, 1], "no column that is known to hold labels.*'opinion'"),
    ],
)
def test_labels_that_are_not_understood_are_told(folders, tmp_path, model, column, entries, words):
    import datasets

    rows = {"text": ["a dull film", "a fine film"], column: entries}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=f"(?s){words}") as raised:
        coar.load(folders / model, tmp_path / "d.parquet")
    assert column in str(raised.value)


def test_of_two_columns_of_labels_one_must_be_named(folders, tmp_path):
    path = written(tmp_path / "d.csv", "text,label,target\na dull film,0,1\na fine film,1,1\n")
    with pytest.raises(DataError, match=r"several columns that could be the label.*'label'.*'target'"):
        coar.load(folders / "plain", path)
    _, data = coar.load(folders / "plain", path, label="target")
    assert batch_of(data)["labels"].tolist() == [1, 1]


def declared(path, entries, names, column="label"):
    """A file whose labels are declared as classes of these names."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), column: datasets.ClassLabel(names=names)})
    rows = {"text": ["a dull film"] * len(entries), column: entries}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_classes_are_matched_by_name_where_data_and_model_count_them_otherwise(folders, tmp_path):
    path = declared(tmp_path / "d.parquet", [0, 1, 2], ["entailment", "neutral", "contradiction"])
    _, data = coar.load(folders / "judge", path)
    assert batch_of(data)["labels"].tolist() == [2, 1, 0]
    assert data.description["label_names"] == ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


def test_classes_of_another_number_that_no_name_tells_are_refused(folders, tmp_path, caplog):
    path = declared(tmp_path / "d.parquet", [0, 1], ["dull", "fine"])
    words = r"2 classes \(dull, fine\) and the model 3, and no names tell which they are; call the data set's classes"
    with pytest.raises(DataError, match=words):
        coar.load(folders / "judge", path)
    _, data = coar.load(folders / "plain", path)
    assert data.description["label_names"] == ["dull", "fine"] and not warned(caplog)
    more = declared(tmp_path / "more.parquet", [0, 3], ["a", "b", "c", "d"])
    with pytest.raises(DataError, match=r"4 classes \(a, b, c, d\) and the model 3"):
        coar.load(folders / "judge", more)


@pytest.mark.parametrize(
    ("names", "told"), [(["pos", "NEG"], None), (["good", "bad"], "'good' as 'neg'"), (["neg feeling", "good"], "")]
)
def test_as_many_classes_of_other_names_are_doubted(folders, tmp_path, caplog, names, told):
    """They were taken by their numbers without a word, 'good' as 'neg'."""
    path = declared(tmp_path / "d.parquet", [0, 1], names)
    _, data = coar.load(folders / "named", path)
    assert batch_of(data)["labels"].tolist() == ([1, 0] if told is None else [0, 1])
    assert [told in one for one in warned(caplog)] == ([True] if told else [])


def imagenet(n=1000):
    """A thin network with ImageNet's classes, as timm names them."""
    import timm

    model = timm.create_model("mobilenetv2_035", num_classes=n)
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "ra_in1k"}
    return model.eval()


@pytest.fixture
def pictured(tmp_path):
    """Writes a folder of images with a folder for each class."""

    def write(*names):
        for place, name in enumerate(names):
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (40 * place, 99, 9)).save(tmp_path / "images" / name / "one.png")
        return tmp_path / "images"

    return write


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Egyptian cat", "espresso"], [285, 967]),
        (["bobsled", "oil rig", "motor_scooter"], None),
        (["bobsled", "motor_scooter", "offshore rig"], [450, 670, 540]),
        (["n02124075", "n07920052"], [285, 967]),
        (["285", "967"], [285, 967]),
        (["10", "9"], [10, 9]),
    ],
)
def test_folders_of_some_of_the_classes_of_imagenet(pictured, names, expected):
    """By their names, by one of several names, by the numbers of WordNet, or by their own numbers."""
    folder, model = pictured(*names), imagenet()
    if expected is None:
        with pytest.raises(DataError, match=r"'oil rig' is none of its classes.*'bobsled'"):
            coar.load(model, folder)
        return
    _, data = coar.load(model, folder)
    assert batch_of(data)["labels"].tolist() == expected
    assert data.description["label_names"][285] == "Egyptian cat"


def test_a_word_for_two_classes_is_none(pictured):
    with pytest.raises(DataError, match=r"'crane' is the name of several of its classes \(134, 517\)"):
        coar.load(imagenet(), pictured("crane", "espresso"))


def test_all_classes_of_imagenet_have_the_numbers_that_they_have(tmp_path, caplog):
    """Two of them have one name."""
    import datasets

    names = list(models.class_names(imagenet()))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)})
    features["label"].names = names
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "label": [517, 134, 999]}
    _, data = coar.load(imagenet(), datasets.Dataset.from_dict(rows, features=features))
    assert batch_of(data)["labels"].tolist() == [517, 134, 999] and not warned(caplog)


def test_a_word_for_two_classes_is_none_as_an_entry(folders, tmp_path):
    model = classifier(["good, nice", "bad, nice"])
    saved(tmp_path / "model", model)
    path = written(tmp_path / "d.csv", "text,label\na dull film,bad\na fine film,good\n")
    _, data = coar.load(tmp_path / "model", path)
    assert batch_of(data)["labels"].tolist() == [1, 0]
    path = written(tmp_path / "e.csv", "text,label\na dull film,bad\na fine film,nice\n")
    with pytest.raises(DataError, match=r"'nice' is the name of several of its classes \(0, 1\)"):
        coar.load(tmp_path / "model", path)


def test_numbers_that_contradict_names_are_refused(folders, tmp_path):
    """As many classes as the model has, one of which is called as another one of the model's."""
    path = declared(tmp_path / "d.parquet", [0, 1, 2], ["entailment", "unsure", "contradiction"])
    with pytest.raises(DataError, match=r"'unsure' is none of its classes.*'entailment'"):
        coar.load(folders / "judge", path)
    path = declared(tmp_path / "e.parquet", [0, 1, 2], ["contradiction", "unsure", "entailment"])
    _, data = coar.load(folders / "judge", path)
    assert batch_of(data)["labels"].tolist() == [0, 1, 2]


def test_folders_whose_names_are_other_numbers_are_doubted(pictured, caplog):
    """Folders are sorted as texts: "10" is the third of twelve."""
    _, data = coar.load(imagenet(12), pictured(*map(str, range(12))))
    assert batch_of(data)["labels"].tolist() == list(range(12))
    assert any("'10' as class 2" in message for message in warned(caplog))


# --------------------------------------------------------------------------------------------------- draws


def test_a_draw_is_seeded_and_balanced(tmp_path):
    _, data = coar.load(demo.MODEL, demo.IMAGES, n_examples=20)
    _, again = coar.load(demo.MODEL, demo.IMAGES, n_examples=20, batch_size=20)
    _, other = coar.load(demo.MODEL, demo.IMAGES, n_examples=20, data_seed=1)
    labels = batch_of(data)["labels"]
    assert labels.bincount().tolist() == [2] * 10
    assert torch.equal(batch_of(data)["pixel_values"], batch_of(again)["pixel_values"])
    assert not torch.equal(batch_of(data)["pixel_values"], batch_of(other)["pixel_values"])
    assert data.description["n_examples"] == 20 and data.description["data_seed"] == 0
    _, reread = coar.load(demo.MODEL, demo.IMAGES, **data_module.settings(data.description))
    assert reread.description == data.description
    assert torch.equal(batch_of(reread)["pixel_values"], batch_of(data)["pixel_values"])


def test_a_part_without_examples_is_told_with_the_splits_that_there_are(tmp_path):
    whole = datasets.load_dataset("parquet", data_files=str(demo.IMAGES), split="train[:8]")
    both = datasets.DatasetDict({"train": whole, "validation": whole.select([])})
    whole.to_parquet(tmp_path / "train.parquet")
    whole.select([]).to_parquet(tmp_path / "validation.parquet")
    of_demo = r"the splits are 'train' with 2,000: choose one that has examples"
    for data, how, words in (
        (demo.IMAGES, {"split": "train[:0]"}, of_demo),
        (demo.IMAGES, {"split": "train[2000:]"}, of_demo),
        (
            demo.IMAGES,
            {"split": "train[5:5]", "streaming": True},
            r"split 'train\[5:5\]' of the data holds no examples",
        ),
        (tmp_path, {"split": "validation"}, "there are no rows in it; give others, or another split"),
        (both, {"split": "validation"}, r"no examples; the splits are 'train' with 8, 'validation' with 0: choose"),
        (both["validation"], {}, "the data set holds no examples; "),
    ):
        with pytest.raises(DataError, match=words):
            coar.load(demo.MODEL, data, **how)


def test_a_draw_that_cannot_be_is_told():
    cases = ((0, False, "from 1 to 2000"), (True, False, "True; must be"), (2001, False, "2000"), (5, True, "stream"))
    for n_examples, streaming, words in cases:
        with pytest.raises(DataError, match=words):
            coar.load(demo.MODEL, demo.IMAGES, n_examples=n_examples, streaming=streaming)


def test_a_sorted_beginning_holds_one_class_and_a_draw_holds_all(tmp_path, folders, caplog):
    rows = "".join(f"a dull film,{label}\n" for label in [0] * 40 + [1] * 40)
    path = written(tmp_path / "sorted.csv", "text,label\n" + rows)
    coar.load(folders / "named", path, split="train[:32]")
    assert any("the same label, neg" in message for message in warned(caplog))
    caplog.clear()
    _, data = coar.load(folders / "named", path, n_examples=32)
    assert batch_of(data)["labels"].bincount().tolist() == [16, 16] and not warned(caplog)


def test_settings_of_a_damaged_record_are_told():
    for entry in ({"text": 3}, {"n_examples": "x"}, {"max_length": True}, {"split": ["a"]}):
        with pytest.raises(CorruptFileError, match="damaged"):
            data_module.settings(entry)


# ----------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_that_knows_no_word_is_refused(folders, tmp_path):
    path = written(tmp_path / "reviews.csv", REVIEWS)
    with pytest.raises(DataError, match=r"knows 0 of 6 tokens.*without its tokenizer"):
        coar.load(folders / "mute", path, text="review")
    _, data = coar.load(folders / "mute", path, text="review", preprocessor=folders / "plain")
    assert data.description["preprocessor"] == str(folders / "plain")


def test_an_empty_tokenizer_of_a_language_model_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    folder = saved(tmp_path / "gpt2", GPT2LMHeadModel(GPT2Config(**sizes)), with_tokenizer=False)
    with pytest.raises(DataError, match="knows 0 of 0 tokens"):
        coar.load(folder, written(tmp_path / "a.txt", "a dull film\nit is fine\n"))


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    small = classifier(num_labels=2, pad_token_id=0)
    small.resize_token_embeddings(5)
    with pytest.raises(DataError, match="belongs to another model"):
        coar.load(small, written(tmp_path / "reviews.csv", REVIEWS), text="review", preprocessor=folders / "plain")


# ---------------------------------------------------------------------------------- which model, which weights


def test_a_model_may_be_an_object(folders, tmp_path):
    model = classifier(["neg", "pos"])
    path = written(tmp_path / "reviews.csv", REVIEWS)
    same, data = coar.load(model, path, text="review", preprocessor=tiny_texts.tokenizer())
    assert same is model and batch_of(data)["labels"].tolist() == [0, 1]
    assert "preprocessor" not in data.description
    with pytest.raises(coar.CoarError, match="does not say where its tokenizer is"):
        coar.load(model, path, text="review")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_alone_need_an_architecture(folders, tmp_path, suffix):
    from safetensors.torch import save_file

    path, reviews = tmp_path / f"weights{suffix}", written(tmp_path / "reviews.csv", REVIEWS)
    state = {name: value.clone() for name, value in classifier(["neg", "pos"]).state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    with pytest.raises(ModelError, match=r"holds weights only .* architecture="):
        coar.load(path, reviews, text="review")
    with pytest.raises(ModelError, match=r"do not fit .*classifier.bias .2. for .5."):
        coar.load(path, reviews, text="review", architecture=folders / "stars")
    model, _ = coar.load(path, reviews, text="review", architecture=folders / "named")
    known = models.record(model)
    assert models.fingerprint(model) == models.fingerprint(models.load_model(folders / "named")) == known["loaded"]
    assert known["id"] == str(path) and known["architecture"] == str(folders / "named")
    given, _ = coar.load(path, reviews, text="review", architecture=classifier(["neg", "pos"]), preprocessor=tiny_texts.tokenizer())  # fmt: skip # noqa: E501
    assert models.fingerprint(given) == models.fingerprint(model)


def test_weights_of_a_timm_architecture(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded, data = coar.load(tmp_path / "w.pth", demo.IMAGES, split="train[:4]", architecture="resnet10t")
    assert models.fingerprint(loaded) == models.fingerprint(model) and len(batch_of(data)["labels"]) == 4


def test_nothing_in_a_file_of_weights_is_run(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="without running code"):
        models.load_model(tmp_path / "w.pth", architecture="resnet18")


# --------------------------------------------------------------------------------------------- command line


def test_the_command_line_takes_the_columns_and_keeps_them(folders, tmp_path, capsys):
    path, out = written(tmp_path / "reviews.csv", REVIEWS + "doc2,it is dull,0\n"), tmp_path / "run"
    words = ["attribute", str(folders / "named"), str(path), "--out", str(out), "--rounds", "0", "--n-examples", "2"]
    assert cli.main(words) == 2 and "--text review" in capsys.readouterr().err
    assert cli.main([*words, "--text", "review", "--max-length", "8"]) == 0
    data = coar.Attributions.from_pretrained(out).config["data"]
    assert (data["text"], data["label"], data["n_examples"], data["max_length"]) == ("review", "label", 2, 8)
    assert data["label_names"] == ["neg", "pos"]
    assert cli.main(["evaluate", str(out), "--n-masks", "3"]) == 0, capsys.readouterr().err


def test_an_object_of_datasets_is_read_like_a_file(folders, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"review": "a dull film", "label": "neg"}, {"review": "a fine film", "label": "pos"}]
    whole = datasets.Dataset.from_list(rows)
    splits = {"train": whole, "test": whole.select([0])}
    several = [(whole, None), (datasets.DatasetDict({"train": whole}), None), (datasets.DatasetDict(splits), "train")]
    for given, split in (*several, (whole.to_iterable_dataset(), None)):
        model, data = coar.load(folders / "named", given, split)
        assert batch_of(data)["labels"].tolist() == [0, 1] and "id" not in data.description
    attributions = coar.attribute(model, data, coar.find_components(model, "module"), progress=False)
    with pytest.raises(coar.CoarError, match="where their data came from; give data="):
        coar.reopen(attributions)
    _, again = coar.reopen(attributions, data=whole)
    assert torch.equal(batch_of(again)["input_ids"], batch_of(data)["input_ids"])


@pytest.mark.parametrize(
    ("given", "split", "words"),
    [
        (lambda one: ["a"], None, r"data is a list; give .*a list of rows"),
        (lambda one: one, "train[:1]", "has no splits"),
        (lambda one: {"a": one, "b": one}, None, r"splits \['a', 'b'\]"),
    ],
)
def test_what_is_no_data_set_is_told(folders, given, split, words):
    datasets = pytest.importorskip("datasets")
    data = given(datasets.Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DataError, match=words):
        coar.load(folders / "named", datasets.DatasetDict(data) if isinstance(data, dict) else data, split)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("reviews.pkl", b"no", r"file of an unknown kind; known are \.parquet"),
        ("reviews.csv", "text,label\nfin\xe9,0\n".encode("latin-1"), r"no text in UTF-8 \(0xe9 is in it\); save it"),
        ("header.csv", b"text,label\n", "there are no rows in it"),
        ("empty.jsonl", b"", "there are no rows in it"),
    ],
)
def test_files_that_cannot_be_read_say_why(folders, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        coar.load(folders / "named", tmp_path / name)


def test_texts_are_cut_at_the_models_positions(folders, tmp_path):
    """A long text far down the file ended the run there."""
    path = written(tmp_path / "long.csv", f"text,label\na film,0\n{'a ' * 60}film,1\n")
    model, data = coar.load(folders / "named", path)
    assert batch_of(data)["input_ids"].shape[1] == 32 == data.description["max_length"]
    coar.attribute(model, data, coar.find_components(model, "module"), progress=False)


@pytest.mark.parametrize(("max_length", "told"), [(5, True), (6, False)])
def test_texts_that_are_cut_are_told(folders, tmp_path, caplog, max_length, told):
    path = written(tmp_path / "d.csv", "text,label\na very fine film,pos\ndull,neg\n")
    _, data = coar.load(folders / "named", path, max_length=max_length)
    assert batch_of(data)["input_ids"].shape[1] == max_length
    words = "1 of 2 texts looked at have more than 5 tokens and are cut there"
    assert any(words in message for message in warned(caplog)) == told


@pytest.mark.parametrize("kind", ["late", "slow", "pair"])
def test_texts_that_are_cut_are_told_wherever_they_are_and_whoever_reads_them(folders, tmp_path, caplog, kind):
    """Only the first texts were looked at, and of slow tokenizers none."""
    long = f"a {'very ' * 40}fine film"
    lines = ["a film,dull,pos"] * 70 + [f"{long},dull,neg" if kind != "pair" else f"a film,{long},neg"]
    path = written(tmp_path / "d.csv", "\n".join(["text,pair,label", *(lines if kind == "late" else reversed(lines))]))
    columns = {"text": "text"} | ({"pair": "pair"} if kind == "pair" else {})
    tokenizer = slow_tokenizer(folders / "named") if kind == "slow" else None
    _, data = coar.load(folders / "named", path, **columns, preprocessor=tokenizer)
    for _ in data:
        pass
    cut = [message for message in warned(caplog) if "have more than 32 tokens and are cut there" in message]
    assert len(cut) == 1 and cut[0].startswith("1 of ")


def slow_tokenizer(folder):
    """The tokenizer of a folder without what only fast ones say."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.AutoTokenizer.from_pretrained(folder)

    class Slow:
        is_fast, pad_token, all_special_ids = False, fast.pad_token, fast.all_special_ids
        unk_token_id, decode = fast.unk_token_id, fast.decode

        def __len__(self):
            return len(fast)

        def __call__(self, *texts, **options):
            return dict(fast(*texts, **options))

    return Slow()


@pytest.mark.parametrize(("length", "told"), [(30, False), (40, True)])
def test_texts_longer_than_a_model_without_a_table_of_positions_was_made_for_are_told(tmp_path, caplog, length, told):
    """Rotary positions run on without a word, and what the model says there means nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, vocab_size=64,
        intermediate_size=16, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    saved(tmp_path / "llama", transformers.LlamaForSequenceClassification(config))
    path = written(tmp_path / "d.csv", f"text,label\n{'a ' * (length - 2)}film,1\ndull,0\n")
    coar.load(tmp_path / "llama", path)
    words = "the model was made for 32 at most (max_position_embeddings)"
    assert any(words in message for message in warned(caplog)) == told


def test_positions_are_counted_as_each_family_stores_them():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 34}
    tables = (
        transformers.RobertaConfig(**sizes, vocab_size=40),
        transformers.OPTConfig(**sizes, vocab_size=40, ffn_dim=16, word_embed_proj_dim=16),
    )
    rotary = transformers.LlamaConfig(**sizes, vocab_size=34, intermediate_size=16)
    cut = [texts.cut_at(transformers.AutoModel.from_config(config), 512) for config in (*tables, rotary)]
    assert cut == [32, 34, 512]  # of RoBERTa's two belong to padding; OPT's table has two more
    assert texts.cut_at(transformers.AutoModel.from_config(tables[0]), 8) == 8


def test_local_files_are_read_without_bars(folders, tmp_path, capfd):
    path = written(tmp_path / "reviews.csv", REVIEWS.replace("id,", "number,"))
    coar.load(folders / "named", path, text="review")
    said = capfd.readouterr().err
    assert "data: text from" in said and "/s]" not in said


@pytest.mark.parametrize("mark", [";", "\t"])
def test_what_stands_between_columns_is_seen(folders, tmp_path, mark):
    path = written(tmp_path / "reviews.csv", f"review{mark}label\na dull film{mark}neg\na fine, long film{mark}pos\n")
    _, data = coar.load(folders / "named", path)
    assert batch_of(data)["labels"].tolist() == [0, 1]
