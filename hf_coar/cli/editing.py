"""The verb `edit`: edits of a model by task, and of attributions."""

import argparse
import csv
import inspect
import json
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_coar import api as pipeline
from hf_coar import editing, models
from hf_coar.attributions import Attributions, labelled
from hf_coar.cli import config
from hf_coar.editing import edited as edited_model
from hf_coar.editing.tasks import EditResult, Figures, before_and_after
from hf_coar.errors import CoarError, DataError, UnsatisfiedError
from hf_coar.estimators import PathGradient
from hf_coar.models import outputs
from hf_coar.storage import folders as store

logger = logging.getLogger(__name__)

TASKS = ("forget", "fix", "lift", "match")
_REFITTED = ("forget", "fix", "lift")
_WITHIN = {"forget": "others_within", "fix": "others_within", "lift": "average_within", "match": "clean_within"}


def edit(args: argparse.Namespace) -> str:
    """Save an edited model with its figures, and say how to load it."""
    store.check(args.out, store.MODEL, args.overwrite)
    wanted = [task for task in TASKS if getattr(args, task) is not None]
    sides = [side for side in ("increase", "decrease") if getattr(args, side) is not None]
    if len(wanted) > 1 or (wanted and sides):
        raise CoarError(f"{', '.join(f'--{name}' for name in (*wanted, *sides))} in one edit; give one of them")
    if wanted:
        result = _by_task(args, wanted[0])
    elif not sides:
        raise CoarError("nothing to edit for; give --forget, --fix, --lift or --match, or --increase or --decrease")
    elif (args.n_components, args.rule, args.step) == (None, None, None):
        result = _steered(args)
    else:
        return _unchecked(args)
    result.save(args.out, overwrite=args.overwrite)
    return _told(args, result.model, str(result), result.figures)


def _by_task(args: argparse.Namespace, task: str) -> EditResult:
    """`forget`, `fix`, `lift` or `match` of a model."""
    if args.data is None:
        raise CoarError(f"--{task} needs a model and its data set: hf-coar edit MODEL DATA --{task} … --out FOLDER")
    odd = [name for name in ("reference", "n_components", "rule", "step", "model") if getattr(args, name) is not None]
    if odd:
        flag = f"--{odd[0].replace('_', '-')}"
        raise CoarError(f"{flag} is for edits of attributions; --{task} chooses on examples of its own, leave it out")
    if args.keep_head and task not in _REFITTED:
        flags = ", ".join(f"--{one}" for one in _REFITTED)
        raise CoarError(f"--keep-head is for {flags}; --{task} never touches the last layer, leave it out")
    model, data = pipeline.load(**{**sources(args), "model": args.attributions})
    options: dict[str, Any] = _limits(args, _WITHIN[task]) | _rivals(args)
    if args.keep_head:
        options["refit"] = None
    if task == "forget":
        return editing.forget(model, data, args.forget.removeprefix("label="), **options)
    if task == "fix":
        return editing.fix(model, data, numbered(args.fix), **options)
    if task == "lift":
        return editing.lift(model, data, args.lift, **options)
    _, triggered = pipeline.load(**{**sources(args), "model": model, "data": args.match})
    return editing.match(model, data, triggered, **options)


def _steered(args: argparse.Namespace) -> EditResult:
    """An edit for the examples of attributions, some of which choose and some of which judge."""
    attributions = Attributions.from_pretrained(args.attributions)
    if args.reference is not None:
        raise CoarError("--reference is for edits with --n-components; without it all others are spared")
    model, data = pipeline.reopen(attributions, **sources(args))
    sides = {side: examples(getattr(args, side), side, attributions) for side in ("increase", "decrease")}
    try:
        return editing.steer(
            model, data, **sides, output=outputs.recorded(attributions.provenance.output),
            components=attributions.components, **_limits(args, "others_within"), **_rivals(args, None),
        )  # fmt: skip
    except UnsatisfiedError as error:
        raise CoarError(f"{error}. Or give --n-components, which checks nothing") from error


def _unchecked(args: argparse.Namespace) -> str:
    """So many components by a rule, as they are told; measured on the examples that chose them."""
    attributions = Attributions.from_pretrained(args.attributions)
    sides = {side: examples(getattr(args, side), side, attributions) for side in ("increase", "decrease", "reference")}
    n_components = editing.making.N_COMPONENTS if args.n_components is None else args.n_components
    editing.making.check_sides(attributions, **sides)
    source: Any = attributions
    data: Any = None
    if args.step is None:
        model = pipeline.reopen_model(attributions, **sources(args))
    else:
        editing.stepwise.checked_steps(len(attributions.components), n_components, args.step)
        model, data = pipeline.reopen(attributions, **sources(args))
        source = _attributing_anew(attributions, data, config.imported(args.call))
    rule = args.rule or "welch"
    edited = editing.edit(model, source, n_components=n_components, rule=rule, step=args.step, **sides)
    edited_model.save(edited, args.out, overwrite=args.overwrite)
    figures = _measured(args, attributions, (model, edited), data, sides)
    return _told(args, edited, _said(edited, figures), figures)


