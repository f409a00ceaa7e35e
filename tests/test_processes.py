"""Many processes, and models that lie on several devices: the same result as one process and one device."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO, build_net
from other_processes import start, wait
from safetensors.torch import load_file

import hf_coar as coar
from hf_coar import cli
from hf_coar.errors import CoarError
from hf_coar.runs import engine, workers

ATTRIBUTE = ["attribute", str(DEMO / "model"), str(DEMO / "images.parquet"), "--split", "train[:16]"]
ATTRIBUTE += ["--rounds", "2", "--batch-size", "4", "--include", "layer3.*", "--exclude", "layer3.1.*"]


def content(folder):
    """Bytes by name; of the shards, which short units share as it happens, the bytes of every part together."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".tmp"]
    found, parts = {}, {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name.startswith("shards/"):
            part, start, _ = path.stem.rsplit("-", 2)
            parts.setdefault(part, []).append((int(start), load_file(path)))
        else:
            found[name] = path.read_bytes()
    for part, shards in parts.items():
        shards = [tensors for _, tensors in sorted(shards, key=lambda shard: shard[0])]
        for name in shards[0]:
            found[f"{part}: {name}"] = torch.cat([tensors[name] for tensors in shards]).numpy().tobytes()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with one thread writes."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*ATTRIBUTE, "--out", str(folder)]) == 0
    return content(folder)


# ------------------------------------------------------------------------------------------------------------ launchers


SCRIPT = """
import contextlib, io, sys
sys.path.insert(0, sys.argv[1])
from conftest import build_net
import hf_coar as coar
from hf_coar import cli
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = cli.main(sys.argv[2:])
net = build_net("mlp")
batches = [net.batch] * 4
how = {"method": coar.PathGradient(rounds=2), "ablated_fraction": 0.1, "progress": False}
a = coar.attribute(net.model, batches, **how)
r = coar.evaluate(a, net.model, batches, fractions=(.1,), n_masks=70, progress=False)
said = out.getvalue().count("saved in")
print(f"{code} {said}, {len(a)} {r.n_masks} {float(a.weights.sum()):.5f} done\\n", end="", flush=True)
"""


def test_torchrun_with_two_processes_writes_the_same_bytes(alone, tmp_path):
    """What the command line does; and afterwards a run without a folder, for which the two share a temporary one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
    command += [str(tmp_path / "script.py"), str(Path(__file__).parent), *ATTRIBUTE, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.split("\n") if line.endswith("done"))  # older ones of torch also greet
    assert [line[:3] for line in lines] == ["0 0", "0 1"], "only the main process speaks"
    assert content(tmp_path / "run") == alone
    assert lines[0][4:] == lines[1][4:] and lines[0][4:].strip().startswith("16 70 ")


def test_independent_workers_write_the_same_bytes(alone, tmp_path, capfd):
    workers = [
        start(lambda i=i: cli.main([*ATTRIBUTE, "--out", str(tmp_path), "--worker", f"{i}/3"])) for i in range(3)
    ]
    assert [wait(worker) for worker in workers] == [0, 0, 0]
    assert content(tmp_path) == alone


def test_more_workers_than_batches(tmp_path):
    net = build_net("mlp")
    method = coar.Regression(n_masks=200)  # four parts of one batch

    def work(folder, worker):
        with engine.running(worker=worker):
            coar.attribute(net.model, [net.batch], method=method, ablated_fraction=0.1, out=folder, progress=False)
        return 0

    work(tmp_path / "alone", "0/1")
    children = [start(lambda i=i: work(tmp_path / "three", f"{i}/3")) for i in range(3)]
    assert [wait(child) for child in children] == [0, 0, 0]
    assert content(tmp_path / "three") == content(tmp_path / "alone")


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


def test_accelerate_that_started_one_process_of_several_is_noticed():
    with pytest.raises(CoarError, match="torchrun --nproc-per-node N -m hf_coar"):
        workers._check_launched({**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    "environment",
    [{}, LAUNCHED, {**LAUNCHED, "MASTER_PORT": "29500", "WORLD_SIZE": "2"}, {"MASTER_PORT": "29500"}],
    ids=["no launcher", "one process", "two processes", "somebody else's port"],
)
def test_other_launches_are_not_complained_about(environment):
    workers._check_launched(environment)


@pytest.mark.slow
def test_accelerate_launch_itself(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    arguments = ["-m", "hf_coar", *ATTRIBUTE, "--out", str(tmp_path)]
    refused = subprocess.run([*command, "2", *arguments], capture_output=True, text=True)
    assert refused.returncode and "torchrun --nproc-per-node N" in refused.stderr
    assert subprocess.run([*command, "1", *arguments], capture_output=True, text=True).returncode == 0


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_says_how_to_resume(alone, tmp_path):
    folder = tmp_path / "run"
    errors = tmp_path / "errors"

    def work():
        sys.stderr = errors.open("w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return cli.main([*ATTRIBUTE, "--out", str(folder)])
        finally:
            sys.stderr.flush()

    child = start(work)
    deadline = time.monotonic() + 60
    while not list(folder.glob("shards/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert wait(child) == cli.INTERRUPTED
    assert "run the same command again to go on from here" in errors.read_text()
    assert len(list(folder.glob("shards/*.safetensors"))) < 5
    assert cli.main([*ATTRIBUTE, "--out", str(folder)]) == 0
    assert content(folder) == alone


# ------------------------------------------------------------------------------------------- models on several devices


DEVICE_MAPS = {
    "mlp": {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "disk"},
    "vit": {"vit.embeddings": "disk", "vit.layers.0": "cpu", "vit.layers.1": "disk", "vit.layernorm": "cpu"}
    | {"classifier": "disk"},
}


def device_map(model, name):
    """Blocks are called otherwise in older versions of transformers."""
    older = hasattr(getattr(model, "vit", None), "encoder")
    named = DEVICE_MAPS[name].items()
    return {module.replace("vit.layers", "vit.encoder.layer") if older else module: place for module, place in named}


OPTIONS = {"ablated_fraction": 0.1, "progress": False}


@functools.cache
def in_memory(name, method):
    """Weights of the model in one piece."""
    net = build_net(name)
    return coar.attribute(net.model, [net.batch], method=method, **OPTIONS).weights


@pytest.mark.parametrize("method", [coar.PathGradient(rounds=2), coar.Regression(n_masks=40)], ids=lambda m: m.name)
@pytest.mark.parametrize("how", ["offloaded", "dispatched"])
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_an_offloaded_model_attributes_unchanged(name, how, method, tmp_path):
    import accelerate

    net = build_net(name)
    if how == "offloaded":
        model = accelerate.cpu_offload(build_net(name).model, execution_device=torch.device("cpu"))
    else:
        model = build_net(name).model
        model = accelerate.dispatch_model(
            model, device_map(model, name), main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    assert any(parameter.is_meta for parameter in model.parameters())
    found = coar.attribute(model, [net.batch], method=method, **OPTIONS)
    torch.testing.assert_close(found.weights, in_memory(name, method), rtol=1e-4, atol=1e-5)
    assert any(parameter.is_meta for parameter in model.parameters())
