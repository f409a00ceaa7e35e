"""Ablation: hooks, weights and brute-force zeroing give the same answer, and nothing is left behind."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import NETS, build_net, same_state, state_of
from torch import nn

import hf_coar as coar
from hf_coar import masking
from hf_coar.errors import CoarError, ModelError, ModelMismatchError

GRANULARITIES = ("unit", "input", "module")
HOW = ("hooks", "weights")
TOLERANCE = 1e-9  # in float64


@pytest.fixture(params=GRANULARITIES)
def granularity(request):
    return request.param


@pytest.fixture(params=HOW)
def how(request):
    return request.param


def zero_by_hand(model, components, kept, granularity):
    """A copy of the model in which each ablated component was set to zero by what its module's class says."""
    duplicate = copy.deepcopy(model)
    parameters = dict(duplicate.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for component in components:
            if kept[component.index]:
                continue
            weight = parameters[component.group.parameter]
            transposed = type(duplicate.get_submodule(component.group.module)).__name__ == "Conv1D"  # GPT-2's
            if granularity == "module":
                weight.zero_()
            elif (granularity == "unit") != transposed:
                weight[component.position] = 0
            else:
                weight[:, component.position] = 0
    return duplicate


def ablated(net, components, kept, how, rows=slice(None)):
    with torch.no_grad(), coar.ablate(net.model, components, kept, how=how):
        return net.logits(rows=rows)


def plain(net):
    with torch.no_grad():
        return net.logits()


def far(a, b):
    return float((a - b).detach().abs().max())


# ------------------------------------------------------------------------------------------------- the same, three ways


def test_hooks_weights_and_zeroing_agree(net, granularity, mixed_masks):
    net = net.double()
    components = coar.find_components(net.model, granularity)
    before = plain(net)
    for kept in mixed_masks(4, len(components)):
        with torch.no_grad():
            expected = net.logits(zero_by_hand(net.model, components, kept, granularity))
        assert kept.all() or far(before, expected) > 1e-4, "an ablation that changes nothing tests nothing"
        for how in ("hooks", "weights", "auto"):
            assert far(ablated(net, components, kept, how), expected) < TOLERANCE, how


def test_everything_ablated(net, granularity):
    net = net.double()
    components = coar.find_components(net.model, granularity)
    kept = torch.zeros(len(components), dtype=torch.bool)
    with torch.no_grad():
        expected = net.logits(zero_by_hand(net.model, components, kept, granularity))
    for how in HOW:
        assert far(ablated(net, components, kept, how), expected) < TOLERANCE


def test_each_matrix_alone(net, granularity):
    net = net.double()
    components = coar.find_components(net.model, granularity)
    for group, start, _ in components.spans():
        kept = torch.ones(len(components), dtype=torch.bool)
        kept[start] = False
        with torch.no_grad():
            expected = net.logits(zero_by_hand(net.model, components, kept, granularity))
        for how in HOW:
            assert far(ablated(net, components, kept, how), expected) < TOLERANCE, (group.parameter, how)


@pytest.mark.parametrize("name", ["bert", "timm_vit", "vit"])
def test_a_head_that_was_included_is_ablated(name, mixed_masks):
    net = build_net(name).double()
    everything = coar.find_components(net.model, include=["*"])
    assert len(everything) > len(coar.find_components(net.model))
    kept = mixed_masks(1, len(everything), seed=3)[0]
    kept[-1] = False
    expected = net.logits(zero_by_hand(net.model, everything, kept, "unit"))
    for how in HOW:
        assert far(ablated(net, everything, kept, how), expected) < TOLERANCE


def test_one_mask_an_example_is_one_mask_at_a_time(rows_net, granularity, mixed_masks):
    net = rows_net.double()
    components = coar.find_components(net.model, granularity)
    kept = mixed_masks(4, len(components), seed=1)
    together = ablated(net, components, kept, "auto")
    for example in range(4):
        row = slice(example, example + 1)
        alone = ablated(net, components, kept[example], "weights", rows=row)
        assert far(together[row], alone) < TOLERANCE
    # Left in place in the last row only, the others differ from the plain model.
    assert far(together[3], plain(net)[3]) < TOLERANCE
    assert far(together[:3], plain(net)[:3]) > 1e-4


def test_fractional_gates_agree(net, granularity):
    net = net.double()
    components = coar.find_components(net.model, granularity)
    gates = torch.rand(len(components), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_hooks, by_weights = (ablated(net, components, gates, how) for how in HOW)
    assert far(by_hooks, by_weights) < TOLERANCE
    assert far(by_weights, plain(net)) > 1e-4


@pytest.mark.parametrize("n_positions", [5, 8])
def test_positions_before_examples(granularity, n_positions, mixed_masks):
    # Inside nn.TransformerEncoder(batch_first=False) axis 0 is the position. Eight positions are a multiple of the four
    # examples, so that gates laid along axis 0 would fit, and be wrong.
    net = build_net("transformer_positions_first")
    net.batch["inputs"] = torch.randn(4, n_positions, 16, generator=torch.Generator().manual_seed(0))
    net = net.double()
    components = coar.find_components(net.model, granularity)
    kept = mixed_masks(4, len(components), seed=1)
    together = ablated(net, components, kept, "hooks")
    alone = [ablated(net, components, kept[i], "weights", rows=slice(i, i + 1)) for i in range(4)]
    assert far(together, torch.cat(alone)) < TOLERANCE


class TurnedInPlace(nn.Module):
    """What one layer gives is turned round where it lies, and given to the next."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        turned = self.first(x).transpose_(0, 1)
        return self.second(turned).mean(0)


def test_a_tensor_that_was_turned_in_place_is_looked_at_again(granularity, mixed_masks):
    torch.manual_seed(0)
    model, x = TurnedInPlace().eval(), torch.randn(4, 8, 6)
    components = coar.find_components(model, granularity)
    kept = mixed_masks(4, len(components), seed=1)
    with torch.no_grad():
        with coar.ablate(model, components, kept):
            together = model(x)
        for i in range(4):
            with coar.ablate(model, components, kept[i]):
                torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))


def test_one_mask_an_example_under_another_default_dtype(mixed_masks):
    model, x, before = nn.Linear(6, 3).eval(), torch.randn(4, 6), torch.get_default_dtype()
    components = coar.find_components(model)
    kept = mixed_masks(4, len(components), seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), coar.ablate(model, components, kept):
            together = model(x)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(together, torch.where(kept, model(x), model.bias))


def test_fractional_gates_an_example_agree(rows_net, granularity):
    net = rows_net.double()
    components = coar.find_components(net.model, granularity)
    gates = torch.rand(len(components), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_weights = ablated(net, components, gates, "weights")
    rows = torch.stack([gates, gates, 1 - gates, gates])
    by_rows = ablated(net, components, rows, "hooks")
    assert far(by_rows[[0, 1, 3]], by_weights[[0, 1, 3]]) < TOLERANCE
    assert far(by_rows[2], ablated(net, components, 1 - gates, "weights")[2]) < TOLERANCE


def test_gates_of_nought_and_one_are_masks(net, how, mixed_masks):
    components = coar.find_components(net.model)
    kept = mixed_masks(2, len(components))[0]
    assert torch.equal(ablated(net, components, kept, how), ablated(net, components, kept.float(), how))


def test_zeroing_for_good_is_the_ablation(net, granularity, mixed_masks):
    components = coar.find_components(net.model, granularity)
    kept = mixed_masks(2, len(components))[0]
    expected = ablated(net, components, kept, "weights")
    masking.MaskedModel(net.model, components).ablate_for_good(kept)
    assert torch.equal(plain(net), expected)


# ------------------------------------------------------------------------------------------------- nothing ablated


def test_nothing_ablated_changes_nothing_bit_for_bit(net, granularity, how):
    components = coar.find_components(net.model, granularity)
    before = plain(net)
    for kept in (torch.ones(len(components), dtype=torch.bool), torch.ones(len(components))):
        assert torch.equal(ablated(net, components, kept, how), before)
        if how == "hooks":
            assert torch.equal(ablated(net, components, kept.expand(4, -1), how), before)


def test_gates_of_one_that_want_a_gradient_change_nothing_bit_for_bit(rows_net, granularity):
    net = rows_net
    components = coar.find_components(net.model, granularity)
    gates = torch.ones(4, len(components), requires_grad=True)
    with coar.ablate(net.model, components, gates):
        after = net.logits()
    assert after.requires_grad
    if net.has_attention_patch:  # the library's fused kernel rounds otherwise
        assert torch.allclose(after, net.logits(), atol=1e-5)
    else:
        assert torch.equal(after.detach(), plain(net))


def test_an_example_without_ablation_beside_others_is_untouched_bit_for_bit(rows_net, granularity, mixed_masks):
    net = rows_net
    components = coar.find_components(net.model, granularity)
    kept = mixed_masks(4, len(components))
    after, before = ablated(net, components, kept, "hooks")[3], plain(net)[3]
    if net.has_attention_patch:
        assert torch.allclose(after, before, atol=1e-5)
    else:
        assert torch.equal(after, before)


# -------------------------------------------------------------------------------------------------------- gradients


def test_gradients_match_finite_differences(rows_net, granularity):
    net = rows_net.double()
    components = coar.find_components(net.model, granularity)
    generator = torch.Generator().manual_seed(4)
    gates = 0.2 + 0.7 * torch.rand(4, len(components), generator=generator, dtype=torch.float64)
    gates.requires_grad_()
    with coar.ablate(net.model, components, gates):
        logits = net.logits()
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), gates)
    assert gradient.abs().max() > 1e-3
    step = 1e-5
    largest = gradient.abs().flatten().topk(2).indices.tolist()
    for place in [*largest, *torch.randint(0, gates.numel(), (4,), generator=generator).tolist()]:
        example, component = divmod(place, len(components))
        values = []
        for sign in (1, -1):
            moved = gates[example].detach().clone()
            moved[component] += sign * step
            row = slice(example, example + 1)  # by the weights, which know nothing of hooks
            values.append((ablated(net, components, moved, "weights", rows=row) * direction[row]).sum())
        difference = float(values[0] - values[1]) / (2 * step)
        assert float(gradient[example, component]) == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_shared_gates_get_the_sum_of_the_gradients(convnet):
    components = coar.find_components(convnet.model)
    rows = torch.full((4, len(components)), 0.6, requires_grad=True)
    shared = torch.full((len(components),), 0.6, requires_grad=True)
    gradients = []
    for gates in (rows, shared):
        with coar.ablate(convnet.model, components, gates):
            gradients.append(torch.autograd.grad(convnet.logits().square().sum(), gates)[0])
    assert torch.allclose(gradients[0].sum(0), gradients[1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- nothing is left behind


class Interruption(Exception):
    pass


def run_forward(net):
    net.logits()


def raise_in_block(net):
    raise Interruption


def interrupt(net):
    raise KeyboardInterrupt


def raise_in_forward(net):
    raise_in_forward.armed = True
    try:
        net.logits()
    finally:
        raise_in_forward.armed = False


raise_in_forward.armed = False


def inner_layer(model):
    """A layer in the middle that runs as a module."""
    inside_attention = [m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D", "Conv2d")]
    layers = [m for m in layers if m not in inside_attention]
    return layers[len(layers) // 2]


def check_nothing_survives(net, kept, how, action, error):
    """Whatever ends the block, the model is as it was, and the user's hook ran with every forward."""
    seen = []

    def deep_inside(module, inputs, output):
        seen.append(module)
        if raise_in_forward.armed:
            raise OSError("in the middle of a forward")

    inner_layer(net.model).register_forward_hook(deep_inside)
    components = coar.find_components(net.model, "input" if kept == "input rows" else "unit")
    mask = torch.rand(4, len(components), generator=torch.Generator().manual_seed(0)) > 0.3
    mask = mask if kept.endswith("rows") else mask[0]
    before, logits = state_of(net.model), plain(net)
    seen.clear()
    outcome = None
    try:
        with torch.no_grad(), coar.ablate(net.model, components, mask, how=how):
            assert not same_state(net.model, before), "inside the block something must be changed"
            action(net)
    except (Interruption, KeyboardInterrupt, OSError) as caught:
        outcome = type(caught)
    assert outcome is error
    assert same_state(net.model, before)
    assert bool(seen) == (action in (run_forward, raise_in_forward))
    assert torch.equal(plain(net), logits)


ENDINGS = pytest.mark.parametrize(
    ("action", "error"),
    [(run_forward, None), (raise_in_block, Interruption), (interrupt, KeyboardInterrupt), (raise_in_forward, OSError)],
)


@ENDINGS
def test_nothing_survives(net, how, action, error):
    check_nothing_survives(net, "one mask", how, action, error)


@ENDINGS
@pytest.mark.parametrize("kept", ["unit rows", "input rows"])
def test_nothing_survives_of_one_mask_an_example(rows_net, kept, action, error):
    check_nothing_survives(rows_net, kept, "hooks", action, error)


def test_nothing_survives_an_error_at_the_entrance(net, how):
    components = coar.find_components(net.model)
    before = state_of(net.model)
    with pytest.raises(CoarError):
        with coar.ablate(net.model, components, torch.ones(3, dtype=torch.bool), how=how):
            pytest.fail("entered")
    assert same_state(net.model, before)


def test_gradients_do_not_reach_the_parameters_flags(rows_net):
    net = rows_net
    components = coar.find_components(net.model)
    before = state_of(net.model)
    gates = torch.full((4, len(components)), 0.5, requires_grad=True)
    with coar.ablate(net.model, components, gates):
        torch.autograd.grad(net.logits().sum(), gates)
    assert same_state(net.model, before)


def test_the_users_hooks_run_and_survive(net, how, mixed_masks):
    counts = {"pre": 0, "post": 0}

    def pre(module, inputs):
        counts["pre"] += 1

    def post(module, inputs, output):
        counts["post"] += 1

    attention = (m for m in net.model.modules() if isinstance(m, nn.MultiheadAttention))
    module = next(attention, None) or next(m for m in net.model.modules() if isinstance(m, nn.Linear))
    module.register_forward_pre_hook(pre)
    module.register_forward_hook(post)
    before = state_of(net.model)
    components = coar.find_components(net.model)
    ablated(net, components, mixed_masks(2, len(components))[0], how)
    assert counts == {"pre": 1, "post": 1}
    assert same_state(net.model, before)
    plain(net)
    assert counts == {"pre": 2, "post": 2}


@pytest.mark.parametrize("granularity", ["unit", "input"])
def test_a_users_hook_may_change_what_goes_in_and_out(mlp, how, granularity):
    # The gate acts on what the layer gives, before the user's hook sees it.
    net = mlp.double()
    net.model[0].register_forward_hook(lambda module, inputs, output: output * 2 + 1)
    net.model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 + 1,))
    components = coar.find_components(net.model, granularity)
    kept = torch.rand(len(components), generator=torch.Generator().manual_seed(0)) > 0.4
    expected = net.logits(zero_by_hand(net.model, components, kept, granularity))
    assert far(ablated(net, components, kept, how), expected) < TOLERANCE


