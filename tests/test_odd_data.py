"""Data sets as people have them: a column a class, lists in a table of text, gaps, tables of other libraries."""

import json
import logging
import re

import numpy as np
import pyarrow
import pytest
import timm
import tiny_texts
import torch
from pyarrow import parquet
from tiny_texts import written

import hf_coar as coar
from hf_coar import cli
from hf_coar.data import images, sources
from hf_coar.errors import DataError
from hf_coar.models import quiet

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
    models |= {"spans": headed("BertForQuestionAnswering"), "tags": headed("BertForTokenClassification", ["O", "X"])}
    for name, model in models.items():
        tiny_texts.saved(root / name, model)
    return root


def headed(kind, names=None):
    """A tiny BERT with another head."""
    import transformers

    config = tiny_texts.classifier(names).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


def table(folder, rows, ending="jsonl"):
    """A file with these rows."""
    import pandas

    path = folder / f"rows.{ending}"
    if ending == "jsonl":
        return written(path, "\n".join(map(json.dumps, rows)))
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def left_out(caplog):
    """Why examples could not be read."""
    found = [record.getMessage() for record in caplog.records if "left out:" in record.getMessage()]
    return [line.split("left out: ")[1] for line in found]


def batch_of(data):
    return next(iter(data))


# --------------------------------------------------------------------------------------------------- a column a class

COMMENTS = "insult,text,toxic,severe_toxic\n0,a dull film,1,0\n1,a fine film,1,0\n0,it is very,0,1\n"
BY_CLASS = [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]  # toxic, severe toxic, insult


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_called_as_the_classes_are_their_labels(folders, tmp_path, streaming):
    model, data = coar.load(folders / "comments", written(tmp_path / "c.csv", COMMENTS), streaming=streaming)
    assert batch_of(data)["labels"].tolist() == BY_CLASS
    if streaming:
        return
    attributions = coar.attribute(model, data, **PATHS)
    batch = batch_of(data)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    by_hand = -torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(1)
    whole = attributions.predict(torch.ones(1, len(attributions.components), dtype=torch.bool))[0]
    assert attributions.provenance.output == "multi_label" and whole.tolist() == pytest.approx(by_hand.tolist())
    assert attributions.provenance.data["label"] == ["toxic", "severe_toxic", "insult"]


def test_one_cause_is_warned_of_once_a_command(folders, tmp_path, capsys):
    """Attributing and every fraction of the evaluation meet the same gap; the next command says it again."""
    rows = [{"text": text, "label": 1} for text in ("bad film", None, "a good film", "very bad")]
    path = table(tmp_path, rows)
    for out in ("one", "two"):
        command = [folders / "named", path, "--rounds", "2", "--ablated-fraction", "0.05", "--out", tmp_path / out]
        assert cli.main([str(word) for word in command]) == 0
        lines = capsys.readouterr().err.splitlines()
        for words in ("example 1 cannot be read", "1 of 4 examples were left out"):
            assert len([line for line in lines if words in line]) == 1
        assert len(lines) == len(set(lines)) > 4


def test_a_column_whose_name_has_a_comma_stands_in_quotes(folders, tmp_path, capsys):
    rows = [{"text": text, "mood, of three": label} for text, label in (("bad film", 0), ("a good film", 2))]
    command = ["attribute", folders / "named", table(tmp_path, rows), "--out", tmp_path / "run", "--dry-run", "--label"]
    assert cli.main([str(word) for word in [*command, '"mood, of three"']]) == 0
    capsys.readouterr()
    assert cli.main([str(word) for word in [*command, "mood, of three"]]) == 2
    assert """write --label '"mood, of three"'""" in capsys.readouterr().err


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


