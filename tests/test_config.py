"""`--config FILE.yaml`: every flag by its keyword, the command line wins, and `run.yaml` repeats a run."""

import pytest
import yaml

from hf_coar import cli, demo
from hf_coar.cli import config
from hf_coar.errors import CoarError

MODEL, IMAGES = str(demo.MODEL), str(demo.IMAGES)


def written(folder, **values):
    path = folder / "flags.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def parse(*arguments):
    return config.parse(cli.parser(), [str(argument) for argument in arguments])


def verbs():
    return cli.parser()._subparsers._group_actions[0].choices


def test_a_file_gives_what_the_command_line_would(tmp_path):
    path = written(
        tmp_path, model=MODEL, data=IMAGES, split="train[:8]", rounds=6, ablated_fraction=0.1, seed=3, out="x",
        include=["layer1.*", "layer2.*"], strict=True, budget=120, granularity="module",
    )  # fmt: skip
    by_flags = parse(
        "attribute", MODEL, IMAGES, "--split", "train[:8]", "--rounds", 6, "--ablated-fraction", 0.1, "--seed", 3,
        "--out", "x", "--include", "layer1.*", "layer2.*", "--strict", "--budget", 120, "--granularity", "module",
        "--config", path,
    )  # fmt: skip
    by_file = parse("attribute", "--config", path)
    assert {**vars(by_file), "run": None} == {**vars(by_flags), "run": None}


def test_flags_on_the_command_line_win(tmp_path):
    path = written(tmp_path, model=MODEL, data=IMAGES, out="x", seed=3, rounds=6, strict=True, include=["a"])
    args = parse("attribute", "other", "--config", path, "--seed", 4, "--no-strict", "--include", "b", "c")
    assert (args.model, args.data, args.seed, args.rounds) == ("other", IMAGES, 4, 6)
    assert args.strict is False and args.include == ["b", "c"]


def test_dashes_and_nulls(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("model: m\ndata: d\nout: x\nablated-fraction: 0.2\nrounds: null\n", encoding="utf-8")
    args = parse("attribute", f"--config={path}")
    assert args.ablated_fraction == 0.2 and args.rounds is None


WRONG = {
    "unknown": ({"round": 4}, ["round (did you mean rounds?)"]),
    "unknown, nothing close": ({"xyzzy": 4}, ["no xyzzy;", "ablated_fraction, ablation, ablation_data"]),
    "type": ({"seed": 0.5}, ["seed: 0.5", "int"]),
    "choice": ({"granularity": "atom"}, ["granularity: 'atom'", "unit, input, head"]),
    "switch": ({"strict": "maybe"}, ["strict: 'maybe'", "true nor false"]),
    "list": ({"seed": [1, 2]}, ["seed: [1, 2]"]),
    "verb": ({"verb": "evaluate"}, ["for hf-coar evaluate", "this is hf-coar attribute"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_key_and_value(name, tmp_path):
    values, words = WRONG[name]
    path = written(tmp_path, model=MODEL, data=IMAGES, out="x", **values)
    with pytest.raises(CoarError) as error:
        parse("attribute", "--config", path)
    assert all(word in str(error.value) for word in [*words, str(path)])


@pytest.mark.parametrize("content", [b"- a\n", b"a: [", b"\xff\xfe\x00"])
def test_files_that_are_none(content, tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_bytes(content)
    with pytest.raises(CoarError, match=r"flags\.yaml"):
        parse("attribute", "--config", path)
    with pytest.raises(CoarError, match="cannot be read"):
        parse("attribute", "--config", tmp_path / "nowhere.yaml")


def test_errors_of_a_file_leave_with_code_2(tmp_path, capsys):
    assert cli.main(["attribute", "--config", str(written(tmp_path, round=4))]) == 2
    assert "did you mean rounds?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", verbs())
def test_every_flag_survives_the_file(verb, tmp_path):
    """What `run.yaml` says of the defaults is read back as the defaults."""
    flags = config.flags(verbs()[verb])
    needed = {name: "welch" if name == "rule" else "x" for name, flag in flags.items() if flag.required}
    needed |= {"shell": "bash"} if "shell" in flags else {}
    words = [word for name, flag in flags.items() if name in needed
             for word in ([f"--{name.replace('_', '-')}"] if flag.option_strings else []) + [needed[name]]]  # fmt: skip
    args = parse(verb, *words)
    values = {name: value for name, value in vars(args).items() if name in flags}
    path = tmp_path / "run.yaml"
    path.write_text(config.text(verb, values), encoding="utf-8")
    again = vars(parse(verb, "--config", path))
    as_list = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert {name: list(again[name]) if isinstance(again[name], tuple) else again[name] for name in flags} == as_list


def test_a_run_is_repeated_by_its_file_byte_for_byte(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["attribute", MODEL, IMAGES, "--split", "train[:6]", "--rounds", "2", "--seed", "5", "--out", str(first)]
    assert cli.main([*command, "--include", "layer2.*"]) == 0
    said = yaml.safe_load((first / "run.yaml").read_text(encoding="utf-8"))
    assert said["verb"] == "attribute" and said["seed"] == 5 and said["include"] == ["layer2.*"]
    assert not {"worker", "json", "config", "out"} & set(said)
    assert cli.main(["attribute", "--config", str(first / "run.yaml"), "--out", str(second)]) == 0
    for name in ("attributions.safetensors", "components.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert yaml.safe_load((second / "run.yaml").read_text(encoding="utf-8")) == said
    assert (first / "run.yaml").read_bytes() == (second / "run.yaml").read_bytes()
    # an evaluation in the same folder leaves the file of the run alone
    assert cli.main(["evaluate", str(first), "--n-masks", "3", "--out", str(first)]) == 0
    assert yaml.safe_load((first / "run.yaml").read_text(encoding="utf-8")) == said
    assert yaml.safe_load((first / "evaluate.yaml").read_text(encoding="utf-8"))["n_masks"] == 3
    capsys.readouterr()


def test_the_file_of_a_run_means_the_folder_in_which_it_lies(tmp_path):
    path = written(tmp_path, verb="attribute", model=MODEL, data=IMAGES)
    assert parse("attribute", "--config", path).out == str(tmp_path)
    assert parse("attribute", "--config", path, "--out", "x").out == "x"
    by_hand = written(tmp_path, model=MODEL, data=IMAGES)
    with pytest.raises(SystemExit):
        parse("attribute", "--config", by_hand)  # --out is required


def test_a_dry_run_and_an_error_write_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["attribute", MODEL, IMAGES, "--split", "train[:6]", "--rounds", "2", "--out", str(out)]
    assert cli.main([*command, "--dry-run"]) == 0
    assert cli.main([*command[:-2], "--output", "joy", "--out", str(out)]) == 2
    assert not out.exists()
    capsys.readouterr()
