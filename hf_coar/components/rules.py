"""Which weights of a module hold components: one rule a module class, looked up along the class's ancestors.

A rule says where a module's weight matrices are and which axis is which; how they are cut into components
(units, inputs, heads, experts, whole modules) follows from that, the same for all. A rule for a class of your own::

    from hf_coar import components

    @components.rule(MyLinear)
    def my_linear(module):
        return [components.Matrix("kernel", output_axis=1, input_axis=0)]

Classes of libraries that may not be imported are named by their dotted path. Where hooks on the module's input and
output do not show the features (`site="weight"`), gates scale the weight itself while the module runs: always right,
and for one mask an example the module runs once an example.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hf_coar.storage.registry import Registry, dotted


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a module, or a stack of them in one parameter.

    Attributes:
        parameter: its name inside the module (a buffer's, where a quantised module has no parameter).
        output_axis: the axis whose slices make the output features; None where none does so alone.
        input_axis: the axis whose slices read the input features; None where none does so alone.
        unit: what one output slice is called.
        input_unit: what one input slice is called.
        feature_axis: axis of the features in the module's input and output, counted from the end.
        site: None where the module's own input and output show the features, so that hooks reach them; else "weight"
            or another key of `masking.SITES` that says how gates enter.
        output_stack: (axis, n) where output slices exist once for each of the n matrices stacked along that axis
            (experts; groups of a transposed convolution).
        input_stack: the same for input slices (experts; groups of a convolution).
        output_block: entries along the output axis that make one output slice.
        by_weights: what may be done to the stored weight: "scale" it, only "zero" it (weights that are normalised
            again before use), or "never" touch it (quantised).
        output_size: number of output slices where the parameter's shape does not tell (packed weights).
        input_size: the same for input slices.
        module: path of the module inside that the parameter's name starts from and whose forward gates enter; "" for
            the module itself.
        guessed: nothing but the parameter's name says which axis is which, see `unknown`.
    """

    parameter: str
    output_axis: int | None
    input_axis: int | None
    unit: str = "neuron"
    input_unit: str = "input feature"
    feature_axis: int = -1
    site: str | None = None
    output_stack: tuple[int, int] | None = None
    input_stack: tuple[int, int] | None = None
    output_block: int = 1
    by_weights: str = "scale"
    output_size: int | None = None
    input_size: int | None = None
    module: str = ""
    guessed: bool = False


Rule = Callable[[nn.Module], list[Matrix]]

RULES: Registry[Rule] = Registry("component rule", of_classes=True)
_SEARCHED_INSIDE: set[Rule] = set()