def test_a_model_of_one_label_or_of_several_numbers_reads_its_columns(folders, tmp_path, caplog):
    path = written(tmp_path / "n.csv", "text,label,x,y\na dull film,1,.5,2\na fine film,0,3,4\n")
    with caplog.at_level("WARNING"):
        columns = {"dull": [1, 0], "fine": [0, 1], "very": [0, 0], "text": ["a dull film", "it is"]}
        _, data = coar.load(folders / "named", columns, label=["fine", "very", "dull"])
    assert batch_of(data)["labels"].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert "does not say that its classes are independent" in caplog.text
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
    ("split", "texts"),
    [
        ("train[1:3]", ["b", "c"]),
        ("train[:50%]", ["a", "b"]),
        ("test+train[-1:]", ["e", "d"]),
    ],
)
def test_parts_of_splits_that_are_objects_are_cut_as_those_of_files(tmp_path, split, texts):
    import datasets

    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": letter} for letter in "abcd"]),
                                  "test": datasets.Dataset.from_list([{"text": "e"}])})  # fmt: skip
    assert sources.given(parts, split)["text"] == texts
    parts.save_to_disk(tmp_path / "parts")
    assert sources.read(str(tmp_path / "parts"), split, None, False)["text"] == texts


@pytest.mark.filterwarnings("ignore")
def test_an_empty_split_that_was_saved_does_not_hide_the_others(folders, tmp_path):
    """`datasets` writes no file of it, and reading raised `list index out of range`."""
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "dev": rows.select([])}).save_to_disk(tmp_path / "parts")
    rows.select([]).save_to_disk(tmp_path / "none")
    _, data = coar.load(folders / "named", tmp_path / "parts", split="train")
    assert len(batch_of(data)["labels"]) == len(ROWS)
    with pytest.raises(DataError, match=r"has the splits \['dev', 'train'\]; choose one, such as split='train'"):
        coar.load(folders / "named", tmp_path / "parts")
    with pytest.raises(DataError, match="split 'dev' of the data holds no examples"):
        coar.load(folders / "named", tmp_path / "parts", split="dev")
    with pytest.raises(DataError, match="holds no examples"):
        coar.load(folders / "named", tmp_path / "none")


def test_parts_that_are_not_there_are_told(tmp_path):
    import datasets

    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": letter} for letter in "abcd"])})
    for split in ("dev[:2]", "train[x]", "dev"):
        with pytest.raises(DataError, match=re.escape(f"have the splits ['train'], and split={split!r}")):
            sources.given(parts, split)


def test_columns_of_arrays_are_a_table(folders):
    rows = {"text": np.array([row["text"] for row in ROWS]), "label": np.array([row["label"] for row in ROWS])}
    _, data = coar.load(folders / "named", rows)
    assert batch_of(data)["labels"].tolist() == [0, 1]


def test_a_table_whose_first_line_is_an_example_is_doubted(folders, tmp_path, caplog):
    path = written(tmp_path / "d.csv", "a dull film,dull\na fine film,fine\nit is dull,dull\n")
    coar.load(folders / "named", path)
    assert any("'dull', the name of the column of labels, is a class itself" in one.message for one in caplog.records)


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


def test_one_batch_is_data_and_a_table_is_none_yet(folders):
    import datasets
    import pandas

    model, data = coar.load(folders / "named", ROWS)
    batch = batch_of(data)
    assert coar.attribute(model, batch, **PATHS).weights.shape[0] == 2
    for table in (pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)):
        with pytest.raises(DataError, match=r"coar\.load\(model, data\) makes"):
            coar.attribute(model, table, **PATHS)


@pytest.mark.parametrize("name", ["./nothing", "rows.csv", "a/b/c"])
def test_a_path_where_nothing_is_is_not_asked_of_the_hub(folders, name):
    with pytest.raises(DataError, match="there is no such file or folder here"):
        coar.load(folders / "named", name)


def test_rows_inside_a_json_file_are_found(folders, tmp_path):
    path = written(tmp_path / "d.json", json.dumps({"version": 1, "data": ROWS}))
    assert batch_of(coar.load(folders / "named", path)[1])["labels"].tolist() == [0, 1]
    answers = [{"text": "very dull", "answer_start": 2}, {"text": "dull", "answer_start": 7}]
    asked = [{"question": ASKED["question"], "answers": answers}, {"question": "is it fine", "answers": []}]
    paragraphs = [{"context": ASKED["context"], "qas": asked}, {"context": "a film", "qas": asked[1:]}]
    squad = {"version": "v2.0", "data": [{"title": "films", "paragraphs": paragraphs}]}
    _, data = coar.load(folders / "spans", written(tmp_path / "s.json", json.dumps(squad)))
    assert batch_of(data)["start_positions"].tolist() == [6, 0, 0]


