"""Ctrl-C where it would do harm: while the command line is imported, while tensors are read, when all is done.

An import takes seconds, and what it raises leaves every module half made: only a handler can end it with one line and
no traceback of others' modules, and the package itself is imported before any code of the command line.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the exit code of Ctrl-C


def is_command(argv: list[str], whole: list[str]) -> bool:
    """Whether this process was started as `hf-coar …` or `python -m hf_coar …`.

    Args:
        argv: as of `sys`, while the package is imported.
        whole: all words with which Python was started.
    """
    if argv[:1] == ["-m"]:  # stands there until the module is found
        return any(pair == ("-m", "hf_coar") for pair in itertools.pairwise(whole))
    return bool(argv) and Path(argv[0]).stem.removesuffix("-script") == "hf-coar"


_command = is_command(sys.argv, sys.orig_argv)  # as it is while the package is imported


def end_quietly() -> None:
    """From now on Ctrl-C ends the process with one line, where it is a command and nothing else handles it."""
    _hand_over(signal.default_int_handler, _end)


def raise_again() -> None:
    """From now on Ctrl-C raises `KeyboardInterrupt`, as it usually does."""
    _hand_over(_end, signal.default_int_handler)


def ignore() -> None:
    """From now on Ctrl-C does nothing: the command is done, and only the interpreter has to end."""
    _hand_over(signal.default_int_handler, signal.SIG_IGN)


def _hand_over(before: Any, after: Any) -> None:
    """Another handler of Ctrl-C in the place of one, where this process is a command and nothing else handles it."""
    if _command and signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside the block Ctrl-C waits for its end.

    Where compiled code asks Python for something, an exception that comes from outside gets lost, or is taken for what
    was asked: one in 400 runs that were interrupted said that a sound file cannot be read.
    """
    handler, came = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda *of: came.append(of))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nhf-coar: interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


end_quietly()  # by being imported, before all else
