"""What the scripts of the edits share: examples in memory, the baselines, fine-tuning, tables, pictures and cards.

Where a script does not say otherwise, attributions are from one part of the data, the rule and the number of components
are chosen on a second, and all figures are from a third that nothing was chosen on. Tables, pictures and cards are
written after every seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import edit_rankings  # noqa: F401  (registers them)
import torch
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import editing, models, plots
from hf_coar.editing import edited
from hf_coar.errors import UnsatisfiedError
from hf_coar.estimators import baselines
from hf_coar.models import outputs
from hf_coar.plots import canvas
from hf_coar.storage import cards, files

logger = logging.getLogger("edits")

ROOT = Path(__file__).resolve().parent.parent
BATCH = 250

Examples = dict[str, Tensor]
Batches = list[Examples]
Sides = dict[str, Any]  # increase, decrease and reference, as `coar.edit` takes them


# --------------------------------------------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    made.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    made.add_argument("--first-seed", type=int, default=0, help="others are drawn from it on (default: %(default)s)")
    made.add_argument(
        "--runs", type=Path, default=Path("runs/edits"), help="trained models, attributions, edited models"
    )
    made.add_argument("--results", type=Path, default=ROOT / "scripts/results/edits")
    made.add_argument("--cards", type=Path, default=ROOT / "model_cards")
    made.add_argument("--threads", type=int, default=2)
    return made


def _add_hub_options(made: argparse.ArgumentParser) -> None:
    """A model and data of the Hub, in the place of the small ones."""
    made.add_argument("--model", help="Hub id or folder of a timm or transformers model, in the place of the small one")
    made.add_argument("--data", help="Hub id or folder of its data set")
    made.add_argument("--split", default="validation[:4000]")


def add_trained_models(made: argparse.ArgumentParser) -> None:
    """Classifiers that are there already, and the dearest of the baselines."""
    made.add_argument("--models", type=Path, nargs="*", default=(), help="folders of train_demo_model.py, a seed each")
    made.add_argument("--no-leave-one-out", action="store_true", help="it costs a pass a component and example")


def main(
    description: str,
    of_seed: Callable[[argparse.Namespace, int], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], list[list[str]]],
    report: Callable[[argparse.Namespace, list[dict[str, Any]], float], None],
    options: Callable[[argparse.ArgumentParser], None] = lambda made: None,
    hub: bool = True,
) -> None:
    """All seeds; after each its rows in the log, and the table, the picture and a card anew.

    Args:
        description: the script's docstring.
        of_seed: runs one seed.
        summary: rows of the table.
        report: writes everything that was found so far.
        options: adds the script's own.
        hub: whether a model and data of the Hub can take the place of the small ones.
    """
    made = parser(description)
    if hub:
        _add_hub_options(made)
    options(made)
    args, found = made.parse_args(), []
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_coar").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        found.append(of_seed(args, seed))
        for row in summary([found[-1]]):
            logger.info("seed %d: %s", seed, row)
        report(args, found, started)


# --------------------------------------------------------------------------------------------------------- examples


def batches(examples: Examples, indices: Tensor | Sequence[int] | None = None, size: int = BATCH) -> Batches:
    """Examples in batches; those of `indices`, in that order, or all."""
    n_examples = len(next(iter(examples.values())))
    indices = torch.arange(n_examples) if indices is None else torch.as_tensor(indices, dtype=torch.long)
    return [{name: column[rows] for name, column in examples.items()} for rows in indices.split(size)]


def in_memory(data: Iterable[Examples]) -> Examples:
    """All batches of a data set as one."""
    read = list(data)
    return {name: torch.cat([batch[name] for batch in read]) for name in read[0]}


def output_of(model: nn.Module, data: Batches, output: Any = "margin") -> Tensor:
    """An output of every example, float32 [examples]."""
    function = outputs.get(output)
    with models.frozen(model), torch.no_grad():
        return torch.cat([function(models.logits(model, batch), batch) for batch in data])


def share_right(model: nn.Module, data: Batches) -> float:
    """Accuracy in percent."""
    return 100 * float((output_of(model, data) > 0).float().mean())


def attribute(
    model: nn.Module, data: Batches, components: coar.Components, seed: int, output: Any = "margin", rounds: int = 8
) -> coar.Attributions:
    """Path gradient, 5 % ablated."""
    method = coar.PathGradient(rounds=rounds)
    return coar.attribute(
        model, data, components, output=output, method=method, ablated_fraction=0.05, seed=seed, progress=False
    )


# -------------------------------------------------------------------------------------------------------- baselines

RANDOM, NORM, GRADIENT, SINGLES = "random components", "weight norm", "gradient × parameter", "leave-one-out"
TUNING = "fine-tuning"
BASELINES = (RANDOM, NORM, GRADIENT, SINGLES, TUNING)


def baseline_weights(
    model: nn.Module, data: Batches, components: coar.Components, output: Any = "margin", singles: bool = True
) -> dict[str, coar.Attributions]:
    """Attributions by the baselines that need examples."""
    methods: dict[str, Any] = {GRADIENT: baselines.GradientTimesParameter()}
    methods |= {SINGLES: baselines.LeaveOneOut()} if singles else {}
    return {
        name: coar.attribute(
            model, data, components, output=output, method=method, ablated_fraction=0.05, progress=False
        )
        for name, method in methods.items()
    }


def baseline_rankings(
    model: nn.Module,
    components: coar.Components,
    weights: Mapping[str, coar.Attributions],
    sides: Sides,
    rule: str,
    seed: int,
) -> dict[str, Tensor]:
    """The components in the order of each baseline; where it gives weights, by the rule of the edit itself."""
    generator = torch.Generator().manual_seed(seed)
    rankings = {
        RANDOM: torch.randperm(len(components), generator=generator),
        NORM: editing.best_first(torch.cat(baselines.weight_norms(model, components))),
    }
    return rankings | {name: editing.rank_components(found, **sides, rule=rule) for name, found in weights.items()}


def single_ranking(
    model: nn.Module, data: Batches, components: coar.Components, sides: Sides, rule: str, output: Any = "margin"
) -> Tensor:
    """The order by leave-one-out, from a few examples of their own: it costs a pass a component and example."""
    found = baseline_weights(model, data, components, output)[SINGLES]
    return editing.rank_components(found, **sides, rule=rule)


def measured(
    model: nn.Module, components: coar.Components, ranking: Tensor, n_components: int, measure: Callable
) -> Any:
    """What `measure` gives for the model without the first components of a ranking."""
    with coar.ablate(model, components, editing.kept_without(len(components), ranking[:n_components])):
        return measure(model)


def fine_tuned(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    validation: Callable[[nn.Module], float],
    constraint: Any = (),
    rates: Sequence[float] = (1e-5, 1e-4, 1e-3),
    checkpoints: Sequence[int] = (1, 2, 4, 8, 16, 32),
) -> nn.Module | None:
    """The alternative: Adam on the same examples, its rate and steps chosen like the edit; None if nothing satisfies.

    Batch normalisation keeps its statistics: a few examples would spoil them.
    """
    given = constraint if isinstance(constraint, Sequence) else (constraint,)
    slacks = [one.bind(model) if hasattr(one, "bind") else one for one in given]
    best, best_goal = None, -float("inf")
    for rate in rates:
        tuned = copy.deepcopy(model).eval()
        optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=rate)
        for step in range(1, max(checkpoints) + 1):
            optimiser.zero_grad()
            loss(tuned).backward()
            optimiser.step()
            if step in checkpoints and all(slack(tuned) >= 0 for slack in slacks):
                goal = validation(tuned)
                if goal > best_goal:
                    best, best_goal = copy.deepcopy(tuned), goal
    return best


def edited_if_any(*given: Any, **options: Any) -> nn.Module | None:
    """`coar.edit`; None if nothing satisfies the constraints."""
    try:
        return coar.edit(*given, **options)
    except UnsatisfiedError as error:
        logger.info("%s", error)
        return None


def chosen_of(
    model: nn.Module,
    components: coar.Components,
    ranking: Tensor,
    validation: Any,
    constraint: Any = (),
    **options: Any,
) -> int | None:
    """How many components of one ranking; None if nothing satisfies the constraints."""
    try:
        return editing.choose(model, components, {"": ranking}, validation, constraint, **options).best.n_components
    except UnsatisfiedError as error:
        logger.info("%s", error)
        return None


# -------------------------------------------------------------------------------------------- tables, pictures, cards


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds, such as `87.1 ± 0.4`."""
    values = [float(value) for value in values]
    mean = f"{statistics.fmean(values):.{digits}f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def write(args: argparse.Namespace, name: str, text: str, found: Sequence[dict[str, Any]], started: float) -> None:
    """`<name>.md`, and `<name>.json` with what was found for every seed, in the folder of the results."""
    args.results.mkdir(parents=True, exist_ok=True)
    seconds, used = round(time.monotonic() - started), round(time.process_time())
    which = f"Seeds {', '.join(str(args.first_seed + place) for place in range(len(found)))}"
    seeds_ = [{key: value for key, value in one.items() if key != "edited"} for one in found]
    text = f"{text.rstrip()}\n\n{which}; {args.threads} threads, {seconds} s, {used} s of processor time.\n"
    (args.results / f"{name}.md").write_text(text, encoding="utf-8")
    (args.results / f"{name}.json").write_text(
        json.dumps({"seeds": seeds_, "seconds": seconds, "processor_seconds": used}, indent=1) + "\n"
    )
    logger.info("%s\n%s", args.results / f"{name}.md", text)


