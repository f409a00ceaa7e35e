"""Other processes: a copy of this one, which needs no imports, and a fresh one that knows nothing of hf_coar."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], int], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a copy of this process, in a folder, writes to its standard output and error (files), and how it ends."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.chdir(folder or ".")
            _become(work, out.fileno(), err.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([], code, out.read(), err.read())


def _become(work: Callable[[], int], out: int, err: int) -> None:
    status = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(work: Callable[[], object]) -> int:
    """A copy of this process that does some work, by its id; its status is the number that this gives, or 0."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        logging.disable(logging.CRITICAL)
        found = work()
        status = found if isinstance(found, int) else 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_step(owner: object, name: str, call: int, after: bool) -> None:
    """This process kills itself at the given call of a function, before or after it did its work."""
    original, count = getattr(owner, name), 0

    def replacement(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        result = original(*args, **kwargs) if after or count != call else None
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, replacement)  # in a copy that will never need the original again


_LOOP = """
import json, os, sys, traceback
sys.modules["hf_coar"] = None  # from here on `import hf_coar` fails
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    code, arguments = json.loads(line)
    sys.argv, said = ["-c", *arguments], ""
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        said = traceback.format_exc()
    if any(name.startswith("hf_coar.") for name in sys.modules):
        said += "hf_coar was imported"
    print(json.dumps(said), file=answers, flush=True)
"""


class Plain:
    """A fresh process that runs code one after the other; it pays once for imports, and hf_coar is never among them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: object) -> None:
        """Run code in a namespace of its own, with `sys.argv[1:]` as given; raises with the traceback if it fails."""
        print(json.dumps([code, [str(argument) for argument in arguments]]), file=self._process.stdin, flush=True)
        said = self._process.stdout.readline()
        failed = json.loads(said) if said else "the process died"
        if failed:
            raise AssertionError(failed)

    def close(self) -> None:
        """End it."""
        self._process.communicate()
