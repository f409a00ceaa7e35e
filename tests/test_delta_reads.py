"""Delta reads: exact differences through a component's own nonlinearity, in one pass, whatever the gates' levels."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_coar as coar
from hf_coar import masking
from hf_coar.estimators.delta_reads import DeltaReads, followed
from hf_coar.estimators.gates import GatePasses
from hf_coar.estimators.trying import elementwise_modules, normalising_modules
from hf_coar.masking import FiredGroups

N_EXAMPLES = 3


class Readout(nn.Module):
    """A fixed linear readout after one layer: no two components interact, so the exact differences are known."""

    def __init__(self, layer, activate, n_features, norm=None):
        super().__init__()
        self.layer, self.activate, self.norm = layer, activate, norm
        self.register_buffer("readout", torch.randn(n_features, generator=torch.Generator().manual_seed(5)))

    def forward(self, x):
        x = self.layer(x)
        x = self.norm(x) if self.norm is not None else x
        x = self.activate(x)
        x = x.flatten(2).mean(2) if x.dim() > 2 else x
        return x @ self.readout[:, None]


class NewGELU(nn.Module):
    """A composed activation, as some libraries write theirs."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3))))


class Shift(nn.Module):
    """Of a slope that is the same everywhere, so that torch may keep one number of it for all."""

    def forward(self, x):
        return x + 1


