"""Memory stays with the process while a run goes on, and is given back afterwards."""

import subprocess
import sys

import pytest

from hf_coar.runs import heap

FAULTS = """
import resource, torch
from hf_coar.runs import heap

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(12_000_000) + torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
faults(2)
plain, start = faults(8), held()
with heap.kept():
    with heap.kept():
        faults(2)
    inside, most = faults(8), held()
    assert most - start > 50e6, (start, most)
print(plain, inside, held() - start)
"""


@pytest.mark.skipif(heap._glibc() is None, reason="only of glibc, where its thresholds are not set from outside")
def test_pages_are_taken_once_a_run_and_given_back_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain, inside, held = map(int, done.stdout.split())
    assert inside < plain / 20, done.stdout
    assert held < 30e6, done.stdout


def test_whoever_set_the_thresholds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    heap._glibc.cache_clear()
    try:
        assert heap._glibc() is None
        with heap.kept():
            assert heap._inside == 0
    finally:
        heap._glibc.cache_clear()
