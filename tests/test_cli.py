"""The command line: every verb on real input, the exit codes, one clear line for every error."""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from other_processes import forked

import hf_coar as coar
from hf_coar import cli, demo, explore, models
from hf_coar.cli import editing, methods, verbs
from hf_coar.editing import edited
from hf_coar.storage import interrupts

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
    assert "24 examples × 832 components" in out and f"report: {folder / 'report.html'}" in out
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
    assert {path.name.split("-")[0] for path in shards} == {"rounds", "flips", "far", "fresh"}
    code, out, err = hf_coar(
        "attribute", MODEL, IMAGES, "--split", "train[:24]", "--rounds", 2, "--batch-size", 12, "--out", run, "--json"
    )
    assert code == 0 and json.loads(out)["cost"] == 61 + 30 + 10 + 20
    assert "832 components" in err and "120 forward passes an example" in err
    assert {path: path.stat().st_mtime_ns for path in run.glob("shards/*")} == shards


def test_evaluate_takes_model_and_data_from_the_attributions(run, tmp_path):
    code, out, _ = hf_coar("evaluate", run, "--n-masks", 20, "--out", tmp_path / "e")
    assert code == 0 and "95 % interval" in out
    code, out, _ = hf_coar("evaluate", run, "--n-masks", 20, "--out", tmp_path / "e", "--json")
    figures = json.loads(out)
    assert figures == json.loads((tmp_path / "e" / "evaluation.json").read_text())
    # As fitted, a quarter of it, and four components, as edits ablate.
    assert [entry["ablated_fraction"] for entry in figures["fractions"]] == [0.05, 0.0125, 4 / 832]
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


