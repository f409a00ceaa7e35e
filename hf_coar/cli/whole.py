"""`hf-coar MODEL DATA` alone: attribute within a minute, evaluate, report, and say what to do next."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_coar import api
from hf_coar.attributions import Attributions, folders
from hf_coar.cli import config, methods, showing, standing_in, terminal
from hf_coar.errors import BudgetError, CoarError
from hf_coar.plots import page
from hf_coar.runs import engine, workers
from hf_coar.storage import folders as store

logger = logging.getLogger(__name__)

_EXAMPLES = (64, 16, 4)  # as many as the budget affords, where nothing says how many
_MASKS = 20  # a fraction, of the evaluation


def run(args: argparse.Namespace, sources: dict[str, Any], running: dict[str, Any]) -> str:
    """The whole; `sources` are the arguments of `load` and `running` those of `running`."""
    folder = Path(args.out or default_folder(args.model, args.data))
    store.check(folder, store.ATTRIBUTIONS, args.overwrite)
    args.out = str(folder)  # where run.yaml goes
    with engine.running(**running) as options:
        with engine.running(report=False):  # there will be one of both
            attributions, model, data = _attributed(args, sources, folder)
            call = config.imported(args.call)
            found = api.evaluate(attributions, model, data, n_masks=_MASKS, call=call, out=folder / "evaluation")
        if workers.processes().is_main_process:
            if options.report:
                page.write(folder, attributions, found, data)
            folders.add_evaluation(folder, found)
    attributions.evaluation = found.to_json()
    report = str(folder / page.PAGE) if options.report else None
    steps = showing.next_steps(attributions, folder)
    if args.json:
        told = {"attributions": str(folder), "report": report, "next": steps, **showing.facts(attributions)}
        return json.dumps({**told, "top": attributions.top().to_json()}, indent=2)
    bold = terminal.bold("next", sys.stdout)
    parts = [
        showing.overview(attributions),
        str(attributions.top()),
        *([f"report: {report}"] if report else []),
        f"{bold}\n  " + "\n  ".join(steps),
    ]
    return "\n\n".join(parts)


def _attributed(args: argparse.Namespace, sources: dict[str, Any], folder: Path) -> tuple[Attributions, Any, Any]:
    """Attributions of as many examples as the budget affords."""
    model, data = api.load(**sources)
    error: CoarError | None = None
    for some in _choices(data, sources):
        if error is not None:
            logger.warning("%s", error)
        try:
            examples = some if some is None else {**sources, "model": model, "n_examples": some}
            chosen = data if examples is None else api.load(**examples)[1]
            components = standing_in.components(model, chosen, args)
            attributions = api.attribute(
                model, chosen, components, output=args.output, method=methods.chosen(args),
                ablated_fraction=args.ablated_fraction, call=config.imported(args.call), seed=args.seed,
                out=folder, budget=args.budget, overwrite=args.overwrite,
            )  # fmt: skip
            return attributions, model, chosen
        except BudgetError as found:
            error = found
    raise error or CoarError("nothing to attribute")


def _choices(data: Any, sources: dict[str, Any]) -> Iterator[int | None]:
    """Numbers of examples to try, None for all that there are."""
    there = len(data.dataset) if hasattr(data.dataset, "__len__") else None
    if there is None or "n_examples" in sources or there <= _EXAMPLES[-1]:
        yield None
        return
    if "split" in sources or there <= _EXAMPLES[0]:
        yield None
    yield from (some for some in _EXAMPLES if some < there)


def default_folder(model: str, data: str) -> Path:
    """Such as `runs/resnet18.a1_in1k-imagenet-1k`."""
    names = [Path(str(name).rstrip("/")).name for name in (model, data)]
    names[0] = Path(str(model)).resolve().parent.name if names[0] in ("model", "") else names[0]
    return Path("runs") / "-".join(
        re.sub(r"[^\w.-]+", "_", re.sub(r"\.(parquet|csv|jsonl?|tsv)$", "", n)) for n in names
    )
