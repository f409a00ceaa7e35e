"""What every verb does: from its flags to the text that it prints."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hf_coar import api as pipeline
from hf_coar import demo, models
from hf_coar import explore as explorer
from hf_coar.attributions import Attributions, folders
from hf_coar.cli import completion, config, editing, methods, standing_in, terminal, whole
from hf_coar.data import Chunks, rows
from hf_coar.editing import edited as edited_model
from hf_coar.errors import CoarError
from hf_coar.estimators import PathGradient, Size, budget, choosing, gates
from hf_coar.models import tasks
from hf_coar.plots import page as report
from hf_coar.runs import engine, workers
from hf_coar.runs.plan import plan, size_text
from hf_coar.storage import folders as store


def components(args: argparse.Namespace) -> str:
    """The components of a model, as a tree."""
    model = models.load_architecture(args.model, args.revision, args.trust_remote_code)
    found = standing_in.zeroed(model, args)
    if args.json:
        return json.dumps(found.tree_json(), indent=2)
    head, _, rest = found.tree().partition("\n")
    return f"{terminal.bold(head, sys.stdout)}\n{rest}"


def attribute(args: argparse.Namespace) -> str:
    """Attribute, or with `--dry-run` say what that would cost."""
    store.check(args.out, store.ATTRIBUTIONS, args.overwrite)
    with engine.running(**_running(args)):  # first, so that what is wrong with it costs no loading
        model, data = pipeline.load(**editing.sources(args))
        if args.dry_run:
            return _planned(args, model, data)
        attributions = pipeline.attribute(
            model, data, standing_in.components(model, data, args), output=args.output, method=methods.chosen(args),
            ablated_fraction=args.ablated_fraction, call=config.imported(args.call), seed=args.seed,
            out=args.out, budget=args.budget, log_with=args.log_with, overwrite=args.overwrite,
        )  # fmt: skip
    summary = {
        "attributions": str(args.out),
        "n_examples": len(attributions),
        "n_components": len(attributions.components),
        "cost": attributions.provenance.cost,
        "report": str(Path(args.out) / report.PAGE),
    }
    if args.json:
        return json.dumps(summary, indent=2)
    return (
        f"{summary['n_examples']} examples × {summary['n_components']} components, saved in {args.out}\n"
        f"report: {summary['report']}\n"
        f"next: {terminal.bold(f'hf-coar evaluate {shlex.quote(str(args.out))}', sys.stdout)}"
    )


def _planned(args: argparse.Namespace, model: Any, data: Any) -> str:
    """What `attribute` would do: units, processes, cost; nothing is written."""
    chunks, team = Chunks(data), workers.team(args.worker)
    _, first = chunks.at(0).read().pieces[0]
    n_examples = chunks.at(len(chunks) - 1).stop if chunks.count is not None else None
    if n_examples is None:
        raise CoarError("the number of examples of a stream is not known beforehand; try without --streaming")
    components = standing_in.zeroed(model, args)
    # Nothing is run here, so that what a look at the model would choose is not known.
    method, size = methods.chosen(args), Size(len(components), args.ablated_fraction or choosing.FRACTIONS[0])
    method = choosing.without_a_look(size) if method == "auto" and args.budget is None else method
    method = PathGradient() if method == "auto" else method
    if args.budget is not None:
        passes, timed = budget.parse(args.budget)
        if timed:
            raise CoarError(f"--budget {args.budget!r} is timed when the run begins; give forward passes to --dry-run")
        method = method.sized(passes, size)
    example = rows(first, 0, 1)
    output = tasks.bind(model, args.output, batch=example)
    planned = plan(
        model, example, n_examples, size.n_components, method.parts(size), data.batch_size, team.count,
        gates.one_pass(model, components, output, example) if method.differentiates else None,
    )  # fmt: skip
    if args.json:
        return json.dumps({**vars(planned), "n_units": planned.n_units, "worker": team.index}, indent=2)
    return f"{planned}\nthis is     process {team.index} of {team.count}; nothing was run"


def evaluate(args: argparse.Namespace) -> str:
    """Compare with the model; figures and pictures go to the attributions that they judge, where those are local."""
    if args.out is not None:
        store.check(args.out, store.ATTRIBUTIONS, args.overwrite)
    attributions = Attributions.from_pretrained(args.attributions)
    model, data = pipeline.reopen(attributions, **editing.sources(args))
    found = pipeline.evaluate(
        attributions, model, data, fractions=args.fractions, n_masks=args.n_masks, seed=args.seed, out=args.out,
        call=config.imported(args.call), log_with=args.log_with, overwrite=args.overwrite,
    )  # fmt: skip
    folder, page = Path(args.attributions), None
    if folder.is_dir() and workers.processes().is_main_process:
        page = report.write(folder, attributions, found)
        folders.add_evaluation(folder, found)  # last, so that the card shows the pictures
    if args.json:
        return json.dumps(found.to_json(), indent=2)
    head, _, rest = str(found).partition("\n")
    return f"{terminal.bold(head, sys.stdout)}\n{rest}" + (f"\nreport: {page}" if page else "")


def run(args: argparse.Namespace) -> str:
    """The sensible whole, within a budget."""
    return whole.run(args, editing.sources(args), _running(args))


edit = editing.edit


def explore(args: argparse.Namespace) -> str:
    """Serve the explorer until Ctrl-C, or write it into a folder."""
    sources = {"model": args.model, "data": args.data, "revision": args.revision}
    if args.html is not None:
        call = config.imported(args.call)
        page = explorer.share(
            args.attributions, args.html, **sources, trust_remote_code=args.trust_remote_code, call=call
        )
        size = page.stat().st_size
        if args.json:
            return json.dumps({"page": str(page), "bytes": size}, indent=2)
        return f"saved {page} ({size_text(size)}); it needs no server, and can be sent as it is"
    if args.export is not None:
        folder = explorer.export(args.attributions, args.export, **sources)
        if args.json:
            return json.dumps({"space": str(folder)}, indent=2)
        return f"saved in {folder}; python {shlex.quote(str(folder / 'app.py'))} serves it, as does a Space of the Hub"
    address = explorer.launch(
        args.attributions, **sources, trust_remote_code=args.trust_remote_code, host=args.host, port=args.port,
        open_browser=args.open_browser, share=args.share, hosts=args.allow_host,
        call=config.imported(args.call),
    )  # fmt: skip
    return json.dumps({"address": str(address)}, indent=2) if args.json else f"served {address}"


def push(args: argparse.Namespace) -> str:
    """Upload what `attribute` or `edit` made."""
    settings = {"private": True if args.private else None, "create_pr": args.create_pr}
    settings |= {"commit_message": args.commit_message} if args.commit_message else {}
    if (Path(args.folder) / edited_model.RECORD).is_file():
        address = edited_model.push_to_hub(args.folder, args.repo_id, **settings)
    else:
        address = folders.push_folder(args.folder, args.repo_id, dtype=args.dtype, **settings)
    return json.dumps({"commit": address}, indent=2) if args.json else f"pushed: {address}"


def demo_run(args: argparse.Namespace) -> str:
    """The whole job on what the package holds."""
    found = demo.run(args.out, args.forget)
    return json.dumps(found.figures, indent=2) if args.json else found.text


def completion_script(args: argparse.Namespace, whole: argparse.ArgumentParser) -> str:
    """The script for a shell."""
    script = completion.script(whole, args.shell)
    return json.dumps({"shell": args.shell, "script": script}, indent=2) if args.json else script


def _running(args: argparse.Namespace) -> dict[str, Any]:
    names = ("worker", "dtype", "compile", "masks_together", "num_workers", "strict", "report")
    return {name: getattr(args, name) for name in names}
