"""What concerns the screen: colour on a terminal only, messages beside progress bars."""

import logging
import os
import sys
from typing import TextIO

from hf_coar.storage.escaping import for_terminal

_RED, _BOLD, _FAINT, _OFF = "\033[31m", "\033[1m", "\033[2m", "\033[0m"


def colours(stream: TextIO) -> bool:
    """Whether to write in colour: on a terminal, unless `NO_COLOR` is set (https://no-color.org) or it knows none."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def red(text: str, stream: TextIO) -> str:
    """The text in red."""
    return _painted(text, _RED, stream)


def bold(text: str, stream: TextIO) -> str:
    """The text in bold."""
    return _painted(text, _BOLD, stream)


def faint(text: str, stream: TextIO) -> str:
    """The text in grey."""
    return _painted(text, _FAINT, stream)


def _painted(text: str, code: str, stream: TextIO) -> str:
    return f"{code}{text}{_OFF}" if colours(stream) else text


def write(text: str, stream: TextIO) -> None:
    """Write a text whose names may come from anybody: what would drive the terminal is spelled out."""
    stream.write(for_terminal(text, paint=colours(stream)))


class _BesideProgressBars(logging.Handler):
    """Writes above the progress bars instead of through them; a warning that several steps have, once a command."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = for_terminal(self.format(record))
        if record.levelno > logging.INFO:
            if text in self.warned:
                return
            self.warned.add(text)
        tqdm.write(text if record.levelno > logging.INFO else faint(text, sys.stderr), file=sys.stderr)


def log_to_screen() -> None:
    """What the package has to say goes to standard error, once however often this is called; a command begins."""
    logger = logging.getLogger("hf_coar")
    if not logger.handlers:
        logger.addHandler(_BesideProgressBars())
        logger.setLevel(logging.INFO)
    for handler in logger.handlers:
        if isinstance(handler, _BesideProgressBars):
            handler.warned.clear()
