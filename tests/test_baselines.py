"""Baselines: answers known on paper, laws over the registry, and the definitions checked by other means."""

import pytest
import torch
from conftest import build_net, same_state, state_of
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import masking, models
from hf_coar.errors import CoarError
from hf_coar.estimators import ESTIMATORS, Size, baselines, input_paths

LEAST = {"neuron_conductance": {"n_steps": 4}, "internal_influence": {"n_steps": 4}}


def make(name):
    return ESTIMATORS[name](**LEAST.get(name, {}))


BASELINES = [name for name, one in ESTIMATORS.items() if one.__module__ == baselines.__name__]


@pytest.fixture(params=BASELINES)
def name(request):
    return request.param


def attribute(model, data, method, **options):
    options = {"ablated_fraction": 0.1, "progress": False, **options}
    return coar.attribute(model, data, method=method, **options)


# ---------------------------------------------------------------------------------------------- answers known on paper


class OnPaper(nn.Module):
    """h = (2x, -3x, x) + (0, 0, 1), y = relu(h) · (1, 5, -4); the logits are (y, 0).

    At x = 1: h = (2, -3, 2), relu(h) = (2, 0, 2), y = 2 - 8 = -6. Ablated, h3 is its bias 1. A gate on h3 scales x and
    leaves the bias. On the path t x: h = (2t, -3t, t + 1).
    """

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 3)
        self.hidden.weight.data = torch.tensor([[2.0], [-3.0], [1.0]])
        self.hidden.bias.data = torch.tensor([0.0, 0.0, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.hidden(x)) @ torch.tensor([1.0, 5.0, -4.0])
        return torch.stack([y, torch.zeros_like(y)], dim=1)


ON_PAPER = {
    "leave_one_out": [2.0, 0.0, -4.0],  # without h3, y = 2 - 4
    "gradient_times_parameter": [2.0, 0.0, -4.0],  # ∂y/∂W · W: 1 · 2, 0, -4 · 1
    "neuron_conductance": [2.0, 0.0, -4.0],  # ∫ ∂y/∂h dh: 1 · (2 - 0), 0, -4 · (2 - 1)
    "internal_influence": [1.0, 0.0, -4.0],  # ∫ ∂y/∂h dt
    "weight_norm": [2.0, 3.0, 1.0],
}


@pytest.mark.parametrize("name", ON_PAPER)
def test_a_network_on_paper(name):
    data = [{"inputs": torch.tensor([[1.0]]), "labels": torch.tensor([0])}]
    found = attribute(OnPaper(), data, make(name), output="logit")
    assert torch.allclose(found.weights, torch.tensor([ON_PAPER[name]]), atol=1e-5)
    assert found.predict([True, True, True]).item() == pytest.approx(-6.0, abs=1e-5)


def test_at_another_place_the_negative_unit_counts():
    data = [{"inputs": torch.tensor([[-2.0]]), "labels": torch.tensor([0])}]  # h = (-4, 6, -1), y = 30
    assert attribute(OnPaper(), data, make("leave_one_out"), output="logit").weights.tolist() == [[0.0, 30.0, 4.0]]
    # Ablated, h3 = 1 and y falls by 4. On the path h3 = 1 - 2t is positive for half of it, where ∂y/∂h3 = -4.
    found = attribute(OnPaper(), data, baselines.NeuronConductance(8), output="logit").weights
    assert torch.allclose(found, torch.tensor([[0.0, 30.0, 4.0]]), atol=1e-5)
    found = attribute(OnPaper(), data, baselines.InternalInfluence(8), output="logit").weights
    assert torch.allclose(found, torch.tensor([[0.0, 5.0, -2.0]]), atol=1e-5)


class InPlace(OnPaper):
    """The same with an activation that overwrites its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.hidden(x).relu_() @ torch.tensor([1.0, 5.0, -4.0])
        return torch.stack([y, torch.zeros_like(y)], dim=1)


@pytest.mark.parametrize("name", ["neuron_conductance", "internal_influence", "gradient_times_parameter"])
def test_activations_that_are_overwritten(name):
    data = [{"inputs": torch.tensor([[1.0]]), "labels": torch.tensor([0])}]
    found = attribute(InPlace(), data, make(name), output="logit")
    assert torch.allclose(found.weights, torch.tensor([ON_PAPER[name]]), atol=1e-5)


# ----------------------------------------------------------------------------------------------- laws over the registry


@pytest.mark.parametrize("net_name", ["mlp", "convnet", "gpt2", "bert", "timm_vit"])
def test_shapes_types_and_the_bias(name, net_name):
    net = build_net(net_name)
    components = coar.find_components(net.model)
    if name == "leave_one_out" and len(components) > 300:
        pytest.skip("a pass a component takes long")
    found = attribute(net.model, [net.batch], make(name), components=components, output=net.output)
    n_components = len(found.components)
    assert found.weights.shape == (4, n_components) and found.weights.dtype == torch.float32
    assert found.standard_errors is None and found.weights.isfinite().all() and found.weights.abs().sum() > 0
    with torch.no_grad():
        complete = coar.outputs.get(net.output)(net.logits(), net.batch)
    assert torch.allclose(found.predict(torch.ones(n_components))[0], complete, atol=1e-3, rtol=1e-3)


def test_the_model_is_left_as_it_was(name, convnet):
    before = state_of(convnet.model)
    attribute(convnet.model, [convnet.batch], make(name))
    assert same_state(convnet.model, before)


def test_the_batch_size_moves_nothing_but_rounding(name, convnet):
    whole = attribute(convnet.model, [convnet.batch], make(name))
    halves = [{key: value[i : i + 2] for key, value in convnet.batch.items()} for i in (0, 2)]
    parts = attribute(convnet.model, halves, make(name))
    assert torch.allclose(whole.weights, parts.weights, atol=1e-5)
    assert torch.allclose(whole.bias, parts.bias, atol=1e-4)


def test_the_same_seed_gives_the_same_numbers(name, mlp):
    torch.manual_seed(1)
    first = attribute(mlp.model, [mlp.batch], make(name))
    torch.manual_seed(2)
    assert torch.equal(first.weights, attribute(mlp.model, [mlp.batch], make(name)).weights)
    other = attribute(mlp.model, [mlp.batch], make(name), seed=1)
    assert torch.equal(first.weights, other.weights) == (name != "random")


LOOKS = 10  # forward passes of a few examples before the first pass of a run, at most


def test_a_finished_run_is_not_run_again(name, mlp, tmp_path):
    first = attribute(mlp.model, [mlp.batch], make(name), out=tmp_path)
    calls = []
    handle = mlp.model.register_forward_hook(lambda *_: calls.append(1))
    again = attribute(mlp.model, [mlp.batch], make(name), out=tmp_path)
    handle.remove()
    assert len(calls) <= LOOKS and torch.equal(first.weights, again.weights)
    assert coar.Attributions.from_pretrained(tmp_path).config["method"] == make(name).settings()


def test_the_cost_is_told_and_true(name, mlp, tmp_path):
    components = coar.find_components(mlp.model)
    passes = []
    mlp.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    found = attribute(mlp.model, [mlp.batch], make(name), components=components, out=tmp_path)
    run = sum(passes)
    passes.clear()
    attribute(mlp.model, [mlp.batch], make(name), components=components, out=tmp_path)
    looks = sum(passes)  # of a few examples, also where nothing is left to do
    told = make(name).cost(Size(len(components), 0.1))
    assert found.config["cost"] == told
    backward = {"gradient_times_parameter": 1, "neuron_conductance": 4, "internal_influence": 4}.get(name, 0)
    assert (run - looks) / 4 == pytest.approx(told - 2 * backward)  # a pass forward and back counts as three


@pytest.mark.parametrize("name", ["leave_one_out", "gradient_times_parameter", "neuron_conductance"])
def test_exact_where_components_do_not_interact(name):
    """One layer, a linear output: all that is said of a component is its own addend, and they sum to the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Flatten(), nn.Linear(6, 2, bias=False))
    components = coar.find_components(model, include=["0"])
    batch = {"inputs": torch.randn(3, 5), "labels": torch.tensor([0, 1, 0])}
    found = attribute(model, [batch], make(name), components=components, output="logit")
    hidden = model[0](batch["inputs"])
    addends = hidden * model[2].weight[batch["labels"]]
    assert torch.allclose(found.weights, addends, atol=1e-5) and found.bias.abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------- definitions, checked


