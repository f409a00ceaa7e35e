"""The flags of every verb, spelled as the keywords of the functions that they call."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hf_coar import __version__, demo, editing, masking
from hf_coar.attributions import looking
from hf_coar.cli import completion, config, methods, showing, terminal, verbs
from hf_coar.components import GRANULARITIES
from hf_coar.models import outputs
from hf_coar.runs.tracking import TRACKERS
from hf_coar.storage.escaping import for_terminal

_TARGETS = "examples as indices (17), ranges (20-39) or labels (label=3, label=three)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in two lines, and not after a screenful of usage."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (.*)", message)
        words = re.findall(r"invalid choice: '(.*?)'", message)
        words += [word for word in found[1].split() if word.startswith("-")] if found else []
        known = [option for action in self._actions for option in action.option_strings]
        known += [str(choice) for action in self._actions for choice in action.choices or ()]
        close = [match[0] for word in words if (match := difflib.get_close_matches(word, known, n=1))]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        name = terminal.red(f"{self.prog}:", sys.stderr)
        self.exit(2, f"{name} {for_terminal(message + hint)}\nall flags, with an example: {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, except that a verb reports its unknown flags itself, and knows what is close to them."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and not self._subparsers:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines of the flags' own, in two columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]  # its --no-… goes without saying, where most flags have none
        return super()._format_action_invocation(action)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.run(args)` runs the verb."""
    whole = _Parser(
        prog="hf-coar", description="Component attribution by regression (COAR) for any Hugging Face or timm model."
    )
    whole.add_argument("--version", action="version", version=f"hf-coar {__version__}")
    each = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_run, _components, _attribute, _evaluate, _show, _edit, _explore, _push, _demo):
        add(each)
    _completion(each, whole)
    return whole


# ------------------------------------------------------------------------------------------------------------ verbs


def _run(each: Any) -> None:
    verb = _verb(
        each, "run", verbs.run, "attribute within a minute, evaluate, report: what `hf-coar MODEL DATA` alone does",
        "hf-coar run timm/resnet18.a1_in1k imagenet-1k", "MODEL DATA [flags]",
    )  # fmt: skip
    _model_flags(verb)
    verb.add_argument("data", help="Hub id, folder or file of the data set")
    _data_flags(verb)
    _component_flags(verb)
    _ablation_flags(verb)
    _method_flags(verb, "folder of the run, which resumes (default runs/MODEL-DATA)", budget="40 s")
    _running_flags(verb)
    _overwrite_flag(verb)


def _show(each: Any) -> None:
    verb = _verb(
        each, "show", showing.show, "show attributions in the terminal: the strongest components, of whatever you name",
        "hf-coar show runs/resnet18 --component 'stage3.1 conv2 7'", "ATTRIBUTIONS [flags]",
    )  # fmt: skip
    verb.add_argument("attributions", help="folder or Hub id of attributions")
    verb.add_argument("--example", type=int, metavar="N", help="of one example, by its row")
    verb.add_argument("--label", help="of the examples of a class, by name or number")
    verb.add_argument("--component", metavar="NAME", help="one component over all examples; or a layer, matrix, head")
    verb.add_argument("--by", choices=looking.BY, default="unit", help="sums over these (default %(default)s)")
    verb.add_argument("--k", type=int, default=10, help="how many (default %(default)s)")


def _components(each: Any) -> None:
    verb = _verb(
        each, "components", verbs.components, "list the components of a model, from its configuration alone",
        "hf-coar components timm/resnet18.a1_in1k", "MODEL [flags]",
    )  # fmt: skip
    _model_flags(verb)
    _component_flags(verb)


def _attribute(each: Any) -> None:
    verb = _verb(
        each, "attribute", verbs.attribute, "attribute a model's outputs on a data set to its components",
        "hf-coar attribute timm/resnet18.a1_in1k imagenet-1k --split 'validation[:2000]' --out runs/resnet18",
        "MODEL DATA --out FOLDER [flags]",
    )  # fmt: skip
    _model_flags(verb)
    verb.add_argument("data", help="Hub id, folder or file of the data set")
    _data_flags(verb)
    _component_flags(verb)
    _ablation_flags(verb)
    _method_flags(verb)
    _running_flags(verb)
    _tracker_flag(verb)
    _overwrite_flag(verb)
    verb.add_argument("--dry-run", action="store_true", help="say what it would cost and who would do what, and stop")


