"""Which weights of a module hold components: one rule a module class, looked up along the class's ancestors.

A rule says where a module's weight matrices are and which axis is which; how they are cut into components
(units, inputs, whole modules) follows from that, the same for all. A rule for a class of your own::

    from hf_coar import components

    @components.rule(MyLinear)
    def my_linear(module):
        return [components.Matrix("kernel", output_axis=1, input_axis=0)]

Classes of libraries that may not be imported are named by their dotted path.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a module.

    Attributes:
        parameter: its name inside the module.
        output_axis: the axis whose slices make the output features.
        input_axis: the axis whose slices read the input features; None where none does so alone (grouped filters).
        unit: what one output slice is called.
        feature_axis: axis of the features in the module's input and output, counted from the end.
        site: None where the module's own input and output show the features, so that hooks reach them; else a key of
            `masking.SITES` that says how gates enter.
    """

    parameter: str
    output_axis: int
    input_axis: int | None
    unit: str = "neuron"
    feature_axis: int = -1
    site: str | None = None


Rule = Callable[[nn.Module], list[Matrix]]

_RULES: dict[type | str, Rule] = {}


def rule(*classes: type | str) -> Callable[[Rule], Rule]:
    """Decorator: makes a function (module) -> list of `Matrix` the rule of these module classes and their subclasses.

    A rule also speaks for the modules inside (a `MultiheadAttention` for its `out_proj`): they are not searched again.
    """

    def add(function: Rule) -> Rule:
        for module_class in classes:
            _RULES[module_class] = function
        return function

    return add


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of the nearest ancestor class that has one."""
    for module_class in type(module).__mro__:
        for key in (module_class, f"{module_class.__module__}.{module_class.__qualname__}"):
            if key in _RULES:
                return _RULES[key]
    return None


def registered() -> dict[type | str, Rule]:
    """All rules by class."""
    return dict(_RULES)


@rule(nn.Linear)
def linear(module: nn.Module) -> list[Matrix]:
    """Weight [out, in]."""
    return [Matrix("weight", output_axis=0, input_axis=1)]


@rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: nn.Module) -> list[Matrix]:
    """Weight [in, out], as GPT-2 stores it."""
    return [Matrix("weight", output_axis=1, input_axis=0)]


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: nn.Module) -> list[Matrix]:
    """Weight [out, in / groups, *kernel]."""
    input_axis = 1 if module.groups == 1 else None
    return [Matrix("weight", 0, input_axis, unit="filter", feature_axis=-(module.weight.dim() - 1))]


@rule(nn.MultiheadAttention)
def multihead_attention(module: nn.Module) -> list[Matrix]:
    """Rows of the query, key and value projections and of `out_proj`, of which no hook ever fires."""
    if module.in_proj_weight is not None:
        projections = ["in_proj_weight"]
    else:
        projections = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return [Matrix(name, 0, 1, site="attention") for name in (*projections, "out_proj.weight")]