@pytest.mark.parametrize("how", ["hooks"])
def test_a_forward_that_the_user_replaced_survives(transformer, how):
    # Such as accelerate's hooks leave on an instance.
    attention = next(m for m in transformer.model.modules() if isinstance(m, nn.MultiheadAttention))
    original, calls = attention.forward, []

    def replaced(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    attention.forward = replaced
    components = coar.find_components(transformer.model)
    before = state_of(transformer.model)
    ablated(transformer, components, torch.zeros(len(components), dtype=torch.bool), how)
    assert same_state(transformer.model, before)
    plain(transformer)
    assert calls


# ------------------------------------------------------------------------------------------------------ nested blocks


@pytest.mark.parametrize("inner", HOW)
@pytest.mark.parametrize("outer", HOW)
def test_nested_blocks_ablate_both_and_unwind(net, outer, inner, mixed_masks):
    # The inner block must add to what the outer one did to nn.MultiheadAttention, and give it back when it ends.
    net = net.double()
    components = coar.find_components(net.model)
    a, b, _ = mixed_masks(3, len(components), seed=7)
    before = state_of(net.model)
    alone, both, nothing = (ablated(net, components, kept, "weights") for kept in (a, a & b, torch.ones_like(a)))
    with torch.no_grad(), coar.ablate(net.model, components, a, how=outer):
        assert far(net.logits(), alone) < TOLERANCE
        with coar.ablate(net.model, components, b, how=inner):
            assert far(net.logits(), both) < TOLERANCE
        assert far(net.logits(), alone) < TOLERANCE
    assert far(plain(net), nothing) < TOLERANCE
    assert same_state(net.model, before)


def test_the_same_model_twice_in_a_row(net, mixed_masks, how):
    components = coar.find_components(net.model)
    a, b, _ = mixed_masks(3, len(components), seed=8)
    first = ablated(net, components, a, how)
    ablated(net, components, b, how)
    assert torch.equal(ablated(net, components, a, how), first)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: torch.ones(n - 1, dtype=torch.bool), r"\[17\].*\[18\]"),
        (lambda n: torch.ones(n, 4, dtype=torch.bool), r"\[18, 4\].*\[examples, 18\]"),
        (lambda n: torch.ones(1, 1, n, dtype=torch.bool), r"\[1, 1, 18\]"),
        (lambda n: torch.tensor(True), r"\[\]"),
        (lambda n: torch.ones(n, dtype=torch.int64), "int64"),
        (lambda n: [1] * n, "int64"),
        (lambda n: torch.full((n,), 1.25), r"1\.25"),
        (lambda n: torch.full((n,), -0.5), r"-0\.5"),
        (lambda n: torch.tensor([float("nan")] + [1.0] * (n - 1)), "nan"),
        (lambda n: torch.full((n,), float("inf")), "inf"),
        (lambda n: torch.ones(n, dtype=torch.complex64), "complex64"),
    ],
)
def test_kept_that_makes_no_sense(mlp, how, make, message):
    components = coar.find_components(mlp.model)
    with pytest.raises(CoarError, match=message):
        with coar.ablate(mlp.model, components, make(len(components)), how=how):
            pass


