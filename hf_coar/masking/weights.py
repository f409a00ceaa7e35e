"""Changing the stored weights: the slices of ablated components set to zero or scaled, and put back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hf_coar.components import Components, Group, StandIn
from hf_coar.errors import CoarError, ModelMismatchError
from hf_coar.masking import constants
from hf_coar.models import offloading


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of this dotted name, or None."""
    owner: object = model
    for part in name.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            return None
    return owner if isinstance(owner, Tensor) else None


def handles(model: nn.Module, components: Components) -> list[Tensor]:
    """The weight of every group, in order.

    Raises:
        ModelMismatchError: the components are not this model's: a parameter is missing or has another shape.
    """
    found = []
    for group in components.groups:
        weight = tensor_of(model, group.parameter)
        shape = None if weight is None else tuple(weight.shape)
        packed = group.by_weights == "never"
        if shape is None or (group.n_rows(shape) != group.size * group.block and not packed):
            raise ModelMismatchError(
                f"the components are not this model's: {group.size} × {group.block} rows are expected on axis "
                f"{group.axis} of {group.parameter!r}, and {type(model).__name__} has "
                + ("no such parameter" if shape is None else f"shape {shape}")
            )
        found.append(weight)
    return found


def is_across(group: Group, weight: Tensor) -> bool:
    """Whether what a component has of a plain matrix, whose outputs they are, does not lie in one piece of memory."""
    return weight.dim() == 2 and group.site == "output" and weight.stride(group.axis) < weight.stride(1 - group.axis)


@dataclass
class Edit:
    """A change of some slices of one weight that can be undone.

    Attributes:
        rows: view of the weight whose leading axes the components divide.
        index: which rows.
        factors: what they are multiplied with; None = zero.
    """

    rows: Tensor
    index: tuple[Tensor, ...]
    factors: Tensor | None
    saved: Tensor | None = None

    def __post_init__(self) -> None:
        """Turn back what is stored by columns, as in GPT-2: memory is best gone through as it lies."""
        self._axis = int(len(self.index) == 1 and self.rows.dim() == 2 and self.rows.stride(0) < self.rows.stride(1))
        if self._axis:
            self.rows, self.factors = self.rows.T, None if self.factors is None else self.factors.T

    def apply(self) -> None:
        """Change the weight."""
        several = len(self.index) > 1
        self.saved = self.rows[self.index] if several else self.rows.index_select(self._axis, *self.index)
        self._write(None if self.factors is None else self.saved * self.factors)

    def undo(self) -> None:
        """Put back what was there, bit for bit."""
        if self.saved is not None:
            self._write(self.saved)

    def _write(self, values: Tensor | None) -> None:
        if len(self.index) > 1:
            self.rows[self.index] = 0 if values is None else values
        elif values is None:
            self.rows.index_fill_(self._axis, *self.index, 0)  # for a single index these are the fast ways
        else:
            self.rows.index_copy_(self._axis, *self.index, values)


@dataclass
class NormalisedEdit:
    """A change of a weight that is stored as length and direction (weight normalisation).

    Zeroing slices of the direction alone would lengthen the others: the product is cut, and split anew.

    Attributes:
        group: whose weight it is.
        length: of the rows.
        direction: of the same rows.
        axis: along which they are counted.
        index: which slices of the product.
        factors: what they are multiplied with; None = zero.
    """

    group: Group
    length: Tensor
    direction: Tensor
    axis: int
    index: tuple[Tensor, ...]
    factors: Tensor | None
    saved: tuple[Tensor, Tensor] | None = None

    def apply(self) -> None:
        """Change length and direction."""
        self.saved = (self.length.clone(), self.direction.clone())
        product = torch._weight_norm(self.direction, self.length, self.axis)
        Edit(self.group.rows(product), self.index, self.factors).apply()
        norm = torch.norm_except_dim(product, 2, self.axis)
        self.length.copy_(norm)
        # Where nothing is left the old direction stays: 0 / 0 would be no direction at all.
        self.direction.copy_(torch.where(norm > 0, product, self.direction))

    def undo(self) -> None:
        """Put back what was there, bit for bit."""
        if self.saved is not None:
            self.length.copy_(self.saved[0])
            self.direction.copy_(self.saved[1])


# Of a weight, and of its length if it has one.
Change = Callable[[Tensor, Tensor | None], Edit | NormalisedEdit | constants.Shift]


@dataclass
class OffloadedEdit:
    """Changes a weight that accelerate keeps elsewhere: a changed copy is laid over what is kept there.

    Attributes:
        model: whose hooks put the weight in place.
        parameter: the weight's name.
        length: the name of its length, where it is normalised.
        shared: other names of the same weight.
        change: the edit, made on copies in memory.
    """

    model: nn.Module
    parameter: str
    length: str | None
    shared: tuple[str, ...]
    change: Change
    take_off: Callable[[], None] | None = None

    def apply(self) -> None:
        """Change the weight."""
        copies = {name: self._copy(name) for name in (self.parameter, self.length) if name is not None}
        self.change(copies[self.parameter], copies.get(self.length)).apply()
        self.take_off = offloading.put(self.model, copies | dict.fromkeys(self.shared, copies[self.parameter]))

    def _copy(self, name: str) -> Tensor:
        return offloading.value(self.model, name, tensor_of(self.model, name)).detach().clone()

    def undo(self) -> None:
        """Take the copy off again."""
        if self.take_off is not None:
            self.take_off()


