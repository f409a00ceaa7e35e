"""Identity: by what the examples of a run are known again, exactly.

Of every entry of every example (`input_ids`, `pixel_values`, `labels` …) a hash is kept, BLAKE2b-128 over its name,
dtype, shape and bytes. They lie beside the results in every shard of a run, and in the attributions that are made of
it. Attributions of before there were hashes hold one number an example and its label, which are compared as well as
they allow, see `signatures`.
"""

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_coar.data.batches import Batch, concatenated, size
from hf_coar.errors import CorruptFileError, DataError
from hf_coar.storage import files
from hf_coar.storage.threads import MUCH, side_by_side

HASH_SIZE = 16  # bytes
HASH = "hash:"  # of the names under which hashes lie among the results of a run
_IGNORED_LABEL = -100  # as losses and collators have it
_ADVICE = "give the same data set, split, columns, preprocessing and order (no shuffling)"


@dataclass(frozen=True)
class Identity:
    """By what the examples of a run are known again.

    Attributes:
        hashes: uint8 [examples, 16] by the name of the entry; none in attributions of before there were hashes.
        labels: int64 [examples]; -1 where there is no label of the whole example.
        signatures: float64 [examples], see `signatures`; only in attributions of before there were hashes.
    """

    hashes: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    signatures: Tensor | None = None

    @classmethod
    def of(cls, results: Mapping[str, Tensor]) -> "Identity":
        """From the results of a run, or what `columns` gave; everything else among them is left alone.

        Raises:
            CorruptFileError: there is neither a hash nor a signature, or one of another shape.
        """
        hashes = {name.removeprefix(HASH): value for name, value in results.items() if name.startswith(HASH)}
        labels, old = results.get("labels"), results.get("signatures")
        sane = labels is not None and labels.dim() == 1 and bool(hashes) != (old is not None)
        sane = sane and all(_is_hash(value, len(labels)) for value in hashes.values())
        if not sane or (old is not None and old.shape != labels.shape):
            raise CorruptFileError(f"no examples can be known again by {reprlib.repr(sorted(results))}; damaged?")
        return cls(hashes, labels, old)

    @classmethod
    def of_batch(cls, batch: Batch) -> "Identity":
        """The identity of the examples of a batch."""
        return cls(hashes(batch), _labels(batch))

    @classmethod
    def joined(cls, parts: "Sequence[Identity]") -> "Identity":
        """The identity of examples that come one after the other."""
        return cls.of(concatenated([part.columns() for part in parts]))

    def columns(self) -> dict[str, Tensor]:
        """Tensors [examples, …] by name, for a file."""
        old = {} if self.signatures is None else {"signatures": self.signatures}
        return {**self.hash_columns(), **old, "labels": self.labels}

    def hash_columns(self) -> dict[str, Tensor]:
        """The hashes among `columns`."""
        return {HASH + name: value for name, value in self.hashes.items()}

    def __len__(self) -> int:
        """How many examples."""
        return len(self.labels)

    def rows(self, index: Any) -> "Identity":
        """Some of the examples; `index` is what indexes a tensor."""
        old = None if self.signatures is None else self.signatures[index]
        return Identity({name: value[index] for name, value in self.hashes.items()}, self.labels[index], old)

    def check(self, other: "Identity", first: int = 0) -> None:
        """Compare with the examples of other data, one by one and in order.

        Args:
            other: their identity.
            first: number of the first example, for the message.

        Raises:
            DataError: they are others; names the first that differs, and in what.
        """
        if len(self) != len(other):
            raise DataError(f"the data hold {len(other)} examples, and the results are of {len(self)}; {_ADVICE}")
        if self.hashes and other.hashes:
            self._check_entries(other)
            differing = {name: (value != other.hashes[name]).any(1) for name, value in self.hashes.items()}
        else:
            differing = {"labels": self.labels != other.labels}
            if self.signatures is not None and other.signatures is not None:
                differing["inputs"] = _differ(self.signatures, other.signatures)
        _check_none(differing, first)

    def check_batch(self, batch: Batch, first: int = 0, known: "Identity | None" = None) -> None:
        """Compare with the examples of a batch, as `check`; by signatures, where there are no hashes.

        Args:
            batch: of examples.
            first: number of the first, for the message.
            known: the identity of the batch, if it was taken already.
        """
        other = known or Identity.of_batch(batch)
        if not self.hashes:
            other = Identity({}, other.labels, signatures(batch))
        self.check(other, first)

    def _check_entries(self, other: "Identity") -> None:
        if self.hashes.keys() != other.hashes.keys():
            ours, theirs = (reprlib.repr(sorted(one.hashes)) for one in (self, other))
            raise DataError(f"the examples of the data have the entries {theirs}, and the results are of {ours}")


