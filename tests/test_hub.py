"""The Hub, spoken to by the real huggingface_hub client: a local server, and a fresh process for every reader."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import READ_ONLY_TOKEN, Hub, hub

import hf_coar as coar

DEMO = Path(coar.__file__).parent / "demo"

# A client whose retries do not wait: the tests are about what it says at last.
PRELUDE = """
import json, os, sys, time, urllib.request
import torch
torch.set_num_threads(1)
time.sleep = lambda seconds: None

def faults(*entries):
    body = json.dumps([list(entry) for entry in entries]).encode()
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/_faults", body, method="POST")
    urllib.request.urlopen(request).read()
"""


def client(code: str, server: Hub, cache: Path, token: str | None = "hf_test", offline: bool = False) -> str:
    """What a process of its own prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    env |= {"HF_TOKEN": token} if token else {}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=env, capture_output=True, text=True, timeout=120, cwd=cache
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder for one client's cache and files."""
    path = tmp_path / "client"
    path.mkdir()
    return path


# ----------------------------------------------------------------------------------------------------- the whole way

PRODUCE = """
import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

model, data = coar.load("me/base", data="me/images", split="train[:6]", batch_size=6)
attributions = coar.attribute(model, data, method=coar.PathGradient(rounds=2), progress=False)
report = coar.evaluate(attributions, model, data, fractions=(0.05,), n_masks=5, progress=False)
attributions.push_to_hub("me/attributions", private=True, commit_message="first", report=report, pictures="pictures")
changed = coar.edit(model, attributions, decrease=[0], n_components=5)
edited.push_to_hub(changed, "me/edited", figures=[("accuracy", "90.1%", "12.3%")])

torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16)
vit = ViTForImageClassification(ViTConfig(**sizes, patch_size=8, num_labels=3)).eval()
pixels = torch.randn(3, 3, 16, 16)
batches = [{"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}]
of_vit = coar.attribute(vit, batches, method=coar.PathGradient(rounds=2), progress=False)
changed_vit = coar.edit(vit, of_vit, increase=[1], n_components=4)
edited.push_to_hub(changed_vit, "me/edited-vit")
changed_vit.push_to_hub("me/edited-vit", commit_message="once more, by transformers' own way")

images = next(iter(data))["pixel_values"]
with torch.no_grad():
    expected = {"timm": changed(images), "vit": changed_vit(pixels).logits}
save_file({"images": images, "pixels": pixels, "weights": attributions.weights, **expected}, "expected.safetensors")
print(json.dumps(attributions.config))
"""

READ = """
import hf_coar as coar
from hf_coar import models
from safetensors.torch import load_file

expected = load_file(sys.argv[1] if len(sys.argv) > 1 else "expected.safetensors")
attributions = coar.Attributions.from_pretrained("me/attributions")
assert torch.equal(attributions.weights, expected["weights"])
model, data = coar.load("me/base", data="me/images", split="train[:6]", batch_size=6)
changed = coar.edit(model, attributions, decrease=[0], n_components=5)
assert torch.equal(models.logits(changed, {"inputs": expected["images"]}), expected["timm"])
pulled = models.load_model("me/edited")
assert models.fingerprint(coar.undo(pulled, model)) == models.fingerprint(model)
print(json.dumps([models.record(model)["revision"], data.description["revision"]]))
"""

PLAIN = """
sys.modules["hf_coar"] = None  # from here on `import hf_coar` fails
import timm
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

expected = load_file("expected.safetensors")
with torch.no_grad():
    by_timm = timm.create_model("hf-hub:me/edited", pretrained=True).eval()(expected["images"])
    by_auto = AutoModelForImageClassification.from_pretrained("me/edited-vit").eval()(expected["pixels"]).logits
assert torch.equal(by_timm, expected["timm"]) and torch.equal(by_auto, expected["vit"])
del sys.modules["hf_coar"]
"""


def snippets(card: str) -> list[str]:
    """The Python of a card."""
    return [part.split("\n```")[0] for part in card.split("```python\n")[1:]]


