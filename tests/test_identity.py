"""Which examples a run is of: exactly those, in that order, whatever broke off or was changed meanwhile."""

import datasets
import pytest
import torch
from conftest import build_net
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import hf_coar as coar
from hf_coar import data as data_module
from hf_coar.data import Identity
from hf_coar.data.identity import HASH, signatures
from hf_coar.errors import CoarError, CorruptFileError, DataError, RunMismatchError
from hf_coar.runs.store import Store
from hf_coar.storage import files

METHOD = coar.PathGradient(rounds=2)
TEXT = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [0, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]),
    "labels": torch.tensor([[5, 6, 7, 8], [9, 3, -100, -100], [0, -100, -100, -100]]),
}
PIXELS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGES = {"pixel_values": PIXELS, "labels": torch.arange(3)}


def same(one, other):
    try:
        one.check(other)
    except DataError:
        return False
    return True


def batches(n_batches=4, size=3):
    generator = torch.Generator().manual_seed(3)
    return [
        {"inputs": torch.randn(size, 6, generator=generator), "labels": torch.tensor([i % 3, 1, 2])[:size]}
        for i in range(n_batches)
    ]


def attribute(data, folder=None, **options):
    model = build_net("mlp").model
    return coar.attribute(model, data, method=METHOD, ablated_fraction=0.1, out=folder, progress=False, **options)


# ------------------------------------------------------------------------------------------------------ what is hashed


def flipped(value):
    """The value with its last bit changed."""
    changed = value.clone()
    changed.view(torch.uint8).view(-1)[-1] ^= 1
    return changed


@pytest.mark.parametrize("entry", ["class_labels", "boxes"])
def test_objects_in_images_are_hashed_too(entry):
    def objects():
        return [{"class_labels": torch.tensor([i]), "boxes": torch.full((1, 4), 0.5 + i)} for i in range(3)]

    pixels = torch.zeros(3, 1, 2, 2)
    before, changed = objects(), objects()
    changed[1][entry] = flipped(changed[1][entry])
    one, again, other = (
        Identity.of_batch({"pixel_values": pixels, "labels": labels}) for labels in (before, objects(), changed)
    )
    assert same(one, again) and one.labels.tolist() == [-1] * 3
    assert (one.hashes["labels"] != other.hashes["labels"]).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("name", ["pixel_values", "labels"])
def test_every_bit_of_every_entry_counts(name, row):
    changed = {key: value.clone() for key, value in IMAGES.items()}
    changed[name][row] = flipped(changed[name][row : row + 1])[0]
    with pytest.raises(DataError, match=rf"the first is example {row + 7}, in its '{name}'"):
        Identity.of_batch(IMAGES).check(Identity.of_batch(changed), first=7)


@pytest.mark.parametrize("row", range(3))
def test_one_token_counts(row):
    changed = {**TEXT, "input_ids": TEXT["input_ids"].clone()}
    changed["input_ids"][row, 0] += 1
    assert not same(Identity.of_batch(TEXT), Identity.of_batch(changed))


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([[1, 0], [0, 1], [1, 1]]),
        torch.tensor([True, False, True]),
        torch.randn(3, 2, 2),
    ],
    ids=["float", "many a row", "bool", "a map"],
)
def test_labels_of_any_shape_and_type(labels):
    batch = {**IMAGES, "labels": labels}
    changed = {**batch, "labels": labels.clone()}
    changed["labels"][1] = ~labels[1] if labels.dtype == torch.bool else labels[1] + 1
    assert same(Identity.of_batch(batch), Identity.of_batch({**batch, "labels": labels.clone()}))
    with pytest.raises(DataError, match="example 1, in its 'labels'"):
        Identity.of_batch(batch).check(Identity.of_batch(changed))


def test_dtype_shape_and_name_count():
    plain = Identity.of_batch(IMAGES)
    assert not same(plain, Identity.of_batch({**IMAGES, "pixel_values": IMAGES["pixel_values"].double()}))
    assert not same(plain, Identity.of_batch({**IMAGES, "pixel_values": IMAGES["pixel_values"].reshape(3, 2, 2, 8)}))
    with pytest.raises(DataError, match=r"have the entries \['labels', 'pixels'\]"):
        plain.check(Identity.of_batch({"pixels": IMAGES["pixel_values"], "labels": IMAGES["labels"]}))


def test_nan_is_no_excuse():
    broken = {**IMAGES, "pixel_values": torch.full_like(IMAGES["pixel_values"], torch.nan)}
    assert same(Identity.of_batch(broken), Identity.of_batch({**broken}))
    assert not same(Identity.of_batch(broken), Identity.of_batch(IMAGES))
    assert not same(Identity.of_batch(IMAGES), Identity.of_batch(broken))


