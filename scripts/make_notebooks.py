"""Three tutorials as notebooks, from the pages in docs/: prose and snippets in turn, to be opened and run cell by cell.

    python scripts/make_notebooks.py          # writes docs/notebooks/*.ipynb; a test compares them with the pages

The pages are the source; a notebook is never edited by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("image_classifier", "text_classifier", "looking")
FOLDER = ROOT / "docs" / "notebooks"
_FENCE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", flags=re.DOTALL | re.MULTILINE)


def notebook(page: str) -> dict[str, Any]:
    """A page of Markdown as a notebook: snippets that run are cells of code, all else is Markdown, without outputs."""
    cells, end = [], 0
    for match in _FENCE.finditer(page):
        cells += [_cell("markdown", page[end : match.start()]), _cell("code", match[1])]
        end = match.end()
    cells = [cell for cell in [*cells, _cell("markdown", page[end:])] if cell["source"]]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str) -> dict[str, Any]:
    more = {"execution_count": None, "outputs": []} if kind == "code" else {}
    # The pages lie a folder higher.
    text = re.sub(r"\]\((?!\w+://|#)", "](../", text) if kind == "markdown" else text
    return {"cell_type": kind, "metadata": {}, "source": text.strip().splitlines(keepends=True), **more}


def text(name: str) -> str:
    """The file of a page's notebook."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all."""
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.ipynb").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
