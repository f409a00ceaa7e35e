"""Other orders in which to ablate, each with a rule and a number of components of its own, chosen like the edit's."""

import torch
from torch import Tensor, nn

from hf_coar.editing.choosing import numbers_to_try
from hf_coar.editing.making import kept_without, with_ablated
from hf_coar.editing.rules import RULES, best_first
from hf_coar.editing.tasks.aims import Aim, rival
from hf_coar.editing.tasks.setting import common_entries
from hf_coar.editing.tasks.walking import best
from hf_coar.estimators.gates import GatePasses
from hf_coar.models import calling, device_of, frozen

KINDS = ("forget", "fix", "lift", "match", "steer")
MOST_OF_PAIRS = 0.02  # of the components, for edits by a few pairs


def _chosen(aim: Aim, rankings: dict[str, Tensor]) -> nn.Module:
    """The best number of components of the best ranking, by the examples and limits of the edit."""
    n_all = len(aim.of.masked)
    most = max(1, int(MOST_OF_PAIRS * n_all)) if aim.kind == "match" else None
    numbers = range(1, most + 1) if most and most <= 30 else numbers_to_try(n_all, most)
    before = aim.judge(aim.of.model)
    points = [aim.candidate(order[:k], name) for name, order in rankings.items() for k in numbers]
    point = best(points, aim.wanted, before)
    named = [aim.of.masked.components[int(index)] for index in point.ablated]
    parameters = {name for one in named for name in (one.group.parameter, *one.group.shared_by)}
    record = common_entries(aim.of) | {
        "task": aim.task, "rule": point.rule, "components": [str(one) for one in named],
        "indices": point.ablated.tolist(), "parameters": sorted(parameters), **aim.entries(),
    }  # fmt: skip
    return with_ablated(aim.of.model, aim.of.masked.components, kept_without(n_all, point.ablated), record)


@rival("welch", KINDS)
def welch(aim: Aim) -> nn.Module:
    """The paper's: Welch's t of the attributions, the number of components chosen like the edit's."""
    return _chosen(aim, {"welch": RULES["welch"](aim.plain().sides(aim.weigh, aim.of.model))})


@rival("gradient_times_parameter", KINDS)
def gradient_times_parameter(aim: Aim) -> nn.Module:
    """Gradient times parameter in the place of attributions, by the better of two rankings of its own."""
    sides = aim.plain().sides(lambda output, batches: gradients(aim, output, batches).double(), aim.of.model)
    return _chosen(aim, {f"gradient × parameter, {rule}": RULES[rule](sides) for rule in ("welch", "penalised")})


@rival("activation_difference", ("match",))
def activation_difference(aim: Aim) -> nn.Module:
    """By how much more a component does with the trigger than without it, over what it does without.

    Fine-pruning's idea (Liu, Dolan-Gavitt, Garg 2018), with pairs: what only triggered examples excite goes first.
    """
    passes = GatePasses(aim.of.masked, aim.of.looker.output)
    energies = []
    with frozen(aim.of.model):
        for side in aim.pairs:
            found = []
            for batch in side:
                passes.begin_batch()
                found.append(passes.energies(calling.to(batch, device_of(aim.of.model)))[1].cpu())
            energies.append(torch.cat(found).double().sqrt())
    clean, triggered = energies
    difference = (triggered - clean).mean(0)
    ratio = difference / clean.mean(0).clamp_min(1e-9)
    return _chosen(aim, {"activation difference": best_first(difference), "its ratio": best_first(ratio)})


def gradients(aim: Aim, output: object, batches: list) -> Tensor:
    """Gradient times parameter of every component, float32 [examples, components]."""
    passes, found = GatePasses(aim.of.masked, output), []
    with frozen(aim.of.model):
        for batch in batches:
            moved = calling.to(batch, device_of(aim.of.model))
            passes.begin_batch()
            ones = torch.ones(calling.n_examples(moved), len(aim.of.masked), device=device_of(aim.of.model))
            found.append(passes(moved, ones)[1].cpu())
    return torch.cat(found)