def padded(batch, left, right):
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(value, (left, right), value=fillers[name]) for name, value in batch.items()}


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 7), (3, 0), (2, 2)])
def test_padding_of_a_batch_does_not_count(left, right):
    assert same(Identity.of_batch(TEXT), Identity.of_batch(padded(TEXT, left, right)))
    alone = [{name: value[i : i + 1, : 4 - 2 * (i == 1)] for name, value in TEXT.items()} for i in range(2)]
    for i, one in enumerate(alone):
        assert same(Identity.of_batch(TEXT).rows(slice(i, i + 1)), Identity.of_batch(one))


def test_every_text_of_an_example_has_padding_of_its_own():
    pair = {f"pair_{name}": value[:, :3] for name, value in TEXT.items() if name != "labels"}
    longer = {f"pair_{name}": value for name, value in padded({n[5:]: v for n, v in pair.items()}, 0, 2).items()}
    assert same(Identity.of_batch({**TEXT, **pair}), Identity.of_batch({**TEXT, **longer}))
    unmasked = {name: value for name, value in longer.items() if name != "pair_attention_mask"}
    bare = {name: value for name, value in pair.items() if name != "pair_attention_mask"}
    assert not same(Identity.of_batch({**TEXT, **bare}), Identity.of_batch({**TEXT, **unmasked}))


def test_what_is_beyond_the_mask_and_no_padding_counts():
    changed = {**TEXT, "input_ids": TEXT["input_ids"].clone()}
    changed["input_ids"][1, 2] = 4  # not attended, and not what the row is filled up with
    assert not same(Identity.of_batch(TEXT), Identity.of_batch(changed))
    moved = {**TEXT, "labels": TEXT["labels"].clone()}
    moved["labels"][1] = torch.tensor([-100, 9, 3, -100])
    assert not same(Identity.of_batch(TEXT), Identity.of_batch(moved))


def test_classes_are_no_padding_where_there_are_as_many_as_tokens():
    labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]])
    changed = labels.clone()
    changed[1, 2:] = 1
    assert not same(Identity.of_batch({**TEXT, "labels": labels}), Identity.of_batch({**TEXT, "labels": changed}))


def test_targets_of_a_length_of_their_own():
    batch = {**TEXT, "labels": torch.tensor([[4, 5, 2], [6, 2, -100], [2, -100, -100]])}
    longer = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)}
    assert same(Identity.of_batch(batch), Identity.of_batch(longer))


def test_the_batch_size_moves_no_hash_of_texts():
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    texts = ["a b c d e f g", "a", "h g", "b b b b", "c d"]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        by_size = [
            [Identity.of_batch(dict(tokenizer(texts[i : i + n], padding=True, return_tensors="pt")))
             for i in range(0, 5, n)]
            for n in (1, 2, 5)
        ]  # fmt: skip
        for name in by_size[0][0].hashes:
            one, two, all_of_them = (torch.cat([some.hashes[name] for some in found]) for found in by_size)
            assert torch.equal(one, two) and torch.equal(one, all_of_them)


# ---------------------------------------------------------------------------------------- broken off, changed, resumed


def changed(data, batch, row, name="inputs"):
    data = [{key: value.clone() for key, value in one.items()} for one in data]
    data[batch][name][row] += 1
    return data


def break_off(folder, shards):
    """What a run leaves that died after so many shards."""
    for path in sorted((folder / "shards").iterdir())[shards:]:
        path.unlink()
    for path in folder.glob("length-*.json"):
        path.unlink()


@pytest.fixture
def every_unit_alone(monkeypatch):
    monkeypatch.setattr("hf_coar.runs.outbox.SECONDS", 0.0)


@pytest.mark.parametrize(("batch", "row", "name"), [(0, 0, "inputs"), (1, 2, "inputs"), (1, 0, "labels")])
def test_changed_data_are_refused_when_a_run_goes_on(tmp_path, every_unit_alone, batch, row, name):
    attribute(batches(), tmp_path)
    break_off(tmp_path, 2)
    with pytest.raises(DataError, match=rf"results of other examples: .* example {3 * batch + row}, in its '{name}'"):
        attribute(changed(batches(), batch, row, name), tmp_path)


def test_changed_data_are_refused_when_a_run_is_finished(tmp_path):
    attribute(batches(), tmp_path)
    with pytest.raises(DataError, match="example 10, in its 'labels'"):
        attribute(changed(batches(), 3, 1, "labels"), tmp_path)


def test_a_worker_that_comes_later_looks_at_what_others_did(tmp_path, every_unit_alone):
    def work(data, worker):
        with coar.running(worker=worker):
            attribute(data, tmp_path)

    work(batches(), "0/2")
    for path in sorted((tmp_path / "shards").iterdir())[1:2]:
        path.unlink()  # of worker 1, which died
    with pytest.raises(DataError, match="example 6, in its 'inputs'"):
        work(changed(batches(), 2, 0), "1/2")


