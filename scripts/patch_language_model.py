"""Which heads, or neurons, of SmolLM2-135M carry a fact: zero against mean against the corrupted prompt.

    python scripts/patch_language_model.py --models models --units heads
    python scripts/patch_language_model.py --models models --units heads --peers
    python scripts/patch_language_model.py --models models --units neurons --rounds 2 --masks 12

The model comes from `scripts/convert_benchmark_models.py`. Prompts are made here: capitals ("The capital of France is",
corrupted to another country) and number agreement ("The keys near the cabinet", corrupted to "The key …"); those are
kept whose tokens go one to one, whose answers are one token, and which the model gets right. The output is the
log-probability of the right answer minus that of the corrupted prompt's.

For every stand-in, attributions predict the output under fresh random sets of components that are replaced: those of
PathGradient in one pass and in rounds, where components are few also what `method="auto"` takes (where that is
leave-one-out, with `--pairs` also with pairs); beside them the gradient with everything in place (with the corrupted
prompt that is attribution patching, Nanda 2023), captum's integrated gradients along the gates, and with `--peers` the
attribution patching of TransformerLens and of nnsight (see `patch_rivals.py`; those that are not installed are said and
left out). Each with what it took: forward passes, and processor time of one thread after a first call, so that methods
can be compared at the same time.

Then how many of the 20 strongest components agree, and how much of the output the k strongest keep by themselves.
Figures are added to `patching.json` in `--out`, of which `patching.md` and `patching.png` are made.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patch_rivals
import patch_tables
import torch
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import models, plots
from hf_coar.models import tasks
from hf_coar.models.tasks.language import encode_answers
from hf_coar.runs.fidelity import correlation

logger = logging.getLogger("patch_language_model")

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Japan": "Tokyo", "Russia": "Moscow",
    "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "China": "Beijing",
    "Portugal": "Lisbon", "Cuba": "Havana", "Iran": "Tehran", "Ireland": "Dublin", "Norway": "Oslo",
}  # fmt: skip
NOUNS = ("key", "author", "picture", "teacher", "dog", "letter", "farmer", "student")
UNITS = {"heads": ("head", None), "neurons": ("input", ["*.down_proj"])}
TOP = (1, 2, 5, 10, 20, 40, 80, 160, 320, 1000, 3000, 10_000)
GRADIENT = "gradient"
STAND_INS = ("patch", "mean", "zero")
FEW = 1000  # components, for those that take them one by one


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


class Beside:
    """The methods on one kind of stand-in, all judged on the same fresh sets, which are measured once.

    Attributes:
        rows: by method, its figures.
        reports: by method, of `coar.evaluate`.
        attributions: by method.
    """

    def __init__(self, model: nn.Module, data: Any, components: coar.Components, args: argparse.Namespace) -> None:
        """Of these components and prompts."""
        self.model, self.data, self.components, self.args = model, data, components, args
        self.rows: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, Any] = {}
        self.attributions: dict[str, coar.Attributions] = {}
        self._outputs: dict[frozenset[int], float] = {}
        self._folder = tempfile.TemporaryDirectory()
        self.reference = self.attribute(coar.baselines.GradientTimesParameter())

    def attribute(self, method: Any) -> coar.Attributions:
        """By a method of the package."""
        options = {"output": "answer_difference", "method": method, "ablated_fraction": self.args.fraction}
        return coar.attribute(self.model, self.data, self.components, progress=False, **options)

    def add(self, name: str, method: Any) -> None:
        """A method of the package."""
        begun = time.process_time()
        found = self.attribute(method)
        spent = time.process_time() - begun
        chosen = f" ({found.provenance.method['name']})" if method == "auto" else ""
        self._judge(name + chosen.replace("_", " "), found, spent, found.provenance.cost)

    def add_own(self) -> list[str]:
        """Ours: one pass; what is chosen by default, where few; rounds; leave-one-out with pairs where it is chosen."""
        few = len(self.components) <= FEW
        self.add("path gradient, one pass", coar.PathGradient(rounds=0).bare())
        if few:
            self.add("auto", "auto")
        if "auto (path gradient)" not in self.rows:
            self.add(f"path gradient, {self.args.rounds} rounds", coar.PathGradient(rounds=self.args.rounds))
        if "auto (leave one out)" in self.rows and self.args.pairs:
            self.add("leave-one-out with pairs", coar.baselines.LeaveOneOut(pairs_among=self.args.pairs))
        return list(self.rows)

    def add_rival(self, name: str, rival: Callable[[], patch_rivals.Weights]) -> None:
        """Weights that something else makes."""
        begun = time.process_time()
        weights, cost = rival()
        spent = time.process_time() - begun
        self._judge(name, patch_rivals.as_attributions(self.reference, weights), spent, cost)

    def _judge(self, name: str, found: coar.Attributions, spent: float, cost: float) -> None:
        report = coar.evaluate(
            found, self.model, self.data, fractions=self.args.sizes, n_masks=self.args.masks, progress=False,
            out=self._folder.name,
        )  # fmt: skip
        self.reports[name], self.attributions[name] = report, found
        self.rows[name] = {
            "correlation": {str(f): [report.correlation[f], *report.interval[f]] for f in self.args.sizes},
            "slope": {str(f): report.slope[f] for f in self.args.sizes},
            "processor_seconds": round(spent, 2),
            "passes": cost,
        }
        logger.info("%s: %s", name, self.rows[name])

    def keep_best(self, beginning: str) -> None:
        """Of the methods whose names begin so, only the one that predicts best over all sizes."""
        names = [name for name in self.rows if name.startswith(beginning)]
        best = max(names, key=self._mean, default="")
        for name in set(names) - {best}:
            del self.rows[name], self.reports[name], self.attributions[name]

    def _mean(self, name: str) -> float:
        return sum(mean for mean, *_ in self.rows[name]["correlation"].values())

    def off_the_gradient(self, name: str) -> float:
        """The largest difference of a weight from the gradient's, as a share of the largest weight."""
        ours, theirs = (self.attributions[one].weights for one in (GRADIENT, name))
        return float((theirs - ours).abs().max() / ours.abs().max())

    def finish(self) -> dict[str, dict[str, Any]]:
        """The figures, with the share of the output that the k strongest keep: 1 = all, 0 = none."""
        for name, row in self.rows.items():
            order = self.attributions[name].weights.mean(0).argsort(descending=True).tolist()
            everything, nothing = self._left(order), self._left([])
            row["kept"] = {
                str(k): round((self._left(order[:k]) - nothing) / (everything - nothing), 3)
                for k in TOP
                if k < len(order)
            }
        self._folder.cleanup()
        return self.rows

    def _left(self, alone: list[int]) -> float:
        """The mean output where all but these are replaced; the same ones are measured once."""
        if (known := frozenset(alone)) not in self._outputs:
            (batch,) = self.data
            output = tasks.bind(self.model, "answer_difference", None, batch)
            kept = torch.zeros(len(self.components), dtype=torch.bool)
            kept[alone] = True
            with (
                torch.no_grad(),
                models.frozen(self.model),
                coar.ablate(self.model, self.components, kept, how="hooks"),
            ):
                self._outputs[known] = float(output.of(self.model, batch).mean())
        return self._outputs[known]


