"""Ctrl-C while the command line is still imported, which takes seconds: one line, and no traceback of others' modules.

Only a handler can tell: what an import raises leaves every module half made, and the package itself is imported before
any code of the command line.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from types import FrameType

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


def end_quietly() -> None:
    """From now on Ctrl-C ends the process with one line, where it is a command and nothing else handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and is_command(sys.argv, sys.orig_argv):
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From now on Ctrl-C raises `KeyboardInterrupt`, as it usually does."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nhf-coar: interrupted; nothing was written\n")
    os._exit(INTERRUPTED)


end_quietly()  # by being imported, before all else