def test_attribute_push_pull_edit_push_and_load_with_the_base_libraries_alone(tmp_path, folder):
    with hub("lfs") as server:
        base = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
        base["README.md"] = b"---\nlicense: other\nlicense_name: our-own\nlicense_link: [7]\n---\n# Base\n"
        model_commit = server.add("me/base", base)
        images = (DEMO / "images.parquet").read_bytes()
        data_commit = server.add("datasets/me/images", {"data/train-00000-of-00001.parquet": images})
        (folder / "pictures").mkdir()
        (folder / "pictures" / "by_layer.png").write_bytes(b"\x89PNG\r\n\x1a\n")

        config = json.loads(client(PRODUCE, server, folder).splitlines()[-1])
        assert config["model"]["id"] == "me/base" and config["model"]["revision"] == model_commit
        assert config["data"]["id"] == "me/images" and config["data"]["revision"] == data_commit
        pushed = server.files("me/attributions")
        assert (
            server.repos["me/attributions"].private
            and "attributions.safetensors" in server.repos["me/attributions"].lfs
        )
        assert {"config.json", "components.json", "evaluation.json", "README.md", "pictures/by_layer.png"} <= set(
            pushed
        )
        card = pushed["README.md"].decode()
        assert "base_model: me/base" in card and model_commit in card and "pictures/by_layer.png" in card
        head = "license: other\nlicense_name: our-own\ntags:\n"
        assert head in card and head in server.files("me/edited")["README.md"].decode()
        results = pushed[".eval_results/hf_coar.yaml"].decode()
        assert "me/images" in results and data_commit in results
        edited_card = server.files("me/edited")["README.md"].decode()
        assert "| accuracy | 90.1% | 12.3% |" in edited_card and "base_model_relation: finetune" in edited_card
        # transformers' own push puts its tags into our card, and keeps the rest of it.
        assert "arXiv:2404.11534" in server.files("me/edited-vit")["README.md"].decode()

        fresh = tmp_path / "fresh"  # another cache, another process
        fresh.mkdir()
        (fresh / "expected.safetensors").write_bytes((folder / "expected.safetensors").read_bytes())
        code = PLAIN + READ + "\n" + "\n".join(snippets(card))  # what the card says runs as it stands
        assert json.loads(client(code, server, fresh).splitlines()[0]) == [model_commit, data_commit]

        del server.requests[:]
        offline = json.loads(client(READ, server, fresh, offline=True).splitlines()[0])
        assert offline == [model_commit, data_commit] and not server.requests


# ------------------------------------------------------------------------------------------------- what can go wrong

TROUBLES = """
from dataclasses import replace

import hf_coar as coar
from hf_coar.attributions import folders
from hf_coar.editing import edited

found = {}

def attempt(name, action):
    try:
        found[name] = "OK " + str(action())
    except coar.CoarError as error:
        found[name] = str(error)

def pull(repo, **settings):
    return lambda: coar.Attributions.from_pretrained(repo, **settings)

def push(repo, **settings):
    return lambda: folders.push_folder("artefact", repo, **settings)

faults(["PUT", "/objects/", "die", 99])
attempt("died amid the upload", push("me/new"))
faults()
attempt("pushed again", push("me/new"))
attempt("pulled", pull("me/new"))
for status in (401, 403, 409, 500):
    faults(["POST", "/commit/", status, 99])
    attempt(f"commit {status}", push("me/other"))
faults(["POST", "/api/repos/create", "die", 99])
attempt("no Hub", push("me/other"))
faults()
attempt("no repository", pull("me/nothing"))
attempt("no revision", pull("me/new", revision="v9"))
attempt("no file", pull("me/empty"))
attempt("no id", pull("not an id"))
attempt("private", pull("me/private", token=False))
faults(["GET", "attributions.safetensors", "truncate", 1])
attempt("truncated once", pull("me/once"))
faults(["GET", "attributions.safetensors", "truncate", 99])
attempt("truncated", pull("me/copy"))
faults(["GET", "attributions.safetensors", 500, 99], ["HEAD", "attributions.safetensors", 500, 99])
attempt("download 500", pull("me/copy"))
faults()
attempt("read-only token", push("me/other", token="READ_ONLY"))
attempt("proposed", push("me/new", create_pr=True, commit_message="proposal"))
attempt("their card", push("me/written"))
attempt("local only", pull("me/new", local_files_only=True))
attempt("another cache", pull("me/new", local_files_only=True, cache_dir="elsewhere"))
attempt("nothing to push", lambda: edited.push_to_hub("artefact", "me/other"))
for name in ("open", "shut"):
    shown = coar.Attributions.from_pretrained("artefact")
    shown.provenance = replace(shown.provenance, data={"id": f"me/{name}", "revision": "a" * 40})
    shown.push_to_hub(f"me/shown-{name}", pictures="artefact/pictures")
print(json.dumps(found))
""".replace("READ_ONLY", READ_ONLY_TOKEN)


