"""On a CUDA device: the numbers of the CPU to rounding, graphs launched as one, nothing that waits, little memory."""

import logging
import os
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_captured import FEW, bert, gpt2, resnet, rounds_of, vit

import hf_coar as coar
from hf_coar import demo
from hf_coar.attributions.far import Far
from hf_coar.attributions.forecast import Forecast
from hf_coar.estimators import checking, live
from hf_coar.estimators.gates import GateRounds
from hf_coar.estimators.regression import solve
from hf_coar.estimators.shrinkage import shrink
from hf_coar.masking import MaskedModel
from hf_coar.models import launched, outputs
from hf_coar.runs import captured, sampling
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import MaskedPasses, OwnMaskedPasses
from hf_coar.runs.problem import Estimates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OURS = str(Path(coar.__file__).parent)
CASES = pytest.mark.parametrize("case", [resnet, vit, gpt2, bert])


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Convolutions and matrix products in all of float32's bits; graphs in the second pass of all."""
    torch.manual_seed(0)
    for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        monkeypatch.setattr(place, "fp32_precision", "ieee")
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after_launches=0.0))


def on(device, case):
    """The case's model and batches there."""
    model, batches, output = case()
    model.requires_grad_(False)
    return model.to(device), sent(batches) if device == "cuda" else batches, output


def sent(batches):
    """The same on the device."""
    return [{name: one.to("cuda") for name, one in batch.items()} for batch in batches]


def assert_close(found, expected, rtol=1e-3):
    """Every field of these reads, relative to its largest value."""
    for one, other in zip(found, expected, strict=True):
        for name in ("soft", "hard", "gates", "output"):
            a, b = getattr(one, name).cpu(), getattr(other, name).cpu()
            assert float((a - b).abs().max()) <= rtol * float(b.abs().max().clamp_min(1e-6)), name


@CASES
def test_gate_passes_are_those_of_the_cpu_and_are_launched_as_one(case, caplog):
    model, batches, output = on("cpu", case)
    expected, _ = rounds_of(model, batches, output, compile=False)
    model = model.to("cuda")
    there = sent(batches)
    eager, _ = rounds_of(model, there, output, compile=False)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found, passes = rounds_of(model, there, output, compile="auto")
    assert_close(eager, expected)
    assert_close(found, expected)
    assert passes.replays, caplog.text
    assert isinstance(passes.replays[0], launched.Recording), caplog.text


@pytest.mark.parametrize("case", [resnet, vit])
def test_fused_gate_passes_are_those_of_the_cpu(case, caplog, monkeypatch):
    monkeypatch.setattr(captured, "GATES", replace(captured.GATES, after_launches=0.0, fused_after=-1.0))
    model, batches, output = on("cpu", case)
    expected, _ = rounds_of(model, batches, output, compile=False)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found, passes = rounds_of(model.to("cuda"), sent(batches), output, compile="auto")
    assert_close(found, expected)
    assert passes.replays and "products are fused" in caplog.text, caplog.text
    assert isinstance(passes.replays[0], launched.Recording), caplog.text


def masked_passes(model, batches, output, compile, n_masks=20):
    masked = MaskedModel(model, coar.find_components(model))
    masks = sampling.Masks(len(masked), 0.05, n_masks, 0, sampling.MASKS)
    with coar.running(compile=compile):
        passes = MaskedPasses(masked, outputs.get(output), masks)
        part = Part("masks", 0, n_masks, float(n_masks), n_masks)
        found = [passes.compute(batch, 0, part)["outputs"] for batch in batches]
    return torch.cat(found), passes


@CASES
def test_masked_passes_are_those_of_the_cpu_and_are_launched_as_one(case, caplog):
    model, batches, output = on("cpu", case)
    expected, _ = masked_passes(model, batches, output, compile=False)
    model = model.to("cuda")
    there = sent(batches)
    eager, _ = masked_passes(model, there, output, compile=False)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found, passes = masked_passes(model, there, output, compile="auto")
    scale = float(expected.abs().max())
    assert float((eager - expected).abs().max()) <= 1e-3 * scale
    assert float((found - expected).abs().max()) <= 1e-3 * scale
    assert isinstance(passes._passes.replays[0], launched.Recording), caplog.text


def test_a_model_that_was_moved_is_recorded_again():
    model, batches, output = on("cuda", vit)
    rounds = GateRounds(MaskedModel(model, coar.find_components(model)), outputs.get(output), 0.1, 0)
    expected, found = [], []
    for compile, reads in ((False, expected), ("auto", found)):
        for _ in range(3):
            with coar.running(compile=compile):
                rounds.passes.begin_batch()
                reads.append(rounds.round(batches[0], range(FEW), 0))
            model.cpu()
            filler = [torch.full_like(one, float("nan"), device="cuda") for one in model.parameters()]
            model.cuda()
            del filler
    assert_close(found, expected)


