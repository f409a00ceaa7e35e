"""A tiny model for every component rule, and what its units and inputs are, written without the package's rules."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import timm.layers
import torch
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import FunnelBaseModel, FunnelConfig, XLNetConfig, XLNetModel, ZambaConfig
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.csm.modeling_csm import CsmCodebooksHead
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer
from transformers.pytorch_utils import Conv1D

import hf_coar as coar
from hf_coar.components import Components, registered
from hf_coar.storage.registry import dotted

EXAMPLES, POSITIONS, WIDTH = 3, 6, 4  # two positions an example more than fit: 6 is a multiple of 3 on purpose


class Sequence(nn.Module):
    """Any layer over [examples, positions, width], read out at the end."""

    def __init__(self, layer: nn.Module, take=lambda output: output) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.take(self.layer(x))).flatten(1).cumsum(1)


class Image(nn.Module):
    """Any layer over [examples, 4, …]."""

    def __init__(self, layer: nn.Module, dims: int = 2) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 4, -1)[..., :6].reshape(len(x), 4, *([6], [2, 3], [1, 2, 3])[self.dims - 1])
        return torch.tanh(self.layer(x)).flatten(1).cumsum(1)


class Mixed(nn.Module):
    """Conditional convolution: every example's filters are mixed by its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.conv = nn.Linear(WIDTH, 3), CondConv2d(4, 6, 3, padding=1, num_experts=3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(len(x), 4, 2, 3), self.route(x.mean(1)).sigmoid()).flatten(1)


class Cell(nn.Module):
    """A recurrent cell over the positions."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for position in x.unbind(1):
            state = self.cell(position, state)
        return state[0] if isinstance(state, tuple) else state


class PositionsFirst(nn.Module):
    """Positions come first inside; a table of positions sees no examples; two axes are folded into one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.table, self.folded = nn.Linear(WIDTH, 8), nn.Linear(3, 8), nn.Linear(8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(3.0 * x.shape[1], dtype=x.dtype).view(-1, 1, 3).cos()
        x = self.encoder(self.into(x).transpose(0, 1) + self.table(positions))
        return self.folded(x.reshape(-1, 8)).view(x.shape).mean(0)


class Turned(nn.Module):
    """A recurrent layer that wants positions first, as PyTorch's do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1))[0][-1]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(-1)).flatten(1)


class Experts(nn.Module):
    """Stacked experts as Mixtral (or, transposed, GPT-OSS) has them, behind a router."""

    def __init__(self, transposed: bool = False, swap: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.Module()
        up, down = (3, 10, WIDTH), (3, WIDTH, 5)
        up, down = ((up[0], up[2], up[1]), (down[0], down[2], down[1])) if transposed else (up, down)
        self.experts = Stack(up, down, transposed)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, chosen, weights).view(x.shape).flatten(1)


class Stack(nn.Module):
    def __init__(self, up: tuple, down: tuple, transposed: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        self.transposed = transposed  # not the name that the library uses: the shapes have to tell

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(3):
            token, slot = torch.where(chosen == expert)
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            up, down = (up, down) if self.transposed else (up.T, down.T)
            gate, value = (x[token] @ up).chunk(2, dim=-1)
            total = total.index_add(0, token, (gate.tanh() * value) @ down * weights[token, slot, None])
        return total


class ListedExperts(nn.Module):
    """Experts as modules in a list: each sees the tokens that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 4)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen, total = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token = torch.where(chosen == number)[0]
            total = total.index_add(0, token, expert["fc2"](expert["fc1"](flat[token]).tanh()))
        return (total + flat).view(x.shape).flatten(1)


class Tied(nn.Module):
    """A layer that runs twice, and a projection back by the first layer's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed((x[..., 0] * 3).long().abs() % 7)
        return self.out(self.inner(self.inner(x).tanh())).flatten(1)


class SelfAttention(nn.Module):
    """Calls the library's attention with one tensor three times."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].flatten(1)


class LoraLayer:
    """Stands in for PEFT's class of the same dotted name."""


LoraLayer.__module__ = "peft.tuners.lora.layer"


class LoraLinear(nn.Module, LoraLayer):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, 5)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class DeepseekGroups(nn.Module):
    """Two groups of features, each read by outputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = DeepseekV4GroupedLinear(WIDTH // 2, 6, n_groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.unflatten(-1, (2, WIDTH // 2)))).flatten(1).cumsum(1)


class JetMoeExperts(nn.Module):
    """Tokens sorted by expert, as JetMoe's router sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(WIDTH, 3), JetMoeParallelExperts(3, WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        sorted_outputs = self.layer(flat[order], chosen.bincount(minlength=3).tolist()).tanh()
        return (sorted_outputs[order.argsort()] * weights[:, None]).view(len(x), -1).cumsum(1)


class Dbrx(nn.Module):
    """Three experts in one parameter, read by the module around the one that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(WIDTH, 3), DbrxExperts(DBRX)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).flatten(0, 1).softmax(-1).topk(2)
        return self.layer(x, chosen, weights).flatten(1)


class Codebooks(nn.Module):
    """A head of its own for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CsmCodebooksHead(WIDTH, POSITIONS + 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x, torch.arange(1, POSITIONS + 1))).flatten(1).cumsum(1)


