"""Results on their way to the disk: by a thread behind the passes, where these are an accelerator's."""

import threading

import pytest
import torch

import hf_coar as coar
from hf_coar.errors import CoarError
from hf_coar.runs import engine
from hf_coar.runs.outbox import Outbox
from hf_coar.runs.store import Store
from hf_coar.storage import files

LONG = 9.0  # seconds, after which a unit is written at once


def results(start, stop):
    columns = {"hash:inputs": torch.arange(start, stop)[:, None].expand(-1, 16).to(torch.uint8)}
    return {"values": torch.arange(start, stop).float(), "labels": torch.arange(start, stop), **columns}


def test_the_next_unit_runs_while_a_thread_writes(tmp_path, monkeypatch):
    store, may_write, write = Store(tmp_path, {}), threading.Event(), files.write_tensors

    def patient(*args):
        assert may_write.wait(10)
        write(*args)

    monkeypatch.setattr(files, "write_tensors", patient)
    outbox = Outbox(store, behind=True)
    outbox.add("masks-000000", 0, results(0, 4), LONG)
    assert store.missing("masks-000000", 0, 4)  # it is done when it is on the disk
    may_write.set()
    outbox.add("masks-000000", 4, results(4, 8), LONG)
    outbox.flush()
    assert not store.missing("masks-000000", 0, 8)
    assert torch.equal(store.gather("masks-000000", 8)["values"], torch.arange(8.0))


@pytest.mark.parametrize("behind", [False, True])
def test_what_went_wrong_is_raised_and_the_others_are_written(behind, tmp_path, monkeypatch):
    store, write, names = Store(tmp_path, {}), files.write_tensors, []

    def first_fails(path, *args):
        names.append(path.name)
        if len(names) == 1:
            raise CoarError("the disk is full")
        write(path, *args)

    monkeypatch.setattr(files, "write_tensors", first_fails)
    outbox = Outbox(store, behind)
    with pytest.raises(CoarError, match="disk is full"):
        for start in (0, 4):
            outbox.add("masks-000000", start, results(start, start + 4), LONG)
    outbox.flush()
    assert store.missing("masks-000000", 0, 8) == ([(0, 4)] if behind else [(0, 8)])


def test_runs_that_write_behind_find_the_same(tmp_path, monkeypatch, mlp):
    data, found = [mlp.batch, {name: value.flip(0) for name, value in mlp.batch.items()}], []
    for behind in (False, True):
        monkeypatch.setattr(engine, "Outbox", lambda store, behind, how=behind: Outbox(store, how))
        found.append(coar.attribute(mlp.model, data, out=tmp_path / str(behind), progress=False))
    for name in ("weights", "bias"):
        assert torch.equal(*(getattr(one, name) for one in found))
