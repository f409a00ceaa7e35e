"""Work side by side: in order, not far ahead, errors raised, hashes the same."""

import multiprocessing
import os
import threading

import pytest
import torch

from hf_coar.data import identity
from hf_coar.storage import threads
from hf_coar.storage.threads import side_by_side


@pytest.fixture
def threads_of_torch():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_done_side_by_side_comes_in_order_and_a_little_ahead(threads, threads_of_torch):
    threads_of_torch(threads)
    begun = []

    def do(item):
        begun.append(item)
        return item * item

    found = []
    for result in side_by_side(do, range(50)):
        found.append(result)
        assert len(begun) <= len(found) + 2 * threads
    assert found == [item * item for item in range(50)]


def test_what_goes_wrong_is_raised(threads_of_torch):
    threads_of_torch(2)
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 / item, [2, 1, 0]))


def test_what_is_done_side_by_side_may_do_more_so(threads_of_torch):
    """Threads that waited for others of the same few would wait for ever."""
    threads_of_torch(2)
    found = list(side_by_side(lambda item: sum(side_by_side(lambda one: one * item, range(5))), range(20)))
    assert found == [10 * item for item in range(20)]


def test_what_is_left_half_way_is_not_done(threads_of_torch):
    threads_of_torch(2)
    begun, may_end = [], threading.Event()

    def do(item):
        begun.append(item)
        return may_end.wait(10) if item else item

    several = side_by_side(do, range(50))
    assert next(several) == 0
    several.close()
    may_end.set()
    assert sum(side_by_side(lambda item: item, range(10))) == 45 and len(begun) <= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on Unix alone")
def test_forked_processes_have_threads_of_their_own(threads_of_torch):
    threads_of_torch(2)
    assert sum(side_by_side(lambda item: item, range(10))) == 45
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: os._exit(sum(side_by_side(lambda item: item, range(10)))))
    child.start()
    child.join(30)
    assert child.exitcode == 45


def test_hashes_of_many_bytes_are_those_of_examples_alone(threads_of_torch):
    batch = {"pixel_values": torch.randn(6, 3, 256, 256)}
    assert batch["pixel_values"].nbytes > threads.MUCH > batch["pixel_values"][0].nbytes
    threads_of_torch(2)
    together = identity.hashes(batch)["pixel_values"]
    for index, found in enumerate(together):
        assert torch.equal(
            identity.hashes({"pixel_values": batch["pixel_values"][index : index + 1]})["pixel_values"][0], found
        )
