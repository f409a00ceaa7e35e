"""Other libraries' bars: not shown where they say nothing, as of files of this machine that are read in no time."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bars(of: str) -> Iterator[None]:
    """No bar of "transformers" or "datasets" inside the block; afterwards as before."""
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
