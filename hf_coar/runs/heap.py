"""Memory that a pass frees stays with the process until the run ends: the next pass takes the same pages again.

glibc gives large blocks, and the free end of its heap, back to the system at once, and the system hands pages out one
by one, each filled with zeros. In a default run of the demo's network that was none or a sixth of the time, by how its
blocks happened to lie (20,000 to 640,000 pages; 11.5 to 15.2 s); with them kept it is none, at the same peak.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_KEPT = 2**30  # bytes, of blocks and of the heap's free end
# What glibc's thresholds grow to by themselves in a process that frees large blocks; once set they do not move.
_AFTERWARDS = {_MMAP: 32 * 2**20, _TRIM: 64 * 2**20}
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # whoever sets these knows better

_lock, _inside = threading.Lock(), 0


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is one whose thresholds can be set and nobody did."""
    if sys.platform != "linux" or any(name in os.environ for name in _OWN):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def kept() -> Iterator[None]:
    """Freed memory stays with the process inside the block, and goes back to the system at its end.

    Blocks of several threads, or one inside the other, end with the last of them. Without glibc nothing happens.
    """
    global _inside
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _inside += 1
        for threshold in _AFTERWARDS:
            library.mallopt(threshold, _KEPT)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for threshold, value in _AFTERWARDS.items():
                    library.mallopt(threshold, value)
                library.malloc_trim(0)
