"""Passes written down as graphs: the same bits for other values, and no graph where values were looked at."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_coar.errors import ModelError
from hf_coar.models.written import written


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_forward_and_backward_with_what_is_held():
    torch.manual_seed(0)
    layer, shift = nn.Linear(4, 3), torch.randn(3)

    def run(x, gate):
        gate = gate.clone().requires_grad_()
        hidden = (layer(x) * gate).add_(shift)
        halves = F.relu_(hidden).split([1, 2], dim=1)
        value = halves[0].exp().sum() + halves[1].softmax(1).square().sum() + torch.tensor(2.0)
        return value.detach(), torch.autograd.grad(value, gate)[0]

    graph = written(run, [torch.randn(5, 4), torch.rand(5, 3)])
    with torch.no_grad():
        layer.weight.mul_(2)  # weights are read in every call
    for _ in range(2):
        inputs = torch.randn(5, 4), torch.rand(5, 3)
        for found, expected in zip(graph(*inputs), run(*inputs), strict=True):
            assert torch.equal(found, expected)


def test_what_is_written_into_a_number_of_the_program_is_new_in_every_call():
    graph = written(lambda x: (torch.tensor([1.0]).add_(x.sum()),), [torch.ones(2)])
    assert [float(graph(torch.ones(2))[0]) for _ in range(3)] == [3.0] * 3


def test_tensors_of_a_pass_are_not_kept_for_the_graph():
    seen = []

    def run(x):
        between = x.exp()
        seen.append(weakref.ref(between))
        return (between.sum(),)

    graph = written(run, [torch.ones(3)])
    gc.collect()
    assert seen[0]() is None and "held_0" not in dict(graph.named_buffers())


LOOKS = {
    "if": lambda x: x * 2 if x.sum() > 0 else x,
    "item": lambda x: x * x.max().item(),
    "list": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * float(x.detach().numpy()[0]),
    "array": lambda x: x * float(x.detach().__array__()[0]),
    "nonzero": lambda x: x[x.nonzero()[:, 0]].sum() * x,
    "mask": lambda x: x[x > 0].mean() * x,
    "unique": lambda x: x.round().unique().sum() * x,
    "equal": lambda x: x if torch.equal(x, x) else -x,
}


@pytest.mark.parametrize("name", LOOKS)
def test_looks_at_values_are_refused_unless_these_are_given(name):
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ModelError, match="depends on values, and not on shapes alone"):
        written(lambda *given: (LOOKS[name](given[0] * given[1]),), [x, x], n_given=1)
    graph = written(lambda *given: (LOOKS[name](given[0] * 2) * given[1],), [x, x], n_given=1)
    assert torch.equal(graph(x, -x)[0], LOOKS[name](x * 2) * -x)


def test_a_value_of_weights_is_not_given():
    weight = torch.ones(3)
    with pytest.raises(ModelError, match="depends on values"):
        written(lambda x: (x * float(weight.sum()),), [torch.ones(3)], n_given=1)


def test_numbers_of_the_program_may_be_looked_at():
    graph = written(lambda x: (x * float(torch.arange(3).sum()),), [torch.ones(3)])
    assert graph(torch.ones(3))[0].tolist() == [3.0] * 3


def test_indices_that_are_numbers():
    graph = written(lambda x: (x[x.argsort()],), [torch.tensor([3.0, 1.0, 2.0])])
    assert graph(torch.tensor([1.0, 3.0, 2.0]))[0].tolist() == [1.0, 2.0, 3.0]
    assert "aten.index.Tensor" in operations(graph)
