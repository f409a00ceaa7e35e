"""Looking at attributions: parts of them, the strongest components as a table, data frames, pictures.

`Attributions` and each `Part` of them take an index, a slice or a list of examples, and the name of a component, a
matrix, a layer or a head: `a[3]`, `a[10:20]`, `a["layer3.1.conv2"]`, `a["L7"][3]`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_coar.attributions import looks
from hf_coar.attributions.predicting import Outcome
from hf_coar.attributions.table import Row, Table
from hf_coar.data import within
from hf_coar.errors import CoarError, check_count
from hf_coar.storage import labels
from hf_coar.storage.registry import Bound, Registry

if TYPE_CHECKING:
    from hf_coar.attributions.attributions import Attributions

BY = ("unit", "head", "layer", "module")
PLOTS: Registry[Callable] = Registry("plot")  # functions of attributions; the room `plots` registers them


class Looking:
    """What can be asked of attributions without a model."""

    @property
    def whole(self) -> "Part":
        """All examples and all components, as a part."""
        return Part(self, range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        """(examples, components)."""
        return self.whole.shape

    @property
    def plot(self) -> Bound:
        """Pictures, which need `pip install "hf_coar[plots]"`: `layers()`, `top(example)`, `fidelity(report)`."""
        return Bound(PLOTS, self)

    @cached_property
    def places(self) -> list[int]:
        """Where every row's example lies in the data set, by its index there: unreadable examples have no row."""
        skipped = set(self.provenance.skipped)
        return [i for i in range(len(self) + len(skipped)) if i not in skipped]

    def __getitem__(self, key: Any) -> "Part":
        """Examples by index, slice or list; components by the name of one, of a matrix, a layer or a head."""
        return self.whole[key]

    def __iter__(self) -> "Iterator[Part]":
        """Every example by itself."""
        return iter(self.whole)

    def top(self, example: int | None = None, label: int | str | None = None, k: int = 10, by: str = "unit") -> Table:
        """The components with the largest weights: of an example, of a class, or of all examples.

        Args:
            example: its row; negative ones count from the end.
            label: a class by name or number, of whose examples means are taken.
            k: how many.
            by: "unit" for components as they are, or "head", "layer", "module" for sums over those: what ablating all
                of it would cost.

        Returns:
            A table, in the unit of the output; it prints, a notebook shows it, `to_pandas()` takes it further.

        Raises:
            CoarError: both an example and a label, another `by`, no such class, or no component belongs to a head.
            OutOfRangeError: no such example.
        """
        if example is not None and label is not None:
            raise CoarError(f"example={example} and label={label!r}; give one of them")
        part = self.whole if label is None else self[self.with_label(label)]
        return (part if example is None else self[example]).top(k, by)

    def with_label(self, label: int | str) -> list[int]:
        """The rows of a class's examples, by its name or number.

        Raises:
            CoarError: no such class, or no example of it; the message says which there are.
        """
        wanted = labels.label_of(self.provenance, label)
        found = (self.labels == wanted).nonzero().flatten().tolist()
        if not found:
            present = sorted(set(self.labels.tolist()) - {-1})
            named = [labels.label_name(self.provenance, one) for one in present[:30]]
            raise CoarError(f"no example has the label {label!r}; the examples have {', '.join(named) or 'no labels'}")
        return found

    def to_pandas(self, long: bool = False) -> Any:
        """A `pandas.DataFrame`, see `Part.to_pandas`."""
        return self.whole.to_pandas(long)

    def to_dataset(self) -> Any:
        """A `datasets.Dataset`, see `Part.to_dataset`."""
        return self.whole.to_dataset()

    def _repr_html_(self) -> str:
        return looks.attributions_html(self)


