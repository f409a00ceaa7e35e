"""The run folder and the files below it: whole or absent, never half, never silently of another run."""

import errno
import json
import os
import random
import time

import pytest
import torch
from conftest import build_net

from hf_coar import models
from hf_coar.attributions import rows
from hf_coar.errors import CoarError, CorruptFileError, RunMismatchError
from hf_coar.runs import store as store_module
from hf_coar.runs.index import Index
from hf_coar.runs.store import Store
from hf_coar.storage import files, folders

SETTINGS = {"seed": 0, "model": {"id": "a/b", "fingerprint": "0f"}, "fractions": (0.1, 0.2)}
VALUES = torch.arange(40.0).view(10, 4)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "run", SETTINGS)


def write(store, start, stop, part="masks-000000"):
    store.write(part, start, {"outputs": VALUES[start:stop], "labels": torch.arange(start, stop)})


def files_in(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != folders.MARKER)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def no_temporary_files(folder):
    return not [name for name in files_in(folder) if ".tmp" in name or name.split("/")[-1].startswith(".")]


# ------------------------------------------------------------------------------------------- write, missing and gather


def test_nothing_is_done_at_first(store):
    assert store.missing("masks-000000", 0, 10) == [(0, 10)]
    assert store.missing("masks-000000", 3, 3) == []


def test_missing_and_gather(store):
    write(store, 6, 10)
    write(store, 0, 2)
    assert store.missing("masks-000000", 0, 10) == [(2, 6)]
    assert store.missing("masks-000000", 1, 4) == [(2, 4)]
    assert store.missing("masks-000000", 7, 9) == []
    assert store.missing("masks-000000", 8, 14) == [(10, 14)]
    assert store.missing("masks-000064", 0, 10) == [(0, 10)]
    write(store, 2, 6)
    assert store.missing("masks-000000", 0, 10) == []
    gathered = store.gather("masks-000000", 10)
    assert torch.equal(gathered["outputs"], VALUES)
    assert torch.equal(gathered["labels"], torch.arange(10))


@pytest.mark.parametrize("order", [[(0, 4), (2, 7), (7, 10)], [(5, 10), (0, 6)], [(3, 5), (0, 10), (4, 8)]])
def test_overlapping_shards_in_any_order(store, order):
    for start, stop in order:
        write(store, start, stop)
    assert store.missing("masks-000000", 0, 10) == []
    assert torch.equal(store.gather("masks-000000", 10)["outputs"], VALUES)


def test_several_gaps(store):
    for start, stop in ((7, 8), (1, 3), (2, 4)):
        write(store, start, stop)
    assert store.missing("masks-000000", 0, 10) == [(0, 1), (4, 7), (8, 10)]


def test_parts_do_not_mix(store):
    write(store, 0, 10)
    store.write("masks-000064", 0, {"outputs": VALUES + 100})
    assert torch.equal(store.gather("masks-000064", 10)["outputs"], VALUES + 100)
    assert torch.equal(store.gather("masks-000000", 10)["outputs"], VALUES)


def test_gather_says_what_is_missing(store):
    write(store, 0, 4)
    write(store, 5, 10)
    with pytest.raises(CorruptFileError, match="masks-000000 for example 4"):
        store.gather("masks-000000", 10)
    with pytest.raises(CorruptFileError, match="example 0"):
        store.gather("masks-000064", 10)


@pytest.mark.parametrize("n_examples", [1, 2, 4, 5, 8])
def test_gather_of_fewer_examples_than_there_are(store, n_examples):
    # Shards may lie partly or wholly behind the last example asked for.
    for start, stop in ((0, 3), (3, 6), (6, 10)):
        write(store, start, stop)
    assert torch.equal(store.gather("masks-000000", n_examples)["outputs"], VALUES[:n_examples])


def test_a_reopened_store_knows_what_is_done(store):
    write(store, 0, 4)
    again = Store(store.folder, SETTINGS)
    assert again.missing("masks-000000", 0, 10) == [(4, 10)]


def test_a_second_store_on_the_folder_adds_its_shards(store):
    other = Store(store.folder, SETTINGS)
    write(store, 0, 5)
    write(other, 5, 10)
    assert torch.equal(store.gather("masks-000000", 10)["outputs"], VALUES)


def test_strange_files_are_left_alone(store):
    write(store, 0, 10)
    stranger = store.folder / "shards" / "notes.safetensors"
    stranger.write_bytes(b"mine")
    assert Store(store.folder, SETTINGS).missing("masks-000000", 0, 10) == []
    assert stranger.read_bytes() == b"mine"