def _is_hash(value: Tensor, count: int) -> bool:
    return value.dtype == torch.uint8 and value.shape == (count, HASH_SIZE)


def _check_none(differing: Mapping[str, Tensor], first: int) -> None:
    """Raises `DataError` if some examples differ in an entry, bool [examples]."""
    anywhere = torch.stack(list(differing.values())).any(0)
    if not anywhere.any():
        return
    index = int(anywhere.nonzero()[0])
    entries = ", ".join(reprlib.repr(name) for name, value in differing.items() if value[index])
    raise DataError(
        f"{int(anywhere.sum())} of {len(anywhere)} examples are not those of before; the first is example "
        f"{first + index}, in its {entries}; {_ADVICE}"
    )


def _labels(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        labels = torch.full((size(batch),), -1)
    return labels.detach().cpu().long()


# --------------------------------------------------------------------------------------------------------------- hashes


def hashes(batch: Batch) -> dict[str, Tensor]:
    """The hash of every entry of every example, uint8 [examples, 16] by the name of the entry.

    Padding beyond an example's own text depends on who else is in the batch, and has no part in it: where an
    `attention_mask` says so, a run of equal values at either end of a sequence is left out.
    """
    return {
        name: _hashes_of(name, value, _texts(batch, name, value))
        if isinstance(value, Tensor)
        else _hashes_of_list(name, value)
        for name, value in batch.items()
    }


def _hashes_of(name: str, value: Tensor, stretches: Sequence[tuple[int, int, int]] | None) -> Tensor:
    value = _plain(value)

    def digest(index: int) -> bytes:
        row, offset = value[index], 0
        if stretches is not None:
            start, stop, offset = stretches[index]
            row = row[start:stop]
        return _digest(f"{name}\0{value.dtype}\0{tuple(row.shape)}\0{offset}\0".encode(), row)

    found = bytearray().join((side_by_side if value.nbytes > MUCH else map)(digest, range(len(value))))
    return torch.frombuffer(found, dtype=torch.uint8).view(len(value), HASH_SIZE)


def _hashes_of_list(name: str, values: Sequence[Tensor | Mapping[str, Tensor]]) -> Tensor:
    found = bytearray()
    for value in values:
        parts = value if isinstance(value, Mapping) else {"": value}
        digest = hashlib.blake2b(digest_size=HASH_SIZE)
        for key in sorted(parts):
            row = _plain(torch.as_tensor(parts[key]))
            digest.update(_digest(f"{name}\0{key}\0{row.dtype}\0{tuple(row.shape)}\0".encode(), row))
        found += digest.digest()
    return torch.frombuffer(found, dtype=torch.uint8).view(len(values), HASH_SIZE)


def _plain(value: Tensor) -> Tensor:
    dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
    return dense.cpu().resolve_conj().resolve_neg().contiguous()


def _digest(head: bytes, row: Tensor) -> bytes:
    digest = hashlib.blake2b(head, digest_size=HASH_SIZE)
    digest.update(files.tensor_bytes(row))
    return digest.digest()


def _texts(batch: Batch, name: str, value: Tensor) -> list[tuple[int, int, int]] | None:
    """(start, stop, start seen from the first attended token) of every example's own text; None for what is none."""
    if value.dim() < 2:
        return None
    mask = _mask_of(batch, name, value)
    is_labels = "label" in name and value.dim() == 2 and not value.is_floating_point()
    if mask is None and not is_labels:
        return None
    value = value.detach().cpu()
    origin = torch.zeros(len(value), dtype=torch.int64)
    needed = torch.ones(value.shape[:2], dtype=torch.bool)
    if mask is not None:
        attended = mask.detach().cpu() != 0
        origin = _first(attended)
        fillers = _fillers(batch, value) if is_labels else ~attended
        needed = attended | ~(_run(value, fillers & ~attended))
    if is_labels:  # targets have a length of their own, and are filled up with what no loss counts
        needed &= ~_to_the_end(value == _IGNORED_LABEL)
    start, stop = _first(needed), needed.shape[1] - _first(needed.flip(1))
    stop = torch.where(needed.any(1), stop, start)
    return list(zip(start.tolist(), stop.tolist(), (start - origin).tolist(), strict=True))


def _fillers(batch: Batch, labels: Tensor) -> Tensor:
    """Which targets may be padding: those that no loss counts, and copies of the tokens. Classes are none."""
    tokens = batch.get("input_ids")
    copies = tokens is not None and tokens.shape == labels.shape
    ignored = labels == _IGNORED_LABEL
    return ignored | (labels == tokens.detach().cpu()) if copies else ignored


def _mask_of(batch: Batch, name: str, value: Tensor) -> Tensor | None:
    """The mask that says which positions of an entry are attended, if one does; images are no text.

    Each of several texts (a pair's second, what a decoder reads) has a mask of its own, under the same beginning.
    """
    ends = ("input_ids", "attention_mask")
    starts = {"", "decoder_"} | {one.removesuffix(end) for one in batch for end in ends if one.endswith(end)}
    mask = batch.get(max((start for start in starts if name.startswith(start)), key=len) + "attention_mask")
    fits = mask is not None and mask.dim() == 2 and value.dim() <= 3 and value.shape[:2] == mask.shape
    return mask if fits else None


def _run(value: Tensor, fillers: Tensor) -> Tensor:
    """Which positions belong to a run of equal fillers at either end: anything else beyond the mask may count."""

    def from_left(value: Tensor, fillers: Tensor) -> Tensor:
        equal = value == value[:, :1]
        equal = equal.flatten(2).all(2) if equal.dim() > 2 else equal
        return (equal & fillers).long().cumprod(1).bool()

    return from_left(value, fillers) | from_left(value.flip(1), fillers.flip(1)).flip(1)


def _to_the_end(flags: Tensor) -> Tensor:
    """Which positions have nothing but True from themselves on."""
    return flags.flip(1).long().cumprod(1).bool().flip(1)


def _first(flags: Tensor) -> Tensor:
    """Position of the first True of every row; 0 where there is none."""
    return flags.long().argmax(1)


# ----------------------------------------------------------------------------------- attributions of before the hashes

_SIGNATURE_TOLERANCE = 1e-3


def _differ(ours: Tensor, theirs: Tensor) -> Tensor:
    near = (ours - theirs).abs() <= _SIGNATURE_TOLERANCE * (1 + ours.abs())
    return ~(near | (ours.isnan() & theirs.isnan()))


def signatures(batch: Batch) -> Tensor:
    """One number an example, float64 [examples], by which attributions of format 1 know their examples again.

    The sum over the inputs of a weighted mean, in which padding does not count. Small changes escape it.
    """
    real = batch.get("attention_mask")
    total = torch.zeros(size(batch), dtype=torch.float64)
    for name, value in batch.items():
        if name in ("attention_mask", "labels") or not isinstance(value, Tensor):
            continue
        flat = value.detach().cpu().double().flatten(1)
        if real is not None and real.shape == value.shape:
            flat = flat * real.detach().cpu().double()
        # Weights that differ by position, so that permuted pixels or tokens do not cancel.
        weights = torch.cos(torch.arange(flat.shape[1], dtype=torch.float64) * 0.1) + 1.5
        total += (flat * weights).sum(1) / (flat.abs().sum(1) + 1.0)
    return total