def _measured(
    args: argparse.Namespace, attributions: Attributions, pair: tuple[nn.Module, nn.Module], data: Any, sides: dict
) -> Figures | None:
    """On the attributed examples, which say what the edit has done to themselves; None where they are not to be had."""
    try:
        if data is None:
            _, data = pipeline.reopen(attributions, **{**sources(args), "model": pair[0]})
        chosen = {side: sides[side] or [] for side in ("increase", "decrease")}
        return before_and_after(
            *pair, data, attributions.components, **chosen, output=outputs.recorded(attributions.provenance.output)
        )
    except (CoarError, DataError) as error:
        logger.warning("the edit was not measured: %s", error)
        return None


def _said(edited: nn.Module, figures: Figures | None) -> str:
    names = models.record(edited)["edit"]["components"]
    lines = ["ablated:", *[f"  {name}" for name in names]]
    if figures is not None:
        lines += [str(figures).replace("on examples that chose nothing", "on the examples that chose it", 1)]
    return "\n".join(lines)


def _told(args: argparse.Namespace, edited: nn.Module, said: str, figures: Figures | None) -> str:
    snippet = models.load_snippet(edited, str(args.out))
    if args.json:
        found = {"edited": str(args.out), "components": models.record(edited)["edit"]["components"], "load": snippet}
        return json.dumps(found | ({"figures": figures.to_json()} if figures is not None else {}), indent=2)
    return "\n".join([said, f"saved in {args.out}; load it with", f"  {snippet}"])


def _attributing_anew(attributions: Attributions, data: Any, call: Any) -> Any:
    """A function that attributes a model by one pass, on the examples and with the output of these attributions."""
    of = attributions.provenance

    def attribute(model: Any) -> Attributions:
        found = pipeline.attribute(
            model, data, attributions.components, output=of.output, method=PathGradient(rounds=0),
            ablated_fraction=of.ablated_fraction, call=call, seed=of.seed, progress=False,
        )  # fmt: skip
        attributions.identity.check(found.identity)
        return found

    return attribute


# ------------------------------------------------------------------------------------------------------------- flags


def sources(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of model and data, by the keywords of `load`; what they leave out is left to it."""
    keywords = inspect.signature(pipeline.load).parameters
    given = {name: value for name, value in vars(args).items() if name in keywords}
    if given.get("columns"):
        given["columns"] = dict(map(_pair, given["columns"]))
    if given.get("label"):
        given["label"] = _columns(given["label"])
    return {name: value for name, value in given.items() if value is not None and value is not False}


def _columns(word: str) -> str | list[str]:
    """One column, or several between commas; a name that has a comma itself stands in double quotes."""
    found = [column.strip() for column in next(csv.reader([word], skipinitialspace=True))]
    return found[0] if len(found) == 1 else found


def _pair(word: str) -> tuple[str, str]:
    role, equals, column = word.partition("=")
    if not (role and equals and column):
        raise CoarError(f"--columns {word}: write a role and its column, such as prompt=question")
    return role, column


def _limits(args: argparse.Namespace, keyword: str) -> dict[str, float]:
    """What others may lose, by the keyword of the task: 1.5% and 0.015 are the same."""
    word = args.others_within
    if word is None:
        return {}
    try:
        return {keyword: float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)}
    except ValueError as error:
        raise CoarError(f"--others-within {word}: give a share such as 1.5% or 0.015") from error


def _rivals(args: argparse.Namespace, usual: str | None = "quick") -> dict[str, Any]:
    words = args.rivals
    if words is None:
        return {"rivals": usual}
    single = {"none": None, "all": "all", "quick": "quick"}
    return {"rivals": single[words[0]] if len(words) == 1 and words[0] in single else words}


def numbered(words: Sequence[str]) -> list[int]:
    """Indices of examples to fix from words such as `17` and `20-39`."""
    return [index for word in words for index in _range(word, f"--fix {word}: write an index (17) or a range (20-39)")]


def _range(word: str, advice: str) -> range:
    """What `17` or `20-39` means.

    Raises:
        CoarError: with the advice, as it is neither.
    """
    first, dash, last = word.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise CoarError(advice)
    return range(int(first), int(last) + 1)


def examples(words: Sequence[str] | None, side: str, attributions: Attributions) -> list[int] | None:
    """Indices of examples from words such as `17`, `20-39`, `label=3`, `label=three`."""
    if words is None:
        return None
    found: list[int] = []
    for word in words:
        if word.startswith("label="):
            try:
                found += labelled.with_label(attributions, word.removeprefix("label="))
            except CoarError as error:
                raise CoarError(f"--{side} {word}: {error}") from error
        else:
            advice = f"--{side} {word}: write an index (17), a range (20-39) or a label (label=3, label=name)"
            found += _range(word, advice)
    return found
