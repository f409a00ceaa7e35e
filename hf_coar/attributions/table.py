"""Tables of components: they print within a terminal, show in a notebook, and become data frames."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_coar.errors import CoarError


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: short, such as `L2 mlp.up 1265`.
        component: the full name, which finds it as well.
        index: of the component; -1 for a head, layer or module.
        weight: of the example, or the mean over several.
        error: its standard error, or None.
        size: mean absolute weight, by which the table is sorted.
        stability: how probably it is among the strongest again with another seed, from 0 to 1; None without errors.
    """

    name: str
    component: str
    index: int
    weight: float
    error: float | None
    size: float
    stability: float | None


class Table(Sequence[Row]):
    """The strongest components, strongest first; a sequence of `Row`."""

    def __init__(self, rows: Sequence[Row], what: str, unit: str, of_several: bool) -> None:
        """Rows, what they are of, the unit of the weights, and whether they are of several examples."""
        self.rows, self.what, self.unit, self.of_several = list(rows), what, unit, of_several

    def __len__(self) -> int:
        """How many rows."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row, or a table of some of them."""
        if isinstance(index, slice):
            return Table(self.rows[index], self.what, self.unit, self.of_several)
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        """All rows."""
        return iter(self.rows)

    @property
    def indices(self) -> list[int]:
        """Indices of the components, as `ablate(without=…)` and `without` take them."""
        return [row.index for row in self.rows]

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Head and cells as text."""
        digits = decimals([row.size for row in self.rows])
        head = ["component", "mean weight" if self.of_several else "weight"]
        head += ["± s.e."] if any(row.error is not None for row in self.rows) else []
        head += ["mean size"] if self.of_several else []
        head += ["stays"] if any(row.stability is not None for row in self.rows) else []
        cells = []
        for row in self.rows:
            line = [row.name, f"{row.weight:+.{digits}f}".replace("-", "−")]
            line += [f"{row.error:.{digits}f}"] if row.error is not None else []
            line += [f"{row.size:.{digits}f}"] if self.of_several else []
            line += [f"{100 * row.stability:.0f} %"] if row.stability is not None else []
            cells.append(line)
        return head, cells

    def __repr__(self) -> str:
        """A table of text."""
        head, cells = self.columns()
        lines = aligned([head, *cells])
        noted = ["stays: how probably it is among these again with another seed"] if head[-1] == "stays" else []
        return "\n".join([f"{self.what}, the {len(self)} strongest, in {self.unit}", *lines, *noted])

    def _repr_html_(self) -> str:
        head, cells = self.columns()
        top = "".join(
            f"<th style='text-align:{'left' if not i else 'right'}'>{html.escape(cell)}</th>"
            for i, cell in enumerate(head)
        )
        body = ""
        for row, line in zip(self.rows, cells, strict=True):
            inner = "".join(f"<td style='text-align:right'>{html.escape(cell)}</td>" for cell in line[1:])
            name = f"<td style='text-align:left' title='{html.escape(row.component)}'>{html.escape(row.name)}</td>"
            body += f"<tr>{name}{inner}</tr>"
        said = html.escape(f"{self.what}, the {len(self)} strongest, in {self.unit}")
        return f"<table><caption style='text-align:left'>{said}</caption><tr>{top}</tr>{body}</table>"

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [asdict(row) for row in self.rows]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row a component.

        Raises:
            CoarError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise CoarError("data frames need pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_json())


def decimals(values: Sequence[float]) -> int:
    """Decimals that give the largest of some numbers three significant ones."""
    largest = max(map(abs, values), default=0.0)
    return min(9, max(2, 2 - math.floor(math.log10(largest)))) if 0 < largest < math.inf else 2


def aligned(lines: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Cells in columns, the first set to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    first, *others = widths
    return [
        gap.join([line[0].ljust(first), *(cell.rjust(n) for cell, n in zip(line[1:], others, strict=True))]).rstrip()
        for line in lines
    ]
