"""Whose folder it is: writers leave a stranger's folder as it was, and a marker tells what was made here."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import DEMO, build_net
from test_crash import data
from test_format import tiny

import hf_coar as coar
from hf_coar import cli, demo, models
from hf_coar.attributions.folders import add_evaluation
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.explore import export
from hf_coar.judging import evaluation
from hf_coar.plots import page
from hf_coar.runs.store import Store
from hf_coar.storage import cards, folders

STRANGE = {
    "model": {"config.json": b'{"architectures": ["ViTModel"]}', "model.safetensors": b"weights of years"},
    "notes": {"notes.txt": b"mine", "data/a.csv": b"1,2", "model/b.bin": b"b", "README.md": b"# mine"},
    "app": {"app.py": b"print('mine')", "data/a.csv": b"1"},
    "hidden": {".git/HEAD": b"ref: main"},
    "run": {"run.json": b'{"task": "train"}', "shards/x.safetensors": b"x"},
    "edit": {"coar_edit.json": b"[]"},
    "lies": {"config.json": b"{" * 100_000},
}


@pytest.fixture(autouse=True)
def key(tmp_path_factory, monkeypatch):
    """A user's cache of the test's own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HOME", str(home))
    return home / "hf_coar" / "key"


def stranger(folder, kind):
    for name, content in STRANGE[kind].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def content(folder):
    found = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*"))}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


@functools.cache
def mlp_attributions():
    return coar.attribute(build_net("mlp").model, data(2), method=coar.PathGradient(rounds=2), progress=False)


@functools.cache
def mlp_edited():
    attributions = mlp_attributions()
    return coar.edit(build_net("mlp").model, attributions, decrease=[0], n_components=2)


def run(command):
    assert cli.main([str(word) for word in command]) == 2
    raise CoarError("said on the screen")


def never(*arguments, **settings):
    raise AssertionError("a pass before the folder was looked at")


class Report:
    def to_json(self):
        return {"n_masks": 3, "seed": 1, "fractions": []}


def attribute(out):
    coar.attribute(build_net("mlp").model, data(2), out=out, progress=False, budget=20)


def evaluate(out):
    coar.evaluate(mlp_attributions(), build_net("mlp").model, data(2), n_masks=4, out=out, progress=False)


@functools.cache
def artefact():
    """A folder of attributions."""
    folder = Path(tempfile.mkdtemp())
    tiny().save_pretrained(folder)
    return folder


ATTRIBUTE = ["attribute", DEMO / "model", DEMO / "images.parquet", "--split", "train[:2]", "--out"]
WRITERS = {
    "attribute": attribute,
    "evaluate": evaluate,
    "judging.evaluate": lambda out: evaluation.evaluate(
        mlp_attributions(), build_net("mlp").model, data(2), [0.1], 4, 1, out=out
    ),
    "Store": lambda out: Store(out, {"seed": 0}),
    "save_pretrained": lambda out: tiny().save_pretrained(out),
    "add_evaluation": lambda out: add_evaluation(out, Report()),
    "page.write": lambda out: page.write(out, tiny()),
    "page.write_first": lambda out: page.write_first(out, tiny()),
    "edited.save": lambda out: edited.save(mlp_edited(), out),
    "save_model": lambda out: models.save_model(build_net("mlp").model, out),
    "save_model of transformers": lambda out: models.save_model(build_net("bert").model, out),
    "save_model of timm": lambda out: models.save_model(build_net("timm_vit").model, out),
    "demo": lambda out: demo.run(out, progress=False),
    "hf-coar attribute": lambda out: run([*ATTRIBUTE, out]),
    "hf-coar run": lambda out: run(["run", *ATTRIBUTE[1:], out]),
    "hf-coar demo": lambda out: run(["demo", "--out", out]),
    "hf-coar edit": lambda out: run(["edit", artefact(), "--decrease", "0", "--out", out]),
    "hf-coar evaluate": lambda out: run(["evaluate", artefact(), "--out", out]),
    "hf-coar explore": lambda out: run(["explore", artefact(), *EXPORTED, "--export", out]),
    "explore.export": lambda out: export(artefact(), out, model=DEMO / "model", data=DEMO / "images.parquet"),
}
EXPORTED = ["--model", DEMO / "model", "--data", DEMO / "images.parquet"]


def test_every_verb_that_writes_is_tried():
    (verbs,) = (action.choices for action in cli.parser()._actions if isinstance(action.choices, dict))
    flags = {name: set(verb._option_string_actions) for name, verb in verbs.items()}
    writing = {f"hf-coar {name}" for name, known in flags.items() if known & {"--out", "--export"}}
    assert {"hf-coar attribute", "hf-coar edit"} < writing and writing <= WRITERS.keys()


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_strangers_folder_is_left_as_it_was(tmp_path, writer, kind):
    before = content(stranger(tmp_path, kind))
    with pytest.raises(CoarError):
        WRITERS[writer](tmp_path)
    assert content(tmp_path) == before


