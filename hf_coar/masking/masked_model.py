"""A model with its components, found once, and ablated or gated as often as wanted.

*Ablation* sets a component's slice of its weight to zero; bias and normalisation stay as they are. Or what the slice
makes is replaced by what stands in for it (`ablations`). There are three ways that give the same answer: the stored
weights are changed, hooks gate what the slice produces (`gating`), or both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.components import Components, Group
from hf_coar.errors import CoarError, ModelMismatchError, check_kind
from hf_coar.masking import constants, gating, weights
from hf_coar.masking.gating import FiredGroups
from hf_coar.masking.partners import Partners
from hf_coar.models import calling

_HOW = ("auto", "hooks", "weights")


class MaskedModel:
    """A model and its components: what has to be looked up and checked is looked up and checked once.

    Attributes:
        model: changed only inside the blocks of `ablated` and `gated`, and by `ablate_for_good`.
        components: its components.
    """

    def __init__(self, model: nn.Module, components: Components) -> None:
        """Find the weights of the components.

        Raises:
            ModelMismatchError: a parameter is missing or has another shape, or the components come with attributions of
                other weights.
        """
        models.check_is_model(model)
        check_kind(components, Components, "components", "what hf_coar.find_components(model, …) gives")
        self.model, self.components = model, components
        self._tensors = weights.handles(model, components)
        self._check_fingerprint()
        _check_stand_in(components)
        of_partners = components.stand_in is not None and components.stand_in.of_partners
        self._partners = Partners(components.stand_in) if of_partners else None
        self._bounds = np.cumsum([0, *components.sizes()])
        self._places = np.concatenate([np.arange(size) for size in components.sizes()])
        self._plain = components.stand_in is None and all(
            group.by_weights != "never" and group.stack_axis is None and not tensor.is_meta
            and weights.normalised(model, group) is None
            for group, tensor in zip(components.groups, self._tensors, strict=True)
        )  # fmt: skip

    def __len__(self) -> int:
        """How many components."""
        return len(self.components)

    @property
    def fingerprint(self) -> str:
        """What `fingerprint_of` says of the model."""
        return fingerprint_of(self.model)

    def _check_fingerprint(self) -> None:
        """Components of attributions belong to one set of weights; those of `find_components` go by shapes alone."""
        wanted = self.components.fingerprint
        if wanted is None or wanted == (found := self.fingerprint):
            return
        raise ModelMismatchError(
            f"these components come with attributions of a model with weights {wanted[:12]}…, and the "
            f"{type(self.model).__name__} given has weights {found[:12]}…; load the model that was attributed, or take "
            "components from find_components(model)"
        )

    @contextmanager
    def ablated(self, kept: Any, how: str = "auto") -> Iterator[nn.Module]:
        """Inside the block the model runs with components ablated, see `ablate`."""
        kept = self.components.check_kept(kept)
        if how not in _HOW:
            raise CoarError(f"how={how!r}; there are {', '.join(map(repr, _HOW))}")
        with models.held(self.model):
            yield from self._ablated(kept, how)

    def _ablated(self, kept: Tensor, how: str) -> Iterator[nn.Module]:
        if how == "auto":
            how = "weights" if self.is_in_weights(kept) else "hooks"
        if how == "hooks":
            with self.gated(kept.split(self.components.sizes(), dim=-1)) as fired:
                yield self.model
            if fired.ran:
                fired.check()
        elif kept.dim() != 1:
            raise CoarError(
                f"kept has one row an example ({list(kept.shape)}), and weights are the same for all of them; "
                "use how='hooks', or one mask at a time"
            )
        else:
            whole = self._plain and kept.dtype == torch.bool
            block = self._zeroed(kept) if whole else weights.zeroed(self.model, self.components, kept, self._tensors)
            with _FINGERPRINTS.masked(self.model), block:
                yield self.model

    def is_in_weights(self, kept: Tensor) -> bool:
        """Whether `ablated` changes stored weights for this mask, and the model itself runs as it is."""
        offloaded = any(tensor.device.type == "meta" for tensor in self._tensors)
        one_mask = kept.dim() == 1 and not kept.requires_grad
        return one_mask and not offloaded and weights.editable(self.components, kept) and self._can_be_written

    @cached_property
    def _can_be_written(self) -> bool:
        """Whether the stored tensors can say what stands in."""
        stand_in, groups = self.components.stand_in, self.components.groups
        return stand_in is None or not any(constants.reason_against(self.model, one, stand_in) for one in groups)

    @cached_property
    def across(self) -> tuple[str, int] | None:
        """Module and input features of the largest matrix, where most of what masks change is stored by columns.

        None elsewhere. Columns, as GPT-2 has them, lie apart in memory: to ablate one in twenty touches half of all of
        it, three times a mask. Where few positions go through such a module, it takes less to gate what comes out.
        """
        groups = [(group, one) for group, one in zip(self.components.groups, self._tensors, strict=True)]
        turned = [(one.numel(), group.module, one.shape[0]) for group, one in groups if weights.is_across(group, one)]
        if 2 * sum(size for size, *_ in turned) <= sum(one.numel() for _, one in groups):
            return None
        return max(turned)[1:]

    @cached_property
    def zeroing(self) -> "MaskedModel":
        """The model with zero in the place of whatever stands in: to ask whether a weight matters at all."""
        if self.components.stand_in is None:
            return self
        return MaskedModel(self.model, replace(self.components, stand_in=None))

    def check_stand_in_is_of_model(self) -> None:
        """Raises `ModelMismatchError` if what stands in was taken of another model than this, or what it was edited of.

        Inside a block of `ablate` the model is another one, and what stands in is still that of the whole.
        """
        taken = None if self.components.stand_in is None else self.components.stand_in.record.get("model")
        base = (models.record(self.model).get("edit") or {}).get("base") or {}
        if taken in (None, base.get("fingerprint")) or _FINGERPRINTS.is_masked(self.model):
            return
        if taken != self.fingerprint:
            raise ModelMismatchError(
                f"what stands in for these components was taken of a model with weights {taken[:12]}…, and the "
                f"{type(self.model).__name__} given has weights {self.fingerprint[:12]}…; take components from "
                "find_components(model, ablation=…)"
            )

    @contextmanager
    def gated(self, gates: Sequence[Tensor]) -> Iterator[FiredGroups]:
        """Inside the block every forward pass applies the gates, differentiably, see `gating.gated`."""
        with gating.gated(self.model, self.components, self._tensors, gates, self._partners) as fired:
            yield fired

    @contextmanager
    def noted(self, note: Callable[[Group, Tensor, slice], None]) -> Iterator[FiredGroups]:
        """Inside the block every forward pass shows what the components make, see `gating.noted`."""
        with gating.noted(self.model, self.components, self._tensors, note) as fired:
            yield fired

    def ablate_for_good(self, kept: Any) -> None:
        """Set the slices of all components that are not kept to zero, or scale them by their gate.

        What stands in for them, if something does, goes into the bias.

        Args:
            kept: bool or float, [components].

        Raises:
            CoarError: a weight that cannot be changed; nothing has been changed then.
        """
        with torch.no_grad(), models.held(self.model):
            kept = self.components.check_kept(kept)
            # All of them are made, and so checked, before the first is applied.
            for edit in list(weights.edits(self.model, self.components, kept, self._tensors)):
                edit.apply()
        _FINGERPRINTS.forget(self.model)

    # ------------------------------------------------------------------------- the fast way, for one mask after another

    @contextmanager
    def _zeroed(self, kept: Tensor) -> Iterator[None]:
        undo: list[tuple[Tensor, int, Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for weight, axis, rows in self._rows(kept):
                    undo.append((weight, axis, rows, weight.index_select(axis, rows)))
                    weight.index_fill_(axis, rows, 0)
            yield
        finally:
            with torch.no_grad():
                for weight, axis, rows, saved in reversed(undo):
                    weight.index_copy_(axis, rows, saved)

    def _rows(self, kept: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(weight, axis, rows to zero) of every group with an ablated component."""
        ablated = np.flatnonzero(~kept.cpu().numpy())
        places = torch.from_numpy(self._places[ablated])
        sent: dict[torch.device, Tensor] = {}  # one transfer a device, not one a group
        cuts = np.searchsorted(ablated, self._bounds).tolist()
        for group, tensor, low, high in zip(self.components.groups, self._tensors, cuts, cuts[1:], strict=False):
            if low == high:
                continue
            if tensor.device not in sent:
                sent[tensor.device] = calling.sent(places, tensor.device)
            rows = sent[tensor.device][low:high]
            if group.block > 1:
                rows = (rows[:, None] * group.block + torch.arange(group.block, device=rows.device)).flatten()
            yield tensor.data, group.axis, rows


