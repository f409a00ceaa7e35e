"""Masked passes that are launched as one on a CUDA device, here with a stand-in for it; on a real one, test_gpu."""

import logging

import pytest
import torch
from conftest import build_net

import hf_coar as coar
from hf_coar.errors import CoarError
from hf_coar.masking import MaskedModel
from hf_coar.models import calling, launched, outputs
from hf_coar.runs import captured, measuring
from hf_coar.runs.engine import Part, autocast
from hf_coar.runs.sampling import Masks

N_MASKS = 20


class Recording:
    """Does what it was given, and counts; `off` is added to what comes out."""

    made: list["Recording"] = []
    off = 0.0

    def __init__(self, operations, inputs, weights):
        self.operations, self.replays = operations, 0
        self.made.append(self)

    def __call__(self, *inputs):
        self.replays += 1
        with calling.unheard():
            return tuple(one + self.off for one in self.operations(*inputs))


@pytest.fixture
def recordings(monkeypatch):
    """Those that were made; every batch can be recorded."""
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setattr(launched, "Recording", Recording)
    monkeypatch.setattr(launched, "are_launched", lambda inputs: True)
    return Recording.made


def measured(n_masks, n_batches=2):
    torch.manual_seed(0)
    net = build_net("convnet")
    net.model.requires_grad_(False)
    masked = MaskedModel(net.model, coar.find_components(net.model))
    passes = measuring.MaskedPasses(masked, outputs.get("margin"), Masks(len(masked), 0.2, n_masks, 0, 0))
    part, heard = Part("masks", 0, n_masks, float(n_masks), n_masks), []
    with calling.heard(lambda: heard.append(1)):
        found = [passes.compute(net.batch, 0, part)["outputs"] for _ in range(n_batches)]
    return torch.stack(found), len(heard)


def test_a_recording_is_made_once_and_checked_for_every_batch(recordings):
    found, heard = measured(N_MASKS)
    (recording,) = recordings
    # Of the 20 passes of a batch three (or one, once there is a recording) are the model's own, the last of them both.
    assert recording.replays == (N_MASKS - 2) + N_MASKS and heard == 2 * N_MASKS
    assert torch.equal(found[0], found[1]) and found.std(2).min() > 0


def test_what_gives_other_values_is_not_used(recordings, monkeypatch, caplog):
    expected, _ = measured(captured.MASKED.least - 1)
    assert not recordings, "not worth it"
    monkeypatch.setattr(Recording, "off", 0.5)
    with caplog.at_level(logging.INFO, "hf_coar"):
        found, _ = measured(N_MASKS)
    assert len(recordings) == 1 and recordings[0].replays == 1
    assert torch.equal(found[:, :, : captured.MASKED.least - 1], expected)
    assert "masked passes of ConvNet run as its own code: DifferentError: the graph's values differ" in caplog.text


def test_what_knows_one_mask_alone_is_not_used(recordings, monkeypatch):
    class OfOneMask(Recording):
        def __init__(self, operations, inputs, weights):
            super().__init__(operations, inputs, weights)
            found = operations(*inputs)
            self.operations = lambda *_: found

    expected, _ = measured(captured.MASKED.least - 1)
    monkeypatch.setattr(launched, "Recording", OfOneMask)
    found, _ = measured(N_MASKS)
    assert len(recordings) == 1 and torch.equal(found[:, :, : captured.MASKED.least - 1], expected)


def test_equal_means_to_rounding_and_never_nan():
    one = torch.tensor([1.0, -2.0])
    launched.check_equal([one], [one + 1e-4], 1e-3)
    for other in (one + 0.1, torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match="differ by"):
            launched.check_equal([one], [other], 1e-3)


def test_nothing_is_recorded_over_several_devices():
    here, there = torch.ones(2), torch.ones(2, device="meta")
    for inputs in ([here], [here, there]):
        with pytest.raises(ValueError, match="its tensors are on cpu"):
            launched.Recording(max, inputs, [])
    assert launched.recorded(max, [here], []) is max, "then operations go one by one"


def test_tf32_holds_inside_a_run_alone():
    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    with pytest.raises(KeyError), autocast(torch.device("cpu"), "tf32"):
        assert place.fp32_precision == "tf32"
        raise KeyError
    assert place.fp32_precision == before
    with pytest.raises(CoarError, match="there are bfloat16, float16, tf32"), coar.running(dtype="tf16"):
        pass


def test_compiled_passes_are_captured_fused_and_recorded(monkeypatch, uncompiled):
    made = []
    monkeypatch.setattr(launched, "are_launched", lambda inputs: True)
    monkeypatch.setattr(
        launched,
        "recorded",
        lambda operations, inputs, weights: made.append(Recording(operations, inputs, weights)) or made[-1],
    )
    expected, _ = measured(captured.MASKED.least - 1)
    with coar.running(compile=True):
        found, heard = measured(N_MASKS)
    (recording,) = made
    assert uncompiled and recording.replays == (N_MASKS - 2) + N_MASKS and heard == 2 * N_MASKS
    torch.testing.assert_close(found[:, :, : captured.MASKED.least - 1], expected)
