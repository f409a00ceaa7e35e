"""Census: the components of every architecture of timm and transformers, and whether ablating them is exact.

Coverage builds every architecture at full size on the meta device (no memory, no download) and finds its components.
Exactness shrinks every family that can be shrunk to a tiny random model and measures the laws of `tests/exactness.py`.
Both write one line a model into a folder as they go, and go on where they stopped; `report` makes the table.

    python scripts/census.py coverage /tmp/census      # 1,371 + 804 builds, about 10 minutes on one core
    python scripts/census.py exactness /tmp/census     # about 700 tiny models, about 45 minutes on one core
    python scripts/census.py report /tmp/census        # writes scripts/results/census.md
"""

import argparse
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny_models
from exactness import check, granularities

import hf_coar as coar
from hf_coar.components.discovery import NO_RULE
from hf_coar.errors import NoComponentsError

RESULT = Path(__file__).resolve().parent / "results" / "census.md"
FIRST = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION")


def build_transformers(model_type: str) -> nn.Module:
    """The type's default configuration in the first class that takes it: task models first, the bare model last."""
    failure: Exception = LookupError("a part of other models: no class of its own")
    for completed in (False, True):
        config = CONFIG_MAPPING[model_type]()
        if completed:
            complete(config)
        for model_class in classes_of(type(config)):
            try:
                return model_class(config)
            except TimeoutError:
                raise
            except Exception as error:
                failure = error if isinstance(failure, LookupError) else failure
    raise failure


def classes_of(config_class: type) -> list[type]:
    """All model classes for a configuration, by the automatic mappings."""
    every = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING")]
    names = [f"MODEL_FOR_{task}_MAPPING" for task in FIRST]
    names += [name for name in every if name not in names and name != "MODEL_MAPPING"] + ["MODEL_MAPPING"]
    found: list[type] = []
    for name in names:
        mapping = getattr(modeling_auto, name)
        if config_class in mapping:
            classes = mapping[config_class]
            found += classes if isinstance(classes, tuple) else [classes]
    return found


def complete(config: transformers.PretrainedConfig) -> None:
    """Values for what defaults leave to checkpoints: sizes of heads, a vocabulary, a horizon."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    defaults = {
        "prediction_length": 24, "vocab_size": 32_000, "num_key_value_heads": heads, "pad_token_id": 0,
        "head_dim": width // heads if isinstance(width, int) and isinstance(heads, int) else None,
        "rms_norm_eps": 1e-6, "num_attention_heads": 12,
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(config, name, 0) is None and value is not None:
            setattr(config, name, value)
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            complete(part)


def coverage_of(model: nn.Module) -> dict:
    """Components by granularity and kind, and the share of weights that hold them."""
    found = coar.find_components(model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    covered = sum(tensors[name].numel() for name in {group.parameter for group in found.groups})
    missed = [skipped for skipped in found.skipped if skipped.reason.startswith(NO_RULE)]
    kinds: Counter[str] = Counter()
    for group in found.groups:
        kinds[group.kind] += group.size
    for granularity in ("head", "expert"):
        try:
            kinds[granularity] = len(coar.find_components(model, granularity))
        except NoComponentsError:
            continue
    return {
        "kinds": dict(kinds),
        "covered": covered,
        "missed": sum(skipped.n_parameters for skipped in missed),
        "reasons": sorted({skipped.reason.split(";")[0] for skipped in missed}),
    }


def coverage_jobs() -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every architecture of both libraries."""

    def job(build: Callable[[], nn.Module]) -> dict:
        start = time.perf_counter()
        with torch.device("meta"):
            model = build()
        built = time.perf_counter()
        return {**coverage_of(model), "build": built - start, "find": time.perf_counter() - built}

    for name in timm.list_models():
        yield f"timm/{name}", lambda name=name: job(lambda: timm.create_model(name, pretrained=False))
    for model_type in CONFIG_MAPPING:
        yield f"transformers/{model_type}", lambda t=model_type: job(lambda: build_transformers(t))


