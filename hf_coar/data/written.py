"""Lists and mappings in a table of text, where they can only stand as they are written: `[1, 2]`, `{"text": ["a"]}`."""

import ast
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from hf_coar.data.columns import is_text
from hf_coar.data.streams import beginning
from hf_coar.errors import DataError
from hf_coar.models.quiet import without_bars
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)

_PEEKED = 64  # first entries that must all be lists or mappings
_BEGINS = re.compile(r"\s*[\[{]")
# Python joins strings that follow each other, and NumPy writes arrays of strings so: ['a' 'b'] is not ['ab'].
_JOINED = re.compile(r"""['"]\s+['"]""")


def read_back(dataset: Any) -> Any:
    """The data set with the columns whose entries are all lists or mappings, as JSON or Python writes them, as such.

    Args:
        dataset: of `datasets`, a stream too, from a file that holds nothing but text.
    """
    first = beginning(dataset, _PEEKED)
    _tell_twice(list(first[0]) if first else [])
    names = [name for name in (first[0] if first else ()) if _all_written([row[name] for row in first])]
    features = None if dataset.features is None else dict(dataset.features)
    names = [name for name in names if features is None or is_text(features[name])]
    if not names:
        return dataset
    from datasets import Dataset, Features

    read = Dataset.from_list([{name: _entry(row[name], name) for name in names} for row in first]).features
    logger.info("lists and mappings are written in %s, and read as such", ", ".join(map(repr, names)))

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _entry(row[name], name) for name in names}

    if features is None:
        return dataset.map(convert)
    with without_bars("datasets"):
        return dataset.map(convert, features=Features({**features, **read}))


def _tell_twice(names: list[str]) -> None:
    """Warns of columns of one name, of which pandas calls the second `label.1`."""
    twice = [name for name in names if (found := re.fullmatch(r"(.+)\.\d+", name)) and found[1] in names]
    if twice:
        name = twice[0].rpartition(".")[0]
        logger.warning(
            "the table has several columns %r: the first one goes by this name, another by %r; name the one that is "
            "meant, or give them names of their own", name, twice[0],
        )  # fmt: skip


def _all_written(entries: list[Any]) -> bool:
    present = [entry for entry in entries if entry is not None]
    return bool(present) and all(isinstance(one, str) and _parsed(one) is not None for one in present)


def _entry(text: str | None, name: str) -> Any:
    found = None if text is None else _parsed(text)
    if found is None and text is not None:
        raise DataError(f"{shortened(repr(text), 60)} in {name!r} is no list or mapping, as the first entries are")
    return found


def _parsed(text: str) -> Any:
    """A list or a mapping; None where the text is none, or could be read in two ways."""
    if not _BEGINS.match(text):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = None if _JOINED.search(text) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list | dict) else None
