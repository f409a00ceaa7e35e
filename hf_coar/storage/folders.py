"""Folders of ours: known by a marker file, and nobody else's is written into.

A folder that does not exist or is empty becomes ours by the marker; one with other things in it is refused. The marker
also tells by a signature whether its record (a configuration or the record of an edit) was written on this machine by
this user, which nothing that comes from elsewhere can claim.
"""

import hashlib
import hmac
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.storage import files, swapping
from hf_coar.storage.texts import and_more

MARKER = ".hf_coar.json"
ATTRIBUTIONS, MODEL, EXPLORER, DEMO = "attributions", "model", "explorer", "demo"

_FORMAT = 1
_CARD = "README.md"  # a person may write it anew; so it is replaced, and never removed
_RECORDS = ("coar_edit.json", "config.json")  # what the signature vouches for; the first of them that is there
_WHAT = {ATTRIBUTIONS: "a run or attributions", MODEL: "a model", EXPLORER: "an explorer", DEMO: "a demo"}
_LARGEST = 2**20  # bytes of a marker or of a file that an older version is known by; a list of files is far smaller
_ROOM = 2**20  # bytes, of which what is written before any result takes a hundredth
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found", ".gitkeep"}  # left by systems, and never written here


def claim(folder: str | Path, kind: str, overwrite: bool = False) -> Path:
    """Make a folder ours, or find that it is.

    Args:
        folder: made if it does not exist.
        kind: what it is to hold: `ATTRIBUTIONS` (runs, attributions, their evaluation and pages share a folder),
            `MODEL`, `EXPLORER` or `DEMO`.
        overwrite: take one that holds other things as well. Writers then replace files of the same names, and no other.

    Returns:
        The folder.

    Raises:
        CoarError: it holds other people's things, or ours of another kind; or it cannot be written.
    """
    folder = Path(folder)
    check(folder, kind, overwrite)
    if _read(folder / MARKER).get("kind") != kind:
        # Of several processes that begin at once, the first one writes. No signature: what lies there may be anyone's.
        files.write_json(folder / MARKER, _marker(kind, (), None), replace=overwrite)
        check(folder, kind)
    swapping.settle(folder)
    return folder


def check(folder: str | Path, kind: str, overwrite: bool = False) -> None:
    """Raises `CoarError` if `claim` would, and writes nothing."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CoarError(f"{folder} is a file; give a folder")
    try:
        found, names = kind_of(folder), _strangers(folder)
        if names and not found:
            found = kind_of(folder)  # another process of ours may have begun meanwhile: its marker comes first
    except OSError as error:
        raise CoarError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    if not found:
        _check_writable(folder)
    if overwrite or found == kind or not (found or names):
        return
    holds = f"holds {_WHAT[found]}" if found else f"holds other things, and no {MARKER} that says that they are ours"
    raise CoarError(
        f"{folder} {holds}: {_listed(names)}. {_WHAT[kind].capitalize()} would be written there: give a new or empty "
        "folder, or overwrite=True (--overwrite), which replaces files of the same names"
    )


def _check_writable(folder: Path) -> None:
    """Raises `CoarError` where nothing can be written: after minutes of work it is too late to hear of it.

    A full disk would also be told of a file that a person does not know, with our marker left in the folder.
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise CoarError(f"cannot write {folder}: {place} is read-only, or belongs to others; choose another folder")
    total, _, free = shutil.disk_usage(place)
    if total and free < _ROOM:  # some file systems over a network say 0 of 0
        raise CoarError(
            f"cannot write {folder}: the disk of {place} is full, {free:,} bytes are free; free some space or choose "
            "another folder"
        )


def kind_of(folder: str | Path) -> str | None:
    """What a folder of ours holds, by its marker or as older versions wrote it; None if it is not ours."""
    folder = Path(folder)
    kind = _read(folder / MARKER).get("kind")
    return kind if isinstance(kind, str) and kind in _WHAT else _kind_without_marker(folder)


@contextmanager
def replaced(
    folder: str | Path, kind: str, overwrite: bool = False, vouched: bool = False, removed: Collection[str] = ()
) -> Iterator[Path]:
    """An empty folder for new files, which take the places of those of the last save in one step when the block ends.

    What else lies in the folder stays: a person's files, a run's shards, pictures.

    Args:
        folder: as for `claim`.
        kind: as for `claim`.
        overwrite: as for `claim`.
        vouched: as for `mark`.
        removed: names of further files that go.

    Raises:
        CoarError: it is not ours, or cannot be written; then everything in it is as it was.
    """
    folder = claim(folder, kind, overwrite)
    with swapping.staged(folder) as staging:
        yield staging
        names = {path.name for path in staging.iterdir() if path.is_file()}
        mark(staging, kind, names - {_CARD}, vouched)
        swapping.publish(staging, folder, (made(folder) | set(removed)) - names)


