"""Values of other examples as what stands in: resampled at random, or patched from a partner of each example.

The model computes them for every batch before it runs on it, see `masking.partners`.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.components import Components, StandIn
from hf_coar.data import Batch
from hf_coar.errors import CoarError, DataError
from hf_coar.masking.ablations import ABLATIONS, TARGETS, Ablation, key_of, read, register
from hf_coar.masking.masked_model import MaskedModel, check_takes_values
from hf_coar.models import PARTNER


class OfPartners(Ablation):
    """The values of other examples, which the model computes for every batch before it runs on it."""

    takes_data = True

    @abstractmethod
    def paired(self, data: Any) -> Any:
        """The data, with the entries of every example's partner beside its own, after `partner_`."""

    @abstractmethod
    def joined(self, inputs: Batch) -> Batch:
        """The inputs of a model with those of the partners."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """How partners are found, and a fingerprint of what they are found among, as JSON values.

        Raises:
            DataError: there is nothing to find them among.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The description of the examples among which partners are found."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any], data: Any) -> "OfPartners":
        """The ablation that has this record, if the data are the same."""
        return cls(data)

    def stand_in(self, masked: MaskedModel) -> StandIn:
        """Read the examples among which partners are found.

        Raises:
            CoarError: components that no value can stand in for.
            DataError: there are no examples.
        """
        check_takes_values(masked.components, self.name)
        routed = [group.module for group in masked.components.groups if group.routed]
        if routed:
            raise CoarError(
                f"{self.name!r} cannot stand in for experts ({', '.join(routed[:4])}): other tokens are sent to them "
                "for other examples; leave them out with find_components(model, exclude=[…]), or take Mean(data)"
            )
        return self.bound()

    def bound(self) -> StandIn:
        """What stands in, whatever the components are."""
        record = {"name": self.name, "of_partners": True, **self.record()}
        return StandIn(record, source=self, data=self.described())


@register("resample")
@dataclass(frozen=True)
class Resample(OfPartners):
    """A component's value for another example, drawn at random among those of the same shape.

    Which one is a pure function of the seed and of what the example is, so that batches and order do not matter. Labels
    are no part of it: a decoder that is prompted by the labels is prompted by the example's own.

    Attributes:
        data: where the others are drawn from, as for `attribute`; the first `most` of them are kept in memory.
        seed: of the draw.
        most: examples that are kept.
    """

    data: Any = field(repr=False)
    seed: int = 0
    most: int = 256

    def record(self) -> dict[str, Any]:
        """Seed, number, and a fingerprint of the examples to draw from.

        Raises:
            DataError: there are none.
        """
        digest = hashlib.blake2b("".join(key for key, _ in self._rows).encode(), digest_size=16)
        counts = {"seed": self.seed, "most": self.most, "n_examples": len(self._rows)}
        return {**counts, "fingerprint": digest.hexdigest()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], data: Any) -> "Resample":
        """With the seed that is recorded."""
        return cls(data, record.get("seed", 0), record.get("most", 256))

    def described(self) -> dict[str, Any]:
        """The description of the examples to draw from."""
        return data_module.describe(self.data)

    @cached_property
    def _rows(self) -> list[tuple[str, Batch]]:
        """The examples to draw from, each with its key."""
        rows: list[Batch] = []
        for batch in read(self.data):
            rows += [data_module.rows(batch, i, i + 1) for i in range(data_module.size(batch))]
            if len(rows) >= self.most:
                break
        if not rows:
            raise DataError("there is nothing to resample from: the data of hf_coar.Resample are empty")
        return [(key_of(row), row) for row in rows[: self.most]]

    def paired(self, data: Any) -> Any:
        """The data, with the entries of every example's partner beside its own, after `partner_`."""
        return data_module.with_partners(data, self.joined)

    def joined(self, inputs: Batch) -> Batch:
        """The inputs of a model with those of the partners.

        Raises:
            DataError: there is no other example of the shape of one of them.
        """
        chosen = [self._drawn(data_module.rows(inputs, i, i + 1)) for i in range(data_module.size(inputs))]
        return {**inputs, **{PARTNER + name: value for name, value in data_module.concatenated(chosen).items()}}

    def _drawn(self, row: Batch) -> Batch:
        """The partner of one example: what it has of the entries of this one."""
        inputs = {name: value for name, value in row.items() if isinstance(value, Tensor) and name not in TARGETS}
        own, fitting = key_of({name: value.cpu() for name, value in inputs.items()}), []
        for _, other in self._rows:
            same = {name: other[name] for name in inputs if _like(other.get(name), inputs[name])}
            if len(same) == len(inputs) and key_of(same) != own and _as_long(same, inputs):
                fitting.append(same)
        if not fitting:
            shapes = {name: list(value.shape[1:]) for name, value in inputs.items()}
            raise DataError(
                f"none of the {len(self._rows)} examples to resample from is another one with the shapes {shapes} and "
                "the number of tokens of this one; give hf_coar.Resample more examples, or such of one length"
            )
        drawn = int.from_bytes(hashlib.blake2b(f"{self.seed}:{own}".encode(), digest_size=8).digest(), "big")
        return {name: value.to(inputs[name].device) for name, value in fitting[drawn % len(fitting)].items()}


