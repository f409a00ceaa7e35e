"""JSON files whose rows stand inside something else: `{"version": …, "data": [rows]}`, and SQuAD's paragraphs there."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def rows_in(path: Path, largest: int) -> str | None:
    """The field of a JSON file that holds its rows, where the file is one mapping and one list of mappings is in it.

    Args:
        path: of the file.
        largest: bytes; larger files, and those of lines, are left as they are.
    """
    if path.suffix.lower() != ".json" or path.stat().st_size > largest:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # lines, or damaged: whoever reads it says so
        return None
    entries = found.items() if isinstance(found, Mapping) else ()
    lists = [name for name, value in entries if isinstance(value, list) and value and isinstance(value[0], Mapping)]
    others = [value for _, value in entries if isinstance(value, list | Mapping)]
    return lists[0] if len(lists) == len(others) == 1 else None


def unnested(dataset: Any) -> Any:
    """A data set of articles with paragraphs of questions, as SQuAD's own files have them, as one of questions."""
    if set(dataset.column_names or ()) != {"title", "paragraphs"}:
        return dataset
    from datasets import Dataset

    return Dataset.from_list(list(_questions(dataset)))


def _questions(articles: Any) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked.get("answers") or []
                of = {name: [one[name] for one in answers] for name in ("text", "answer_start")}
                row = {"title": article["title"], "context": paragraph["context"], "question": asked["question"]}
                yield {**row, "answers": of}
