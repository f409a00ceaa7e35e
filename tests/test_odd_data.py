"""Data sets as people have them: a column a class, lists in a table of text, gaps, tables of other libraries."""

import pytest
import tiny_texts
import torch
from tiny_texts import written

import hf_coar as coar
from hf_coar import cli
from hf_coar.errors import DataError

PATHS = {"method": coar.PathGradient(rounds=2), "ablated_fraction": 0.05, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of texts by name, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    several = {"problem_type": "multi_label_classification"}
    models = {
        "named": tiny_texts.classifier(["dull", "fine", "very"]),
        "comments": tiny_texts.classifier(["toxic", "severe toxic", "insult"], **several),
        "unnamed": tiny_texts.classifier(num_labels=3, **several),
        "one": tiny_texts.classifier(num_labels=1, **several),
        "numbers": tiny_texts.classifier(num_labels=2, problem_type="regression"),
    }
    for name, model in models.items():
        tiny_texts.saved(root / name, model)
    return root


def batch_of(data):
    return next(iter(data))


# --------------------------------------------------------------------------------------------------- a column a class

COMMENTS = "insult,text,toxic,severe_toxic\n0,a dull film,1,0\n1,a fine film,1,0\n0,it is very,0,1\n"
BY_CLASS = [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]  # toxic, severe toxic, insult


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_called_as_the_classes_are_their_labels(folders, tmp_path, streaming):
    model, data = coar.load(folders / "comments", written(tmp_path / "c.csv", COMMENTS), streaming=streaming)
    assert batch_of(data)["labels"].tolist() == BY_CLASS
    attributions = coar.attribute(model, data, **PATHS)
    batch = batch_of(data)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    by_hand = -torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(1)
    whole = attributions.predict(torch.ones(1, len(attributions.components), dtype=torch.bool))[0]
    assert attributions.provenance.output == "multi_label" and whole.tolist() == pytest.approx(by_hand.tolist())
    assert attributions.provenance.data["label"] == ["toxic", "severe_toxic", "insult"]


def test_columns_of_labels_that_were_named_are_read_again(folders, tmp_path, caplog):
    path, out = written(tmp_path / "c.csv", COMMENTS), tmp_path / "run"
    command = ["attribute", folders / "unnamed", path, "--label", "insult, toxic,severe_toxic", "--rounds", "2"]
    command += ["--ablated-fraction", "0.05", "--out", out]
    assert cli.main([str(word) for word in command]) == 0
    _, data = coar.reopen(coar.Attributions.from_pretrained(out))
    assert batch_of(data)["labels"].tolist() == [[row[2], row[0], row[1]] for row in BY_CLASS]
    strange = COMMENTS.replace("insult", "a").replace("toxic", "b")
    _, data = coar.load(folders / "comments", written(tmp_path / "d.csv", strange), label=["a", "b", "severe_b"])
    assert "'b' as 'severe toxic'" in caplog.text
    assert batch_of(data)["labels"].tolist() == [[row[2], row[0], row[1]] for row in BY_CLASS]


@pytest.mark.parametrize(
    ("table", "label", "words"),
    [
        (COMMENTS, ["toxic", "insult"], "2 columns, and the model needs one for each of 3"),
        (COMMENTS, ["toxic", "insult", "rude"], "no column 'rude'"),
        (COMMENTS, ["toxic", "insult", "insult"], "2 columns, and"),
        (COMMENTS.replace(",1,0\n", ",no,0\n"), ["toxic", "severe_toxic", "insult"], "'no' is no number"),
        (COMMENTS.replace("insult", "rude"), ["rude", "toxic", "severe_toxic"], "'rude' as 'toxic', 'toxic' as 'sev"),
        (COMMENTS.replace(",1,0\n", ",.4,0\n"), None, "something else than 0 and 1"),
        (COMMENTS.replace(",1,0\n", ",,0\n"), None, "None is no number"),
        (COMMENTS.replace("insult", "rude"), None, "no column that is known to hold labels"),
    ],
)
def test_columns_that_are_no_labels_are_told(folders, tmp_path, table, label, words):
    with pytest.raises(DataError, match=words):
        coar.load(folders / "comments", written(tmp_path / "c.csv", table), label=label)


def test_a_model_of_one_label_or_of_several_numbers_reads_its_columns(folders, tmp_path):
    path = written(tmp_path / "n.csv", "text,label,x,y\na dull film,1,.5,2\na fine film,0,3,4\n")
    _, data = coar.load(folders / "one", path)
    assert batch_of(data)["labels"].tolist() == [[1.0], [0.0]]
    model, data = coar.load(folders / "numbers", path, label=["x", "y"])
    assert batch_of(data)["labels"].tolist() == [[0.5, 2.0], [3.0, 4.0]]
    assert coar.attribute(model, data, **PATHS).provenance.output == "regression"


# ------------------------------------------------------------------------------------------ tables of other libraries

ROWS = [{"text": "a dull film", "label": "dull"}, {"text": "a very fine film", "label": "fine"}]


def table_of(kind):
    """The same rows as an object of this kind."""
    import datasets
    import pandas
    import pyarrow

    made = datasets.Dataset.from_list([{"note": 1, **row} for row in ROWS])
    return {
        "rows": lambda: ROWS,
        "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
        "pandas": lambda: pandas.DataFrame(ROWS, index=[7, 7]),
        "pyarrow": lambda: pyarrow.Table.from_pylist(ROWS),
        "torch format": lambda: made.with_format("torch"),
        "pandas format": lambda: made.with_format("pandas", columns=["text", "label"]),
        "generator": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
        "splits": lambda: datasets.DatasetDict({"train": made.with_format("pandas")}),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["rows", "columns", "pandas", "pyarrow", "torch format", "pandas format", "generator", "splits"]
)
def test_tables_of_any_library_are_read(folders, kind):
    _, data = coar.load(folders / "named", table_of(kind))
    batch = batch_of(data)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 3, 0], [2, 4, 8, 7, 6, 3]]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (range(3), "data is a range; give a Hub id, .* go to attribute as they are"),
        ([{"text": 1}, {"text": "a"}], "cannot be read as a table"),
        ({"text": ["a"], "label": []}, "cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_told(folders, table, words):
    with pytest.raises(DataError, match=words):
        coar.load(folders / "named", table)
