"""A problem: what is to be attributed, and the two ways in which an estimator looks at it: `measure` and `compute`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_coar.attributions import rows
from hf_coar.attributions.forecast import Forecast
from hf_coar.components import Components
from hf_coar.data import Batch, Identity, Reader, concatenated
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.masking import MaskedModel
from hf_coar.models.outputs import Output
from hf_coar.runs.engine import Compute, Part, run
from hf_coar.runs.measuring import MaskedPasses, parts_of
from hf_coar.runs.preflight import First
from hf_coar.runs.sampling import MaskSequence
from hf_coar.runs.store import Store

Results = dict[str, Tensor]  # of some examples, which are the first axis of each

_FLOAT = 4  # bytes
_IN_MEMORY = 2**28  # bytes of estimates that every process holds by itself; more lie in a file
_BLOCK = 64  # examples whose estimates are corrected at once


@dataclass(frozen=True)
class Size:
    """What the cost of an estimator depends on.

    Attributes:
        n_components: of the model.
        ablated_fraction: the fraction of them that masks ablate.
    """

    n_components: int
    ablated_fraction: float


@dataclass
class Problem:
    """What is to be attributed.

    Attributes:
        masked: the model with its components.
        data: batches that can be iterated again.
        output: the output to attribute.
        ablated_fraction: the fraction of the components that masks ablate.
        seed: of all draws.
        store: of the run; results that it holds are not computed again. None where nothing is to be computed.
        identity: of the examples; known once something was computed.
        first: the first of the examples.
        warnings: what a first look found that a person must know of, one line each.
        reader: of the data.
    """

    masked: MaskedModel
    data: Any
    output: Output
    ablated_fraction: float
    seed: int
    store: Store | None = None
    identity: Identity | None = None
    first: First | None = None
    warnings: tuple[str, ...] = ()
    reader: Reader = field(default_factory=Reader)

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        self.first = self.first or First(self.data)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.masked.model

    @property
    def components(self) -> Components:
        """The model's components."""
        return self.masked.components

    @property
    def size(self) -> Size:
        """What the cost depends on."""
        return Size(len(self.masked), self.ablated_fraction)

    def compute(self, parts: Sequence[Part], compute: Compute, what: str) -> dict[str, Tensor]:
        """Results of some passes on all examples; what the store holds already is not computed again.

        Args:
            parts: of the passes, all of one kind.
            compute: (batch on the device, index of its first example, part) -> results, tensors [examples, …].
            what: said by the progress bar.

        Returns:
            Tensors whose first axis is the example; those of several parts are joined along the second.

        Raises:
            DataError: no examples, or other data than before.
            NonFiniteOutputError: a result is NaN or infinite; names the example and, where it is of one, the component.
            CoarError: not even one example fits into memory.
        """
        count = self._run(parts, compute, what)
        gathered = [self.store.gather(part.name, count) for part in parts]
        self._note(Identity.of(gathered[0]))
        names = [name for name in gathered[0] if name not in self.identity.columns()]
        if len(gathered) == 1:
            return {name: gathered[0][name] for name in names}
        return {name: torch.cat([results[name] for results in gathered], dim=1) for name in names}

    def reduce(
        self, part: Part, compute: Compute, what: str, block: int, estimate: Callable[[Results], Results]
    ) -> Results:
        """What is estimated from the results of some passes, a few examples at a time: all may exceed the memory.

        Large estimates do not lie in memory either: one of the processes that share the run writes them into a file of
        its folder, block by block, and all of them map that.

        Args:
            part: all passes.
            compute: as for `compute`.
            what: said by the progress bar.
            block: examples at a time.
            estimate: results of some examples -> tensors whose first axis is these examples, always of the same names;
                those named in `rows.MATRICES` may be large.

        Returns:
            The estimates of all examples.
        """
        count = self._run([part], compute, what)
        blocks = self._estimated(self.store.blocks(part.name, count, block), estimate)
        found = self._held(part.name, count - len(self.store.skipped), blocks)
        identity = Identity.of(found)
        self._note(identity)
        return {name: value for name, value in found.items() if name not in identity.columns()}

    @staticmethod
    def _estimated(blocks: Iterator[Results], estimate: Callable[[Results], Results]) -> Iterator[Results]:
        for results in blocks:
            columns = Identity.of(results).columns()
            read = {name: value for name, value in results.items() if name not in columns}
            yield {**estimate(read), **columns}

    def settled(self, estimates: "Estimates") -> Results:
        """Estimates with their corrections made, as `weights` and, if there are any, `standard_errors`.

        Large ones lie in a file, as those of `reduce` do.
        """
        if not estimates.is_corrected:
            return estimates.found()
        return self._held("settled", len(estimates), estimates.blocks(_BLOCK))

    def _held(self, name: str, n_rows: int, blocks: Iterator[Results]) -> Results:
        """What blocks of rows come to: in memory, or mapped from a file that one process writes."""
        if not lie_in_a_file(n_rows, len(self.components)):
            return concatenated(list(blocks))
        return self.store.estimates(name, n_rows + len(self.store.skipped), n_rows, blocks)

    def _note(self, identity: Identity) -> None:
        if self.identity is not None:
            self.identity.check(identity)
        self.identity = identity

    def _run(self, parts: Sequence[Part], compute: Compute, what: str) -> int:
        if self.store is None:
            raise CoarError("this problem has no store to keep results in")

        def finite(batch: Batch, first: int, part: Part) -> Mapping[str, Tensor]:
            results = compute(batch, first, part)
            _check_finite(results, first, part, self.components)
            return results

        return run(self.store, self.model, self.data, list(parts), finite, what, reader=self.reader)

    def measure(self, masks: MaskSequence, kind: str = "masks") -> Tensor:
        """Outputs of every example under every mask, float32 [masks, examples].

        Args:
            masks: drawn part by part.
            kind: under which the store keeps them.

        Raises:
            NonFiniteOutputError: the model gave NaN or infinity; says for which example and mask.
        """
        passes = MaskedPasses(self.masked, self.output, masks)
        what = f"masked passes, {masks.ablated_fraction:.3g} ablated"
        return self.compute(parts_of(masks.count, kind), passes.compute, what)["outputs"].T