def test_edit_and_evaluate_on_the_command_line(tmp_path, capsys):
    model = stranger(tmp_path / "model", "model")
    before = content(model)
    tiny().save_pretrained(tmp_path / "a")
    for command in (["edit", tmp_path / "a", "--decrease", "0"], ["evaluate", tmp_path / "a"]):
        assert cli.main([str(word) for word in [*command, "--out", model]]) == 2
        said = capsys.readouterr().err
        assert "config.json, model.safetensors" in said and "new or empty folder" in said and "--overwrite" in said
    assert cli.main(["edit", str(tmp_path / "a"), "--decrease", "0", "--out", str(tmp_path / "a")]) == 2
    assert "holds a run or attributions" in capsys.readouterr().err
    assert content(model) == before


def test_the_folder_is_looked_at_before_the_first_pass(tmp_path):
    model, batches = build_net("mlp").model, data(2)
    attributions = mlp_attributions()
    model.register_forward_pre_hook(never)
    with pytest.raises(CoarError, match="other things"):
        coar.attribute(model, batches, out=stranger(tmp_path, "notes"), progress=False, budget="1 min")
    with pytest.raises(CoarError, match="other things"):
        coar.evaluate(attributions, model, batches, out=tmp_path, progress=False)


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_place_that_is_read_only_is_told_before_the_first_pass(tmp_path, monkeypatch, capsys, inside):
    def refused(path, mode):  # of a test that root runs, everything can be written
        return os.fspath(path) != str(tmp_path) or not mode & os.W_OK

    artefact_of = artefact()
    monkeypatch.setattr(os, "access", refused)
    monkeypatch.setattr(coar.editing, "forget", never)
    model, images, out = (str(path) for path in (DEMO / "model", DEMO / "images.parquet", tmp_path / inside))
    for command in (["edit", model, images, "--forget", "Bag"], ["edit", str(artefact_of), "--decrease", "0"]):
        assert cli.main([*command, "--out", out]) == 2
        assert f"{tmp_path} is read-only" in capsys.readouterr().err
    model = build_net("mlp").model
    model.register_forward_pre_hook(never)
    with pytest.raises(CoarError, match="read-only"):
        coar.attribute(model, data(2), out=out, progress=False)
    assert not content(tmp_path)


@pytest.mark.parametrize("free", [0, 4096])
def test_a_full_disk_is_told_before_the_first_pass(tmp_path, monkeypatch, free):
    """The error named a file of ours and promised to keep what is finished; the marker stayed in the folder."""
    model = build_net("mlp").model
    model.register_forward_pre_hook(never)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: (2**40, 2**40 - free, free))
    with pytest.raises(CoarError, match=rf"the disk of {tmp_path} is full, {free:,} bytes are free"):
        coar.attribute(model, data(2), out=tmp_path / "run", progress=False)
    assert not content(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: (0, 0, 0))  # unknown
    folders.check(tmp_path / "run", folders.ATTRIBUTIONS)


def test_an_interrupted_command_writes_nothing_into_a_strangers_folder(tmp_path, monkeypatch):
    before = content(stranger(tmp_path, "notes"))

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "check", interrupted)
    assert cli.main([str(word) for word in [*ATTRIBUTE, tmp_path]]) == 130
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["attribute", "save_pretrained", "edited.save", "save_model of transformers"])
def test_the_own_folder_may_be_written_again(tmp_path, name):
    for _ in range(2):
        WRITERS[name](tmp_path / "new")
    (tmp_path / "empty").mkdir()
    WRITERS[name](tmp_path / "empty")
    assert content(tmp_path / "new").keys() == content(tmp_path / "empty").keys()


def test_overwrite_replaces_files_of_the_same_names_only(tmp_path):
    before = content(stranger(tmp_path, "notes"))
    (tmp_path / "config.json").write_text("{}")
    tiny().save_pretrained(tmp_path, overwrite=True)
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before, "their README.md too"
    assert len(coar.Attributions.from_pretrained(tmp_path)) == 2
    tiny().save_pretrained(tmp_path)
    models.save_model(build_net("mlp").model, stranger(tmp_path / "m", "model"), overwrite=True)
    assert json.loads((tmp_path / "m/config.json").read_text()) == {"architectures": ["ViTModel"]}
    with pytest.raises(CoarError, match="holds a model"):
        tiny().save_pretrained(tmp_path / "m")


