"""Shared small models and data: all seeded, all offline, on one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from other_processes import Plain
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import editing, models
from hf_coar.components import rules
from hf_coar.models import fused, outputs, tasks
from hf_coar.plots import page
from hf_coar.runs import running

torch.set_num_threads(1)
# Pages and pictures take more time than most runs here; the tests that look at them ask for them (`reports`,
# `pictures`).
running._current.set(running.Running(report=False))
_draw_pages, page._drawn = page._drawn, lambda folder, sections: {}
# No test ends with a dead machine: a process that dies loses nothing that it wrote. Syncing takes a few ms a file.
os.fsync = lambda handle: None

DEMO = Path(coar.__file__).parent / "demo"


# --------------------------------------------------------------------------------------------------- small networks


class ConvNet(nn.Module):
    """Two convolutions (the second one grouped) with batch normalisation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class TransformerNet(nn.Module):
    """`nn.TransformerEncoder`, whose `nn.MultiheadAttention` computes its projections out of every hook's reach."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.fc(self.encoder(x).mean(1 if self.batch_first else 0))


class CrossAttentionNet(nn.Module):
    """An `nn.MultiheadAttention` with three separate projections, which reads keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(self.query(x[..., :5]), x[..., 5:11], x[..., 11:], need_weights=False)
        return self.fc(mixed.mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=40, max_position_embeddings=16, num_labels=3, pad_token_id=0)
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4))


def _timm_vit() -> nn.Module:
    import timm

    sizes = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def _inputs(*shape: int) -> dict[str, Tensor]:
    return {"inputs": torch.randn(4, *shape), "labels": torch.tensor([0, 2, 1, 2])}


def _tokens(with_labels: bool) -> dict[str, Tensor]:
    attended = torch.ones(4, 7, dtype=torch.long)
    attended[1, 5:] = 0
    attended[3, 3:] = 0
    batch = {"input_ids": torch.randint(1, 40, (4, 7)), "attention_mask": attended}
    return {**batch, "labels": torch.tensor([0, 2, 1, 2])} if with_labels else batch


def _pixels(n_classes: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.randint(0, n_classes, (4,))}


_NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "mlp": (_mlp, lambda: _inputs(6)),
    "convnet": (ConvNet, lambda: _inputs(2, 5, 5)),
    "transformer_batch_first": (lambda: TransformerNet(True), lambda: _inputs(5, 16)),
    "transformer_positions_first": (lambda: TransformerNet(False), lambda: _inputs(5, 16)),
    "cross_attention": (CrossAttentionNet, lambda: _inputs(5, 15)),
    "gpt2": (_gpt2, lambda: _tokens(False)),
    "bert": (_bert, lambda: _tokens(True)),
    "vit": (_vit, lambda: _pixels(4, 16)),
    "timm_vit": (_timm_vit, lambda: _pixels(5, 32)),
}

NETS = tuple(_NETS)  # the names, for `pytest.mark.parametrize`


@dataclass
class Net:
    """A small model in evaluation mode and a batch of four examples for it."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]

    def logits(self, model: nn.Module | None = None, rows: slice = slice(None)) -> Tensor:
        """One forward pass over (a part of) the batch."""
        return models.logits(model or self.model, {name: value[rows] for name, value in self.batch.items()})

    def double(self) -> "Net":
        """The same net in float64."""
        batch = {name: value.double() if value.is_floating_point() else value for name, value in self.batch.items()}
        return Net(self.name, copy.deepcopy(self.model).double(), batch)

    @property
    def output(self) -> str:
        """The paper's output for such a model."""
        return "token_margin" if self.name == "gpt2" else "margin"

    @property
    def has_attention_patch(self) -> bool:
        """Whether some gates enter through a replaced forward of `nn.MultiheadAttention`."""
        return any(isinstance(module, nn.MultiheadAttention) for module in self.model.modules())