@pytest.mark.parametrize("size", [1, 3, 4, 64])
@pytest.mark.parametrize("skipped", [(), (0, 5), (9,)])
def test_blocks_are_what_is_gathered(store, monkeypatch, size, skipped):
    for start, stop in ((0, 1), (1, 6), (6, 8), (8, 10)):
        write(store, start, stop)
    for index in skipped:
        store.skip(index, "broken")
    expected, opened, read = store.gather("masks-000000", 10), [], files.read_tensors_about
    monkeypatch.setattr(files, "read_tensors_about", lambda path: opened.append(path.name) or read(path))
    blocks = list(store.blocks("masks-000000", 10, size))
    assert [len(block["labels"]) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    for name, values in expected.items():
        assert torch.equal(torch.cat([block[name] for block in blocks]), values)
    assert len(opened) == len(set(opened)), "every shard is read once"


def test_looks_at_the_folder_take_a_small_part_of_the_time(store, monkeypatch):
    looks, names_in = [], store_module._names_in

    def slow(folder):
        looks.append(folder)
        time.sleep(0.005)
        return names_in(folder)

    monkeypatch.setattr(store_module, "_names_in", slow)
    for _ in range(1000):
        store.refresh()
    assert len(looks) <= 4
    before = len(looks)
    store.refresh(now=True)
    assert len(looks) == before + 2


def test_an_index_of_many_stretches():
    index, generator = Index(), random.Random(0)
    bounds = [(start, start + generator.randint(1, 9)) for start in range(0, 2000, 3)]
    for start, stop in generator.sample(bounds, len(bounds)):
        index.add("masks-000000", start, stop)
        index.add("masks-000000", start, stop)
    for start in range(0, 2010, 7):
        expected = sorted((a, b) for a, b in bounds if a < start + 5 and b > start)
        assert index.overlapping("masks-000000", start, start + 5) == expected
    assert index.end("masks") == max(stop for _, stop in bounds)
    assert index.overlapping("masks-000064", 0, 9) == [] and index.end("rounds") == 0


# -------------------------------------------------------------------------------------------------------------- damage


def damages(content):
    yield "truncated", content[: len(content) // 2]
    yield "empty", b""
    yield "lacks the last byte", content[:-1]
    yield "has a byte too many", content + b"\0"
    yield "bit flipped in the values", content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]
    yield "something else", b"not a safetensors file at all"


@pytest.mark.parametrize("which", range(6))
def test_a_damaged_shard_is_deleted_and_missing(store, which, caplog):
    write(store, 0, 4)
    write(store, 4, 10)
    path = store.folder / "shards" / files_in(store.folder / "shards")[0]
    _, damaged = list(damages(path.read_bytes()))[which]
    path.write_bytes(damaged)
    with pytest.raises(CorruptFileError):
        store.gather("masks-000000", 10)
    again = Store(store.folder, SETTINGS)
    assert not path.exists()
    assert path.name in caplog.text
    assert again.missing("masks-000000", 0, 10) == [(0, 4)]
    write(again, 0, 4)
    assert torch.equal(again.gather("masks-000000", 10)["outputs"], VALUES)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_tensors(path, {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([3])})
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        for bit in (0, 3, 5, 7):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                tensors = files.read_tensors(path)
            except CorruptFileError:
                continue
            unnoticed.append((position, bit, tensors))
    # A name that the checksum does not cover may change; what is read must not.
    assert all(torch.equal(t["a"], torch.tensor([1.5, -2.0])) and t["b"].tolist() == [3] for _, _, t in unnoticed)


def test_a_damaged_run_file_is_an_error(store):
    path = store.folder / "run.json"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CorruptFileError, match=r"run\.json"):
        Store(store.folder, SETTINGS)


# ------------------------------------------------------------------------------------------------------------ settings


def test_run_json_holds_the_settings(store):
    assert json.loads((store.folder / "run.json").read_text()) == {**SETTINGS, "fractions": [0.1, 0.2]}


def test_other_settings_are_an_error_that_lists_the_keys(store):
    other = {"seed": 1, "model": {"id": "a/b", "fingerprint": "1e"}, "fractions": (0.1, 0.2), "output": "margin"}
    with pytest.raises(RunMismatchError) as caught:
        Store(store.folder, other)
    message = str(caught.value)
    assert "seed was 0, now 1" in message
    assert "model.fingerprint was '0f', now '1e'" in message
    assert "output was None, now 'margin'" in message
    assert "model.id" not in message and "fractions" not in message
    assert Store(store.folder, SETTINGS).missing("masks-000000", 0, 1) == [(0, 1)]


