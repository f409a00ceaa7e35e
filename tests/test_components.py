"""Components: what is found in known networks, in which order, under which names, and what is left out."""

import json

import pytest
import torch
from conftest import build_net
from torch import Tensor, nn

import hf_coar as coar
from hf_coar import components as components_module
from hf_coar.components import Components, Matrix
from hf_coar.errors import CoarError, CorruptFileError, NoComponentsError
from hf_coar.models import fingerprint

# (network, granularity) -> components by matrix, in the order of the modules, counted by hand.
COUNTS = {
    ("mlp", "unit"): [8, 7, 3],
    ("mlp", "input"): [6, 8, 7],
    ("mlp", "module"): [1, 1, 1],
    ("convnet", "unit"): [4, 6, 3],
    ("convnet", "input"): [2, 6],  # no input channel of a grouped convolution is read by all of its filters
    ("convnet", "module"): [1, 1, 1],
    ("gpt2", "unit"): [96, 32, 128, 32] * 2,
    ("gpt2", "input"): [32, 32, 32, 128] * 2,
    ("gpt2", "module"): [1, 1, 1, 1] * 2,
    ("bert", "unit"): [32, 32, 32, 32, 48, 32] * 2 + [32],
    ("bert", "input"): [32, 32, 32, 32, 32, 48] * 2 + [32],
    ("vit", "unit"): [32] + [32, 32, 32, 32, 48, 32] * 2,
    ("vit", "input"): [3] + [32, 32, 32, 32, 32, 48] * 2,
    ("timm_vit", "unit"): [32] + [96, 32, 128, 32] * 2,
    ("timm_vit", "input"): [3] + [32, 32, 32, 128] * 2,
    ("transformer_batch_first", "unit"): [48, 16, 24, 16] * 2 + [3],
    ("transformer_batch_first", "input"): [16, 16, 16, 24] * 2 + [16],
    ("cross_attention", "unit"): [8, 8, 8, 8, 8, 3],
    ("cross_attention", "input"): [5, 8, 6, 4, 8, 8],
}


@pytest.mark.parametrize(("name", "granularity"), COUNTS)
def test_counts(name, granularity):
    components = coar.find_components(build_net(name).model, granularity)
    assert components.sizes() == COUNTS[name, granularity]
    assert len(components) == sum(COUNTS[name, granularity])
    assert components.granularity == granularity


def test_counts_of_the_demo(demo_pair):
    assert len(coar.find_components(demo_pair[0])) == 832  # the convolution filters that its README counts


def test_unit_is_the_default(mlp):
    assert coar.find_components(mlp.model) == coar.find_components(mlp.model, "unit")


@pytest.mark.parametrize("granularity", ["unit", "input", "module"])
def test_sizes_add_up_to_the_axes_of_the_parameters(net, granularity):
    parameters = dict(net.model.named_parameters(remove_duplicate=False))
    components = coar.find_components(net.model, granularity)
    for group in components.groups:
        assert group.size * group.block == parameters[group.parameter].shape[group.axis]
        assert group.parameter.startswith(group.module)
        assert granularity != "module" or group.size == 1
    assert len({group.parameter for group in components.groups}) == len(components.groups)


def test_finding_changes_nothing(net):
    before = fingerprint(net.model)
    flags = [p.requires_grad for p in net.model.parameters()], net.model.training
    first, second = coar.find_components(net.model), coar.find_components(net.model)
    assert first == second and first.skipped == second.skipped
    assert fingerprint(net.model) == before
    assert flags == ([p.requires_grad for p in net.model.parameters()], net.model.training)


# --------------------------------------------------------------------------------------------- order, indices and names


def test_order_and_indices(net):
    components = coar.find_components(net.model)
    assert [component.index for component in components] == list(range(len(components)))
    listed = [components[i] for i in range(len(components))]
    assert listed == list(components)
    assert components[-1] == components[len(components) - 1]
    assert components[-len(components)] == components[0]
    names = [name for name, _ in net.model.named_modules()]
    positions = [names.index(group.module) for group in components.groups]
    assert positions == sorted(positions)
    assert [(group, stop - start) for group, start, stop in components.spans()] == [
        (g, g.size) for g in components.groups
    ]
    assert all(0 <= component.position < component.group.size for component in components)