def exactness_jobs() -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every family that has a tiny model."""

    def job(build: Callable[[], tiny_models.TinyModel]) -> dict:
        tiny = build()
        result = {"counts": granularities(tiny.model), "laws": {}, "failures": [], "unused": [], "bypassed": []}
        for granularity in result["counts"]:
            measured = check(tiny, granularity, thorough=granularity == "unit")
            result["laws"][granularity] = measured.differences
            result["failures"] += [f"{granularity}: {failure}" for failure in measured.failures()]
            result["bypassed"] += measured.bypassed
            if granularity == "unit":
                result.update(dtype=str(measured.dtype), effect=measured.effect)
                result.update(unused=measured.unused, notes=measured.notes)
        return result

    for head, model_type in tiny_models.transformers_pairs():
        yield f"{head}/{model_type}", lambda h=head, t=model_type: job(lambda: tiny_models.tiny_transformers(h, t))
    for name in tiny_models.timm_families():
        yield f"timm/{name}", lambda name=name: job(lambda: tiny_models.tiny_timm(name))


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises `TimeoutError` in the block after so many seconds."""

    def on_alarm(signum: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def sweep(jobs: Iterator[tuple[str, Callable[[], dict]]], table: Path, limit: int) -> None:
    """Run all jobs that have no line in the table yet."""
    done = {json.loads(line)["name"] for line in table.read_text().splitlines()} if table.exists() else set()
    with table.open("a") as lines:
        for name, job in jobs:
            if name in done:
                continue
            start = time.perf_counter()
            try:
                with time_limit(limit):
                    result = job()
            except Exception as error:
                stage = "built" if isinstance(error, coar.CoarError) else "error"
                text = " ".join(str(error).split()).replace(sys.prefix, "…")[:160]
                result = {stage: f"{type(error).__name__}: {text}"}
            seconds = round(time.perf_counter() - start, 2)
            lines.write(json.dumps({"name": name, "seconds": seconds, **result}) + "\n")
            lines.flush()


def lines_of(folder: Path, step: str) -> list[dict]:
    """All finished jobs of a step, by name."""
    path = folder / f"{step}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted({entry["name"]: entry for entry in found}.values(), key=lambda entry: entry["name"])


def share(found: list[dict]) -> float:
    """Covered weights of all that hold components."""
    covered = sum(entry["covered"] for entry in found)
    return covered / max(1, covered + sum(entry["missed"] for entry in found))


def totals_of(coverage: list[dict], exactness: list[dict]) -> dict:
    """The figures that the tests look at."""
    totals: dict = {"exact": {}, "tiny": {}}
    for library in ("timm", "transformers"):
        of_library = [entry for entry in coverage if entry["name"].startswith(f"{library}/")]
        found = [entry for entry in of_library if "covered" in entry]
        unbuilt = [entry for entry in of_library if "error" in entry]
        totals[library] = {
            "architectures": len(of_library),
            "constructible": len(of_library) - len(unbuilt),
            "found": len(found),
            "coverage": round(share(found), 6),
            "lowest": round(min((share([entry]) for entry in found), default=0.0), 4),
            "below_95": [entry["name"] for entry in found if share([entry]) < 0.95],
            "slowest_search_seconds": round(max((entry["find"] for entry in found), default=0.0), 1),
            "with_heads": sum("head" in entry["kinds"] for entry in found),
            "with_experts": sum("expert" in entry["kinds"] for entry in found),
        }
        tiny = [e for e in exactness if "laws" in e and e["name"].startswith("timm/") == (library == "timm")]
        totals["tiny"][library] = len(tiny)
        totals["exact"][library] = sum(not entry["failures"] for entry in tiny)
    return totals


def verdict(entry: dict) -> str:
    """One cell: exact or why not."""
    if "laws" not in entry:
        return f"no tiny model: {entry.get('error') or entry.get('built')}"
    return "; ".join(entry["failures"] or ["exact", *entry.get("notes", ())])


def report(folder: Path) -> str:
    """The table: totals, one line an architecture, one line a tiny model."""
    coverage, exactness = lines_of(folder, "coverage"), lines_of(folder, "exactness")
    totals = totals_of(coverage, exactness)
    rows = [
        "# Census",
        "",
        f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}; made by",
        "`scripts/census.py`. Coverage: of the weights in matrices, filters and stacks of experts outside of",
        "embeddings, classifier heads and norms, the share that holds components (granularity unit).",
        "",
        f"<!-- totals {json.dumps(totals)} -->",
        "",
        "| library | architectures | constructible | found | coverage | lowest | with heads | with experts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library in ("timm", "transformers"):
        t = totals[library]
        cells = [t["architectures"], t["constructible"], t["found"], f"{t['coverage']:.4%}", f"{t['lowest']:.2%}"]
        rows.append(f"| {library} | " + " | ".join(map(str, [*cells, t["with_heads"], t["with_experts"]])) + " |")
    exact, tiny = totals["exact"], totals["tiny"]
    rows += [
        "",
        f"Exact: {exact['transformers']} of {tiny['transformers']} (head, type) pairs of transformers and "
        f"{exact['timm']} of {tiny['timm']} families of timm that have a tiny model.",
        "",
        "## Exactness",
        "",
        "Hooks, weights and zeroing by hand; one mask an example; gates of one; gradients; saving and loading. Limits: "
        "1e-9 of the logits' scale in float64, 1e-5 where the model computes in float32 inside.",
        "",
        "| model | components | result | unused weights |",
        "|---|---|---|---|",
    ]
    for entry in exactness:
        counts = ", ".join(f"{size:,} {name}" for name, size in entry.get("counts", {}).items())
        unused = len(entry.get("unused", ())) or ""
        rows.append(f"| {entry['name']} | {counts} | {verdict(entry).replace('|', '/')} | {unused} |")
    rows += ["", "## Coverage", "", "| architecture | components by kind | coverage | left out |", "|---|---|---|---|"]
    for entry in coverage:
        if "covered" in entry:
            kinds = ", ".join(f"{size:,} {kind}" for kind, size in entry["kinds"].items())
            left = "; ".join(entry["reasons"]) if entry["missed"] else ""
            rows.append(f"| {entry['name']} | {kinds} | {share([entry]):.2%} | {left} |")
        else:
            rows.append(f"| {entry['name']} | | | {(entry.get('error') or entry['built']).replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["coverage", "exactness", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=90, help="seconds a model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    jobs = {"coverage": coverage_jobs, "exactness": exactness_jobs}
    if arguments.step in jobs:
        sweep(jobs[arguments.step](), arguments.folder / f"{arguments.step}.jsonl", arguments.limit)
    else:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(report(arguments.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
