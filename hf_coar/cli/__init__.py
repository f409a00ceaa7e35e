"""The command line: verbs (`verbs`), their flags (`flags`), flags from a file (`config`), the screen (`terminal`)."""

import sys
from collections.abc import Sequence

from hf_coar.cli import config, terminal
from hf_coar.cli.flags import parser
from hf_coar.errors import CoarError
from hf_coar.runs import workers
from hf_coar.storage import folders, interrupts
from hf_coar.storage.interrupts import INTERRUPTED

__all__ = ["INTERRUPTED", "USER_ERROR", "main", "parser"]

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, 2 for an error that the user can put right, 130 for Ctrl-C.
    """
    verb, args = "hf-coar", None
    try:
        interrupts.raise_again()
        terminal.log_to_screen()
        words = sys.argv[1:] if arguments is None else list(arguments)
        config.run_imports(words)
        args = config.parse(parser(), words)
        verb = f"hf-coar {args.verb}"
        with config.written_back(args):
            result = args.run(args)
        speaks = workers.processes().is_main_process
    except CoarError as error:
        terminal.write(f"{terminal.red(f'{verb}:', sys.stderr)} {error}\n", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        kept = folders.holds_run(getattr(args, "out", None))
        rest = "run the same command again to go on from here" if kept else "nothing was written"
        sys.stderr.write(f"\n{verb}: interrupted; {rest}\n")
        return INTERRUPTED
    finally:
        interrupts.ignore()
    if speaks:
        terminal.write(f"{result}\n", sys.stdout)
    return 0