def test_kept_may_be_a_list_or_an_array(mlp, how):
    components = coar.find_components(mlp.model)
    kept = torch.ones(18, dtype=torch.bool)
    kept[3] = False
    expected = ablated(mlp, components, kept, how)
    assert torch.equal(ablated(mlp, components, kept.tolist(), how), expected)
    assert torch.equal(ablated(mlp, components, kept.numpy(), how), expected)


def test_unknown_how(mlp):
    with pytest.raises(CoarError, match=r"'magic'.*'hooks'"):
        with coar.ablate(mlp.model, coar.find_components(mlp.model), torch.ones(18, dtype=torch.bool), how="magic"):
            pass


def test_rows_with_weights_are_an_error(mlp):
    components = coar.find_components(mlp.model)
    with pytest.raises(CoarError, match=r"\[4, 18\].*hooks"):
        with coar.ablate(mlp.model, components, torch.ones(4, 18, dtype=torch.bool), how="weights"):
            pass


@pytest.mark.parametrize("n_rows", [3, 8, 2])
def test_rows_that_do_not_fit_the_batch_are_an_error(mlp, n_rows):
    # 2 rows for a batch of 4 are not two entries an example, as windowed attention has them.
    components = coar.find_components(mlp.model)
    kept = torch.ones(n_rows, 18, dtype=torch.bool)
    kept[:, 3] = False
    before = state_of(mlp.model)
    with pytest.raises(CoarError, match=f"{n_rows} rows.* 4"):
        ablated(mlp, components, kept, "hooks")
    assert same_state(mlp.model, before)