@pytest.mark.parametrize("net_name", ["mlp", "convnet", "gpt2", "timm_vit"])
def test_gradient_times_parameter_is_what_it_says(net_name):
    net = build_net(net_name)
    found = attribute(net.model, [net.batch], make("gradient_times_parameter"), output=net.output)
    for example in range(2):
        rows = {key: value[example : example + 1] for key, value in net.batch.items()}
        net.model.zero_grad()
        coar.outputs.get(net.output)(models.logits(net.model, rows), rows).sum().backward()
        expected = []
        for group in found.components.groups:
            weight = net.model.get_parameter(group.parameter)
            product = group.rows(weight.detach() * weight.grad)
            expected.append(product.flatten(1 if group.stack_axis is None else 2).sum(-1).flatten())
        assert torch.allclose(found.weights[example], torch.cat(expected), atol=1e-4, rtol=1e-3)


def test_leave_one_out_is_what_it_says(convnet):
    found = attribute(convnet.model, [convnet.batch], make("leave_one_out"))
    output = coar.outputs.get("margin")
    with torch.no_grad():
        for index in (0, 5, 9):
            kept = torch.arange(len(found.components)) != index
            with masking.ablate(convnet.model, found.components, kept, how="weights"):
                without = output(convnet.logits(), convnet.batch)
            expected = output(convnet.logits(), convnet.batch) - without
            assert torch.allclose(found.weights[:, index], expected, atol=1e-5)


