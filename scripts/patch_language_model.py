"""Which heads, or neurons, of SmolLM2-135M carry a fact: zero against mean against the corrupted prompt.

    python scripts/patch_language_model.py --models models --units heads
    python scripts/patch_language_model.py --models models --units neurons --rounds 2 --masks 12

The model comes from `scripts/convert_benchmark_models.py`. Prompts are made here: capitals ("The capital of France is",
corrupted to another country) and number agreement ("The keys near the cabinet", corrupted to "The key …"); those are
kept whose tokens go one to one, whose answers are one token, and which the model gets right. The output is the
log-probability of the right answer minus that of the corrupted prompt's.

For every stand-in, attributions by PathGradient and by the gradient with everything in place (with the corrupted prompt
that is attribution patching, Nanda 2023) predict the output under fresh random sets of components that are replaced.
Then how many of the 20 strongest components agree, and how much of the output the k strongest keep by themselves.
Figures are added to `patching.json` in `--out`, of which `patching.md` is made.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import models
from hf_coar.models import tasks
from hf_coar.models.tasks.language import encode_answers

logger = logging.getLogger("patch_language_model")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "China": "Beijing",
    "Portugal": "Lisbon", "Cuba": "Havana", "Iran": "Tehran", "Ireland": "Dublin", "Norway": "Oslo",
}  # fmt: skip
NOUNS = ("key", "author", "picture", "teacher", "dog", "letter", "farmer", "student")
UNITS = {"heads": ("head", None), "neurons": ("input", ["*.down_proj"])}
TOP = (1, 2, 5, 10, 20, 40, 80, 160)


def candidates() -> list[tuple[str, str, str, str]]:
    """(prompt, corrupted prompt, answer, answer of the corrupted prompt)."""
    countries = list(CAPITALS)
    found = []
    for one, other in zip(countries, countries[1:] + countries[:1], strict=True):
        prompts = (f"The capital of {country} is the city of" for country in (one, other))
        found.append((*prompts, f" {CAPITALS[one]}", f" {CAPITALS[other]}"))
    for noun in NOUNS:
        found.append((f"The {noun}s near the cabinet", f"The {noun} near the cabinet", " are", " is"))
        found.append((f"The {noun} near the cabinet", f"The {noun}s near the cabinet", " is", " are"))
    return found


def prompts(model: nn.Module, tokenizer: Any, most: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Clean and corrupted batches for `answer_difference`, and the clean prompts."""

    def lengths(texts: tuple[str, ...]) -> list[int]:
        return [len(tokenizer(text)["input_ids"]) for text in texts]

    usable = [one for one in candidates() if len(set(lengths(one[:2]))) == 1 and lengths(one[2:]) == [1, 1]]
    usable = [one for one in usable if _right(model, tokenizer, one)]
    chosen = usable[:: max(1, -(-len(usable) // most))][:most]
    clean, corrupt, answers, foils = (list(column) for column in zip(*chosen, strict=True))
    return (*(encode_answers(tokenizer, texts, answers, foils) for texts in (clean, corrupt)), clean)


def _right(model: nn.Module, tokenizer: Any, one: tuple[str, str, str, str]) -> bool:
    """Whether the model prefers the right answer for both prompts."""
    batch = encode_answers(tokenizer, one[:2], one[2:], one[:1:-1])
    output = tasks.bind(model, "answer_difference", None, batch)
    with torch.no_grad():
        return bool((output.of(model, batch) > 1).all())


def stand_ins(clean: Any, corrupt: Any) -> dict[str, Any]:
    """Those to compare; the mean is over clean and corrupted prompts."""
    both = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in (clean, corrupt)]
    return {"zero": "zero", "mean": coar.Mean(both), "patch": coar.Patch(corrupt)}


def kept_by_the_strongest(
    model: nn.Module, data: Any, attributions: coar.Attributions, numbers: tuple[int, ...]
) -> dict[str, float]:
    """Share of the output that is left where all but the k strongest components are replaced: 1 = all, 0 = none."""
    (batch,) = data
    output, components = tasks.bind(model, "answer_difference", None, batch), attributions.components
    order = attributions.weights.mean(0).argsort(descending=True)

    def mean(n_kept: int) -> float:
        kept = torch.zeros(len(components), dtype=torch.bool)
        kept[order[:n_kept]] = True
        with torch.no_grad(), models.frozen(model), coar.ablate(model, components, kept, how="hooks"):
            return float(output.of(model, batch).mean())

    everything, nothing = mean(len(components)), mean(0)
    return {str(k): round((mean(k) - nothing) / (everything - nothing), 3) for k in numbers if k < len(components)}


def measure(model: nn.Module, clean: Any, corrupt: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All stand-ins."""
    granularity, include = UNITS[args.units]
    found, strongest = {}, {}
    methods = {
        "path gradient": coar.PathGradient(rounds=args.rounds),
        "gradient": coar.baselines.GradientTimesParameter(),
    }
    for kind, ablation in stand_ins(clean, corrupt).items():
        components = coar.find_components(model, granularity, include=include, ablation=ablation)
        data = coar.Patch(corrupt).paired([clean]) if kind == "patch" else [clean]
        entry: dict[str, Any] = {"n_components": len(components)}
        for name, method in methods.items():
            options = {"output": "answer_difference", "method": method, "ablated_fraction": args.fraction}
            begun = time.process_time()
            attributions = coar.attribute(model, data, components, progress=False, **options)
            spent = time.process_time() - begun
            report = coar.evaluate(attributions, model, data, fractions=args.sizes, n_masks=args.masks, progress=False)
            entry[name] = {
                "correlation": {str(f): report.correlation[f] for f in args.sizes},
                "slope": {str(f): report.slope[f] for f in args.sizes},
                "processor_seconds": round(spent, 1),
                "kept": kept_by_the_strongest(model, data, attributions, TOP),
            }
            if name == "path gradient":
                strongest[kind] = attributions.weights.mean(0).topk(20).indices.tolist()
                entry["strongest"] = [str(components[i]) for i in strongest[kind][:5]]
        found[kind] = entry
        logger.info("%s: %s", kind, entry)
    agree = {f"{a} and {b}": len(set(strongest[a]) & set(strongest[b])) for a in found for b in found if a < b}
    return {"stand_ins": found, "agree_of_20": agree}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Which part of a language model carries a fact",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].splitlines(),
        "",
    ]
    for units, result in results.items():
        n_components = next(iter(result["stand_ins"].values()))["n_components"]
        lines += [
            f"## {units}",
            "",
            f"{n_components:,} components, {result['n_prompts']} prompts such as “{result['prompt']}”; attributed at "
            f"{result['fraction']:.0%}, {result['rounds']} rounds, {result['n_masks']} masks a size; "
            f"{result['machine']}.",
            "",
        ]
        sizes = list(next(iter(result["stand_ins"].values()))["path gradient"]["correlation"])
        lines.append("| stand-in | method | " + " | ".join(f"{float(size):.0%}" for size in sizes) + " | s |")
        lines.append("|---|---|" + "---|" * (len(sizes) + 1))
        for kind, entry in result["stand_ins"].items():
            for method in ("path gradient", "gradient"):
                one = entry[method]
                cells = [f"{one['correlation'][size]:.3f} · {one['slope'][size]:.2f}" for size in sizes]
                lines.append(f"| {kind} | {method} | {' | '.join(cells)} | {one['processor_seconds']:.0f} |")
        lines += ["", "Cells: mean correlation over the masks · slope; s: seconds of one processor to attribute.", ""]
        numbers = list(next(iter(result["stand_ins"].values()))["path gradient"]["kept"])
        lines.append("| the k strongest keep | " + " | ".join(numbers) + " |")
        lines.append("|---|" + "---|" * len(numbers))
        for kind, entry in result["stand_ins"].items():
            for method in ("path gradient", "gradient"):
                cells = [f"{entry[method]['kept'][k]:.2f}" for k in numbers]
                lines.append(f"| {kind}, {method} | {' | '.join(cells)} |")
        lines += ["", f"Of the 20 strongest agree: {json.dumps(result['agree_of_20'])[1:-1]}.", ""]
        for kind, entry in result["stand_ins"].items():
            lines.append(f"- {kind}: {', '.join(entry['strongest'])}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--units", choices=UNITS, default="heads")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--sizes", type=float, nargs="+", default=(0.05, 0.1, 0.2, 0.4))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--masks", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from transformers import AutoTokenizer

    folder = args.models / "smollm2"
    model, tokenizer = models.load_model(folder), AutoTokenizer.from_pretrained(folder)
    clean, corrupt, texts = prompts(model, tokenizer, args.prompts)
    about = {"n_prompts": len(texts), "prompt": texts[0], "fraction": args.fraction, "rounds": args.rounds}
    about["machine"] = (
        f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__.split('+')[0]}"
    )
    path = args.out / "patching.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[args.units] = {**about, "n_masks": args.masks, **measure(model, clean, corrupt, args)}
    path.write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "patching.md").write_text(table(results))


if __name__ == "__main__":
    main()