class Forgetful(RecurrentGemmaRglru):
    """Starts from no state, as the library's does at the first position, where it resets it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        self.recurrent_states = None
        return super().forward(*inputs)


class Recurrent(nn.Module):
    """One step of the recurrence: with more of them the library computes in float32, whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Forgetful(SimpleNamespace(num_attention_heads=4, lru_width=POSITIONS * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), 1, -1), torch.ones(len(x), 1, dtype=torch.long)).flatten(1).cumsum(1)


class Embedded(nn.Module):
    """A small transformer of the library that is given embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x)[0].flatten(1)


DBRX = SimpleNamespace(hidden_size=WIDTH, ffn_hidden_size=5, moe_num_experts=3, ffn_act_fn={"name": "silu"})
XLNET = XLNetConfig(vocab_size=7, d_model=WIDTH, n_layer=1, n_head=2, d_inner=6, dropout=0.0)
FUNNEL = FunnelConfig(
    vocab_size=7, block_sizes=[1], d_model=WIDTH, n_head=2, d_head=3, d_inner=6, hidden_dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0, attention_type="relative_shift",
)  # fmt: skip
ZAMBA = ZambaConfig(hidden_size=WIDTH, mamba_d_state=3, mamba_dt_rank=2, n_mamba_heads=2, mamba_d_conv=2)


MODELS = {
    "linear": lambda: Sequence(nn.Linear(WIDTH, 5)),
    "timm linear": lambda: Sequence(timm.layers.Linear(WIDTH, 5)),
    "Conv1D of transformers": lambda: Sequence(Conv1D(5, WIDTH)),
    "convolution 1d": lambda: Image(nn.Conv1d(4, 6, 3, padding=1), 1),
    "convolution": lambda: Image(nn.Conv2d(4, 6, 3, padding=1)),
    "convolution 3d": lambda: Image(nn.Conv3d(4, 6, 3, padding=1), 3),
    "grouped": lambda: Image(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "depthwise": lambda: Image(nn.Conv2d(4, 8, 3, padding=1, groups=4)),
    "same padding": lambda: Image(timm.layers.Conv2dSame(4, 6, 3, stride=2)),
    "transposed": lambda: Image(nn.ConvTranspose2d(4, 6, 3, stride=2)),
    "transposed 3d": lambda: Image(nn.ConvTranspose3d(4, 6, 2), 3),
    "transposed grouped": lambda: Image(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), 1),
    "standardised": lambda: Image(StdConv2d(4, 6, 3, padding=1, bias=True)),
    "scaled standardised": lambda: Image(ScaledStdConv2d(4, 6, 3, padding=1)),
    "weight norm by filter": lambda: Image(weight_norm(nn.Conv1d(4, 6, 3, padding=1)), 1),
    "weight norm by position": lambda: Image(weight_norm(nn.Conv1d(4, 6, 3, padding=1, groups=2), dim=2), 1),
    "weight norm transposed": lambda: Image(weight_norm(nn.ConvTranspose1d(4, 6, 3)), 1),
    "conditional": Mixed,
    "attention": SelfAttention,
    "attention with other widths": lambda: SelfAttention(kdim=WIDTH, vdim=WIDTH + 0, add_bias_kv=True),
    "LSTM": lambda: Sequence(nn.LSTM(WIDTH, 5, 2, batch_first=True, bidirectional=True), lambda output: output[0]),
    "GRU, positions first": Turned,
    "LSTM cell": lambda: Cell(nn.LSTMCell(WIDTH, 5)),
    "GRU cell": lambda: Cell(nn.GRUCell(WIDTH, 5)),
    "bilinear": Bilinear,
    "experts": Experts,
    "experts transposed": lambda: Experts(transposed=True),
    "experts in a list": ListedExperts,
    "positions first": PositionsFirst,
    "run twice": lambda: nn.Sequential(layer := nn.Linear(WIDTH, WIDTH), nn.Tanh(), layer, nn.Flatten()),
    "LoRA": lambda: Sequence(LoraLinear()),
    "linear of Falcon": lambda: Sequence(FalconLinear(WIDTH, 5)),
    "grouped linear of DeepSeek": DeepseekGroups,
    "standardised, same padding": lambda: Image(StdConv2dSame(4, 6, 3, stride=2)),
    "scaled standardised, same padding": lambda: Image(ScaledStdConv2dSame(4, 6, 3, stride=2)),
    "standardised of BiT": lambda: Image(WeightStandardizedConv2d(4, 6, 3, padding=1)),
    "experts of JetMoe": JetMoeExperts,
    "experts of DBRX": Dbrx,
    "codebooks of CSM": Codebooks,
    "recurrent gates of RecurrentGemma": Recurrent,
    "attention of XLNet": lambda: Embedded(XLNetModel(XLNET)),
    "attention of Funnel": lambda: Embedded(FunnelBaseModel(FUNNEL)),
    "mixer of Zamba": lambda: Sequence(ZambaMambaMixer(ZAMBA, 0)),
}

# Weights that the library reads without running their module, which only `how="weights"` reaches.
BYPASSED = {"mixer of Zamba": "layer.conv1d"}
MIXED = ("mixer of Zamba", "attention of Funnel")  # compute in float32 whatever their weights are


def build(name: str) -> nn.Module:
    """One of `MODELS` in float64, parameters drawn at random: libraries leave some at zero, or at what was there."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


