"""Shell completion: a script made from the parser by shtab, which the shell reads once and asks nobody."""

import argparse

from hf_coar.errors import CoarError

SHELLS = ("bash", "zsh", "fish")
_PATHS = ("data", "out", "folder", "attributions", "model", "config", "export")  # may be files or folders


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell.

    Raises:
        CoarError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise CoarError('completion needs shtab; install it with: pip install "hf_coar[completion]"') from error
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb in verbs.choices.values():
        for action in verb._actions:
            if action.dest in _PATHS:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)