@pytest.mark.parametrize("index", [18, -19, 1000])
def test_index_out_of_range(mlp, index):
    with pytest.raises(IndexError, match=f"{index} of 18"):
        coar.find_components(mlp.model)[index]


def test_names(mlp, convnet):
    of_mlp, of_convnet = coar.find_components(mlp.model), coar.find_components(convnet.model)
    assert str(of_mlp[0]) == "0 neuron 0"
    assert str(of_mlp[8]) == "2 neuron 0"
    assert str(of_mlp[17]) == "4 neuron 2"
    assert str(of_convnet[9]) == "conv2 filter 5"
    assert str(coar.find_components(convnet.model, "input")[1]) == "conv1 input feature 1"
    assert str(coar.find_components(convnet.model, "module")[1]) == "conv2 module 0"


def test_names_are_unique(net):
    names = [str(component) for component in coar.find_components(net.model)]
    # The four matrices of an nn.MultiheadAttention share the module's name.
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("granularity", ["unit", "input", "module"])
def test_json_round_trip(net, granularity):
    components = coar.find_components(net.model, granularity)
    again = Components.from_json(json.loads(json.dumps(components.to_json())))
    assert again == components
    assert again.to_json() == components.to_json()


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: [],
        lambda v: None,
        lambda v: "components",
        lambda v: {},
        lambda v: {"granularity": "unit"},
        lambda v: {**v, "groups": 3},
        lambda v: {**v, "groups": ["x"]},
        lambda v: {**v, "groups": [{}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "unheard_of": 1}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "size": 0}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "size": -4}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "size": "8"}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "block": 0}]},
        lambda v: {**v, "groups": [{**v["groups"][0], "shared_by": 5}]},
    ],
)
def test_json_that_is_no_list_of_components(mlp, damage):
    value = coar.find_components(mlp.model).to_json()
    with pytest.raises(CorruptFileError):
        Components.from_json(damage(value))


# ------------------------------------------------------------------------------------------------- include and exclude


def modules_of(components):
    return [group.module for group in components.groups]


def test_include_and_exclude(gpt2):
    find = coar.find_components
    assert modules_of(find(gpt2.model, include=["transformer.h.0.*"])) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ]
    assert find(gpt2.model, include="*.mlp.*") == find(gpt2.model, include=["*.mlp.*"])
    assert modules_of(find(gpt2.model, include=["*.h.1.*"], exclude=["*.attn.*"])) == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]
    both = find(gpt2.model, include=["*.c_fc", "*.h.0.attn.*"])
    assert modules_of(both) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.mlp.c_fc",
    ]
    assert modules_of(find(gpt2.model, exclude=["*.h.0.*", "*.attn.*"])) == modules_of(
        find(gpt2.model, include=["*.h.1.mlp.*"])
    )


def test_what_was_filtered_is_reported(mlp):
    components = coar.find_components(mlp.model, include=["[02]"], exclude=["0"])
    assert modules_of(components) == ["2"]
    assert {(s.module, s.n_parameters, s.reason) for s in components.skipped} == {
        ("0", 48, "excluded"),
        ("4", 21, "not included"),
    }


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_lists_what_there_is(convnet, argument):
    with pytest.raises(NoComponentsError, match=r"'layer4\.\*'.*conv1, conv2, fc"):
        coar.find_components(convnet.model, **{argument: ["conv*", "layer4.*"]})


def test_everything_excluded(convnet):
    with pytest.raises(NoComponentsError, match=r"conv1, conv2, fc"):
        coar.find_components(convnet.model, exclude=["*"])


def test_unknown_granularity(mlp):
    with pytest.raises(CoarError, match=r"'neurons'.*unit.*input.*module"):
        coar.find_components(mlp.model, "neurons")


def test_a_granularity_that_the_model_lacks():
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    assert len(coar.find_components(depthwise)) == 4
    with pytest.raises(NoComponentsError, match="'input'"):
        coar.find_components(depthwise, "input")


def test_a_model_without_a_known_layer():
    with pytest.raises(NoComponentsError, match=r"LayerNorm.*Linear.*rule"):
        coar.find_components(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))


# ------------------------------------------------------------------------------------- heads, embeddings and the report


