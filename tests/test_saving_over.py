"""Saving over what was saved: killed at any step, a reader finds all of the old or all of the new, and nothing is left.

Attributions and edited models; by an exchange of two folders, and by moving files in where that cannot be had.
"""

import errno
import functools
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import build_net
from other_processes import kill_at_step, start, wait
from test_folders import content, judged, mlp_edited, other
from test_format import tiny

import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.storage import files, folders, swapping

WAYS = ("exchange", "move", "no links")
# Where a process can be killed: every call that changes something on the disk.
STEPS = [
    (os, "rename"), (os, "replace"), (os, "link"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "chmod"),
    (os, "fsync"), (swapping, "_exchanged"), (files, "_temporary"), (shutil, "rmtree"), (swapping, "settle"),
]  # fmt: skip
FEW = [(os, "rename"), (swapping, "_exchanged"), (swapping, "settle"), (shutil, "rmtree")]  # where it is decided


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "move":
        monkeypatch.setattr(swapping, "_renameat2", lambda: None)
    if request.param == "no links":

        def refused(*arguments, **settings):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    return request.param


def killed_everywhere(work, after_kill, steps=STEPS):
    """Kill a child before and after every step of its work; returns how often one died."""
    deaths = 0
    for owner, name in steps:
        for after in (False, True):
            for call in range(1, 100):
                child = start(functools.partial(killed_work, owner, name, call, after, work))
                status = wait(child)
                after_kill(f"{name} {call} {'after' if after else 'before'}")
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                deaths += 1
                if call > 3 and name in ("fsync", "_temporary"):
                    break
    return deaths


def killed_work(owner, name, call, after, work):
    """In a child: it kills itself at one call of a function, before or after that did its work."""
    kill_at_step(owner, name, call, after)
    work()


def leftovers(folder):
    """What writers leave behind, here and beside."""
    names = [path.name for place in (folder, folder.parent) for path in place.iterdir()]
    return [name for name in names if name.startswith((swapping._STAGING, swapping.NEXT)) or name.endswith(".tmp")]


@pytest.mark.parametrize("steps", [FEW, pytest.param(STEPS, marks=pytest.mark.slow)], ids=["few steps", "every step"])
def test_attributions_are_old_or_new(tmp_path, way, steps):
    old, new = tiny(), other()
    folder = tmp_path / "a"
    seen = set()

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder, max_shard_size=24, report=judged(old))
        (folder / "notes.txt").write_text("mine")

    def check(step):
        found = coar.Attributions.from_pretrained(folder)
        which = "old" if torch.equal(found.weights, old.weights) else "new"
        seen.add(which)
        assert torch.equal(found.weights, {"old": old, "new": new}[which].weights), step
        assert (found.evaluation is not None) == (which == "old"), step
        new.save_pretrained(folder)
        assert torch.equal(coar.Attributions.from_pretrained(folder).weights, new.weights), step
        assert not leftovers(folder), step
        assert (folder / "notes.txt").read_text() == "mine"
        assert not (folder / "evaluation.json").exists() and "0.987" not in (folder / "README.md").read_text()
        assert sorted(path.name for path in folder.glob("*.safetensors")) == ["attributions.safetensors"]
        fresh()

    fresh()
    assert killed_everywhere(lambda: new.save_pretrained(folder), check, steps) > (3 if steps is FEW else 20)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("steps", [FEW, pytest.param(STEPS, marks=pytest.mark.slow)], ids=["few steps", "every step"])
def test_edited_models_are_old_or_new_for_every_reader(tmp_path, way, steps):
    """Those that know nothing of this package as well, where the system can exchange two folders."""
    old = mlp_edited()
    new = coar.edit(old, coar.attribute(old, batches(), progress=False), increase=[1], n_components=1)
    folder, sides = tmp_path / "edited", {}
    for name, model in (("old", old), ("new", new)):
        edited.save(model, tmp_path / name)
        sides[name] = {path: value for path, value in content(tmp_path / name).items() if path != "README.md"}

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        edited.save(old, folder)
        (folder / "README.md").write_text("# mine")

    def check(step):
        plain = {name: value for name, value in content(folder).items() if name in sides["old"]}
        ours = {name: swapping.current(folder, name).read_bytes() for name in sides["old"]}
        assert ours in (sides["old"], sides["new"]), step
        assert way != "exchange" or plain in (sides["old"], sides["new"]), step
        edited.save(new, folder)
        assert (folder / "README.md").read_text() == "# mine"
        assert {name: value for name, value in content(folder).items() if name in sides["new"]} == sides["new"]
        assert not leftovers(folder), step
        fresh()

    fresh()
    assert killed_everywhere(lambda: edited.save(new, folder), check, steps) > (3 if steps is FEW else 10)


