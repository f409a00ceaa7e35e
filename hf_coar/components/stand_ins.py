"""What stands in for ablated components, as it belongs to them: a name, what it was made of, and the values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_coar.errors import CorruptFileError

_TEXTS = ("name", "fingerprint", "model")


@dataclass(frozen=True)
class StandIn:
    """What stands in the place of what ablated components make (or, for inputs and heads, of what they read).

    Attributes:
        record: how it was made, as JSON values: the `name` of the kind, and a `fingerprint` of what the values are made
            of (not of the values, whose last bits another machine may have otherwise). Two that agree in this are the
            same.
        values: by the name of the parameter float32 [features], a number for every output feature of the module (or
            input feature) that the components divide, bias included; or [positions, …, features in their place], one
            for every entry of an activation. None where the values are those of another example.
        source: what finds the other example of every example, see `masking.ablations`; None for values that are known,
            and where a file was read, which does not hold it.
        absorbed: by the parameter, the batch normalisation behind a module without a bias that can take up a constant.
        data: the description of the examples that it was made of.
    """

    record: Mapping[str, Any] = field(hash=False)
    values: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    source: Any = field(default=None, compare=False, repr=False)
    absorbed: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    data: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The name of the kind, such as "mean"."""
        return self.record["name"]

    @property
    def of_partners(self) -> bool:
        """Whether the values are those that the model computes for another example."""
        return bool(self.record.get("of_partners"))

    def provenance(self) -> dict[str, Any]:
        """How it was made, as JSON values, with the description of the data."""
        return {**self.record, "data": dict(self.data)} if self.data else dict(self.record)

    def __str__(self) -> str:
        """Such as `mean over 200 examples`."""
        count = self.record.get("n_examples")
        return f"{self.name} over {count:,} examples" if count else self.name

    @classmethod
    def from_json(cls, value: Any) -> "StandIn":
        """From `record`, from whomever it comes.

        Raises:
            CorruptFileError: no such mapping.
        """
        sane = isinstance(value, Mapping) and isinstance(value.get("name"), str)
        sane = sane and all(isinstance(value.get(key), str | None) for key in _TEXTS)
        sane = sane and all(type(value.get(key, 0)) is int for key in ("n_examples", "seed", "most"))
        if not sane:
            raise CorruptFileError(f"this is no record of what stands in for components: {str(value)[:80]!r}")
        return cls(dict(value))
