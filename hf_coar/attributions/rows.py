"""Files of matrices with one row an example: safetensors, read row by row, with a checksum a row.

A file says in its header `sha256`: SHA-256 over the names, dtypes and shapes of all tensors and the bytes of the small
ones, among which are the checksums of the rows. So a file is known to be whole, or not, from a few bytes an example,
and a row that is read is checked without reading the others.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_coar.errors import CoarError, CorruptFileError, NonFiniteOutputError, OutOfRangeError
from hf_coar.storage import files, streaming
from hf_coar.storage.threads import MUCH, side_by_side

MATRICES = ("weights", "standard_errors")  # of estimates; all else of them is small

_ROOT, _SUFFIX, _DIGEST_SIZE = "sha256", "_row_checksums", 16
_AT_ONCE = 64  # rows
_STORED = {"F16": torch.float16, "F32": torch.float32}


class Rows:
    """A float matrix [examples, columns] in memory or in files; nothing is read before it is asked for."""

    def __init__(self, parts: Sequence[Tensor], checksums: Tensor | None = None, path: Path | None = None) -> None:
        """Parts that lie one below the other; uint8 [examples, 16] checksums if they come from files."""
        self._parts = list(parts)
        self._checksums = checksums
        self._path = path
        self._whole: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(examples, columns)."""
        return sum(len(part) for part in self._parts), self._parts[0].shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The pieces, one below the other, mapped from files and in their dtype; for reading single columns."""
        return tuple(self._parts)

    def tensor(self) -> Tensor:
        """All rows, float32. Mapped from the file where it holds them so; else read at the first call and kept."""
        if self._whole is None:
            self._whole = (self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)).float()
        return self._whole

    def mean(self, indices: Sequence[int], of: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over some rows, float64 [columns], of what a function makes of them, a few rows at a time.

        Args:
            indices: of the rows.
            of: float64 [rows, columns] -> the same shape, element by element.
        """
        total = torch.zeros(self.shape[1], dtype=torch.float64)
        for start in range(0, len(indices), _AT_ONCE):
            total += of(self.tensor()[list(indices[start : start + _AT_ONCE])].cpu().double()).sum(0)
        return total / len(indices)

    def row(self, index: int) -> Tensor:
        """One row, float32 [columns], checked; costs what the row holds.

        Raises:
            OutOfRangeError: there is no such row.
            CorruptFileError: the row is not what was written.
            NonFiniteOutputError: it holds NaN or infinity.
        """
        n_rows = self.shape[0]
        if not -n_rows <= index < n_rows:
            raise OutOfRangeError(f"example {index} of {n_rows}: give a number from 0 to {n_rows - 1}")
        index = position = index % n_rows
        for part in self._parts:
            if position < len(part):
                break
            position -= len(part)
        row = part[position].clone()
        if self._checksums is not None and _row_checksum(row) != bytes(self._checksums[index].numpy()):
            raise CorruptFileError(f"example {index} of {self._path} is damaged; download or save it again")
        check_finite(row[None], index)
        return row.float()

    def fingerprint(self) -> str:
        """Hash of all rows in their dtype, as 32 hexadecimal digits, however they are divided between files.

        Of rows in files it takes what was written for them, and reads none.
        """
        if self._checksums is None:
            return _hash_of(torch.cat([_row_checksums(part) for part in self._parts]))  # anew: tensors may change
        return _hash_of(self._checksums)

    def verify(self, components: Sequence[object] | None = None) -> None:
        """Check every row.

        Args:
            components: what the columns are, for the message.

        Raises:
            CorruptFileError: one is not what was written.
            NonFiniteOutputError: one holds NaN or infinity.
        """
        if self._checksums is None:  # in memory
            first = 0
            for part in self._parts:
                check_finite(part, first, components)
                first += len(part)
            return
        for index in range(self.shape[0]):
            self.row(index)

    @property
    def in_memory(self) -> bool:
        """Whether nothing of it has to be read."""
        return self._checksums is None


