"""What is told of an edit that was checked on nothing: that it was not, and what its attributions expect of it."""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions import Attributions
from hf_coar.models import outputs

logger = logging.getLogger(__name__)

_LEVEL = 0.95  # of the interval of what is expected
# Targets and references of which it was told, by what attributed them.
_told: weakref.WeakKeyDictionary[Any, set[tuple]] = weakref.WeakKeyDictionary()


def boundary_of(attributions: Attributions) -> float | None:
    """The output's boundary; attributions of before it was recorded tell by their output's name."""
    of = attributions.provenance
    known = of.boundary_known or of.output not in outputs.names()
    return of.boundary if known else outputs.get(of.output).boundary


def _is_new(given: Any, *examples: Sequence[int] | None) -> bool:
    """Whether nothing was told yet of these examples by these attributions, or by this function that makes them."""
    key = tuple(None if some is None else tuple(some) for some in examples)
    try:
        told = _told.setdefault(given, set())
    except TypeError:  # what no weak reference can be had of, or no hash
        return True
    new = key not in told
    told.add(key)
    return new


def tell(
    given: Any, attributions: Attributions, ablated: Tensor, how: tuple[str, float],
    targets: tuple[Sequence[int], Sequence[int]], reference: Sequence[int] | None,
) -> None:  # fmt: skip
    """Warns that nothing but the attributions speaks for an edit, and says what these expect of it.

    Whoever tries several numbers or rules for the same examples is warned by the first, and the others are logged.

    Args:
        given: attributions, or the function that made them.
        attributions: of the whole model.
        ablated: indices of components, int64 [any].
        how: rule and gate.
        targets: indices of examples whose outputs are to rise, and of those whose are to fall.
        reference: indices of those that are to stay; None for all others.
    """
    weight = logging.WARNING if _is_new(given, *targets, reference) else logging.INFO
    if not logger.isEnabledFor(weight):
        return
    (rule, gate), rows_of = how, [*targets[0], *targets[1]]
    boundary, level = boundary_of(attributions), _LEVEL if attributions.has_intervals(_LEVEL) else None
    expected = attributions.without(ablated, level=level)
    known = [end for end in (expected.after, expected.low, expected.high) if end is not None]
    # A gate leaves a part in place.
    if boundary is not None and not bool((expected.before > boundary).any()):
        boundary = None  # nothing to count, as of texts whose mean token is never right
    before, ends = expected.before, [expected.before + (1 - gate) * (end - expected.before) for end in known]
    others = torch.ones(len(attributions), dtype=torch.bool)
    others[rows_of] = False
    rest = others.nonzero()[:, 0].tolist() if reference is None else reference

    def said(rows: Sequence[int]) -> str:
        def mean(values: Tensor) -> str:
            values = values[list(rows)]
            return f"{float(values.mean()):.3g}" if boundary is None else f"{(values > boundary).float().mean():.1%}"

        what = attributions.provenance.unit if boundary is None else "right"
        between = f" (within {mean(ends[1])} to {mean(ends[2])})" if level else ""
        return f"{mean(before)} to {mean(ends[0])}{between} {what}"

    logger.log(
        weight,
        "this edit was checked on nothing: %d components by rule %s. The attributions that chose them expect targets "
        "from %s, others from %s; measure it, give validation=…, or take coar.forget, fix, lift, match or steer, which "
        "choose and measure on examples of their own",
        len(ablated), rule, said(rows_of), said(rest),
    )  # fmt: skip