def rule(*classes: type | str, inside: bool = False, replace: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: makes a function (module) -> list of `Matrix` the rule of these module classes and their subclasses.

    A rule also speaks for the modules inside (a `MultiheadAttention` for its `out_proj`), which are not searched
    again, unless it says `inside=True`: then it speaks for the module's own parameters only. A class that has a rule of
    its own already is an error, unless the same function is defined again (a cell of a notebook that runs again) or
    `replace=True` puts this one in its place.
    """

    register = RULES.register(*classes, replace=replace)

    def add(function: Rule) -> Rule:
        if inside:
            _SEARCHED_INSIDE.add(function)
        return register(function)

    return add


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of the nearest ancestor class that has one; None leaves the module to its parameters' names."""
    names = (dotted(module_class) for module_class in type(module).__mro__)
    return next((RULES[name] for name in names if name in RULES), None)


def searched_inside(found: Rule) -> bool:
    """Whether the modules inside a module of this rule are searched too."""
    return found in _SEARCHED_INSIDE


def registered() -> Registry[Rule]:
    """All rules by module class, or by its dotted path."""
    return RULES


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed, of whole numbers, of 8 bits, or a tensor class of its own: it cannot be cut."""
    return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.element_size() == 1


def _site_of(module: nn.Module, *plain: type[nn.Module]) -> str | None:
    """None if the class computes what these plain classes compute, else "weight": its forward may do anything."""
    return None if type(module).forward in [module_class.forward for module_class in plain] else "weight"


@rule(nn.Linear, "timm.layers.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear")
def linear(module: nn.Module) -> list[Matrix]:
    """Weight [out, in]."""
    known = type(module).__module__ in ("timm.layers.linear", "transformers.models.falcon.modeling_falcon")
    if is_quantised(module.weight):
        # Packed weights keep neither axis; the module's own sizes do. Its output is the plain one, whatever the class.
        sizes = {"output_size": module.out_features, "input_size": module.in_features}
        return [Matrix("weight", 0, 1, by_weights="never", **sizes)]
    return [Matrix("weight", output_axis=0, input_axis=1, site=None if known else _site_of(module, nn.Linear))]


@rule(nn.Embedding)
def table(module: nn.Module) -> list[Matrix]:
    """Weight [entries, width], of which a row is looked up: a token, a class, a position. Left out unless included."""
    return [Matrix("weight", 0, None, "row", site="weight")]


@rule("transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear")
def grouped_linear(module: nn.Module) -> list[Matrix]:
    """Weight [groups × out, in]: every group of outputs reads inputs of its own."""
    return [Matrix("weight", 0, 1, site="weight", input_stack=(0, module.n_groups))]


@rule("transformers.pytorch_utils.Conv1D")
def transposed_linear(module: nn.Module) -> list[Matrix]:
    """Weight [in, out], as GPT-2 stores it."""
    return [Matrix("weight", output_axis=1, input_axis=0)]


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, "timm.layers.conv2d_same.Conv2dSame")
def convolution(module: nn.Module) -> list[Matrix]:
    """Weight [out, in / groups, *kernel]."""
    known = type(module).__module__ == "timm.layers.conv2d_same"
    return [
        Matrix(
            "weight",
            output_axis=0,
            input_axis=1 if module.groups == 1 else None,  # of a grouped one, no input is read by all filters
            unit="filter",
            feature_axis=-(module.weight.dim() - 1),
            site=None if known else _site_of(module, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        )
    ]


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: nn.Module) -> list[Matrix]:
    """Weight [in, out / groups, *kernel]."""
    return [
        Matrix(
            "weight",
            output_axis=1,
            input_axis=0 if module.groups == 1 else None,
            unit="filter",
            feature_axis=-(module.weight.dim() - 1),
            site=_site_of(module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
            output_stack=(0, module.groups) if module.groups > 1 else None,
        )
    ]


@rule(
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
)
def standardised_convolution(module: nn.Module) -> list[Matrix]:
    """Every filter is standardised before use: a filter of zeros stays zero, and any other scale is undone."""
    return [Matrix("weight", 0, None, unit="filter", feature_axis=-(module.weight.dim() - 1), by_weights="zero")]


@rule("timm.layers.cond_conv2d.CondConv2d")
def conditional_convolution(module: nn.Module) -> list[Matrix]:
    """Weight [experts, out × (in / groups) × kernel]: every example mixes filters of its own from the experts'."""
    experts, numbers = module.weight.shape
    block = numbers // module.out_channels
    return [Matrix("weight", 1, None, "expert filter", site="weight", output_stack=(0, experts), output_block=block)]


@rule(nn.MultiheadAttention)
def multihead_attention(module: nn.Module) -> list[Matrix]:
    """Rows of the query, key and value projections and of `out_proj`, of which no hook ever fires."""
    if module.in_proj_weight is not None:
        projections = ["in_proj_weight"]
    else:
        projections = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return [Matrix(name, 0, 1, site="attention") for name in (*projections, "out_proj.weight")]


@rule(nn.RNNBase)
def recurrent(module: nn.RNNBase) -> list[Matrix]:
    """Weights [gates × hidden, in] of every layer and direction: one neuron a gate and hidden unit."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]
    return [Matrix(name, 0, 1, site="weight") for name in names]


@rule(nn.RNNCellBase)
def recurrent_cell(module: nn.RNNCellBase) -> list[Matrix]:
    """Weights [gates × hidden, in] of a cell."""
    return [Matrix("weight_ih", 0, 1, site="weight"), Matrix("weight_hh", 0, 1, site="weight")]


@rule(nn.Bilinear)
def bilinear(module: nn.Bilinear) -> list[Matrix]:
    """Weight [out, in1, in2]."""
    return [Matrix("weight", 0, None, site="weight")]


@rule("peft.tuners.lora.layer.LoraLayer")
def low_rank_adapter(module: nn.Module) -> list[Matrix]:
    """The base layer as its own class says, and the ranks: rows of `lora_A`, which are columns of `lora_B`."""
    base = rule_of(module.base_layer)
    found = [] if base is None else [replace(matrix, module="base_layer") for matrix in base(module.base_layer)]
    for side, output_axis, input_axis in (("lora_A", 0, 1), ("lora_B", None, 1)):
        for name in getattr(module, side):
            # A rank is cut once: as a row of A, or, by inputs, as a column of B.
            matrix = Matrix("weight", output_axis, input_axis, "rank", "rank" if side == "lora_B" else "input feature")
            if getattr(module, side)[name].weight.dim() > 2:
                matrix = replace(matrix, feature_axis=-(getattr(module, side)[name].weight.dim() - 1))
            found.append(replace(matrix, module=f"{side}.{name}"))
    return found


@rule("transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention")
def xlnet_attention(module: nn.Module) -> list[Matrix]:
    """Parameters q, k, v, r and o, all [hidden, heads, head size]; o maps back to hidden."""
    heads = (1, module.n_head)
    found = [Matrix(name, 2, 0, site="weight", output_stack=heads) for name in ("q", "k", "v", "r")]
    return [*found, Matrix("o", 0, 2, site="weight", input_stack=heads)]


@rule("transformers.models.funnel.modeling_funnel.FunnelRelMultiheadAttention", inside=True)
def funnel_positions(module: nn.Module) -> list[Matrix]:
    """`r_kernel` [hidden, heads, head size]; the other projections are linear layers inside."""
    return [Matrix("r_kernel", 2, 0, site="weight", output_stack=(1, module.r_kernel.shape[1]))]


@rule("transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru")
def recurrent_gates(module: nn.Module) -> list[Matrix]:
    """Block-diagonal gates [heads, in, out]."""
    heads = (0, module.input_gate_weight.shape[0])
    names = ("input_gate_weight", "recurrent_gate_weight")
    return [Matrix(name, 2, 1, site="weight", output_stack=heads, input_stack=heads) for name in names]


@rule("transformers.models.zamba.modeling_zamba.ZambaMambaMixer", inside=True)
def zamba_mixer(module: nn.Module) -> list[Matrix]:
    """`x_proj_weight` and `dt_proj_weight`, both [heads, out, in]; the other projections are layers inside."""
    heads = (0, module.x_proj_weight.shape[0])
    names = ("x_proj_weight", "dt_proj_weight")
    return [Matrix(name, 1, 2, site="weight", output_stack=heads, input_stack=heads) for name in names]
