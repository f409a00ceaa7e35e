"""The engine: what changes speed moves nothing but rounding, memory that runs out is no end, and costs are told."""

import functools
import json
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO, build_net

import hf_coar as coar
from hf_coar import cli
from hf_coar import data as data_module
from hf_coar.errors import CoarError, ModelError
from hf_coar.estimators import Size
from hf_coar.runs import engine, measuring
from hf_coar.runs.memory import peak_bytes
from hf_coar.runs.plan import Plan, plan
from hf_coar.runs.store import Store

SCRIPTS = Path(__file__).parent.parent / "scripts"
METHODS = {"path": coar.PathGradient(rounds=2), "regression": coar.Regression(n_masks=70)}


def attribute(net, method, batch_size=None, out=None, **options):
    size = batch_size or 4
    batches = [{k: v[i : i + size] for k, v in net.batch.items()} for i in range(0, 4, size)]
    with engine.running(**options):
        return coar.attribute(
            net.model, batches, output=net.output, method=METHODS[method], ablated_fraction=0.1, out=out, progress=False
        )


# ---------------------------------------------------------------------------------------------------------- speed only


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """(name of a net, method) -> the weights of a run as it comes, and its settings; made once."""

    @functools.cache
    def run(name, method):
        folder = tmp_path_factory.mktemp("plain")
        found = attribute(build_net(name), method, out=folder)
        return found.weights, (folder / "run.json").read_text()

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"batch_size": 1}, 1e-4),
        ({"batch_size": 3}, 1e-4),
        ({"masks_together": 5}, 1e-4),
        ({"compile": "eager"}, 1e-4),
        ({"worker": "0/1"}, 0),
        ({"strict": True}, 0),
        ({"dtype": "bfloat16"}, 0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["convnet", "gpt2"])
def test_what_changes_speed_moves_nothing_but_rounding(name, options, tolerance, method, tmp_path, plain_run):
    plain, settings = plain_run(name, method)
    other = attribute(build_net(name), method, out=tmp_path, **options)
    assert (plain - other.weights).abs().max() <= tolerance * plain.abs().max()
    stored = [json.loads(settings), json.loads((tmp_path / "run.json").read_text())]
    assert stored[1].pop("dtype", None) == options.get("dtype"), "lower precision is more than rounding"
    assert stored[0] == stored[1], "what changes speed only is not stored"


def test_options_end_with_their_block():
    outside = engine.current()
    with engine.running(dtype="bfloat16"):
        with engine.running(strict=True):
            assert engine.current() == replace(outside, dtype="bfloat16", strict=True)
        assert engine.current() == replace(outside, dtype="bfloat16")
    assert engine.current() == outside


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "there are bfloat16, float16"),
        ({"masks_together": 0}, "at least 1"),
        ({"batchsize": 3}, "no option batchsize; there are dtype, compile"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(CoarError, match=message), engine.running(**options):
        pass


@pytest.mark.parametrize("options", [{"compile": "eager"}, {"masks_together": 3}, {"dtype": "bfloat16"}], ids=str)
def test_the_model_is_as_before(options):
    net = build_net("convnet")
    before, state = net.logits(), {name: value.clone() for name, value in net.model.state_dict().items()}
    attribute(net, "regression", **options)
    assert torch.equal(net.logits(), before)
    assert all(torch.equal(value, state[name]) for name, value in net.model.state_dict().items())
    assert net.model._compiled_call_impl is None
    assert not any(module._forward_hooks for module in net.model.modules())


# -------------------------------------------------------------------------------------------------------- out of memory


def starve(net, fits):
    """Makes every pass of a net fail that has more than `fits` examples; the sizes of those that did."""
    errors = []

    def full(module, inputs, output):
        if len(output) > fits:
            errors.append(len(output))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    net.model.register_forward_hook(full)
    return errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fits", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_divided(method, fits, caplog):
    net = build_net("convnet")
    expected, errors = attribute(net, method), starve(net, fits)
    found = attribute(net, method)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    look = [4, 4] if fits > 1 else [2, 4, 4]  # of two examples, and twice of more
    again = [4] if fits > 1 else [4, 2]
    kinds = 4 if method == "path" else 1  # rounds, flips, far reads and fresh sets are passes of their own
    assert errors == [*look, *(again * kinds)], "a look at the model, and then what fits is remembered"
    assert "out of memory with 4 examples at a time; going on with 2" in caplog.text


def test_masks_together_are_divided_with_the_examples():
    net = build_net("convnet")
    expected, errors = attribute(net, "regression"), starve(net, 6)
    torch.testing.assert_close(attribute(net, "regression", masks_together=3).weights, expected.weights)
    assert errors == [12]


def test_not_even_one_example_fits():
    net = build_net("convnet")
    starve(net, 0)
    with pytest.raises(CoarError, match=r"one example .* fit into the memory of cpu; try a lower precision"):
        attribute(net, "path")


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error, is_it):
    assert engine.is_out_of_memory(error) == is_it