class Pair(NamedTuple):
    """Weights and standard errors of some examples or components, float32; None where there are no errors."""

    weights: Tensor
    errors: Tensor | None


@dataclass(frozen=True)
class Estimates:
    """Weights and standard errors with corrections that are made where they are read, as all of them may lie in a file.

    Attributes:
        weights: float32 [examples, components], as they were found.
        errors: the same shape, or None.
        indices: int64 [replaced], components whose columns are others.
        columns: these, [examples, replaced]; None where none are.
        scale: a factor of all.
        uncertain: by how much of itself every weight may be off, beside its error.
    """

    weights: Tensor
    errors: Tensor | None = None
    indices: Tensor | None = None
    columns: Pair | None = None
    scale: float | None = None
    uncertain: float = 0.0

    def __len__(self) -> int:
        """How many examples."""
        return len(self.weights)

    @property
    def is_corrected(self) -> bool:
        """Whether they are others than were found."""
        return self.columns is not None or self.scale is not None

    def replaced(self, indices: Tensor, weights: Tensor, errors: Tensor | None) -> "Estimates":
        """With other columns, [examples, indices], for some components; a scale comes after."""
        if self.is_corrected:
            raise ValueError("columns are replaced once, and before estimates are scaled")
        return replace(self, indices=indices, columns=Pair(weights, errors))

    def scaled(self, scale: float, uncertain: float = 0.0) -> "Estimates":
        """All of them times a factor, and every weight less certain by a share of itself."""
        return replace(self, scale=scale, uncertain=uncertain)

    def rows(self, start: int, stop: int) -> Pair:
        """Those of examples start … stop - 1."""
        weights, errors = self.weights[start:stop], None if self.errors is None else self.errors[start:stop]
        if self.columns is not None:
            weights, errors = weights.clone(), None if errors is None else errors.clone()
            weights[:, self.indices] = self.columns.weights[start:stop]
            if errors is not None:
                errors[:, self.indices] = self.columns.errors[start:stop]
        return self._times(Pair(weights, errors))

    def _times(self, pair: Pair) -> Pair:
        if self.scale is None:
            return pair
        weights = pair.weights * self.scale
        if pair.errors is None:
            return Pair(weights, None)
        return Pair(weights, torch.hypot(pair.errors * self.scale, self.uncertain * weights))

    def some(self, rows: Sequence[int]) -> Pair:
        """Those of some examples, [rows, components], in memory of their own."""
        pairs = [self.rows(row, row + 1) for row in rows]
        return Pair(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*pairs, strict=True)))

    def of(self, indices: Tensor) -> Pair:
        """Those of some components, [examples, indices]."""
        weights, errors = self.weights[:, indices], None if self.errors is None else self.errors[:, indices]
        if self.columns is not None:
            here, there = (indices[:, None] == self.indices).nonzero(as_tuple=True)
            weights[:, here] = self.columns.weights[:, there]
            if errors is not None:
                errors[:, here] = self.columns.errors[:, there]
        return self._times(Pair(weights, errors))

    def blocks(self, size: int) -> Iterator[Results]:
        """Some examples at a time, by name as in `found`."""
        for start in range(0, len(self), size):
            yield _named(self.rows(start, start + size))

    def found(self) -> Results:
        """As they were found, without any correction."""
        return _named(Pair(self.weights, self.errors))


