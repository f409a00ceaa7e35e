"""The scripts of the gallery: their data, and what they make of models that other packages hold."""

import argparse
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == SCRIPTS:
            del sys.modules[name]


def test_every_sort_of_pair_is_labelled(scripts, tmp_path):
    import datasets
    import gallery_data
    import sentence_pairs

    gallery_data.prepare(argparse.Namespace(only=["pairs"], models=tmp_path))
    found = datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path))
    names = found.features["label"].names
    assert len(names) == 3 and len(found) == sum(
        map(len, (sentence_pairs.DENIED, sentence_pairs.SAME, sentence_pairs.SWAPPED))
    )
    for row in found:
        words = [set(row[f"sentence{i}"].lower().strip(".").split()) for i in (1, 2)]
        assert ("not" in words[1] - words[0]) == (names[row["label"]] == "denial")
        assert row["sentence1"] != row["sentence2"]


def test_a_token_a_letter(scripts, tmp_path):
    from convert_benchmark_models import by_character
    from transformers import AutoTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]
    by_character(vocabulary).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = tokenizer(["EVQL", "AX"], padding=True)
    expected = [["[CLS]", *"EVQL", "[SEP]"], ["[CLS]", "A", "[UNK]", "[SEP]", "[PAD]", "[PAD]"]]
    assert [[vocabulary[i] for i in ids] for ids in found["input_ids"]] == expected
    assert tokenizer.decode(found["input_ids"][0], skip_special_tokens=True) == "EVQL"
