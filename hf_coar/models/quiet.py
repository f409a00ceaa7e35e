"""Other libraries on the screen: no bars of what is read in no time, no lines of errors that are told by ours."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bars(of: str) -> Iterator[None]:
    """No bar of "transformers" or "datasets" inside the block; afterwards as the caller had it."""
    if of == "datasets":
        import datasets

        shown = not datasets.are_progress_bars_disabled()
        hide, show = datasets.disable_progress_bars, datasets.enable_progress_bars
    else:
        from transformers.utils import logging

        shown, hide, show = logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar
    hide()
    try:
        yield
    finally:
        if shown:
            show()


@contextmanager
def without_errors(of: str) -> Iterator[None]:
    """No line of an error that a library logs inside the block and then raises, as it is to be told once.

    Where nothing is raised, the lines are shown when the block ends.
    """
    held: list[tuple[logging.Handler, logging.LogRecord]] = []
    handlers = list(logging.getLogger(of).handlers)
    filters = [_Holding(handler, held) for handler in handlers]
    for handler, one in zip(handlers, filters, strict=True):
        handler.addFilter(one)
    try:
        yield
    except Exception:
        held.clear()
        raise
    finally:
        for handler, one in zip(handlers, filters, strict=True):
            handler.removeFilter(one)
        for handler, record in held:
            handler.handle(record)


class _Holding(logging.Filter):
    """Keeps errors from a handler, for later."""

    def __init__(self, handler: logging.Handler, held: list[tuple[logging.Handler, logging.LogRecord]]) -> None:
        super().__init__()
        self.handler, self.held = handler, held

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the handler gets the record now."""
        if record.levelno < logging.ERROR:
            return True
        self.held.append((self.handler, record))
        return False
