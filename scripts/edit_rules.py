"""Rankings that were tried for edits and are not in the package: each beside the package's two, by task.

    python scripts/edit_rules.py fix --seeds 1 2
    python scripts/edit_rules.py match --world animals --seeds 20 21 --trigger patch
    python scripts/edit_rules.py table

Every task is carried out with one ranking alone in the place of its own, on the networks of `edit_rivals.py`; figures
are from examples that chose nothing. Adds to `runs/edits/rules/`; `table` writes `scripts/results/edits/rules.md`.
Importing this file registers the rankings, so that `coar.edit(rule=…)` knows them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import edit_common as common
import edit_rivals
import torch
from torch import Tensor

from hf_coar import editing
from hf_coar.editing.rules import best_first, forward_selection
from hf_coar.editing.tasks import fixing, forgetting, lifting, matching
from hf_coar.errors import UnsatisfiedError

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


def main() -> None:
    """Command line."""
    made = edit_rivals.parser(__doc__, (*AIMS, "table"))
    args = made.parse_args()
    edit_rivals.begin(args)
    for seed in args.seeds or [1]:
        run(args, args.kind, seed)


if __name__ == "__main__":
    main()
