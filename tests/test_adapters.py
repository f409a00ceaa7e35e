"""Adapters of PEFT, and embeddings as components: real peft and diffusers, tiny models."""

import json

import peft
import pytest
import torch
from task_cases import CASES, made
from tiny_texts import classifier, saved, written

import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited
from hf_coar.errors import CoarError, ModelError


def adapted(seed=0, **options):
    """GPT-2 with an adapter of three ranks at every attention; the adapter is not at its zero beginning."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(CASES["causal_lm"].build().eval(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


BATCH = {"input_ids": torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(0))}


def test_a_model_with_adapters_is_of_their_library():
    model = adapted()
    assert models.library(model) == "peft" and models.library(models.wrapped(model)) == "transformers"
    assert coar.tasks.of(model).name == "causal_lm"
    assert "peft.PeftModelForCausalLM.from_pretrained(base_model" in models.load_snippet(model, "folder")


def test_ranks_are_the_components_by_default():
    components = coar.find_components(adapted())
    assert len(components) == 2 * 3 and {group.kind for group in components.groups} == {"rank"}
    assert sum("base model of the adapters" in skipped.reason for skipped in components.skipped) == 2 * 4
    assert len(coar.find_components(adapted(), include=["*mlp.c_fc"])) == 2 * 128


def test_ablating_a_rank_takes_it_out_of_the_product():
    model = adapted()
    components = coar.find_components(model)
    kept = torch.ones(4, 6, dtype=torch.bool)
    kept[0, 1] = kept[2, 4] = False
    with torch.no_grad():
        with coar.ablate(model, components, kept):
            found = model(**BATCH).logits
        for row in range(4):
            by_hand = adapted()
            for layer in range(2):
                lora = by_hand.base_model.model.transformer.h[layer].attn.c_attn.lora_B["default"].weight
                lora[:, ~kept[row, 3 * layer : 3 * layer + 3]] = 0
            assert torch.allclose(found[row], by_hand(**BATCH).logits[row], atol=1e-5)


RELOAD = """
import sys, torch, transformers, peft
base = transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(input_ids=torch.load(sys.argv[3], weights_only=True)).logits, sys.argv[4])
"""


def test_an_edit_of_ranks_is_there_after_a_plain_reload(tmp_path, plain_process):
    model = adapted()
    with torch.no_grad():
        before = model(**BATCH).logits
    options = {"output": "token_log_prob", "method": coar.PathGradient(rounds=2), "progress": False}
    attributions = coar.attribute(model, [BATCH], **options)
    edited = coar.edit(model, attributions, decrease=[0], n_components=2)
    models.save_model(edited, tmp_path / "edited")
    torch.manual_seed(0)  # the base, as it was before the adapters came
    CASES["causal_lm"].build().save_pretrained(tmp_path / "base")
    torch.save(BATCH["input_ids"], tmp_path / "ids.pt")
    plain_process.run(RELOAD, *(tmp_path / name for name in ("base", "edited", "ids.pt", "logits.pt")))
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert torch.allclose(found, edited(**BATCH).logits, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def test_an_edit_that_saving_would_lose_is_refused():
    model = adapted()
    options = {"output": "token_log_prob", "method": coar.PathGradient(rounds=0), "progress": False}
    attributions = coar.attribute(model, [BATCH], coar.find_components(model, include=["*mlp.c_fc"]), **options)
    with pytest.raises(CoarError, match="merge_and_unload"):
        coar.edit(model, attributions, decrease=[0], n_components=2)
    merged = model.merge_and_unload()
    attributions = coar.attribute(merged, [BATCH], **options)
    assert coar.edit(merged, attributions, decrease=[0], n_components=2) is not merged


# ----------------------------------------------------------------------------------------------------------- embeddings


def test_a_row_of_an_embedding_is_a_component():
    model, batch = made("denoising")
    components = coar.find_components(model, include=["class_embedding"])
    assert [str(component) for component in components] == [f"class_embedding row {i}" for i in range(3)]
    output = coar.tasks.bind(model, batch=batch)
    kept = ~torch.eye(4, 3, dtype=torch.bool)  # example i without row i, the last one whole
    with torch.no_grad():
        plain = output.of(model, batch)
        with coar.ablate(model, components, kept):
            found = output.of(model, batch)
    used = batch["class_labels"]
    changed = torch.tensor([i < 3 and int(used[i]) == i for i in range(4)])
    assert torch.equal((found - plain).abs() > 1e-5, changed) and changed.any()


def test_rows_of_tokens_of_a_tied_embedding():
    model, batch = made("causal_lm")
    components = coar.find_components(model, include=["transformer.wte"])
    assert len(components) == 40 and components.groups[0].shared_by
    kept = torch.ones(40, dtype=torch.bool)
    kept[7] = False
    with torch.no_grad():
        with coar.ablate(model, components, kept, how="weights"):
            by_weights = model(**batch).logits
        with coar.ablate(model, components, kept.expand(4, 40)):
            by_hooks = model(**batch).logits
    assert torch.allclose(by_weights, by_hooks, atol=1e-5)


def test_embeddings_stay_out_unless_they_are_included():
    model, _ = made("text")
    assert not any("embedding" in group.module for group in coar.find_components(model).groups)


def test_globs_that_take_a_whole_block_do_not_mean_its_embeddings():
    model, _ = made("causal_lm")
    for include in ("transformer.*", "*"):
        assert not any("wte" in group.module for group in coar.find_components(model, include=include).groups)
    assert any("wpe" in group.module for group in coar.find_components(model, include="*.wp*").groups)


# ------------------------------------------------------------------------------------------------- quantised weights


def test_weights_of_a_tensor_class_that_holds_others_have_a_fingerprint():
    from torch.testing._internal.two_tensor import TwoTensor

    model = torch.nn.Linear(3, 2)
    plain = models.fingerprint(model)
    with torch.no_grad():
        parts = [model.weight.detach().clone() for _ in range(2)]
        model.weight = torch.nn.Parameter(TwoTensor(*parts), requires_grad=False)
        held = models.fingerprint(model)
        parts[1][0, 0] += 1
        assert len({plain, held, models.fingerprint(model)}) == 3


# ---------------------------------------------------------------------------------------------- adapters in a folder


@pytest.fixture
def folders(tmp_path):
    """A base model with its tokenizer, adapters that name it, and texts."""
    saved(tmp_path / "base", classifier(["bad", "good"]))
    written(tmp_path / "texts.csv", "text,label\na fine film,good\na dull film,bad\n")
    return tmp_path


def saved_adapters(folders, task="SEQ_CLS", **changed):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(models.load_model(folders / "base"), config).eval()
    model.save_pretrained(folders / "adapters")
    path = folders / "adapters" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return model


def test_a_folder_of_adapters_is_loaded_onto_the_base_that_it_names(folders):
    expected = saved_adapters(folders)
    model, data = coar.load(folders / "adapters", folders / "texts.csv")
    batch = next(iter(data))
    assert batch["labels"].tolist() == [1, 0] and data.description["label_names"] == ["bad", "good"]
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    found = coar.attribute(model, data, progress=False)
    again, _ = coar.reopen(found)
    assert torch.equal(again(**batch).logits, expected(**batch).logits)


def test_edited_adapters_are_known_as_edited_where_they_are_loaded_and_undone(folders, monkeypatch):
    saved_adapters(folders)
    model, data = coar.load(folders / "adapters", folders / "texts.csv")
    found = coar.attribute(model, data, progress=False)
    changed = coar.edit(model, found, decrease=[0], n_components=2)
    edited.save(changed, folders / "edited")
    loaded = models.load_model(folders / "edited")
    assert models.record(loaded)["edit"]["indices"] == models.record(changed)["edit"]["indices"]
    assert models.fingerprint(coar.undo(loaded, model)) == models.fingerprint(model)
    with pytest.raises(CoarError, match="is edited already"):
        coar.steer(loaded, data, decrease=[0])
    # The card says how to load it, in code that runs where the base model is at hand.
    code = (folders / "edited" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folders / "edited")
    known = {"base_model": models.load_model(folders / "base")}
    exec(code, known)
    batch = next(iter(data))
    assert torch.equal(known["model"](**batch).logits, changed(**batch).logits)


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("SEQ_CLS", {"base_model_name_or_path": "/not/here"}, "base model '/not/here', which is not here; give arch"),
        ("SEQ_CLS", {"base_model_name_or_path": None}, "base model None"),
        ("SEQ_CLS", {"task_type": "TOKEN_CLS"}, "head of the kind TOKEN_CLS.*BertForSequenceClassification"),
        ("SEQ_CLS", {"target_modules": ["nothing"]}, "cannot be put onto BertForSequenceClassification"),
    ],
)
def test_adapters_without_their_base_are_told(folders, task, changed, message):
    saved_adapters(folders, task, **changed)
    with pytest.raises(ModelError, match=message):
        models.load_model(folders / "adapters")


def test_the_base_of_adapters_can_be_given(folders):
    expected = saved_adapters(folders, base_model_name_or_path="/not/here")
    found = models.load_model(folders / "adapters", architecture=folders / "base")
    assert models.fingerprint(found) == models.fingerprint(expected)
    base = models.load_model(folders / "base")
    before = models.fingerprint(base)
    found = models.load_model(folders / "adapters", architecture=base)
    assert models.fingerprint(found) == models.fingerprint(expected)
    assert models.fingerprint(base) == before and not any("lora" in name for name, _ in base.named_modules())


def test_adapters_in_pickles_are_not_read(folders):
    saved_adapters(folders)
    (folders / "adapters" / "adapter_model.safetensors").rename(folders / "adapters" / "adapter_model.bin")
    with pytest.raises(ModelError, match="other weights are not read"):
        models.load_model(folders / "adapters")