AnyEdit = Edit | NormalisedEdit | OffloadedEdit | constants.Shift


def edits(model: nn.Module, components: Components, kept: Tensor, weights: Sequence[Tensor]) -> Iterator[AnyEdit]:
    """One edit for every group with a gate below 1.

    Raises:
        CoarError: a weight that cannot be changed so.
    """
    kept = kept.detach().cpu()
    for group, gates, weight in zip(components.groups, kept.split(components.sizes()), weights, strict=True):
        ablated = (gates != 1).nonzero().flatten()
        if not len(ablated):
            continue
        values = gates[ablated].to(weight.dtype if weight.is_floating_point() else torch.float32)
        check_editable(group, bool(((values != 0) & (values != 1)).any()))
        factors = values.repeat_interleave(group.block) if bool(values.any()) else None
        if components.stand_in is not None:  # first: it may look at the weight as it was
            constants.check_says(model, [group], components.stand_in)
            yield _shift(model, group, weight, components.stand_in, ablated, factors)
        yield _edit(model, group, weight, ablated, factors)


def _shift(
    model: nn.Module, group: Group, weight: Tensor, stand_in: StandIn, ablated: Tensor, factors: Tensor | None
) -> AnyEdit:
    """The edit of the bias that takes up what stands in."""
    value = offloading.value(model, group.parameter, weight)
    name, change = constants.shifted(model, group, value, stand_in, ablated, factors)
    bias = tensor_of(model, name)
    return OffloadedEdit(model, name, None, (), lambda copied, _: change(copied)) if bias.is_meta else change(bias)


def _edit(model: nn.Module, group: Group, weight: Tensor, ablated: Tensor, factors: Tensor | None) -> AnyEdit:
    """The edit of one group: components `ablated`, int64 [any], whose rows are multiplied by `factors`."""
    parametrization = normalised(model, group)

    def change(weight: Tensor, length: Tensor | None) -> Edit | NormalisedEdit:
        rows = (ablated[:, None] * group.block + torch.arange(group.block)).flatten().to(weight.device)
        by = None if factors is None else factors.to(weight.device).view([-1] + [1] * (weight.dim() - 1))
        view = group.rows(weight.data)
        index = (rows,) if group.stack_axis is None else (rows // view.shape[1], rows % view.shape[1])
        if length is None:
            return Edit(view, index, by)
        return NormalisedEdit(group, length.data, weight.data, parametrization[0].dim, index, by)

    if not weight.is_meta:
        return change(weight, None if parametrization is None else parametrization.original0)
    leaf = group.parameter.rpartition(".")[2]
    length = next(iter(lengths(model, [group])), None)
    return OffloadedEdit(model, group.parameter, length, tuple(f"{name}.{leaf}" for name in group.shared_by), change)


@contextmanager
def zeroed(model: nn.Module, components: Components, kept: Tensor, weights: Sequence[Tensor]) -> Iterator[None]:
    """The slices of ablated components are zero (or scaled by their gate) inside the block."""
    undo: list[AnyEdit] = []
    try:
        with torch.no_grad():
            for edit in edits(model, components, kept, weights):
                undo.append(edit)
                edit.apply()
        yield
    finally:
        with torch.no_grad():
            for edit in reversed(undo):
                edit.undo()


def normalised(model: nn.Module, group: Group) -> parametrize.ParametrizationList | None:
    """The parametrization of a weight that is stored as length and direction; None for any other weight."""
    owner, _, name = group.parameter.rpartition(".")
    if name != "original1":
        return None
    found = model.get_submodule(owner)
    is_list = isinstance(found, parametrize.ParametrizationList)
    return found if is_list and isinstance(found[0], parametrizations._WeightNorm) else None


def lengths(model: nn.Module, groups: Iterable[Group]) -> set[str]:
    """Names of the parameters that hold the lengths of what is stored as length and direction: edits change both."""
    owners = (group.parameter.rpartition(".")[0] for group in groups if normalised(model, group) is not None)
    return {f"{owner}.original0" for owner in owners}


def check_editable(group: Group, fractions: bool) -> None:
    """Raises `CoarError` if the stored weight of a group may not be changed (or not by fractions)."""
    if group.at:
        raise CoarError(
            f"the components of {group.parameter!r} are ones at single positions, and a weight is the same at all of "
            "them; ablate with how='hooks'"
        )
    if group.by_weights == "never":
        raise CoarError(
            f"the weight {group.parameter!r} is quantised or derived from others, so its slices cannot be changed; "
            "gate the outputs instead with how='hooks', or edit the model before quantisation, or after "
            "remove_weight_norm, prune.remove and the like of torch.nn.utils"
        )
    if group.by_weights == "zero" and fractions:
        raise CoarError(
            f"the weight {group.parameter!r} is normalised again before use, which undoes any fraction; "
            "use how='hooks' for gates between 0 and 1"
        )


def editable(components: Components, kept: Tensor) -> bool:
    """Whether the stored weights can be changed as `kept` [components] says."""
    limits = {group.by_weights for group in components.groups}
    if "never" in limits:
        return False
    return "zero" not in limits or kept.dtype == torch.bool or bool(((kept == 0) | (kept == 1)).all())