def test_conductance_of_a_whole_layer_sums_to_the_difference(convnet):
    components = coar.find_components(convnet.model, include=["conv2"])
    output = coar.outputs.get("logit")
    found = attribute(
        convnet.model, [convnet.batch], baselines.NeuronConductance(200), components=components, output="logit"
    )
    zeros = {**convnet.batch, "inputs": torch.zeros_like(convnet.batch["inputs"])}
    with torch.no_grad():
        difference = output(convnet.logits(), convnet.batch) - output(models.logits(convnet.model, zeros), zeros)
    assert torch.allclose(found.weights.sum(1), difference, atol=0.02 * float(difference.abs().max()))


def test_norms_by_hand(mlp):
    found = attribute(mlp.model, [mlp.batch], make("weight_norm"))
    expected = torch.cat([mlp.model[layer].weight.norm(dim=1) for layer in (0, 2, 4)])
    assert torch.allclose(found.weights[3], expected, atol=1e-6)


def test_random_weights_are_standard_normal():
    net = build_net("gpt2")
    found = attribute(net.model, [net.batch], make("random"), output="token_margin").weights
    assert found.mean().abs() < 0.1 and (found.std() - 1).abs() < 0.1
    assert abs(float(torch.corrcoef(found[:2])[0, 1])) < 0.2


# -------------------------------------------------------------------------------------------------------------- errors


def test_attention_in_one_function_cannot_be_watched():
    net = build_net("transformer_batch_first")
    with pytest.raises(CoarError, match=r"in_proj_weight.*exclude"):
        attribute(net.model, [net.batch], make("neuron_conductance"))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_that_make_no_sense(steps):
    with pytest.raises(CoarError, match="n_steps"):
        baselines.InternalInfluence(n_steps=steps)


def test_the_cost_of_leave_one_out_is_a_pass_a_component_and_one():
    assert baselines.LeaveOneOut().cost(Size(17, 0.1)) == 18


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError])
def test_words_whose_table_a_model_cannot_tell_have_no_path(error):
    class Untold(nn.Module):
        def get_input_embeddings(self):
            raise error("a base class cannot tell")

    with pytest.raises(CoarError, match="so that there is no path"):
        input_paths._embedding(Untold())
