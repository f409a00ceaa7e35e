"""Every architecture: the paper's counts, and a sample of the census (all of it: `scripts/census.py`)."""

import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import hf_coar as coar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import census
import tiny_models
from exactness import SEEN, check, granularities

# ------------------------------------------------------------------------------------------------- the paper's counts


def on_meta(build):
    with torch.device("meta"):
        return build()


class PaperResNet(nn.Module):
    """The shape of the CIFAR network of the paper's set-up A: nine convolutions of 256 filters and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 256, 256, 3, bias=False) for i in range(9))
        self.norms = nn.ModuleList(nn.BatchNorm2d(256) for _ in range(9))
        self.linear = nn.Linear(256, 10)


def resnet50():
    return timm.create_model("resnet50")


def vit():
    return timm.create_model("vit_base_patch16_224")


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


PAPER = {
    "B, ResNet-50": (resnet50, "unit", ["*downsample*"], 22_720),
    "B, with the downsampling convolutions": (resnet50, "unit", None, 26_560),
    "B, torchvision's ResNet-50": (torchvision.models.resnet50, "unit", ["*downsample*", "fc"], 22_720),
    "B, transformers' ResNet-50": (
        lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig()),
        "unit",
        ["*shortcut*"],
        22_720,
    ),
    "C, timm's ViT-B/16": (vit, "unit", ["patch_embed.*"], 82_944),
    "C, torchvision's ViT-B/16": (torchvision.models.vit_b_16, "unit", ["conv_proj", "heads.*"], 82_944),
    "GPT-2, inputs as the paper counts": (gpt2, "input", None, 64_512),
    "GPT-2, outputs": (gpt2, "unit", None, 82_944),
    "GPT-2, heads": (gpt2, "head", None, 144),
    "A, CIFAR": (PaperResNet, "unit", ["linear"], 2_304),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_counts(name):
    build, granularity, exclude, expected = PAPER[name]
    assert len(coar.find_components(on_meta(build), granularity, exclude=exclude)) == expected


# ----------------------------------------------------------------------------------------------------------- coverage


def sample(items, n, seed):
    """The n items whose hashes are lowest: an item that a new version of a library adds moves no more than one."""
    return sorted(sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item}".encode()).digest())[:n])


def covers(found):
    return found["covered"] / (found["covered"] + found["missed"])


@pytest.mark.parametrize("name", sample(timm.list_models(), 24, seed=0))
def test_coverage_of_timm(name):
    assert covers(census.coverage_of(on_meta(lambda: timm.create_model(name, pretrained=False)))) >= 0.995


# Small enough to build in a moment; the rest is in the table.
TYPES = ["albert", "bloom", "clip", "deberta-v2", "falcon", "funnel", "gpt2", "gpt_neox", "hubert", "ibert", "led",
         "mamba", "mixtral", "recurrent_gemma", "segformer", "swin", "t5", "vits", "xlnet", "zamba"]  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_coverage_of_transformers(model_type):
    found = census.coverage_of(on_meta(lambda: census.build_transformers(model_type)))
    assert covers(found) >= 0.995


def test_the_committed_table_holds_what_was_asked_of_it():
    text = census.RESULT.read_text(encoding="utf-8")
    totals = json.loads(text[text.index("<!-- totals") + len("<!-- totals") : text.index("-->")])
    assert totals["timm"]["found"] == totals["timm"]["architectures"] >= 1_300
    assert totals["transformers"]["found"] == totals["transformers"]["constructible"] >= 600
    assert min(totals["timm"]["coverage"], totals["transformers"]["coverage"]) >= 0.995
    assert totals["exact"]["transformers"] >= 300 and totals["exact"]["timm"] >= 150


# ---------------------------------------------------------------------------------------------------------- exactness

# One of each way in which something can be laid out, and a few drawn at random from all.
KINDS = ["CausalLM/mixtral", "CausalLM/gpt_oss", "CausalLM/xlnet", "CausalLM/falcon_mamba", "CausalLM/deepseek_v3",
         "CausalLM/git", "MaskedLM/albert", "ImageClassification/swinv2", "Seq2SeqLM/bart"]  # fmt: skip
PAIRS = sample(
    [f"{h}/{t}" for h, t in tiny_models.transformers_pairs() if h in ("CausalLM", "MaskedLM", "ImageClassification")],
    8,
    seed=1,
)
TIMM = ["efficientnet_cc_b0_4e", "sequencer2d_s", *sample(tiny_models.timm_families(), 4, seed=2)]


@pytest.mark.parametrize("name", [*KINDS, *(pair for pair in PAIRS if pair not in KINDS), *TIMM])
def test_ablation_is_exact(name):
    head, _, model_type = name.partition("/")
    tiny, reason = tiny_models.try_build(
        lambda: tiny_models.tiny_transformers(head, model_type) if model_type else tiny_models.tiny_timm(name)
    )
    if tiny is None:
        assert name not in KINDS, reason
        pytest.skip(f"cannot be shrunk: {reason}")
    for granularity in granularities(tiny.model):
        report = check(tiny, granularity, thorough=granularity == "unit")
        assert not report.failures(), granularity
        # Heads or experts may all lie in a part that these inputs do not reach; the units of a model may not.
        untested = "an ablation that changes nothing tests nothing"
        assert report.effect > SEEN or (report.inert and granularity != "unit"), untested


class MostlyOff(nn.Module):
    """Two matrices that run, one whose output is multiplied by zero, and many that do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.off = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))
        self.switched = nn.Linear(8, 8)
        self.register_buffer("switch", torch.zeros(()))
        self.on = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return self.on(x) + self.switch * self.switched(x)


def mostly_off():
    torch.manual_seed(0)
    model = MostlyOff()
    return tiny_models.TinyModel("mostly off", model.eval(), {"x": torch.randn(2, 8)})


@pytest.mark.parametrize("seed", range(20))
def test_no_draw_is_without_effect(seed):
    report = check(mostly_off(), "module", seed=seed, thorough=False)
    assert not report.failures()
    assert report.effect > SEEN and not report.inert
    assert len(report.unused) == 20


def test_components_without_effect_are_told_from_a_mask_that_does_nothing(monkeypatch):
    tiny = mostly_off()
    nn.init.zeros_(tiny.model.on[2].weight)
    report = check(tiny, "module", thorough=False)
    assert report.inert and not report.failures()
    monkeypatch.setattr(coar, "ablate", lambda model, *_, **__: nullcontext(model))
    assert not check(tiny, "module", thorough=False).failures(), "there is nothing to see here"
    report = check(mostly_off(), "module", thorough=False)
    assert report.effect > SEEN and len(report.failures()) == 3
