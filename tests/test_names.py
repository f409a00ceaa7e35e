"""Names that people read: short, each another, never cut; components are found by them and by the full ones."""

import random

import pytest
import torch
from conftest import NETS, build_net
from torch import nn

import hf_coar as coar
from hf_coar.errors import CoarError


def timm_model(name):
    import timm

    with torch.device("meta"):
        return timm.create_model(name)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=20))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**sizes))


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 8], depths=[2, 2, 1, 1]))


# What people write for what a path says.
CASES = {
    "resnet18": ("layer3.1.conv2 filter 7", "stage3.1 conv2 7"),
    "mobilenetv2_050": ("blocks.3.1.conv_pw filter 12", "stage3.1 conv_pw 12"),
    "convnext_atto": ("stages.2.blocks.5.mlp.fc1 filter 3", "stage2.5 mlp.fc1 3"),
    "vit_tiny_patch16_224": ("blocks.7.attn.qkv neuron 100", "L7 attn.qkv 100"),
    "regnety_002": ("s2.b1.conv1.conv filter 4", "s2.b1.conv1.conv 4"),
    llama: ("model.layers.2.mlp.up_proj neuron 5", "L2 mlp.up 5"),
    resnet: ("resnet.encoder.stages.1.layers.0.layer.2.convolution filter 3", "stage1.0.2 convolution 3"),
    t5: ("decoder.block.1.layer.1.EncDecAttention.q neuron 3", "decoder L1.1 EncDecAttention.q 3"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_short_names_are_what_people_write(case):
    full, short = CASES[case]
    components = coar.find_components(case() if callable(case) else timm_model(case))
    [index] = components.indices(full)
    assert components.names.name(index) == short and components.indices(short) == [index]


def test_heads_are_called_by_layer_and_number():
    heads = coar.find_components(llama(), granularity="head")
    assert heads.names.name(3) == "L1 head 1" and heads.indices("L1 head 1") == [3]
    both = coar.find_components(t5(), granularity="head")  # two attentions in a layer of the decoder
    assert len(set(both.names.all())) == len(both)
    inputs = coar.find_components(llama(), granularity="input")
    assert inputs.indices("L1 head 1") == inputs.indices("model.layers.1.self_attn.o_proj head 1")
    assert len(inputs.indices("L1 head 1")) == 8


@pytest.mark.parametrize("granularity", ["unit", "input", "module"])
@pytest.mark.parametrize("name", NETS)
def test_every_name_is_another_and_finds_its_component(name, granularity):
    components = coar.find_components(build_net(name).model, granularity=granularity)
    short, full = components.names.all(), [str(one) for one in components]
    assert len(set(short)) == len(short)
    for index in random.Random(0).sample(range(len(components)), min(20, len(components))):
        assert components.indices(short[index]) == [index] == components.indices(full[index])


def test_layers_and_matrices_stand_for_all_their_components():
    components = coar.find_components(llama())
    for name in ("L2", "model.layers.2"):
        assert {components[i].group.module.split(".")[2] for i in components.indices(name)} == {"2"}
        assert len(components.indices(name)) == len(components) // 3
    assert len(components.indices("L2 mlp.up")) == 24 == len(components.indices("model.layers.2.mlp.up_proj"))
    assert components.indices(["L2 mlp.up 5", -1, "L2 mlp.up 5"]) == [
        *components.indices("L2 mlp.up 5"),
        len(components) - 1,
    ]
    assert components.names.of("layer") == ["L0", "L1", "L2"]


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("L2 mlp.up 24", "from 0 to 23"), ("L3 mlp.up 2", "did you mean"), (10**6, "from 0 to"),
        (True, "no component True"), (1.0, "1.0"),
    ],
)  # fmt: skip
def test_what_is_not_there_says_what_is(which, words):
    with pytest.raises(CoarError, match=words):
        coar.find_components(llama()).indices(which)


def test_matrices_that_would_share_a_name_keep_their_paths():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.up_proj, self.c_up = (nn.Linear(3, 4) for _ in range(3))
            self.head = nn.Linear(4, 2)

    components = coar.find_components(Odd())
    assert len(set(components.names.all())) == len(components)
    assert components.indices("up_proj 1") != components.indices("up 1")