class RootMeanSquare(nn.Module):
    """A normalisation in operations of its own, as most libraries write theirs."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def batch_norm(n_features):
    norm = nn.BatchNorm2d(n_features)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def drawn(norm):
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def shortcut(x):
    return F.relu(x + torch.linspace(-1, 1, x.shape[1]))


def twice(x):
    """Two consumers: one through a nonlinearity, one around it."""
    return F.silu(x) + 0.3 * x


def in_place(x):
    x += 0.2
    return F.relu(x, inplace=True)


def gated_product(x):
    return F.silu(x) * 0.7


NETS = {
    "relu function": lambda: Readout(nn.Linear(6, 5), F.relu, 5),
    "relu module in place": lambda: Readout(nn.Linear(6, 5), nn.ReLU(inplace=True), 5),
    "gelu module": lambda: Readout(nn.Linear(6, 5), nn.GELU(), 5),
    "composed gelu module": lambda: Readout(nn.Linear(6, 5), NewGELU(), 5),
    "tanh without bias": lambda: Readout(nn.Linear(6, 5, bias=False), torch.tanh, 5),
    "addition before relu": lambda: Readout(nn.Linear(6, 5), shortcut, 5),
    "in-place addition and relu": lambda: Readout(nn.Linear(6, 5), in_place, 5),
    "two consumers": lambda: Readout(nn.Linear(6, 5), twice, 5),
    "silu times a number": lambda: Readout(nn.Linear(6, 5), gated_product, 5),
    "scaled before relu": lambda: Readout(nn.Linear(6, 5), lambda x: F.relu(x * 2.5 / 3), 5),
    "convolution, batch norm, relu": lambda: Readout(nn.Conv2d(2, 4, 3), nn.ReLU(), 4, batch_norm(4)),
    "linear": lambda: Readout(nn.Linear(6, 5), lambda x: x, 5),
    "shift module": lambda: Readout(nn.Linear(6, 5), Shift(), 5),
    "every channel normalised, gelu": lambda: Readout(nn.Conv2d(2, 4, 3), nn.GELU(), 4, drawn(nn.GroupNorm(4, 4))),
    "instance norm scaled, relu": lambda: Readout(
        nn.Conv2d(2, 4, 3), lambda x: F.relu(x * 0.5 + 0.1), 4, drawn(nn.InstanceNorm2d(4, affine=True))
    ),
}
# The same layers as one component: a normalisation of all of its features takes in nothing else.
WHOLE = {
    "whole layer normalised, gelu": lambda: Readout(nn.Linear(6, 5), nn.GELU(), 5, drawn(nn.LayerNorm(5))),
    "whole layer normalised": lambda: Readout(nn.Linear(6, 5, bias=False), lambda x: x, 5, drawn(nn.LayerNorm(5))),
    "whole layer normalised by hand": lambda: Readout(nn.Linear(6, 5), F.relu, 5, RootMeanSquare(5)),
    "whole layer in groups": lambda: Readout(nn.Conv2d(2, 4, 3), nn.ReLU(), 4, drawn(nn.GroupNorm(2, 4))),
}


def reads_and_exact(model, inputs, levels, components):
    """Delta reads at some gate levels, and y(in place) - y(ablated) one component at a time."""
    leaves = [part.contiguous().requires_grad_() for part in levels.split(components.sizes(), dim=1)]
    reads = DeltaReads()
    known = elementwise_modules(model), normalising_modules(model)
    with (
        masking.MaskedModel(model, components).gated(leaves) as fired,
        followed(known[0], fired, reads, None, known[1]),
    ):
        y = model(inputs).sum()
    derivatives = torch.autograd.grad(y, leaves, retain_graph=True)
    corrected = torch.cat([d + c for d, c in zip(derivatives, reads.corrections(leaves), strict=True)], dim=1)
    exact = torch.zeros_like(levels)
    for index in range(len(components)):
        outputs = []
        for level in (1.0, 0.0):
            gates = levels.clone()
            gates[:, index] = level
            with torch.no_grad(), coar.ablate(model, components, gates):
                outputs.append(model(inputs)[:, 0])
        exact[:, index] = outputs[0] - outputs[1]
    return corrected, exact, torch.cat(derivatives, dim=1)


@pytest.mark.parametrize("name", NETS | WHOLE)
def test_reads_are_the_exact_differences(name):
    torch.manual_seed(0)
    model = (NETS | WHOLE)[name]().double().eval().requires_grad_(False)
    convolutional = isinstance(model.layer, nn.Conv2d)
    inputs = torch.randn((N_EXAMPLES, 2, 5, 5) if convolutional else (N_EXAMPLES, 6), dtype=torch.float64)
    components = coar.find_components(model, "module" if name in WHOLE else "unit", include=["layer"])
    levels = torch.rand(N_EXAMPLES, len(components), dtype=torch.float64)
    reads, exact, derivatives = reads_and_exact(model, inputs, levels, components)
    assert torch.allclose(reads, exact, atol=1e-9)
    if name == "linear":
        assert torch.equal(reads, derivatives)
    elif name == "shift module":
        assert torch.allclose(reads, derivatives)
    else:
        assert not torch.allclose(derivatives, exact, atol=1e-3)


def test_a_plain_derivative_is_left_where_no_nonlinearity_is_found():
    torch.manual_seed(0)
    model = Readout(nn.Linear(6, 5), nn.LayerNorm(5), 5).double().eval().requires_grad_(False)
    levels = torch.rand(N_EXAMPLES, 5, dtype=torch.float64)
    inputs, components = torch.randn(N_EXAMPLES, 6, dtype=torch.float64), coar.find_components(model)
    reads, _, derivatives = reads_and_exact(model, inputs, levels, components)
    assert torch.equal(reads, derivatives)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm1d, (5, 4)),
        (nn.BatchNorm1d, (5, 4, 6)),
        (nn.BatchNorm2d, (5, 4, 6, 7)),
        (nn.BatchNorm3d, (5, 4, 2, 3, 2)),
        (lambda width: nn.BatchNorm2d(width, affine=False), (5, 4, 6, 7)),
        (lambda width: nn.BatchNorm2d(width, track_running_stats=False), (5, 4, 6, 7)),
    ],
)
def test_gradients_through_batch_normalisation_are_its_own(norm, shape, dtype):
    torch.manual_seed(0)
    norm = norm(4).eval().requires_grad_(False).to(dtype)
    with torch.no_grad():
        for one in (*norm.parameters(), *norm.buffers()):
            one.copy_(torch.rand(one.shape) + 0.5)
    x, upstream = torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype)
    expected = norm(x)
    with followed({}, FiredGroups(norm, []), DeltaReads()):
        found = norm(x)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(value, x, upstream)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_batch_normalisation_by_weights_that_a_gate_reaches():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 4), torch.rand(4).requires_grad_()
    constants = torch.zeros(4), torch.ones(4)
    with followed({}, FiredGroups(nn.Identity(), []), DeltaReads()):
        value = F.batch_norm(x, *constants, weight)
    assert torch.autograd.grad(value.sum(), weight)[0].allclose(x.sum(0), atol=1e-4)


def test_nothing_changes_in_the_forward_pass():
    torch.manual_seed(0)
    model = NETS["in-place addition and relu"]().eval().requires_grad_(False)
    components = coar.find_components(model)
    x, gates = torch.randn(N_EXAMPLES, 6), [torch.rand(N_EXAMPLES, 5).requires_grad_()]
    with masking.MaskedModel(model, components).gated(gates) as fired:
        plain = model(x)
        with followed(elementwise_modules(model), fired, DeltaReads()):
            assert torch.equal(model(x), plain)


def test_elementwise_modules_are_found_by_trying_them():
    inside = [nn.ReLU(), nn.GELU(), nn.SiLU(inplace=True), NewGELU(), nn.Hardswish(), nn.Softplus()]
    outside = [nn.Softmax(-1), nn.LayerNorm(2), nn.Identity(), nn.Dropout(), nn.Flatten(), nn.AvgPool2d(1), nn.GLU()]
    outside += [nn.Linear(2, 2), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(9, 1, 4), nn.AvgPool2d(3, 1, 1)]
    model = nn.ModuleList([*inside, *outside]).eval()
    assert list(elementwise_modules(model)) == inside


def test_clamps_are_found_by_trying_them():
    clamps = {nn.ReLU(): (0, math.inf), nn.ReLU6(inplace=True): (0, 6), nn.Hardtanh(-0.5, 20.0): (-0.5, 20)}
    others = [nn.GELU(), nn.LeakyReLU(), nn.Hardsigmoid(), nn.Hardswish(), nn.Threshold(1.0, 0.0), nn.Tanh()]
    found = elementwise_modules(nn.ModuleList([*clamps, *others]))
    assert list(found.values()) == [*clamps.values(), *[None] * len(others)]


def test_normalising_modules_are_found_by_trying_them():
    inside = [nn.LayerNorm(4), nn.RMSNorm(4), RootMeanSquare(4)]
    outside = [nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.Linear(4, 1), nn.PReLU(4), nn.LayerNorm((3, 4)), nn.ReLU()]
    assert normalising_modules(nn.ModuleList([*inside, *outside]).eval()) == inside


def test_modules_are_restored_after_an_error():
    model = Readout(nn.Linear(6, 5), nn.ReLU(), 5, nn.LayerNorm(5)).eval()
    components, own = coar.find_components(model, include=["layer"]), model.norm.forward
    model.norm.forward = own  # as accelerate does, to move what a module is given
    with pytest.raises(RuntimeError, match="stop"):
        with masking.MaskedModel(model, components).gated([torch.zeros(N_EXAMPLES, 5)]) as fired:
            with followed(elementwise_modules(model), fired, DeltaReads(), None, normalising_modules(model)):
                assert model.norm.forward is not own and "forward" in model.activate.__dict__
                raise RuntimeError("stop")
    assert "forward" not in model.activate.__dict__ and model.norm.__dict__["forward"] is own
    assert fired.observe is None


@pytest.mark.parametrize("name", ["relu module in place", "in-place addition and relu", "relu function"])
def test_nothing_of_a_pass_is_held_when_it_is_over(name):
    """What is written in place becomes its own ancestor, if the function that wrote it holds it."""
    model = NETS[name]().eval().requires_grad_(False)
    components, seen = coar.find_components(model), []
    model.layer.register_forward_hook(lambda module, given, made: seen.append(weakref.ref(made)))
    gates, reads = [torch.rand(N_EXAMPLES, 5).requires_grad_()], DeltaReads()
    with masking.MaskedModel(model, components).gated(gates) as fired:
        with followed(elementwise_modules(model), fired, reads, torch.tensor(0.5, dtype=torch.float64)):
            value = model(torch.randn(N_EXAMPLES, 6)).sum()
    torch.autograd.grad(value, gates, retain_graph=True)
    reads.corrections(gates)
    del value, reads
    gc.collect()
    assert seen and all(one() is None for one in seen)


class Residual(nn.Module):
    """What an activation wrote into goes on to a sum, and through the activation behind it."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.activation = activation

    def forward(self, x):
        x = self.activation(self.first(x))
        return self.activation(self.second(x) + x).mean((2, 3))


