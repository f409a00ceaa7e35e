"""Every task from one end to the other: its default output against one worked out by hand, and what editing by it does.

A tiny random model of every kind of head goes through attribute, evaluate, edit, save, and a plain reload by its own
library in a process without hf_coar. One line a case is written as it goes, and what has a line is not done again;
`report` makes the table.

    python scripts/census_tasks.py run /tmp/tasks          # 35 models, about 8 minutes on one core
    python scripts/census_tasks.py report /tmp/tasks       # writes scripts/results/tasks.md
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from exactness import zeroed_by_hand
from task_cases import CASES, made

import hf_coar as coar
from hf_coar import models
from hf_coar.models import tasks
from hf_coar.models.tasks.base import head_classes

RESULT = Path(__file__).resolve().parent / "results" / "tasks.md"
METHOD = coar.PathGradient(rounds=6)

RELOAD = """
import importlib, sys, torch
library, name, folder, values = sys.argv[1:]
model = getattr(importlib.import_module(library), name).from_pretrained(folder)
assert not any(module.split(".")[0] == "hf_coar" for module in sys.modules)
torch.save(model.state_dict(), values)
"""


def reloaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """What the model's own library alone loads, in a process without hf_coar; timm knows no shrunk architectures."""
    if models.library(model) == "timm":
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
    else:
        names = [models.library(model), type(model).__name__, str(folder), str(folder / "state.pt")]
        subprocess.run([sys.executable, "-W", "ignore", "-c", RELOAD, *names], check=True)
        state = torch.load(folder / "state.pt", weights_only=True)
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    return again


@torch.no_grad()
def by_zeroing(model: torch.nn.Module, batch: dict, output: coar.outputs.Output) -> float:
    """Largest difference between ablating by hooks, example by example, and zeroing weights by hand."""
    components = coar.find_components(model)
    kept = torch.rand(4, len(components), generator=torch.Generator().manual_seed(0)) > 0.1
    with coar.ablate(model, components, kept):
        found = output.of(model, batch)
    by_hand = [output.of(zeroed_by_hand(model, components, row), batch)[i] for i, row in enumerate(kept)]
    return float((found - torch.stack(by_hand)).abs().max())


def job(name: str) -> dict:
    """One case from one end to the other."""
    case, (model, batch) = CASES[name], made(name)
    output = tasks.bind(model, batch=batch)
    with torch.no_grad():
        before = output.of(model, batch)
        off = float((before - case.by_hand(model, batch)).abs().max())
    attributions = coar.attribute(model, [batch], method=METHOD, progress=False)
    report = coar.evaluate(attributions, model, [batch], fractions=(0.05,), n_masks=30, progress=False)
    edited = coar.edit(model, attributions, decrease=[0], n_components=max(3, len(attributions.components) // 50))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models.save_model(edited, folder)
        after = output.of(edited, batch)
        same = bool(torch.equal(output.of(reloaded(edited, Path(folder)), batch), after))
    return {
        "task": tasks.of(model).name, "class": type(model).__name__, "output": output.name, "unit": output.unit,
        "alignment": output.alignment, "components": len(attributions.components), "off": off,
        "zeroing": by_zeroing(model, batch, output), "correlation": report.correlation[0.05],
        "before": float(before[0]), "after": float(after[0]), "reloaded": same,
    }  # fmt: skip


def run(folder: Path) -> None:
    """All cases that have no line yet."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "tasks.jsonl"
    done = {json.loads(line)["name"] for line in table.read_text().splitlines()} if table.exists() else set()
    with table.open("a") as lines:
        for name in CASES:
            if name in done:
                continue
            start = time.perf_counter()
            try:
                result = job(name)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            lines.write(json.dumps({"name": name, **result, "seconds": round(time.perf_counter() - start, 1)}) + "\n")
            lines.flush()


def cell(entry: dict) -> str:
    """One row of the table."""
    if "error" in entry:
        return f"| {entry['name']} | | | | | | | {entry['error'].replace('|', '/')} |"
    return (
        f"| {entry['task']} | {entry['class']} | {entry['output']} ({entry['unit']}) | {entry['components']:,} | "
        f"{entry['off']:.0e} | {entry['zeroing']:.0e} | {entry['correlation']:.3f} | {entry['before']:.3g} → "
        f"{entry['after']:.3g}, {'the same' if entry['reloaded'] else 'OTHER'} after a plain reload |"
    )


def report(folder: Path) -> str:
    """The table: one line a case, and one a task with the heads that it speaks for."""
    entries = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    finished = [entry for entry in entries if "error" not in entry]
    totals = {
        "cases": len(entries), "finished": len(finished), "reloaded": sum(entry["reloaded"] for entry in finished),
        "lowest_correlation": round(min(entry["correlation"] for entry in finished), 3),
        "largest_difference": max(max(entry["off"], entry["zeroing"]) for entry in finished),
    }  # fmt: skip
    rows = [
        "# Tasks",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; made by `scripts/census_tasks.py`. Tiny "
        "random models, four examples, `PathGradient(rounds=6)`.",
        "",
        f"<!-- totals {json.dumps(totals)} -->",
        "",
        "| task | model | default output | components | off by hand | off zeroing | correlation, 5 % ablated | "
        "example 0, 2 % ablated to lower it |",
        "|---|---|---|---|---|---|---|---|",
        *map(cell, entries),
        "",
        "Off by hand: largest difference from the output written anew in `tests/task_cases.py`, from the head's own "
        "loss or from the formula. Off zeroing: largest difference between every example with a mask of its own, by "
        "hooks, and zeroing weights by hand.",
        "",
        "| task | head classes | outputs | target of a position | columns |",
        "|---|---|---|---|---|",
    ]
    classes = head_classes()
    for name, task in tasks.TASKS.items():
        count = sum(name in found for found in classes.values())
        named = f"{count}" if count else "all others" if name == "own_loss" else "plain modules"
        rows.append(
            f"| {name} | {named} | {', '.join(task.outputs)} | {task.alignment or ''} | {', '.join(task.columns)} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", "report"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.step == "run":
        run(arguments.folder)
    else:
        RESULT.write_text(report(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