def check_finite(values: Tensor, first: int, components: Sequence[object] | None = None) -> None:
    """One gate for whatever becomes, or became, attributions.

    Args:
        values: float [examples, columns].
        first: number of the first example.
        components: what the columns are, for the message.

    Raises:
        NonFiniteOutputError: NaN or infinity; names the example and the component.
    """
    # A sum is finite only if all are; it overflows rarely, and is read without a copy.
    if values.dtype == torch.float32 and bool(values.sum(dtype=torch.float64).isfinite()):
        return
    for start in range(0, len(values), _AT_ONCE):
        bad = (~values[start : start + _AT_ONCE].isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            name = "" if components is None else f" ({components[column]})"
            raise NonFiniteOutputError(
                f"the attributions of example {first + start + row} to component {column}{name} are "
                f"{float(values[start + row, column])}; they cannot be used: leave that component out (exclude=…), or "
                "take a method that does not differentiate, such as hf_coar.Regression()"
            )


def as_rows(matrix: Tensor | Rows) -> Rows:
    """A tensor as rows, or rows as they are.

    Raises:
        CoarError: the tensor is no matrix.
    """
    if isinstance(matrix, Tensor) and matrix.dim() != 2:
        raise CoarError(f"weights or standard errors of shape {list(matrix.shape)}; expected [examples, components]")
    return matrix if isinstance(matrix, Rows) else Rows([matrix])


def save(path: Path, matrices: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> str:
    """Write matrices [examples, …] and the small tensors [examples] beside them, atomically.

    Returns:
        The checksum of the file, which `load` compares.

    Raises:
        CoarError: the folder cannot be written.
    """
    n_rows = len(next(iter(matrices.values())))
    starts = range(0, n_rows, _AT_ONCE)
    tensors = {**matrices, **columns}
    blocks = ({name: tensor[start : start + _AT_ONCE] for name, tensor in tensors.items()} for start in starts)
    return write(path, n_rows, blocks, tuple(matrices))


def write(path: Path, n_rows: int, blocks: Iterable[Mapping[str, Tensor]], names: Sequence[str]) -> str:
    """`save` of matrices and small tensors that come in blocks of some rows, of which one is in memory at a time.

    Args:
        path: the file.
        n_rows: of all blocks together.
        blocks: tensors by name.
        names: of those that are matrices, if they are there; all others are small.

    Returns:
        The checksum of the file.

    Raises:
        CoarError: the folder cannot be written, or there are more or fewer rows.
    """
    small: dict[str, list[Tensor]] = {}

    def with_checksums() -> Iterator[dict[str, Tensor]]:
        for block in blocks:
            found = {name: tensor.detach().cpu() for name, tensor in block.items()}
            found |= {name + _SUFFIX: _row_checksums(found[name]) for name in names if name in found}
            for name in found.keys() - set(names):
                small.setdefault(name, []).append(found[name])
            yield found

    def root(kinds: streaming.Kinds) -> dict[str, str]:
        return {_ROOT: _root(kinds, {name: torch.cat(parts) for name, parts in small.items()})}

    streaming.write(path, n_rows, with_checksums(), root)
    return recorded(path)


def recorded(path: Path) -> str:
    """The checksum that a file says it has.

    Raises:
        CorruptFileError: it is none that `save` wrote.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {})[_ROOT])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CorruptFileError(f"cannot read {path}: {str(error) or error!r}") from error


def load(
    paths: Sequence[Path], roots: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Rows], dict[str, Tensor]]:
    """Open files that hold the same tensors of one stretch of examples after another; no row is read.

    Args:
        paths: the files, in order.
        roots: what `save` returned for each.
        names: of the matrices that may be there.

    Returns:
        The matrices, and the small tensors.

    Raises:
        CorruptFileError: damaged, not written by `save`, or not of one set.
    """
    opened = [_open(path, root, names) for path, root in zip(paths, roots, strict=True)]
    first_matrices, first_columns = opened[0]
    for (matrices, columns), path in zip(opened, paths, strict=True):
        if _kinds(matrices) != _kinds(first_matrices) or columns.keys() != first_columns.keys():
            raise CorruptFileError(f"{path} holds other tensors than {paths[0]}; they are not of one set")
    columns = {name: torch.cat([part[name] for _, part in opened]) for name in first_columns}
    found = {
        name: Rows([part[name] for part, _ in opened], columns.pop(name + _SUFFIX), paths[0].parent)
        for name in first_matrices
    }
    return found, columns


def _kinds(matrices: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, int]]:
    return {name: (matrix.dtype, matrix.shape[1]) for name, matrix in matrices.items()}


def _open(path: Path, root: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise CorruptFileError(f"cannot read {path}: {str(error) or error!r}") from error
    matrices = {name: tensors.pop(name) for name in names if name in tensors}
    _check_shapes(path, matrices, tensors)
    if _root({name: (t.dtype, t.shape) for name, t in {**matrices, **tensors}.items()}, tensors) != root:
        raise CorruptFileError(f"{path} is damaged or not finished: its checksum is not the recorded one")
    return matrices, tensors


def _check_shapes(path: Path, matrices: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
    n_rows = {len(tensor) if tensor.dim() else 0 for tensor in (*matrices.values(), *columns.values())}
    sane = len(n_rows) == 1 and 0 not in n_rows
    for name, matrix in matrices.items():
        checksums = columns.get(name + _SUFFIX)
        sane = sane and matrix.dim() == 2 and matrix.dtype in _STORED.values() and checksums is not None
        sane = sane and checksums.dtype == torch.uint8 and checksums.shape[1:] == (_DIGEST_SIZE,)
    if not sane:
        shapes = {name: list(tensor.shape) for name, tensor in {**matrices, **columns}.items()}
        raise CorruptFileError(f"{path} holds {shapes}, which are no rows with their checksums")


def _root(kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]], columns: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape) in sorted(kinds.items()):
        digest.update(f"{name} {dtype} {tuple(shape)}\n".encode())
        if name in columns:
            digest.update(files.tensor_bytes(columns[name]))
    return digest.hexdigest()


def _row_checksums(matrix: Tensor) -> Tensor:
    found = b"".join((side_by_side if matrix.nbytes > MUCH else map)(_row_checksum, matrix))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(len(matrix), _DIGEST_SIZE)


def _hash_of(checksums: Tensor) -> str:
    return hashlib.blake2b(files.tensor_bytes(checksums), digest_size=_DIGEST_SIZE).hexdigest()


def _row_checksum(row: Tensor) -> bytes:
    return hashlib.blake2b(files.tensor_bytes(row), digest_size=_DIGEST_SIZE).digest()


def stored_dtype(name: str | torch.dtype | None) -> torch.dtype:
    """The dtype for `"float32"` (also for None) or `"float16"`.

    Raises:
        CoarError: another.
    """
    known = {None: torch.float32, "float32": torch.float32, "float16": torch.float16}
    plain = str(name).removeprefix("torch.") if name is not None else None
    if plain not in known:
        raise CoarError(f"dtype={name!r}; attributions are stored as 'float32' or 'float16'")
    return known[plain]


def converted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in another dtype.

    Raises:
        CoarError: values that it cannot hold.
    """
    found = matrix.to(dtype)
    if dtype == torch.float16 and not found.isfinite().all():
        raise CoarError(
            f"values up to {float(matrix.abs().max()):g} do not fit into float16, which ends at 65504; use float32"
        )
    return found


def n_bytes(size: int | str) -> int:
    """A number of bytes from an int or from words such as "500MB" and "5GB".

    Raises:
        CoarError: something else, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    found = int(float(match[1]) * 1000 ** ("KMGT".find(match[2]) + 1 if match[2] else 0)) if match else 0
    if found < 1:
        raise CoarError(f"max_shard_size={size!r}; give a number of bytes, or such as '500MB' or '5GB'")
    return found