def test_other_errors_are_not_swallowed():
    def broken(module, inputs, output):
        raise RuntimeError("shapes cannot be multiplied")

    net = build_net("convnet")
    net.model.register_forward_hook(broken)
    with pytest.raises(ModelError, match=r"does not run .*RuntimeError: shapes cannot be multiplied"):
        attribute(net, "regression")


# ------------------------------------------------------------------------------------------------------ units of work


class Recorder:
    """Counts what is computed."""

    def __init__(self):
        self.units = []

    def __call__(self, batch, first, part):
        self.units.append((part.start, first, len(batch["inputs"])))
        return {"values": batch["inputs"].sum(1)}


PARTS = [engine.Part("masks", start, start + 5, 5.0) for start in (0, 5, 10)]
DATA = [{"inputs": torch.arange(8.0).view(4, 2) + 10 * i} for i in range(5)]


def run(folder, compute, data=DATA, **options):
    store = Store(folder, {"seed": 0})
    with engine.running(**options):
        return store, engine.run(store, torch.nn.Linear(1, 1), data, PARTS, compute, "test", progress=False)


def test_every_unit_is_done_once_and_never_again(tmp_path):
    first, again = Recorder(), Recorder()
    _, n_examples = run(tmp_path, first)
    assert n_examples == 20
    assert sorted(first.units) == [(part, example, 4) for part in (0, 5, 10) for example in range(0, 20, 4)]
    run(tmp_path, again)
    assert again.units == []


def test_another_batch_size_fills_the_gaps(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_coar.runs.outbox.SECONDS", 0.0)
    first, again = Recorder(), Recorder()
    store, _ = run(tmp_path, first)
    for path in (tmp_path / "shards").glob("masks-000005-*-000000008.safetensors"):
        path.unlink()
    inputs = torch.cat([batch["inputs"] for batch in DATA])
    run(tmp_path, again, [{"inputs": part} for part in inputs.split(3)])
    assert again.units == [(5, 4, 2), (5, 6, 2)]
    assert torch.equal(store.gather("masks-000005", 20)["values"], inputs.sum(1))


def test_a_process_does_its_own_batches_first_and_then_what_is_left(tmp_path):
    recorder = Recorder()
    run(tmp_path, recorder, worker="1/2")
    assert [first for _, first, _ in recorder.units[:6]] == [4, 4, 4, 12, 12, 12]
    assert len(recorder.units) == 15


def test_what_another_process_does_meanwhile_is_not_done_again(tmp_path):
    """While worker 0 is at its second unit, worker 1 does all of its own."""
    other, mine = Recorder(), Recorder()

    def compute(batch, first, part):
        results = mine(batch, first, part)
        if len(mine.units) == 2:
            for number in (1, 3):
                for wanted in PARTS:
                    values = other(DATA[number], 4 * number, wanted)
                    identity = data_module.Identity.of_batch(DATA[number])
                    Store(tmp_path, {"seed": 0}).write(wanted.name, 4 * number, values | identity.columns())
        return results

    run(tmp_path, compute, worker="0/2")
    assert len(other.units) == 6 and len(mine.units) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_short_units_share_a_shard(tmp_path, workers):
    data = [{"inputs": torch.arange(8.0).view(4, 2) + 10 * i} for i in range(150)]
    for index in range(workers):
        recorder = Recorder()
        store, n_examples = run(tmp_path, recorder, data, worker=f"{index}/{workers}")
    shards = list((tmp_path / "shards").iterdir())
    assert len(shards) < 3 * 150 / 3
    expected = torch.cat([batch["inputs"].sum(1) for batch in data])
    for part in PARTS:
        assert torch.equal(store.gather(part.name, n_examples)["values"], expected)


def test_long_units_go_out_at_once(tmp_path):
    seen = []

    def slow(batch, first, part):
        seen.append(len(list((tmp_path / "shards").glob("*.safetensors"))))
        time.sleep(0.11)
        return {"values": batch["inputs"].sum(1)}

    run(tmp_path, slow, DATA[:2])
    assert seen == list(range(6))


def test_what_waits_is_written_whatever_happens(tmp_path):
    recorder = Recorder()

    def interrupted(batch, first, part):
        if len(recorder.units) == 7:
            raise KeyboardInterrupt
        return recorder(batch, first, part)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted)
    again = Recorder()
    run(tmp_path, again)
    assert len(again.units) == 15 - 7


