"""Format version 1 of attributions: golden bytes, lazy reading, float16, several files; and how edits are undone."""

import copy
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_coar as coar
from hf_coar import models
from hf_coar.components import Components, Group
from hf_coar.data import Identity
from hf_coar.editing import edited
from hf_coar.storage import files

CONFIG = {
    "model": {"id": "user/model", "revision": "0" * 40, "library": "torch", "class": "Tiny", "fingerprint": "f" * 32},
    "data": {"id": "user/data", "revision": "1" * 40, "split": "train[:2]", "fingerprint": None},
    "granularity": "unit",
    "n_components": 3,
    "output": "margin",
    "unit": "logits",
    "method": {"name": "path_gradient", "rounds": 8},
    "ablated_fraction": 0.05,
    "seed": 0,
    "cost": 240.0,
    "versions": {"hf_coar": "0.1", "torch": "2.15"},
}


def tiny() -> coar.Attributions:
    """Two examples, three components, all constants."""
    groups = (Group("conv", "filter", "conv.weight", 0, 2), Group("fc", "neuron", "fc.weight", 0, 1))
    return coar.Attributions(
        torch.tensor([[0.5, -1.25, 2.0], [0.0, 3.5, -0.125]]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([[0.25, 0.5, 0.125], [1.0, 0.0625, 0.5]]),
        Components(groups),
        Identity({}, torch.tensor([3, 7]), torch.tensor([0.75, 1.5], dtype=torch.float64)),
        CONFIG,
    )


# The bytes of format version 1. Another digest means that files written until now can no longer be told to be right:
# add one to FORMATS and read both, or take the change back.
GOLDEN = {
    "attributions.safetensors": "f9d4969863d8f65e2c7dacdfbf28b1195e530fa2d6fcae1e3f265e243321fed5",
    "components.json": "d75a8499fc839aaf1006c215de162bf693a1e7a50b7ebd4650661717d803de70",
    "config.json": "da441a3c7185924c0529645c7bfcd7607a8729f51ca6206dfc66241ae3046461",
}


def test_the_bytes_of_format_1_are_pinned(tmp_path):
    tiny().save_pretrained(tmp_path)
    found = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in GOLDEN}
    assert found == GOLDEN


def test_a_save_and_a_load_change_nothing(tmp_path):
    saved = tiny()
    saved.save_pretrained(tmp_path)
    loaded = coar.Attributions.from_pretrained(tmp_path, verify=True)
    assert torch.equal(loaded.weights, saved.weights) and torch.equal(loaded.bias, saved.bias)
    assert torch.equal(loaded.standard_errors, saved.standard_errors)
    assert loaded.components == saved.components and loaded.config == saved.config
    assert torch.equal(loaded.labels, saved.labels)
    assert torch.equal(loaded.identity.signatures, saved.identity.signatures)
    assert loaded.weights.dtype == torch.float32 and len(loaded) == 2


def test_without_standard_errors(tmp_path):
    saved = tiny()
    coar.Attributions(saved.weights, saved.bias, None, saved.components, saved.identity, CONFIG).save_pretrained(
        tmp_path
    )
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert loaded.standard_errors is None and loaded.stability() is None
    with pytest.raises(coar.CoarError, match="there are weights"):
        loaded.row(0, of="standard_errors")


