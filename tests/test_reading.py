"""Reading: what is decoded once is not decoded again, threads read the same, and what changes is noticed."""

import gc
import threading

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar import data
from hf_coar.errors import DataError

METHOD = coar.PathGradient(rounds=2, check_masks=5)
N, BATCH = 24, 4
ROWS = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3


class Decoded:
    """A data set that notes which of its rows were decoded, and whether by the main thread."""

    def __init__(self, other=lambda index, times: 0.0):
        self.reads, self.other = [], other

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.reads.append((index, threading.current_thread() is threading.main_thread()))
        return {"x": ROWS[index] + self.other(index, self.times(index)), "labels": LABELS[index]}

    def times(self, index):
        return sum(index == one for one, _ in self.reads)


def prepared(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def examples(dataset):
    return data.Examples(dataset, prepared, BATCH, {})


def attributed(given, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with coar.running(progress=False, **options):
        return coar.attribute(net, given, method=METHOD, ablated_fraction=0.2)


def in_memory():
    return [{"x": ROWS[i : i + BATCH].clone(), "labels": LABELS[i : i + BATCH].clone()} for i in range(0, N, BATCH)]


@pytest.mark.parametrize("num_workers", [None, 0, 1, 3])
def test_what_is_read_ahead_is_the_same_and_is_decoded_once(num_workers):
    dataset, expected = Decoded(), attributed(in_memory())
    attributed(examples(Decoded()))  # what is looked at before the first pass is not counted below
    given = examples(dataset)
    found = attributed(given, num_workers=num_workers)
    assert torch.equal(found.weights[:], expected.weights[:]) and torch.equal(found.bias, expected.bias)
    late = range(2 * BATCH, N)  # no first look goes as far
    assert {dataset.times(index) for index in late} == {1} and min(map(dataset.times, range(BATCH))) > 2
    by_main = {main for index, main in dataset.reads if index in late}
    assert by_main == {not num_workers}


def test_little_is_kept_of_much():
    reader = data.Reader(most_bytes=3 * BATCH * (6 * 4 + 8))
    for chunk in data.Chunks(examples(Decoded())):
        reader.read(chunk)
    assert len(reader._kept) == 3 and reader._left == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_differ_from_reading_to_reading_are_noticed(num_workers):
    """Examples that are drawn anew whenever they are read would get weights of some, and single effects of others."""
    with pytest.raises(DataError, match="example"):
        attributed(examples(Decoded(lambda index, times: 0.1 * times)), num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_told_by_whichever_thread_finds_it(num_workers, caplog):
    def broken(index, times):
        if index == 17:
            raise OSError("truncated")
        return 0.0

    found = attributed(examples(Decoded(broken)), num_workers=num_workers)
    assert len(found) == N - 1 and "example 17 cannot be read" in caplog.text
    with pytest.raises(DataError, match="example 17 cannot be read"):
        attributed(examples(Decoded(broken)), num_workers=num_workers, strict=True)


def test_batches_in_memory_are_hashed_again_only_when_written_to(monkeypatch):
    hashed, of_batch = [], data.Identity.of_batch.__func__
    monkeypatch.setattr(
        data.Identity, "of_batch", classmethod(lambda cls, batch: hashed.append(1) or of_batch(cls, batch))
    )
    batches = in_memory()[:2]
    reader, chunks = data.Reader(), data.Chunks(batches)
    first, again = ([reader.read(chunk).pieces[0].identity for chunk in chunks] for _ in range(2))
    assert len(hashed) == 2 and all(one is other for one, other in zip(first, again, strict=True))
    batches[1]["x"][0] += 1
    changed = [reader.read(chunk).pieces[0].identity for chunk in chunks]
    assert len(hashed) == 3 and changed[0] is first[0]
    assert not torch.equal(changed[1].hashes["x"], first[1].hashes["x"])
    batches.clear()
    gc.collect()
    assert all(one() is None for seen in reader._known.values() for versions, _ in seen for one, _ in versions)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "two"])
def test_a_number_of_threads_that_is_none_is_told(wrong):
    with pytest.raises(coar.CoarError, match="num_workers"), coar.running(num_workers=wrong):
        pass