# ------------------------------------------------------------------------------- lists and mappings in tables of text

ASKED = {"question": "is it dull", "context": "a very dull film"}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["very dull", "dull"], "answer_start": [2, 7]},
        {"text": "very dull", "answer_start": 2},
        [{"text": "very dull", "answer_start": 2}],
    ],
)
def test_answers_are_read_in_any_form(folders, tmp_path, answers, ending):
    _, data = coar.load(folders / "spans", table(tmp_path, [{**ASKED, "answers": answers}], ending))
    batch = batch_of(data)
    tokens = batch["input_ids"][0, batch["start_positions"][0] : batch["end_positions"][0] + 1]
    assert tiny_texts.tokenizer().decode(tokens) == "very dull"


def test_answers_that_are_not_where_they_are_said_to_be_are_left_out(folders, tmp_path, caplog):
    starts = [2, 3, 40]
    rows = [{**ASKED, "answers": {"text": ["very dull"], "answer_start": [start]}} for start in starts]
    model, data = coar.load(folders / "spans", table(tmp_path, rows))
    assert coar.attribute(model, data, **PATHS).places == [0]
    assert "at character 3 of the text is 'ery dull '" in left_out(caplog)[0] and len(left_out(caplog)) == 2


def test_words_and_tags_that_do_not_go_together_are_left_out(folders, tmp_path, caplog):
    rows = [
        {"tokens": ["a", "dull", "film"], "ner_tags": tags} for tags in ([0, -100, 1], [0, 1], [0, 1, 0, 1], [0, 0, 0])
    ]
    model, data = coar.load(folders / "tags", table(tmp_path, [*rows, {"tokens": [], "ner_tags": []}]))
    assert coar.attribute(model, data, **PATHS).places == [0, 3]
    assert [line.split(": ")[1] for line in left_out(caplog)] == [
        f"{words} words in 'tokens', and {tags} tags in 'ner_tags'" for words, tags in ((3, 2), (3, 4), (0, 0))
    ]
    assert data.prepare(rows[:1])["labels"].tolist() == [[-100, 0, -100, 1, -100]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_lists_in_a_table_of_text_are_lists(folders, tmp_path, streaming, whole):
    rows = [{"tokens": ["a", "dull"], "ner_tags": ["O", "X"]}, {"tokens": ["film"], "ner_tags": ["O"]}]
    path = table(tmp_path, rows, "csv")
    _, data = coar.load(folders / "tags", tmp_path if whole else path, streaming=streaming)
    assert batch_of(data)["labels"].tolist() == [[-100, 0, 1, -100], [-100, 0, -100, -100]]


def test_what_could_be_read_in_two_ways_is_no_list(folders, tmp_path):
    """NumPy writes arrays of strings without commas, and Python would join them."""
    path = written(tmp_path / "n.csv", "tokens,ner_tags\n['a' 'dull'],\"['O', 'X']\"\n")
    with pytest.raises(DataError, match="no column that is known as the tokens"):
        coar.load(folders / "tags", path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a film", "label": "1"}, {"text": "it is", "label": 0}], "'label' .* numbers, or all of them names"),
        ([{"text": 5, "label": 1}, {"text": "dull", "label": 0}], "'text' .* make every entry a string"),
    ],
    ids=["labels", "texts"],
)
def test_a_column_of_several_types_is_told(folders, tmp_path, rows, words):
    path = written(tmp_path / "mixed.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=words):
        coar.load(folders / "named", path)


def test_paths_in_a_column_of_images_are_told_how_to_become_images():
    model = timm.create_model("test_vit", num_classes=2)
    with pytest.raises(DataError, match=r"'image' \('a.png'\) is not an image: .*cast_column"):
        coar.load(model, [{"image": "a.png", "label": 0}])


def test_two_columns_of_one_name_are_told(folders, tmp_path, caplog):
    coar.load(folders / "named", written(tmp_path / "twice.csv", "text,label,label\nfine,1,0\ndull,0,1\n"))
    assert "several columns 'label': the first one goes by this name, another by 'label.1'" in caplog.text


class Screen(logging.Handler):
    """What would be written."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def screen():
    import datasets  # noqa: F401 (which makes its logger)

    handler = Screen()
    logging.getLogger("datasets").addHandler(handler)
    yield handler
    logging.getLogger("datasets").removeHandler(handler)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.csv", "text,label\nfine,1\na,b,c\n"),
        ("bad.jsonl", '{"text": "fine", "label": 1}\n{"text"\n'),
        ("bad.parquet", "PAR1"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_once(folders, tmp_path, screen, name, content, streaming):
    """The library's own line stood before ours."""
    with pytest.raises(DataError):
        _, data = coar.load(folders / "named", written(tmp_path / name, content), streaming=streaming)
        list(data)
    assert not screen.lines


def test_errors_of_others_that_nothing_is_raised_of_are_shown(screen):
    logger = logging.getLogger("datasets.any")
    with quiet.without_errors("datasets"):
        logger.error("lost")
        logger.warning("odd")
        assert screen.lines == ["odd"]
    assert screen.lines == ["odd", "lost"]
    logger.error("after")
    assert screen.lines[2:] == ["after"]


@pytest.mark.parametrize("content", ["no parquet", "two columns of one name"])
def test_a_stream_whose_file_cannot_be_read_is_told_at_its_beginning(folders, tmp_path, content):
    texts, labels = pyarrow.array(["fine", "dull"]), pyarrow.array([1, 0])
    twice = pyarrow.table([texts, labels, labels], names=["text", "label", "label"])
    parquet.write_table(twice, tmp_path / "data.parquet")
    if content == "no parquet":
        parquet.write_table(twice.select([0, 1]), tmp_path / "data.parquet")
        (tmp_path / "more.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"the stream of examples broke off after \d+: ArrowInvalid: "):
        coar.load(folders / "named", str(tmp_path), split="train[:1]", streaming=True)


def test_an_example_that_cannot_be_read_is_named_where_batches_are_taken_by_hand(folders, tmp_path):
    _, data = coar.load(folders / "named", written(tmp_path / "gap.csv", "text,label\nfine,1\n,0\ndull,0\n"))
    with pytest.raises(DataError, match=r"example 1 cannot be read: .*nothing in 'text'"):
        list(data)


def test_an_example_without_a_text_is_left_out(folders, tmp_path, caplog):
    path = written(tmp_path / "g.csv", "text,label\na dull film,dull\n,fine\nvery fine,fine\n")
    model, data = coar.load(folders / "named", path)
    assert coar.attribute(model, data, **PATHS).places == [0, 2]
    assert left_out(caplog) == ["ValueError: there is nothing in 'text'"]


# --------------------------------------------------------------------------------------------------- columns of numbers


def series(n=3, gap=False):
    """Rows of a past and a future of two channels."""
    numbers = torch.arange(n * 40.0).sin().reshape(n, 20, 2).tolist()
    rows = [{"past": one[:16], "future": one[16:]} for one in numbers]
    if gap:
        rows[1]["past"][3][0] = None
    return rows


@pytest.fixture(scope="module")
def patches():
    import transformers

    sizes = {"d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8}
    lengths = {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
    config = transformers.PatchTSTConfig(**sizes, **lengths, num_input_channels=2, num_targets=3, loss="mse")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds = transformers.PatchTSTForPrediction, transformers.PatchTSTForClassification
        return [kind(config).eval() for kind in kinds]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_series_are_read_from_columns_that_are_named(patches, tmp_path, ending):
    model, path = patches[0], table(tmp_path, series(), ending)
    with pytest.raises(DataError, match=r"\(past_values, future_values\); it has 'past' .*--columns past_values="):
        coar.load(model, path)
    _, data = coar.load(model, path, columns={"past_values": "past", "future_values": "future"})
    if ending == "csv":
        assert len(data.dataset) == 3 and batch_of(data)["past_values"].shape == (3, 16, 2)
        return
    attributions = coar.attribute(model, data, **PATHS)
    whole = attributions.predict(torch.ones(1, len(attributions.components), dtype=torch.bool))[0]
    rows = [{"past_values": torch.tensor([r["past"]]), "future_values": torch.tensor([r["future"]])} for r in series()]
    assert whole.tolist() == pytest.approx([-model(**row).loss.item() for row in rows], rel=1e-4)
    assert attributions.provenance.data["columns"] == {"past_values": "past", "future_values": "future"}


def test_series_with_gaps_are_left_out_and_classes_of_series_are_labels(patches, caplog):
    names = {"past_values": "past", "future_values": "future"}
    model, data = coar.load(patches[0], series(gap=True), columns=names)
    assert coar.attribute(model, data, **PATHS).places == [0, 2]
    assert left_out(caplog) == ["ValueError: 'past' has a missing value"]
    rows = [{"past_values": row["past"], "label": place} for place, row in enumerate(series())]
    _, data = coar.load(patches[1], rows)
    assert batch_of(data)["target_values"].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="rose='past_values': PatchTSTForClassification reads"):
        coar.load(patches[1], rows, columns={"rose": "past_values"})


# --------------------------------------------------------------------------------------------------------------- images


def grey(mode):
    """A ramp from black to white in a mode of PIL."""
    from PIL import Image

    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    depth = {"L": (255, np.uint8), "I;16": (65535, np.uint16), "I": (65535, np.int32), "F": (1, np.float32)}
    most, kind = depth[mode]
    image = Image.fromarray((ramp * most).astype(kind))
    assert image.mode == mode
    return image


def test_images_of_sixteen_bits_look_as_those_of_eight():
    eight, sixteen = (np.asarray(images.in_mode(grey(mode), "RGB"), dtype=int) for mode in ("L", "I;16"))
    assert eight.shape == (8, 8, 3) and eight.max() == 255 and np.abs(eight - sixteen).max() <= 1
    png = grey("I")
    png.format = "PNG"  # as older versions of PIL open those of sixteen bits
    assert np.abs(np.asarray(images.in_mode(png, "L"), dtype=int) - eight[..., 0]).max() <= 1
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="no known range"):
            images.in_mode(grey(mode), "RGB")


def test_a_timm_model_of_one_channel_gets_one_whatever_its_configuration_says():
    import timm

    model = timm.create_model("test_resnet", num_classes=2, in_chans=1).eval()
    assert model.pretrained_cfg["input_size"][0] == 3
    _, data = coar.load(model, {"image": [grey("L"), grey("I;16")], "label": [0, 1]})
    pixels = batch_of(data)["pixel_values"]
    assert pixels.shape[1] == 1 and (pixels[0] - pixels[1]).abs().max() < 0.05
    assert model(pixels).shape == (2, 2)


def test_a_transform_of_ones_own_makes_the_tensors(convnet):
    def both_ways(image):
        flat = torch.from_numpy(np.asarray(image, dtype=np.float32))
        return torch.stack([flat, flat.T])

    rows = {"image": [grey("L"), grey("L")], "label": [0, 2]}
    with pytest.raises(coar.CoarError, match="a function from an image to a tensor, or pass batches"):
        coar.load(convnet.model, rows)
    _, data = coar.load(convnet.model, rows, preprocessor=both_ways)
    assert coar.attribute(convnet.model, data, **PATHS).weights.shape[0] == 2
    with pytest.raises(DataError, match="made a PngImageFile of an image"):
        batch_of(coar.load(convnet.model, rows, preprocessor=lambda image: image)[1])


def test_pictures_without_labels_are_told_how_to_get_some(tmp_path):
    import timm
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match=r"add one .images may lie in a folder for each class"):
        coar.load(timm.create_model("resnet10t", num_classes=3), str(tmp_path))
