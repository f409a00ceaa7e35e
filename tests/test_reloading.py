"""What is saved is what is in memory: a model of which its own library would load another one is refused."""

from fnmatch import fnmatch

import pytest
import tiny_texts
import torch
from torch import nn

import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited, kept_without, making
from hf_coar.errors import ModelError
from hf_coar.models import reloading

BATCH = {"input_ids": torch.tensor([[2, 4, 5, 6, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, **settings)).eval()


def without(model):
    """An edited copy."""
    found = coar.find_components(model)
    entries = {"rule": "welch", "components": [str(found[0])], "indices": [0], "base": {}}
    return making.with_ablated(model, found, kept_without(len(found), [0]), entries)


def replaced_head():
    model = tiny_texts.classifier(["dull", "fine"])
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    return model


def head_of_five():
    model = tiny_texts.classifier(["dull", "fine"])
    model.classifier = nn.Linear(16, 5)
    return model


def fewer_layers():
    model = llama()
    model.model.layers = model.model.layers[:1]
    return model


def parametrised():
    model = llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def wider_head():
    model = llama().bfloat16()
    model.lm_head.float().weight.data.mul_(1.001)
    return model


def renamed_in_timm():
    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    model.conv1 = nn.Sequential(model.conv1, nn.Identity())
    return model


UNLIKE = {
    replaced_head: "classifier.0.weight",
    head_of_five: "RuntimeError",
    fewer_layers: "model.layers.1.mlp",
    parametrised: "original0",
    wider_head: "lm_head.weight",
    renamed_in_timm: "fails",
}


@pytest.mark.parametrize("build", UNLIKE, ids=lambda build: build.__name__)
@pytest.mark.parametrize("most", [reloading.MOST, 0], ids=["whole", "names alone"])
def test_a_model_that_would_be_another_once_loaded_is_refused(build, most, tmp_path, monkeypatch):
    monkeypatch.setattr(reloading, "MOST", most)
    with pytest.raises(ModelError, match="it is not saved") as error:
        models.save_model(build().eval(), tmp_path / "saved")
    assert UNLIKE[build] in str(error.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_edited_model_with_a_head_of_its_own_gets_no_card_that_says_how_to_load_it(tmp_path):
    model = without(replaced_head())
    with pytest.raises(ModelError, match="6 tensors differ"):
        edited.save(model, tmp_path / "saved")
    assert not list(tmp_path.rglob("README.md"))


@pytest.mark.parametrize("most", [reloading.MOST, 0], ids=["whole", "names alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_loads_is_what_was_edited(dtype, most, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reloading, "MOST", most)
    model = without(llama(tie_word_embeddings=True).to(dtype))
    state = torch.get_rng_state()
    edited.save(model, tmp_path / "saved")
    assert torch.equal(state, torch.get_rng_state()) and not caplog.messages
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


def test_other_modules_with_the_same_weights_are_told(tmp_path, caplog):
    model = llama()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    models.save_model(model, tmp_path / "saved")
    assert "layers.0.mlp.act_fn is GELU" in caplog.text and "becomes SiLU" in caplog.text


@pytest.mark.parametrize("name", ["model.layers.0.mlp.act_fn", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_are_lost_are_told(name, kind, tmp_path, caplog):
    """They are part of what was attributed and edited, and were in no file."""
    model = llama()
    handle = getattr(model.get_submodule(name), kind)(lambda module, *given: None)
    edited.save(without(model), tmp_path / "with")
    assert f"without the hooks of this one, of 1 modules ({name or 'the model itself'})" in caplog.text
    handle.remove()
    caplog.clear()
    edited.save(without(model), tmp_path / "none")
    assert not caplog.messages


def test_hooks_that_come_with_the_class_are_none_that_are_lost(tmp_path, caplog, monkeypatch):
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def hooked(self, config):
        made(self, config)
        self.lm_head.register_forward_hook(lambda module, given, found: found)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", hooked)
    models.save_model(llama(), tmp_path / "saved")
    assert not caplog.messages


def test_dropout_that_is_off_is_no_other_module(tmp_path, caplog):
    model = tiny_texts.classifier(["dull", "fine"])
    model.dropout = nn.Dropout(0.5)
    models.save_model(model, tmp_path / "saved")
    assert not caplog.messages


# Of Marian, XLM-RoBERTa and V-JEPA: without them no tokenizer or processor of the edited model can be made.
KINDS = ["source.spm", "target.spm", "vocab.json", "sentencepiece.bpe.model", "video_preprocessor_config.json"]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_pipeline_needs_comes_along_and_is_uploaded(name, tmp_path):
    base = tiny_texts.saved(tmp_path / "base", tiny_texts.classifier(["dull", "fine"]))
    (base / name).write_text("{}")
    edited.save(without(models.load_model(base)), tmp_path / "edited")
    assert (tmp_path / "edited" / name).read_text() == "{}"
    assert any(fnmatch(name, pattern) for pattern in edited._UPLOADED)
