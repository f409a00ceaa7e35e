"""Edits by one ranking alone: the package's three beside eight that were tried, by task.

    python scripts/edit_rules.py fix --seeds 1 2
    python scripts/edit_rules.py match --world animals --seeds 20 21 --trigger patch
    python scripts/edit_rules.py table

Every task is carried out with one ranking alone in the place of its own, on the networks of `edit_rivals.py`; figures
are from examples that chose nothing. Adds to `runs/edits/rules/`; `table` writes `scripts/results/edits/rules.md`.
The rankings themselves: `edit_rankings.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import edit_common as common
import edit_rivals

from hf_coar import editing
from hf_coar.editing.tasks import fixing, forgetting, lifting, matching
from hf_coar.errors import UnsatisfiedError

SAID = (
    "Made by `scripts/edit_rules.py`: the package's three rankings beside eight that were tried, each alone in the "
    "place of a task's own (the first row of each table); `forget` and `lift` with a new last layer. In brackets "
    "how many edits; then how many keep the limits on the examples to choose on, with one standard error to "
    "spare, with two rankings one and a half; and of those, on examples that chose nothing, the target after the "
    "edit in percent and what others gain, in points. On networks of seeds 1 to 30, by which rules were chosen "
    "before."
)
AIMS = {"fix": fixing.Fixing, "forget": forgetting.Forgetting, "lift": lifting.Lifting, "match": matching.Matching}


def tried(kind: str) -> list[tuple[str, ...]]:
    """What is tried: the task's own rankings, and every ranking alone."""
    return list(dict.fromkeys([AIMS[kind].rules, *((name,) for name in sorted(editing.RULES))]))


def run(args: argparse.Namespace, kind: str, seed: int) -> None:
    """All edits of one seed, by every ranking."""
    found = []
    for name, _, edit in edit_rivals.edits(args, kind, seed):
        row: dict[str, Any] = {"edit": name}
        own = AIMS[kind].rules
        for rules in tried(kind):
            AIMS[kind].rules = rules
            try:
                made = edit(rivals=None)
                row[", ".join(rules)] = {
                    key: (one.before, one.after) for key, one in made.figures.measured.items()
                } | {"components": len(made.components)}  # fmt: skip
            except UnsatisfiedError:
                row[", ".join(rules)] = None
            finally:
                AIMS[kind].rules = own
        found.append(row)
        common.logger.info("%s, seed %d, %s", kind, seed, _short(row))
        kind_ = f"{kind}-{args.trigger}" if kind == "match" else kind
        path = args.runs / "rules" / f"{kind_}-{args.world}-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": kind_, "world": args.world, "seed": seed, "edits": found}, indent=1) + "\n")


def _short(row: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: " + ("none" if one is None else f"{100 * one['target'][1]:.1f} {100 * one['others'][1]:.1f}")
        for name, one in row.items() if name != "edit"
    )  # fmt: skip


def table(args: argparse.Namespace) -> None:
    """`rules.md`, with its JSON, of everything that is done."""
    runs = [json.loads(path.read_text()) for path in sorted((args.runs / "rules").glob("*.json"))]
    text = [f"# Edits by one ranking alone\n\n{SAID}\n"]
    for kind in dict.fromkeys(one["kind"].split("-")[0] for one in runs):
        text.append(_section(kind, [one for one in runs if one["kind"].split("-")[0] == kind]))
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "rules.md").write_text("\n".join(text), encoding="utf-8")
    (args.results / "rules.json").write_text(json.dumps(runs, indent=1) + "\n")


def _section(kind: str, runs: list[dict[str, Any]]) -> str:
    by_world: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        by_world.setdefault(one["world"], []).extend(one["edits"])
    names = [name for name in next(iter(by_world.values()))[0] if name != "edit"]
    head = ["ranking", *(f"{world} ({len(edits)})" for world, edits in by_world.items())]
    rows = [[name, *(_cell([edit.get(name) for edit in edits]) for edits in by_world.values())] for name in names]
    return f"## {kind}\n\n{common.table(head, rows)}\n"


def _cell(edits: list[dict[str, Any] | None]) -> str:
    made = [one for one in edits if one]
    if not made:
        return "0"
    target = statistics.fmean(100 * one["target"][1] for one in made)
    others = statistics.fmean(100 * (one["others"][1] - one["others"][0]) for one in made)
    return f"{len(made)}: {target:.1f}, {others:+.1f}"


def main() -> None:
    """Command line."""
    made = edit_rivals.parser(__doc__, (*AIMS, "table"))
    args = made.parse_args()
    if args.kind == "table":
        return table(args)
    edit_rivals.begin(args)
    for seed in args.seeds or [1]:
        run(args, args.kind, seed)
    return None


if __name__ == "__main__":
    main()
