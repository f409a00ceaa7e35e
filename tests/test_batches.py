"""Batches: whatever numbers come in, they reach the model, or it is said why not."""

import pytest
import torch
from tiny_texts import classifier
from torch import nn

import hf_coar as coar
from hf_coar import data
from hf_coar.errors import DataError, ModelError, NonFiniteOutputError
from hf_coar.models import outputs, tasks
from hf_coar.runs import preflight

IDS = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 7, 3, 0], [2, 6, 3, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": torch.tensor([0, 1, 0])}


def margins(examples) -> torch.Tensor:
    """Margins of the classifier, as a run has them."""
    model = classifier()
    with torch.no_grad():
        return torch.cat([outputs.get("margin").of(model, piece) for piece in pieces(examples)])


def pieces(examples):
    return [batch for chunk in data.Chunks(data.batches(examples)) for _, batch in chunk.read().pieces]


def unpadded(pad_token_id=None):
    """A tiny GPT-2 that classifies texts, and batches of sixteen."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 30, "n_positions": 16, "num_labels": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(GPT2Config(**sizes, **ends)).eval()
        ids = torch.randint(2, 30, (64, 6))
    entries = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(64) % 2}
    return model, [{name: value[i : i + 16] for name, value in entries.items()} for i in range(0, 64, 16)]


@pytest.mark.parametrize("what", ["attribute", "forget"])
def test_a_classifier_that_knows_no_padding_says_how_to_name_it(what):
    model, examples = unpadded()
    with pytest.raises(ModelError, match=r"alone.*model\.config\.pad_token_id = tokenizer\.pad_token_id"):
        if what == "attribute":
            coar.attribute(model, examples, progress=False)
        else:
            coar.forget(model, examples, 1)
    assert len(preflight.bound(model, [data.rows(examples[0], 0, 1)]).name)
    assert preflight.bound(unpadded(1)[0], examples).name == "margin"


class OfOne(nn.Module):
    """Takes one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs.view(1, 3))


def test_a_model_that_takes_one_example_at_a_time_says_so():
    examples = [{"inputs": torch.randn(4, 3), "labels": torch.tensor([0, 1, 0, 1])}]
    with pytest.raises(ModelError, match="give batches of one example"):
        preflight.bound(OfOne(), examples)


@pytest.mark.parametrize("given", [torch.Tensor.numpy, torch.Tensor.tolist, lambda one: tuple(one.tolist())])
@pytest.mark.parametrize("name", BATCH)
def test_arrays_and_lists_of_numbers_reach_the_model(name, given):
    """A mask that is a list was overlooked: padding counted as text, and nobody was told."""
    assert torch.equal(margins([{**BATCH, name: given(BATCH[name])}]), margins([BATCH]))


def test_lists_in_a_raw_data_set_reach_the_model():
    datasets = pytest.importorskip("datasets")
    columns = {name: value.tolist() for name, value in BATCH.items()}
    raw = datasets.Dataset.from_dict({**columns, "text": ["a", "b", "c"]})
    assert torch.equal(margins(raw), margins([BATCH]))
    assert torch.equal(margins(raw.with_format("torch")), margins([BATCH]))


def test_ragged_lists_of_a_raw_data_set_are_told():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(coar.CoarError, match="padding='max_length'"):
        margins(datasets.Dataset.from_list([{"input_ids": [2, 4, 3]}, {"input_ids": [2, 3]}]))


def test_what_is_no_number_stays_out():
    batch = data.as_batch({**BATCH, "text": ["a", "b", "c"], "spans": [[1], [2, 3], []], "nothing": None})
    assert set(batch) == set(BATCH)


def test_lists_of_another_length_are_told():
    with pytest.raises(coar.CoarError, match=r"'attention_mask': 2"):
        data.as_batch({**BATCH, "attention_mask": [[1, 1], [1, 1]]})


def test_single_examples_are_told_how_to_become_batches():
    singles = [{name: value[index] for name, value in BATCH.items()} for index in range(3)]
    with pytest.raises(coar.CoarError, match="DataLoader"):
        tasks.bind(classifier(), batch=pieces(singles)[0])


@pytest.mark.parametrize(
    ("left_out", "told"),
    [((), False), (("attention_mask",), True), (("attention_mask", "padding"), False)],
)
def test_padding_that_nothing_masks_is_told(caplog, left_out, told):
    batch = {name: value for name, value in BATCH.items() if name not in left_out}
    if "padding" in left_out:
        batch = {name: value[:1] for name, value in batch.items()}
    components = coar.find_components(classifier(), "module")
    coar.attribute(classifier(), [batch], components, method=coar.baselines.LeaveOneOut(), progress=False)
    assert ("2 of the first 3 examples begin or end in the padding token 0" in caplog.text) == told