def test_two_processes_with_other_data_are_found_out_in_the_end(tmp_path):
    one, other = (
        {"values": torch.zeros(2), **Identity.of_batch({"inputs": torch.tensor([[1.0], [value]])}).columns()}
        for value in (2.0, 3.0)
    )
    store = Store(tmp_path, {"seed": 0})
    store.write("masks-000000", 0, one)
    store.write("masks-000064", 0, other)
    store.gather("masks-000000", 2)
    with pytest.raises(DataError, match="the first is example 1, in its 'inputs'"):
        store.gather("masks-000064", 2)


def test_without_its_run_file_a_folder_is_still_of_its_settings(tmp_path):
    attribute(batches(), tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunMismatchError, match=r"run\.json is gone"):
        attribute(batches(), tmp_path, seed=1)
    assert not (tmp_path / "run.json").exists()
    assert len(attribute(batches(), tmp_path)) == 12


def test_shards_of_another_run_are_refused(tmp_path):
    for seed in (0, 1):
        attribute(batches(), tmp_path / str(seed), seed=seed)
    mixed = sorted((tmp_path / "1" / "shards").iterdir())[0]
    (tmp_path / "0" / "shards" / mixed.name).write_bytes(mixed.read_bytes())
    with pytest.raises(RunMismatchError, match="other settings"):
        attribute(batches(), tmp_path / "0")


def test_shards_of_an_older_version_are_refused(tmp_path):
    attribute(batches(), tmp_path)
    path = sorted((tmp_path / "shards").iterdir())[0]
    old = {name: value.clone() for name, value in files.read_tensors(path).items() if not name.startswith(HASH)}
    old["signatures"] = torch.zeros(len(old["labels"]), dtype=torch.float64)
    save_file(old, path, metadata={"sha256": files.checksum(old)})
    with pytest.raises(RunMismatchError, match="older hf_coar"):
        attribute(batches(), tmp_path)
    assert path.exists()  # it may have cost days


def of_class(number):
    return lambda logits, batch: logits[:, number]