def _evaluate(each: Any) -> None:
    verb = _verb(
        each, "evaluate", verbs.evaluate, "compare predictions with the model's outputs under fresh masks",
        "hf-coar evaluate runs/resnet18 --fractions 0.05 0.0125", "ATTRIBUTIONS [flags]",
    )  # fmt: skip
    _attributions_flags(verb)
    verb.add_argument("--data", help="Hub id, folder or file of the data set; by default as attributed")
    _data_flags(verb)
    verb.add_argument(
        "--fractions", type=float, nargs="+", metavar="F",
        help="ablated fractions to judge at (default: the fitted one, a quarter of it, and four components)",
    )  # fmt: skip
    _call_flag(verb)
    verb.add_argument("--n-masks", type=int, default=100, help="masks a fraction (default %(default)s)")
    verb.add_argument("--seed", type=int, default=1, help="of the masks; not that of the fit (default %(default)s)")
    verb.add_argument("--out", help="folder of the run, which resumes")
    _overwrite_flag(verb)
    _tracker_flag(verb)


def _edit(each: Any) -> None:
    verb = _verb(
        each, "edit", verbs.edit, "save an edited copy of the model, with figures from examples that chose nothing",
        "hf-coar edit MODEL DATA --forget label=bag --others-within 1.5% --out edited",
        "MODEL DATA --forget | --fix | --lift | --match …, or ATTRIBUTIONS --increase | --decrease E …; --out FOLDER",
    )  # fmt: skip
    verb.add_argument("attributions", metavar="SOURCE", help="a model, or folder or Hub id of attributions")
    verb.add_argument("data", metavar="DATA", nargs="?", help="the data set; of attributions by default as attributed")
    verb.add_argument("--model", help="of attributions: Hub id or folder of the model; by default as attributed")
    _source_flags(verb)
    _task_flags(verb)
    verb.add_argument("--increase", nargs="+", metavar="E", help=f"raise the outputs of these: {_TARGETS}")
    verb.add_argument("--decrease", nargs="+", metavar="E", help=f"lower the outputs of these: {_TARGETS}")
    verb.add_argument("--reference", nargs="+", metavar="E", help="leave the outputs of these; all others by default")
    verb.add_argument(
        "--n-components", type=int, help="ablate so many, unchecked; by default other examples choose how many"
    )
    verb.add_argument(
        "--rule", choices=tuple(sorted(editing.RULES)), help="with --n-components: which come first (default welch)"
    )
    verb.add_argument(
        "--step", type=int, metavar="K", help="attribute the model anew, by one pass, after every K components that go"
    )
    verb.add_argument("--out", required=True, help="folder for the edited model")
    _overwrite_flag(verb)
    _call_flag(verb, "with --step: ")
    _data_flags(verb)


def _task_flags(verb: argparse.ArgumentParser) -> None:
    verb = verb.add_argument_group("edits of a MODEL by task, chosen and measured on other examples of DATA")
    verb.add_argument("--forget", metavar="C", help="a class that is to be forgotten: label=bag, bag, 3")
    verb.add_argument("--fix", nargs="+", metavar="E", help="wrong examples that are to come right: 17, 20-23")
    verb.add_argument("--lift", metavar="COLUMN", help="lift the worst group; a column divides every class into groups")
    verb.add_argument("--match", metavar="TRIGGERED", help="a data set: the examples of DATA with a trigger")
    verb.add_argument(
        "--others-within", metavar="P", help="what the accuracy on others may fall by: 1.5%% or 0.015; each has its own"
    )
    _switch(verb, "--keep-head", "of --forget, --fix, --lift: ablate alone; else the last layer is fitted anew, too")
    verb.add_argument(
        "--rivals", nargs="+", metavar="R", help="what to measure beside it: quick (default), all, none, or names"
    )