# ---------------------------------------------------------------- what a unit and an input are, read off each forward

View = Callable[[Tensor, int], Tensor]


def row(weight: Tensor, i: int) -> Tensor:
    return weight[i]


def column(weight: Tensor, i: int) -> Tensor:
    return weight[:, i]


def part(of: Tensor, i: int, n: int, axis: int = 0) -> Tensor:
    """Part `i` of `n` equal ones along an axis."""
    return of.chunk(n, axis)[i]


OUT_IN, IN_OUT = (row, column), (column, row)
STACK_OUT_IN = (lambda w, i: w[i // w.shape[1], i % w.shape[1]], lambda w, i: w[i // w.shape[2], :, i % w.shape[2]])
STACK_IN_OUT = STACK_OUT_IN[::-1]
HEADS_LAST = (lambda w, i: w[:, i // w.shape[2], i % w.shape[2]], row)

# By case and parameter: the slice that unit i and input i are, where it is no row and column of a matrix [out, in].
SLICES: dict[str, dict[str, tuple[View, View | None]]] = {
    "Conv1D of transformers": {"layer.weight": IN_OUT},
    "transposed": {"layer.weight": IN_OUT},
    "transposed 3d": {"layer.weight": IN_OUT},
    "transposed grouped": {"layer.weight": (lambda w, i: part(w, i // 3, 2)[:, i % 3], None)},
    "conditional": {"conv.weight": (lambda w, i: part(w[i // 6], i % 6, 6), None)},
    "experts": {"experts.gate_up_proj": STACK_OUT_IN, "experts.down_proj": STACK_OUT_IN},
    "experts transposed": {"experts.gate_up_proj": STACK_IN_OUT, "experts.down_proj": STACK_IN_OUT},
    "LoRA": {"layer.lora_B.default.weight": (None, column)},
    "grouped linear of DeepSeek": {"layer.weight": (row, lambda w, i: part(w, i // 2, 2)[:, i % 2])},
    "experts of JetMoe": {"layer.weight": STACK_OUT_IN},
    "experts of DBRX": {
        "layer.mlp.w1": (row, lambda w, i: part(w, i // WIDTH, 3)[:, i % WIDTH]),
        "layer.mlp.v1": (row, lambda w, i: part(w, i // WIDTH, 3)[:, i % WIDTH]),
        "layer.mlp.w2": (lambda w, i: part(w, i // WIDTH, 3)[:, i % WIDTH], row),
    },
    "codebooks of CSM": {"layer.weight": STACK_IN_OUT},
    "recurrent gates of RecurrentGemma": {
        "layer.input_gate_weight": STACK_IN_OUT, "layer.recurrent_gate_weight": STACK_IN_OUT
    },
    "attention of XLNet": {
        **{f"model.layer.0.rel_attn.{name}": HEADS_LAST for name in "qkvr"},
        "model.layer.0.rel_attn.o": HEADS_LAST[::-1],
    },
    "attention of Funnel": {"model.encoder.blocks.0.0.attention.r_kernel": HEADS_LAST},
    "mixer of Zamba": {"layer.x_proj_weight": STACK_OUT_IN, "layer.dt_proj_weight": STACK_OUT_IN},
}  # fmt: skip


def zeroed_by_meaning(name: str, model: nn.Module, components: Components, kept: Tensor) -> nn.Module:
    """A copy of a case's model with units or inputs set to zero by `SLICES`, which knows nothing of rules."""
    duplicate = copy.deepcopy(model)
    parameters = dict(duplicate.named_parameters())
    side = ("unit", "input").index(components.granularity)
    with torch.no_grad():
        for group, gates in zip(components.groups, kept.split(components.sizes()), strict=True):
            view = SLICES.get(name, {}).get(group.parameter, OUT_IN)[side]
            for position in (~gates).nonzero().flatten().tolist():
                view(parameters[group.parameter], position).zero_()
    return duplicate


def rules_met(model: nn.Module) -> set[str]:
    """Names of the rules that speak for some module of a model."""
    known = registered()
    found = ([key for key in map(dotted, type(module).__mro__) if key in known] for module in model.modules())
    return {keys[0] for keys in found if keys}


def masks(n_rows: int, n_components: int, seed: int = 2) -> Tensor:
    """Random masks, bool [rows, components], in which the first component is ablated."""
    kept = torch.rand(n_rows, n_components, generator=torch.Generator().manual_seed(seed)) > 0.35
    kept[:, 0] = False
    return kept


def ablated(model: nn.Module, components: Components, kept: Tensor, x: Tensor, how: str = "auto") -> Tensor:
    """What a model makes of its input without some components."""
    with torch.no_grad(), coar.ablate(model, components, kept, how=how):
        return model(x)
