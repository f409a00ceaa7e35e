"""The command line: one small function a verb; flags are spelled as the keywords of the functions they call."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_coar import (
    __version__,
    allowance,
    budget,
    demo,
    editing,
    engine,
    evaluation,
    folders,
    models,
    outputs,
    pipeline,
    workers,
)
from hf_coar import edited as edited_model
from hf_coar.attributions import Attributions
from hf_coar.baselines import BASELINES
from hf_coar.components import GRANULARITIES, Components, find_components
from hf_coar.data import Chunks, rows
from hf_coar.errors import CoarError
from hf_coar.path_gradient import PathGradient
from hf_coar.regression import Regression
from hf_coar.solvers import ARD, Lasso, Ridge

USER_ERROR, INTERRUPTED = 2, 130
_SOLVERS = {"ridge": Ridge, "lasso": Lasso, "ard": ARD}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0, 2 for an error that the user can put right, 130 for Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    _log_to_terminal()
    try:
        result = args.run(args)
        speaks = workers.processes().is_main_process
    except CoarError as error:
        sys.stderr.write(f"hf-coar {args.verb}: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"\nhf-coar {args.verb}: interrupted; run the same command again to go on from here\n")
        return INTERRUPTED
    if speaks:
        sys.stdout.write(f"{result}\n")
    return 0


class _BesideProgressBars(logging.Handler):
    """Writes above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_terminal() -> None:
    logger = logging.getLogger("hf_coar")
    if not logger.handlers:
        logger.addHandler(_BesideProgressBars())
        logger.setLevel(logging.INFO)


# ------------------------------------------------------------------------------------------------------------ verbs


def _components(args: argparse.Namespace) -> str:
    model = models.load_architecture(args.model, args.revision, args.trust_remote_code)
    components = _found(model, args)
    return json.dumps(components.tree_json(), indent=2) if args.json else components.tree()


def _attribute(args: argparse.Namespace) -> str:
    model, data = _loaded(args)
    if args.dry_run:
        return _planned(args, model, data)
    with engine.running(**_running(args)):
        attributions = pipeline.attribute(
            model, data, _found(model, args), output=args.output, method=_method(args),
            ablated_fraction=args.ablated_fraction, seed=args.seed, out=args.out, budget=args.budget,
        )  # fmt: skip
    summary = {
        "attributions": str(args.out),
        "n_examples": len(attributions),
        "n_components": len(attributions.components),
        "cost": attributions.config["cost"],
    }
    if args.json:
        return json.dumps(summary, indent=2)
    return (
        f"{summary['n_examples']} examples × {summary['n_components']} components, saved in {args.out}\n"
        f"next: hf-coar evaluate {args.out}"
    )


def _planned(args: argparse.Namespace, model: Any, data: Any) -> str:
    """What `attribute` would do: units, processes, cost; nothing is written."""
    chunks, team = Chunks(data), workers.team(args.worker)
    _, first = chunks.at(0).read().pieces[0]
    n_examples = chunks.at(len(chunks) - 1).stop if chunks.count is not None else None
    if n_examples is None:
        raise CoarError("the number of examples of a stream is not known beforehand; try without --streaming")
    components = _found(model, args)
    method = _method(args) or PathGradient()
    if args.budget is not None:
        passes, timed = allowance.parse(args.budget)
        if timed:
            raise CoarError(f"--budget {args.budget!r} is timed when the run begins; give forward passes to --dry-run")
        method = allowance.within(method, passes, args.ablated_fraction, len(components))
    planned = budget.budget(
        model, rows(first, 0, 1), n_examples, len(components), method, args.ablated_fraction, args.batch_size,
        team.count,
    )  # fmt: skip
    if args.json:
        return json.dumps({**vars(planned), "n_units": planned.n_units, "worker": team.index}, indent=2)
    return f"{planned}\nthis is     process {team.index} of {team.count}; nothing was run"


def _evaluate(args: argparse.Namespace) -> str:
    attributions = Attributions.from_pretrained(args.attributions)
    model, data = _loaded(_with_sources(args, attributions))
    report = evaluation.evaluate(
        attributions, model, data, fractions=args.fractions, n_masks=args.n_masks, seed=args.seed, out=args.out
    )
    if Path(args.attributions).is_dir() and engine.processes().is_main_process:
        folders.add_evaluation(args.attributions, report)
    return json.dumps(report.to_json(), indent=2) if args.json else str(report)


