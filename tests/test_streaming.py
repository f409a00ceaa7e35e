"""Data: batches from anything, each example decoded once and under its own number, and nothing kept in memory."""

import io
import json
import subprocess
import sys
import weakref

import datasets
import pytest
import torch
from conftest import DEMO, build_net
from PIL import Image

import hf_coar as coar
from hf_coar import data as data_module
from hf_coar.errors import CoarError, CorruptFileError, DataError, ModelError
from hf_coar.runs import engine

METHOD = coar.PathGradient(rounds=2, n_flips=0, check_masks=0)  # passes of one kind, so that data are read once


def picture(seed):
    pixels = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Eleven pictures; those at 3 and 7 are broken."""
    contents = [b"broken" if i in (3, 7) else picture(i) for i in range(11)]
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [i % 10 for i in range(11)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    path = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def components():
    model, _ = coar.load(DEMO / "model", DEMO / "images.parquet")
    return coar.find_components(model, include=["layer3.*"])


def attribute(data, components, folder=None, method=METHOD, **options):
    model, _ = coar.load(DEMO / "model", DEMO / "images.parquet")
    with engine.running(**options):
        return coar.attribute(model, data, components, method=method, ablated_fraction=0.25, out=folder, progress=False)


def load(path, split=None, batch_size=4, **options):
    return coar.load(DEMO / "model", path, split=split, batch_size=batch_size, **options)[1]


# --------------------------------------------------------------------------------------------------- the same from all


def test_whole_stream_and_list_give_the_same(components):
    whole = attribute(load(DEMO / "images.parquet", "train[:10]"), components)
    stream = attribute(load(DEMO / "images.parquet", "train[:10]", streaming=True), components)
    batches = attribute(list(load(DEMO / "images.parquet", "train[:10]")), components)
    assert torch.equal(whole.weights, stream.weights) and torch.equal(whole.weights, batches.weights)


def test_the_batch_size_moves_nothing_but_rounding(components):
    one, two = (attribute(load(DEMO / "images.parquet", "train[:10]", batch_size=n), components) for n in (3, 10))
    torch.testing.assert_close(one.weights, two.weights, rtol=1e-4, atol=1e-5)


def test_an_image_folder(tmp_path, components):
    for name in ("Bag", "Coat"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(picture(i))
    for streaming in (False, True):
        assert len(attribute(load(tmp_path, streaming=streaming), components)) == 6


def test_raw_datasets_and_loaders():
    net = build_net("mlp")
    columns = {"inputs": torch.randn(6, 6).tolist(), "labels": [0, 1, 2, 0, 1, 2]}
    raw = datasets.Dataset.from_dict(columns).with_format("torch")
    tensors = torch.utils.data.TensorDataset(torch.tensor(columns["inputs"]), torch.tensor(columns["labels"]))
    sources = [raw, raw.to_iterable_dataset(), torch.utils.data.DataLoader(tensors, batch_size=4)]
    found = [
        coar.attribute(net.model, data, method=METHOD, ablated_fraction=0.1, progress=False).weights for data in sources
    ]
    for weights in found[1:]:
        torch.testing.assert_close(weights, found[0], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- read and decode once


LOOK = [4]  # examples that all is tried on before the first pass: at most a batch


def counting(examples, seen):
    def prepare(rows):
        seen.append(len(rows))
        return prepared(rows)

    prepared, examples.prepare = examples.prepare, prepare
    return examples


@pytest.mark.parametrize("streaming", [False, True])
def test_every_example_is_decoded_once(components, tmp_path, streaming):
    seen = []
    examples = counting(load(DEMO / "images.parquet", "train[:10]", streaming=streaming), seen)
    attribute(examples, components, tmp_path)
    assert seen == [*LOOK, 4, 4, 2]
    attribute(examples, components, tmp_path)
    assert seen == 2 * [*LOOK, 4, 4, 2], "a finished run reads all of them again, to see that they are the same"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_process_decodes_its_own_batches_only(components, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(engine._Job, "take_over", lambda job: None)
    seen = []
    examples = counting(load(DEMO / "images.parquet", "train[:10]", streaming=streaming), seen)
    with pytest.raises(CorruptFileError, match="example 4"):
        attribute(examples, components, tmp_path, worker="0/2")
    assert seen == [*LOOK, 4, 2]


# ----------------------------------------------------------------------------------------------------- unreadable ones


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_unreadable_examples_are_left_out_and_listed(parquet, components, tmp_path, streaming, batch_size, caplog):
    data = load(parquet, streaming=streaming, batch_size=batch_size)
    found = attribute(data, components, tmp_path)
    assert len(found) == 9
    assert found.config["skipped"] == [3, 7]
    assert found.labels.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 0]
    assert "example 3 cannot be read" in caplog.text and caplog.text.count("of 11 examples were left out") == 1
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == ["000000003.json", "000000007.json"]
    again = attribute(data, components, tmp_path)
    assert torch.equal(again.weights, found.weights)


def test_an_example_keeps_its_draws_when_others_are_left_out(parquet, components):
    """Example 4's attributions depend on its own number, not on how many before it could be read."""
    whole = load(DEMO / "images.parquet", "train[:11]")
    # Shrinkage, flips and the scale of fresh sets look at all examples.
    method = coar.PathGradient(rounds=2, shrink=False, n_flips=0, check_masks=0)
    attributed = attribute(whole, components, method=method)
    broken = datasets.Dataset.from_list(
        [
            {**row, "image": {"bytes": b"broken", "path": None}} if i == 3 else row
            for i, row in enumerate(whole.dataset.cast_column("image", datasets.Image(decode=False)))
        ],
        features=whole.dataset.features,
    )
    found = attribute(data_module.Examples(broken, whole.prepare, 4), components, method=method)
    kept = torch.tensor([i for i in range(11) if i != 3])
    torch.testing.assert_close(found.weights, attributed.weights[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_strict_makes_an_unreadable_example_an_error(parquet, components, streaming):
    with pytest.raises(DataError, match="example 3 cannot be read"):
        attribute(load(parquet, streaming=streaming), components, strict=True)


def test_nothing_readable_is_an_error(parquet, components):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    broken = data_module.Examples(rows, load(parquet).prepare, 2)
    with pytest.raises(DataError, match="none of the 2 examples can be read"):
        attribute(broken, components)


# ---------------------------------------------------------------------------------------------------------- bad input


class BreaksOff:
    """A stream that fails after five rows."""

    features = {}

    def __iter__(self):
        for i in range(9):
            if i == 5:
                raise ConnectionError("the line went dead")
            yield {"inputs": torch.randn(6, generator=torch.Generator().manual_seed(i)), "labels": 1}


def collated(rows):
    return torch.utils.data.default_collate(rows)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([{"inputs": torch.zeros(0, 6)}], "at least one example"),
        ([{"inputs": torch.zeros(2, 0)}], "nothing in it"),
        ([{"inputs": torch.zeros(2, 6), "labels": torch.zeros(3)}], "same first axis"),
        (["text"], "expected batches"),
        (iter([]), "cannot be iterated again"),
        (data_module.Examples(BreaksOff(), collated, 2), "broke off after 5: ConnectionError: the line went dead"),
        (datasets.DatasetDict({"a": datasets.Dataset.from_dict({})}), r"splits \['a'\]"),
        (torch.utils.data.DataLoader([1, 2], shuffle=True), "another order every time"),
    ],
    ids=["empty", "no examples", "no features", "sizes", "text", "generator", "breaks off", "splits", "shuffled"],
)
def test_bad_data_are_one_clear_error(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        coar.attribute(build_net("mlp").model, data, method=METHOD, ablated_fraction=0.1, progress=False)


LATER = {
    "other features": ({"inputs": torch.zeros(2, 7)}, ModelError, "Given|shapes"),
    "labels of no class": ({"labels": torch.tensor([0, 99])}, DataError, "labels run from 0 to 99"),
    "no entry of before": ({"labels": None}, DataError, "other entries than those before: labels only before it"),
    "an entry more": ({"weights": torch.zeros(2)}, DataError, "weights only from it on"),
}


@pytest.mark.parametrize("what", LATER)
def test_a_later_batch_that_does_not_fit_is_named(what):
    changed, kind, message = LATER[what]
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    good = {"inputs": torch.randn(2, 6), "labels": torch.tensor([0, 1])}
    bad = {name: value for name, value in {**good, **changed}.items() if value is not None}
    with pytest.raises(kind, match=f"example.* 8.*({message})"):
        coar.attribute(model, [*[good] * 4, bad], method=METHOD, ablated_fraction=0.1, progress=False)


def test_an_empty_sequence_is_an_error():
    net = build_net("bert")
    net.batch["attention_mask"][2] = 0
    with pytest.raises(DataError, match=r"empty sequences at \[2\] of a batch of 4"):
        coar.attribute(net.model, [net.batch], method=METHOD, ablated_fraction=0.1, progress=False)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_batch_size_that_is_none(batch_size, components):
    with pytest.raises(CoarError, match="batch_size="):
        coar.attribute(build_net("mlp").model, load(DEMO / "images.parquet"), batch_size=batch_size)


# -------------------------------------------------------------------------------------------------------------- memory


class Passing:
    """Batches that are made when they are asked for, and counted while somebody holds them."""

    def __init__(self, count):
        self.count, self.alive, self.most = count, weakref.WeakSet(), 0

    def __iter__(self):
        for i in range(self.count):
            inputs = torch.randn(2, 6, generator=torch.Generator().manual_seed(i))
            self.alive.add(inputs)
            self.most = max(self.most, len(self.alive))
            yield {"inputs": inputs, "labels": torch.tensor([0, 1])}
            del inputs


def test_batches_are_let_go():
    data = Passing(30)
    coar.attribute(build_net("mlp").model, data, method=METHOD, ablated_fraction=0.1, progress=False)
    assert data.most <= 2


_PEAK = """
import json, resource, sys, tempfile
import torch
import hf_coar as coar
from hf_coar.runs.store import Store
torch.set_num_threads(1)
peaks, blocks = [], Store.blocks

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def noted(*args):
    peaks.append(peak())
    return blocks(*args)

Store.blocks = noted  # called once all passes are done
model, data = coar.load(sys.argv[1] + "/model", sys.argv[1] + "/images.parquet", streaming=True, batch_size=50)
rows = data.dataset.repeat(3).take(int(sys.argv[2]))
data = coar.data.Examples(rows, data.prepare, 50)
with tempfile.TemporaryDirectory() as out:
    coar.attribute(model, data, method=coar.PathGradient(rounds=2), ablated_fraction=0.5, out=out, progress=False)
print(json.dumps([peaks[0], peak()]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_examples():
    """While passes run it does not; afterwards the results are in memory, a few matrices of them while they shrink."""
    during, after = {}, {}
    for count in (500, 5000):
        command = [sys.executable, "-c", _PEAK, str(DEMO), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        during[count], after[count] = json.loads(done.stdout.splitlines()[-1])
    print({"MB during the passes": during, "MB afterwards": after})
    assert during[5000] < 1.1 * during[500]
    assert after[5000] < 1.1 * after[500] + 8 * 4 * 832 * 4500 / 2**20


_LARGE = """
import json, resource, sys
import torch, transformers
import hf_coar as coar
from hf_coar.estimators.gates import one_pass
from hf_coar.models import outputs
from hf_coar.runs.plan import plan
from hf_coar.runs.problem import Size
torch.set_num_threads(1)
torch.manual_seed(0)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def llama(width, n_layers):
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=n_layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8000,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

def attributed(model):
    components = coar.find_components(model)
    found = coar.attribute(model, [batch], components, method=method, ablated_fraction=0.05, progress=False)
    assert found.weights.isfinite().all() and (found.weights != 0).any()
    return components

method, batch = coar.PathGradient(passes=1), {"input_ids": torch.randint(1, 8000, (1, 32))}
attributed(llama(64, 1))  # what is loaded once
before = peak()
model = llama(1024, int(sys.argv[1]))
components = attributed(model)
taken = peak() - before
gated = one_pass(model, components, outputs.get("token_margin"), batch)
planned = plan(model, batch, 1, len(components), method.parts(Size(len(components), 0.05)), one_pass=gated)
print(json.dumps([planned.parameter_bytes, planned.memory_bytes, taken]))
"""


@pytest.mark.slow
def test_a_language_model_in_half_precision_takes_the_memory_that_was_planned():
    """A Llama of some 300 million parameters in bfloat16; `pytest tests/test_streaming.py -m slow -s` prints it."""
    done = subprocess.run([sys.executable, "-c", _LARGE, "24"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, planned, taken = json.loads(done.stdout.splitlines()[-1])
    print({"MB of weights": weights >> 20, "MB planned": planned >> 20, "MB taken": taken >> 20})
    assert weights > 500 << 20
    assert weights < taken < 1.3 * planned


def test_a_raw_data_set_is_described_by_its_fingerprint():
    raw = datasets.Dataset.from_dict({"inputs": [[0.0] * 6], "labels": [1]}).with_format("torch")
    raw.info.description = "some words"
    assert set(data_module.describe(raw)) == {"fingerprint"}
