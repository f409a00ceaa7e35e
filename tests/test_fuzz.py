"""Hostile files: two thousand seeded changes of real files are read, or are a CoarError; nothing else happens.

All twenty thousand, with the same seeds and more: `scripts/fuzz.py`.
"""

import faulthandler
import json
import sys
from pathlib import Path

import pytest
import torch
from test_format import tiny

import hf_coar as coar
from hf_coar.attributions import rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import fuzz

# Of each kind as many as take some seconds; the share that must be refused shows that the changes are felt.
MANY = {"artefact": (500, 0.5), "edit": (880, 0.3), "run": (20, 0.02), "model": (100, 0.2), "flags": (500, 0.3)}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small artefact in two shards."""
    folder = tmp_path_factory.mktemp("artefact")
    tiny().save_pretrained(folder, max_shard_size=24)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(folder: Path, saved: dict[str, bytes]) -> str:
    """Write the files, and use what is loaded from them as a user would."""
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    try:
        fuzz.use_artefact(folder, saved)
    except coar.CoarError as error:
        assert str(error)
        return "error"
    return "loaded"


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def test_there_are_two_thousand():
    assert sum(n for n, _ in MANY.values()) == 2000 and sum(fuzz.SHARES.values()) == 20_000


@pytest.mark.parametrize("kind", MANY)
def test_changed_files_are_read_or_refused(kind):
    n, refused = MANY[kind]
    tally = fuzz.fuzz(kind, range(n))
    assert not tally.findings, tally.findings[:5]
    assert tally.read + tally.refused == n and tally.refused > refused * n and tally.read > 0


def test_the_tally_tells_a_finding(monkeypatch):
    """Exceptions, deaths and endless loops of a child are found, and the others go on."""

    class Endless(coar.CoarError):
        def __str__(self):
            return "x " * 5_000

    def use(folder, files):
        number = int((folder / "number").read_text())
        if number == 1:
            raise KeyError("raw")
        if number == 2:
            faulthandler.disable()  # what is meant is no news
            fuzz.os.kill(fuzz.os.getpid(), fuzz.signal.SIGSEGV)
        while number == 3:
            pass
        if number == 4:
            bytearray(2**40)
        if number == 5:
            raise Endless

    counted = iter(range(100))
    kind = fuzz.Kind(lambda folder: [{}], lambda files, source: {"number": str(next(counted)).encode()}, use)
    monkeypatch.setitem(fuzz.KINDS, "edit", kind)
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    tally = fuzz.fuzz("edit", range(1))
    assert tally.read == 1
    found = []
    for number in range(1, 6):
        counted = iter([number])
        found += fuzz.fuzz("edit", range(1)).findings
    said = [what for _, what in found]
    assert len(said) == 5 and "KeyError" in said[0] and "died" in said[1] and "too long" in said[2]
    assert "MemoryError" in said[3] and "10000 characters" in said[4]


def test_matrices_of_every_kind_with_right_checksums(tmp_path, artefact):
    """Tensors that are no attributions, in files whose checksums are all right."""
    config = json.loads(artefact["config.json"])
    good = {"bias": torch.zeros(2), "labels": torch.zeros(2, dtype=torch.int64)}
    good |= {"signatures": torch.zeros(2, dtype=torch.float64)}
    weights = torch.zeros(2, 3)
    wrong = [
        ({"weights": torch.zeros(2, 4)}, good),
        ({"weights": torch.zeros(2, 3, dtype=torch.float64)}, good),
        ({"standard_errors": weights}, good),
        ({"weights": weights, "standard_errors": torch.zeros(2, 5)}, good),
        ({"weights": weights}, {**good, "bias": torch.zeros(2, 1)}),
        ({"weights": weights}, {**good, "labels": torch.zeros(2)}),
        ({"weights": weights}, {**good, "more": torch.zeros(2)}),
        ({"weights": weights}, {"bias": good["bias"]}),
        ({"weights": weights}, {**good, "bias": torch.zeros(3)}),
        ({"weights": torch.zeros(2, 0)}, good),
    ]
    for matrices, columns in wrong:
        root = rows.save(tmp_path / "attributions.safetensors", matrices, columns)
        files = {"attributions.safetensors": root, "components.json": config["files"]["components.json"]}
        saved = {"components.json": artefact["components.json"], "config.json": dumped({**config, "files": files})}
        assert attempt(tmp_path, saved) == "error"


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "attributions.safetensors/../x", "a\\..\\b", "attributions.bin",
     "attributions-00001-of-00003.safetensors", ""],
)  # fmt: skip
def test_names_of_files_never_leave_the_folder(tmp_path, artefact, name, monkeypatch):
    config = json.loads(artefact["config.json"])
    root = next(iter(config["files"].values()))
    config["files"] = {name: root, "components.json": config["files"]["components.json"]}
    (tmp_path / "outside.safetensors").write_bytes(artefact["attributions-00001-of-00002.safetensors"])
    (tmp_path / "in").mkdir()
    opened = []
    monkeypatch.setattr(rows, "load", lambda paths, *rest: opened.extend(paths))
    assert attempt(tmp_path / "in", {**artefact, "config.json": dumped(config)}) == "error"
    assert not opened


def test_deep_and_endless_json(tmp_path, artefact, monkeypatch):
    for content in (b"[" * 200_000, b'{"a":' * 200_000, b"1" * 100_000, b"", b"null", b"[]", b"\xff\xfe", b"NaN"):
        for name in ("config.json", "components.json"):
            assert attempt(tmp_path, {**artefact, name: content}) == "error"
    monkeypatch.setattr("hf_coar.storage.files.LARGEST_JSON", 100)
    assert attempt(tmp_path, artefact) == "error"
