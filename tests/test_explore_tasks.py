"""The explorer on every task: an example, an ablation, an edit; what it shows is the output of the task."""

import pytest
import torch
from task_cases import CASES, made
from test_explore import checked

import hf_coar as coar
from hf_coar import data as data_module
from hf_coar import models
from hf_coar.data import Identity
from hf_coar.explore import measuring, pieces
from hf_coar.explore.source import Source, open_source
from hf_coar.explore.tab import View
from hf_coar.explore.tabs import components as components_tab
from hf_coar.explore.tabs import edit, examples
from hf_coar.models import tasks
from hf_coar.plots import page


def attributed(model, data, output, **more):
    """Attributions with weights of no meaning, of which the record is as `attribute` leaves it."""
    components = coar.find_components(model)
    known = Identity.joined([Identity.of_batch(batch) for batch in data])
    config = {
        "model": {**models.record(model), "fingerprint": models.fingerprint(model)}, "output": output.name,
        "unit": output.unit, "granularity": "unit", "method": {"name": "none"}, "seed": 0, **more,
    }  # fmt: skip
    config |= {"alignment": output.alignment} if output.alignment else {}
    weights = torch.randn(len(known), len(components), generator=torch.Generator().manual_seed(0))
    return coar.Attributions(weights, torch.zeros(len(known)), None, components, known, config)


def opened(name):
    """The explorer's source for a task, its four examples in two batches."""
    model, batch = made(name)
    data = [data_module.rows(batch, 0, 2), data_module.rows(batch, 2, 4)]
    output = tasks.bind(model, batch=batch)
    return Source(attributed(model, data, output), model, data), output


@pytest.mark.parametrize("name", CASES)
def test_every_task_can_be_looked_at(name):
    source, output = opened(name)
    model, batch = made(name)
    view = View(example=2, k=3, lower=(1,), n_components=2)
    with torch.no_grad():
        plain = output.of(model, batch)
        shown = torch.cat([one.outputs for one in source.predictions(range(4))])
        assert shown.tolist() == pytest.approx(plain.tolist(), rel=1e-3, abs=1e-4)
        components = measuring.ablated(source, view)
        found = measuring.what_if(source, components, range(4))
        with coar.ablate(model, source.components, [i not in components for i in range(len(source.components))]):
            assert found.after.outputs.tolist() == pytest.approx(output.of(model, batch).tolist(), rel=1e-3, abs=1e-4)
    for html in (
        pieces.gallery(source, view), pieces.gallery(source, View(wrong=True)), examples.example(source, view),
        components_tab.component(source, view), examples.change(source, view, components, found),
        edit.edit(source, view, *edit.preview(source, view)),
    ):  # fmt: skip
        checked(html)
    assert f"{output.name}, what is attributed" in examples.example(source, view)
    assert not source.takes_own and source.n_classes == (0 if "labels" not in batch else source.n_classes)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("name", CASES)
def test_every_task_has_a_report_and_a_card(name, tmp_path):
    model, batch = made(name)
    output = tasks.bind(model, batch=batch)
    attributions = attributed(model, [batch], output)
    page.write_first(tmp_path, attributions)
    attributions.save_pretrained(tmp_path)
    for file in ("report.html", "report.md", "README.md"):
        assert output.name in (tmp_path / file).read_text()


PREDICTED = {
    "text": "class", "masked_lm": "2 tokens right", "tokens": "positions right", "causal_lm": "next tokens right",
    "seq2seq": "tokens right", "multi_label": "multi_label", "detection": "detection −", "frames": "positions right",
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTED)
def test_what_is_predicted_is_said_in_the_words_of_the_task(name):
    source, _ = opened(name)
    assert PREDICTED[name] in pieces.gallery(source, View())


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens, clean_up_tokenization_spaces=False):
        return "".join(chr(60 + token) for token in tokens)

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) - 60 for letter in text]}


@pytest.mark.parametrize(("name", "at_targets"), [("masked_lm", "labels"), ("tokens", "input_ids")])
def test_the_tokens_of_a_text_are_marked_where_they_are_expected(name, at_targets, monkeypatch):
    source, _ = opened(name)
    model, batch = made(name)
    monkeypatch.setattr(source, "_tokenizer", Letters(), raising=False)
    with torch.no_grad():
        best = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.argmax(-1)
    real = batch["labels"] != -100
    text = torch.where(real, batch[at_targets], batch["input_ids"])
    for row in range(4):
        attended = batch["attention_mask"][row].bool()
        marked = source.marked(row, source.predictions([row])[0])
        assert "".join(word for word, _ in marked) == Letters().decode(text[row][attended].tolist())
        assert [hit for _, hit in marked] == (real & (best == batch["labels"]))[row][attended].tolist()


def flipped(model, batch):
    """A call of somebody's own."""
    return model(input_ids=batch["input_ids"].flip(1)).logits


def test_a_call_of_ones_own_is_given_again_or_nothing_is_measured(caplog):
    model, batch = made("text")
    output = tasks.bind(model, call=flipped, batch=batch)
    attributions = attributed(model, [batch], output, call="test_explore_tasks.flipped")
    source = open_source(attributions, model, [batch], call=flipped)
    with torch.no_grad():
        assert torch.equal(source.predictions([1])[0].outputs, output.of(model, {k: v[1:2] for k, v in batch.items()}))
    assert open_source(attributions, model, [batch]).predictions([1])[0].outputs.isnan().all()
    assert "call=test_explore_tasks.flipped" in caplog.text


def test_an_output_that_fails_leaves_the_attributions_to_be_looked_at(caplog):
    model, batch = made("text")

    def broken(logits, batch):
        return logits[:, 99]

    output = coar.outputs.Output("broken", "none", broken)
    source = Source(attributed(model, [batch], output), model, [batch], output)
    checked(examples.example(source, View(example=1)))
    assert "broken cannot be shown: index 99" in caplog.text
