"""Streams of examples, which may break off wherever they are read: what is taken of one, and what is said then."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from hf_coar.errors import CoarError, DataError
from hf_coar.models.quiet import without_errors

_END = object()


def unbroken(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a stream; where it breaks off, a `DataError` that says after how many."""
    count, left = 0, iter(rows)
    try:
        while True:
            with without_errors("datasets"):
                row = next(left, _END)
            if row is _END:
                return
            yield row
            count += 1
    except CoarError:
        raise
    except Exception as error:  # a reader's, a decoder's or a network's own family
        now = "what is finished is kept, run the same again" if count else "see that what it is read from is whole"
        raise DataError(f"the stream of examples broke off after {count}: {first_line(error)}; {now}") from error


def beginning(rows: Iterable[Any], count: int) -> list[Any]:
    """The first rows, at most `count` of them.

    Raises:
        DataError: they break off before, as where a file that is read only now is none of its kind.
    """
    return list(itertools.islice(unbroken(rows), count))


def first_line(error: Exception) -> str:
    """The family of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