@pytest.mark.parametrize("inputs", [torch.randn(4, 9), torch.randint(0, 5, (4, 6)), {"inputs": torch.randn(4, 6)}])
def test_a_batch_that_the_model_does_not_take_is_no_matter_of_masks(mlp, inputs):
    components = coar.find_components(mlp.model)
    kept = torch.ones(4, 18, dtype=torch.bool)
    kept[:, 3] = False
    before = state_of(mlp.model)
    with pytest.raises(ModelError, match="does not run on the batch, whatever is ablated") as raised:
        with coar.ablate(mlp.model, components, kept):
            mlp.model(**inputs) if isinstance(inputs, dict) else mlp.model(inputs)
    assert "one mask for all" not in str(raised.value) and "[4, " in str(raised.value)
    assert same_state(mlp.model, before)


def test_no_rows_at_all_are_an_error(mlp):
    # An empty mask must not pass for one that ablates nothing.
    components = coar.find_components(mlp.model)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(CoarError, match=r"\[0, 18\]"):
            ablated(mlp, components, torch.zeros(0, 18, dtype=dtype), "hooks")


@pytest.mark.parametrize(("one", "other"), [(a, b) for a in NETS for b in ("mlp", "gpt2", "convnet") if a != b])
def test_another_models_components_are_an_error(one, other, how):
    components = coar.find_components(build_net(other).model)
    net = build_net(one)
    before = state_of(net.model)
    with pytest.raises(ModelMismatchError, match=r"expected"):
        with coar.ablate(net.model, components, torch.zeros(len(components), dtype=torch.bool), how=how):
            pytest.fail("entered")
    assert same_state(net.model, before)