def _edit(args: argparse.Namespace) -> str:
    attributions = Attributions.from_pretrained(args.attributions)
    args = _with_sources(args, attributions)
    model = models.load_model(args.model, args.revision, args.trust_remote_code)
    sides = {side: _examples(getattr(args, side), side, attributions) for side in ("increase", "decrease", "reference")}
    edited = editing.edit(model, attributions, n_components=args.n_components, **sides)
    edited_model.save(edited, args.out)
    snippet = models.load_snippet(edited, str(args.out))
    ablated = models.record(edited)["edit"]["components"]
    if args.json:
        return json.dumps({"edited": str(args.out), "components": ablated, "load": snippet}, indent=2)
    return "\n".join(
        ["ablated:", *[f"  {name}" for name in ablated], f"saved in {args.out}; load it with", f"  {snippet}"]
    )


def _push(args: argparse.Namespace) -> str:
    settings = {"private": True if args.private else None, "create_pr": args.create_pr}
    settings |= {"commit_message": args.commit_message} if args.commit_message else {}
    if (Path(args.folder) / edited_model.RECORD).is_file():
        address = edited_model.push_to_hub(args.folder, args.repo_id, **settings)
    else:
        address = folders.push_folder(args.folder, args.repo_id, dtype=args.dtype, **settings)
    return json.dumps({"commit": address}, indent=2) if args.json else f"pushed: {address}"


def _demo(args: argparse.Namespace) -> str:
    report = demo.run(args.out, args.forget)
    return json.dumps(report.figures, indent=2) if args.json else report.text


def _loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    return pipeline.load(
        args.model, args.data, split=args.split, revision=args.revision, data_revision=args.data_revision,
        batch_size=args.batch_size, streaming=args.streaming, max_length=args.max_length,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def _found(model: Any, args: argparse.Namespace) -> Components:
    return find_components(model, args.granularity, args.include, args.exclude)


def _method(args: argparse.Namespace) -> Any:
    """The estimator asked for; None where none was, so that `attribute` takes its default."""
    rounds = {} if args.rounds is None else {"rounds": args.rounds}
    if args.method is None and not rounds:
        return None
    if args.method == "regression":
        prior = PathGradient(**rounds) if args.prior else None
        return Regression(n_masks=args.n_masks, solver=_SOLVERS[args.solver](), prior=prior)
    return BASELINES[args.method]() if args.method in BASELINES else PathGradient(**rounds)


def _with_sources(args: argparse.Namespace, attributions: Attributions) -> argparse.Namespace:
    """Model and data as the attributions name them, unless they are given."""
    model, data = attributions.config["model"], attributions.config["data"]
    known = {"model": model.get("id"), "revision": model.get("revision"), "data": data.get("id")}
    known |= {"split": data.get("split"), "data_revision": data.get("revision")}
    filled = {name: getattr(args, name, None) or value for name, value in known.items()}
    for name in ("model", "data") if hasattr(args, "data") else ("model",):
        if filled[name] is None:
            raise CoarError(f"the attributions do not say where their {name} came from; give --{name}")
    return argparse.Namespace(**{**vars(args), **filled})


def _examples(words: Sequence[str] | None, side: str, attributions: Attributions) -> list[int] | None:
    """Indices of examples from words such as `17`, `20-39`, `label=3`."""
    if words is None:
        return None
    found: list[int] = []
    for word in words:
        first, _, last = word.partition("-")
        if word.startswith("label="):
            wanted = word.removeprefix("label=")
            indices = (attributions.labels == int(wanted)).nonzero().flatten().tolist() if wanted.isdigit() else []
            if not indices:
                present = sorted(set(attributions.labels.tolist()))
                raise CoarError(f"--{side} {word}: no such label; the examples have {present[:30]}")
            found += indices
        elif first.isdigit() and (last.isdigit() or not last):
            found += range(int(first), int(last or first) + 1)
        else:
            raise CoarError(f"--{side} {word}: write an index (17), a range (20-39) or a label (label=3)")
    return found


# ------------------------------------------------------------------------------------------------------------ flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-coar", description="Component attribution by regression (COAR) for any Hugging Face or timm model."
    )
    parser.add_argument("--version", action="version", version=f"hf-coar {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _verb(
        verbs,
        "components",
        _components,
        "list the components of a model, from its configuration alone",
        "hf-coar components timm/resnet18.a1_in1k",
    )
    _model_flags(verb)
    _component_flags(verb)

    verb = _verb(
        verbs, "attribute", _attribute, "attribute a model's outputs on a data set to its components",
        "hf-coar attribute timm/resnet18.a1_in1k imagenet-1k --split 'validation[:2000]' --out runs/resnet18",
    )  # fmt: skip
    _model_flags(verb)
    verb.add_argument("data", help="Hub id, folder or file of the data set")
    _data_flags(verb)
    _component_flags(verb)
    _method_flags(verb)
    _running_flags(verb)
    verb.add_argument("--dry-run", action="store_true", help="say what it would cost and who would do what, and stop")

    verb = _verb(
        verbs, "evaluate", _evaluate, "compare predictions with the model's outputs under fresh masks",
        "hf-coar evaluate runs/resnet18 --fractions 0.05 0.0125",
    )  # fmt: skip
    _attributions_flags(verb)
    verb.add_argument("--data", help="Hub id, folder or file of the data set; by default as attributed")
    _data_flags(verb)
    verb.add_argument(
        "--fractions", type=float, nargs="+", default=(0.05, 0.0125), help="ablated fractions to judge at"
    )
    verb.add_argument("--n-masks", type=int, default=100, help="masks a fraction (default %(default)s)")
    verb.add_argument("--seed", type=int, default=1, help="of the masks; not that of the fit (default %(default)s)")
    verb.add_argument("--out", help="folder of the run, which resumes")

    verb = _verb(
        verbs, "edit", _edit, "save a copy of the model in which a few components are ablated",
        "hf-coar edit runs/resnet18 --decrease label=3 --n-components 20 --out edited",
    )  # fmt: skip
    _attributions_flags(verb)
    targets = "examples as indices (17), ranges (20-39) or labels (label=3)"
    verb.add_argument("--increase", nargs="+", metavar="E", help=f"raise the outputs of these: {targets}")
    verb.add_argument("--decrease", nargs="+", metavar="E", help=f"lower the outputs of these: {targets}")
    verb.add_argument("--reference", nargs="+", metavar="E", help="leave the outputs of these; all others by default")
    verb.add_argument("--n-components", type=int, default=10, help="how many to ablate (default %(default)s)")
    verb.add_argument("--out", required=True, help="folder for the edited model")

    verb = _verb(
        verbs, "push", _push, "upload attributions or an edited model to the Hub, with a card",
        "hf-coar push runs/resnet18 user/resnet18-attributions",
    )  # fmt: skip
    verb.add_argument("folder", help="made by hf-coar attribute or edit; a folder pictures/ in it goes onto the card")
    verb.add_argument("repo_id", help="user/name on the Hub; made if there is none")
    verb.add_argument("--private", action="store_true", help="if it is made")
    verb.add_argument("--commit-message", help="first line of the commit")
    verb.add_argument("--create-pr", action="store_true", help="propose the commit instead of making it")
    verb.add_argument("--dtype", choices=("float32", "float16"), help="of the attributions (default float32)")

    verb = _verb(verbs, "demo", _demo, "the whole job on an embedded model and data", "hf-coar demo --out coar-demo")
    verb.add_argument("--out", default="coar-demo", help="folder for everything made (default %(default)s)")
    verb.add_argument("--forget", default=demo.FORGOTTEN, help="class to forget (default %(default)s)")
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], str], what: str, example: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a timm or transformers model")
    _source_flags(parser)


