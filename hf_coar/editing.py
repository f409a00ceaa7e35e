"""COAR-Edit: ablate the few components that move the outputs of target examples, and spare those of references."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import masking, models
from hf_coar.attributions import Attributions
from hf_coar.components import Components
from hf_coar.errors import CoarError


def welch_scores(weights: Tensor, targets: Sequence[int], reference: Sequence[int]) -> Tensor:
    """Welch's t of every component, targets against references (Shah, Ilyas, Mądry 2024, section 5).

    Args:
        weights: float32 [examples, components].
        targets: indices of examples; a single one is allowed.
        reference: indices of examples.

    Returns:
        float64 [components]; ablating the lowest raises the targets' outputs, ablating the highest lowers them.
    """
    of_targets, of_reference = weights[list(targets)].double(), weights[list(reference)].double()
    difference = of_targets.mean(0) - of_reference.mean(0)
    variance = of_targets.var(0, correction=0) / len(of_targets)
    variance = variance + of_reference.var(0, correction=0) / len(of_reference)
    # A component without any effect has neither difference nor variance.
    return difference / variance.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def rank_components(
    attributions: Attributions,
    increase: Sequence[int] | None = None,
    decrease: Sequence[int] | None = None,
    reference: Sequence[int] | None = None,
) -> Tensor:
    """All components, the best to ablate first, int64 [components].

    Args:
        attributions: of the model.
        increase: indices of examples whose outputs are to rise.
        decrease: indices of examples whose outputs are to fall.
        reference: indices of examples whose outputs are to stay; all others by default.

    Raises:
        CoarError: no targets, no references, an index out of range, or an example on both sides.
    """
    n_examples = len(attributions)
    increase, decrease = _indices(increase), _indices(decrease)
    targets = {*increase, *decrease}
    if not targets:
        raise CoarError("nothing to edit for: give the indices of examples to increase or to decrease")
    if reference is None:
        reference = [index for index in range(n_examples) if index not in targets]
    reference = _indices(reference)
    _check_indices(n_examples, increase, decrease, reference)
    score = torch.zeros(len(attributions.components), dtype=torch.float64)
    if increase:
        score += welch_scores(attributions.weights, increase, reference)
    if decrease:
        score -= welch_scores(attributions.weights, decrease, reference)
    return score.argsort(stable=True)


def _indices(examples: Sequence[int] | None) -> list[int]:
    """Plain integers, also from tensors and arrays."""
    return [] if examples is None else [int(index) for index in examples]


def _check_indices(n_examples: int, increase: list[int], decrease: list[int], reference: list[int]) -> None:
    if not reference:
        raise CoarError(f"no references: all {n_examples} examples are targets; give fewer targets")
    outside = [index for index in (*increase, *decrease, *reference) if not 0 <= index < n_examples]
    if outside:
        raise CoarError(
            f"examples {outside[:8]} are out of range: the attributions are of examples 0 to {n_examples - 1}"
        )
    groups = {"increase": set(increase), "decrease": set(decrease), "reference": set(reference)}
    for a, b in (("increase", "decrease"), ("increase", "reference"), ("decrease", "reference")):
        if both := groups[a] & groups[b]:
            raise CoarError(f"examples {sorted(both)[:8]} are in both {a} and {b}")


def edit(
    model: nn.Module,
    attributions: Attributions,
    increase: Sequence[int] | None = None,
    decrease: Sequence[int] | None = None,
    reference: Sequence[int] | None = None,
    n_components: int = 10,
) -> nn.Module:
    """A copy of the model in which a few components are ablated; the model itself stays as it was.

    It is an ordinary model: save it with its own library (or `edited.save`) and it loads without hf_coar. `undo` makes
    the original of it again.

    Args:
        model: the model that was attributed.
        attributions: of it.
        increase: indices of examples whose outputs are to rise.
        decrease: indices of examples whose outputs are to fall.
        reference: indices of examples whose outputs are to stay; all others by default.
        n_components: how many components to ablate. Choose it on examples that judge nothing else.

    Raises:
        CoarError: targets or references that make no sense, or `n_components` out of range.
        ModelMismatchError: another model.
    """
    n_all = len(attributions.components)
    if not isinstance(n_components, int) or not 1 <= n_components <= n_all:
        raise CoarError(f"n_components={n_components!r}; must be a whole number from 1 to {n_all}")
    attributions.check_model(models.fingerprint(model), models.record(model))
    chosen = rank_components(attributions, increase, decrease, reference)[:n_components]
    edited = models.copy_with_record(model, edit=_entries(attributions, chosen, increase, decrease, reference))
    masking.zero_slices(edited, attributions.components, kept_without(n_all, chosen))
    return edited


def _entries(
    attributions: Attributions,
    chosen: Tensor,
    increase: Sequence[int] | None,
    decrease: Sequence[int] | None,
    reference: Sequence[int] | None,
) -> dict[str, Any]:
    """The record of an edit, JSON values: what was ablated and why, and all that `undo` needs."""
    components = [attributions.components[int(index)] for index in chosen]
    parameters = {name for c in components for name in (c.group.parameter, *c.group.shared_by)}
    return {
        "rule": "welch",
        "output": attributions.config.get("output"),
        "granularity": attributions.components.granularity,
        "data": attributions.config.get("data"),
        "increase": _indices(increase),
        "decrease": _indices(decrease),
        "reference": "all others" if reference is None else list(reference),
        "base": attributions.config["model"],
        "components": [str(component) for component in components],
        "indices": chosen.tolist(),
        "parameters": sorted(parameters),
    }


def choose_n_components(
    model: nn.Module,
    components: Components,
    ranking: Tensor,
    score: Callable[[nn.Module], float],
    candidates: Sequence[int],
) -> tuple[int, list[float]]:
    """How many components to ablate: the number whose model scores best, the smallest of equals.

    Args:
        model: unchanged afterwards.
        components: its components.
        ranking: from `rank_components`.
        score: judges the ablated model on validation examples, which must judge nothing else; more is better.
        candidates: the numbers to try.

    Returns:
        The best number, and the score of every candidate.

    Raises:
        CoarError: no candidates, or one out of range.
    """
    if not candidates or not all(1 <= k <= len(components) for k in candidates):
        raise CoarError(f"candidates {list(candidates)[:8]}: give numbers from 1 to {len(components)}")
    scores = []
    for k in candidates:
        with masking.ablate(model, components, kept_without(len(components), ranking[:k])):
            scores.append(float(score(model)))
    return candidates[scores.index(max(scores))], scores


def kept_without(n_components: int, ablated: Tensor | Sequence[int]) -> Tensor:
    """The mask bool [components] that ablates just these components."""
    kept = torch.ones(n_components, dtype=torch.bool)
    kept[torch.as_tensor(ablated, dtype=torch.long)] = False
    return kept