@pytest.mark.parametrize("share", [1, 0.02], ids=["much", "a little"])
@pytest.mark.parametrize("side", ["left", "right", "left with positions"])
def test_padding_that_moves_positions_is_told(caplog, side, share):
    """As a batch for `generate` has it; the forward of GPT-2 counts padding as positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16, **ends)).eval()
    with torch.no_grad():
        for table in (model.transformer.wpe, model.transformer.wte):
            table.weight.mul_(50)
        model.transformer.wpe.weight.mul_(share)
    ids, mask = torch.arange(16).view(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    if side != "right":
        ids, mask = ids.flip(1), mask.flip(1)
    batch = {"input_ids": ids, "attention_mask": mask}
    if side == "left with positions":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    preflight.bound(model, [batch])
    assert ("without its padding" in caplog.text) == (side == "left")


PAIRS = torch.tensor([[2, 4, 6, 3, 5, 9, 3, 0], [2, 7, 6, 3, 5, 9, 8, 3]])


@pytest.mark.parametrize(
    ("ids", "given", "told"),
    [(PAIRS, False, True), (PAIRS, True, False), (PAIRS.where(PAIRS != 3, 6), False, False), (IDS[:2], False, False)],
    ids=["pairs", "pairs that are marked", "nothing ends them", "single texts"],
)
def test_pairs_that_nothing_marks_are_told(caplog, ids, given, told):
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 1])}
    batch |= {"token_type_ids": torch.zeros_like(ids)} if given else {}
    preflight.bound(classifier(), data.batches([batch]))
    assert ("look like pairs of texts (token 3 ends them" in caplog.text) == told


@pytest.mark.parametrize(("filler", "told"), [(0, True), (-100, False)])
def test_padding_that_is_to_be_predicted_is_told(caplog, filler, told):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 1], [7, 8, 1]]), "labels": torch.tensor([[5, 6, 1], [7, 1, filler]])}
    preflight.bound(model, data.batches([batch]))
    assert ("the labels of 1 of the first 2 examples end in the padding token 0" in caplog.text) == told


@pytest.mark.parametrize(("last", "told"), [(torch.nn.Softmax(-1), True), (torch.nn.LogSoftmax(-1), False)])
def test_a_model_that_ends_in_a_softmax_is_told(caplog, last, told):
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}
    preflight.bound(torch.nn.Sequential(torch.nn.Linear(4, 3), last), data.batches([batch]))
    assert ("gives probabilities" in caplog.text) == told


@pytest.mark.parametrize(
    ("broken", "why"), [("weight", "1 of its weights.*'weight'"), ("inputs", "weights are finite")]
)
def test_a_model_that_gives_no_number_is_told_before_anything_is_ablated(broken, why):
    model, batch = torch.nn.Linear(4, 3), {"inputs": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}
    (model.weight.data if broken == "weight" else batch["inputs"])[1, 0] = float("nan")
    with pytest.raises(NonFiniteOutputError, match=f"nan with nothing ablated: .*{why}"):
        preflight.bound(model, data.batches([batch]))


def test_a_part_of_longer_labels_is_as_good_as_a_copy():
    """Some losses of transformers take a view of the labels, which a part of a wider tensor does not allow."""
    labels = torch.arange(12).reshape(3, 4)[:, :2]
    given = data.as_batch({"inputs": torch.randn(3, 5), "labels": labels})["labels"]
    assert torch.equal(given, labels) and given.view(-1).tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-5])
def test_an_output_that_mixes_examples_is_told_however_small_it_is(caplog, scale):
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(4, 3), {"inputs": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}

    def beside_the_others(logits, batch):
        return scale * (logits[:, 0] - logits[:, 0].mean())

    preflight.bound(model, [batch], lambda logits, batch: scale * logits[:, 0])
    assert "alone" not in caplog.text
    if scale == 1.0:
        with pytest.raises(DataError, match=r"beside another one and 0 alone.*give batches of one example"):
            preflight.bound(model, [batch], beside_the_others)
    else:
        preflight.bound(model, [batch], beside_the_others)
        assert "alone, so that it is not its own" in caplog.text


class Tied(torch.nn.Linear):
    """Two logits that are nearly the same, whose last digits depend on how many examples there are."""

    def forward(self, inputs):
        first = super().forward(inputs)[:, 0]
        return torch.stack([first, first * (1 + 3e-6 - 1e-6 * len(inputs))], dim=1)


def test_what_rounding_of_the_logits_may_move_as_far_is_not_told(caplog):
    batch = {"inputs": torch.randn(3, 4), "labels": torch.tensor([0, 1, 1])}
    preflight.bound(Tied(4, 3), [batch], lambda logits, batch: logits[:, 0] - logits[:, 1])
    assert "alone" not in caplog.text