@pytest.mark.parametrize(
    ("name", "head", "n_parameters"),
    [("gpt2", "lm_head", 40 * 32), ("bert", "classifier", 96), ("vit", "classifier", 128), ("timm_vit", "head", 160)],
)
def test_heads_are_left_out_and_reported(name, head, n_parameters):
    model = build_net(name).model
    components = coar.find_components(model)
    assert head not in modules_of(components)
    entry = next(skipped for skipped in components.skipped if skipped.module == head)
    assert entry.n_parameters == n_parameters and "head" in entry.reason and entry.module_class == "Linear"


@pytest.mark.parametrize(
    ("name", "head", "size"), [("gpt2", "lm_head", 40), ("bert", "classifier", 3), ("timm_vit", "head", 5)]
)
def test_a_head_that_is_named_counts(name, head, size):
    components = coar.find_components(build_net(name).model, include=[head])
    assert modules_of(components) == [head] and len(components) == size


def test_embeddings_are_left_out_and_reported(gpt2, bert):
    for model, names in (
        (gpt2.model, {"transformer.wte", "transformer.wpe"}),
        (bert.model, {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}),
    ):
        components = coar.find_components(model)
        assert {s.module for s in components.skipped if "embedding" in s.reason} == names
        assert not names & set(modules_of(components))


def test_the_report_covers_every_matrix(net):
    """Each parameter with two or more axes is in a group or in a module that was reported."""
    components = coar.find_components(net.model)
    grouped = {group.parameter for group in components.groups}
    reported = [skipped.module for skipped in components.skipped]
    for name, parameter in net.model.named_parameters():
        owner = name.rpartition(".")[0]
        assert parameter.squeeze().dim() < 2 or name in grouped or owner in reported, name


def test_nothing_is_left_out_of_a_plain_module(mlp):
    components = coar.find_components(mlp.model)
    assert modules_of(components) == ["0", "2", "4"]
    assert not [skipped for skipped in components.skipped if "head" in skipped.reason]


def test_normalisation_is_reported_as_such(convnet):
    skipped = coar.find_components(convnet.model).skipped
    assert {(s.module, s.n_parameters) for s in skipped} == {("bn1", 8), ("bn2", 12)}
    assert all("normalisation" in s.reason for s in skipped)


def test_a_matrix_without_a_rule_is_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = nn.Parameter(torch.randn(3, 4))  # under the name of a weight, it would be taken for one

    skipped = coar.find_components(nn.Sequential(nn.Linear(4, 4), Odd())).skipped
    assert [(s.module, s.module_class, s.n_parameters) for s in skipped] == [("1", "Odd", 12)]
    assert "rule" in skipped[0].reason


# ------------------------------------------------------------------------------------------------- what is used twice