def card(args: argparse.Namespace, name: str, changed: nn.Module, figures: edited.Figures, picture: Path) -> None:
    """Save an edited model with its card, and copy the card to `model_cards/`."""
    folder = args.runs / "edited" / name
    pictures = args.runs / "pictures" / name
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, pictures)
    if folder.exists():
        shutil.rmtree(folder)  # a card of an earlier run would stay if somebody had looked into it
    edited.save(changed, folder, figures, pictures=pictures)
    entries = files.read_json(folder / edited.RECORD)
    args.cards.mkdir(parents=True, exist_ok=True)
    text = cards.edited_model_card(entries, pictures=[f"../scripts/results/edits/{picture.name}"])
    (args.cards / f"{name}.md").write_text(text, encoding="utf-8")


def methods_of(found: Sequence[dict[str, Any]]) -> list[str]:
    """What some seed has a figure for, in order; not every method finds an edit for every seed."""
    return list(dict.fromkeys(name for one in found for name in one["methods"]))


def against_before(found: Sequence[dict[str, Any]], method: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(its figures, those before the edit) for every seed that has them."""
    return [(one["methods"][method], one["methods"]["before"]) for one in found if method in one["methods"]]


def counts(pairs: Sequence[tuple[dict[str, Any], Any]]) -> str:
    """How many components went, by seed."""
    return ", ".join(str(after["k"]) for after, _ in pairs) if pairs[0][0]["k"] else "–"


def said(method: str, n_found: int, n_seeds: int) -> str:
    """The first cell of a row of a table."""
    return method if n_found == n_seeds else f"{method} ({n_found} of {n_seeds} seeds)"


def two_panels(
    rows: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    title: str,
    detail: str,
    goals: tuple[float | None, float | None] = (None, None),
    highlight: str | None = None,
) -> Any:
    """A row a method, a panel a measure: one dot a seed (or edit), the mean as a bar; goals as dotted lines."""
    import matplotlib.figure

    height = 1.35 + 0.3 * max(3, len(rows))
    figure = matplotlib.figure.Figure(figsize=(7.5, height), dpi=canvas.DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for place, (axes, label, goal) in enumerate(zip(panels, labels, goals, strict=True)):
        for y, (name, values) in enumerate(rows.items()):
            column = [pair[place] for pair in values]
            colour = canvas.VERMILLION if name == highlight else canvas.BLUE
            axes.plot(column, [y] * len(column), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
            axes.plot([statistics.fmean(column)], [y], "|", color=colour, markersize=15, markeredgewidth=2.5)
        if goal is not None:
            axes.axvline(goal, color=canvas.INK, linewidth=1, linestyle=":")
        axes.set_xlabel(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=canvas.INK)
        axes.grid(axis="both", color=canvas.FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.margins(x=0.08)
    panels[0].set_yticks(range(len(rows)), list(rows), fontsize=9)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == highlight else "normal")
    figure.suptitle(f"{title}\n{detail}" if detail else title, x=0.015, ha="left", fontsize=10)
    return figure


def save_figure(args: argparse.Namespace, name: str, figure: Any) -> Path:
    """As PNG in the folder of the results."""
    return plots.save(figure, args.results / f"{name}.png")
