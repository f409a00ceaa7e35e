"""Whatever dies, whenever: what is resumed afterwards ends in the same bytes as a run that nobody disturbed.

The runs are forked children of this process, in which everything is imported, so that fifty of them take seconds.
"""

import errno
import functools
import json
import os
import random
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import build_net
from other_processes import kill_at_step, start, wait

import hf_coar as coar
from hf_coar import cli, demo, models
from hf_coar.errors import CoarError, DataError, RunMismatchError
from hf_coar.models.outputs import Output
from hf_coar.runs import engine, workers
from hf_coar.storage import files

N_BATCHES = 4
METHODS = {"path": coar.PathGradient(rounds=2), "regression": coar.Regression(n_masks=70)}


def data(n_batches=N_BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [
        {"inputs": torch.randn(2, 6, generator=generator), "labels": torch.tensor([i % 3, 1])} for i in range(n_batches)
    ]


def attribute(folder, method="path", **options):
    model = build_net("mlp").model
    with engine.running(**options):
        return coar.attribute(
            model, data(), method=METHODS[method], ablated_fraction=0.1, seed=5, out=folder, progress=False
        )


def content(folder):
    """Bytes by name of every file of a run, but what a killed writer left behind."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".tmp"]
    paths = [path for path in paths if not path.name.startswith(".tmp")]  # safetensors', before it renames them
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def a_shard_a_unit(monkeypatch):
    """Every unit has a shard of its own: how many short ones share one depends on how fast they were."""
    monkeypatch.setattr("hf_coar.runs.outbox.SECONDS", 0.0)


@functools.cache
def undisturbed_run(method):
    """(name of the method, seconds of a run, content of its folder)."""
    with tempfile.TemporaryDirectory() as folder:
        attribute(Path(folder) / "0", method)
        started = time.monotonic()
        attribute(Path(folder) / "1", method)
        return method, time.monotonic() - started, content(Path(folder) / "1")


@pytest.fixture(params=METHODS)
def any_undisturbed(request):
    return undisturbed_run(request.param)


@pytest.fixture
def undisturbed():
    return undisturbed_run("path")


def finish(folder, method):
    assert wait(start(lambda: attribute(folder, method))) == 0


def test_a_shard_under_the_name_of_another_is_computed_again(tmp_path):
    """Shards of two parts have the same tensors of the same examples: nothing else tells them apart."""

    def attribute_in_two_parts():
        model, method = build_net("mlp").model, coar.Regression(n_masks=128)
        coar.attribute(model, data(), method=method, ablated_fraction=0.1, out=tmp_path, progress=False)

    attribute_in_two_parts()
    expected = content(tmp_path)
    one, other = sorted((tmp_path / "shards").glob("masks-*-000000000-000000002.safetensors"))[:2]
    assert one.stat().st_size == other.stat().st_size
    other.write_bytes(one.read_bytes())
    for name in ("config.json", "attributions.safetensors"):
        (tmp_path / name).unlink()
    attribute_in_two_parts()
    assert content(tmp_path) == expected


def test_what_checks_cannot_read_is_an_error_and_no_other_number(tmp_path):
    """Fresh sets set the scale: without them the weights would be others."""
    attribute(tmp_path)
    (tmp_path / "length-fresh.json").write_text('{"task": "attribute"}')
    with pytest.raises(CoarError, match=r"length-fresh\.json"):
        attribute(tmp_path)


# ------------------------------------------------------------------------------------------------------- random moments


def kill_at_random_moments(folder, method, seconds, n_kills, n_processes, seed=0):
    """Start, kill, start again …; begins anew in another folder when a run gets to its end. Returns the kills."""
    random.seed(seed)
    kills, folders = 0, [folder / "0"]
    while kills < n_kills:
        options = [{"worker": f"{i}/{n_processes}"} for i in range(n_processes)]
        children = [start(lambda o=o: attribute(folders[-1], method, **o)) for o in options]
        time.sleep(random.uniform(0, seconds))
        victim = random.choice(children)
        os.kill(victim, signal.SIGKILL)
        killed = wait(victim) == -signal.SIGKILL
        kills += killed
        for child in children:
            if child != victim:
                os.kill(child, signal.SIGKILL)
                wait(child)
        if not killed:
            folders.append(folder / str(len(folders)))
    return folders


@pytest.mark.parametrize("n_processes", [1, 2])
def test_killed_at_twenty_random_moments(any_undisturbed, tmp_path, n_processes):
    method, seconds, expected = any_undisturbed
    n_kills = 6 if n_processes == 1 else 4  # with both methods: twenty; hundreds in scripts/crash_test.py
    folders = kill_at_random_moments(tmp_path, method, 1.2 * seconds, n_kills, n_processes)
    for folder in folders:
        finish(folder, method)
        assert content(folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_killed_at_many_random_moments(any_undisturbed, tmp_path, n_processes):
    method, seconds, expected = any_undisturbed
    for folder in kill_at_random_moments(tmp_path, method, 1.2 * seconds, 200, n_processes, seed=1):
        finish(folder, method)
        assert content(folder) == expected


def test_the_one_that_is_left_takes_over(any_undisturbed, tmp_path):
    method, _, expected = any_undisturbed
    child = start(lambda: attribute(tmp_path, method, worker="1/2"))  # worker 0 never comes
    assert wait(child) == 0
    assert content(tmp_path) == expected


# -------------------------------------------------------------------------------------------------- every write step

STEPS = [
    (files, "_temporary"),
    (os, "fdopen"),
    (os, "fsync"),
    (os, "replace"),
    (os, "link"),
    (files, "sync_folder"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_killed_at_every_step_of_a_write(undisturbed, tmp_path, owner, name):
    method, _, expected = undisturbed
    killed = 0
    for call in (1, 3):
        for after in (False, True):
            folder = tmp_path / f"{call}-{after}"

            def work(folder=folder, call=call, after=after):
                kill_at_step(owner, name, call, after)
                attribute(folder, method)

            killed += wait(start(work)) == -signal.SIGKILL
            finish(folder, method)
            assert content(folder) == expected
    assert killed >= 2


# ------------------------------------------------------------------------------------------------- damage, disk, Ctrl-C


def some_shard(folder):
    return sorted((folder / "shards").iterdir())[3]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_shard_is_computed_again(undisturbed, tmp_path, damage, caplog):
    method, _, expected = undisturbed
    attribute(tmp_path / "run", method)
    shard = some_shard(tmp_path / "run")
    raw = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(raw[:-5])
    elif damage == "flipped":
        raw[-9] ^= 16
        shard.write_bytes(raw)
    else:
        shard.unlink()
    attribute(tmp_path / "run", method)
    assert content(tmp_path / "run") == expected
    assert ("damaged" in caplog.text or "cannot read" in caplog.text) == (damage != "gone")


def test_a_full_disk_is_one_clear_error_and_the_run_resumes(undisturbed, tmp_path, monkeypatch):
    method, _, expected = undisturbed
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CoarError, match=r"No space left on device.*what is finished is kept"):
            attribute(tmp_path, method)
    assert 1 <= len(list((tmp_path / "shards").glob("*.safetensors"))) < N_BATCHES
    attribute(tmp_path, method)
    assert content(tmp_path) == expected


def test_ctrl_c_drops_the_unit_and_the_run_resumes(undisturbed, tmp_path):
    method, seconds, expected = undisturbed
    for fraction in (0.3, 0.6):
        child = start(lambda: attribute(tmp_path, method))
        time.sleep(fraction * seconds)
        os.kill(child, signal.SIGINT)
        assert wait(child) in (130, 0)
    finish(tmp_path, method)
    assert content(tmp_path) == expected


def test_other_settings_are_refused_by_name(undisturbed, tmp_path):
    method, _, _ = undisturbed
    attribute(tmp_path, method)
    with pytest.raises(RunMismatchError, match="seed was 5, now 6"):
        coar.attribute(
            build_net("mlp").model, data(), method=METHODS[method], ablated_fraction=0.1, seed=6, out=tmp_path
        )


def test_two_runs_that_begin_at_once_with_other_settings(tmp_path):
    """One of them wins; the other one gets the error, and not a folder with results of both."""

    def work(seed):
        model = build_net("mlp").model
        coar.attribute(
            model, data(), method=METHODS["path"], ablated_fraction=0.1, seed=seed, out=tmp_path, progress=False
        )

    children = [start(lambda seed=seed: work(seed)) for seed in (1, 2, 3)]
    assert sorted(wait(child) for child in children) == [0, 1, 1]
    assert json.loads((tmp_path / "run.json").read_text())["seed"] in (1, 2, 3)


# ------------------------------------------------------------------------------------------------------ other data


def test_data_of_another_length_are_refused(tmp_path):
    def run(n_batches):
        return coar.attribute(
            build_net("mlp").model,
            data(n_batches),
            method=METHODS["path"],
            ablated_fraction=0.1,
            out=tmp_path,
            progress=False,
        )

    run(4)
    for n_batches in (3, 5):
        with pytest.raises(DataError, match=rf"hold {2 * n_batches} (or more )?examples, and .* has results of 8"):
            run(n_batches)
    assert len(run(4)) == 8


def test_other_data_of_the_same_length_are_refused(tmp_path):
    method = METHODS["path"]
    coar.attribute(build_net("mlp").model, data(), method=method, out=tmp_path, progress=False)
    other = [{**batch, "inputs": batch["inputs"].flip(0)} for batch in data()]
    with pytest.raises(DataError, match="results of other examples"):
        coar.attribute(build_net("mlp").model, other, method=method, out=tmp_path, progress=False)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CoarError, match="cannot write"):
        attribute(tmp_path / "file" / "run")


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("worker", ["2/2", "x", "1", "-1/2", 1])
def test_a_worker_that_is_none(worker):
    with pytest.raises(CoarError, match="i/n"):
        workers.team(worker)


@pytest.fixture
def nothing_is_run(monkeypatch):
    """No model is loaded or run."""

    def run(*arguments, **options):
        raise AssertionError("something was run")

    monkeypatch.setattr(models, "load_model", run)
    monkeypatch.setattr(Output, "of", run)


@pytest.mark.parametrize("named", ["--worker", "the environment"])
@pytest.mark.parametrize("verb", [["attribute"], ["attribute", "--dry-run"], ["run"]], ids=" ".join)
def test_a_worker_that_is_none_is_told_before_anything_is_run(
    nothing_is_run, monkeypatch, tmp_path, capsys, named, verb
):
    given = [*verb, str(demo.MODEL), str(demo.IMAGES), "--split", "train[:4]", "--out", str(tmp_path / "run")]
    if named == "--worker":
        given += ["--worker", "2/2"]
    else:
        monkeypatch.setenv(workers.WORKER, "2/2")
    assert cli.main(given) == 2
    assert "worker '2/2'; write i/n with i from 0 to n - 1" in capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_workers_need_a_common_folder(nothing_is_run, monkeypatch, named):
    if not named:
        monkeypatch.setenv(workers.WORKER, "0/2")
    with pytest.raises(CoarError, match="no folder in common"):
        attribute(None, worker="0/2" if named else None)


@pytest.fixture
def hears_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background does not
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_a_file_of_tensors_to_be_read(tmp_path, monkeypatch, hears_ctrl_c):
    """What it raises inside compiled code got lost there, and the file was said to be damaged."""
    files.write_tensors(tmp_path / "some.safetensors", {"a": torch.ones(2), "b": torch.zeros(3)})
    read, opened = [], safetensors.safe_open

    class Interrupted:
        def __init__(self, *args, **options):
            self.file = opened(*args, **options)

        def __enter__(self):
            return self

        def __exit__(self, *of):
            return None

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            os.kill(os.getpid(), signal.SIGINT)
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        files.read_tensors(tmp_path / "some.safetensors")
    assert read == ["a", "b"] and signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as pool:  # where no signal arrives
        monkeypatch.undo()
        assert list(pool.submit(files.read_tensors, tmp_path / "some.safetensors").result()) == ["a", "b"]
