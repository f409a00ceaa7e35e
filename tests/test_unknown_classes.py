"""Matrices of classes that no rule knows: sizes and biases tell the axes, and what nothing tells is marked."""

import logging

import pytest
import torch
from torch import Tensor, nn

import hf_coar as coar


class Mix(nn.Module):
    """A layer as `einops` makes them: the weight's axes in the order of any pattern, a bias that spreads."""

    def __init__(self, pattern: str, weight: tuple, bias: tuple | None = None, name: str = "weight", **sizes) -> None:
        super().__init__()
        self.pattern, self.name = pattern, name
        setattr(self, name, nn.Parameter(torch.randn(weight)))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.randn(bias)))
        for key, value in sizes.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum(self.pattern, x, getattr(self, self.name))
        return mixed if self.bias is None else mixed + self.bias


IN_OUT, OUT_IN = "bi,io->bo", "bi,oi->bo"
KNOWN = {
    "a bias that spreads": lambda: Mix(IN_OUT, (6, 10), (1, 10)),
    "a bias": lambda: Mix(IN_OUT, (6, 10), (10,), "kernel"),
    "a bias of [out, in]": lambda: Mix(OUT_IN, (10, 6), (10,)),
    "a bias against the name": lambda: Mix(OUT_IN, (10, 6), (10,), "proj"),
    "features": lambda: Mix(IN_OUT, (6, 10), in_features=6, out_features=10),
    "one of two sizes": lambda: Mix(IN_OUT, (6, 10), input_dim=6),
    "experts of a router": lambda: Mix(OUT_IN, (10, 6), num_experts=10),
}


@pytest.mark.parametrize("name", KNOWN)
def test_evidence_tells_the_axes(name, caplog):
    model = KNOWN[name]()
    units, inputs = (coar.find_components(model, granularity) for granularity in ("unit", "input"))
    assert (len(units), len(inputs)) == (10, 6)
    x, kept = torch.randn(3, 6), torch.arange(10) != 4
    with torch.no_grad(), coar.ablate(model, units, kept):
        gone = model(x)
    with torch.no_grad():
        plain = model(x)
    bias = 0 if model.bias is None else model.bias.flatten()[4]
    assert torch.equal(gone[:, kept], plain[:, kept]) and torch.allclose(gone[:, 4], torch.zeros(3) + bias)
    assert not caplog.records and "guessed" not in units.tree()


def test_evidence_for_a_stack(caplog):
    model = Mix("bhi,hio->bho", (2, 6, 10), (2, 10))
    assert len(coar.find_components(model)) == 20 and len(coar.find_components(model, "input")) == 12
    assert not caplog.records


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mix(IN_OUT, (6, 10)),
        lambda: Mix(IN_OUT, (6, 6), (6,), in_features=6, out_features=6),  # a square says nothing
        lambda: Mix("bhi,hio->bho", (2, 6, 10)),
    ],
)
def test_a_guess_is_marked_and_said_once(build, caplog):
    model = nn.Sequential(nn.Linear(6, 6), build(), build())
    with caplog.at_level(logging.WARNING):
        components = coar.find_components(model)
    assert [group.guessed for group in components.groups] == [False, True, True]
    (record,) = caplog.records
    assert "weight of Mix" in record.getMessage() and "hf_coar.components.rule" in record.getMessage()
    assert components.tree().count("guessed") == 2
    assert [g.get("guessed", False) for layer in components.tree_json()["layers"] for g in layer["groups"]] == [
        False, True, True
    ]  # fmt: skip
    again = coar.Components.from_json(components.to_json())
    assert again == components and again.groups[1].guessed


def test_a_square_matrix_is_laid_out_as_the_others_of_its_class(caplog):
    square = Mix(IN_OUT, (6, 6), (6,))
    components = coar.find_components(nn.Sequential(square, Mix(IN_OUT, (6, 10), (10,))))
    assert [group.axis for group in components.groups] == [1, 1] and not caplog.records


class Stack(nn.Module):
    def __init__(self, up: tuple, down: tuple, **sizes) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        for key, value in sizes.items():
            setattr(self, key, value)


@pytest.mark.parametrize(
    ("module", "sizes", "guessed"),
    [
        (Stack((2, 7, 4), (2, 4, 7)), [14, 8], True),
        (Stack((2, 7, 4), (2, 4, 7), hidden_size=4), [14, 8], False),
        (Stack((2, 4, 7), (2, 7, 4), hidden_dim=4), [14, 8], False),
        (Stack((2, 4, 7), (2, 7, 4), is_transposed=True), [14, 8], False),
    ],
)
def test_stacked_experts_without_a_gate(module, sizes, guessed, caplog):
    components = coar.find_components(module)
    assert components.sizes() == sizes
    assert [group.guessed for group in components.groups] == [guessed] * 2 and len(caplog.records) == guessed


def test_of_whole_matrices_no_axis_is_guessed(caplog):
    components = coar.find_components(Mix(IN_OUT, (6, 10)), "module")
    assert not caplog.records and not components.groups[0].guessed


def test_a_rule_ends_the_guess(caplog, registering):
    class Known(Mix):
        pass

    @coar.components.rule(Known)
    def known(module):
        return [coar.components.Matrix("weight", 1, 0, site="weight")]

    assert len(coar.find_components(Known(IN_OUT, (6, 10)))) == 10 and not caplog.records


def test_packed_weights_are_told_as_left_out():
    """Linear layers that torch quantised are no parameters, and were left out without a word."""
    packed = nn.Module()  # as those of torch.ao.nn.quantized are, whose making needs an engine of the processor
    packed.in_features, packed.out_features, packed._packed_params = 6, 5, object()
    model = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Flatten(), packed)
    (skipped,) = coar.find_components(model).skipped
    assert (skipped.module, skipped.n_parameters) == ("2", 30) and "weights are packed" in skipped.reason


def test_where_all_is_left_out_the_reasons_are_told():
    with pytest.raises(coar.CoarError, match=r"but 0: embedding \(left out unless included\)\. Name them"):
        coar.find_components(nn.Sequential(nn.Embedding(5, 4)))


class Experts(nn.Module):
    """Stacks of matrices by names that say nothing of it."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.w1 = nn.Parameter(torch.randn(4, 8, width))
        self.w2 = nn.Parameter(torch.randn(4, width, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        hidden = torch.einsum("bd,edh->beh", x, self.w1).relu()
        return self.down(x + torch.einsum("beh,ehd->bd", hidden, self.w2))


def test_a_large_part_of_a_model_that_no_rule_reaches_is_told(caplog):
    """Four fifths of a mixture were left out without a word but in `skipped`."""
    assert len(coar.find_components(Experts(4))) == 11
    assert "78 % of the weights of Experts are no components: no rule for Experts.w1; add one" in caplog.text
    caplog.clear()
    coar.find_components(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    assert not caplog.text