class TiedAutoencoder(nn.Module):
    """Decodes by the weight of its encoder, which also runs as a module; or reads no more of it than its type."""

    def __init__(self, tied=True):
        super().__init__()
        self.encoder, self.hidden, self.tied = nn.Linear(4, 5), nn.Linear(5, 5), tied

    def forward(self, x):
        coded = torch.relu(self.hidden(torch.relu(self.encoder(x.type_as(self.encoder.weight)))))
        return F.linear(coded, self.encoder.weight.t()) if self.tied else coded


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_weight_that_is_read_outside_of_its_module_as_well(granularity):
    torch.manual_seed(0)
    model, x = TiedAutoencoder().double(), torch.randn(3, 4).double()
    components = coar.find_components(model, granularity)
    before, rows = state_of(model), torch.rand(3, len(components)) > 0.4
    rows[:, 0] = False
    with torch.no_grad(), coar.ablate(model, components, rows):
        by_rows = model(x)
    by_hand = [zero_by_hand(model, components, row, granularity)(x[i : i + 1]) for i, row in enumerate(rows)]
    assert far(by_rows, torch.cat(by_hand)) < TOLERANCE
    with pytest.raises(CoarError, match=r"'encoder\.weight' outside of 'encoder'.*how='weights'"):
        with coar.ablate(model, components, rows[0], how="hooks"):
            model(x)
    with pytest.raises(CoarError, match=r"nothing but zero can stand in"):
        with coar.ablate(model, coar.find_components(model, granularity, ablation=coar.Mean([{"x": x}])), rows):
            model(x)
    assert same_state(model, before)


