"""Provenance: what attributions are of and how they were made; one parser, and one way back to JSON.

The entries of `config.json` have been the same since the first format, so that what an older version wrote is read by
the same few lines. Everything here comes from files that anybody may have written, and is checked before it is used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_coar.errors import CorruptFileError
from hf_coar.storage import cards

_RECORDED_TEXTS = ("id", "revision", "library", "class", "dtype", "fingerprint", "split")
_RECORDED_TEXTS += ("loaded", "architecture", "preprocessor")


@dataclass(frozen=True)
class Provenance:
    """Everything that determined some attributions, and what was found while they were made.

    Attributes:
        model: `models.record` of the model, with the `fingerprint` of its weights.
        data: how the data set is loaded again, by the keywords of `load`; its `fingerprint`.
        granularity: of the components.
        n_components: how many there are.
        ablation: what stands in for ablated components, see `components.StandIn`; None for zero.
        output: name of the attributed output.
        unit: of its values.
        boundary: the value at which right turns into wrong; None where no value does.
        boundary_known: False for attributions of before it was recorded.
        call: where the function is defined that ran the model, `module.name`; None for that of the model's task.
        alignment: which target the logits at a position were compared with, see `outputs.Output`; None where there are
            no positions.
        method: the estimator's settings, with its name.
        ablated_fraction: that the attributions were made for.
        seed: of all draws.
        cost: forward passes an example that were spent, a forward and backward pass counted as three.
        versions: of the libraries that computed.
        dtype: "bfloat16", "float16" or "tf32" where passes ran in lower precision, else None.
        checked: what fresh masks said of them, or None.
        forecast: what predictions need beside the tensors of the attributions, see `Forecast.to_json`; or None.
        warnings: what a person must know before using them, one line each.
        chosen: what was chosen for the user, and why, one line each.
        skipped: indices of examples that could not be read; the rows leave them out.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    granularity: str | None = None
    n_components: int | None = None
    ablation: Mapping[str, Any] | None = None
    output: str | None = None
    unit: str | None = None
    boundary: float | None = None
    boundary_known: bool = False
    call: str | None = None
    alignment: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    ablated_fraction: float | None = None
    seed: int | None = None
    cost: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    checked: Mapping[str, float] | None = None
    forecast: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    skipped: tuple[int, ...] = ()

    def of_this_seed(self, weights: Tensor, errors: Tensor) -> Tensor:
        """What of standard errors is noise of this seed, in their shape; the rest is an error that every seed makes."""
        shared = (self.checked or {}).get("uncertain")
        if not isinstance(shared, int | float):
            return errors
        return (errors.double().square() - (shared * weights.double()).square()).clamp_min(0).sqrt()

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the weights that were attributed."""
        return self.model.get("fingerprint")

    @property
    def method_name(self) -> str:
        """Name of the estimator."""
        return str(self.method.get("name", "this method"))

    @property
    def unit_text(self) -> str:
        """The unit of the output, for a text."""
        return self.unit or "the unit of the output"

    def frozen(self) -> dict[str, Any]:
        """What determines the numbers, as JSON values: a run with other ones is another run."""
        return {key: value for key, value in self.to_json().items() if key not in _FOUND}

    def found(self, **facts: Any) -> "Provenance":
        """A provenance with what turned up on the way: `cost`, `checked`, `forecast`, `warnings`, `skipped`."""
        return replace(self, **facts)

    def public(self) -> "Provenance":
        """A provenance without the local paths that it may name."""
        shown = {name: public_record(entry) for name, entry in self._sources().items()}
        if self.ablation is not None and "data" in self.ablation:
            shown["ablation"] = {**self.ablation, "data": public_record(self.ablation["data"])}
        return replace(self, **shown)

    def _sources(self) -> dict[str, Mapping[str, Any]]:
        return {name: entry for name, entry in (("model", self.model), ("data", self.data)) if entry}

    def alike(self, other: "Provenance") -> bool:
        """Whether two runs would give the same numbers by construction."""
        keys = ("seed", "method", "ablated_fraction", "output")
        return self != Provenance() and all(getattr(self, key) == getattr(other, key) for key in keys)

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not known is left out."""
        known = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "boundary_known"}
        empty = {key for key, value in known.items() if value is None or value in ({}, ())}
        if self.boundary_known:
            empty.discard("boundary")  # that there is none is known, too
        return {key: _plain(value) for key, value in known.items() if key not in empty}

    @classmethod
    def from_json(cls, value: Any, where: str = "the configuration") -> "Provenance":
        """The inverse of `to_json`, from whomever the values come; entries of other names are left out.

        Args:
            value: a mapping.
            where: the file, for the message.

        Raises:
            CorruptFileError: an entry is not what it should be.
        """
        if isinstance(value, Provenance):
            return value
        if not isinstance(value, Mapping):
            raise CorruptFileError(f"{where} is damaged: it holds a {type(value).__name__}, not a mapping")
        for key, sane in _CHECKS.items():
            if key in value and not sane(value[key]):
                raise CorruptFileError(f"{where} is damaged: its {key!r} is {str(value[key])[:80]!r}")
        given = {key: entry for key, entry in value.items() if key in _CHECKS and entry is not None}
        given |= {key: tuple(given[key]) for key in ("skipped", "warnings", "chosen") if key in given}
        return cls(**given, boundary_known="boundary" in value)


def public_record(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a model or data set in which local paths are shortened to their last part."""
    paths = {key: entry.get(key) for key in ("architecture", "preprocessor")}
    local = {key: Path(path).name for key, path in paths.items() if path and _is_local(path)}
    return {**entry, "id": cards.public_name(entry), **local}


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).exists()


_FOUND = ("cost", "checked", "forecast", "warnings", "chosen", "skipped")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str | None) for key in _RECORDED_TEXTS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_text(value: Any) -> bool:
    return isinstance(value, str | None)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "model": _is_record,
    "data": _is_record,
    "granularity": _is_text,
    "ablation": lambda value: value is None or (_is_mapping(value) and _is_record(value.get("data", {}))),
    "n_components": lambda value: type(value) is int and 0 < value < 2**40,
    "output": _is_text,
    "unit": _is_text,
    "boundary": lambda value: value is None or _is_number(value),
    "call": _is_text,
    "alignment": lambda value: value in (None, "next", "same", "decoded"),
    "method": _is_mapping,
    "ablated_fraction": _is_number,
    "seed": lambda value: type(value) is int,
    "dtype": _is_text,
    "versions": _is_mapping,
    "cost": lambda value: value is None or _is_number(value),
    "checked": lambda value: value is None or _is_mapping(value),
    "forecast": lambda value: value is None or _is_mapping(value),
    "warnings": lambda value: _are_texts(value),
    "chosen": lambda value: _are_texts(value),
    "skipped": lambda value: isinstance(value, list | tuple) and all(type(entry) is int for entry in value),
}
