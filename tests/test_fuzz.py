"""Hostile files: thousands of seeded mutations of a real artefact load, or are a CoarError; nothing else happens."""

import hashlib
import json
import random
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from test_format import tiny

import hf_coar as coar
from hf_coar.attributions import rows
from hf_coar.editing import edited

N_BYTES, N_HEADERS, N_JSON = 900, 900, 900

# What JSON may hold where something else is expected; `10**30` and so on are no sizes that may be allocated.
STRANGE = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd",
    "\ud800", "a" * 5000, [], {}, [[]], {"": ""}, [None] * 50, "attributions-00001-of-00001.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small artefact in two shards."""
    folder = tmp_path_factory.mktemp("artefact")
    tiny().save_pretrained(folder, max_shard_size=24)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(folder: Path, saved: dict[str, bytes]) -> str:
    """Write the files, load them, and use what was loaded as a user would."""
    for name, content in saved.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    try:
        attributions = coar.Attributions.from_pretrained(folder)
        attributions.verify()
        attributions.predict(torch.ones(len(attributions.components)))
        [str(component) for component in attributions.components]
        attributions.save_pretrained(folder / "again")
    except coar.CoarError as error:
        assert str(error)
        return "error"
    return "loaded"


def changed_bytes(content: bytes, source: random.Random) -> bytes:
    """Flip, cut, repeat, insert or zero a few bytes."""
    data = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 8])):
        position = source.randrange(len(data) + 1)
        length = source.choice([1, 2, 8, 64])
        what = source.randrange(6)
        if what == 0 and position < len(data):
            data[position] ^= 1 << source.randrange(8)
        elif what == 1:
            del data[position:]
        elif what == 2:
            data[position:position] = source.randbytes(length)
        elif what == 3:
            data[position : position + length] = bytes(length)
        elif what == 4:
            del data[position : position + length]
        else:
            data[position : position + length] = b"\xff" * length
    return bytes(data)


def places(value, path=()):
    """The path of every entry of nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed_json(value, source: random.Random):
    """Replace, remove, add or swap some entry, keys included."""
    value = json.loads(json.dumps(value))
    for _ in range(source.choice([1, 1, 2])):
        *parents, last = source.choice([path for path in places(value) if path] or [("new",)])
        holder = value
        for key in parents:
            holder = holder[key]
        what = source.randrange(4)
        if what == 0 or (isinstance(holder, list) and what == 3):
            holder[last] = source.choice(STRANGE)
        elif what == 1:
            del holder[last]
        elif what == 2 and isinstance(holder, dict):
            holder[source.choice(["../x", "new", "files", "\ud800", "a" * 300])] = source.choice(STRANGE)
        elif isinstance(holder, dict):
            holder[source.choice(["../../evil", "/tmp/evil", "x", ""])] = holder.pop(last)
        if not isinstance(value, dict | list):
            break
    return value


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def run(folder: Path, n: int, seed: int, mutate) -> dict[str, int]:
    counts = {"error": 0, "loaded": 0}
    source = random.Random(seed)
    for _ in range(n):
        counts[attempt(folder, mutate(source))] += 1
    return counts


@pytest.fixture
def bounded():
    """Half a minute of work, and no more memory than the process had before, but for a few megabytes."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kilobytes


def test_changed_bytes_of_any_file(tmp_path, artefact, bounded):
    def mutate(source):
        name = source.choice(sorted(artefact))
        return {**artefact, name: changed_bytes(artefact[name], source)}

    counts = run(tmp_path, N_BYTES, 1, mutate)
    assert counts["error"] > N_BYTES // 2  # the rest: changed words of the card, spaces in JSON


def signed(saved: dict[str, bytes]) -> dict[str, bytes]:
    """As a liar would do it: with a configuration that names the checksums of what is really there."""
    config = json.loads(saved["config.json"])
    if isinstance(config, dict) and isinstance(config.get("files"), dict):
        config["files"]["components.json"] = hashlib.sha256(saved["components.json"]).hexdigest()
    return {**saved, "config.json": dumped(config)}


def test_hostile_json_with_right_checksums(tmp_path, artefact, bounded):
    def mutate(source):
        name = source.choice(["config.json", "components.json", "components.json"])
        saved = {**artefact, name: dumped(changed_json(json.loads(artefact[name]), source))}
        return signed(saved) if name == "components.json" else saved

    counts = run(tmp_path, N_JSON, 2, mutate)
    assert counts["error"] > N_JSON // 3 and counts["loaded"] > 0


def test_hostile_safetensors_headers(tmp_path, artefact, bounded):
    name = "attributions-00001-of-00002.safetensors"
    content = artefact[name]
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    def mutate(source):
        encoded = dumped(changed_json(header, source))
        claimed = source.choice([len(encoded)] * 6 + [0, 2**40, 2**64 - 1, len(encoded) - 1])
        return {
            **artefact,
            name: struct.pack("<Q", claimed) + encoded + source.choice([data, data[:-1], data + b"x", b""]),
        }

    counts = run(tmp_path, N_HEADERS, 3, mutate)
    assert counts["error"] > 0.9 * N_HEADERS


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
    monkeypatch.setattr("hf_coar.attributions.artefact._LARGEST_JSON", 100)
    assert attempt(tmp_path, artefact) == "error"


def test_hostile_records_of_edits(tmp_path):
    record = {"rule": "welch", "components": ["a"], "parameters": ["a.weight"], "indices": [1], "increase": [0]}
    record |= {"decrease": [], "base": {"id": "a/b", "library": "timm"}, "data": {}, "figures": [["a", "b", "c"]]}
    source, folder = random.Random(4), tmp_path / "edited"
    folder.mkdir()
    for _ in range(300):
        (folder / "coar_edit.json").write_bytes(dumped(changed_json(record, source)))
        try:
            entries = edited.read_record(folder)
            edited.write_card(folder, entries, "user/name")
        except coar.CoarError as error:
            assert str(error)
