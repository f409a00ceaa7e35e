"""What stands in, written into stored tensors: the slice becomes zero, and the constant goes into the bias.

Where the module has no bias, the shift of the batch normalisation behind it takes the constant up, if that was seen to
be exact (`masking.ablations` runs the model both ways); else only hooks can put it in place.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_coar.components import Group, StandIn
from hf_coar.errors import CoarError
from hf_coar.models import offloading


@dataclass
class Shift:
    """A change of a bias that can be undone.

    Attributes:
        tensor: the bias, or the shift of a normalisation.
        values: float, what it becomes at `index`.
        index: int64, which of its entries.
    """

    tensor: Tensor
    values: Tensor
    index: Tensor
    saved: Tensor | None = None

    def apply(self) -> None:
        """Change the bias."""
        self.saved = self.tensor[self.index]
        self.tensor.index_copy_(0, self.index, self.values.to(self.tensor.dtype))

    def undo(self) -> None:
        """Put back what was there, bit for bit."""
        if self.saved is not None:
            self.tensor.index_copy_(0, self.index, self.saved)


def reason_against(model: nn.Module, group: Group, stand_in: StandIn | None) -> str | None:
    """Why no stored tensor can say what stands in for a group's components; None if it can."""
    if stand_in is None:
        return None
    if stand_in.values is None:
        return f"{stand_in.name!r} is another value for every example"
    if stand_in.values[group.parameter].dim() != 1:
        return "there is another value for every position"
    if group.site.endswith("input") and not _is_uniform(model.get_submodule(group.module), group):
        return f"{group.module!r} pads its input, so that a constant in it is none in its output"
    if bias_of(model, group, stand_in) is None:
        what = f"{group.module!r} has no bias, and no batch normalisation right behind it"
        return what + " that takes a constant up"
    return None


def check_says(model: nn.Module, groups: Iterable[Group], stand_in: StandIn | None) -> None:
    """Raises `CoarError` unless the stored tensors can say what stands in for the components of these groups."""
    for group in groups:
        reason = reason_against(model, group, stand_in)
        if reason is not None:
            raise CoarError(
                f"{stand_in.name!r} cannot be written into the weights: {reason}; ablate with how='hooks', leave the "
                "module out with find_components(model, exclude=[…]), or take ablation='zero'"
            )


def _is_uniform(module: nn.Module, group: Group) -> bool:
    """Whether a constant in an input feature adds one constant to each output, wherever that is."""
    if group.feature_axis == -1:
        return True
    plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    padding = getattr(module, "padding", "same")
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    return plain and (unpadded or module.padding_mode != "zeros")


def bias_of(model: nn.Module, group: Group, stand_in: StandIn) -> tuple[str, int] | None:
    """The name of the tensor that takes the constant up, and where the module's outputs begin in it; None if none."""
    prefix = f"{group.module}." if group.module else ""
    first = 0
    if group.site.startswith("attention"):
        part = group.parameter.removeprefix(prefix)
        name = "out_proj.bias" if part == "out_proj.weight" else "in_proj_bias"
        first = {"k": 1, "v": 2}.get(part[0], 0) * model.get_submodule(group.module).embed_dim
    else:
        name = "bias"
    if isinstance(_tensor(model, prefix + name), Tensor):
        return prefix + name, first
    norm = stand_in.absorbed.get(group.parameter)
    return (f"{norm}.bias", 0) if norm is not None and group.site == "output" else None


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None)


def shifted(
    model: nn.Module, group: Group, weight: Tensor, stand_in: StandIn, ablated: Tensor, factors: Tensor | None
) -> tuple[str, Callable[[Tensor], Shift]]:
    """How a bias changes when slices of a weight, as it still is, become zero or are multiplied by `factors`.

    Args:
        model: whose weight it is.
        group: of the components.
        weight: its value.
        stand_in: with values.
        ablated: int64 [any], the components.
        factors: one a row of theirs; None = zero.

    Returns:
        The name of the bias, and a function of its value that makes the change.
    """
    name, first = bias_of(model, group, stand_in)
    values = stand_in.values[group.parameter].double()
    rows = (ablated[:, None] * group.block + torch.arange(group.block)).flatten()
    if group.whole and group.site.endswith("output"):  # a stack of matrices makes more than the rows of one
        rows, factors = torch.arange(len(value_of(model, name))), None if factors is None else factors[:1]
        values = values.expand(len(rows))
    constant = values[rows]
    stays = torch.zeros(1, dtype=torch.float64) if factors is None else factors.double()
    if group.site.endswith("input"):
        columns = group.rows(weight)[rows.to(weight.device)].double().flatten(1).cpu()
        per_output = columns.view(len(rows), _n_outputs(weight, group), -1).sum(2)
        added = ((1 - stays) * constant) @ per_output
        return name, lambda bias: _moved(bias, first + torch.arange(len(added)), lambda old: old + added)
    if name.rpartition(".")[0] == group.module or group.site.startswith("attention"):
        # As torch.lerp has it: exact at both ends.
        return name, lambda bias: _moved(bias, first + rows, lambda old: constant + stays * (old - constant))
    scale = _scale(model, name.rpartition(".")[0])[rows]
    return name, lambda bias: _moved(bias, rows, lambda old: old + (1 - stays) * constant * scale)


def _n_outputs(weight: Tensor, group: Group) -> int:
    """Slices of the input axis begin with the output axis, for all modules whose input shows the features."""
    return group.rows(weight).shape[1]


def _moved(bias: Tensor, index: Tensor, change: Callable[[Tensor], Tensor]) -> Shift:
    values = change(bias.detach().double().cpu()[index])
    return Shift(bias.data, values.to(bias.device), index.to(bias.device))


def _scale(model: nn.Module, name: str) -> Tensor:
    """The factor by channel of a batch normalisation, float64 [channels]."""
    norm = model.get_submodule(name)
    scale = (value_of(model, f"{name}.running_var").double() + norm.eps).rsqrt()
    return (scale if norm.weight is None else scale * value_of(model, f"{name}.weight").detach().double()).cpu()


def names(model: nn.Module, groups: Iterable[Group], stand_in: StandIn) -> set[str]:
    """The tensors, besides the weights, that change when components of these groups are ablated for good.

    Raises:
        CoarError: one of them cannot be ablated so.
    """
    groups = list(groups)
    check_says(model, groups, stand_in)
    return {bias_of(model, group, stand_in)[0] for group in groups}


def value_of(model: nn.Module, name: str) -> Tensor:
    """What a bias holds, wherever it is kept."""
    return offloading.value(model, name, _tensor(model, name))