def mark(folder: Path, kind: str, made: Collection[str], vouched: bool) -> None:
    """Write the marker of a folder of ours.

    Args:
        folder: with everything in it that was made.
        kind: as for `claim`.
        made: names of the files that a later save replaces or removes.
        vouched: what the configuration in it says comes from this user, and not from a file that was loaded.
    """
    files.write_json(folder / MARKER, _marker(kind, made, _record(folder) if vouched else None))


def made(folder: Path) -> frozenset[str]:
    """Names of the files that the last save made in a folder; plain ones, so that none leads out of it."""
    names = _read(folder / MARKER).get("made")
    names = names if isinstance(names, list) else []
    plain = (name for name in names if isinstance(name, str) and name == Path(name).name)
    return frozenset(plain) - {MARKER, _CARD}


def made_here(folder: str | Path) -> bool:
    """Whether the configuration (or the record of an edit) in a folder was written by this user on this machine.

    It holds for copies, too, and no longer once the file was changed by anything else. What was downloaded or unpacked
    cannot claim it, as the signature takes a random key that never leaves the user's cache folder.
    """
    marker, digest = _read(Path(folder) / MARKER), _record(Path(folder))
    signature, key = marker.get("signature"), _key()
    if key is None or digest is None or marker.get("record") != digest or not isinstance(signature, str):
        return False
    return hmac.compare_digest(signature.encode(), _signature(key, marker).encode())


def _marker(kind: str, made: Collection[str], record: str | None) -> dict[str, Any]:
    marker = {"hf_coar": _FORMAT, "kind": kind, "made": sorted(made), "record": record}
    key = _key() if record is not None else None
    return marker if key is None else {**marker, "signature": _signature(key, marker)}


def _signature(key: bytes, marker: dict[str, Any]) -> str:
    unsigned = {name: value for name, value in marker.items() if name != "signature"}
    return hmac.new(key, json.dumps(unsigned, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _record(folder: Path) -> str | None:
    """SHA-256 of the file that the signature vouches for."""
    for name in _RECORDS:
        if (folder / name).is_file():  # no pipe
            try:
                with (folder / name).open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except OSError:
                continue
    return None


def _read(path: Path) -> dict[str, Any]:
    """A small JSON mapping; empty if the file is anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            return {}
        found = files.read_json(path)
    except (OSError, CoarError):
        return {}
    return found if isinstance(found, dict) else {}


def _strangers(folder: Path) -> list[str]:
    """What lies in a folder, but for what writers of ours and systems leave there; in order."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    ours = f".{MARKER}."  # a marker that another process is about to put in place
    return sorted(name for name in names if name not in _LITTER and name != MARKER and not name.startswith(ours))


def _listed(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + and_more(len(names), shown) if names else "nothing else"


def _kind_without_marker(folder: Path) -> str | None:
    """What an older version left, which wrote no markers, so that its runs resume."""
    if "hf_coar_format" in _large(folder / "config.json") or _is_run(folder):
        return ATTRIBUTIONS
    if any(_is_run(path.parent) for path in folder.glob("fraction-*/run.json")):
        return ATTRIBUTIONS  # of an evaluation
    edit = _large(folder / "coar_edit.json")
    if isinstance(edit.get("base"), dict) and isinstance(edit.get("components"), list):
        return MODEL
    if "reloaded_without_hf_coar" in _read(folder / "figures.json"):
        return DEMO
    return EXPLORER if _begins(folder / "app.py", b'"""An hf_coar explorer.') else None


def holds_run(folder: str | Path | None) -> bool:
    """Whether a run was begun in a folder or one inside of it, which the same command goes on with."""
    return folder is not None and any(_is_run(path.parent) for path in Path(folder).rglob("run.json"))


def _is_run(folder: Path) -> bool:
    return _large(folder / "run.json").get("task") in ("attribute", "evaluate", "timing")


def _large(path: Path) -> dict[str, Any]:
    """A JSON mapping of any size (a run lists its components): read only if it can be a file of ours."""
    if not _begins(path, b"{"):
        return {}
    try:
        found = files.read_json(path)
    except CoarError:
        return {}
    return found if isinstance(found, dict) else {}


def _begins(path: Path, with_bytes: bytes) -> bool:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(len(with_bytes)) == with_bytes
    except OSError:
        return False


def _key_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser() / "hf_coar" / "key"


def _key() -> bytes | None:
    """The user's random key, made when it is first needed; None where it cannot be kept from others."""
    try:
        path = _key_path()
        return _private(path) or _new_key(path)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None


def _private(path: Path) -> bytes | None:
    """The content of a key file that nobody but this user can read or write."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        own = not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o077)
        key = file.read(33) if stat.S_ISREG(status.st_mode) else b""
    if not own or len(key) != 32:
        raise PermissionError(f"{path} is not a private key of this user")
    return key


def _new_key(path: Path) -> bytes | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        files.rename(temporary, path, replace=False)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return _private(path)
