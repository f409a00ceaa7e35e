"""Tables of results that are made in pieces: rows of this time take the places of those of the same names."""

from collections.abc import Sequence
from pathlib import Path


def rows_of(path: Path, n_keys: int = 1, section: str | None = None) -> dict[tuple[str, ...], str]:
    """The rows of the first table of a Markdown file, or of the one below a heading, by their first cells."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if section is not None:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = text.splitlines()
    cells = {line: tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines if line.startswith("| ")}
    return {row[:n_keys]: line for line, row in list(cells.items())[1:]}  # without the header


def said(ratio: float, limit: float) -> str:
    """Whether a ratio keeps a limit, as a cell."""
    return "met" if round(ratio, 2) <= limit else "missed"


def write(
    path: Path, title: str, command: str, header: Sequence[str], rows: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """A page with one table; rows that it held before, and that are not made anew, stay.

    Args:
        path: of the page.
        title: its heading.
        command: that makes it.
        header: the line with the columns, and the one below it; columns with `:` at their left end are names of rows.
        rows: lines.
        notes: paragraphs that follow, such as the machine.
    """
    n_keys = header[1].count("|:-")
    new = {tuple(cell.strip() for cell in row.split("|")[1:-1])[:n_keys]: row for row in rows}
    table = [*header, *(rows_of(path, n_keys) | new).values()]
    parts = [f"# {title}", f"    {command}", "\n".join(table), *notes]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