class Scaled(torch.nn.Sequential):
    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def scaled(factor):
    torch.manual_seed(0)
    model = Scaled(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    model.factor = factor
    return model


@pytest.mark.parametrize("finished", [False, True])
def test_a_function_that_does_something_else_is_refused_whatever_it_is_called(tmp_path, every_unit_alone, finished):
    expected = attribute(batches(), tmp_path, output=of_class(0))
    if not finished:
        break_off(tmp_path, 2)
    words = r"of_class.*<lambda>' of example \d+ is \S+ with nothing ablated, and now it is .*Choose another folder"
    with pytest.raises(RunMismatchError, match=words):
        attribute(batches(), tmp_path, output=of_class(1))
    assert torch.equal(attribute(batches(4, 3), tmp_path, output=of_class(0)).weights, expected.weights)


def test_what_a_model_does_beside_its_weights_is_known_again(tmp_path):
    settings = {"method": METHOD, "ablated_fraction": 0.2, "progress": False}
    found = coar.attribute(scaled(1.0), batches(), out=tmp_path, **settings)
    with pytest.raises(RunMismatchError, match="beside its weights"):
        coar.attribute(scaled(1.05), batches(), out=tmp_path, **settings)
    with pytest.raises(CoarError, match=r"in these attributions .* Give the output and the call that were attributed"):
        coar.evaluate(found, scaled(1.05), batches(), fractions=(0.2,), n_masks=3, progress=False)


@pytest.mark.parametrize("method", [METHOD, "leave_one_out"])
def test_an_evaluation_by_another_function_is_refused(tmp_path, method):
    model, settings = build_net("mlp").model, {"fractions": (0.1,), "n_masks": 3, "progress": False}
    found = coar.attribute(model, batches(), method=method, output=of_class(0), ablated_fraction=0.1, progress=False)
    with pytest.raises(CoarError, match="in these attributions"):
        coar.evaluate(found, model, batches(), output=of_class(1), **settings)
    coar.evaluate(found, model, batches(), output=of_class(0), out=tmp_path, **settings)


def test_attributions_of_half_precision_are_evaluated_in_whole_and_the_other_way_round(tmp_path):
    model, settings = build_net("convnet"), {"ablated_fraction": 0.1, "progress": False}
    for made, judged in (("bfloat16", None), (None, "bfloat16")):
        with coar.running(dtype=made):
            found = coar.attribute(model.model, [model.batch], method=METHOD, **settings)
        with coar.running(dtype=judged):
            coar.evaluate(found, model.model, [model.batch], fractions=(0.1,), n_masks=3, progress=False)


def test_outputs_that_were_damaged_on_the_disk_stop_no_run(tmp_path, caplog):
    attribute(batches(), tmp_path)
    path = tmp_path / "witness.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    attribute(batches(), tmp_path)
    assert "witness.safetensors" in caplog.text and len(files.read_tensors(path)["outputs"]) == 3


def test_an_evaluation_does_not_go_on_with_another_function(tmp_path):
    model, settings = build_net("mlp").model, {"fractions": (0.1,), "n_masks": 3, "progress": False, "out": tmp_path}
    method = coar.Regression(n_masks=40)  # which knows of no unablated outputs
    found = coar.attribute(model, batches(), method=method, output=of_class(0), ablated_fraction=0.1, progress=False)
    coar.evaluate(found, model, batches(), output=of_class(0), **settings)
    with pytest.raises(RunMismatchError, match="holds a run in which output"):
        coar.evaluate(found, model, batches(), output=of_class(1), **settings)


# --------------------------------------------------------------------------------------------------- one's own figures


def test_an_evaluation_on_other_labels_is_refused():
    found = attribute(batches())
    model = build_net("mlp").model
    coar.evaluate(found, model, batches(), fractions=(0.1,), n_masks=3, progress=False)
    with pytest.raises(DataError, match="example 4, in its 'labels'"):
        coar.evaluate(found, model, changed(batches(), 1, 1, "labels"), fractions=(0.1,), n_masks=3, progress=False)


def old(attributions, data):
    """As they were saved before there were hashes."""
    found = torch.cat([signatures(batch) for batch in data])
    identity = Identity({}, attributions.identity.labels, found)
    parts = (attributions.weights, attributions.bias, attributions.standard_errors, attributions.components)
    return coar.Attributions(*parts, identity, attributions.config)


def test_attributions_of_before_the_hashes_are_read_and_checked(tmp_path):
    old(attribute(batches()), batches()).save_pretrained(tmp_path)
    found, model = coar.Attributions.from_pretrained(tmp_path), build_net("mlp").model
    coar.evaluate(found, model, batches(), fractions=(0.1,), n_masks=3, progress=False)
    for name in ("inputs", "labels"):
        with pytest.raises(DataError, match=f"example 4, in its '{name}'"):
            coar.evaluate(found, model, changed(batches(), 1, 1, name), fractions=(0.1,), n_masks=3, progress=False)


def test_columns_that_identify_nothing():
    good = Identity.of_batch(IMAGES).columns()
    for bad in (
        {"labels": good["labels"]},
        {**good, "hash:labels": good["hash:labels"][:2]},
        {**good, "hash:labels": good["hash:labels"].long()},
        {**good, "signatures": torch.zeros(3)},
        {name: value for name, value in good.items() if name != "labels"},
    ):
        with pytest.raises(CorruptFileError, match="known again"):
            Identity.of(bad)


# -------------------------------------------------------------------------------------------------------------- order

DATASET = TensorDataset(torch.arange(60.0).view(10, 6), torch.arange(10) % 3)


class Shuffling:
    """A batch sampler that torch knows nothing of."""

    def __iter__(self):
        yield from BatchSampler(torch.randperm(10).tolist(), 2, drop_last=False)

    def __len__(self):
        return 5


class Noisy(torch.utils.data.Dataset):
    """Random augmentation."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"inputs": torch.randn(6) + index, "labels": torch.tensor(0)}


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(DATASET, 2, shuffle=True),
        DataLoader(DATASET, 2, sampler=WeightedRandomSampler([1.0] * 10, 10)),
        DataLoader(DATASET, 2, sampler=SubsetRandomSampler(range(4))),
        DataLoader(DATASET, batch_sampler=BatchSampler(SubsetRandomSampler(range(9)), 3, drop_last=False)),
        DataLoader(DATASET, batch_sampler=Shuffling()),
        DataLoader(Noisy(), 2),
        datasets.Dataset.from_dict({"i": list(range(6))}).with_transform(
            lambda rows: {"inputs": [torch.randn(6) for _ in rows["i"]], "labels": [torch.tensor(0) for _ in rows["i"]]}
        ),
    ],
    ids=["shuffle", "weighted", "subset", "batches of a subset", "own sampler", "augmented", "transformed"],
)
def test_data_that_change_are_refused(data):
    torch.manual_seed(0)
    with pytest.raises(DataError, match=r"another order every time|not the same when they are read again"):
        data_module.batches(data)


def test_data_that_stay_are_taken():
    for data in (DataLoader(DATASET, 2), DataLoader(torch.utils.data.Subset(DATASET, [3, 1, 2]), 2)):
        assert data_module.batches(data) is data