class Part:
    """Some examples and some components of attributions: what `a[3]` and `a["layer3.1.conv2"]` give.

    Attributes:
        attributions: of which this is a part.
        rows: indices of the examples, in their order here.
        columns: indices of the components, int64 [components], or None for all.
    """

    def __init__(self, attributions: "Attributions", rows: Sequence[int], columns: Tensor | None = None) -> None:
        """Nothing is read yet."""
        self.attributions, self.rows, self.columns = attributions, rows, columns

    @property
    def components(self) -> Tensor:
        """Indices of the components, int64 [components]."""
        return torch.arange(len(self.attributions.components)) if self.columns is None else self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """(examples, components)."""
        return len(self.rows), len(self.attributions.components) if self.columns is None else len(self.columns)

    @cached_property
    def weights(self) -> Tensor:
        """Float32 [examples, components], in the unit of the output."""
        return self._read("weights")

    @cached_property
    def standard_errors(self) -> Tensor | None:
        """Float32 [examples, components], or None where the estimator gave none."""
        return self._read("standard_errors") if self.attributions.has_standard_errors else None

    def _read(self, of: str) -> Tensor:
        matrix, rows = self.attributions.matrix(of), list(self.rows)
        if len(rows) <= 64:  # checked, and no other row is read
            found = torch.stack([matrix.row(row) for row in rows]) if rows else torch.zeros(0, matrix.shape[1])
        else:
            found = matrix.tensor()[rows]
        return found if self.columns is None else found[:, self.columns]

    @property
    def labels(self) -> list[str]:
        """What the examples' labels are called; "" where there is none."""
        return [labels.label_name(self.attributions.provenance, int(self.attributions.labels[i])) for i in self.rows]

    @property
    def places(self) -> list[int]:
        """Where the examples lie in the data set."""
        return [self.attributions.places[row] for row in self.rows]

    @property
    def names(self) -> list[str]:
        """The components' short names, such as `L2 mlp.up 1265`."""
        return [self.attributions.components.names.name(index) for index in self.components.tolist()]

    @property
    def full_names(self) -> list[str]:
        """The components' full names, such as `model.layers.2.mlp.up_proj neuron 1265`."""
        return [str(self.attributions.components[index]) for index in self.components.tolist()]

    def __len__(self) -> int:
        """How many examples."""
        return len(self.rows)

    def __iter__(self) -> "Iterator[Part]":
        """Every example by itself."""
        return (self[place] for place in range(len(self)))

    def __getitem__(self, key: Any) -> "Part":
        """A part of this part, as `Attributions[...]`.

        Raises:
            OutOfRangeError: no such example.
            CoarError: no component, matrix, layer or head of that name in this part.
        """
        if isinstance(key, str) or (isinstance(key, list | tuple) and key and isinstance(key[0], str)):
            found = torch.tensor(self.attributions.components.indices(key))
            if self.columns is not None:
                found = found[torch.isin(found, self.columns)]
            if not len(found):
                raise CoarError(f"{key!r} is not in this part of the attributions")
            return Part(self.attributions, self.rows, found)
        if isinstance(key, slice):
            return Part(self.attributions, self.rows[key], self.columns)
        return Part(self.attributions, [self.rows[place] for place in within(key, len(self))], self.columns)

    def without(self, which: Any, level: float | None = 0.95) -> Outcome:
        """What ablating components does to these examples, see `Attributions.without`."""
        return self.attributions.without(which, list(self.rows), level)

    # ----------------------------------------------------------------------------------------------------- as a table

    def top(self, k: int = 10, by: str = "unit") -> Table:
        """The components with the largest weights; of several examples by the mean size, see `Attributions.top`."""
        if by not in BY:
            raise CoarError(f"by={by!r}; there are {', '.join(map(repr, BY))}")
        check_count(k, "k")
        if not len(self):
            raise CoarError("of no examples there is no strongest component; choose some")
        names, weights, errors = self._grouped(by)
        sizes, means = weights.abs().mean(0), weights.mean(0)
        noise = None if errors is None else errors.double().square().sum(0).sqrt().float() / len(self)
        order = sizes.argsort(descending=True, stable=True)[:k].tolist()
        again = [None] * len(order) if noise is None else _again(sizes, noise, order)
        rows = [
            Row(*names(place), float(means[place]), None if noise is None else float(noise[place]), float(sizes[place]),
                stable)
            for place, stable in zip(order, again, strict=True)
        ]  # fmt: skip
        return Table(rows, self._said(by, len(weights.T)), self.attributions.provenance.unit_text, len(self) > 1)

    def _grouped(self, by: str) -> tuple[Callable[[int], tuple[str, str, int]], Tensor, Tensor | None]:
        """Names of the columns (short, full, index), and sums over them."""
        components = self.attributions.components
        if by == "unit":
            columns = self.components.tolist()
            return (lambda i: (components.names.name(columns[i]), str(components[columns[i]]), columns[i]),
                    self.weights, self.standard_errors)  # fmt: skip
        full, index = components.regroup(by)
        short, index = components.names.of(by), index[self.components]
        present = sorted(set(index.tolist()) - {-1})
        place = torch.full((len(full),), -1).index_copy(0, torch.tensor(present), torch.arange(len(present)))
        inside = index >= 0
        target = place[index[inside]]

        def summed(matrix: Tensor) -> Tensor:
            return torch.zeros(len(self), len(present)).index_add_(1, target, matrix[:, inside])

        errors = self.standard_errors
        errors = None if errors is None else summed(errors.square()).sqrt()
        return lambda i: (short[present[i]], full[present[i]], -1), summed(self.weights), errors

    def _said(self, by: str, n: int) -> str:
        what = "components" if by == "unit" else f"{by}s"
        if len(self) == 1:
            return f"example {self.rows[0]}{f' ({self.labels[0]})' if self.labels[0] else ''}: of {n:,} {what}"
        classes = set(self.labels)
        of = f" of {classes.pop()}" if len(classes) == 1 and "" not in classes else ""
        return f"mean over {len(self):,} examples{of}: of {n:,} {what}"

    # ---------------------------------------------------------------------------------------------------------- further

    def to_pandas(self, long: bool = False) -> Any:
        """A `pandas.DataFrame` with a row an example and a column a component, by full name; `attrs` says the unit.

        Args:
            long: a row for every example and component instead, with `example` (its index in the data set), `label`,
                `component`, `name`, `weight` and, where known, `standard_error`.

        Raises:
            CoarError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise CoarError("data frames need pandas: pip install pandas") from error
        index = pandas.Index(self.places, name="example")
        frame = pandas.DataFrame(self.weights.numpy(), index=index, columns=self.full_names)
        if long:
            n = self.shape[1]
            columns = {
                "example": [p for p in self.places for _ in range(n)],
                "label": [x for x in self.labels for _ in range(n)],
            }
            columns |= {"component": self.full_names * len(self), "name": self.names * len(self)}
            columns |= {"weight": self.weights.flatten().numpy()}
            if self.standard_errors is not None:
                columns["standard_error"] = self.standard_errors.flatten().numpy()
            frame = pandas.DataFrame(columns)
        frame.attrs = {"unit": self.attributions.provenance.unit, "output": self.attributions.provenance.output}
        return frame

    def to_dataset(self) -> Any:
        """A `datasets.Dataset` with a row an example: its index in the data set, its label, its weights and errors."""
        import datasets

        columns: dict[str, Any] = {"example": self.places, "label": self.labels, "weights": self.weights.numpy()}
        if self.standard_errors is not None:
            columns["standard_errors"] = self.standard_errors.numpy()
        return datasets.Dataset.from_dict({name: list(values) for name, values in columns.items()})

    def __repr__(self) -> str:
        """Two lines: what it is, and the strongest components."""
        return looks.part_text(self)

    def _repr_html_(self) -> str:
        return looks.part_html(self)


def _again(sizes: Tensor, errors: Tensor, order: Sequence[int]) -> list[float]:
    """How probably each of the strongest is among them again with another seed: it must stay above the next one."""
    following = sizes.argsort(descending=True, stable=True)[len(order) : len(order) + 1]
    if not len(following):
        return [1.0] * len(order)
    bound = float(sizes[order[-1]] + sizes[following[0]]) / 2
    return [_above((float(sizes[i]) - bound), float(errors[i])) for i in order]


def _above(margin: float, error: float) -> float:
    return 0.5 * (1 + math.erf(margin / (math.sqrt(2) * error))) if error > 0 else 1.0
