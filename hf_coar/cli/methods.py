"""The estimator that the flags ask for: any registered one, with any of its fields."""

import argparse
import re
from dataclasses import MISSING, fields
from typing import Any

from hf_coar.errors import CoarError
from hf_coar.estimators import ESTIMATORS, Estimator

# Fields that have a flag of their own; `--set` reaches all of them.
FLAGGED = ("rounds", "reliability", "max_rounds", "n_masks", "solver", "prior")


def add_flags(verb: argparse._ActionsContainer) -> None:
    """`--method`, `--set` and the flags of the fields that are wanted most, explained by their own docstrings."""
    verb.add_argument(
        "--method", default="auto", metavar="METHOD", choices=("auto", *ESTIMATORS.names()),
        help=f"{', '.join(ESTIMATORS.names())}; auto (the default) is path_gradient, or regression where no gradient "
        "gets through the model",
    )  # fmt: skip
    for name in FLAGGED:
        owner, text, default = _explained(name)
        shown = "" if default in (None, MISSING) else f" (default {default})"
        verb.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", type=value_of, help=f"of {owner}: {text}{shown}"
        )
    verb.add_argument(
        "--set", nargs="+", action="extend", metavar="FIELD=VALUE", help="any field of the method, such as delta=no"
    )


def chosen(args: argparse.Namespace) -> str | Estimator:
    """The estimator asked for, or "auto".

    Raises:
        CoarError: a field that the method has not, or a value that it does not take.
    """
    given = {name: value for name in FLAGGED if (value := getattr(args, name)) is not None}
    for entry in args.set or ():
        name, equals, text = entry.partition("=")
        if not equals:
            raise CoarError(f"--set {entry}: write a field and its value, such as --set check_masks=32")
        given[name.strip().replace("-", "_")] = text
    if args.method == "auto" and not given:
        return "auto"
    name = "path_gradient" if args.method == "auto" else args.method
    known = [entry.name for entry in fields(ESTIMATORS[name])]
    # What is no field of the regression itself is its prior's.
    if "prior" in given and "prior" in known:
        of_prior = {key: given.pop(key) for key in list(given) if key not in known}
        given["prior"] = _made(str(given["prior"]), of_prior)
    return _made(name, given)


def _made(name: str, given: dict[str, Any]) -> Estimator:
    known = [entry.name for entry in fields(ESTIMATORS[name])]
    if odd := [key for key in given if key not in known]:
        raise CoarError(_elsewhere(odd[0], given[odd[0]], name, known))
    made = ESTIMATORS[name](**{key: value_of(value) for key, value in given.items()})
    if idle := [key for key in given if key not in made.settings()]:  # which would be ignored without a word
        raise CoarError(f"--{idle[0].replace('_', '-')} {given[idle[0]]} has no effect on {made!r}; add --rounds auto")
    return made


def _elsewhere(field: str, value: Any, method: str, known: list[str]) -> str:
    owners = [name for name, one in ESTIMATORS.items() if field in [entry.name for entry in fields(one)]]
    flag = f"--{field.replace('_', '-')} {value}" if field in FLAGGED else f"--set {field}={value}"
    if owners:
        return f"{flag} is of another method; add --method {owners[0]}"
    return f"{flag}: {method} has no such field; it has {', '.join(known) or 'none'}"


def value_of(text: Any) -> Any:
    """A number, `yes` or `no`, nothing (`none`), or the word itself."""
    if not isinstance(text, str):
        return text
    words = {"yes": True, "true": True, "no": False, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _explained(field: str) -> tuple[str, str, Any]:
    """The first method that has a field, what its docstring says of it in a line, and its default."""
    for name, estimator in ESTIMATORS.items():
        for entry in fields(estimator):
            if entry.name == field:
                return name, _first_clause(estimator.__doc__ or "", field), entry.default
    raise CoarError(f"no method has a field {field!r}")


def _first_clause(docstring: str, field: str) -> str:
    """What the section `Attributes` of a docstring says first of a field."""
    found = re.search(rf"^ {{8}}{field}: (.*?)(?=\n {{8}}\w+: |\n\n|\Z)", docstring, re.M | re.S)
    text = " ".join(found[1].split()) if found else ""
    return re.split(r"[.;:] ", text.rstrip(". "))[0].replace("%", "%%").replace("`", "")
