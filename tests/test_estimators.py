"""Estimators, evaluation, saving and editing: answers known on paper, invariances, resuming, and errors."""

import copy
import functools
import importlib.metadata
import inspect
import json
import math

import datasets
import numpy as np
import pytest
import torch
from conftest import DEMO, build_net, same_state, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hf_coar as coar
from hf_coar import api, masking, models
from hf_coar.errors import (
    CoarError,
    DataError,
    ModelError,
    ModelMismatchError,
    NonFiniteOutputError,
    RunMismatchError,
)
from hf_coar.estimators import Size
from hf_coar.judging import evaluation
from hf_coar.runs import fidelity, sampling

METHODS = {
    "path_gradient": coar.PathGradient(rounds=4),
    "regression": coar.Regression(n_masks=60, solver=coar.Ridge(strength=1.0)),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def batches(inputs, labels, size=8):
    """A list of batches."""
    return [{"inputs": inputs[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(inputs), size)]


def pixels(n_examples=24, seed=0):
    """Random images for the convolutional network, and labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_examples, 2, 5, 5, generator=generator)
    return inputs, torch.randint(0, 3, (n_examples,), generator=generator)


def attribute(model, data, method, **options):
    options = {"ablated_fraction": 0.1, "progress": False, **options}
    return coar.attribute(model, data, method=method, **options)


@functools.cache
def attributed(name):
    """The images in batches of 8, by one of `METHODS`; made once, to be compared with."""
    return attribute(build_net("convnet").model, batches(*pixels()), METHODS[name])


def far(a, b):
    return float((a - b).detach().abs().max())


class Stream:
    """Batches, of which the first `k` arrive before the stream breaks."""

    def __init__(self, items, k, error=RuntimeError):
        self.items, self.k, self.error = items, k, error

    def __iter__(self):
        # Ctrl-C while the data are only looked at has nothing to lose.
        if self.error is KeyboardInterrupt and all(frame.function != "do_own" for frame in inspect.stack()):
            yield from self.items
            return
        yield from self.items[: self.k]
        raise self.error("the stream broke")


LOOKS = 60  # forward passes of one example before the first pass of a run, at most


def count_forwards(model):
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    return calls


# ---------------------------------------------------------------------------------------------- answers known on paper


class OnPaper(nn.Module):
    """h = relu(2x, -3x, x), y = h1 + 5 h2 - 4 h3; the logits are (y, 0).

    At x = 1: h = (2, 0, 1), y = -2. Ablating h1 takes 2 away, h2 nothing, h3 gives 4 back; no two of them interact, so
    that the attributions of the logit y are exactly (2, 0, -4), and the bias is 0. At x = -1: h = (0, 3, 0), y = 15.
    """

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 3, bias=False)
        self.hidden.weight.data = torch.tensor([[2.0], [-3.0], [1.0]])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.hidden(x)) @ torch.tensor([1.0, 5.0, -4.0])
        return torch.stack([y, torch.zeros_like(y)], dim=1)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("method", [coar.PathGradient(2), coar.Regression(400, coar.Ridge(0.0))], ids=lambda m: m.name)
def test_a_network_on_paper(method, fraction):
    data = batches(torch.tensor([[1.0], [-1.0], [0.5]]), torch.zeros(3, dtype=torch.long))
    found = attribute(OnPaper(), data, method, output="logit", ablated_fraction=fraction)
    assert torch.allclose(found.weights, torch.tensor([[2.0, 0, -4], [0, 15, 0], [1, 0, -2]]), atol=1e-4)
    if fraction <= 0.1 or method.name == "regression":  # see test_both_estimators_are_exact_on_a_linear_net
        assert found.bias.abs().max() < 1e-4
        assert torch.allclose(found.predict([True, False, False])[0], torch.tensor([2.0, 0, 1]), atol=1e-4)


def test_the_sign_of_the_output():
    data = batches(torch.tensor([[1.0]]), torch.tensor([1]))
    found = attribute(OnPaper(), data, coar.PathGradient(2), output="margin")
    assert torch.allclose(found.weights, torch.tensor([[-2.0, 0, 4]]), atol=1e-5)  # logit 1 minus logit 0


class Chains(nn.Module):
    """60 products of two units: y = sum of a_k b_k, all equal to 1. Components are the 60 a's and the 60 b's.

    With each component ablated with probability p, E[y | a_k] - E[y | not a_k] = E[b_k] = 1 - p, for every component.
    """

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1, 60, bias=False)
        self.b = nn.Linear(60, 60, bias=False)
        self.a.weight.data = torch.ones(60, 1)
        self.b.weight.data = torch.eye(60)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)).sum(1)
        return torch.stack([y, torch.zeros_like(y)], dim=1)


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize(
    "method",
    [coar.PathGradient(16, n_flips=0, check_masks=0), coar.Regression(1200, coar.Ridge(0.0))],
    ids=lambda m: m.name,
)
def test_interactions_on_paper(method, fraction):
    n_examples = 8 if method.name == "path_gradient" else 1
    data = batches(torch.ones(n_examples, 1), torch.zeros(n_examples, dtype=torch.long))
    found = attribute(Chains(), data, method, output="logit", ablated_fraction=fraction)
    assert float(found.weights.mean()) == pytest.approx(1 - fraction, abs=0.02)
    # E[y] = 60 (1 - p)^2 and so the bias is 60 (1 - p)^2 - 120 (1 - p)^2.
    assert float(found.bias.mean()) == pytest.approx(-60 * (1 - fraction) ** 2, abs=2.5)


class LinearNet(nn.Module):
    """Linear in the units of `first`: logit c is b2_c + sum_i W2_ci (gate_i W1_i · x + b1_i)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.fixture
def linear():
    """The net, its components, data, and the exact weights and biases of the correct logit."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = LinearNet()
    x, y = torch.randn(10, 5, generator=generator), torch.randint(0, 3, (10,), generator=generator)
    out = model.second.weight.detach()[y]
    weights = out * (x @ model.first.weight.detach().T)
    bias = model.second.bias.detach()[y] + out @ model.first.bias.detach()
    return model, coar.find_components(model, include=["first"]), batches(x, y, 4), weights, bias


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.11, 0.2, 0.3])
@pytest.mark.parametrize(
    "method",
    [coar.PathGradient(2), coar.Regression(600), coar.Regression(600, coar.Ridge(0.0))],
    ids=["path_gradient", "regression", "least_squares"],
)
def test_both_estimators_are_exact_on_a_linear_net(linear, method, fraction):
    # above a fraction of 0.1 PathGradient's bias takes the fraction that should be off on average for the one that
    # was, so that the luck of the background ends up in the bias (the weights are exact). Subtracting weights times the
    # gates really drawn in every pass, sum_i w_i g_i, would be exact.
    model, components, data, weights, bias = linear
    found = attribute(model, data, method, components=components, output="logit", ablated_fraction=fraction)
    assert far(found.weights, weights) < 1e-4
    assert far(found.bias, bias) < 1e-4
    if found.standard_errors is not None:
        assert found.standard_errors.max() < 1e-3


# -------------------------------------------------------------------------------------------------- fidelity elsewhere


@pytest.mark.parametrize("fraction", [0.1, 0.3])
@pytest.mark.parametrize("method", [coar.PathGradient(16), coar.Regression(300)], ids=lambda m: m.name)
def test_held_out_masks_of_the_conv_net_are_predicted(convnet, method, fraction):
    data = batches(*pixels(), 24)
    found = attribute(convnet.model, data, method, ablated_fraction=fraction)
    report = coar.evaluate(found, convnet.model, data, fractions=(fraction,), n_masks=60, progress=False)
    assert report.correlation[fraction] > 0.7
    assert report.slope[fraction] == pytest.approx(1, abs=0.35)


def test_held_out_masks_of_the_demo_are_predicted(demo_pair, demo_attributions):
    model, data = demo_pair
    report = coar.evaluate(demo_attributions, model, data, fractions=(0.05,), n_masks=30, progress=False)
    assert report.correlation[0.05] > 0.5
    shuffled = copy.copy(demo_attributions.weights).flip(1)
    wrong = coar.Attributions(shuffled, demo_attributions.bias, None, *_rest(demo_attributions))
    assert coar.evaluate(wrong, model, data, fractions=(0.05,), n_masks=30, progress=False).correlation[0.05] < 0.3


def _rest(attributions):
    return attributions.components, attributions.identity, attributions.config


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "transformer_batch_first")]


@pytest.mark.parametrize("name", ["gpt2", "timm_vit", "cross_attention", *SLOW])
def test_both_estimators_agree_on_transformers(name):
    net = build_net(name)
    found = []
    components = coar.find_components(net.model, "module")
    for method in (coar.PathGradient(40, check_masks=0), coar.Regression(300, coar.Ridge(0.0))):
        options = {"components": components, "output": net.output, "ablated_fraction": 0.1}
        found.append(attribute(net.model, [net.batch], method, **options))
    correlation = np.corrcoef(found[0].weights.flatten(), found[1].weights.flatten())[0, 1]
    assert correlation > 0.85


def test_standard_errors_tell_how_far_two_seeds_differ(convnet):
    data = batches(*pixels(), 24)
    one, two = (attribute(convnet.model, data, coar.PathGradient(16), seed=seed) for seed in (0, 1))
    z = (one.weights - two.weights) / (one.standard_errors.square() + two.standard_errors.square()).sqrt()
    z = z[z.isfinite()]
    assert len(z) > 100
    # Antithetic pairs of rounds make the true error somewhat smaller than the spread over the rounds says.
    assert 0.3 < float(z.square().mean().sqrt()) < 1.3


def test_modules_that_never_run_get_exactly_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model = Unused()
    data = batches(torch.randn(6, 4), torch.arange(6) % 3)
    found = attribute(model, data, coar.PathGradient(2))
    assert (found.weights[:, 3:] == 0).all() and (found.standard_errors[:, 3:] == 0).all()
    assert (found.weights[:, :3].abs().sum(1) > 0).all()


# -------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("size", [1, 3, 24])
def test_batch_size_moves_nothing_but_rounding(convnet, method, size):
    inputs, labels = pixels()
    expected = attributed(method.name)
    found = attribute(convnet.model, batches(inputs, labels, size), method)
    assert far(found.weights, expected.weights) < 1e-4
    assert far(found.bias, expected.bias) < 1e-4
    assert torch.equal(found.labels, labels)


def test_data_of_every_kind(convnet, method):
    inputs, labels = pixels()
    expected = attributed(method.name)
    table = datasets.Dataset.from_dict({"inputs": inputs.tolist(), "labels": labels.tolist()}).with_format("torch")
    kinds = {
        "loader of pairs": (DataLoader(TensorDataset(inputs, labels), batch_size=8), {}),
        "list of pairs": ([(b["inputs"], b["labels"]) for b in batches(inputs, labels, 8)], {}),
        "data set": (table, {"batch_size": 8}),
        "label for labels": ([{"x": b["inputs"], "label": b["labels"]} for b in batches(inputs, labels, 8)], {}),
    }
    for kind, (data, options) in kinds.items():
        found = attribute(convnet.model, data, method, **options)
        assert far(found.weights, expected.weights) < 1e-4, kind
        assert torch.equal(found.labels, labels), kind


def test_data_that_stream(convnet, method):
    # Once: `Examples` has a `__len__` that raises TypeError for a stream, and `pipeline._tell_cost` takes its presence
    # for a length: no IterableDataset works, nor does coar.load(…, streaming=True).
    inputs, labels = pixels()
    table = datasets.Dataset.from_dict({"inputs": inputs.tolist(), "labels": labels.tolist()})
    stream = table.to_iterable_dataset().with_format("torch")
    found = attribute(convnet.model, stream, method, batch_size=8)
    assert far(found.weights, attributed(method.name).weights) < 1e-4


def test_the_demo_as_a_stream(demo_pair, demo_attributions):
    model, stream = coar.load(
        DEMO / "model", data=DEMO / "images.parquet", split="train[:12]", batch_size=12, streaming=True
    )
    assert torch.equal(next(iter(stream))["pixel_values"], next(iter(demo_pair[1]))["pixel_values"])
    # Once wrong: as above.
    found = coar.attribute(model, stream, method=coar.PathGradient(rounds=4), progress=False)
    assert torch.equal(found.weights, demo_attributions.weights)


def test_the_batch_size_argument(convnet):
    inputs, labels = pixels()
    table = datasets.Dataset.from_dict({"inputs": inputs.tolist(), "labels": labels.tolist()}).with_format("torch")
    calls = count_forwards(convnet.model)
    attribute(convnet.model, table, coar.PathGradient(2), batch_size=7)
    assert {7, 3} <= set(calls) <= {7, *range(1, 5)}, "a few examples are looked at first"


def test_a_described_data_set_and_its_fingerprint(convnet):
    # The `description` of a raw data set is a text.
    inputs, labels = pixels(4)
    table = datasets.Dataset.from_dict({"inputs": inputs.tolist(), "labels": labels.tolist()}).with_format("torch")
    found = attribute(convnet.model, table, coar.PathGradient(2))
    assert found.config["data"].get("fingerprint") == table._fingerprint
    table.info.description = "Made by hand."
    attribute(convnet.model, table, coar.PathGradient(2))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(convnet, method):
    data = batches(*pixels())
    one = attributed(method.name)
    again, other = (attribute(convnet.model, data, method, seed=seed) for seed in (0, 1))
    assert torch.equal(one.weights, again.weights) and torch.equal(one.bias, again.bias)
    assert far(one.weights, other.weights) > 1e-3


def test_torchs_own_seed_plays_no_part(convnet, method):
    data = batches(*pixels(), 24)
    torch.manual_seed(1)
    one = attribute(convnet.model, data, method)
    torch.manual_seed(2)
    assert torch.equal(attribute(convnet.model, data, method).weights, one.weights)


def test_examples_do_not_influence_each_other(convnet):
    inputs, labels = pixels()
    whole = attributed("regression")
    part = attribute(convnet.model, batches(inputs[:5], labels[:5]), METHODS["regression"])
    assert far(part.weights, whole.weights[:5]) < 1e-4


class Branching(nn.Module):
    """Its second layer runs only if some example of the batch has a positive first feature."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        positive = x[:, :1] > 0
        return y + positive * self.sometimes(x) if positive.any() else y


def test_modules_that_run_for_some_batches_only(method):
    # Once: which modules run is found out once, on the first batch; a module that this one does not need counts as dead
    # for all, so that its attributions depend on the batch size (and on where a run was resumed).
    torch.manual_seed(0)
    model, inputs, labels = Branching(), torch.randn(8, 4), torch.arange(8) % 3
    inputs[:, 0] = torch.tensor([-1.0] * 4 + [1.0] * 4)
    together = attribute(model, batches(inputs, labels, 8), method)
    assert together.weights[4:, 3:].abs().sum() > 0.1
    apart = attribute(model, batches(inputs, labels, 4), method)
    assert far(apart.weights, together.weights) < 1e-4


def test_the_model_is_left_as_it_was(net, method):
    module = [m for m in net.model.modules() if isinstance(m, nn.Linear)][-1]
    net.model.train()
    module.eval()
    module.weight.requires_grad_(False)
    before = state_of(net.model)
    components = coar.find_components(net.model, "module")
    if net.name == "transformer_positions_first" and method.name == "path_gradient":
        pytest.skip("see test_masking.test_positions_before_examples")
    method = coar.PathGradient(rounds=2) if method.name == "path_gradient" else coar.Regression(n_masks=20)
    attribute(net.model, [net.batch], method, components=components, output=net.output)
    assert same_state(net.model, before)
    with pytest.raises(RuntimeError, match="broke"):
        attribute(net.model, Stream([net.batch], 1), method, components=components, output=net.output)
    assert same_state(net.model, before)


def test_the_model_is_evaluated_not_trained(convnet, method):
    data = batches(*pixels())
    convnet.model.train()
    assert torch.equal(attribute(convnet.model, data, method).weights, attributed(method.name).weights)


def test_the_callers_no_grad_does_not_matter(convnet):
    data = batches(*pixels(), 24)
    expected = attribute(convnet.model, data, coar.PathGradient(2))
    with torch.no_grad():
        assert torch.equal(attribute(convnet.model, data, coar.PathGradient(2)).weights, expected.weights)


def test_a_language_model_with_padding(gpt2, method):
    """An example's attributions do not depend on how far it was padded."""
    components = coar.find_components(gpt2.model, "module")
    options = {"components": components, "output": "token_margin"}
    longer = {name: value[1:2] for name, value in gpt2.batch.items()}  # 5 tokens and 2 of padding
    shorter = {name: value[:, :5] for name, value in longer.items()}
    one, two = (attribute(gpt2.model, [batch], method, **options) for batch in (longer, shorter))
    assert far(one.weights, two.weights) < 1e-4


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Name of a method -> (folder of a run of three batches, passes of its rounds, passes before the first of them)."""

    @functools.cache
    def run(name):
        folder, model, method = tmp_path_factory.mktemp("undisturbed"), build_net("convnet").model, METHODS[name]
        data = batches(*pixels(), 8)
        calls = count_forwards(model)
        attribute(model, data, method, out=folder)
        whole = len(calls)
        calls.clear()
        attribute(model, data, method, out=folder)
        looks = len(calls)
        return folder, whole - looks - later(method), looks

    return run


def later(method):
    """Passes that measure single effects, far reads and checks, when all rounds are done."""
    return 3 * (9 + 4 + 20) if method.name == "path_gradient" else 0


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_ends_with_the_same_bytes(convnet, method, tmp_path, k, error, undisturbed):
    data = batches(*pixels(), 8)
    folder, rounds, looks = undisturbed(method.name)
    with pytest.raises(error):
        attribute(convnet.model, Stream(data, k, error), method, out=tmp_path)
    assert not (tmp_path / "attributions.safetensors").exists()
    calls = count_forwards(convnet.model)
    attribute(convnet.model, data, method, out=tmp_path)
    for name in ("attributions.safetensors", "config.json", "components.json", "run.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert len(calls) - looks <= rounds * (3 - k) / 3 + 2 + later(method), "what was done is not done again"


def test_a_finished_run_is_not_run_again(convnet, method, tmp_path):
    data = batches(*pixels())
    first = attribute(convnet.model, data, method, out=tmp_path)
    calls = count_forwards(convnet.model)
    again = attribute(convnet.model, data, method, out=tmp_path)
    assert sum(calls) <= LOOKS, "a few examples are looked at, and no pass is made"
    assert torch.equal(first.weights, again.weights)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_resuming_with_another_batch_size(convnet, method, tmp_path, size):
    inputs, labels = pixels()
    with pytest.raises(RuntimeError):
        attribute(convnet.model, Stream(batches(inputs, labels, 8), 1), method, out=tmp_path)
    found = attribute(convnet.model, batches(inputs, labels, size), method, out=tmp_path)
    assert far(found.weights, attributed(method.name).weights) < 1e-4


def test_a_damaged_shard_is_computed_again(convnet, method, tmp_path):
    data = batches(*pixels(), 24)
    expected = attribute(convnet.model, data, method, out=tmp_path)
    shard = sorted((tmp_path / "shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert torch.equal(attribute(convnet.model, data, method, out=tmp_path).weights, expected.weights)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"ablated_fraction": 0.2}, r"ablated_fraction was 0\.1, now 0\.2"),
        ({"output": "logit"}, "output was 'margin', now 'logit'"),
        ({"method": coar.PathGradient(6)}, r"method\.rounds was 4, now 6"),
        ({"method": coar.Regression(10)}, r"method\.name was 'path_gradient', now 'regression'"),
    ],
)
def test_resuming_with_other_settings_names_them(convnet, tmp_path, options, key):
    data = batches(*pixels(4))
    attribute(convnet.model, data, METHODS["path_gradient"], out=tmp_path)
    with pytest.raises(RunMismatchError, match=key):
        attribute(convnet.model, data, **{"method": METHODS["path_gradient"], **options}, out=tmp_path)


def test_resuming_with_another_model_or_other_components(convnet, tmp_path, method):
    data = batches(*pixels(4))
    attribute(convnet.model, data, method, out=tmp_path)
    with pytest.raises(RunMismatchError, match="components"):
        components = coar.find_components(convnet.model, include=["conv1"])
        attribute(convnet.model, data, method, components=components, out=tmp_path)
    with torch.no_grad():
        convnet.model.bn1.running_mean[0] += 1e-3
    with pytest.raises(RunMismatchError, match=r"model\.fingerprint"):
        attribute(convnet.model, data, method, out=tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_other_data(convnet, tmp_path, method, finished):
    # A list of as many other examples must not be given the old list's attributions.
    inputs, labels = pixels(16)
    data = batches(inputs, labels)
    if finished:
        attribute(convnet.model, data, method, out=tmp_path)
    else:
        with pytest.raises(RuntimeError):
            attribute(convnet.model, Stream(data, 1), method, out=tmp_path)
    with pytest.raises(CoarError):
        attribute(convnet.model, batches(inputs.flip(0), labels), method, out=tmp_path)


# -------------------------------------------------------------------------------------------------------------- errors


def test_nan_says_which_example_and_mask_and_keeps_what_was_done(convnet, tmp_path):
    inputs, labels = pixels(8)
    labels[5] = 2
    labels[[0, 1, 2, 3, 4, 6, 7]] = 0

    def broken(logits, batch):
        return torch.where(batch["labels"] == 2, float("nan"), logits[:, 0])

    def whole(logits, batch):
        return logits[:, 0]

    broken.__qualname__ = whole.__qualname__ = "first_logit"
    for number, (method, where) in enumerate(
        [(coar.Regression(10), "mask 0 .*0.1 ablated"), (coar.PathGradient(2), "round 0, pass 0")]
    ):
        out = tmp_path / str(number)
        with pytest.raises(NonFiniteOutputError, match=f"'first_logit' of example 5 is nan under {where}"):
            attribute(convnet.model, batches(inputs, labels, 2), method, output=broken, out=out)
        stops = {int(path.stem.rpartition("-")[2]) for path in (out / "shards").iterdir()}
        assert max(stops) == 4, "the shards of examples 0 to 3"
        found = attribute(convnet.model, batches(inputs, labels, 2), method, output=whole, out=out)
        expected = attribute(convnet.model, batches(inputs, labels, 2), method, output=whole)
        assert torch.equal(found.weights, expected.weights)


def test_infinity_is_an_error(convnet, method):
    with pytest.raises(NonFiniteOutputError, match="example 0 is inf"):
        attribute(convnet.model, batches(*pixels(4)), method, output=lambda logits, batch: logits[:, 0] + math.inf)


class ReadsAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.hidden = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.hidden.weight.T


def test_weights_that_are_read_without_their_module():
    torch.manual_seed(0)
    model, data = ReadsAWeight(), batches(torch.randn(4, 4), torch.arange(4) % 3)
    by_gradients = attribute(model, data, coar.PathGradient(2))
    assert by_gradients.weights[:, 5:].abs().max() > 0.1
    found = attribute(model, data, coar.Regression(200, coar.Ridge(0.0)))
    assert found.weights[:, 5:].abs().max() > 0.1


def test_a_forward_without_gradient():
    class NoGradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden(x).detach()

    with pytest.raises(ModelError, match=r"NoGradient.*Regression"):
        attribute(NoGradient(), batches(torch.randn(4, 4), torch.arange(4) % 3), coar.PathGradient(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ((x for x in []), "generator.*again"),
        ([torch.zeros(2, 6)], "Tensor"),
        ([{"inputs": torch.zeros(2, 6), "labels": torch.zeros(3)}], "first axis"),
        ([{"inputs": torch.zeros(0, 6), "labels": torch.zeros(0)}], "at least one"),
        ([{"inputs": "text"}], "inputs"),
        ([{"inputs": torch.zeros(2, 6)}], "labels"),
        ([{"inputs": torch.zeros(2, 6), "labels": torch.tensor([0, 3])}], "3 classes"),
        (3, "int"),
    ],
)
def test_data_that_cannot_be_used(mlp, method, data, message):
    with pytest.raises(DataError, match=message):
        attribute(mlp.model, data, method)


@pytest.mark.parametrize(
    "make",
    [
        lambda: coar.PathGradient(3),
        lambda: coar.PathGradient(1),
        lambda: coar.PathGradient(2.0),
        lambda: coar.Regression(2),
        lambda: coar.Regression(10.0),
        lambda: coar.Regression(True),
    ],
)
def test_estimators_that_make_no_sense(make):
    with pytest.raises(CoarError, match=r"PathGradient|Regression"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ablated_fraction": 0.0}, "ablated_fraction"), ({"seed": -1}, "seed=-1"), ({"output": "margins"}, "margins")],
)
def test_arguments_that_make_no_sense(mlp, options, message, tmp_path):
    with pytest.raises(CoarError, match=message):
        attribute(mlp.model, [mlp.batch], METHODS["path_gradient"], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_another_models_components(mlp, convnet, method):
    with pytest.raises(ModelMismatchError):
        attribute(mlp.model, [mlp.batch], method, components=coar.find_components(convnet.model))


def test_regression_says_when_masks_do_not_fit_into_memory(mlp):
    with pytest.raises(CoarError, match=r"GiB.*PathGradient"):
        attribute(mlp.model, [mlp.batch], coar.Regression(10**10))


def test_costs_are_the_forward_passes(convnet):
    calls = count_forwards(convnet.model)
    data = batches(*pixels(4))

    def spent(method):
        calls.clear()
        found = attribute(convnet.model, data, method, ablated_fraction=0.05)
        return found.config["cost"], len(calls)

    bare = {"n_flips": 0, "check_masks": 0}
    # What is looked at before the first pass is the same for all sizes of a method.
    (few, first), (more, second) = spent(coar.Regression(10)), spent(coar.Regression(17))
    assert (few, more) == (10, 17) and second - first == 7
    (few, first), (more, second) = spent(coar.PathGradient(2, **bare)), spent(coar.PathGradient(4, **bare))
    assert (few, more) == (3 * 20 + 1, 3 * 40 + 1), "and one pass looks for outliers"
    assert second - first == 20
    cost, calls_of_all = spent(coar.PathGradient(4, n_flips=3, check_masks=5))
    far = 3 * 3 + 1  # with a look for outliers
    assert cost == more + 3 + 1 + 5 + far and calls_of_all - second == 3 + 1 + 5 + 3 + 1
    assert coar.PathGradient(2, **bare).cost(Size(9, 0.25)) == 3 * 2 * 4
    assert coar.PathGradient(2, **bare).cost(Size(9, 0.1)) == 3 * 2 * 5
    assert coar.PathGradient(2).cost(Size(900, 0.1)) == 3 * 2 * 5 + 31 + 20 + 10


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def judged(convnet):
    """A model, its data and its attributions."""
    data = batches(*pixels())
    return convnet.model, data, copy.deepcopy(attributed("path_gradient"))


def test_evaluation_of_a_linear_net(linear):
    model, components, data, _, _ = linear
    found = attribute(model, data, coar.PathGradient(2), components=components, output="logit")
    report = coar.evaluate(found, model, data, fractions=(0.05, 0.3), n_masks=80, progress=False)
    for fraction in (0.05, 0.3):
        assert report.correlation[fraction] == pytest.approx(1, abs=1e-3)
        assert report.slope[fraction] == pytest.approx(1, abs=1e-3)
        assert far(report.predicted[fraction], report.measured[fraction]) < 1e-3
    half = coar.Attributions(found.weights / 2, found.bias, None, *_rest(found))
    assert coar.evaluate(half, model, data, fractions=(0.3,), n_masks=80, progress=False).slope[0.3] == pytest.approx(
        2, abs=1e-2
    )


def test_the_figures_of_a_report(judged):
    model, data, found = judged
    report = coar.evaluate(found, model, data, fractions=(0.1, 0.2), n_masks=40, seed=7, progress=False)
    for fraction in (0.1, 0.2):
        predicted, measured = report.predicted[fraction].numpy(), report.measured[fraction].numpy()
        assert predicted.shape == measured.shape == (40, 24)
        assert report.per_example[fraction].shape == (24,)
        by_hand = [np.corrcoef(predicted[:, e], measured[:, e])[0, 1] for e in range(24)]
        assert np.allclose(report.per_example[fraction], by_hand, atol=1e-4)
        assert report.correlation[fraction] == pytest.approx(np.mean(by_hand), abs=1e-4)
        low, high = report.interval[fraction]
        assert low < report.correlation[fraction] < high
        assert high - low > 0.9 * 2 * 1.96 * np.std(by_hand) / 24**0.5, "other masks move it as well"
        p, m = predicted - predicted.mean(0), measured - measured.mean(0)
        assert report.slope[fraction] == pytest.approx((p * m).sum() / (p * p).sum(), rel=1e-4)
    assert report.n_masks == 40 and report.seed == 7
    assert [entry["ablated_fraction"] for entry in report.to_json()["fractions"]] == [0.1, 0.2]
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert "10.00%" in str(report) and "20.00%" in str(report)


def test_what_is_measured_is_the_ablated_model(judged):
    model, data, found = judged
    report = coar.evaluate(found, model, data, fractions=(0.3,), n_masks=5, seed=2, progress=False)
    masks = sampling.Masks(len(found.components), 0.3, 5, 2, sampling.EVALUATION).rows(0, 5)
    for index, kept in enumerate(masks):
        ablated = copy.deepcopy(model)
        masking.MaskedModel(ablated, found.components).ablate_for_good(kept)
        values = [coar.outputs.get("margin")(ablated(b["inputs"]), b) for b in data]
        assert far(report.measured[0.3][index], torch.cat(values)) < 1e-5
        assert far(report.predicted[0.3][index], found.predict(kept)[0]) < 1e-4


def test_evaluation_does_not_depend_on_the_batch_size(judged):
    model, _, found = judged
    inputs, labels = pixels()
    one, two = (
        coar.evaluate(found, model, batches(inputs, labels, size), fractions=(0.1,), n_masks=20, progress=False)
        for size in (8, 5)
    )
    assert far(one.measured[0.1], two.measured[0.1]) < 1e-5
    assert one.correlation[0.1] == pytest.approx(two.correlation[0.1], abs=1e-4)


def test_evaluation_resumes(judged, tmp_path):
    model, data, found = judged
    options = {"fractions": (0.1,), "n_masks": 20, "out": tmp_path, "progress": False}
    with pytest.raises(RuntimeError):
        coar.evaluate(found, model, Stream(data, 2), **options)
    calls = count_forwards(model)
    resumed = coar.evaluate(found, model, data, **options)
    assert calls == [2, 1, 1, 8, *20 * [8]], "two examples are tried, eight known again, and one batch is run"
    assert torch.equal(
        resumed.measured[0.1],
        coar.evaluate(found, model, data, fractions=(0.1,), n_masks=20, progress=False).measured[0.1],
    )
    with pytest.raises(RunMismatchError, match="n_masks"):
        coar.evaluate(found, model, data, **{**options, "n_masks": 30})


def test_an_example_that_does_not_vary_is_left_out():
    values = fidelity.correlation(torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 9.0]]), torch.tensor([[2.0, 1.0]] * 3))
    assert values.isnan().all()
    predicted = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    measured = predicted + predicted.roll(1, 0)
    measured[:, 1] = 2.0
    low, high = evaluation.bootstrap_interval(predicted, measured, seed=0)
    assert low < float(fidelity.correlation(predicted, measured).nanmean()) < high
    alone = evaluation.bootstrap_interval(predicted[:, [0, 2]], measured[:, [0, 2]], seed=0)
    assert alone == pytest.approx((low, high), abs=0.06)
    assert all(math.isnan(x) for x in evaluation.bootstrap_interval(predicted, torch.ones(30, 3), seed=0))


def test_evaluation_refuses(judged):
    model, data, found = judged
    inputs, labels = pixels()

    def refused(error, message, **changes):
        arguments = {"attributions": found, "model": model, "data": data, "n_masks": 5, "progress": False, **changes}
        with pytest.raises(error, match=message):
            coar.evaluate(**arguments)

    refused(CoarError, "seed=-3", seed=-3)
    refused(CoarError, "n_masks=2", n_masks=2)
    refused(CoarError, "ablated_fraction=1", fractions=(0.1, 1.0))
    refused(CoarError, "empty", fractions=())
    refused(DataError, "8 of 8.*example 0", data=batches(inputs.flip(0), labels.flip(0)))
    refused(DataError, r"1 of 8.*example 23", data=batches(torch.cat([inputs[:23], inputs[:1]]), labels))
    refused(DataError, "hold 23 examples.* 24", data=batches(inputs[:23], labels[:23]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv1.weight[0, 0, 0, 0] += 1e-4
    refused(ModelMismatchError, found.config["model"]["fingerprint"][:12], model=other)
    refused(ModelMismatchError, "weights", model=build_net("mlp").model)


# -------------------------------------------------------------------------------------------------------- attributions


def test_linear_predictions_by_hand(judged):
    model, batches, _ = judged
    found = attribute(model, batches, coar.PathGradient(2, n_flips=0, check_masks=0))
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(3, len(found.components), generator=generator) > 0.5
    by_hand = [[float(found.bias[e] + found.weights[e][kept[m]].sum()) for e in range(len(found))] for m in range(3)]
    assert far(found.predict(kept), torch.tensor(by_hand)) < 1e-4
    assert found.predict(kept[0]).shape == (1, 24)
    assert far(found.predict(kept.float() * 0.5)[0] - found.bias, found.weights @ kept[0].float() / 2) < 1e-4
    with pytest.raises(CoarError, match=r"\[4\]"):
        found.predict(torch.ones(4))
    with pytest.raises(CoarError, match="fit together"):
        coar.Attributions(found.weights[:, 1:], found.bias, None, *_rest(found))


def test_round_trip_bit_for_bit(convnet, method, tmp_path):
    found = attributed(method.name)
    found.save_pretrained(tmp_path / "a")
    again = coar.Attributions.from_pretrained(tmp_path / "a")
    assert torch.equal(again.weights, found.weights) and torch.equal(again.bias, found.bias)
    assert (again.standard_errors is None) == (found.standard_errors is None)
    assert found.standard_errors is None or torch.equal(again.standard_errors, found.standard_errors)
    assert torch.equal(again.labels, found.labels)
    assert all(torch.equal(value, again.identity.hashes[name]) for name, value in found.identity.hashes.items())
    assert again.components == found.components and again.config == found.config
    again.save_pretrained(tmp_path / "b")
    for name in ("attributions.safetensors", "config.json", "components.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    coar.evaluate(again, convnet.model, batches(*pixels()), fractions=(0.1,), n_masks=3, progress=False)


def test_the_configuration_says_what_determines_the_numbers(judged):
    model, _, found = judged
    config = found.config
    assert config["model"]["fingerprint"] == models.fingerprint(model)
    assert config["output"] == "margin"
    assert config["method"]["name"] == "path_gradient" and config["method"]["rounds"] == 4
    assert config["ablated_fraction"] == 0.1 and config["seed"] == 0
    assert config["n_components"] == len(found.components) and "torch" in config["versions"]


def test_a_library_that_no_installer_knows_does_not_cost_a_run(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    own, of_torch = (".".join(one.__version__.split("+")[0].split(".")[:2]) for one in (coar, torch))
    assert api._versions() | {"timm": "", "transformers": ""} == {
        "hf_coar": own, "torch": of_torch, "timm": "", "transformers": "",
    }  # fmt: skip


def test_a_card_that_somebody_wrote_is_kept(judged, tmp_path):
    _, _, found = judged
    found.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("Mine.")
    found.save_pretrained(tmp_path / "old")
    assert (tmp_path / "old" / "README.md").read_text() == "Mine."
    found.save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.startswith("---") and "hf_coar" in card and "margin" in card and "$" not in card


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attributions.safetensors", lambda b: b[: len(b) // 2]),
        ("attributions.safetensors", lambda b: b""),
        ("attributions.safetensors", lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]),
        ("attributions.safetensors", lambda b: b"\x80\x04K\x01."),
        ("config.json", lambda b: b[:-10]),
        ("config.json", lambda b: b"[]"),
        ("config.json", lambda b: b"null"),
        ("config.json", lambda b: b'{"architectures": ["GPT2LMHeadModel"]}'),
        ("config.json", lambda b: b.replace(b'"hf_coar_format": 2', b'"hf_coar_format": 99')),
        ("components.json", lambda b: b"{}"),
        ("components.json", lambda b: b"\xff"),
        ("components.json", lambda b: b.replace(b'"size": 6', b'"size": 7')),
    ],
)
def test_damaged_files_are_errors(judged, tmp_path, name, change):
    judged[2].save_pretrained(tmp_path)
    before = (tmp_path / name).read_bytes()
    damage(tmp_path, name, change)
    assert (tmp_path / name).read_bytes() != before
    with pytest.raises(CoarError):
        coar.Attributions.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["weights", "bias", "hash:labels", "labels"])
def test_tensors_that_are_missing_are_errors(judged, tmp_path, lost):
    from safetensors import safe_open
    from safetensors.torch import save_file

    judged[2].save_pretrained(tmp_path)
    path = tmp_path / "attributions.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name).clone() for name in names if name != lost}
    assert lost in names
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CoarError):
        coar.Attributions.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", ["bias", "standard_errors", "hash:inputs", "labels"])
def test_tensors_that_do_not_fit_together(judged, wrong):
    found = judged[2]
    parts = {"bias": found.bias, "standard_errors": found.standard_errors, **found.identity.columns()}
    parts[wrong] = parts[wrong][:5].clone()
    with pytest.raises(CoarError):
        identity = type(found.identity).of(parts)
        coar.Attributions(
            found.weights, parts["bias"], parts["standard_errors"], found.components, identity, found.config
        )


def test_folders_that_hold_no_attributions(tmp_path):
    with pytest.raises(CoarError, match="lacks"):
        coar.Attributions.from_pretrained(tmp_path)
    with pytest.raises(CoarError, match="nobody/nothing"):
        coar.Attributions.from_pretrained("nobody/nothing")
    with pytest.raises(CoarError):
        coar.Attributions.from_pretrained(tmp_path / "absent")
