"""Experts: rules for their stacked weights, and which matrix of an expert is its last.

An expert is ablated by zeroing its last matrix, the one that maps back to the width of the model: it then adds nothing
(but its bias, if it has one, as everywhere).
"""

import re
from collections.abc import Mapping

from torch import nn

from hf_coar.components.rules import Matrix, rule
from hf_coar.components.unknown import own_parameters

_LAST = re.compile(r"(.*[._])?(down|down_proj|output_linear|w2|fc2|wo|c_proj|out_proj|dense_4h_to_h|output)([._].*)?")
_CONTAINER = re.compile(r".*experts?", re.IGNORECASE)
_STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def stacked_experts(module: nn.Module) -> list[Matrix]:
    """Parameters [experts, out, in], or [experts, in, out] where the class says that they are transposed."""
    transposed, guessed = _is_transposed(module)
    found = []
    for name in _STACKS:
        parameter = dict(module.named_parameters(recurse=False)).get(name)
        if parameter is not None and parameter.dim() == 3:
            stack = (0, parameter.shape[0])
            output_axis, input_axis = (2, 1) if transposed else (1, 2)
            found.append(
                Matrix(
                    name,
                    output_axis,
                    input_axis,
                    unit="expert neuron",
                    input_unit="expert input",
                    site="weight",
                    output_stack=stack,
                    input_stack=stack,
                    guessed=guessed,
                )
            )
    return found


def _is_transposed(module: nn.Module) -> tuple[bool, bool]:
    """Whether the stacks are [experts, in, out], and whether that is guessed.

    As the class says (`use_experts_implementation`), or as the shapes say: both matrices share the model's width.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said, False
    up = next(p for n, p in module.named_parameters(recurse=False) if n in ("gate_up_proj", "up_proj"))
    down = module.down_proj
    if up.shape[2] != down.shape[1]:
        return True, False
    if up.shape[1] != down.shape[2]:
        return False, False
    # Without a gate, both ways round fit: the model's own width settles it.
    widths = {getattr(module, name, None) for name in ("hidden_size", "hidden_dim")}
    fitting = [axis for axis in (1, 2) if up.shape[axis] in widths]
    return fitting == [1], len(fitting) != 1


@rule("transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts")
def parallel_experts(module: nn.Module) -> list[Matrix]:
    """Weight [experts, out, in] over tokens that are sorted by expert."""
    stack = (0, module.weight.shape[0])
    return [Matrix("weight", 1, 2, "expert neuron", "expert input", -1, "weight", stack, stack)]


@rule("transformers.models.dbrx.modeling_dbrx.DbrxExperts")
def dbrx_experts(module: nn.Module) -> list[Matrix]:
    """`w1` and `v1` [experts × inner, hidden], `w2` the same shape and used the other way round.

    The module inside that owns them never reads them: this one does, and hands the slices down.
    """
    stack = (0, module.num_experts)
    found = [
        Matrix(f"mlp.{name}", 0, 1, "expert neuron", "expert input", -1, "weight", None, stack) for name in ("w1", "v1")
    ]
    return [*found, Matrix("mlp.w2", 1, 0, "expert neuron", "expert input", -1, "weight", stack, None)]


@rule("transformers.models.csm.modeling_csm.CsmCodebooksHead")
def codebook_heads(module: nn.Module) -> list[Matrix]:
    """Weight [codebooks, in, out]."""
    stack = (0, module.weight.shape[0])
    return [Matrix("weight", 2, 1, site="weight", output_stack=stack, input_stack=stack)]


def structural(module: nn.Module) -> list[Matrix]:
    """The matrices of a module without a rule: stacks of experts and weights, known by names and axes."""
    names = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    if "down_proj" in names and names & {"gate_up_proj", "up_proj"}:
        return stacked_experts(module)
    return own_parameters(module)


def is_stack_output(path: str, matrix: Matrix) -> bool:
    """Whether a matrix stacks experts and is their last one; `path` is the parameter's full name."""
    stacked = matrix.unit == "expert neuron" and (matrix.output_stack or matrix.input_stack)
    return bool(stacked) and _LAST.fullmatch(path) is not None


def expert_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the expert that a module belongs to, where experts are modules in a list or mapping; else None."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        container = modules.get(".".join(parts[:end]))
        listed = isinstance(container, nn.ModuleList | nn.ModuleDict) and len(container) > 1
        if listed and _CONTAINER.fullmatch(parts[end - 1]):
            return ".".join(parts[: end + 1])
    return None


def is_last_of_expert(name: str, expert: str) -> bool:
    """Whether a module is the last matrix of its expert, by its name inside it."""
    return name == expert or _LAST.fullmatch(name.removeprefix(f"{expert}.")) is not None