def test_edit_in_steps(run, tmp_path):
    words = ["edit", run, "--decrease", "label=8", "--rule", "covariance", "--n-components", 5]
    code, out, _ = hf_coar(*words, "--step", 2, "--out", tmp_path / "m", "--json")
    assert code == 0 and len(json.loads(out)["components"]) == 5
    record = json.loads((tmp_path / "m" / edited.RECORD).read_text())
    assert record["step"] == 2 and record["rule"] == "covariance"
    code, _, err = hf_coar(*words, "--step", 2, "--split", "train[1:25]", "--out", tmp_path / "n")
    assert code == 2 and "not those of before" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reference", "label=8"], "are in both decrease and reference"),
        (["--reference", "900"], "out of range"),
        (["--step", "0"], "step=0; in steps it must be a whole number"),
        (["--n-components", "0"], "n_components=0"),
    ],
)
def test_edits_in_steps_that_make_no_sense_cost_no_pass(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(editing.pipeline, "reopen", lambda *_, **__: pytest.fail("the model is loaded"))
    words = ["edit", run, "--decrease", "label=8", "--n-components", 5, "--step", 2, "--out", tmp_path / "m"]
    code, _, err = hf_coar(*words, *flags)
    assert code == 2 and message in err


def test_indices_ranges_and_labels_name_examples(run):
    attributions = coar.Attributions.from_pretrained(run)
    assert editing.examples(["3", "7-9"], "increase", attributions) == [3, 7, 8, 9]
    expected = (attributions.labels == 8).nonzero().flatten().tolist()
    assert expected and editing.examples(["label=8"], "increase", attributions) == expected


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
    "no attributions": (["evaluate", MODEL], "holds no attributions: it lacks components.json; of the model there"),
    "class": (["demo", "--forget", "Hat", "--out", "OUT"], "no class 'Hat'"),
    "masks without regression": (["attribute", MODEL, IMAGES, "--n-masks", "9", "--out", "OUT"], "--method regression"),
    "rounds in words": (["attribute", MODEL, IMAGES, "--reliability", "0.9", "--out", "OUT"], "add --rounds auto"),
    "rounds of a baseline": (
        ["attribute", MODEL, IMAGES, "--method", "weight_norm", "--rounds", "2", "--out", "OUT"],
        "--method path_gradient",
    ),
    "tracker": (["attribute", MODEL, IMAGES, "--split", "train[:2]", "--log-with", "joy", "--out", "OUT"], "joy"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_clear_message(name, tmp_path):
    arguments, words = ERRORS[name]
    code, out, err = hf_coar(*[tmp_path / "out" if argument == "OUT" else argument for argument in arguments])
    message = [line for line in err.splitlines() if line.startswith("hf-coar ")]
    assert code == 2 and out == "" and len(message) == 1
    assert words in message[0]
    assert "Traceback" not in err


def test_other_settings_are_refused(run):
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
    for verb in cli.parser()._subparsers._group_actions[0].choices:
        code, out, _ = hf_coar(verb, "--help")
        assert (
            code == 0 and f"example:\n  hf-coar {verb}" in out and f"usage: hf-coar {verb}" in out and "--json" in out
        )


MISTAKES = {
    "verb": (["attribut"], "did you mean attribute?"),
    "flag": (["components", MODEL, "--granulraity", "head"], "did you mean --granularity?"),
    "choice": (["edit", "runs/x", "--rule", "welsh", "--out", "x"], "did you mean welch?"),
    "missing": (["attribute", MODEL], "required: data, --out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistyped_flags_take_two_lines(name):
    arguments, words = MISTAKES[name]
    code, out, err = hf_coar(*arguments)
    assert code == 2 and out == "" and words in err and "--help" in err.splitlines()[1] and len(err.splitlines()) == 2


@pytest.mark.parametrize(("begun", "words"), [(True, "run the same command again"), (False, "nothing was written")])
def test_ctrl_c_says_whether_there_is_something_to_go_on_with(monkeypatch, tmp_path, begun, words):
    def interrupt(*arguments, **keywords):
        if begun:
            (tmp_path / "run.json").write_text('{"task": "attribute"}')
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs.pipeline, "attribute", interrupt)
    code, out, err = hf_coar("attribute", MODEL, IMAGES, "--out", tmp_path)
    assert code == 130 and out == "" and words in err


@pytest.mark.parametrize("module", ["torch", "hf_coar.explore", "transformers"])
@pytest.mark.parametrize("command", [["-m", "hf_coar"], ["hf-coar"]])
def test_ctrl_c_while_importing_takes_one_line(tmp_path, module, command):
    """Whatever is imported when it comes."""
    code = """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent in the background ignores
        class Interrupting:
            def find_spec(self, name, *arguments):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code).format(module=module))
    script = tmp_path / "hf-coar"
    script.write_text("import sys\nfrom hf_coar.cli import main\nsys.exit(main())\n")
    words = [str(script) if word == "hf-coar" else word for word in command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(coar.__file__).parents[1])])}
    words = [sys.executable, *words, "demo"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line][-1].endswith("interrupted; nothing was written")


@pytest.mark.parametrize(("words", "code"), [(["completion", "bash"], 0), (["show", "nothing"], 2)])
def test_ctrl_c_after_a_command_is_done_changes_nothing(tmp_path, words, code):
    """While the interpreter ended, `saved in …` was followed by an end by signal."""
    site = """
        import atexit, os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(site))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(coar.__file__).parents[1])])}
    words = [sys.executable, "-m", "hf_coar", *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == code and "KeyboardInterrupt" not in done.stderr and bool(done.stdout) == (code == 0)


@pytest.mark.parametrize(
    ("argv", "whole", "expected"),
    [
        (["-m", "demo"], ["python", "-u", "-m", "hf_coar", "demo"], True),
        (["/bin/hf-coar", "demo"], ["python", "/bin/hf-coar", "demo"], True),
        (["hf-coar-script.pyw"], [], True),
        (["-m", "hf_coar"], ["python", "-m", "pytest", "hf_coar"], False),
        (["-c"], ["python", "-c", "import hf_coar"], False),
        (["notebook.py", "hf-coar"], ["python", "notebook.py", "hf-coar"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_ends_quietly(argv, whole, expected):
    assert interrupts.is_command(argv, whole) == expected


def test_python_dash_m():
    code, out, _ = hf_coar("--version")
    assert code == 0 and out.strip() == f"hf-coar {coar.__version__}"
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


def test_no_colour_but_on_a_terminal(monkeypatch):
    """Neither in a pipe nor where NO_COLOR is set; the words are the same."""
    from io import StringIO

    from hf_coar.cli import terminal

    class Terminal(StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.red("wrong", Terminal()) == "\033[31mwrong\033[0m"
    assert terminal.red("wrong", StringIO()) == "wrong"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.red("wrong", Terminal()) == "wrong"
    done = forked(lambda: cli.main(["components", MODEL]))
    assert done.returncode == 0 and done.stdout and "\033" not in done.stdout + done.stderr


@pytest.mark.usefixtures("pictures")
def test_evaluation_draws_the_page_and_the_card_shows_the_pictures(run):
    code, out, _ = hf_coar("evaluate", run, "--n-masks", 10, "--fractions", 0.05)
    assert code == 0 and f"report: {run / 'report.html'}" in out
    assert "Predicted against measured" in (run / "report.html").read_text(encoding="utf-8")
    assert "](pictures/predicted_against_measured.png)" in (run / "README.md").read_text(encoding="utf-8")
    page = (run / "report.html").read_bytes()
    code, _, _ = hf_coar("attribute", "--config", run / "run.yaml")  # a repeated run keeps it
    assert code == 0 and (run / "report.html").read_bytes() == page


def test_methods_from_flags():
    def method(*words):
        return methods.chosen(cli.parser().parse_args(["attribute", "m", "d", "--out", "x", *words]))

    assert method() == "auto"
    assert (
        method("--rounds", "0") == method("--method", "path_gradient", "--rounds", "0") == coar.PathGradient(rounds=0)
    )
    auto = coar.PathGradient(rounds="auto", reliability=0.9, max_rounds=8)
    assert method("--rounds", "auto", "--reliability", "0.9", "--max-rounds", "8") == auto
    assert method("--method", "regression", "--solver", "ard", "--n-masks", "9") == coar.Regression(9, coar.ARD())
    by_prior = coar.Regression(prior=coar.PathGradient(rounds=2))
    assert method("--method", "regression", "--prior", "path_gradient", "--rounds", "2") == by_prior
    assert method("--method", "weight_norm") == coar.baselines.WeightNorm()


def test_explore_passes_its_flags_on(run, tmp_path, monkeypatch):
    seen = {}
    keywords = set(inspect.signature(explore.launch).parameters)
    address = "http://h:1/"
    monkeypatch.setattr(verbs.explorer, "launch", lambda *given, **named: seen.update(named, given=given) or address)
    code, out, _ = hf_coar("explore", run, "--port", 1, "--open-browser", "--share", "--json")
    assert code == 0 and json.loads(out) == {"address": address}
    assert seen["given"] == (str(run),) and seen["port"] == 1 and seen["open_browser"] and seen["share"]
    assert set(seen) - {"given"} <= keywords
    monkeypatch.setattr(verbs.explorer, "export", lambda *given, **named: seen.update(named, given=given) or tmp_path)
    code, out, _ = hf_coar("explore", run, "--export", tmp_path)
    assert code == 0 and str(tmp_path) in out and seen["given"] == (str(run), str(tmp_path))


def test_trackers_leave_standard_output_to_the_result(tmp_path):
    pytest.importorskip("tensorboard")
    command = ["attribute", MODEL, IMAGES, "--split", "train[:2]", "--rounds", "2", "--include", "layer3.*", "--json"]
    command += ["--log-with", "tensorboard", "--out", str(tmp_path / "r")]
    done = forked(lambda: cli.main(command))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_examples"] == 2
    assert list((tmp_path / "r" / "logs").rglob("events.*"))


def test_a_call_of_ones_own_is_named_by_a_flag(tmp_path):
    calls = tmp_path / "calls.py"
    calls.write_text(
        "def upside_down(model, batch):\n    return model(batch['pixel_values'].flip(2))\n\n\nNUMBER = 3\n"
    )
    words = ["attribute", MODEL, IMAGES, "--split", "train[:4]", "--rounds", 0, "--out", tmp_path / "run"]
    code, _, err = hf_coar(*words, "--call", "upside_down")
    assert code == 2 and "--call upside_down: name a function" in err and not (tmp_path / "run").exists()
    code, _, err = hf_coar(*words, "--import", calls, "--call", "NUMBER")
    assert code == 2 and "they define upside_down" in err
    own = ["--import", calls, "--call", "upside_down"]
    assert hf_coar(*words, *own)[0] == 0
    attributions = coar.Attributions.from_pretrained(tmp_path / "run")
    assert attributions.provenance.call == "calls.upside_down"
    code, _, err = hf_coar("evaluate", tmp_path / "run", "--n-masks", 3)
    assert code == 2 and "call=calls.upside_down" in err
    assert hf_coar("evaluate", tmp_path / "run", "--n-masks", 3, *own)[0] == 0
    edited = ["edit", tmp_path / "run", "--decrease", 0, "--n-components", 2, "--step", 1, "--out", tmp_path / "m"]
    assert hf_coar(*edited, *own)[0] == 0


def test_edits_by_task(tmp_path):
    """A class of the demo's model, with figures; and flags that do not go together."""
    words = ["edit", MODEL, IMAGES, "--split", "train[:500]", "--forget", "label=bag", "--out", tmp_path / "m"]
    code, out, err = hf_coar(*words, "--others-within", "4%", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["figures"]["target"]["after"] <= 0.15 and found["figures"]["others"]["before"] > 0.85
    assert found["figures"]["rivals"]["logit_bias"]["target"]["after"] == 0 and found["components"]
    assert "accuracy on 'Bag'" in (tmp_path / "m" / "README.md").read_text().replace("\\", "")
    assert json.loads((tmp_path / "m" / "coar_edit.json").read_text())["components"]
    for more, message in (
        (["--fix", "3"], "--forget, --fix in one edit"),
        (["--rule", "welch"], "--rule is for edits of attributions"),
        (["--others-within", "much"], "--others-within much: give a share"),
    ):
        code, _, err = hf_coar(*words[:-1], tmp_path / "n", *more)
        assert code == 2 and message in err
    code, _, err = hf_coar("edit", MODEL, "--forget", "bag", "--out", tmp_path / "n")
    assert code == 2 and "needs a model and its data set" in err
    code, _, err = hf_coar("edit", MODEL, IMAGES, "--out", tmp_path / "n")
    assert code == 2 and "nothing to edit for" in err
    code, _, err = hf_coar("edit", MODEL, IMAGES, "--match", IMAGES, "--keep-head", "--out", tmp_path / "n")
    assert code == 2 and "--keep-head is for --forget, --fix, --lift; --match never touches" in err


@pytest.mark.parametrize(("flags", "expected"), [((), {}), (("--keep-head",), {"refit": None})])
@pytest.mark.parametrize(("task", "word"), [("forget", "bag"), ("fix", 3), ("lift", "label")])
def test_the_last_layer_is_left_as_it_is_on_request(tmp_path, monkeypatch, task, word, flags, expected):
    given = []

    def made(model, data, what, **options):
        given.append(options)
        raise coar.errors.CoarError("that is all")

    monkeypatch.setattr(editing.editing, task, made)
    code, _, err = hf_coar("edit", MODEL, IMAGES, f"--{task}", word, *flags, "--out", tmp_path / "m")
    assert code == 2 and "that is all" in err and given == [{"rivals": "quick", **expected}]


def test_an_edit_of_attributions_is_measured(run, tmp_path):
    code, out, err = hf_coar("edit", run, "--decrease", "label=8", "--n-components", 5, "--out", tmp_path / "m")
    assert code == 0 and "checked on nothing" in err
    assert "on the examples that chose it" in out and "mean output of those to fall" in out
    code, _, err = hf_coar("edit", run, "--decrease", "label=8", "--out", tmp_path / "n")
    assert code == 2 and "20 are needed" in err and "(or coar.edit or --n-components, which check nothing)" in err
    code, _, err = hf_coar("edit", run, "--decrease", 900, "--out", tmp_path / "n")
    assert code == 2 and "decrease=[900]" in err and "--n-components" not in err  # with which it is no example either
