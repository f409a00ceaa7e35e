"""Rankings that were tried for edits and are not in the package: whoever imports this can say `rule="hinge"`.

`edit_rules.py` tells how they do beside the package's two; scripts whose tables were made with them go on with them.
Gain and harm are those of `hf_coar.editing.Sides`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_coar import editing
from hf_coar.editing.rules import best_first, forward_selection, mean_square


def _forward(rho: float, drift: Callable[[Tensor, Tensor], Tensor] = mean_square) -> editing.Rule:
    return lambda sides: forward_selection(sides, rho, drift)


def _spread(sides: editing.Sides) -> Tensor:
    """Standard error of the difference between targets and references, mean over the sets, [components]."""
    others = sides.reference.var(0, correction=0) / len(sides.reference)
    found = [(one.var(0, correction=0) / len(one) + others).sqrt().clamp_min(1e-30) for _, one in sides.targets]
    return torch.stack(found).mean(0)


def _falling(changes: Tensor, importance: Tensor) -> Tensor:
    """A drift that counts rising outputs of references a tenth."""
    return mean_square(changes.clamp_min(0), importance) + 0.1 * mean_square(changes, importance)


TRIED: dict[str, editing.Rule] = {
    "mean_difference": lambda sides: best_first(
        sum(-sign * (weights.mean(0) - sides.harm) for sign, weights in sides.targets)
    ),
    "heavily_penalised": lambda sides: best_first(sides.gain - 4 * sides.reference.abs().mean(0)),
    "hinge": lambda sides: best_first(sides.gain - 3 * sides.reference.clamp_min(0).mean(0)),
    "hinge_careful": lambda sides: best_first(sides.gain - 6 * sides.reference.clamp_min(0).mean(0)),
    "harm_over_spread": lambda sides: best_first((sides.gain - 3 * sides.harm) / _spread(sides)),
    "covariance_bold": _forward(0.002),
    "covariance_careful": _forward(0.1),
    "covariance_hinge": _forward(0.005, _falling),
}
for name, ranking in TRIED.items():
    editing.rule(name, replace=True)(ranking)
