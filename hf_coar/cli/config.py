"""Flags from a YAML file, and back: `--config FILE.yaml`, and the `run.yaml` that every run leaves in its folder."""

import argparse
import difflib
import functools
import os
import reprlib
import runpy
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.runs import workers
from hf_coar.storage import files, folders

RUN = "run.yaml"
_LARGEST = 100_000  # bytes of a file of flags; PyYAML reads some 100 kB a second
_DEEPEST = 5
_VERB, _OUT = "verb", "out"
_OF_THE_CALL = ("config", "json", "dry_run", "worker", "overwrite", "help")  # of this call, not of the run
IMPORT = "import_"  # from the command line only: files may come from elsewhere, and this runs code
_NOT_FLAGS = (_VERB, "run", "config", IMPORT)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The flags: those of the command line, then those of the file that `--config` names, then the defaults.

    Raises:
        CoarError: a file that cannot be read, is for another verb, or has unknown keys or values.
    """
    arguments = with_verb(parser, arguments)
    path = _path(arguments)
    if path is not None and (verb := _verb(parser, arguments)) is not None:
        _apply(verb, _read(path), path)
    return parser.parse_args(arguments)


def with_verb(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """`hf-coar MODEL DATA` without a verb means `run`; a verb that is only misspelled is not taken for a model."""
    verbs = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    two = len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2])
    if not two or arguments[0] in verbs or difflib.get_close_matches(arguments[0], verbs, 1, 0.75):
        return list(arguments)
    return ["run", *arguments]


def _path(arguments: Sequence[str]) -> Path | None:
    return _early(arguments, "--config", type=Path)


def _early(arguments: Sequence[str], flag: str, **settings: Any) -> Any:
    """The value of one flag, before the whole parser can be made."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(flag, dest="found", **settings)
    try:
        return finder.parse_known_args(arguments)[0].found
    except argparse.ArgumentError:
        return None  # the parser itself will say it


_IMPORTED: dict[str, Any] = {}  # what the files of `--import` define, by name


def run_imports(arguments: Sequence[str]) -> None:
    """Run the files that `--import` names, so that what they register and define is known to the flags.

    Raises:
        CoarError: no such file, or one that fails.
    """
    _IMPORTED.clear()
    for path in _early(arguments, "--import", nargs="+", action="extend", type=Path) or ():
        if not path.is_file():
            raise CoarError(f"--import {path}: there is no such file")
        try:
            _IMPORTED.update(runpy.run_path(str(path), run_name=path.stem))
        except CoarError:
            raise
        except Exception as error:  # whatever a user's file may raise
            raise CoarError(f"--import {path}: {type(error).__name__}: {error}") from error


def imported(name: str | None) -> Callable[..., Any] | None:
    """A function that a file of `--import` defines, by its name; None of None.

    A file of flags may name it: nothing runs but what the command line itself imports.

    Raises:
        CoarError: no file defines it.
    """
    if name is None:
        return None
    if not callable(found := _IMPORTED.get(name)):
        known = sorted(key for key, value in _IMPORTED.items() if callable(value) and not isinstance(value, type))
        said = f"they define {', '.join(known)}" if known else "none is given, or it defines none"
        raise CoarError(f"--call {name}: name a function (model, batch) that a file of --import defines; {said}")
    return found


