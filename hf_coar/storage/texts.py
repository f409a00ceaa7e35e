"""Texts that are shown: shortened where they are long, lists cut where there are many, numbers with their nouns."""

from collections.abc import Sequence
from typing import Any


def shortened(text: str, length: int = 60) -> str:
    """A text on one line, cut after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 2].rstrip() + " …"


def first_few(items: Sequence[Any], most: int) -> str:
    """At most so many of some items, and `…` where there are more."""
    return ", ".join(map(str, items[:most])) + (", …" if len(items) > most else "")


def and_more(n_all: int, most: int) -> str:
    """What follows a list of at most so many of all: ` and 5 more`, or nothing where that is all."""
    return f" and {n_all - most} more" if n_all > most else ""


def count(n: int, noun: str) -> str:
    """`1 example`, `2,000 examples`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