def randomise(model: nn.Module) -> nn.Module:
    """Adds noise to every parameter and statistic, so that no bias is zero and no scale is one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            if name.endswith("running_var"):
                buffer *= 0.5 + torch.rand_like(buffer)
    return model


@functools.cache
def _built(name: str) -> Net:
    build, make_batch = _NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        return Net(name, randomise(build()).eval(), make_batch())


def build_net(name: str) -> Net:
    """A fresh copy of one of `NETS`."""
    master = _built(name)
    return Net(name, copy.deepcopy(master.model), {key: value.clone() for key, value in master.batch.items()})


@pytest.fixture(params=NETS)
def net(request) -> Net:
    """Every small network in turn."""
    return build_net(request.param)


@pytest.fixture(params=[name for name in NETS if name != "transformer_positions_first"])
def rows_net(request) -> Net:
    """Every small network whose inner modules see the example on the first axis."""
    return build_net(request.param)


@pytest.fixture
def mlp() -> Net:
    return build_net("mlp")


@pytest.fixture
def convnet() -> Net:
    return build_net("convnet")


@pytest.fixture
def gpt2() -> Net:
    return build_net("gpt2")


@pytest.fixture
def bert() -> Net:
    return build_net("bert")


@pytest.fixture
def vit() -> Net:
    return build_net("vit")


@pytest.fixture
def timm_vit() -> Net:
    return build_net("timm_vit")


@pytest.fixture(params=[True, False], ids=["batch_first", "positions_first"])
def transformer(request) -> Net:
    """`nn.TransformerEncoder` with either order of axes."""
    return build_net("transformer_batch_first" if request.param else "transformer_positions_first")


@pytest.fixture
def registering() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    tables = (outputs.OUTPUTS, tasks.TASKS, rules.RULES, editing.RULES)
    before = [set(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            del table[name]


@pytest.fixture
def mixed_masks() -> Callable[[int, int], Tensor]:
    """(rows, components) -> bool masks: some random rows, beside one that keeps all."""

    def make(n_rows: int, n_components: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(n_rows, n_components, generator=generator) > 0.3
        kept[-1] = True
        return kept

    return make


# -------------------------------------------------------------------------------------------------- the embedded demo


@pytest.fixture(scope="session")
def demo_pair() -> tuple[nn.Module, object]:
    """The demo's model and its first 12 images, as `coar.load` gives them. Do not change the model."""
    return coar.load(DEMO / "model", data=DEMO / "images.parquet", split="train[:12]", batch_size=12)


@pytest.fixture(scope="session")
def demo_attributions(demo_pair) -> coar.Attributions:
    """The demo's images attributed with few rounds."""
    model, data = demo_pair
    return coar.attribute(model, data, method=coar.PathGradient(rounds=4), ablated_fraction=0.05, progress=False)


@pytest.fixture(scope="session")
def plain_process() -> Iterator[Plain]:
    """A process of its own without hf_coar."""
    process = Plain()
    yield process
    process.close()


# ------------------------------------------------------------------------------------------------------ state of a net


def state_of(model: nn.Module) -> dict[str, object]:
    """All that a leaking ablation would change: values, hooks, replaced forwards, flags, the fused attention kernel."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "forward_hooks": {name: list(m._forward_hooks) for name, m in model.named_modules()},
        "forward_pre_hooks": {name: list(m._forward_pre_hooks) for name, m in model.named_modules()},
        "backward_hooks": {name: list(m._backward_hooks) for name, m in model.named_modules()},
        "replaced_forwards": {name: m.__dict__.get("forward") for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
        "fused_attention": torch.backends.mha.get_fastpath_enabled(),
    }


def same_state(model: nn.Module, before: dict[str, object]) -> bool:
    """Whether nothing has changed since `state_of`, bit for bit."""
    after = state_of(model)
    tensors, were = after.pop("tensors"), dict(before)
    old = were.pop("tensors")
    return were == after and tensors.keys() == old.keys() and all(torch.equal(tensors[name], old[name]) for name in old)


@contextmanager
def drawn() -> Iterator[None]:
    """Pages get their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_drawn", _draw_pages)
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    """Pages get their pictures."""
    with drawn():
        yield


@pytest.fixture
def reports(pictures) -> Iterator[None]:
    """Runs write their pages."""
    with running.running(report=True):
        yield


@pytest.fixture
def uncompiled(monkeypatch) -> Iterator[list]:
    """Stretches of graphs run as they are; how many kinds there were."""
    kinds: list = []
    fused._compiled.cache_clear()
    monkeypatch.setattr(torch._inductor, "compile", lambda part, examples: kinds.append(part) or part)
    yield kinds
    fused._compiled.cache_clear()


# ------------------------------------------------------------------------------------------------ which files go first

# The longest ones: begun first, so that no process waits for another one at the end.
LONG = ("docs", "estimators", "hub", "explore", "captured", "crash", "cli", "fuzz", "census", "path_gradient")


def pytest_configure(config: pytest.Config) -> None:
    """Files go to the processes of pytest-xdist in the order in which they are collected."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `LONG` first; those of a file stay together."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