def at_equal_time(beside: Beside, own: list[str]) -> dict[str, dict[str, Any]]:
    """For every rival, the dearest of ours that took no longer (else the cheapest of all), and how much better it is.

    The interval is a bootstrap of the difference of mean correlations over masks and prompts, the same for both.
    """
    found, seconds = {}, {name: row["processor_seconds"] for name, row in beside.rows.items()}
    for rival in (name for name in beside.rows if name not in own):
        affordable = [name for name in own if seconds[name] <= 1.05 * seconds[rival]]
        ours = max(affordable, key=seconds.__getitem__) if affordable else min(own, key=seconds.__getitem__)
        pair = beside.reports[ours], beside.reports[rival]
        gains = {
            str(f): difference(pair[0].predicted[f], pair[1].predicted[f], pair[0].measured[f]) for f in sizes(pair)
        }
        found[rival] = {"ours": ours, "affordable": bool(affordable), "gain": gains}
    return found


def sizes(reports: tuple[Any, Any]) -> Iterator[float]:
    """Those that both know."""
    return (fraction for fraction in reports[0].predicted if fraction in reports[1].predicted)


def difference(ours: Tensor, theirs: Tensor, measured: Tensor, resamples: int = 1000) -> list[float]:
    """Mean correlation of ours less that of theirs, and its 95 % interval; all [masks, examples]."""
    generator = torch.Generator().manual_seed(0)

    def gap(masks: Tensor, examples: Tensor) -> float:
        true = measured[masks][:, examples]
        means = [float(correlation(one[masks][:, examples], true).nanmean()) for one in (ours, theirs)]
        return means[0] - means[1]

    n_masks, n_examples = measured.shape
    drawn = [
        gap(*(torch.randint(n, (n,), generator=generator) for n in (n_masks, n_examples))) for _ in range(resamples)
    ]
    low, high = torch.tensor(drawn).nan_to_num().quantile(torch.tensor([0.025, 0.975])).tolist()
    return [gap(torch.arange(n_masks), torch.arange(n_examples)), low, high]