@CASES
def test_nothing_of_ours_waits_in_a_pass(case):
    model, batches, output = on("cuda", case)
    masked = MaskedModel(model, coar.find_components(model))
    rounds, examples = GateRounds(masked, outputs.get(output), 0.1, seed=0), range(FEW)
    passes = MaskedPasses(masked, outputs.get(output), sampling.Masks(len(masked), 0.05, 20, 0, 0))
    part = Part("masks", 0, 20, 20.0, 20)
    for compile in (False, "auto"):
        with coar.running(compile=compile):
            rounds.passes.begin_batch()
            for index in range(2):
                rounds.round(batches[0], examples, index)
            passes.compute(batches[0], 0, part)
            in_rounds = waits(lambda: rounds.round(batches[0], examples, 2))
            in_masks = waits(lambda: passes.compute(batches[0], 0, part))
        assert not in_rounds
        # Whether all is finite, and whether a recording gives what the model's own code gives.
        assert [place.split(":")[0] for place in in_masks] in (
            ["/runs/measuring.py"],
            ["/models/launched.py", "/runs/measuring.py"],
        )


def waits(act):
    """Where our code made the host wait for the device; what transformers asks of its masks is its own."""
    found = []

    def said(message, category, filename, lineno, *rest):
        frames = [f"{one.filename}:{one.lineno}" for one in traceback.extract_stack()]
        ours = [place for place in frames if OURS in place]
        if ours and "synchroniz" in str(message) and not any("masking_utils.py" in place for place in frames):
            found.append(ours[-1])

    torch.cuda.synchronize()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", said)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [place.removeprefix(OURS) for place in found]


ALONE = """
import sys, torch, hf_coar as coar
from hf_coar import demo
from safetensors.torch import save_file
for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
    place.fp32_precision = "ieee"
model, data = coar.load(demo.MODEL, demo.IMAGES, split="train[:24]", batch_size=8)
with coar.running(progress=False, report=False, dtype=sys.argv[2] or None):
    found = coar.attribute(model, data, ablated_fraction=0.05, out=sys.argv[1])
save_file({"weights": found.weights}, sys.argv[1] + ".safetensors")
print(next(model.parameters()).device)
"""


def run_alone(folder, visible=None, dtype=""):
    environment = {**os.environ} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    command = [sys.executable, "-c", ALONE, str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("cpu"), "a model goes home"
    return load_file(f"{folder}.safetensors")["weights"]


def test_a_default_run_is_that_of_the_cpu(tmp_path):
    least = {"": 0.9999, "tf32": 0.999, "bfloat16": 0.97}
    with ThreadPoolExecutor() as at_once:
        on_cpu = at_once.submit(run_alone, tmp_path / "cpu", visible="")
        runs = {dtype: at_once.submit(run_alone, tmp_path / f"gpu{dtype}", dtype=dtype) for dtype in least}
    expected = on_cpu.result()
    for dtype, run in runs.items():
        found = run.result()
        correlation = float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1])
        assert correlation >= least[dtype], dtype