def lie_in_a_file(n_examples: int, n_components: int) -> bool:
    """Whether estimates are too large for every process to hold them."""
    return _FLOAT * len(rows.MATRICES) * n_examples * n_components > _IN_MEMORY


def _named(pair: Pair) -> Results:
    found = {"weights": pair.weights}
    return found if pair.errors is None else {**found, "standard_errors": pair.errors}


@dataclass(frozen=True)
class Fit:
    """Attributions of every example.

    Attributes:
        weights: float32 [examples, components].
        bias: float32 [examples].
        standard_errors: float32 [examples, components], of the weights; None where the estimator gives none.
        cost: forward passes an example that were spent on average, where the parts could only say about how many.
        checked: what fresh masks said of the fit, see `PathGradient.check_masks`.
        forecast: what predictions need beside the weights; None for plain linear ones.
    """

    weights: Tensor
    bias: Tensor
    standard_errors: Tensor | None = None
    cost: float | None = None
    checked: dict[str, float] | None = None
    forecast: Forecast | None = None

    def times(self, unit: float) -> "Fit":
        """This fit of outputs that were measured in a unit, for the outputs themselves."""
        if unit == 1:
            return self
        checked = self.checked and {
            name: value * unit if name in _OUTPUTS else value for name, value in self.checked.items()
        }
        errors = None if self.standard_errors is None else self.standard_errors * unit
        forecast = self.forecast and self.forecast.times_unit(unit)
        return replace(
            self, weights=self.weights * unit, bias=self.bias * unit, standard_errors=errors, checked=checked,
            forecast=forecast,
        )  # fmt: skip


_OUTPUTS = ("output", "unablated")  # of what was checked, in the unit of the output


def _check_finite(results: Mapping[str, Tensor], first: int, part: Part, components: Components) -> None:
    """Raises `NonFiniteOutputError` naming the first example (counted from `first`) with NaN or infinity."""
    for name, values in results.items():
        if not values.is_floating_point() or bool((finite := values.isfinite()).all()):
            continue
        row, *place = (~finite).nonzero()[0].tolist()
        of_components = place and values.shape[1:] == (len(components),)
        where = f" at component {place[0]} ({components[place[0]]})" if of_components else ""
        raise NonFiniteOutputError(
            f"{name!r} of example {first + row} is {float(values[(row, *place)])}{where}, in {part.kind} {part.start} "
            f"… {part.stop - 1}; look at that example, leave that component out (exclude=…), try a higher precision, "
            "or a method that does not differentiate, such as hf_coar.Regression(). What was finished before is kept"
        )
