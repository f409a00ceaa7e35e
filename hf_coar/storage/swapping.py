"""Many files replaced as one: a reader sees all of the old ones or all of the new ones, whoever dies in between.

The new files are made in a folder of their own and synced. Where the system can exchange two folders in one step
(Linux), that is done, so that readers of any library see one or the other. Where it cannot, or where the folder must
stay the same one (a run at work has files open in it, or somebody stands in it), the new ones go into `NEXT` inside the
folder by one rename, from which on they count (`current`), and then move to their places one by one.
"""

import ctypes
import errno
import functools
import json
import os
import secrets
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from hf_coar.errors import CoarError
from hf_coar.storage import files

NEXT = ".hf_coar.next"

_REMOVED = ".removed.json"  # in NEXT: names of old files that go
_STAGING = ".hf_coar-new"
_KEPT_INSIDE = {"pictures", ".eval_results"}  # folders beside which an exchange takes place; other ones may be of a run
_STALE = 86400.0  # seconds after which a leftover of another machine is nobody's any more
_TRIES = 20

_Read = TypeVar("_Read")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new empty folder for what will be published into `folder`; it is gone afterwards, and so are those of the dead.

    Raises:
        CoarError: nothing can be written there.
    """
    _clean(folder)
    inside = not _exchangeable(folder)
    staging = (folder if inside else folder.resolve().parent) / _own_name(folder)
    try:
        staging.mkdir()
        yield staging
    except OSError as error:
        raise CoarError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another folder, then run the "
            "same command again: what was there is as it was"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, folder: Path, removed: Collection[str] = ()) -> None:
    """Put the files of `staging` into `folder` in one step, and take those named in `removed` away; others stay.

    Raises:
        OSError: it cannot be written; then everything is as it was.
    """
    _sync_all(staging)
    with locked(folder):
        settle(folder)
        if _holds(folder, staging) and not any((folder / name).exists() for name in removed):
            return
        if staging.parent == folder.resolve().parent and _exchangeable(folder) and _exchange(staging, folder, removed):
            return
        _move_in(staging, folder, removed)


def settle(folder: Path) -> None:
    """Finish what a writer that was killed had decided."""
    ready = folder / NEXT
    if not ready.is_dir():
        return
    for name in _names_to_remove(ready):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(_files_below(ready)):
        target = folder / path.relative_to(ready)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name != _REMOVED:
            with suppress(FileNotFoundError):  # another process moved it
                os.replace(path, target)
    _sync_all(folder, deep=False)
    shutil.rmtree(ready, ignore_errors=True)


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder is to be read."""
    path = folder / NEXT / name
    if path.is_file():
        return path
    removed = (folder / NEXT).is_dir() and name in _names_to_remove(folder / NEXT)
    return path if removed else folder / name


def read_whole(folder: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` gives, all of it before or all of it after a save by another process.

    Raises:
        CoarError: what `read` raises while nothing changes.
    """
    for _ in range(_TRIES):
        before = _state(folder)
        try:
            found = read()
        except (CoarError, OSError):
            if _state(folder) == before:
                raise
            continue
        if _state(folder) == before:
            return found
    raise CoarError(f"{folder} is being written again and again; read it when that is over")


def _state(folder: Path) -> list[object]:
    found: list[object] = []
    for name in ("", NEXT, ".hf_coar.json", "config.json", "coar_edit.json"):
        try:
            status = os.stat(folder / name)
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns if name != "" else 0))
        except OSError:
            found.append(None)
    return found


# ---------------------------------------------------------------------------------------------------- two ways to do it


def _move_in(staging: Path, folder: Path, removed: Collection[str]) -> None:
    files.write_json(staging / _REMOVED, sorted(removed))
    inner = folder / _own_name(folder)
    if staging.parent != folder:
        os.rename(staging, inner)
        staging = inner
    _sync_all(staging)
    os.rename(staging, folder / NEXT)
    files.sync_folder(folder)
    settle(folder)


def _exchange(staging: Path, folder: Path, removed: Collection[str]) -> bool:
    """Whether the two folders were exchanged; before, what stays is linked into the new one."""
    folder = folder.resolve()
    for path in _files_below(folder):
        name = path.relative_to(folder)
        target = staging / name
        if str(name) not in removed and not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
    os.chmod(staging, folder.stat().st_mode & 0o7777)
    _sync_all(staging, deep=False)
    if not _exchanged(staging, folder):
        return False
    for path in _files_below(staging):  # what somebody put into the old one meanwhile
        name = path.relative_to(staging)
        if str(name) not in removed and not os.path.lexists(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, folder / name)
    files.sync_folder(folder.parent)
    return True


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EXDEV, errno.EACCES):
            raise
        shutil.copy2(path, target, follow_symlinks=False)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The system call of Linux that exchanges two paths, which Python's library lacks."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None


def _exchanged(one: Path, other: Path) -> bool:
    call, here, exchange = _renameat2(), -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _exchangeable(folder: Path) -> bool:
    """Whether another folder may take the place of this one without anybody's harm."""
    folder = folder.resolve()
    try:
        status = folder.stat()
        inner = {entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)}
        inner |= {entry.name for entry in os.scandir(folder) if entry.is_symlink() and entry.is_dir()}
        here = Path.cwd().resolve()
    except OSError:
        return False
    return (
        _renameat2() is not None
        and inner <= _KEPT_INSIDE
        and not (folder / "run.json").exists()
        and not here.is_relative_to(folder)
        and not folder.is_mount()
        and status.st_uid == os.geteuid()
        and os.access(folder.parent, os.W_OK | os.X_OK)
    )


# --------------------------------------------------------------------------------------------------------- small things


def _files_below(folder: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(folder) for name in names]


def _holds(folder: Path, staging: Path) -> bool:
    """Whether all that is new lies there already, byte for byte."""
    for path in _files_below(staging):
        there = folder / path.relative_to(staging)
        try:
            if there.is_symlink() or there.stat().st_size != path.stat().st_size or not _same(there, path):
                return False
        except OSError:
            return False
    return True


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            left, right = a.read(2**20), b.read(2**20)
            if left != right:
                return False
            if not left:
                return True


def _names_to_remove(ready: Path) -> list[str]:
    try:
        names = json.loads((ready / _REMOVED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and _is_inside(name) and not (ready / name).exists()]


def _is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _sync_all(folder: Path, deep: bool = True) -> None:
    if os.name == "nt":
        return
    for root, _, names in os.walk(folder) if deep else [(folder, [], [])]:
        for path in [*(Path(root) / name for name in names), Path(root)]:
            files.sync_folder(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One writer of a path at a time, among processes of one machine; the system frees the lock of one that dies.

    It is on the folder that holds the path, which must be there; without locks in the file system nobody waits.
    """
    try:
        import fcntl

        handle = os.open(path.resolve().parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _prefix(folder: Path) -> str:
    return f"{_STAGING}-{zlib.crc32(os.fsencode(folder.resolve().name)):08x}-"


def _own_name(folder: Path) -> str:
    return f"{_prefix(folder)}{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(4)}"


def _clean(folder: Path) -> None:
    """Delete what writers that were killed left behind, here and beside."""
    for place in (folder, folder.resolve().parent):
        for path in place.glob(f"{_prefix(folder)}*"):
            if _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether its writer is dead: a process of this machine that is no more, or any of long ago."""
    host, pid, _ = path.name.rsplit("-", 2)
    if host.endswith(f"-{socket.gethostname()[:60]}") and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            pass
    try:
        return time.time() - path.stat().st_mtime > _STALE
    except OSError:
        return False
