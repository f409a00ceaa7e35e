"""Files that are either whole or absent: atomic writes, checked reads, JSON and safetensors with a checksum."""

import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_coar.errors import CoarError, CorruptFileError
from hf_coar.storage import interrupts

_CHECKSUM, _ABOUT = "sha256", "hf_coar"  # entries in the headers of files of tensors


def write_bytes(path: Path, content: bytes | Callable[[str], None], replace: bool = True) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, whatever dies in between.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Args:
        path: the file.
        content: all of it, or a function that writes it to the temporary file whose path it is given.
        replace: what stands there already; if not, the first of several writers wins and the others leave it alone.

    Raises:
        CoarError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(path)
    except OSError as error:
        raise CoarError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                mode = os.fstat(file.fileno()).st_mode & 0o777
                content(temporary)
            else:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if callable(content):
            settle(temporary, mode)
        rename(temporary, path, replace)
        sync_folder(path.parent)
    except OSError as error:
        raise CoarError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder, "
            "then run the same command again: what is finished is kept"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, with the permissions that the umask gives (`tempfile` makes private ones)."""
    while True:
        name = str(path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), name
        except FileExistsError:
            continue


def mode_in(folder: Path) -> int:
    """The permissions that a new file in a folder gets, by the umask and the folder's own rules."""
    handle, name = _temporary(Path(folder) / "mode")
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        Path(name).unlink()


def settle(path: str | Path, mode: int) -> None:
    """Give a file that a library wrote permissions, and sync it.

    By path: safetensors puts a file of its own in the place of the one that it was given, readable by its owner alone.
    """
    os.chmod(path, mode)
    with open(path, "rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def rename(temporary: str, path: Path, replace: bool) -> None:
    """Put a finished file in its place; without `replace`, only if there is none."""
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # fails if there is a file, which a rename would not
    except FileExistsError:
        pass
    except OSError:  # a file system without links: nearly as good
        if not path.exists():
            os.replace(temporary, path)


def remove_stale_temporaries(folder: Path, age: float = 86400.0) -> None:
    """Delete what writers that were killed more than `age` seconds ago left behind; younger ones may be at work."""
    # Ours, and those in which safetensors makes a file before it renames it.
    for path in (*Path(folder).glob(".*.tmp"), *Path(folder).glob(".tmp*")):
        try:
            if time.time() - path.stat().st_mtime > age:
                path.unlink()
        except OSError:  # gone meanwhile, or not ours to delete: it does no harm
            continue


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    if os.name == "nt":  # folders cannot be opened there, and renames are journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, replace: bool = True) -> None:
    """Write `value` as indented UTF-8 JSON, atomically; see `write_bytes` for `replace`."""
    content = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, content.encode(), replace)


def is_json(value: Any) -> bool:
    """Whether a value can be written by `write_json`: no NaN, no half of a surrogate pair, nothing unknown to JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


LARGEST_JSON = 256 * 2**20  # bytes; a list of a million components takes a tenth of it


def read_json(path: Path) -> Any:
    """Read JSON of a sane size.

    Raises:
        CorruptFileError: the file is missing, no plain file, too large, or not JSON.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_JSON:  # a pipe would never end
            raise CorruptFileError(f"{path} is no file of JSON: it is no plain file, or takes {status.st_size:,} bytes")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a character could not be written again
        return found
    except CorruptFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, 5,000 digits, nested deeply
        raise CorruptFileError(f"cannot read {path} as JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically, with a checksum of names, dtypes, shapes and bytes in the header.

    Args:
        path: the file.
        tensors: what it holds.
        about: words for the header, which the checksum covers too.
    """
    from safetensors.torch import save

    about = dict(about or {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    # One entry: safetensors writes several in any order, and the same results are to be the same bytes.
    words = json.dumps({**about, _CHECKSUM: checksum(tensors, about)}, sort_keys=True)
    write_bytes(path, save(tensors, metadata={_ABOUT: words}))


def read_tensors(path: Path, verify: bool = True) -> dict[str, torch.Tensor]:
    """Read a file made by `write_tensors`; the tensors are mapped from the file, not copied.

    Args:
        path: the file.
        verify: compare the checksum, which reads the whole file.

    Raises:
        CorruptFileError: missing, truncated, altered, or written by something else.
    """
    return read_tensors_about(path, verify)[0]


def read_tensors_about(path: Path, verify: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`read_tensors`, and the words in the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with interrupts.held_back(), safe_open(str(path), framework="pt") as file:
            about = _words(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error
    expected = about.pop(_CHECKSUM, None)
    if verify and checksum(tensors, about) != expected:
        raise CorruptFileError(f"{path} is damaged: its checksum does not match its content")
    return tensors, about


def _words(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `write_tensors` wrote beside the tensors; older versions wrote the checksum alone, under its own name."""
    found = json.loads(metadata[_ABOUT]) if _ABOUT in metadata else dict(metadata)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("its header holds other things")
    return found


def checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names, and over words about them."""
    digest = hashlib.sha256()
    for name, text in sorted((about or {}).items()):
        digest.update(f"{name}={text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, in row-major order, on the CPU."""
    return memoryview(as_bytes(tensor).numpy())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bytes of a tensor, in row-major order, on the CPU, uint8 [bytes]."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single number, cut out of a matrix, counts as contiguous whatever the step to a next one that is not there.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
