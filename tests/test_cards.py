"""Cards: what they say, that their metadata is valid, that their Python runs, and that a person's card stays."""

import json
import re

import pytest
from other_processes import forked
from test_format import CONFIG, tiny

import hf_coar as coar
from hf_coar.attributions import folders
from hf_coar.editing import edited
from hf_coar.storage import cards, escaping, files

EVALUATION = {
    "n_masks": 100,
    "seed": 1,
    "fractions": [
        {"ablated_fraction": 0.05, "correlation": 0.8642, "interval": [0.848, 0.877], "slope": 0.84, "n_undefined": 0},
        {
            "ablated_fraction": 0.0125,
            "correlation": 0.9093,
            "interval": [0.895, 0.921],
            "slope": 1.05,
            "n_undefined": 0,
        },
    ],
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENTRIES = {
    "rule": "welch", "output": "margin", "granularity": "unit", "increase": [], "decrease": list(range(20)),
    "reference": "all others", "components": ["layer1.0.conv1 filter 3", "layer1.0.conv2 filter 9"], "indices": [3, 20],
    "parameters": ["layer1.0.conv1.weight", "layer1.0.conv2.weight"], "data": CONFIG["data"],
    "base": {**CONFIG["model"], "id": "timm/resnet18.a1_in1k", "revision": COMMIT, "library": "timm"},
    "figures": [["accuracy on bags", "98.0 %", "3.2 %"], ["mean accuracy on the other classes", "92.1 %", "91.8 %"]],
}  # fmt: skip


class Report:
    def to_json(self):
        return EVALUATION


def metadata(card: str) -> dict:
    """As the Hub's own client reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def python_of(card: str) -> list[str]:
    return [part.split("\n```")[0] for part in card.split("```python\n")[1:]]


def test_the_card_of_attributions_says_it_all():
    card = cards.attributions_card(CONFIG, 1234, "me/attr", EVALUATION, 0.87, ["pictures/by_layer.png"])
    said = [
        "user/model", "0" * 40, "user/data", "split train[:2]", "1,234", "granularity *unit*", "*margin*", "in logits",
        "path gradient (rounds 8)", "5 %", "| seed | 0 |", "240 forward passes an example, 296,160 in all",
        "| 5 % | 0.864 | 0.848 to 0.877 | 0.84 |", "| 1.25 % | 0.909 |", "Stability: 0.87", "![by layer]",
        "## Limits", "arXiv:2404.11534", "Shah", "ICML 2024", "f" * 32,
    ]  # fmt: skip
    assert not [words for words in said if words not in card]
    assert metadata(card) == {
        "library_name": "hf_coar",
        "tags": ["coar", "component-attribution", "interpretability"],
        "base_model": "user/model",
        "base_model_relation": "adapter",
        "datasets": ["user/data"],
    }
    assert "$" not in card and "None" not in card


def test_the_card_of_an_edited_model_says_it_all():
    card = cards.edited_model_card(ENTRIES, "me/edited")
    said = [
        "timm/resnet18.a1_in1k", COMMIT, "2 components", "lower the output on 20 examples",
        "Welch", "| accuracy on bags | 98.0 % | 3.2 % |", 'timm.create_model("hf-hub:me/edited", pretrained=True)',
        "- `layer1.0.conv2 filter 9`", "coar.undo(", f'revision="{COMMIT}"', "coar_edit.json", "2404.11534",
    ]  # fmt: skip
    assert not [words for words in said if words not in card]
    assert metadata(card)["base_model"] == "timm/resnet18.a1_in1k" and metadata(card)["library_name"] == "timm"
    assert metadata(card)["base_model_relation"] == "finetune"
    assert "$" not in card and "None" not in card
    for code in python_of(card):
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("library", "words"), [("transformers", "from transformers import Tiny"), ("torch", "load_file")]
)
def test_every_library_has_its_snippet(library, words):
    for source in (".", "me/edited"):
        card = cards.edited_model_card({**ENTRIES, "base": {**CONFIG["model"], "library": library}}, source)
        assert words in python_of(card)[0]
        compile(python_of(card)[0], "card", "exec")


def test_a_local_path_is_nobodys_business():
    local = {"id": "/home/someone/secret/model", "revision": None, "library": "timm", "class": "ResNet"}
    config = {**CONFIG, "model": local, "data": {"id": "runs/secret/images.parquet", "revision": None}}
    for card in (cards.attributions_card(config, 3), cards.edited_model_card({**ENTRIES, "base": local}, "me/edited")):
        assert "secret" not in card and "model, a local folder" in card
        assert "base_model" not in metadata(card)
    assert "datasets" not in metadata(cards.attributions_card(config, 3))


def test_figures_that_were_not_measured_are_not_made_up():
    card = cards.attributions_card({**CONFIG, "model": {}, "data": {}}, 3)
    assert "Not measured" in card and "Stability: unknown" in card and "batches of tensors" in card
    assert "No figures" in cards.edited_model_card({**ENTRIES, "figures": []})


def test_results_in_the_form_of_the_hub():
    import yaml
    from huggingface_hub import parse_eval_result_entries
    from huggingface_hub.utils import yaml_dump  # noqa: F401 (its reader is yaml itself)

    text = cards.evaluation_yaml(CONFIG["data"], EVALUATION)
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [entry.value for entry in entries] == [0.8642, 0.9093]
    assert {entry.dataset_id for entry in entries} == {"user/data"} and entries[0].dataset_revision == "1" * 40
    assert "95 % interval 0.8480 to 0.8770" in entries[0].notes and "100 fresh random masks" in entries[0].notes
    assert cards.evaluation_yaml({"id": "images.parquet"}, EVALUATION) is None
    assert cards.evaluation_yaml(CONFIG["data"], None) is None


def test_a_card_that_a_person_wrote_or_changed_stays(tmp_path):
    card = tmp_path / "README.md"
    tiny().save_pretrained(tmp_path)
    first = card.read_text()
    tiny().save_pretrained(tmp_path, report=Report())
    second = card.read_text()
    assert "Not measured" in first and "0.864" in second  # ours is brought up to date
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {**EVALUATION, "of": tiny().fingerprint()}
    assert (tmp_path / ".eval_results/hf_coar.yaml").is_file()
    changed = second.replace("## Limits", "I checked this.\n\n## Limits")
    for theirs in (changed, "# Mine\n", second.replace("0.864", "0.999"), ""):
        card.write_text(theirs)
        tiny().save_pretrained(tmp_path, report=Report())
        assert card.read_text() == theirs
    assert cards.is_generated(second) and cards.is_generated(second.replace("\n", "\r\n"))
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert loaded.evaluation == {**EVALUATION, "of": tiny().fingerprint()}


def test_the_card_of_an_edited_model_that_a_person_wrote_stays(tmp_path):
    edited.write_card(tmp_path, ENTRIES, ".")
    edited.write_card(tmp_path, ENTRIES, "me/edited")
    assert "hf-hub:me/edited" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    edited.write_card(tmp_path, ENTRIES, "me/edited")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_the_python_of_a_local_card_runs_as_it_stands(tmp_path):
    tiny().save_pretrained(tmp_path)
    (code,) = [code for code in python_of((tmp_path / "README.md").read_text()) if "from_pretrained" in code]
    done = forked(lambda: exec(code, {"__name__": "__main__"}) or 0, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "+2.0000" not in done.stderr and re.search(r"\+2\.0000  fc neuron 0", done.stdout)
    assert "without them: 1.0" in done.stdout  # of the first example all three are ablated: its bias


def test_an_evaluation_that_is_none_is_told(tmp_path):
    tiny().save_pretrained(tmp_path)
    for value in ([], {"fractions": 3}, {**EVALUATION, "fractions": [{"ablated_fraction": "x"}]}, "x", None):
        files.write_json(tmp_path / "evaluation.json", value)
        with pytest.raises(coar.CoarError, match="no evaluation"):
            coar.Attributions.from_pretrained(tmp_path)


def test_an_evaluation_is_added_to_a_folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    folders.add_evaluation(tmp_path, Report())
    assert "0.864" in (tmp_path / "README.md").read_text()
    assert coar.Attributions.from_pretrained(tmp_path).evaluation == EVALUATION
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_is_pushed_is_listed_and_needs_a_folder(tmp_path):
    with pytest.raises(coar.CoarError, match="there is no folder"):
        folders.push_folder(tmp_path / "nowhere", "me/attr")
    with pytest.raises(coar.CoarError, match="holds no attributions"):
        folders.push_folder(tmp_path, "me/attr")


# ------------------------------------------------------------------------------------------------------ base models


def known(model) -> dict:
    """The record of a model as attributions keep it."""
    from hf_coar import models

    return {**models.record(model), "fingerprint": models.fingerprint(model)}


def test_a_base_model_is_named_only_where_its_weights_were_read():
    import timm
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=11)
    config.name_or_path, config._commit_hash = "google-bert/bert-base-uncased", COMMIT
    fresh = timm.create_model("resnet18.a1_in1k", pretrained=False)
    for model in (fresh, BertForSequenceClassification(config)):
        entry = known(model)
        for card in (
            cards.attributions_card({**CONFIG, "model": entry}, 3),
            cards.edited_model_card({**ENTRIES, "base": entry}, "me/edited"),
        ):
            assert "base_model" not in metadata(card)
            assert f"a {type(model).__name__} (its configuration names {entry['id']}" in card


def test_a_model_that_was_trained_on_is_not_its_base(tmp_path):
    import torch

    from hf_coar import demo, models

    model = models.load_model(demo.MODEL)
    of_hub = {"id": "me/base", "revision": COMMIT}
    assert cards.model_id({**known(model), **of_hub}) == "me/base"
    model(torch.randn(2, 1, 28, 28)).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    trained = {**known(model), **of_hub}
    assert cards.model_id(trained) is None
    assert "base_model" not in metadata(cards.attributions_card({**CONFIG, "model": trained}, 3))


def test_warnings_are_on_the_card_and_shown_as_text(tmp_path):
    found = tiny()
    found.provenance = found.provenance.found(warnings=("only 3 % of the decisions <b>are</b>\nleft",))
    found.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"**Take care:** {escaping.for_markdown('only 3 % of the decisions <b>are</b> left')}" in card
    assert "<b>" not in card


def test_the_card_says_what_the_examples_are():
    text = cards.attributions_card(CONFIG, 12, examples="12; Bag 7, <b>5</b>; 91.7 % right with everything in place")
    assert "| examples | 12; Bag 7, &lt;b&gt;5&lt;/b&gt;; 91.7 % right with everything in place |" in text
    assert "| examples | 12 |" in cards.attributions_card(CONFIG, 12)
