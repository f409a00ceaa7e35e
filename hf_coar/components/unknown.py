"""Modules of unknown classes: which of their parameters are matrices, and which axis of a matrix is which.

A parameter counts as a matrix by its name. Which of its axes makes the outputs is read off the module's sizes
(`out_features`, `num_experts`, …) or the length of the matrix's bias. Where neither tells, the axes are guessed by the
name, and the guess is marked: it decides what one component is, and a wrong one cuts across the real ones.
"""

import re

import torch
from torch import Tensor, nn

from hf_coar.components.rules import Matrix

_WEIGHT = re.compile(r"weight|kernel|fn|.*(_|\b)(weight|kernel|proj|projection|fn|gate)")
_TABLE = re.compile(
    r".*(pos|embed|token|query|queries|latent|table|prompt|rel_|_rel|bias|scale|mask|codebook|pad_|freqs|_ape).*|A_log|D"
)
_TIMES_WEIGHT = re.compile(r".*(proj|projection|projection_weight)")

# What libraries call the sizes of a layer's two sides.
_OUTPUT_SIZES = re.compile(
    r"(num_|n_)?out(put)?(_?(features|channels|size|dim|width|ch))?|dim_out|nf|(num|n)_(local_|routed_)?experts"
)
_INPUT_SIZES = re.compile(r"(num_|n_)?in(put)?(_?(features|channels|size|dim|width|ch))?|dim_in|nx")


def own_parameters(module: nn.Module) -> list[Matrix]:
    """For modules with matrices of their own: parameters that are named as weights are.

    Two axes are [out, in] or [in, out], see `sides`; three axes are a stack of such matrices. Modules that hold other
    packed weights and know their sizes (GPTQ, AWQ) are gated at their output.
    """
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        if not _is_matrix(name, parameter) or hasattr(module, "num_embeddings") or hasattr(module, "padding_idx"):
            continue
        if parameter.dim() in (2, 3):
            output_axis, input_axis, guessed = sides(module, name, parameter)
            stack = (0, parameter.shape[0]) if parameter.dim() == 3 else None
            found.append(
                Matrix(
                    name, output_axis, input_axis, site="weight", output_stack=stack, input_stack=stack, guessed=guessed
                )
            )
    packed = next((name for name in ("qweight", "W_q", "weight") if name in dict(module.named_buffers())), None)
    out_features, in_features = (getattr(module, name, None) for name in ("out_features", "in_features"))
    if not found and packed and type(out_features) is int and type(in_features) is int:
        sizes = {"output_size": out_features, "input_size": in_features}
        found.append(Matrix(packed, 0, 1, by_weights="never", **sizes))
    return found


def is_table(name: str) -> bool:
    """Whether a parameter's name says that it is looked up, added or applied entry by entry (positions, decays)."""
    return _TABLE.fullmatch(name) is not None


def sides(module: nn.Module, name: str, parameter: Tensor) -> tuple[int, int, bool]:
    """The axes of a matrix [a, b], or of a stack of them [n, a, b].

    Returns:
        output axis, input axis, and whether nothing but the name tells: [in, out] for a projection, as in
        `x @ projection`, and [out, in] for anything else, as `F.linear` wants it.
    """
    axes = (parameter.dim() - 2, parameter.dim() - 1)
    output_axis = _by_sizes(module, parameter.shape, axes)
    if output_axis is None:
        output_axis = _by_bias(module, name, parameter.shape, axes)
    guessed = output_axis is None
    if guessed:
        output_axis = axes[parameter.dim() == 2 and _TIMES_WEIGHT.fullmatch(name) is not None]
    return output_axis, axes[output_axis == axes[0]], guessed


def _by_sizes(module: nn.Module, shape: torch.Size, axes: tuple[int, int]) -> int | None:
    """The output axis, where the module's sizes fit one way round and not the other."""
    outputs, inputs = (
        {value for key, value in vars(module).items() if type(value) is int and names.fullmatch(key)}
        for names in (_OUTPUT_SIZES, _INPUT_SIZES)
    )
    if not outputs and not inputs:
        return None
    fitting = [
        axis
        for axis, other in (axes, axes[::-1])
        if (not outputs or shape[axis] in outputs) and (not inputs or shape[other] in inputs)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _by_bias(module: nn.Module, name: str, shape: torch.Size, axes: tuple[int, int]) -> int | None:
    """The output axis, where the matrix's bias is as long as one of its axes and not the other."""
    stem = re.sub(r"_?(weight|kernel)$", "", name)
    biases = {f"{name}_bias", f"{stem}_bias".strip("_")}
    if sum(_is_matrix(other, parameter) for other, parameter in module.named_parameters(recurse=False)) == 1:
        biases.add("bias")
    for other, bias in module.named_parameters(recurse=False):
        size = bias.shape[-1] if bias.dim() else 0
        if other in biases and bias.numel() in (size, size * shape[0]):
            fitting = [axis for axis in axes if shape[axis] == size]
            return fitting[0] if len(fitting) == 1 else None
    return None


def _is_matrix(name: str, parameter: Tensor) -> bool:
    if not _WEIGHT.fullmatch(name) or is_table(name) or not parameter.is_floating_point():
        return False
    return sum(size > 1 for size in parameter.shape) >= 2 and parameter.dtype != torch.bool