def _verb(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.ArgumentParser | None:
    """The verb's own parser."""
    choices = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return next((choices[word] for word in arguments if word in choices), None)


def flags(verb: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Everything that may stand in a file, by its keyword."""
    return {
        action.dest: action
        for action in verb._actions
        if not isinstance(action, argparse._HelpAction) and action.dest not in _NOT_FLAGS
    }


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.load(_text(path), Loader=_loader())
        if isinstance(values, Mapping):
            return {str(key).replace("-", "_"): value for key, value in values.items()}
    except CoarError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise CoarError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise CoarError(f"--config {path}: this is no YAML: {' '.join(str(error).split())[:300]}") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # such as the 45th of a month
        raise CoarError(f"--config {path}: holds a value that is none: {error}") from error
    raise CoarError(f"--config {path}: expected lines such as `rounds: 8`, and found {type(values).__name__}")


def _text(path: Path) -> str:
    """The content of a plain file of a sane size; a pipe would never end."""
    with open(path, encoding="utf-8", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CoarError(f"--config {path}: this is no plain file")
        if status.st_size > _LARGEST:
            raise CoarError(f"--config {path}: {status.st_size:,} bytes are no flags; at most {_LARGEST:,} are read")
        return file.read()


def _at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # or opening a pipe would wait for its writer


@functools.cache
def _loader() -> Any:
    """YAML as far as flags need it: texts, numbers and lists of them; no tags, no aliases, which can double a value
    with every line, and nothing nested deeply."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            tagged = getattr(event, "tag", None) not in (None, "!")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or tagged:
                problem = "tags (!) and aliases (&, *) have no use here"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
            if self.depth >= _DEEPEST:
                raise yaml.MarkedYAMLError(problem="it is nested deeply", problem_mark=event.start_mark)
            self.depth += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    return Loader


def _apply(verb: argparse.ArgumentParser, values: dict[str, Any], path: Path) -> None:
    """Values of a file become the defaults of a verb."""
    name, known = verb.prog.split()[-1], flags(verb)
    given = values.pop(_VERB, None)
    if given not in (None, name):
        raise CoarError(f"--config {path} is for hf-coar {given}, and this is hf-coar {name}")
    if given and _OUT in known:
        values.setdefault(_OUT, str(path.parent))  # a run's own file: the folder in which it lies, wherever that is now
    unknown = sorted(set(values) - set(known))
    if unknown:
        unknown = [reprlib.repr(key)[1:-1] for key in unknown[:5]]
        close = {key: difflib.get_close_matches(key, known, n=1) for key in unknown}
        told = ", ".join(key + (f" (did you mean {close[key][0]}?)" if close[key] else "") for key in unknown)
        raise CoarError(f"--config {path}: hf-coar {name} has no {told}; it has {', '.join(sorted(known))}")
    for key, value in values.items():
        if value is None:
            continue  # as if it were not there
        action = known[key]
        action.default = _converted(action, value, f"--config {path}: {key}")
        action.required = False
        if not action.option_strings:
            action.nargs = action.nargs or "?"


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A value of a file as the command line would make it."""
    if action.nargs == 0:
        # A switch that is neither on nor off decides by itself.
        if not isinstance(value, bool) and value != action.default:
            raise CoarError(f"{where}: {reprlib.repr(value)} is neither true nor false")
        return value
    if action.nargs in ("+", "*"):
        return [_one(action, entry, where) for entry in (value if isinstance(value, list) else [value])]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool | list | Mapping):
        raise CoarError(f"{where}: {reprlib.repr(value)} is not a single number or word")
    try:
        found = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, OverflowError, argparse.ArgumentTypeError) as error:  # among them numbers of 5,000 digits
        raise CoarError(f"{where}: {_short(value)} is not of type {getattr(action.type, '__name__', '?')}") from error
    if action.choices is not None and found not in action.choices:
        raise CoarError(f"{where}: {_short(value)}; there are {', '.join(map(str, action.choices))}")
    return found


def _short(value: Any) -> str:
    """A value for a message; a number of thousands of digits cannot even be written out."""
    return "this number" if isinstance(value, int) and value.bit_length() > 1000 else reprlib.repr(value)


@contextmanager
def written_back(args: argparse.Namespace) -> Iterator[None]:
    """All flags go into `run.yaml` in the run's folder when the block is over, or was interrupted half-way."""
    try:
        yield
    except KeyboardInterrupt:
        _write(args)
        raise
    _write(args)


def _write(args: argparse.Namespace) -> None:
    out = getattr(args, _OUT, None)
    if out is None or getattr(args, "dry_run", False) or folders.kind_of(out) is None:
        return
    if not workers.processes().is_main_process:
        return
    values = {key: value for key, value in vars(args).items() if key not in (*_OF_THE_CALL, *_NOT_FLAGS, _OUT)}
    files.write_bytes(_free(Path(out), args.verb), text(args.verb, values).encode())


def _free(folder: Path, verb: str) -> Path:
    """`run.yaml`, unless another verb left its own there: then `evaluate.yaml` or whatever the verb is."""
    path = folder / RUN
    try:
        other = path.is_file() and _read(path).get(_VERB) != verb
    except CoarError:
        other = True
    return folder / f"{verb}.yaml" if other else path


def text(verb: str, values: Mapping[str, Any]) -> str:
    """A file for `--config`; flags that were not given are null."""
    import yaml

    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}
    head = f"# hf-coar {verb} --config {RUN} goes on in this folder, with --out elsewhere it does the same again.\n"
    head += "# Flags on the command line win; paths are as they were given.\n"

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # they are not read

    options = {"sort_keys": False, "allow_unicode": True, "default_flow_style": False}
    return head + yaml.dump({_VERB: verb, **plain}, Dumper=Dumper, **options)