def test_folders_of_older_versions_are_known(tmp_path):
    """They have no marker."""
    attribute(tmp_path / "run")
    evaluate(tmp_path / "evaluation")
    edited.save(mlp_edited(), tmp_path / "edited")
    tiny().save_pretrained(tmp_path / "saved")
    for path in tmp_path.rglob(folders.MARKER):
        path.unlink()
    for name, kind in {"run": "attributions", "evaluation": "attributions", "edited": "model"}.items():
        assert folders.kind_of(tmp_path / name) == kind
    before = content(tmp_path / "run")
    attribute(tmp_path / "run")
    after = content(tmp_path / "run")
    assert after.pop(folders.MARKER) and after == before
    evaluate(tmp_path / "evaluation")
    edited.save(mlp_edited(), tmp_path / "edited")
    tiny().save_pretrained(tmp_path / "saved")
    (tmp_path / "run/config.json").unlink()
    (tmp_path / "run" / folders.MARKER).unlink()
    attribute(tmp_path / "run")
    assert content(tmp_path / "run") == {**before, folders.MARKER: (tmp_path / "run" / folders.MARKER).read_bytes()}


def test_kinds_do_not_mix(tmp_path):
    folders.claim(tmp_path, folders.MODEL)
    for kind in (folders.ATTRIBUTIONS, folders.DEMO, folders.EXPLORER):
        with pytest.raises(CoarError, match="holds a model"):
            folders.claim(tmp_path, kind)
    folders.claim(tmp_path, folders.MODEL)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoarError, match="is a file"):
        folders.claim(tmp_path / "file", folders.MODEL)


@pytest.mark.parametrize(
    "marker", [b"", b"[]", b"{", b"null", b'{"kind": 1}', b'{"kind": "x"}', b"[" * 200_000, b" " * 2**21]
)
def test_a_marker_that_is_none(tmp_path, marker):
    (tmp_path / folders.MARKER).write_bytes(marker)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CoarError, match="other things"):
        folders.claim(tmp_path, folders.MODEL)
    assert not folders.made_here(tmp_path)


def test_a_marker_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / folders.MARKER)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CoarError, match="other things"):
        folders.claim(tmp_path, folders.MODEL)
    assert not folders.made_here(tmp_path)


# ------------------------------------------------------------------------------------------------------------ made here


def test_what_was_made_here_says_so_wherever_it_goes(tmp_path):
    attribute(tmp_path / "run")
    assert folders.made_here(tmp_path / "run")
    assert coar.Attributions.from_pretrained(tmp_path / "run").made_here
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert folders.made_here(tmp_path / "copy") and folders.made_here(tmp_path / "moved")
    coar.Attributions.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "again")
    assert folders.made_here(tmp_path / "again")
    edited.save(mlp_edited(), tmp_path / "edited")
    assert folders.made_here(tmp_path / "edited")


def test_what_comes_from_elsewhere_cannot_claim_it(tmp_path, key):
    attribute(tmp_path / "theirs")
    key.unlink()  # another user, another machine
    theirs = tmp_path / "theirs"
    assert not folders.made_here(theirs)
    attribute(tmp_path / "mine")
    assert folders.made_here(tmp_path / "mine")

    def as_theirs(change):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(theirs, tmp_path / "x")
        change(tmp_path / "x")
        return folders.made_here(tmp_path / "x")

    mine = (tmp_path / "mine" / folders.MARKER).read_bytes()
    marker = json.loads(mine)
    assert not as_theirs(lambda x: None)
    # Mine, which I published, on a configuration of theirs.
    config = {**json.loads((theirs / "config.json").read_text()), "data": {"id": "/etc"}}
    assert not as_theirs(
        lambda x: ((x / folders.MARKER).write_bytes(mine), (x / "config.json").write_text(str(config)))
    )
    forged = [
        {**marker, "record": None},
        {**marker, "made": []},
        {**marker, "signature": None},
        {**marker, "kind": "model"},
    ]
    for one in forged:
        assert not as_theirs(lambda x, one=one: (x / folders.MARKER).write_text(json.dumps(one)))


def test_working_in_a_downloaded_folder_does_not_vouch_for_it(tmp_path, key):
    tiny().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / folders.MARKER).unlink()  # as the Hub gives it
    add_evaluation(tmp_path / "theirs", Report())
    page.write(tmp_path / "theirs", tiny())
    assert not folders.made_here(tmp_path / "theirs")
    coar.Attributions.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "resaved")
    assert not folders.made_here(tmp_path / "resaved")
    edited.save(mlp_edited(), tmp_path / "edited")
    model = build_net("bert").model
    models.save_model(model, tmp_path / "bert")
    (tmp_path / "bert/coar_edit.json").write_bytes((tmp_path / "edited/coar_edit.json").read_bytes())
    models.save_model(models.load_model(tmp_path / "bert"), tmp_path / "again")
    assert not folders.made_here(tmp_path / "again"), "the record of the edit is anybody's"