def _artefact(folder: Path, demo_attributions) -> dict[str, bytes]:
    demo_attributions.save_pretrained(folder)
    (folder / "pictures").mkdir()
    for name in ("example_0", "top_components_0"):
        (folder / "pictures" / f"{name}.png").write_bytes(b"PNG")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_trouble_has_a_message_that_says_what_to_do(folder, demo_attributions):
    with hub("lfs") as server:
        saved = _artefact(folder / "artefact", demo_attributions)
        for name in ("me/copy", "me/once", "me/private", "me/written"):
            server.add(name, saved)
        server.repos["me/private"].private = True
        for name in ("open", "shut"):
            server.add(f"datasets/me/{name}", {"data.csv": b"text,label"})
        server.repos["datasets/me/shut"].private = True
        server.add("me/written", {"README.md": b"# Mine\n"})
        server.add("me/empty", {"config.json": b'{"hf_coar_format": 1}', "other.txt": b""})
        found = json.loads(client(TROUBLES, server, folder).splitlines()[-1])
        assert server.files("me/written")["README.md"] == b"# Mine\n"
        assert "attributions.safetensors" in server.files("me/written")
        # The images are of a file of this machine: none of them leaves it.
        assert [name for name in server.files("me/new") if name.endswith("png")] == ["pictures/top_components_0.png"]
        assert "pictures/example_0.png" in server.files("me/shown-open")
        assert "pictures/example_0.png" not in server.files("me/shown-shut")
        assert set(server.files("me/other")) == {".gitattributes"}  # nothing refused has left a trace
        assert "refs/pr/1" in server.repos["me/new"].refs

    said = {
        "died amid the upload": ("connection broke off", "try again", "No file was changed"),
        "pushed again": ("OK", "/commit/"),
        "pulled": ("OK", "12 examples"),
        "commit 401": ("401", "hf auth login"),
        "commit 403": ("403", "right to write", "create_pr"),
        "commit 409": ("409", "same command again"),
        "commit 500": ("500", "try again later"),
        "no Hub": ("connection broke off", "try again"),
        "no repository": ("me/nothing", "no such repository", "hf auth login"),
        "no revision": ("no such revision",),
        "no file": ("damaged", "config.json"),
        "no id": ("neither a folder nor a Hub id",),
        "private": ("private", "token"),
        "truncated once": ("OK",),
        "truncated": ("try again", "attributions.safetensors"),
        "download 500": ("attributions.safetensors", "the Hub answered 500", "try again later"),
        "read-only token": ("403", "right to write"),
        "proposed": ("OK", "/discussions/1"),
        "their card": ("OK",),
        "local only": ("OK",),
        "another cache": ("not downloaded before",),
        "nothing to push": ("coar_edit.json",),
    }
    assert found.keys() == said.keys()
    wrong = {name: found[name] for name, words in said.items() if not all(word in found[name] for word in words)}
    assert not wrong


REGULAR = """
import hf_coar as coar
from hf_coar import cli

assert cli.main(["push", "artefact", "me/regular", "--commit-message", "by the command line"]) == 0
attributions = coar.Attributions.from_pretrained("me/regular")
attributions.push_to_hub("me/regular", dtype="float16", max_shard_size="20KB")
again = coar.Attributions.from_pretrained("me/regular", cache_dir="fresh")
print(float((again.weights - attributions.weights).abs().max()))
assert cli.main(["push", "nowhere", "me/regular"]) == 2
"""


def test_regular_mode_the_command_line_and_shards_that_replace_others(folder, demo_attributions):
    with hub("regular") as server:
        _artefact(folder / "artefact", demo_attributions)
        (folder / "artefact" / "run.json").write_text("{}")
        difference = float(client(REGULAR, server, folder).splitlines()[-1])
        assert 0 < difference < 0.02
        names = set(server.files("me/regular"))
        assert "attributions.safetensors" not in names and "run.json" not in names
        assert any(re.fullmatch(r"attributions-00001-of-0000[2-9]\.safetensors", name) for name in names)
        assert not server.repos["me/regular"].lfs
        config = json.loads(server.files("me/regular")["config.json"])
        assert config["model"]["id"] == "model" and config["data"]["id"] == "images.parquet"  # no local path is told


# ----------------------------------------------------------------------------------------------------- the hf command


def test_the_hf_command_finds_the_extension(tmp_path):
    """`hf extensions install USER/hf-coar` looks for the console script `hf-coar`; `hf coar …` then runs it."""
    installed = tmp_path / ".local/share/hf/extensions/hf-coar"
    installed.mkdir(parents=True)
    script = Path(sys.executable).parent / "hf-coar"
    manifest = {"owner": "me", "repo": "hf-coar", "repo_id": "me/hf-coar", "short_name": "coar", "type": "python"}
    manifest |= {"executable_path": str(script), "installed_at": "2026-01-01T00:00:00+00:00"}
    (installed / "manifest.json").write_text(json.dumps(manifest))
    env = {**os.environ, "HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HOME": str(tmp_path / "hf")}
    if tuple(map(int, huggingface_hub.__version__.split(".")[:2])) < (1, 6):
        pytest.skip("extensions of huggingface_hub 1.5 are no Python programs yet")
    command = [Path(sys.executable).parent / "hf", "coar", "--version"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"hf-coar {coar.__version__}", done.stderr
