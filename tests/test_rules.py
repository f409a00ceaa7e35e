"""Every rule: hooks, weights and zeroing by hand agree on a module of its class, shared or one mask an example."""

import copy

import pytest
import timm.layers
import torch
import transformers
from exactness import zeroed_by_hand
from rule_cases import (
    BYPASSED,
    EXAMPLES,
    MIXED,
    MODELS,
    POSITIONS,
    WIDTH,
    Image,
    LoraLinear,
    PositionsFirst,
    SelfAttention,
    Sequence,
    Tied,
    ablated,
    build,
    masks,
    rules_met,
    zeroed_by_meaning,
)  # fmt: skip
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal

import hf_coar as coar
from hf_coar import masking, models
from hf_coar.components import Matrix, registered, rule, rule_of
from hf_coar.editing import making
from hf_coar.errors import CoarError, NoComponentsError


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return build(name)


@pytest.fixture
def x():
    return torch.randn(EXAMPLES, POSITIONS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def find(name, model):
    """Components of a granularity, or the test is skipped where there are none."""

    def found(granularity="unit"):
        try:
            return coar.find_components(model, granularity, exclude=BYPASSED.get(name))
        except NoComponentsError:
            pytest.skip("has none")

    return found


@pytest.fixture
def close(name):
    """Whether two outputs of a case are equal but for rounding."""
    return lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5 if name in MIXED else 1e-12)


GRANULARITIES = pytest.mark.parametrize("granularity", coar.components.GRANULARITIES)


def test_every_rule_has_a_case():
    own = {key for key, found in registered().items() if found.__module__.startswith("hf_coar.")}
    assert own - set().union(*(rules_met(build(name)) for name in MODELS)) == set()


@GRANULARITIES
def test_an_edit_is_undone_by_what_its_record_names(model, find, granularity):
    components = find(granularity)
    kept = masks(1, len(components))[0]
    named = [components[int(index)].group for index in (~kept).nonzero()[:, 0]]
    base = {**models.record(model), "fingerprint": models.fingerprint(model)}
    parameters = {name for group in named for name in (group.parameter, *group.shared_by)}
    try:
        edited = making.with_ablated(model, components, kept, {"base": base, "parameters": sorted(parameters)})
    except CoarError:
        pytest.skip("its weights cannot be changed")
    assert models.fingerprint(edited) != base["fingerprint"]
    assert models.fingerprint(coar.undo(edited, model)) == base["fingerprint"]


@pytest.mark.parametrize("granularity", ["unit", "input"])
def test_units_and_inputs_are_what_they_are_called(name, model, x, find, close, granularity):
    components = find(granularity)
    if any(".parametrizations." in group.parameter for group in components.groups):
        pytest.skip("stored in parts")
    for kept in masks(2, len(components)):
        with torch.no_grad():
            expected = zeroed_by_meaning(name, model, components, kept)(x)
        for how in ("weights", "hooks"):
            assert close(ablated(model, components, kept, x, how), expected), how


@GRANULARITIES
def test_three_ways_to_the_same_answer(model, x, find, close, granularity):
    components = find(granularity)
    with torch.no_grad():
        plain = model(x)
    for kept in masks(2, len(components)):
        with torch.no_grad():
            expected = zeroed_by_hand(model, components, kept)(x)
        assert not torch.equal(expected, plain)
        for how in ("weights", "hooks"):
            assert close(ablated(model, components, kept, x, how), expected), how
    with torch.no_grad():
        assert torch.equal(model(x), plain), "something was left behind"


@GRANULARITIES
def test_one_mask_an_example(model, x, find, close, granularity):
    components = find(granularity)
    kept = masks(EXAMPLES, len(components))
    together = ablated(model, components, kept, x)
    for example in range(EXAMPLES):
        alone = ablated(model, components, kept[example], x, "weights")[example]
        assert close(together[example], alone)