def _attributions_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("attributions", help="folder or Hub id of attributions")
    parser.add_argument("--model", help="Hub id or folder of the model; by default as attributed")
    _source_flags(parser)


def _source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="such as 'validation[:2000]'")
    parser.add_argument("--data-revision", help="branch, tag or commit of the data set")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a batch (default %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read the data while running")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens at which texts are cut (default %(default)s)"
    )


def _running_flags(parser: argparse.ArgumentParser) -> None:
    """What changes speed only."""
    parser.add_argument("--worker", metavar="I/N", help="this is worker I (from 0) of N that share the folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="compute in lower precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile for masked passes")
    parser.add_argument("--masks-together", type=int, default=1, metavar="K", help="masks in one forward pass")
    parser.add_argument("--strict", action="store_true", help="an example that cannot be read is an error")


def _running(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("worker", "dtype", "compile", "masks_together", "strict")}


def _component_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--granularity", choices=GRANULARITIES, default="unit", help="(default %(default)s)")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="only modules that match")
    parser.add_argument("--exclude", nargs="+", metavar="GLOB", help="no modules that match")


def _method_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="margin", help=f"one of {', '.join(outputs.names())} (default %(default)s)")
    parser.add_argument(
        "--method", choices=("path_gradient", "regression", *BASELINES),
        help="by default path_gradient, or regression where no gradient gets through the model",
    )  # fmt: skip
    parser.add_argument("--budget", help="forward passes an example, or a time ('20 min'): decides rounds or masks")
    parser.add_argument("--rounds", type=int, help=f"of path_gradient (default {PathGradient().rounds})")
    parser.add_argument(
        "--solver", choices=tuple(_SOLVERS), default="ridge", help="of regression (default %(default)s)"
    )
    parser.add_argument("--prior", choices=("path_gradient",), help="regression: begin from these attributions")
    parser.add_argument("--n-masks", type=int, default=5000, help="of regression (default %(default)s)")
    parser.add_argument("--ablated-fraction", type=float, default=0.05, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--out", required=True, help="folder of the run, which resumes")
