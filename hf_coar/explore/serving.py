"""Serving the explorer: `launch` opens attributions and shows the page until Ctrl-C."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_coar.attributions import Attributions
from hf_coar.errors import CoarError
from hf_coar.explore import guard, style
from hf_coar.explore.measuring import measured_rows
from hf_coar.explore.page import Page, gradio, known
from hf_coar.explore.source import Source, open_source
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output, OutputFunction

_MOST_WAITING = 64  # events in the queue; more are told to come back

logger = logging.getLogger(__name__)


class Address(str):
    """Where the explorer is served, such as `http://127.0.0.1:7860/`; `close()` ends it."""

    close: Callable[[], None]


def launch(
    attributions: str | Path | Attributions,
    model: Any = None,
    data: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    share: bool = False,
    *,
    hosts: Sequence[str] = (),
    block: bool = True,
    output: Output | OutputFunction | None = None,
    call: Call | None = None,
) -> str:
    """Serve the explorer of some attributions.

    Args:
        attributions: folder or Hub id, or loaded.
        model: Hub id, folder or loaded; by default as the attributions name it.
        data: Hub id, folder or file, or loaded (batches are held in memory); by default as the attributions name it.
        revision: of the model: branch, tag or commit.
        trust_remote_code: run code that comes with the model.
        host: "127.0.0.1" for this machine only, "0.0.0.0" for everybody who can reach it.
        port: by default the first free one from 7860 on.
        open_browser: open the page.
        share: also through a public address of Gradio's for some days.
        hosts: further names under which it may be asked for, such as that of a proxy in front of it.
        output: that was attributed, where it is not registered.
        call: that the model was attributed with, where it was one of somebody's own.
        block: return only after Ctrl-C; without it the address has a `close()`.

    Returns:
        The address.

    Raises:
        CoarError: Gradio is not installed, the port is taken, or the attributions, model or data cannot be opened.
        ModelMismatchError: another model than was attributed.
        DataError: other data than were attributed.
    """
    gr = gradio()
    page = Page(source := open_source(attributions, model, data, revision, trust_remote_code, output, call))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["monospace"])
    door = guard.Door.of(host, hosts, share, notebook=gr.utils.ipython_check())
    page.blocks.queue(max_size=_MOST_WAITING)
    try:
        _, local, public = page.blocks.launch(
            server_name=host, server_port=port, inbrowser=open_browser, share=share, quiet=True,
            prevent_thread_lock=True, theme=theme, css=style.CSS, footer_links=[], show_error=True, ssr_mode=False,
            max_file_size=guard.MOST_UPLOADED, app_kwargs=guard.Guard.settings(door),
            **known(page.blocks.launch, num_workers=0),
        )  # fmt: skip
    except OSError as error:
        raise CoarError(f"cannot serve at {host}:{port or '7860 …'}: {error}; give another port") from error
    address = Address(public or local)
    closed = threading.Event()
    warming = threading.Thread(target=_warm, args=(source, closed))
    warming.start()

    def close() -> None:
        closed.set()
        page.blocks.close()
        warming.join()

    address.close = close
    if share:
        logger.warning("explorer: whoever knows %s can use this machine to run the model, until Ctrl-C", address)
    # What Gradio says on Ctrl-C is not the caller's output.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            with contextlib.suppress(KeyboardInterrupt):
                logger.info("explorer: %s (Ctrl-C ends it)", address)
                if block:
                    page.blocks.block_thread()
        finally:
            if block:  # Gradio does it too, unless Ctrl-C came before it began to wait
                close()
    return address


def _warm(source: Source, closed: threading.Event) -> None:
    """What every visitor needs, while nobody waits for it: predictions, a batch at a time, and sizes of weights."""
    try:
        source.sizes()
        for chunk in source.chunks(measured_rows(source)):
            if closed.is_set() or not threading.main_thread().is_alive():  # the program ends
                return
            source.predictions(chunk)
    except CoarError as error:  # whoever looks is told
        logger.debug("explorer: %s", error)