def measure(model: nn.Module, clean: Any, corrupt: Any, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One stand-in after the other, with its figures."""
    granularity, include = UNITS[args.units]
    libraries = patch_rivals.PEERS if args.peers and args.units == "heads" else ()
    absent = patch_rivals.missing(["captum", *libraries])
    for package in absent:
        logger.warning("%s is not installed and is left out: pip install %s", package, package)
    ablations = stand_ins(clean, corrupt)
    for kind in args.stand_ins:
        components = coar.find_components(model, granularity, include=include, ablation=ablations[kind])
        data = coar.Patch(corrupt).paired([clean]) if kind == "patch" else [clean]
        beside = Beside(model, data, components, args)
        own = beside.add_own()
        beside.add(GRADIENT, coar.baselines.GradientTimesParameter())
        if "captum" not in absent:
            for name, rival in patch_rivals.integrated_gradients(model, data, components, args.fraction).items():
                beside.add_rival(name, rival)
            beside.keep_best(f"{patch_rivals.INTEGRATED} to 0")
        there = [name for name in libraries if kind == "patch" and name not in absent]
        peers = patch_rivals.attribution_patching(model, clean, corrupt, components, there)
        for name, rival in peers.items():
            beside.add_rival(name, rival)
        strongest = beside.attributions[own[1]].weights.mean(0).topk(min(20, len(components))).indices.tolist()
        yield (
            kind,
            {
                "n_components": len(components),
                "methods": beside.finish(),
                "at_equal_time": at_equal_time(beside, own),
                "off_the_gradient": {name: beside.off_the_gradient(name) for name in peers},
                "strongest": [str(components[i]) for i in strongest],
            },
        )


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--units", choices=UNITS, default="heads")
    parser.add_argument("--stand-ins", nargs="*", choices=STAND_INS, default=STAND_INS, help="none: draw anew")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--sizes", type=float, nargs="+", default=(0.05, 0.1, 0.2, 0.4))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--masks", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=0, help="components with pairs, if one by one is chosen")
    parser.add_argument("--peers", action="store_true", help="TransformerLens and nnsight as well")
    parser.add_argument("--out", type=Path, default=Path("scripts/results"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    path = args.out / "patching.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if args.stand_ins:
        run(args, path, results)
    show(results, args.out)


def run(args: argparse.Namespace, path: Path, results: dict[str, Any]) -> None:
    """Measure; what is known of other units stays, and of other stand-ins with the same settings."""
    from transformers import AutoTokenizer

    folder = args.models / "smollm2"
    model, tokenizer = models.load_model(folder), AutoTokenizer.from_pretrained(folder)
    clean, corrupt, texts = prompts(model, tokenizer, args.prompts)
    about = {"n_prompts": len(texts), "prompt": texts[0], "fraction": args.fraction, "rounds": args.rounds}
    about["machine"] = (
        f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__.split('+')[0]}"
    )
    about["n_masks"] = args.masks
    known = results.get(args.units, {})
    if any(known.get(name) != value for name, value in about.items()):
        known = results[args.units] = {**about, "stand_ins": {}}
    with coar.running(report=False):
        for kind, entry in measure(model, clean, corrupt, args):
            found = {**known["stand_ins"], kind: entry}
            known["stand_ins"] = {name: found[name] for name in STAND_INS if name in found}
            path.write_text(json.dumps(results, indent=1) + "\n")
            show(results, args.out)


def show(results: dict[str, Any], out: Path) -> None:
    """The table and the picture."""
    (out / "patching.md").write_text(patch_tables.table(results, __doc__ or ""))
    plots.save(patch_tables.picture(results), out / "patching.png")


if __name__ == "__main__":
    main()