def _explore(each: Any) -> None:
    verb = _verb(
        each, "explore", verbs.explore, "look at attributions in the browser, and ablate on the live model",
        "hf-coar explore runs/resnet18 --open-browser", "ATTRIBUTIONS [flags]",
    )  # fmt: skip
    _attributions_flags(verb)
    verb.add_argument("--data", help="Hub id, folder or file of the data set; by default as attributed")
    _call_flag(verb)
    verb.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for everybody who can reach it (default %(default)s)"
    )
    verb.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    _switch(verb, "--open-browser", "open the page")
    _switch(verb, "--share", "also through a public address of Gradio's for some days")
    verb.add_argument(
        "--allow-host", nargs="+", default=(), metavar="NAME", help="further names that it answers to, as of a proxy"
    )
    verb.add_argument("--export", metavar="FOLDER", help="serve nothing; write a folder that a Space of the Hub runs")
    verb.add_argument("--html", metavar="FILE", help="serve nothing; write one page that needs no server, to share")


def _push(each: Any) -> None:
    verb = _verb(
        each, "push", verbs.push, "upload attributions or an edited model to the Hub, with a card",
        "hf-coar push runs/resnet18 user/resnet18-attributions", "FOLDER USER/NAME [flags]",
    )  # fmt: skip
    verb.add_argument("folder", help="made by hf-coar attribute or edit; a folder pictures/ in it goes onto the card")
    verb.add_argument("repo_id", help="user/name on the Hub; made if there is none")
    _switch(verb, "--private", "if it is made")
    verb.add_argument("--commit-message", help="first line of the commit")
    _switch(verb, "--create-pr", "propose the commit instead of making it")
    verb.add_argument("--dtype", choices=("float32", "float16"), help="of the attributions (default float32)")


def _demo(each: Any) -> None:
    verb = _verb(each, "demo", verbs.demo_run, "the whole job on an embedded model and data", "hf-coar demo", "[flags]")
    verb.add_argument("--out", default="coar-demo", help="folder for everything made (default %(default)s)")
    verb.add_argument("--forget", default=demo.FORGOTTEN, help="class to forget (default %(default)s)")


def _completion(each: Any, whole: argparse.ArgumentParser) -> None:
    verb = _verb(
        each, "completion", lambda args: verbs.completion_script(args, whole),
        "print the script with which a shell completes verbs, flags and their values",
        "hf-coar completion bash > ~/.local/share/bash-completion/completions/hf-coar",
        "{bash,zsh,fish}",
    )  # fmt: skip
    verb.add_argument("shell", choices=completion.SHELLS, help="for which it is")


def _verb(
    each: Any, name: str, run: Callable[[argparse.Namespace], str], what: str, example: str, usage: str
) -> argparse.ArgumentParser:
    verb = each.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example:\n  {example}",
        usage=f"hf-coar {name} {usage}".rstrip(), formatter_class=_Formatter,
    )  # fmt: skip
    verb.set_defaults(run=run)
    verb.add_argument("--config", type=Path, metavar="FILE.yaml", help="flags by keyword, such as `rounds: 8`")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.add_argument(
        "--import", dest=config.IMPORT, nargs="+", action="extend", type=Path, metavar="FILE.py",
        help="run this first: it may register outputs, component rules, methods",
    )  # fmt: skip
    return verb


# ------------------------------------------------------------------------------------------------- flags of several


def _switch(verb: argparse._ActionsContainer, flag: str, what: str, default: bool | str = False) -> None:
    """On or off; `--no-…` so that the command line can switch off what a file has on."""
    verb.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=what)


def _overwrite_flag(verb: argparse._ActionsContainer) -> None:
    verb.add_argument(
        "--overwrite", action="store_true", help="take a folder with other things; replace files of the same names"
    )


def _model_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", help="Hub id or folder of a timm or transformers model, or a file of weights")
    _source_flags(verb)


def _attributions_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("attributions", help="folder or Hub id of attributions")
    verb.add_argument("--model", help="Hub id or folder of the model; by default as attributed")
    _source_flags(verb)


def _source_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--revision", help="branch, tag or commit of the model")
    verb.add_argument(
        "--architecture", help="of a file of weights: a timm name, or a folder or Hub id with config.json"
    )
    _switch(verb, "--trust-remote-code", "run code that comes with the model")