def test_fractions_and_their_gradients(name, model, x, find, close):
    components = find()
    gates = 0.2 + 0.6 * torch.rand(EXAMPLES, len(components), dtype=torch.float64)
    gates.requires_grad_()
    with coar.ablate(model, components, gates):
        output = model(x)
    direction = torch.randn_like(gates)
    (gradient,) = torch.autograd.grad(output.sum(), gates)
    step, values = 1e-3 if name in MIXED else 1e-6, []
    for sign in (1, -1):
        values.append(ablated(model, components, gates.detach() + sign * step * direction, x).sum())
    difference = float(values[0] - values[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(
        difference, rel=1e-2 if name in MIXED else 1e-5, abs=1e-6
    )
    if all(group.by_weights == "scale" for group in components.groups):
        by_weights = ablated(model, components, gates[1].detach(), x, "weights")[1]
        assert close(output[1], by_weights)


def test_gates_of_one_change_no_bit(model, x, find, close):
    components = find()
    with torch.no_grad():
        plain = model(x)
    # The library's attention may run a fused kernel of its own where nothing is gated; matrix products of a scaled copy
    # of a weight, which lies elsewhere in memory, and of a batch of one may round otherwise.
    rounds = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    rounds = rounds or any(group.site == "weight" or group.routed for group in components.groups)
    for shape in ((len(components),), (EXAMPLES, len(components))):
        gates = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        with torch.no_grad(), masking.MaskedModel(model, components).gated(gates.split(components.sizes(), -1)):
            after = model(x)
        if rounds or isinstance(model, PositionsFirst):
            assert close(after, plain)
        else:
            assert torch.equal(after, plain)


def test_an_edit_stays(model, x, find):
    components = find()
    kept = masks(1, len(components))[0]
    edited = copy.deepcopy(model)
    masking.MaskedModel(edited, components).ablate_for_good(kept)
    again = copy.deepcopy(model)
    again.load_state_dict(edited.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), ablated(model, components, kept, x, "weights"))


def test_everything_can_be_ablated_and_comes_back(model, x, find):
    components = find()
    with torch.no_grad():
        plain = model(x)
        output = ablated(model, components, torch.zeros(len(components), dtype=torch.bool), x, "weights")
        assert output.isfinite().all()
        assert torch.equal(model(x), plain)


def test_no_parameter_is_counted_twice(model, find):
    components = find()
    assert len({group.parameter for group in components.groups}) == len(components.groups)
    names = [str(component) for component in components]
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------- what is found where


@pytest.mark.parametrize(
    ("name", "granularity", "sizes"),
    [
        ("experts", "unit", [3, 30, 12]),
        ("experts", "expert", [3]),
        ("experts transposed", "unit", [3, 30, 12]),
        ("experts transposed", "input", [4, 12, 15]),
        ("experts in a list", "expert", [1, 1, 1]),
        ("conditional", "unit", [3, 18]),
        ("transposed grouped", "unit", [6]),
        ("attention", "head", [2]),
        ("positions first", "head", [2]),
        ("weight norm by position", "unit", [6]),
        ("LSTM cell", "unit", [20, 20]),
    ],
)
def test_counts(name, granularity, sizes):
    assert coar.find_components(MODELS[name](), granularity).sizes() == sizes


def test_a_head_is_taken_away_and_nothing_else(x):
    model = SelfAttention().double()
    components = coar.find_components(model, "head")
    with torch.no_grad():
        gone = ablated(model, components, torch.tensor([False, True]), x)
        weight = model.attention.out_proj.weight
        weight[:, :2] = 0
        assert torch.allclose(model(x), gone, rtol=0, atol=1e-12)


def test_tied_weights_are_one_component_and_ablated_wherever_they_are_used(x):
    torch.manual_seed(0)
    model = Tied().double()
    components = coar.find_components(model)
    assert len(components) == WIDTH + 7
    assert next(g for g in components.groups if g.module == "out").shared_by == ("embed",)
    for kept in masks(2, len(components)):
        expected = zeroed_by_hand(model, components, kept)(x)
        for how in ("weights", "hooks"):
            assert torch.allclose(ablated(model, components, kept, x, how), expected, rtol=0, atol=1e-12)
    kept = masks(EXAMPLES, len(components))
    together = ablated(model, components, kept, x)
    for example in range(EXAMPLES):
        alone = ablated(model, components, kept[example], x)[example]
        assert torch.allclose(together[example], alone, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ weights that cannot be cut


class Packed(nn.Linear):
    """A quantised linear layer as bitsandbytes makes them: a subclass that keeps its weight packed."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.bias = source.bias
        packed = (source.weight.data * 16).round().clamp(-128, 127).to(torch.int8)
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) / 16
        return nn.functional.linear(x, weight, self.bias)


class PackedBuffers(nn.Module):
    """As GPTQ and AWQ make them: no parameter at all."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("qweight", (source.weight.data * 16).round().to(torch.int32))
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 16, self.bias)


@pytest.mark.parametrize("packing", [Packed, PackedBuffers])
@pytest.mark.parametrize("granularity", ["unit", "input", "module"])
def test_quantised_layers_are_gated_and_never_cut(packing, granularity, x):
    torch.manual_seed(0)
    source = nn.Linear(WIDTH, 5)
    source.weight.data = (source.weight.data * 16).round() / 16
    packed, plain = Sequence(packing(source)).double(), Sequence(source).double()
    if packing is Packed:
        packed.layer.weight.data = packed.layer.weight.data.to(torch.int8)
    else:
        packed.layer.qweight = packed.layer.qweight.to(torch.int32)
    components, like = coar.find_components(packed, granularity), coar.find_components(plain, granularity)
    assert len(components) == len(like)
    kept = masks(EXAMPLES, len(components))
    expected = torch.stack([ablated(plain, like, row, x)[e] for e, row in enumerate(kept)])
    assert torch.allclose(ablated(packed, components, kept, x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(ablated(packed, components, kept[0], x)[0], expected[0], rtol=0, atol=1e-12)
    for action in (lambda: ablated(packed, components, kept[0], x, "weights"),
                   lambda: masking.MaskedModel(packed, components).ablate_for_good(kept[0])):  # fmt: skip
        with pytest.raises(CoarError, match=r"quantised.*hooks"):
            action()


def check_first_is_gated(model, components, x):
    """Without its first neuron a layer gives what it does with that row of the weight it makes at zero."""
    kept = torch.tensor([False, True, True, True])
    with torch.no_grad():
        weight = model.layer.weight.clone()
        weight[0] = 0
        expected = torch.tanh(nn.functional.linear(x, weight, model.layer.bias)).flatten(1).cumsum(1)
        assert torch.allclose(ablated(model, components, kept, x), expected, rtol=0, atol=1e-12)


def test_a_parametrization_of_an_unknown_kind_is_gated_and_never_cut(x):
    model = Sequence(orthogonal(nn.Linear(WIDTH, WIDTH))).double()
    components = coar.find_components(model)
    assert components.groups[0].by_weights == "never"
    check_first_is_gated(model, components, x)


class Scaled(nn.Linear):
    """Its weight is a property, as in libraries of their own."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.stored = nn.Parameter(self._parameters.pop("weight").data)

    weight = property(lambda self: 2 * self.stored)


MADE_ANEW = {
    "length and direction": lambda: torch.nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral": lambda: torch.nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", amount=0.3),
    "a property": Scaled,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("kind", MADE_ANEW)
def test_a_weight_that_is_made_anew_before_every_pass_is_gated_and_never_cut(x, kind):
    model = Sequence(MADE_ANEW[kind]()).double().eval()
    model(x)  # as hooks leave behind what they made
    components = coar.find_components(model)
    check_first_is_gated(model, components, x)
    found = coar.attribute(model, [{"x": x}], components, output=lambda logits, batch: logits.sum(1), progress=False)
    with pytest.raises(CoarError, match="derived from others"):
        coar.edit(model, found, increase=[0], n_components=1)


def test_fractions_of_standardised_filters_go_through_hooks(x):
    model = Image(StdConv2d(4, 6, 3, padding=1)).double()
    components = coar.find_components(model)
    gates = torch.full((6,), 0.5, dtype=torch.float64)
    with pytest.raises(CoarError, match=r"normalised again.*hooks"):
        ablated(model, components, gates, x, "weights")
    assert torch.equal(ablated(model, components, gates, x), ablated(model, components, gates, x, "hooks"))


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(("granularity", "sizes"), [("unit", [5, 2]), ("input", [4, 4, 2])])
def test_ranks_of_adapters_are_components(x, granularity, sizes):
    model = Sequence(LoraLinear()).double()
    components = coar.find_components(model, granularity)
    assert components.sizes() == sizes
    assert components.groups[-1].kind == "rank"
    kept = torch.ones(len(components), dtype=torch.bool)
    kept[-1] = False
    expected = zeroed_by_hand(model, components, kept)(x)
    for how in ("weights", "hooks"):
        assert torch.allclose(ablated(model, components, kept, x, how), expected, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------- layouts and their limits


def test_the_model_is_asked_once_and_left_alone(x):
    model = PositionsFirst().double().train()
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    inner = []
    model.into.register_forward_hook(lambda *_: inner.append(1))
    components = coar.find_components(model)
    state = torch.random.get_rng_state()
    for _ in range(3):
        ablated(model, components, masks(EXAMPLES, len(components)), x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(runs) == 3 and len(inner) == 3 * EXAMPLES + 2  # the table makes it run by example
    assert all(module.training for module in model.modules())


def test_examples_that_are_all_alike(x):
    model = PositionsFirst().double()
    components = coar.find_components(model)
    alike = x[:1].expand(EXAMPLES, -1, -1)
    kept = masks(EXAMPLES, len(components))
    together = ablated(model, components, kept, alike)
    for example in range(EXAMPLES):
        alone = ablated(model, components, kept[example], alike)[example]
        assert torch.allclose(together[example], alone, rtol=0, atol=1e-12)


def test_a_cache_cannot_be_divided():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    components = coar.find_components(model)
    kept = masks(2, len(components))
    with pytest.raises(CoarError, match=r"DynamicCache.*use_cache=False"):
        with coar.ablate(model, components, kept):
            model(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=transformers.DynamicCache())


def test_a_granularity_that_the_model_lacks_names_what_there_is():
    with pytest.raises(NoComponentsError, match=r"'expert'.*'unit', 'input', 'module'.*layer"):
        coar.find_components(Sequence(nn.Linear(3, 3)), "expert")


def test_a_rule_may_leave_the_inside_to_others(registering):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.inner = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4)

    @rule(Outer, inside=True)
    def outer(module):
        return [Matrix("odd", 0, 1, site="weight")]

    assert Outer in registered() and nn.Linear in registered() and nn.ReLU not in registered()
    assert [group.parameter for group in coar.find_components(Outer()).groups] == ["odd", "inner.weight"]


def test_a_class_has_one_rule(registering):
    with pytest.raises(CoarError, match=r"component rule 'torch\.nn\.modules\.linear\.Linear' is taken.*replace=True"):

        @rule(nn.Linear)
        def another(module):
            return []

    assert rule_of(nn.Linear(2, 2)).__module__ == "hf_coar.components.rules"
    with pytest.raises(CoarError, match="a module class or its dotted path"):
        rule(rule_of)


# -------------------------------------------------------------------------------------------------- totals and the tree


def test_regrouping():
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    units = coar.find_components(model)
    names, index = units.regroup("layer")
    assert names == ["transformer.h.0", "transformer.h.1"]
    assert index.bincount().tolist() == [len(units) // 2] * 2
    names, index = units.regroup("module")
    assert len(names) == 8 and index.bincount().tolist() == units.sizes()
    with pytest.raises(NoComponentsError, match="granularity='head'"):
        units.regroup("head")
    inputs = coar.find_components(model, "input")
    names, index = inputs.regroup("head")
    assert names[1] == "transformer.h.0.attn.c_proj head 1"
    assert index[index >= 0].bincount().tolist() == [4] * 4
    heads = coar.find_components(model, "head")
    assert heads.regroup("head")[1].tolist() == [0, 1, 2, 3]
    with pytest.raises(CoarError, match="'layer', 'head', 'module'"):
        units.regroup("floor")


def test_layers_of_staged_and_of_flat_models():
    with torch.device("meta"):
        resnet, swin = timm.create_model("resnet18"), timm.create_model("swin_tiny_patch4_window7_224")
    names, _ = coar.find_components(resnet).regroup("layer")
    assert names == ["conv1", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))]
    names, _ = coar.find_components(swin).regroup("layer")
    assert names[1:5] == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1", "layers.1.blocks.0"]


def test_the_tree_says_what_there_is_and_what_was_left_out():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    components = coar.find_components(model)
    text = components.tree()
    assert "83,712 components" in text and "blocks.0 … blocks.11 (12 alike): 6,912 each" in text
    assert "classifier" in text and "embedding" in text
    content = components.tree_json()
    assert sum(layer["components"] for layer in content["layers"]) == content["components"] == 83_712
    left_out = sum(entry["weights"] for entry in content["skipped"])
    assert left_out == sum(skipped.n_parameters for skipped in components.skipped)