@pytest.mark.parametrize(("size", "n_files"), [("5GB", 1), (12, 2), ("0.012KB", 2)])
@pytest.mark.parametrize("dtype", [None, "float16", torch.float16])
def test_dtypes_and_shards(tmp_path, size, n_files, dtype):
    saved = tiny()
    saved.save_pretrained(tmp_path, dtype=dtype, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == n_files
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert torch.equal(loaded.weights, saved.weights)  # these numbers fit into float16
    assert torch.equal(loaded.row(-1), saved.weights[1]) and torch.equal(loaded.row(0), saved.weights[0])
    assert torch.equal(loaded.row(1, "standard_errors"), saved.standard_errors[1])
    assert torch.allclose(loaded.predict(torch.ones(3)), saved.predict(torch.ones(3)))
    saved.save_pretrained(tmp_path)  # in one file again: the others go
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["attributions.safetensors"]
    assert torch.equal(coar.Attributions.from_pretrained(tmp_path).weights, saved.weights)


def test_what_does_not_fit_is_told(tmp_path):
    large = tiny()
    large.weights[0, 0] = 1e6
    with pytest.raises(coar.CoarError, match="65504"):
        large.save_pretrained(tmp_path, dtype="float16")
    with pytest.raises(coar.CoarError, match="float16"):
        large.save_pretrained(tmp_path, dtype="int8")
    with pytest.raises(coar.CoarError, match="max_shard_size='huge'"):
        large.save_pretrained(tmp_path, max_shard_size="huge")
    with pytest.raises(IndexError):
        large.row(2)
    with pytest.raises(coar.CoarError, match="fit together"):
        coar.Attributions(large.weights, large.bias[:1], None, large.components, large.identity)


def test_a_save_that_stopped_half_way_is_noticed(tmp_path):
    first, second = tiny(), tiny()
    second.weights[0, 0] = 9.0
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    # The weights of the second save are in place, its configuration is not.
    (tmp_path / "a/attributions.safetensors").write_bytes((tmp_path / "b/attributions.safetensors").read_bytes())
    with pytest.raises(coar.CoarError, match="damaged or not finished"):
        coar.Attributions.from_pretrained(tmp_path / "a")
    (tmp_path / "b/config.json").unlink()
    with pytest.raises(coar.CoarError, match=re.escape("lacks config.json")):
        coar.Attributions.from_pretrained(tmp_path / "b")


# A reader of its own, with the file's pages not counted before: how much memory does one row of a large file take?
READER = """
import sys
import torch
import hf_coar as coar
from hf_coar.attributions import rows  # what loading imports is not counted
import safetensors.torch

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * 1024

coar.Attributions.from_pretrained(sys.argv[2])
before = resident()
attributions = coar.Attributions.from_pretrained(sys.argv[1])
row = attributions.row(777)
after_row = resident() - before
whole = attributions.weights
after_mapping = resident() - before
view = attributions.weights[3].sum()
after_view = resident() - before
total = whole.sum()
print(after_row, after_mapping, after_view, resident() - before, float(row[0]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads the memory of a process from /proc")
def test_one_row_of_a_large_file_costs_one_row(tmp_path):
    n_examples, n_components = 1000, 25_000
    weights = torch.arange(n_examples, dtype=torch.float32)[:, None].expand(-1, n_components).contiguous()
    identity = Identity({}, torch.zeros(n_examples, dtype=torch.int64), torch.zeros(n_examples, dtype=torch.float64))
    components = Components((Group("fc", "neuron", "fc.weight", 0, n_components),))
    large = coar.Attributions(weights, torch.zeros(n_examples), None, components, identity, CONFIG)
    large.save_pretrained(tmp_path / "large")
    tiny().save_pretrained(tmp_path / "tiny")
    size = (tmp_path / "large/attributions.safetensors").stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", READER, str(tmp_path / "large"), str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after_row, after_mapping, after_view, after_all, value = map(float, done.stdout.split())
    assert value == 777.0
    assert max(after_row, after_mapping, after_view) < 4e6  # a row is 0.1 MB; the kernel maps some pages around it
    assert after_all > 0.9 * size  # so the measure does see what is read

    # Damage far from what is loaded is seen where it is read, and by whoever asks for it.
    with (tmp_path / "large/attributions.safetensors").open("r+b") as file:
        file.seek(size - 4 * n_components // 2)
        file.write(b"\xff\xff")
    loaded = coar.Attributions.from_pretrained(tmp_path / "large")
    damaged = []
    for index in (0, 777, 999):
        try:
            loaded.row(index)
        except coar.CoarError as error:
            damaged.append((index, str(error)))
    assert [index for index, _ in damaged] == [999] and "example 999" in damaged[0][1]
    with pytest.raises(coar.CoarError, match="example 999"):
        loaded.verify()
    with pytest.raises(coar.CoarError, match="example 999"):
        loaded.push_to_hub("user/name")
    with pytest.raises(coar.CoarError, match="example 999"):
        coar.Attributions.from_pretrained(tmp_path / "large", verify=True)


# -------------------------------------------------------------------------------------------------------------- edits


@pytest.fixture
def made(demo_pair, demo_attributions):
    """The demo's model, and an edited copy."""
    model, _ = demo_pair
    return model, coar.edit(model, demo_attributions, decrease=[0], n_components=12)


def test_undo_restores_the_original_bit_for_bit(tmp_path, made):
    model, changed = made
    edited.save(changed, tmp_path, figures=[("accuracy", "90%", "10%")])
    for each in (changed, models.load_model(tmp_path)):
        assert models.fingerprint(each) != models.fingerprint(model)
        restored = coar.undo(each, model)
        assert models.fingerprint(restored) == models.fingerprint(model)
        assert "edit" in models.record(each) and "edit" not in models.record(restored)
    entries = json.loads((tmp_path / "coar_edit.json").read_text())
    assert len(entries["components"]) == 12 and entries["figures"] == [["accuracy", "90%", "10%"]]


def test_undo_of_tied_weights(gpt2):
    model = gpt2.model
    attributions = coar.attribute(
        model, [gpt2.batch], output="token_margin", method=coar.PathGradient(rounds=2), progress=False
    )
    changed = coar.edit(model, attributions, increase=[0], n_components=5)
    assert models.fingerprint(coar.undo(changed, model)) == models.fingerprint(model)


def test_undo_refuses_what_it_cannot_restore(made, mlp):
    model, changed = made
    with pytest.raises(coar.CoarError, match="no record of an edit"):
        coar.undo(mlp.model, model)
    with pytest.raises(coar.CoarError, match="the base given is a ResNet"):
        coar.undo(changed, changed)
    tuned = copy.deepcopy(changed)
    with torch.no_grad():
        tuned.fc.bias[0] += 1
    with pytest.raises(coar.CoarError, match=r"after its edit, in 1 tensors: fc\.bias"):
        coar.undo(tuned, model)
    with pytest.raises(coar.CoarError, match="changed after its edit"):
        coar.undo(copy.deepcopy(changed).half(), model)


def test_another_model_is_refused_and_what_differs_is_named(made, demo_attributions, demo_pair, mlp):
    _, changed = made
    _, data = demo_pair
    with pytest.raises(coar.CoarError, match="edited: 12 components"):
        coar.edit(changed, demo_attributions, decrease=[0])
    with pytest.raises(coar.CoarError, match="class 'ResNet' against 'Sequential'"):
        coar.edit(mlp.model, demo_attributions, decrease=[0])
    with pytest.raises(coar.CoarError, match="components come with attributions of a model"):
        with coar.ablate(changed, demo_attributions.components, torch.ones(len(demo_attributions.components))):
            pass
    with pytest.raises(coar.CoarError, match="these attributions are of"):
        coar.evaluate(demo_attributions, changed, data, n_masks=3, progress=False)


def test_nothing_is_unpickled(tmp_path, made):
    import pickle

    model, _ = made
    models.save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(coar.CoarError, match=re.escape("holds none of model.safetensors")):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["ViTForImageClassification"], "model_type": "vit"})
    )
    with pytest.raises(coar.CoarError, match="cannot load"):
        models.load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}})
    )
    with pytest.raises(coar.CoarError, match="trust_remote_code=True"):
        models.load_model(tmp_path)


