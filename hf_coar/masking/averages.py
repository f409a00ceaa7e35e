"""Means of activations over examples and positions, a vector a matrix, and which normalisation comes behind it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.components import Group
from hf_coar.errors import CoarError


class Averages:
    """Sums of what groups of components make (or read), noted run by run."""

    def __init__(self, groups: Sequence[Group], per_position: bool) -> None:
        """Nothing was noted yet."""
        self._groups, self._per_position = groups, per_position
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._pads: Tensor | None = None
        self._n_examples = 0
        self._seen: list[tuple[Tensor, str]] = []  # of this batch: held, so that no other tensor is taken for one
        self._read_by: dict[str, set[str]] = {}

    def of(self, batch: Mapping[str, Any]) -> None:
        """What comes next is of this batch."""
        attended = batch.get("attention_mask")
        whole = not isinstance(attended, Tensor) or attended.dim() != 2 or bool(attended.all())
        self._pads, self._seen = None if whole else ~attended.bool(), []
        self._n_examples = len(next(iter(batch.values())))

    def note(self, group: Group, activation: Tensor, of: slice) -> None:
        """Add what a module made (or read) in one run."""
        self._seen.append((activation, group.parameter))
        padding = self._padding(activation, group.feature_axis)
        real = activation if padding is None else activation.masked_fill(padding, 0)
        counts = torch.ones_like(activation[..., :1] if padding is None else padding, dtype=torch.float64)
        counts = counts if padding is None else counts.masked_fill(padding, 0)
        if self._per_position:
            self._check_first(group, activation)
            self._add(group, real.sum(0, dtype=torch.float64), counts.expand_as(activation).sum(0))
            return
        axes = [axis for axis in range(activation.dim()) if axis != activation.dim() + group.feature_axis]
        total = real.sum(axes, dtype=torch.float64)
        n_real = activation.numel() / len(total) if padding is None else float(counts.sum())
        chosen = torch.zeros_like(total)
        chosen[of] = 1
        self._add(group, total * chosen, n_real * chosen)

    def _check_first(self, group: Group, activation: Tensor) -> None:
        if activation.shape[0] != self._n_examples:
            raise CoarError(
                f"{group.module!r} sees {list(activation.shape)} for {self._n_examples} examples, so that there is no "
                "mean for every position; leave it out, or take Mean(data) without per_position"
            )

    def _padding(self, activation: Tensor, feature_axis: int) -> Tensor | None:
        """Where padding is, bool [examples, positions, 1] or the other way round; None if there is none to be seen."""
        padding = self._pads
        if padding is None or feature_axis != -1 or activation.dim() != 3:
            return None
        if activation.shape[:-1] == padding.shape:
            return padding.to(activation.device)[..., None]
        return padding.T.to(activation.device)[..., None] if activation.shape[:-1] == padding.T.shape else None

    def _add(self, group: Group, total: Tensor, count: Tensor) -> None:
        total, count = total.cpu(), count.cpu()
        if group.parameter not in self._sums:
            self._sums[group.parameter], self._counts[group.parameter] = total, count
            return
        if self._sums[group.parameter].shape != total.shape:
            raise CoarError(
                f"{group.module!r} sees {list(total.shape)} for some examples and "
                f"{list(self._sums[group.parameter].shape)} for others, so that there is no mean for every position; "
                "give examples of one shape, or take Mean(data) without per_position"
            )
        self._sums[group.parameter] += total
        self._counts[group.parameter] += count

    def means(self) -> dict[str, Tensor]:
        """Float32 by the name of the parameter: [features], or at every position.

        Raises:
            CoarError: modules that no example reached.
        """
        silent = [group.module for group in self._groups if group.parameter not in self._sums]
        silent += [g.module for g in self._groups if g.module not in silent and not self._counts[g.parameter].any()]
        if silent:
            raise CoarError(
                f"{len(silent)} modules did not run on these examples, so that there is no mean of what they make: "
                f"{', '.join(silent[:8])}; leave them out with find_components(model, exclude=[…]), or give other data"
            )
        return {name: (total / self._counts[name].clamp_min(1)).float() for name, total in self._sums.items()}

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Inside the block it is seen which batch normalisations read what a noted module made."""

        def seen(name: str, inputs: tuple) -> None:
            made = {parameter for activation, parameter in self._seen if inputs and inputs[0] is activation}
            self._read_by.setdefault(name, set()).update(made or {""})

        hooks = [
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs))
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.running_var is not None
            and module.bias is not None
        ]
        try:
            yield
        finally:
            self._seen = []
            for hook in hooks:
                hook.remove()

    def followers(self) -> dict[str, str]:
        """By parameter, the batch normalisation that read what its module made, and nothing else."""
        found: dict[str, str] = {}
        for name, made in self._read_by.items():
            if len(made) == 1 and "" not in made:
                (parameter,) = made
                found[parameter] = "" if parameter in found else name
        return {parameter: name for parameter, name in found.items() if name}
