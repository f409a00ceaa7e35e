"""The command line: every verb on real input, the exit codes, one clear line for every error."""

import json
import re
import subprocess
import sys

import pytest
import torch

import hf_coar as coar
from hf_coar import cli, demo, models

MODEL, IMAGES = str(demo.MODEL), str(demo.IMAGES)


def hf_coar(*arguments):
    """Run a verb in this process: (exit code, stdout, stderr)."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Attributions made by the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    code, out, _ = hf_coar(
        "attribute", MODEL, IMAGES, "--split", "train[:24]", "--rounds", 2, "--batch-size", 12, "--out", folder
    )
    assert code == 0
    assert "24 examples × 832 components" in out
    return folder


def test_components_lists_groups_and_what_was_left_out():
    code, out, _ = hf_coar("components", MODEL)
    assert code == 0
    assert out.startswith("832 components")
    assert "downsample" in out and "left out" in out and "classifier" in out
    code, out, _ = hf_coar("components", MODEL, "--include", "layer3.*", "--exclude", "*.downsample.*", "--json")
    assert code == 0 and json.loads(out)["components"] == 4 * 72


def test_attribute_says_its_cost_before_and_resumes(run):
    shards = {path: path.stat().st_mtime_ns for path in run.glob("shards/*")}
    assert len(shards) == 2
    code, out, err = hf_coar(
        "attribute", MODEL, IMAGES, "--split", "train[:24]", "--rounds", 2, "--batch-size", 12, "--out", run, "--json"
    )
    assert code == 0 and json.loads(out)["cost"] == 60
    assert "832 components" in err and "60 forward passes an example" in err
    assert {path: path.stat().st_mtime_ns for path in run.glob("shards/*")} == shards


def test_evaluate_takes_model_and_data_from_the_attributions(run, tmp_path):
    code, out, _ = hf_coar("evaluate", run, "--n-masks", 20, "--out", tmp_path / "e")
    assert code == 0 and "95 % interval" in out
    code, out, _ = hf_coar("evaluate", run, "--n-masks", 20, "--out", tmp_path / "e", "--json")
    figures = json.loads(out)
    assert figures == json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert [entry["ablated_fraction"] for entry in figures["fractions"]] == [0.05, 0.0125]
    assert figures["fractions"][0]["correlation"] > 0.5


def test_edit_saves_an_ordinary_model(run, tmp_path):
    import timm

    code, out, _ = hf_coar("edit", run, "--decrease", "label=8", "--n-components", 5, "--out", tmp_path / "m")
    assert code == 0
    names = re.findall(r"^  (\S+ filter \d+)$", out, flags=re.MULTILINE)
    assert len(names) == 5
    edited = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True)
    original = models.load_model(MODEL)
    changed = [
        f"{name.removesuffix('.weight')} filter {row}"
        for name, weight in edited.state_dict().items()
        if weight.dim() == 4
        for row in (weight != original.state_dict()[name]).flatten(1).any(1).nonzero().flatten().tolist()
    ]
    assert sorted(changed) == sorted(names)
    card = (tmp_path / "m" / "README.md").read_text()
    assert all(name in card for name in names)


def test_indices_ranges_and_labels_name_examples(run):
    attributions = coar.Attributions.from_pretrained(run)
    assert cli._examples(["3", "7-9"], "increase", attributions) == [3, 7, 8, 9]
    expected = (attributions.labels == 8).nonzero().flatten().tolist()
    assert expected and cli._examples(["label=8"], "increase", attributions) == expected


ERRORS = {
    "unknown model": (["components", "no/such-model-anywhere"], "no/such-model-anywhere"),
    "no folder": (["components", "./nowhere"], "no model './nowhere'"),
    "unknown data": (["attribute", MODEL, "nowhere.parquet", "--out", "OUT"], "no data set 'nowhere.parquet'"),
    "unknown split": (["attribute", MODEL, IMAGES, "--split", "best", "--out", "OUT"], "best"),
    "glob": (["components", MODEL, "--include", "layer9.*"], "'layer9.*' matches none"),
    "fraction": (["attribute", MODEL, IMAGES, "--ablated-fraction", "1", "--out", "OUT"], "strictly between 0 and 1"),
    "rounds": (["attribute", MODEL, IMAGES, "--rounds", "3", "--out", "OUT"], "even number"),
    "output": (["attribute", MODEL, IMAGES, "--output", "joy", "--out", "OUT"], "unknown output 'joy'"),
    "token output": (["attribute", MODEL, IMAGES, "--output", "token_margin", "--out", "OUT"], "language models"),
    "no attributions": (["evaluate", MODEL], "holds no attributions"),
    "class": (["demo", "--forget", "Hat", "--out", "OUT"], "no class 'Hat'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_clear_message(name, tmp_path):
    arguments, words = ERRORS[name]
    code, out, err = hf_coar(*[tmp_path / "out" if argument == "OUT" else argument for argument in arguments])
    message = [line for line in err.splitlines() if line.startswith("hf-coar ")]
    assert code == 2 and out == "" and len(message) == 1
    assert words in message[0]
    assert "Traceback" not in err


def test_the_seed_of_the_fit_and_other_settings_are_refused(run):
    code, _, err = hf_coar("evaluate", run, "--seed", 0)
    assert code == 2 and "seed of the fit" in err
    code, _, err = hf_coar(
        "attribute",
        MODEL,
        IMAGES,
        "--split",
        "train[:24]",
        "--rounds",
        4,
        "--seed",
        5,
        "--batch-size",
        12,
        "--out",
        run,
    )
    assert code == 2 and "seed was 0, now 5" in err and "method.rounds was 2, now 4" in err


def test_help_has_an_example_for_every_verb():
    for verb in ("components", "attribute", "evaluate", "edit", "demo"):
        code, out, _ = hf_coar(verb, "--help")
        assert code == 0 and f"example:\n  hf-coar {verb}" in out


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.pipeline, "attribute", interrupt)
    code, out, err = hf_coar("attribute", MODEL, IMAGES, "--out", tmp_path)
    assert code == 130 and out == "" and "run the same command again" in err


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "hf_coar", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"hf-coar {coar.__version__}"
    done = subprocess.run([sys.executable, "-m", "hf_coar", "evaluate", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_text_classifiers_and_language_models_from_folders(tmp_path):
    """The whole way with a transformers model, its tokenizer and a data set on disk."""
    import datasets
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "good", "bad", "film", "very", "a"]
    tokenizer = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    texts = ["a very good film", "bad film", "a good film", "very bad"]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0]})
    rows.to_parquet(tmp_path / "texts.parquet")
    config = {"vocab_size": 7, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
    for model_class, output in ((GPT2ForSequenceClassification, "margin"), (GPT2LMHeadModel, "token_log_prob")):
        torch.manual_seed(0)
        folder = tmp_path / model_class.__name__
        model_class(GPT2Config(**config)).save_pretrained(folder)
        fast.save_pretrained(folder)
        code, _, err = hf_coar(
            "attribute", folder, tmp_path / "texts.parquet", "--output", output, "--rounds", 2, "--batch-size", 2,
            "--ablated-fraction", 0.1, "--out", tmp_path / output,
        )  # fmt: skip
        assert code == 0, err
        attributions = coar.Attributions.from_pretrained(tmp_path / output)
        assert attributions.weights.shape == (4, 16 * 3 + 16 + 64 + 16)
        assert attributions.weights.abs().sum(1).min() > 0
        saved = folder / "edited"
        code, _, err = hf_coar("edit", tmp_path / output, "--increase", 0, "--n-components", 2, "--out", saved)
        assert code == 0, err
        ablated = [
            int((weight == 0).all(0).sum())  # transformers' Conv1D keeps its weight as [in, out]
            for name, weight in model_class.from_pretrained(saved).named_parameters()
            if "c_" in name and weight.dim() == 2
        ]
        assert sum(ablated) == 2