def _data_flags(verb: argparse.ArgumentParser) -> None:
    verb = verb.add_argument_group("data")
    verb.add_argument("--split", help="such as 'validation[:2000]'")
    verb.add_argument("--data-revision", help="branch, tag or commit of the data set")
    verb.add_argument("--batch-size", type=int, help="examples a batch (default 32)")
    _switch(verb, "--streaming", "read the data while running")
    verb.add_argument("--max-length", type=int, help="tokens at which texts are cut (default 512)")
    labels = 'labels, or columns of several at once, toxic,insult ("a, b" in double quotes)'
    for role, what in (("text", "texts"), ("pair", "second texts"), ("image", "images"), ("label", labels)):
        verb.add_argument(
            f"--{role}", metavar="COLUMN", help=f"column of the {what}; by default by type and usual name"
        )
    verb.add_argument(
        "--columns", nargs="+", action="extend", metavar="ROLE=COLUMN",
        help="columns of other roles that the model's task has, such as prompt=… answer=… foil=…",
    )  # fmt: skip
    verb.add_argument("--n-examples", type=int, metavar="N", help="draw so many, as many of each class; all by default")
    verb.add_argument("--data-seed", type=int, help="of that draw (default 0)")
    verb.add_argument("--preprocessor", metavar="ID", help="Hub id or folder of the tokenizer or image processor")


def _running_flags(verb: argparse.ArgumentParser) -> None:
    verb = verb.add_argument_group("running, which changes speed only")
    verb.add_argument("--worker", metavar="I/N", help="this is worker I (from 0) of N that share the folder")
    verb.add_argument("--dtype", choices=("bfloat16", "float16", "tf32"), help="compute in lower precision")
    what = "compile all passes, for long runs; --no-compile: not even captured graphs"
    _switch(verb, "--compile", what, default="auto")
    verb.add_argument("--masks-together", type=int, default=1, metavar="K", help="masks in one forward pass")
    verb.add_argument(
        "--num-workers", type=int, metavar="N", help="threads that read batches ahead (one on an accelerator)"
    )
    _switch(verb, "--strict", "an example that cannot be read is an error")
    _switch(verb, "--report", "write a page with pictures, about a second (on by default)", default=True)


def _tracker_flag(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--log-with", nargs="+", metavar="TRACKER", help=f"accelerate's trackers: {', '.join(TRACKERS)}, …"
    )


def _call_flag(verb: argparse._ActionsContainer, when: str = "") -> None:
    verb.add_argument(
        "--call", metavar="NAME", help=f"{when}function (model, batch) of an imported file that runs the model"
    )


def _component_flags(verb: argparse.ArgumentParser) -> None:
    verb = verb.add_argument_group("components")
    verb.add_argument("--granularity", choices=GRANULARITIES, default="unit", help="(default %(default)s)")
    verb.add_argument("--include", nargs="+", metavar="GLOB", help="only modules that match")
    verb.add_argument("--exclude", nargs="+", metavar="GLOB", help="no modules that match")


def _ablation_flags(verb: argparse.ArgumentParser) -> None:
    verb = verb.add_argument_group("what stands in for an ablated component")
    named = [name for name, kind in masking.ABLATIONS.items() if name == "zero" or kind.takes_data]
    verb.add_argument("--ablation", choices=named, default="zero", help="(default %(default)s)")
    verb.add_argument(
        "--ablation-data", metavar="DATA", help="of which it is the mean, drawn or patched; by default DATA itself"
    )
    verb.add_argument("--ablation-split", metavar="SPLIT", help="of those; by default as of DATA")
    verb.add_argument("--ablation-seed", type=int, metavar="SEED", help="of the draw of resample (default 0)")


def _method_flags(verb: argparse.ArgumentParser, out: str = "", budget: str | None = None) -> None:
    verb = verb.add_argument_group("method")
    verb.add_argument(
        "--output", default="auto", help=f"one of {', '.join(outputs.names())}; by default what the model's task has"
    )
    _call_flag(verb)
    default = f" (default {budget})" if budget else ""
    verb.add_argument(
        "--budget",
        default=budget,
        help=f"forward passes an example, or a time ('20 min'): decides rounds, masks{default}",
    )
    methods.add_flags(verb)
    verb.add_argument("--ablated-fraction", type=float, help="default: the largest of some that leaves a model")
    verb.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    verb.add_argument("--out", required=not out, help=out or "folder of the run, which resumes")