TAKE_VALUES = ("output", "input", "attention output", "attention input")  # sites that show an activation


def check_takes_values(components: Components, kind: str) -> None:
    """Raises `CoarError` unless values can stand in for all the components: their gates must meet an activation."""
    hidden = [group.parameter for group in components.groups if group.site not in TAKE_VALUES]
    if hidden:
        raise CoarError(
            f"{kind!r} cannot stand in for the components of {', '.join(hidden[:8])} ({len(hidden)} of "
            f"{len(components.groups)} matrices): what they make never leaves their module by itself. Leave them out "
            "with find_components(model, exclude=[…]), or take ablation='zero'"
        )


def _check_stand_in(components: Components) -> None:
    stand_in = components.stand_in
    if stand_in is None:
        return
    check_takes_values(components, stand_in.name)
    if stand_in.of_partners:
        return
    if stand_in.values is None:
        raise CoarError(
            f"the values that stand in ({stand_in}) were not read with these components; load the attributions again, "
            "or take components from find_components(model, ablation=…)"
        )
    for group in components.groups:
        values = stand_in.values.get(group.parameter)
        wanted = group.n_features
        there = None if values is None else values.shape[group.feature_axis] if values.dim() > 1 else len(values)
        if there != wanted and not (group.whole and there):
            raise ModelMismatchError(
                f"what stands in is of other components: {wanted} values are expected for {group.parameter!r}, and "
                f"there are {there or 'none'}; take both from one find_components(model, ablation=…)"
            )