def test_the_key_is_private_and_nothing_fails_without_one(tmp_path, key):
    models.save_model(build_net("mlp").model, tmp_path / "a")
    assert not key.exists(), "there is nothing to vouch for"
    attribute(tmp_path / "run")
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    key.chmod(0o644)
    assert not folders.made_here(tmp_path / "run"), "others may know it"
    attribute(tmp_path / "more")
    key.unlink()
    shutil.rmtree(key.parent)
    key.parent.write_text("a file where the folder would be")
    attribute(tmp_path / "without")
    assert not folders.made_here(tmp_path / "without")


def test_pushing_leaves_the_marker_at_home(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("hf_coar.storage.hub.create", lambda repo_id, *rest: repo_id)
    monkeypatch.setattr(
        "hf_coar.storage.hub.upload", lambda folder, *rest, **more: pushed.extend(p.name for p in folder.rglob("*"))
    )
    edited.save(mlp_edited(), tmp_path / "edited")
    edited.push_to_hub(tmp_path / "edited", "a/b")
    tiny().push_to_hub("a/b")
    assert "model.safetensors" in pushed and "attributions.safetensors" in pushed and folders.MARKER not in pushed


def test_files_of_a_base_are_not_taken_from_where_a_record_says(tmp_path):
    """A record of an edit may come from anybody, and name any folder of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "tokenizer.json").write_text("secret")
    model = build_net("bert").model
    record = {"rule": "welch", "components": ["a"], "parameters": [], "base": {"library": "transformers"}}
    record["base"]["id"] = str(secret)
    models.save_model(model, tmp_path / "theirs")
    (tmp_path / "theirs/coar_edit.json").write_text(json.dumps(record))
    edited.save(models.load_model(tmp_path / "theirs"), tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()


# ----------------------------------------------------------------------------------------------- whose evaluation it is


def other():
    found = tiny()
    found.weights[0, 0] = 9.0
    return found


def judged(attributions):
    class Judged(Report):
        def to_json(self):
            row = {"ablated_fraction": 0.1, "correlation": 0.987, "interval": [0.9, 1.0], "slope": 1.0}
            return {**super().to_json(), "of": attributions.fingerprint(), "fractions": [row]}

    return Judged()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_evaluation_appears_on_the_card_of_what_it_judged_alone(tmp_path, dtype):
    tiny().save_pretrained(tmp_path, report=judged(tiny()), dtype=dtype, max_shard_size=16)
    assert "0.987" in (tmp_path / "README.md").read_text() and (tmp_path / cards.RESULTS).exists()
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert loaded.evaluation["fractions"]
    loaded.save_pretrained(tmp_path / "b", dtype="float16")
    assert "0.987" in (tmp_path / "b/README.md").read_text()
    tiny().save_pretrained(tmp_path / "b")
    if dtype == "float32":
        tiny().save_pretrained(tmp_path)
        assert "0.987" in (tmp_path / "README.md").read_text(), "the same weights again"
    other().save_pretrained(tmp_path)
    assert "0.987" not in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "evaluation.json").exists() and not (tmp_path / cards.RESULTS).exists()
    with pytest.raises(CoarError, match="of other attributions"):
        other().save_pretrained(tmp_path, report=judged(tiny()))
    with pytest.raises(CoarError, match="of other attributions"):
        add_evaluation(tmp_path, judged(tiny()))


def test_an_evaluation_that_was_copied_beside_others_is_left_out(tmp_path, caplog):
    tiny().save_pretrained(tmp_path / "a", report=judged(tiny()))
    other().save_pretrained(tmp_path / "b")
    (tmp_path / "b/evaluation.json").write_bytes((tmp_path / "a/evaluation.json").read_bytes())
    assert coar.Attributions.from_pretrained(tmp_path / "b").evaluation is None
    assert "of other weights" in caplog.text


def test_an_evaluation_of_an_older_version_stays_with_its_weights(tmp_path):
    tiny().save_pretrained(tmp_path, report=judged(tiny()))
    known = json.loads((tmp_path / "evaluation.json").read_text())
    del known["of"]
    (tmp_path / "evaluation.json").write_text(json.dumps(known))
    tiny().save_pretrained(tmp_path)
    assert "0.987" in (tmp_path / "README.md").read_text()
    other().save_pretrained(tmp_path)
    assert "0.987" not in (tmp_path / "README.md").read_text()


def test_evaluate_says_what_it_judged(tmp_path):
    attributions = mlp_attributions()
    report = coar.evaluate(attributions, build_net("mlp").model, data(2), n_masks=4, out=tmp_path, progress=False)
    assert report.of == attributions.fingerprint() == json.loads((tmp_path / "evaluation.json").read_text())["of"]
    assert torch.equal(attributions.weights, mlp_attributions().weights)