def test_a_setting_that_is_gone_is_an_error(store):
    with pytest.raises(RunMismatchError, match="seed was 0, now None"):
        Store(store.folder, {key: value for key, value in SETTINGS.items() if key != "seed"})


# ------------------------------------------------------------------------------------------------- writes that go wrong


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "fsync"), (os, "replace"), (os, "fdopen"), (files, "_temporary")], ids=lambda x: str(x)
)
def test_a_full_disk_is_an_error_and_the_run_resumes(store, monkeypatch, owner, name):
    write(store, 0, 4)
    before = files_in(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(CoarError, match="No space left on device"):
            write(store, 4, 10)
    assert files_in(store.folder) == before
    assert store.missing("masks-000000", 0, 10) == [(4, 10)], "a shard that was not written is not done"
    again = Store(store.folder, SETTINGS)
    write(again, 4, 10)
    assert torch.equal(again.gather("masks-000000", 10)["outputs"], VALUES)


def test_a_read_only_folder_is_an_error(tmp_path, monkeypatch):
    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "_temporary", read_only)
    with pytest.raises(CoarError, match=r"run.*Read-only file system.*another folder"):
        Store(tmp_path / "run", SETTINGS)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CoarError, match="run"):
        Store(tmp_path / "run", SETTINGS)


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "fault", "error"), [("replace", full_disk, CoarError), ("fsync", interrupted, KeyboardInterrupt)]
)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, name, fault, error):
    path = tmp_path / "x.bin"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, name, fault)
    with pytest.raises(error):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert no_temporary_files(tmp_path)


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    files.write_bytes(tmp_path / "x.bin", b"new")
    assert calls[:2] == ["fsync", "replace"]


def test_no_temporary_files_after_success(store):
    write(store, 0, 10)
    assert no_temporary_files(store.folder)
    assert files_in(store.folder) == ["run.json", "shards/masks-000000-000000000-000000010.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_obey_the_umask(tmp_path, umask):
    """Those that safetensors makes itself as well, which only their owner could read otherwise."""
    model = torch.nn.Linear(2, 2)
    before = os.umask(umask)
    try:
        write(Store(tmp_path / "run", SETTINGS), 0, 10)
        rows.save(tmp_path / "rows.safetensors", {"weights": torch.zeros(2, 3)}, {"bias": torch.zeros(2)})
        models.save_model(model, tmp_path / "model")
        timm_model = build_net("timm_vit").model
        models.save_model(timm_model, tmp_path / "timm")
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) > 8
    assert {path.stat().st_mode & 0o777 for path in made} == {0o666 & ~umask}


def test_what_safetensors_writes_is_synced(tmp_path, monkeypatch):
    """It puts another file in the place of the one that it was given, so that one is synced."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or fsync(handle))
    path = tmp_path / "rows.safetensors"
    rows.save(path, {"weights": torch.zeros(2, 3)}, {"bias": torch.zeros(2)})
    assert path.stat().st_ino in synced


# ----------------------------------------------------------------------------------------------------------------- json


def test_json_round_trip_and_errors(tmp_path):
    files.write_json(tmp_path / "x.json", {"ä": [1, None, 0.1]})
    assert files.read_json(tmp_path / "x.json") == {"ä": [1, None, 0.1]}
    for content in (b"", b"{", b"\xff\xfe{}", b"[" * 100_000):
        (tmp_path / "y.json").write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"y\.json"):
            files.read_json(tmp_path / "y.json")
    with pytest.raises(CorruptFileError, match=r"z\.json"):
        files.read_json(tmp_path / "z.json")


# ---------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_round_trip(tmp_path, dtype):
    tensors = {"b": torch.tensor([[0, 1], [1, 1]]).to(dtype), "a": torch.zeros(0, 3, dtype=dtype).clone()}
    tensors["view"] = torch.arange(6).view(2, 3).T.to(dtype)
    files.write_tensors(tmp_path / "x.safetensors", tensors)
    read = files.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[k].dtype == dtype and torch.equal(read[k], tensors[k]) for k in tensors)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    files.write_tensors(tmp_path / "x", {"a": VALUES, "b": VALUES[0].clone()})
    files.write_tensors(tmp_path / "y", {"b": VALUES[0].clone(), "a": VALUES})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_file_without_our_checksum_is_an_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptFileError, match="checksum"):
        files.read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(CorruptFileError, match="absent"):
        files.read_tensors(tmp_path / "absent.safetensors")