def test_gates_have_gradients_where_a_weight_is_read_outside_of_its_module():
    torch.manual_seed(0)
    model, x = TiedAutoencoder().double(), torch.randn(2, 4).double()
    components = coar.find_components(model)
    masked, step = masking.MaskedModel(model, components), 1e-6

    def outputs(gates):
        with masked.gated(gates.split(components.sizes(), 1)):
            return model(x).sum(1)

    gates = torch.full((2, len(components)), 0.7, dtype=torch.float64, requires_grad=True)
    (gradients,) = torch.autograd.grad(outputs(gates).sum(), gates)
    moved = gates.detach() + step * torch.nn.functional.one_hot(torch.tensor([0, 1]), len(components))
    expected = (outputs(moved) - outputs(gates)) / step
    assert torch.allclose(gradients[[0, 1], [0, 1]], expected.detach(), atol=1e-4)


def test_a_weight_of_which_no_value_is_read_outside_of_its_module_is_gated_there(how):
    model, x = TiedAutoencoder(tied=False), torch.randn(3, 4)
    components = coar.find_components(model)
    kept = torch.arange(len(components)) % 2 == 0
    with torch.no_grad(), coar.ablate(model, components, kept, how=how):
        found = model(x)
    assert torch.allclose(found, zero_by_hand(model, components, kept, "unit")(x), atol=1e-6)


def test_a_narrower_model_of_the_same_kind_is_an_error(mlp, how):
    components = coar.find_components(mlp.model)
    narrow = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(ModelMismatchError, match=r"8.*0\.weight.*\(5, 6\)"):
        with coar.ablate(narrow, components, torch.zeros(18, dtype=torch.bool), how=how):
            pass