# ---------------------------------------------------------------------------------------------- what came before this

BEFORE = Path(__file__).parent / "data"  # written by the last commit of before there were rooms and a `Provenance`


def test_attributions_of_the_first_version_are_read():
    found = coar.Attributions.from_pretrained(BEFORE / "attributions-0.1", verify=True)
    assert found.weights.shape == (3, 32) and len(found.labels) == 3
    assert found.weights[0, :3].tolist() == pytest.approx([0.41581252, -0.1417385, 0.06020163], abs=1e-6)
    of = found.provenance
    assert of.fingerprint == "2c6d4692ea3c9b3d5a71e253e76f918a" and of.cost == 31.0 and of.dtype is None
    assert of.boundary_known and of.boundary == 0.0 and of.method["rounds"] == 2
    stored = json.loads((BEFORE / "attributions-0.1" / "config.json").read_text())
    assert found.config == {key: value for key, value in stored.items() if key not in ("files", "hf_coar_format")}


def test_attributions_of_the_first_version_still_fit_the_demo(monkeypatch):
    monkeypatch.chdir(Path(coar.__file__).parent.parent)  # their paths are relative
    found = coar.Attributions.from_pretrained(BEFORE / "attributions-0.1")
    with pytest.raises(coar.CoarError, match="not made here by you, and names 'hf_coar/demo/model'"):
        coar.reopen(found)
    recorded = found.provenance
    named = {"data": recorded.data["id"], "split": recorded.data["split"]}
    model, data = coar.reopen(found, model=recorded.model["id"], **named)
    assert len(data.dataset) == 3
    report = coar.evaluate(found, model, data, fractions=(0.1,), n_masks=5, progress=False)
    assert report.to_json()["fractions"][0]["correlation"] == pytest.approx(
        found.evaluation["fractions"][0]["correlation"], abs=1e-4
    )


def test_the_record_of_an_edit_of_the_first_version_is_read():
    value = json.loads((BEFORE / "coar_edit-0.1.json").read_text())
    assert models.check_edit(value, "the record") == value and len(value["components"]) == 2


def test_a_single_number_out_of_a_matrix_has_bytes(tmp_path):
    """Its step to the next number is that of the matrix, and there is none: a run of one example holds such numbers."""
    matrix = torch.arange(24.0).view(2, 12)
    for part in (matrix[1:, 5], matrix[:, 5], matrix[1, 3:6], matrix[0, 0], matrix[:0]):
        assert bytes(files.tensor_bytes(part)) == part.numpy().tobytes()
    assert Identity.of_batch({"x": matrix[1:, 5:6]}).hashes["x"].shape == (1, 16)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).eval()
    batch = {"x": torch.ones(1, 6), "labels": torch.zeros(1, dtype=torch.long)}
    options = {"method": coar.PathGradient(rounds=2), "progress": False}
    attributions = coar.attribute(model, [batch], out=tmp_path / "one", **options)
    found = coar.Attributions.from_pretrained(tmp_path / "one")
    assert torch.equal(found.weights, attributions.weights)