class UsedTwice(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class SharedWeight(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(params=[UsedTwice, SharedWeight])
def sharing(request):
    torch.manual_seed(0)
    return request.param().double()


def by_hand(model, x, kept, granularity="unit"):
    """The forward of both classes above, written out."""
    gates = kept.double()
    weight = model.first.weight * (gates[:, None] if granularity == "unit" else gates)
    return torch.relu(x @ weight.T + model.first.bias) @ weight.T + model.second.bias


@pytest.mark.parametrize("granularity", ["unit", "input"])
@pytest.mark.parametrize("how", ["hooks", "weights"])
def test_what_is_shared_is_counted_once_and_ablated_everywhere(sharing, granularity, how):
    components = coar.find_components(sharing, granularity)
    assert len(components) == 4
    x, kept = torch.randn(3, 4, dtype=torch.float64), torch.tensor([True, False, True, False])
    with coar.ablate(sharing, components, kept, how=how):
        assert torch.allclose(sharing(x), by_hand(sharing, x, kept, granularity), atol=1e-12)
    assert torch.allclose(sharing(x), by_hand(sharing, x, torch.ones(4)), atol=1e-12)


def test_the_second_user_of_a_weight_is_recorded():
    components = coar.find_components(SharedWeight())
    assert components.groups[0].module == "first" and components.groups[0].shared_by == ("second",)


@pytest.mark.parametrize("filters", [{"include": ["second"]}, {"exclude": ["first"]}, {"include": ["first"]}])
def test_what_is_shared_is_ablated_everywhere_whichever_name_is_asked_for(filters):
    # By hooks and by weights alike.
    torch.manual_seed(0)
    model = SharedWeight().double()
    components = coar.find_components(model, **filters)
    assert len(components) == 4
    x, kept = torch.randn(3, 4, dtype=torch.float64), torch.tensor([True, False, True, False])
    for how in ("weights", "hooks"):
        with coar.ablate(model, components, kept, how=how):
            assert torch.allclose(model(x), by_hand(model, x, kept), atol=1e-12), how


def test_either_name_of_a_module_may_be_asked_for():
    # Not only the first one that the walk meets.
    assert len(coar.find_components(UsedTwice(), include=["second"])) == 4


def test_a_head_that_is_tied_to_the_embedding_is_ablated_alike_by_hooks_and_weights(gpt2):
    # GPT-2's head shares its weight with the token embedding: zeroing a row of it also zeroes the token's vector.
    assert gpt2.model.lm_head.weight is gpt2.model.transformer.wte.weight
    net = gpt2.double()
    components = coar.find_components(net.model, include=["lm_head"])
    kept = torch.ones(len(components), dtype=torch.bool)
    kept[net.batch["input_ids"][0, :3]] = False
    outcomes = []
    for how in ("weights", "hooks"):
        with torch.no_grad(), coar.ablate(net.model, components, kept, how=how):
            outcomes.append(net.logits())
    assert torch.allclose(outcomes[0], outcomes[1], atol=1e-9)


# ------------------------------------------------------------------------------------------------------- one's own rule


class KernelLayer(nn.Module):
    """A dense layer that stores its weight as [in, out]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.bias


class DerivedKernelLayer(KernelLayer):
    """Finds the rule of its ancestor."""


@components_module.rule(KernelLayer)
def kernel_layer(module):
    return [Matrix("kernel", output_axis=1, input_axis=0, unit="kernel column")]


@pytest.mark.parametrize(("granularity", "sizes"), [("unit", [5, 3]), ("input", [4, 5]), ("module", [1, 1])])
def test_a_rule_of_ones_own(granularity, sizes):
    torch.manual_seed(0)
    model = nn.Sequential(KernelLayer(4, 5), nn.Tanh(), DerivedKernelLayer(5, 3)).double()
    components = coar.find_components(model, granularity)
    assert components.sizes() == sizes
    assert granularity != "unit" or str(components[1]) == "0 kernel column 1"
    x = torch.randn(6, 4, dtype=torch.float64)
    kept = torch.rand(6, len(components), generator=torch.Generator().manual_seed(1)) > 0.4
    with torch.no_grad():
        with coar.ablate(model, components, kept):
            together = model(x)
        for example in range(6):
            with coar.ablate(model, components, kept[example], how="weights"):
                assert torch.allclose(together[example], model(x)[example], atol=1e-12)
        gates = kept[0].split(sizes)
        columns = [g.double()[None, :] if granularity != "input" else g.double()[:, None] for g in gates]
        hidden = torch.tanh(x[0] @ (model[0].kernel * columns[0]) + model[0].bias)
        expected = hidden @ (model[2].kernel * columns[1]) + model[2].bias
        assert torch.allclose(together[0], expected, atol=1e-12)


def test_the_nearest_ancestors_rule_wins():
    class Nearer(KernelLayer):
        pass

    @components_module.rule(Nearer)
    def nearer(module):
        return [Matrix("kernel", output_axis=1, input_axis=0, unit="nearer")]

    assert components_module.rule_of(Nearer(2, 2)) is nearer
    assert components_module.rule_of(DerivedKernelLayer(2, 2)) is kernel_layer
    assert components_module.rule_of(nn.ReLU()) is None


def test_a_layer_of_its_own_is_a_model():
    layer = nn.Linear(4, 3)
    components = coar.find_components(layer)
    assert len(components) == 3
    kept = torch.tensor([True, False, True])
    x = torch.randn(2, 4)
    for how in ("hooks", "weights"):
        with coar.ablate(layer, components, kept, how=how):
            assert torch.equal(layer(x)[:, 1], layer.bias[1].expand(2))
    assert str(components[1]) == str(components[1]).strip()  # the module's name is empty


def test_a_short_description():
    components = coar.find_components(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert repr(components) == f"Components({len(components)} in {len(components.groups)} groups, granularity 'unit')"
