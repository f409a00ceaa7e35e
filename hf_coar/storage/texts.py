"""Texts that are shown: shortened where they are long."""


def shortened(text: str, length: int = 60) -> str:
    """A text on one line, cut after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 2].rstrip() + " …"
