"""Pairs of texts, of which a model reads one after the other: both are shown, and a claim compares sorts of pairs."""

import datasets
import pytest
import tiny_texts
import torch
from transformers import BertConfig, BertModel

import hf_coar as coar
from hf_coar import masking
from hf_coar.data import Identity
from hf_coar.errors import DataError
from hf_coar.explore import acts, claims, pieces, sharing
from hf_coar.explore.source import Source
from hf_coar.explore.tab import View
from hf_coar.models import tasks

SORTS = ["same", "other"]
ROWS = {
    "sentence1": ["a film", "it is a very dull film", "fine", "it is", "a dull film", "very fine"],
    "sentence2": ["it is a very very fine film", "it", "a film", "is it a film", "fine film", "it is dull"],
    "label": [0, 0, 0, 1, 1, 1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=len(tiny_texts.WORDS), max_position_embeddings=32, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5)  # so that texts differ
    tiny_texts.saved(base / "model", model)
    text, label = datasets.Value("string"), datasets.ClassLabel(names=SORTS)
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})
    datasets.Dataset.from_dict(ROWS, features=features).to_parquet(base / "pairs.parquet")
    return base


@pytest.fixture(scope="module")
def source(folder):
    model, data = coar.load(folder / "model", folder / "pairs.parquet", batch_size=6)
    attributions = coar.attribute(model, data, method=coar.PathGradient(rounds=2), ablated_fraction=0.1, progress=False)
    return Source(attributions, model, data)


def test_a_label_says_which_sort_of_pair_it_is_and_moves_no_number(folder):
    model, data = coar.load(folder / "model", folder / "pairs.parquet")
    batch = next(iter(data))
    assert batch["labels"].tolist() == ROWS["label"] and data.description["label_names"] == SORTS
    output = tasks.bind(model, batch=batch)
    plain = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert (output.name, output.unit) == ("similarity", "cosine")
        assert torch.equal(output.of(model, batch), output.of(model, plain))
    with pytest.raises(DataError, match="a ClassLabel"):
        coar.load(folder / "model", folder / "pairs.parquet", label="sentence1", text="sentence2", pair="sentence1")


def test_a_pair_is_known_again_whatever_is_beside_it(source):
    assert source.batch([1])["pair_input_ids"].shape[1] < source.batch([0, 1])["pair_input_ids"].shape[1]
    for row in range(6):
        own = source.attributions.identity.rows([row])
        own.check_batch(source.batch([row]), row)
        another = {**source.batch([row]), "pair_input_ids": source.batch([row])["pair_input_ids"].flip(1)}
        with pytest.raises(DataError, match="pair_input_ids"):
            own.check(Identity.of_batch(another))


def test_where_a_unit_acts_may_be_in_either_text(source):
    found, model = acts.of(source), source.model
    number, (one, start, _) = next(
        (n, s) for n, s in enumerate(source.components.spans()) if "intermediate" in s[0].module
    )
    assert source.acts.shapes[number] is not None
    seen = []
    handle = model.get_submodule(one.module).register_forward_hook(lambda m, a, result: seen.append(result))
    texts = set()
    for row in range(6):
        seen.clear()
        source.run(source.batch([row]))  # alone, so without padding
        first, second = (value[0] - model.get_submodule(one.module).bias.detach() for value in seen)
        both, ids = (
            torch.cat([first, second]).abs(),
            torch.cat([source.batch([row])[f"{x}input_ids"][0] for x in ("", "pair_")]),
        )
        for unit in range(4):
            place = int(both[:, unit].argmax())
            texts.add(place >= len(first))
            assert int(found.place[row, start + unit]) == place
            assert float(found.strength[row, start + unit]) == pytest.approx(float(both[place, unit]), rel=1e-4)
            words, at = acts.tokens(source, row, place, source.acts.shapes[number])
            assert words[at].strip() == tiny_texts.WORDS[int(ids[place])]
    handle.remove()
    assert texts == {False, True}


def test_the_claim_compares_sorts_of_pairs(source):
    claim = claims.find(source)
    kept = source.components.kept_without(list(claim.components))
    with torch.no_grad():
        before = source.output.of(source.model, source.batch(range(6)))
        with masking.ablate(source.model, source.components, kept):
            after = source.output.of(source.model, source.batch(range(6)))
    own = torch.tensor(ROWS["label"]) == ROWS["label"][claim.change.rows[0]]
    name, said = SORTS[ROWS["label"][claim.change.rows[0]]], claim.text.replace("−", "-")
    assert f"the mean similarity of “{name}” goes from" in said and "that of the others from" in said
    numbers = [float(word.strip(".,")) for word in said.split() if word.strip(".,-").replace(".", "").isdigit()][2:]
    expected = [float(side[who].mean()) for who in (own, ~own) for side in (before, after)]
    assert numbers == pytest.approx(expected, abs=6e-3)
    moved = (after - before).abs()
    assert (after - before)[own].mean().abs() > (after - before)[~own].mean().abs() and bool(own[claim.flipped[0]])
    assert float(moved[claim.change.rows[claim.flipped[0]]]) == pytest.approx(float(moved[own].max()), rel=1e-3)


def test_both_texts_are_shown(source, tmp_path):
    assert "a film · it is a very very fine film" in pieces.gallery(source, View())
    assert "a film\\nit is a very very fine film" in sharing.write(source, tmp_path / "page.html").read_text()
    assert not source.takes_own