def test_a_batch_that_does_not_fit_is_divided(caplog, tmp_path):
    import timm

    model = timm.create_model("resnet18", num_classes=10).cuda().eval()
    data = [{"x": torch.randn(96, 3, 224, 224), "labels": torch.arange(96) % 10}]
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with caplog.at_level(logging.WARNING, "hf_coar"), coar.running(progress=False):
            method = coar.PathGradient(rounds=2).bare()
            found = coar.attribute(model, data, method=method, ablated_fraction=0.1, out=tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.weights.isfinite().all() and len(found.weights) == 96
    assert "memory" in caplog.text


def test_regressions_are_solved_as_on_the_cpu():
    masks = sampling.Masks(300, 0.1, 200, 0, sampling.MASKS).rows(0, 200)
    values = (~masks).float() @ torch.randn(300, 4) + 0.1 * torch.randn(200, 4)
    for solver in (coar.Ridge(), coar.ARD(), coar.Lasso()):
        here, there = solver.fit(masks, values), solve(solver, masks, values)
        assert torch.allclose(here[0], there[0], atol=1e-3 * float(here[0].abs().max())), solver
        assert there[0].device.type == "cpu"


def test_edits_and_live_rounds_stay_where_the_model_is():
    model, data = coar.load(demo.MODEL, demo.IMAGES, split="train[:600]", batch_size=100)
    model = model.cuda()
    first = next(iter(data))
    few = {name: one[:2] for name, one in first.items()}
    *_, last = live.rounds(model, few, coar.find_components(model), max_rounds=2)
    assert last.rounds == 2 and last.weights.device.type == "cpu"
    edited = coar.forget(model, data, label=3, rivals=None)
    assert next(edited.model.parameters()).device.type == "cuda"
    assert edited.figures.to_json()["target"]["after"] < 0.5


def test_sets_and_what_is_forecast_of_them_are_those_of_the_cpu():
    weights, errors = torch.randn(7, 3000).round(decimals=1), torch.rand(7, 3000)  # of which many are equal
    sets = checking.Sets(3, 0.05)
    for number in range(20):
        here = sets.kept(weights, range(7), number)
        assert torch.equal(sets.kept(weights.cuda(), range(7), number).cpu(), here), number
    far = Far(torch.arange(40), torch.randn(7, 40), 0.5, 0.9)
    forecast = Forecast(torch.randn(7), torch.tensor([3, 30]), torch.randn(7, 2), 0.8, far=far)
    trusting = checking._trusting(forecast)
    examples = [(row, row + 1) for row in range(7)]
    estimates = Estimates(weights, errors)
    with torch.autocast("cuda", torch.float16):  # the caller's, for the model
        found = checking._forecasts_on(torch.device("cuda"), sets, estimates, trusting, examples, 20)
    expected = checking._forecasts_on(torch.device("cpu"), sets, estimates, trusting, examples, 20)
    numbers = ("drops", "shares", "norms", "falls", "rises")
    pairs = [
        (getattr(a, name), getattr(b, name)) for a, b in zip(found.said, expected.said, strict=True) for name in numbers
    ]
    for one, other in [*pairs, (found.times, expected.times)]:
        assert one.device.type == "cpu" and torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    strong = found.said[0].strong != expected.said[0].strong
    assert torch.equal(found.told, expected.told) and float(strong.float().mean()) < 0.01


def test_sets_that_do_not_fit_beside_the_model_are_forecast_on_the_cpu(monkeypatch):
    weights = torch.randn(4, 500)
    examples, forecast = (
        [(row, row) for row in range(4)],
        Forecast(torch.zeros(4), torch.zeros(0, dtype=torch.long), torch.zeros(4, 0)),
    )
    of = checking.Sets(0, 0.05), Estimates(weights), [forecast], examples, 20
    expected, tried = checking._forecasts_on(torch.device("cpu"), *of), []
    blocks = checking.Sets.blocks

    def full(self, *args):
        tried.append(args[-1].type)
        if args[-1].type == "cuda":
            torch.empty(2**50, device="cuda")
        return blocks(self, *args)

    monkeypatch.setattr(checking.Sets, "blocks", full)
    found = checking._forecasts(*of)
    assert tried == ["cuda", "cpu"] and torch.equal(found.said[0].drops, expected.said[0].drops)


def test_reads_are_shrunk_as_on_the_cpu():
    soft, variance = torch.randn(100, 900), torch.rand(100, 900)
    reads = {"soft": soft, "hard": soft + 0.3 * torch.randn(100, 900), "variance": variance}
    weights, errors = coar.PathGradient().estimate(reads, [500, 400])
    expected = shrink(reads["soft"], reads["hard"], variance, [500, 400])
    assert weights.device.type == "cpu" and torch.allclose(weights, expected[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(errors, expected[1], rtol=1e-5, atol=1e-6)


@CASES
def test_masks_of_examples_own_are_those_of_the_cpu_and_are_launched_as_one(case, caplog):
    model, (batch, *_), output = on("cpu", case)
    masked, output = MaskedModel(model, coar.find_components(model)), outputs.get(output)
    count = len(next(iter(batch.values())))
    kept = torch.rand(20, count, len(masked)) > 0.1
    with torch.no_grad():
        expected = []
        for rows in kept:
            with masked.ablated(rows, how="hooks"):
                expected.append(output.of(model, batch))
    model.cuda()
    there, passes = sent([batch])[0], OwnMaskedPasses(masked, output)
    passes.begin_batch(20)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found = [passes(there, rows.cuda()) for rows in kept]
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert passes._passes.replays, caplog.text


def test_recording_takes_only_what_is_worth_it(monkeypatch):
    model, batches, output = on("cuda", vit)
    _, passes = masked_passes(model, batches, output, compile="auto", n_masks=captured.MASKED.least - 1)
    assert not passes._passes._shapes