# --------------------------------------------------------------------------------------------------------------- costs


def test_the_plan_of_a_model_worked_out_on_paper():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    example = {"inputs": torch.zeros(1, 6)}
    parts = coar.Regression(n_masks=130).parts(Size(8, 0.05))
    found = plan(model, example, 100, 8, parts, 32, processes=3)
    assert found.flops == 2 * (6 * 8 + 8 * 3)
    assert found.passes == 130 and found.total_flops == 100 * 130 * 144
    assert found.n_units == 4 * 3
    assert found.parameter_bytes == 4 * (6 * 8 + 8 + 8 * 3 + 3)
    assert found.pass_bytes == 4 * (8 + 8)  # what goes into and comes out of the nonlinearity
    assert found.disk_bytes == 4 * 100 * (130 + 2 * 8)
    assert found.seconds(1e6) == pytest.approx(found.total_flops / 12 * 4 / 1e6)
    assert "12: 4 batches × 3 parts" in str(found)


def test_memory_is_counted_beside_sparse_tensors():
    graph = torch.eye(4).to_sparse()
    assert peak_bytes(lambda: torch.sparse.mm(graph, torch.ones(4, 4))) >= 2 * 4 * 16


def test_the_plan_of_a_model_without_weights():
    with torch.device("meta"):
        model, example = torch.nn.Linear(1000, 1000), {"inputs": torch.zeros(1, 1000)}
    parts = coar.PathGradient(rounds=2).parts(Size(1000, 0.05))
    found = plan(model, example, 10, 1000, parts)
    assert found.flops == 2e6 and found.passes == 60 + (1 + 32) + 10 + 20  # two rounds, flips, far reads, fresh sets


ATTRIBUTE = ["attribute", str(DEMO / "model"), str(DEMO / "images.parquet"), "--split", "train[:70]"]


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*ATTRIBUTE, "--out", str(out), "--dry-run", "--worker", "1/2", "--rounds", "2"]) == 0
    text = capsys.readouterr().out
    assert "12: 3 batches × 4 parts" in text and "at most 6 units each" in text and "process 1 of 2" in text
    assert cli.main([*ATTRIBUTE, "--out", str(out), "--dry-run", "--json", "--method", "regression"]) == 0
    assert json.loads(capsys.readouterr().out)["n_units"] == 3 * 79
    assert not out.exists()


def test_parts_and_durations():
    parts = measuring.parts_of(130)
    assert [(part.name, part.cost) for part in parts] == [
        ("masks-000000", 64.0), ("masks-000064", 64.0), ("masks-000128", 2.0)
    ]  # fmt: skip
    assert [engine.duration(seconds) for seconds in (30, 600, 9000)] == ["30 s", "10 min", "2.5 h"]


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("script", ["slurm_array.sh", "accelerate_multinode.sh"])
def test_the_recipes_run_dry(script, tmp_path):
    path = SCRIPTS / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    environment = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    environment |= {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "HEAD": "a1"}
    arguments = [*ATTRIBUTE[1:], "--out", str(tmp_path / "run")]
    done = subprocess.run(["bash", str(path), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    expected = {"slurm_array.sh": ["--worker", "2/4"], "accelerate_multinode.sh": ["--num_processes", "16"]}[script]
    assert words[words.index(expected[0]) + 1] == expected[1]
    command = words[words.index("hf_coar") + 1 :]
    assert command[: len(arguments) + 1] == ["attribute", *arguments]
    assert cli.main(command) == 0
    assert not (tmp_path / "run").exists()


def test_plans_know_of_the_files_on_the_way():
    sizes = {"passes": 1.0, "flops": 1.0, "batch_size": 1, "n_parts": 1, "n_outputs": 0, "parameter_bytes": 0}
    small, large = (
        Plan(n_examples=n, n_components=50_000, pass_bytes=0, differentiates=True, **sizes) for n in (100, 1000)
    )
    assert small.disk_bytes == 4 * 100 * 2 * 50_000 and large.disk_bytes == 3 * 4 * 1000 * 2 * 50_000
    assert replace(large, differentiates=False).disk_bytes == 4 * 1000 * 2 * 50_000