def batches():
    return [build_net("mlp").batch]


def test_a_full_disk_leaves_the_old_one(tmp_path, way, monkeypatch):
    tiny().save_pretrained(tmp_path / "a")
    before = content(tmp_path)
    for name in ("replace", "rename", "mkdir"):
        with monkeypatch.context() as patch:

            def full(*arguments, **settings):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, name, full)
            try:
                other().save_pretrained(tmp_path / "a")
            except CoarError as error:
                assert "No space left on device" in str(error)
                assert torch.equal(coar.Attributions.from_pretrained(tmp_path / "a").weights, tiny().weights)
                assert content(tmp_path) == before
            else:
                tiny().save_pretrained(tmp_path / "a")


def test_readers_never_see_a_mixture(tmp_path, way):
    """One process saves again and again, another one reads."""
    folder = tmp_path / "a"
    sides = [tiny(), other()]
    sides[0].save_pretrained(folder)

    def work():
        for i in range(30):
            sides[i % 2].save_pretrained(folder, max_shard_size=(24, "5GB")[i % 2])

    child = start(work)
    seen = []
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        found = coar.Attributions.from_pretrained(folder)
        seen.append([torch.equal(found.weights, side.weights) for side in sides].index(True))
    assert set(seen) == {0, 1}


def test_writers_at_once_leave_one_of_them(tmp_path, way):
    folder = tmp_path / "a"
    sides = [tiny(), other()]
    for _ in range(2):
        children = [start(lambda side=side: side.save_pretrained(folder, max_shard_size=24)) for side in sides * 2]
        assert [wait(child) for child in children] == [0] * 4
        found = coar.Attributions.from_pretrained(folder)
        assert any(torch.equal(found.weights, side.weights) for side in sides)
        assert not leftovers(folder)


def test_the_folder_that_somebody_stands_in_stays_the_same_one(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    inode = os.stat(".").st_ino
    other().save_pretrained(".")
    assert os.stat(tmp_path / "a").st_ino == inode
    assert torch.equal(coar.Attributions.from_pretrained(".").weights, other().weights)


def test_a_folder_keeps_its_permissions_links_and_times(tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    (tmp_path / "a").chmod(0o2750)
    (tmp_path / "a/link").symlink_to("nowhere")
    (tmp_path / "a/pictures").mkdir()
    (tmp_path / "a/pictures/x.png").write_bytes(b"png")
    os.utime(tmp_path / "a/pictures/x.png", (1, 1))
    (tmp_path / "latest").symlink_to("a")
    other().save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "a").stat().st_mode & 0o7777 == 0o2750
    assert os.readlink(tmp_path / "a/link") == "nowhere"
    assert (tmp_path / "a/pictures/x.png").stat().st_mtime == 1
    assert torch.equal(coar.Attributions.from_pretrained(tmp_path / "a").weights, other().weights)


def test_what_comes_into_the_folder_at_the_last_moment_stays(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "a")
    exchanged = swapping._exchanged

    def late(*folders):
        (tmp_path / "a/late.txt").write_text("mine")
        return exchanged(*folders)

    monkeypatch.setattr(swapping, "_exchanged", late)
    other().save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/late.txt").read_text() == "mine"


def test_saving_the_same_again_touches_nothing(tmp_path):
    tiny().save_pretrained(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    tiny().save_pretrained(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_weights_of_an_earlier_save_do_not_stay_beside_new_ones(tmp_path):
    """transformers reads model.safetensors before any index."""
    model = build_net("bert").model
    models.save_model(model, tmp_path)
    files.write_json(tmp_path / "model.safetensors.index.json", {})
    models.save_model(build_net("mlp").model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {folders.MARKER, "model.safetensors"}, "config.json was of the first model"
    assert "made" in json.loads((tmp_path / folders.MARKER).read_text())