@register("patch")
@dataclass(frozen=True)
class Patch(OfPartners):
    """A component's value for the example's partner, such as the same prompt with another name in it.

    Attributes:
        corrupt: the partners: data as for `attribute`, or one batch; example i is the partner of example i, and has
            the same shape, token by token.
    """

    corrupt: Any = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Number and fingerprint of the partners.

        Raises:
            DataError: there are none.
        """
        digest, n_examples = hashlib.blake2b(digest_size=16), 0
        for batch in read(self._batches()):
            for row in range(data_module.size(batch)):
                digest.update(key_of(data_module.rows(batch, row, row + 1)).encode())
            n_examples += data_module.size(batch)
        if not n_examples:
            raise DataError("there are no partners: the data of hf_coar.Patch are empty")
        return {"n_examples": n_examples, "fingerprint": digest.hexdigest()}

    def described(self) -> dict[str, Any]:
        """The description of the partners."""
        return data_module.describe(self.corrupt)

    def _batches(self) -> Any:
        return [self.corrupt] if isinstance(self.corrupt, Mapping) else self.corrupt

    def paired(self, data: Any) -> Any:
        """The data, with the entries of every example's partner beside its own, after `partner_`."""
        return data_module.paired(data, self._batches())

    def joined(self, inputs: Batch) -> Batch:
        """The inputs of a model with those of the partners, where these are as many and in one batch.

        Raises:
            DataError: nothing says which belong together.
        """
        whole = list(read(self._batches()))
        count = sum(map(data_module.size, whole))
        if len(whole) != 1 or count != data_module.size(inputs):
            raise DataError(
                f"the model is given {data_module.size(inputs)} examples, and there are {count} partners in "
                f"{len(whole)} batches, so that nothing says which belong together; give the model batches of "
                "hf_coar.Patch(corrupt).paired(data)"
            )
        others = {name: value for name, value in whole[0].items() if name in inputs}
        if not others:
            raise DataError(f"the partners hold {', '.join(whole[0])}, and the examples {', '.join(inputs)}")
        return data_module.joined(inputs, others)


def _like(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype


def _as_long(one: Batch, other: Batch) -> bool:
    """Whether both have the same tokens attended, where there is a mask."""
    mask = one.get("attention_mask")
    return not isinstance(mask, Tensor) or torch.equal(mask, other["attention_mask"].to(mask.device))


def paired(components: Components, data: Any) -> Any:
    """The data with the partners whose values stand in for the components; as they are where none do.

    Raises:
        DataError: the components come from a file, which does not hold the partners, and the data have none.
    """
    stand_in = components.stand_in
    if stand_in is None or not stand_in.of_partners:
        return data
    if any(name.startswith(PARTNER) for name in data_module.few(data_module.batches(data), 1)):
        return data
    if stand_in.source is None:
        kind = stand_in.name.capitalize()
        raise DataError(
            f"the values of other examples stand in for these components ({stand_in}), and files do not hold those: "
            f"give the data as hf_coar.{kind}(…).paired(data), with what they were attributed with"
        )
    return stand_in.source.paired(data)


def reopened(stand_in: StandIn, data: Any) -> StandIn:
    """What stands in, of which a file was read, with the examples among which partners are found.

    Raises:
        DataError: other examples than those that are recorded.
    """
    found = ABLATIONS[stand_in.name].from_record(stand_in.record, data).bound()
    if found != stand_in:
        raise DataError(
            f"the examples whose values stand in are not those of the record: {dict(found.record)} against "
            f"{dict(stand_in.record)}; give the same data set, split, columns and preprocessing"
        )
    return found
