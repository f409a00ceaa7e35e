"""Tasks: for every kind of head the right output without a word, compared with the head's own loss or by hand."""

import copy
import random

import pytest
import torch
from exactness import zeroed_by_hand
from task_cases import CASES, made, rows

import hf_coar as coar
from hf_coar import models
from hf_coar.errors import CoarError, DataError
from hf_coar.models import tasks


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_the_head_tells_the_task_and_its_output(case):
    model, batch = made(case)
    assert tasks.of(model).name == CASES[case].task
    assert tasks.bind(model, batch=batch).name == CASES[case].output


def test_the_output_is_what_one_works_out_by_hand(case):
    model, batch = made(case)
    with torch.no_grad():
        found = tasks.bind(model, batch=batch).of(model, batch)
        expected = CASES[case].by_hand(model, batch)
    assert found.shape == (4,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert expected.unique().numel() > 1


def test_an_example_alone_gives_what_it_gives_in_a_batch(case):
    model, batch = made(case)
    output = tasks.bind(model, batch=batch)
    with torch.no_grad():
        alone = torch.cat([output.of(model, row) for row in rows(batch)])
        assert alone.tolist() == pytest.approx(output.of(model, batch).tolist(), rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------- components and the output


def some_masks(n_components, n_masks=3):
    """The last one keeps all, the others lack a tenth of the components."""
    kept = torch.rand(n_masks, n_components, generator=torch.Generator().manual_seed(0)) > 0.1
    kept[-1] = True
    return kept


def test_components_reach_the_output_as_zeroing_by_hand_does(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    masks = some_masks(len(components))
    with torch.no_grad():
        for kept in masks:
            by_hand = output.of(zeroed_by_hand(model, components, kept), batch)
            with coar.ablate(model, components, kept, how="weights"):
                assert torch.allclose(output.of(model, batch), by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_hand, masked(model, components, output, batch, masks[:1].expand(4, -1)), atol=1e-4)


def masked(model, components, output, batch, kept):
    with torch.no_grad(), coar.ablate(model, components, kept):
        return output.of(model, batch)


def test_every_example_may_have_components_of_its_own(case):
    model, batch = made(case)
    components, output = coar.find_components(model), tasks.bind(model, batch=batch)
    kept = some_masks(len(components))[[0, 1, 2, 0]]
    found = masked(model, components, output, batch, kept)
    alone = [masked(model, components, output, batch, row)[i] for i, row in enumerate(kept)]
    assert found.tolist() == pytest.approx(torch.stack(alone).tolist(), rel=1e-3, abs=1e-3)


# --------------------------------------------------------------------------------------------------- from end to end

RELOAD = """
import importlib, sys, torch
library, name, folder, values = sys.argv[1:]
loader = getattr(importlib.import_module(library), name)
model = loader.from_pretrained(folder)
torch.save(model.state_dict(), values)
"""


def reloaded(model, folder, plain_process):
    """The weights of a saved model as its own library alone loads them, in a process without hf_coar."""
    plain_process.run(RELOAD, models.library(model), type(model).__name__, folder, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def end_to_end(case, tmp_path, plain_process, rounds=6):
    """Attribute, evaluate, edit, save, load again; returns the correlation at a twentieth ablated."""
    model, batch = made(case)
    attributions = coar.attribute(model, [batch], method=coar.PathGradient(rounds), progress=False)
    assert attributions.provenance.output == CASES[case].output
    report = coar.evaluate(attributions, model, [batch], fractions=(0.05,), n_masks=20, progress=False)
    before = tasks.bind(model, batch=batch).of(model, batch)
    edited = coar.edit(model, attributions, decrease=[0], n_components=max(3, len(attributions.components) // 50))
    after = tasks.bind(edited, batch=batch).of(edited, batch)
    assert after[0] < before[0]
    models.save_model(edited, tmp_path)
    again = copy.deepcopy(model)
    again.load_state_dict(reloaded(edited, tmp_path, plain_process))
    assert torch.equal(tasks.bind(again, batch=batch).of(again, batch), after)
    return report.correlation[0.05]


# Two are left out: one is no task of transformers, the other takes half a minute.
SAMPLE = random.Random(0).sample([name for name in CASES if name not in ("timm", "universal")], 3)


@pytest.mark.parametrize("name", SAMPLE)
def test_from_attribution_to_a_plain_reload(name, tmp_path, plain_process):
    assert end_to_end(name, tmp_path, plain_process, rounds=2) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*SAMPLE, "timm")])
def test_every_task_from_attribution_to_a_plain_reload(name, tmp_path, plain_process):
    assert end_to_end(name, tmp_path, plain_process) > 0.5


# ------------------------------------------------------------------------------------------------ calls of one's own


def brightness(found, batch):
    """How bright the sample is."""
    return found.flatten(1).mean(1)


BRIGHTNESS = coar.outputs.Output("brightness", "grey levels", brightness, takes="output")


def test_a_sampler_runs_the_model_many_times():
    from diffusers import DDIMScheduler

    model, batch = made("denoising")
    call = tasks.sampling(DDIMScheduler(clip_sample=False), steps=3)
    batch = {"noise": batch["noise"], "class_labels": batch["class_labels"]}
    output = tasks.bind(model, BRIGHTNESS, call)
    components = coar.find_components(model)
    kept = some_masks(len(components))[[0, 1, 2, 0]]
    found = masked(model, components, output, batch, kept)
    alone = [masked(model, components, output, batch, row)[i] for i, row in enumerate(kept)]
    assert found.tolist() == pytest.approx(torch.stack(alone).tolist(), rel=1e-3, abs=1e-4)
    attributions = coar.attribute(model, [batch], output=BRIGHTNESS, call=call, method=coar.PathGradient(rounds=0),
                                  progress=False)  # fmt: skip
    assert "sampling" in attributions.provenance.call
    with pytest.raises(CoarError, match="sampling"):
        coar.evaluate(attributions, model, [batch], output=BRIGHTNESS)


# ------------------------------------------------------------------------------- said before the first pass is paid for


def test_an_entry_that_nobody_takes_is_named(caplog):
    model, batch = made("text")
    batch["token_type_id"] = batch.pop("token_type_ids")
    coar.attribute(model, [batch], method=coar.PathGradient(rounds=0), progress=False)
    assert "token_type_id " in caplog.text


def test_a_timm_model_without_a_head_has_features_and_no_classes():
    timm = pytest.importorskip("timm")
    model, images = timm.create_model("test_vit", num_classes=0).eval(), torch.randn(2, 3, 160, 160)
    assert tasks.of(model).name == "embedding"
    with pytest.raises(DataError, match=r"no head.*pair_pixel_values"):
        tasks.bind(model, batch={"pixel_values": images, "labels": torch.tensor([0, 1])}).of(
            model, {"pixel_values": images, "labels": torch.tensor([0, 1])}
        )
    pair = {"pixel_values": images, "pair_pixel_values": images}
    assert tasks.bind(model, batch=pair).of(model, pair).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("labels", [[0.0, 1.0], [[1.0], [1.0]]])
def test_zeros_and_ones_of_one_number_are_not_taken_for_distances(labels):
    model, batch = torch.nn.Linear(3, 1), {"inputs": torch.randn(2, 3), "labels": torch.tensor(labels)}
    with pytest.raises(CoarError, match=r"multi_label.*regression"):
        tasks.bind(model, batch=batch)
    assert tasks.bind(model, batch={**batch, "labels": torch.tensor([0.0, 0.7])}).name == "regression"


def test_an_output_that_mixes_the_examples_is_refused():
    model, batch = made("image_and_text")

    def against_the_others(found, batch):
        return found.logits_per_image.log_softmax(1).diagonal()

    output = coar.outputs.Output("contrast", "nats", against_the_others, takes="output")
    with pytest.raises(DataError, match="alone"):
        coar.attribute(model, [batch], output=output, call=lambda model, batch: model(**batch), progress=False)


REFUSED = {
    "a text decoder without a text": ("seq2seq", ("labels",), {}, "decodes a second text"),
    "a sound decoder without a text": ("speech", ("labels",), {}, "decodes a second text"),
    "masked tokens without labels": ("masked_lm", ("labels",), {}, "labels"),
    "a classifier's output": ("causal_lm", (), {"output": "margin"}, "token_margin"),
    "a language model's output": ("text", (), {"output": "token_margin"}, "margin"),
    "objects without boxes": ("detection", ("labels",), {}, "labels"),
    "spans without their ends": ("question_answering", ("end_positions",), {}, "end_positions"),
    "one number and whole numbers": ("score", (), {"labels": torch.tensor([0, 1, 1, 0])}, "score"),
    "nothing to explain": ("embedding", ("pair_input_ids", "pair_attention_mask"), {}, "pair_input_ids"),
    "an input too few": ("denoising", ("timestep",), {}, "timestep"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_is_said_before_the_first_pass(what):
    name, missing, given, message = REFUSED[what]
    model, batch = made(name)
    batch = {key: value for key, value in batch.items() if key not in missing}
    options = {key: given[key] for key in given if key == "output"}
    batch |= {key: value for key, value in given.items() if key != "output"}
    with pytest.raises(CoarError, match=message) as caught:
        coar.attribute(model, [batch], method=coar.PathGradient(rounds=0), progress=False, **options)
    assert len(str(caught.value).splitlines()) <= 3 and "use one mask" not in str(caught.value)


def test_a_task_is_known_by_being_registered(registering):
    from transformers import BertForMaskedLM

    class Restorer(BertForMaskedLM):
        pass

    model = Restorer(made("masked_lm")[0].config)
    assert tasks.of(model).name == "masked_lm"
    tasks.register("restoring", outputs=("token_log_prob",), heads=("Restorer",), alignment="same")
    assert tasks.bind(model, batch=made("masked_lm")[1]).name == "token_log_prob"
    with pytest.raises(CoarError, match="taken"):
        tasks.register("restoring", outputs=("token_log_prob",))


# --------------------------------------------------------------------------------------- entries that are no one tensor


@pytest.mark.parametrize("name", ["detection", "universal"])
def test_lists_of_objects_are_known_again(name, tmp_path):
    model, batch = made(name)
    attributions = coar.attribute(model, [batch], method=coar.PathGradient(rounds=0), out=tmp_path, progress=False)
    again = coar.Attributions.from_pretrained(tmp_path)
    assert coar.evaluate(again, model, [batch], fractions=(0.05,), n_masks=3, progress=False).n_masks == 3
    other = copy.deepcopy(batch)
    changed = other["labels"][2]["boxes"] if name == "detection" else other["mask_labels"][2]
    changed[0] += 0.01
    with pytest.raises(DataError, match="example 2"):
        coar.evaluate(again, model, [other], fractions=(0.05,), n_masks=3, progress=False)
    assert len(attributions) == 4


def test_masks_together_copy_lists_too():
    model, batch = made("detection")
    masks = coar.Regression(n_masks=4)
    one = coar.attribute(model, [batch], method=masks, progress=False)
    with coar.running(masks_together=2):
        assert torch.allclose(
            coar.attribute(model, [batch], method=masks, progress=False).weights, one.weights, atol=1e-4
        )


# --------------------------------------------------------------------------------------------------- a loss of its own


def n_passes(model, run):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    run()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("name", "passes"), [("pretraining", 1), ("masked_lm", 1), ("series", 1), ("tokens", 1), ("detection", 4)]
)
def test_a_heads_own_loss_takes_one_pass_where_that_is_the_same(name, passes):
    """Two texts of a batch have other numbers of labels; the matching of objects is each image's own."""
    model, batch = made(name)
    model, output = copy.deepcopy(model), tasks.bind(model, "own_loss", batch=batch)
    with torch.no_grad():
        with coar.ablate(
            model, coar.find_components(model), some_masks(len(coar.find_components(model)))[[0, 1, 2, 0]]
        ):
            output.of(model, batch)  # where the examples are is looked at in the middle of it
        output.of(model, rows(batch)[0])
        output.of(model, {key: value[:2] for key, value in batch.items()})
        output.of(model, batch)  # another batch is looked at first
        assert n_passes(model, lambda: output.of(model, batch)) == passes
        found = output.of(model, batch)
        alone = torch.stack([-model(**row).loss for row in rows(batch)])
    assert found.tolist() == pytest.approx(alone.tolist(), rel=1e-4)
    components = coar.find_components(model)
    kept = some_masks(len(components))[[0, 1, 2, 0]]
    together = masked(model, components, output, batch, kept)
    each = [masked(model, components, output, batch, row)[i] for i, row in enumerate(kept)]
    assert together.tolist() == pytest.approx(torch.stack(each).tolist(), rel=1e-3, abs=1e-3)


class Fresh:
    """The same batch in other tensors every time, as a data set that is read while running gives them."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield {name: value.clone() for name, value in self.batch.items()}


def test_a_look_at_one_example_beside_a_pass_is_none_of_the_pass():
    """Batches that are read anew are unknown every time, so that the loss of their last example is looked at."""
    model, batch = made("series")
    options = {"method": coar.PathGradient(rounds=2), "ablated_fraction": 0.05, "progress": False}
    known = coar.attribute(copy.deepcopy(model), [batch], **options)
    fresh = coar.attribute(copy.deepcopy(model), Fresh(batch), **options)
    assert torch.allclose(fresh.weights, known.weights, rtol=1e-4, atol=1e-6)


def own_class(name):
    """A class of one's own, as a folder with code brings it: in no mapping, without a word of its embeddings."""
    import transformers

    class Inner(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.table, self.mid, self.head = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
            self.post_init()

        def forward(self, input_ids, attention_mask=None, labels=None):
            hidden = torch.relu(self.mid(self.table(input_ids)))
            return type("Found", (), {"logits": self.head(hidden.mean(1))})()

    Inner.__name__ = name
    return Inner(transformers.PretrainedConfig(num_labels=3)).eval()


def test_a_class_of_ones_own_is_known_by_how_it_is_called():
    model = own_class("MineForSequenceClassification")
    assert models.head(model).n == 3 and models.word_embeddings(model) is None
    batch = {"input_ids": torch.arange(12).view(3, 4), "labels": torch.arange(3)}
    options = {"method": coar.PathGradient(rounds=2), "ablated_fraction": 0.05, "progress": False}
    attributions = coar.attribute(model, [batch], **options)
    assert attributions.provenance.output == "margin"
    names = {
        "MineForCausalLM": "causal_lm",
        "MineForMaskedLM": "masked_lm",
        "ForThings": "own_loss",
        "Mine": "own_loss",
    }
    assert {name: tasks.of(own_class(name)).name for name in names} == names


class Selecting(torch.nn.Module):
    """Its loss is of the places that are attended, all examples' one after the other."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 1)

    def forward(self, x, attention_mask, labels=None):
        logits, there = self.inner(x)[..., 0], attention_mask.bool()
        loss = torch.nn.functional.mse_loss(logits[there], labels[there])
        return type("Found", (), {"loss": loss, "logits": logits})()


def test_a_loss_that_selects_places_is_taken_alone_as_soon_as_the_examples_differ():
    torch.manual_seed(0)
    model, output = Selecting(), coar.outputs.get("own_loss")
    batch = {"x": torch.randn(4, 6, 3), "attention_mask": torch.ones(4, 6), "labels": torch.randn(4, 6)}
    other = {**batch, "attention_mask": torch.ones(4, 6)}
    other["attention_mask"][0, 4:] = other["attention_mask"][1, :2] = 0
    other["attention_mask"][2, 5:], other["attention_mask"][3, :3] = 0, 0  # 4 + 4 + 5 + 3 places: 16 of 4 examples
    with torch.no_grad():
        for each, passes in ((batch, None), (batch, 1), (other, None), (other, 4)):
            alone = [-float(model(**row).loss) for row in rows(each)]
            assert output.of(model, each).tolist() == pytest.approx(alone, rel=1e-5)
            assert passes in (None, n_passes(model, lambda each=each: output.of(model, each)))