@contextmanager
def ablate(
    model: nn.Module, components: Components, kept: Any = None, how: str = "auto", *, without: Any = None
) -> Iterator[nn.Module]:
    """Inside the `with` block the model runs with components ablated; afterwards it is as it was, whatever happens.

    Args:
        model: changed only inside the block.
        components: from `find_components(model)`.
        kept: bool or float, [components] for all examples alike, or [examples, components], one row an example of the
            batch. True or 1 = left in place, False or 0 = ablated; a float between is the fraction that stays.
        how: "hooks", "weights" (only for [components]), or "auto": weights for one mask, hooks for one mask an example
            and for weights that cannot be changed (quantised, offloaded).
        without: in the place of `kept`, the components to ablate, by index or name, see `Components.indices`.

    Yields:
        The model. With one mask an example, the first batch of a new shape is preceded by two runs on two and three of
        its examples, which show where the examples are in what each module sees.

    Raises:
        CoarError: a wrong shape or gates outside 0 … 1; `kept` and `without`, or neither; no such component; a module
            with gates that did not run as a module; a batch that the rows do not fit; a weight that cannot be changed.
        ModelMismatchError: the components are not this model's.
        ModelError: another thread or task holds the model: it has ablated components of it, or runs it.
    """
    if (kept is None) == (without is None):
        raise CoarError("give kept=[True, False, …], or without=[names or indices], and not both")
    masked = MaskedModel(model, components)
    kept = components.kept_without(without) if kept is None else components.check_kept(kept)
    with masked.ablated(kept, how):
        yield model


class _Fingerprints:
    """The fingerprint of every model, taken once for as long as torch's own counters say that no weight was written.

    Masks are written past these counters: inside a block the model is another one, and comes out as it went in.
    """

    def __init__(self) -> None:
        # By model, for the model itself and for every block that it is in: (state, fingerprint), or None.
        self._known: WeakKeyDictionary[nn.Module, list[tuple[tuple, str] | None]] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> str:
        known = self._known.setdefault(model, [None])
        state = tuple(_version(tensor) for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
        if known[-1] is None or known[-1][0] != state:
            known[-1] = (state, models.fingerprint(model))
        return known[-1][1]

    def is_masked(self, model: nn.Module) -> bool:
        return len(self._known.get(model, ())) > 1

    def forget(self, model: nn.Module) -> None:
        self._known.setdefault(model, [None])[-1] = None

    @contextmanager
    def masked(self, model: nn.Module) -> Iterator[None]:
        known = self._known.setdefault(model, [None])
        known.append(None)
        try:
            yield
        finally:
            known.pop()


_FINGERPRINTS = _Fingerprints()


def fingerprint_of(model: nn.Module, anew: bool = False) -> str:
    """The fingerprint of a model's weights as they are now, masked or not, see `models.fingerprint`.

    Args:
        model: whose weights are read, unless they are known: as long as torch's counters say that none was written.
        anew: read them in any case: writes through `.data` go by those counters.
    """
    models.check_is_model(model)
    if anew:
        _FINGERPRINTS.forget(model)
    return _FINGERPRINTS.of(model)


def _version(tensor: Tensor) -> tuple:
    # Tensors of inference mode count nothing; a new object stands for one that may have changed.
    counter = object() if tensor.is_inference() else tensor._version
    return (tensor.device, 0 if tensor.is_meta else tensor.data_ptr(), counter)