KEPT = torch.tensor([0.0, 1.0]).repeat(3)[:, None]


def zero_some_(x):
    x[:, :, ::2] = 0
    return x


def into_a_view_(x):
    F.relu_(x[:, :2])
    return x


IN_PLACE = {
    "relu": (lambda x: F.relu(x, inplace=True), F.relu),
    "relu module": (nn.ReLU(inplace=True), nn.ReLU()),
    "hardtanh": (lambda x: F.hardtanh_(x, -0.2, 0.3), lambda x: F.hardtanh(x, -0.2, 0.3)),
    "another function": (lambda x: F.relu(zero_some_(x) + 0.1), lambda x: F.relu(x * KEPT + 0.1)),
    "a view": (into_a_view_, lambda x: torch.cat([F.relu(x[:, :2]), x[:, 2:]], dim=1)),
    "a number": (lambda x: F.relu(x.mul_(2.0)), lambda x: F.relu(x * 2.0)),
    "a clamp": (lambda x: x.clamp_(min=0), lambda x: x.clamp(min=0)),
}


@pytest.mark.parametrize("smoothing", [None, 0.5])
@pytest.mark.parametrize("name", IN_PLACE)
def test_it_does_not_matter_whether_a_model_writes_in_place(name, smoothing):
    torch.manual_seed(0)
    inputs, found = torch.randn(3, 2, 6, 6), []
    source = Residual(None).requires_grad_(False)
    for activation in IN_PLACE[name]:
        model = Residual(activation).eval().requires_grad_(False)
        model.load_state_dict(source.state_dict())
        passes = GatePasses(
            masking.MaskedModel(model, coar.find_components(model)), coar.outputs.get("logit"), delta=True
        )
        gates = torch.linspace(0.1, 0.9, 3 * len(passes.masked)).view(3, -1)
        found.append(passes({"x": inputs, "labels": torch.arange(3)}, gates, smoothing or 0.0)[1])
    assert torch.allclose(*found, atol=1e-6 * float(found[1].abs().max()))