class ReadsAWeight(nn.Module):
    """Uses the weight of a linear layer without running the layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.hidden = nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(torch.relu(self.first(x)), self.hidden.weight, self.hidden.bias)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_module_that_hooks_cannot_reach_is_named(granularity):
    torch.manual_seed(0)
    model, x = ReadsAWeight(), torch.randn(2, 4)
    components = coar.find_components(model, granularity)
    before = state_of(model)
    kept = torch.ones(len(components), dtype=torch.bool)
    kept[-1] = False
    with pytest.raises(CoarError, match=r"hidden.*weights") as caught:
        with coar.ablate(model, components, kept, how="hooks"):
            model(x)
    assert "first" not in str(caught.value)
    # With one mask an example the model has been watched, and the weight is scaled in what does run around it.
    with coar.ablate(model, components, kept.expand(2, -1)):
        by_rows = model(x)
    assert torch.allclose(by_rows, zero_by_hand(model, components, kept, granularity)(x), atol=1e-6)
    assert same_state(model, before)
    with coar.ablate(model, components, kept) as inside:
        by_weights = inside(x)
    assert torch.equal(by_weights, zero_by_hand(model, components, kept, granularity)(x))
    # What hooks do reach is no error, whatever else is in the model.
    with coar.ablate(model, components, kept.flip(0), how="hooks"):
        model(x)


class CallsByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 3)

    def forward(self, x):
        return self.hidden(input=x)


@pytest.mark.parametrize("granularity", ["unit", "input"])
def test_a_module_that_is_called_by_keyword(granularity):
    # `layer(input=x)` has no positional input.
    torch.manual_seed(0)
    model, x = CallsByKeyword(), torch.randn(2, 4)
    components = coar.find_components(model, granularity)
    kept = torch.tensor([True, False] + [True] * (len(components) - 2))
    with coar.ablate(model, components, kept, how="hooks"):
        by_hooks = model(x)
    with coar.ablate(model, components, kept, how="weights"):
        assert torch.allclose(by_hooks, model(x), atol=1e-6)


def test_attention_that_is_called_in_every_way_its_signature_allows():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True).double().eval()
    components = coar.find_components(attention)
    gates = torch.rand(len(components), dtype=torch.float64)
    q, k, v = (torch.randn(3, n, 8, dtype=torch.float64) for n in (4, 5, 5))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    causal = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    calls = [
        lambda: attention(q, k, v),
        lambda: attention(query=q, key=k, value=v, key_padding_mask=padding, need_weights=False),
        lambda: attention(q, k, v, average_attn_weights=False),
        lambda: attention(q, q, q, attn_mask=causal),
        lambda: attention(q, q, q, None, False, causal, True, True),
        lambda: attention(q[0], k[0], v[0]),
    ]
    for number, call in enumerate(calls):
        outcomes = []
        for how in HOW:
            with torch.no_grad(), coar.ablate(attention, components, gates, how=how):
                outcomes.append(call())
        assert far(outcomes[0][0], outcomes[1][0]) < TOLERANCE, number
        assert (outcomes[0][1] is None) == (outcomes[1][1] is None)
        assert outcomes[0][1] is None or far(outcomes[0][1], outcomes[1][1]) < TOLERANCE, number


def test_the_replaced_attention_takes_what_the_library_gives():
    """A new argument of torch's `nn.MultiheadAttention.forward` must not be lost inside the block."""
    attention = nn.MultiheadAttention(8, 2)
    components = coar.find_components(attention)
    with coar.ablate(attention, components, torch.zeros(len(components), dtype=torch.bool), how="hooks"):
        inside = list(inspect.signature(attention.forward).parameters)
    assert inside == list(inspect.signature(attention.forward).parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_of_another_dtype_leave_the_models_dtype(convnet, how, dtype):
    components = coar.find_components(convnet.model)
    gates = torch.full((len(components),), 0.5, dtype=dtype)
    logits = ablated(convnet, components, gates, how)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, ablated(convnet, components, gates.float(), how))
