"""What stands in for ablated components: the laws, for every component rule and every registered ablation."""

import copy
import dataclasses
import functools
from contextlib import contextmanager

import pytest
import torch
from rule_cases import BYPASSED, EXAMPLES, MIXED, MODELS, POSITIONS, WIDTH, ListedExperts, ablated, build, masks
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import hf_coar as coar
from hf_coar import masking
from hf_coar.errors import CoarError, DataError, ModelMismatchError, NoComponentsError
from hf_coar.masking import ABLATIONS

GRANULARITIES = coar.components.GRANULARITIES


def drawn(seed, count=EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, POSITIONS, WIDTH, dtype=torch.float64, generator=generator)


@pytest.fixture
def x():
    return drawn(1)


# What each ablation is made of in these tests; a new one is tested by being registered and named here.
MADE = {
    "zero": lambda: "zero",
    "mean": lambda: coar.Mean([{"inputs": drawn(2)}, {"inputs": drawn(3, 2)}]),
    "values": lambda: None,
    "resample": lambda: coar.Resample([{"inputs": drawn(4, 5)}], seed=3),
    "patch": lambda: coar.Patch({"inputs": drawn(5)}),
}
VALUED = [name for name in MADE if name != "zero"]
# Of the kinds that share all but where the values come from, a few unlike rules by default, the others on demand.
UNLIKE = ("linear", "grouped", "attention", "LoRA", "positions first", "run twice", "experts in a list")
CASES = [
    pytest.param(name, kind, marks=[] if kind == "mean" or name in UNLIKE else pytest.mark.slow)
    for name in MODELS
    for kind in VALUED
]


def test_every_ablation_has_a_case():
    assert set(MADE) == {name for name, kind in ABLATIONS.items() if kind.__module__.startswith("hf_coar.")}


def found(name, model, granularity, ablation):
    """Components with what stands in, of the modules where something can; skips where there are none."""
    exclude = [BYPASSED[name]] if name in BYPASSED else []
    try:
        plain = coar.find_components(model, granularity, exclude=exclude)
        exclude += [g.module for g in plain.groups if g.site not in masking.masked_model.TAKE_VALUES]
        plain = coar.find_components(model, granularity, exclude=exclude)
        if ablation in ("resample", "patch"):
            exclude += [g.module for g in plain.groups if g.routed]
        plain = coar.find_components(model, granularity, exclude=exclude)
    except NoComponentsError:
        pytest.skip("has none that values can stand in for")
    made = MADE[ablation]()
    if ablation == "values":
        made = coar.Values(torch.linspace(-1, 1, len(plain)))
    return coar.find_components(model, granularity, exclude=exclude, ablation=made)


@contextmanager
def by_hand(model, components, kept, values):
    """Hooks that write values over features, written without the package: `values` of (group, run, like)."""
    handles, runs = [], {}

    def written(group, activation):
        run = runs.get(group.parameter, 0)
        runs[group.parameter] = run + 1
        features = activation.clone().movedim(group.feature_axis, -1)
        ends = values(group, run, activation).movedim(group.feature_axis, -1)
        gone = ~kept_of[group.parameter]
        gone = gone.expand(features.shape[-1]) if group.whole else gone.repeat_interleave(group.block)
        features[..., gone] = ends.expand_as(features)[..., gone]
        return features.movedim(-1, group.feature_axis)

    kept_of = dict(zip([g.parameter for g in components.groups], kept.split(components.sizes()), strict=True))
    for group in components.groups:
        module = model.get_submodule(group.module)
        if group.site == "output":
            hook = module.register_forward_hook(lambda m, i, o, g=group: written(g, o))
        else:
            hook = module.register_forward_pre_hook(lambda m, i, g=group: (written(g, i[0]), *i[1:]))
        handles.append(hook)
    try:
        with torch.no_grad():
            yield model
    finally:
        for handle in handles:
            handle.remove()


def seen_by_hand(model, components, *inputs):
    """Activations of every group and run, noted by hooks of our own."""
    seen = {group.parameter: [] for group in components.groups}
    handles = []
    for group in components.groups:
        module, notes = model.get_submodule(group.module), seen[group.parameter]
        if group.site == "output":
            handles.append(module.register_forward_hook(lambda m, i, o, n=notes: n.append(o.clone())))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, i, n=notes: n.append(i[0].clone())))
    with torch.no_grad():
        for one in inputs:
            model(one)
    for handle in handles:
        handle.remove()
    return seen


def expected_ends(ablation, model, components, x):
    """What is to stand in by the definition of each ablation, without the package's own recording."""
    if ablation == "mean":
        seen = seen_by_hand(model, components, *(batch["inputs"] for batch in MADE["mean"]().data))
        ends = {}
        for group in components.groups:
            flat = [a.movedim(group.feature_axis, -1).flatten(0, -2) for a in seen[group.parameter]]
            ends[group.parameter] = torch.cat(flat).mean(0).float().double()
        return lambda group, run, like: along(ends[group.parameter], group, like)
    if ablation == "values":
        parts = torch.linspace(-1, 1, len(components)).split(components.sizes())
        ends = {group.parameter: part for group, part in zip(components.groups, parts, strict=True)}
        ends = {g.parameter: ends[g.parameter].repeat_interleave(1 if g.whole else g.block) for g in components.groups}
        return lambda group, run, like: along(ends[group.parameter].double(), group, like)
    others = MADE[ablation]().joined({"inputs": x})["partner_inputs"]
    seen = seen_by_hand(model, components, others)
    return lambda group, run, like: seen[group.parameter][run]


def along(values, group, like):
    shape = [1] * like.dim()
    shape[like.dim() + group.feature_axis] = -1
    return values.to(like.dtype).view(shape)


def hookable(components):
    return all(group.site in ("output", "input") for group in components.groups)


def tolerance(name):
    return 1e-5 if name in MIXED else 1e-10


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("name", "ablation"), CASES)
def test_gates_of_zero_give_what_writing_it_by_hand_gives(name, ablation, granularity, x):
    model = build(name)
    components = found(name, model, granularity, ablation)
    if not hookable(components):
        pytest.skip("no hook of our own reaches it; its weights do, below")
    for kept in masks(2, len(components)):
        with by_hand(model, components, kept, expected_ends(ablation, model, components, x)):
            expected = model(x)
        assert torch.allclose(ablated(model, components, kept, x, "hooks"), expected, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("granularity", ["unit", pytest.param("input", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "ablation"), CASES)
def test_the_other_laws(name, ablation, granularity, x):
    model, close = build(name), tolerance(name)
    components = found(name, model, granularity, ablation)
    with torch.no_grad():
        plain = model(x)
    # Gates of one leave every bit, where the model is run as it is.
    ones = torch.ones(len(components), dtype=torch.float64, requires_grad=True)
    with torch.no_grad(), masking.MaskedModel(model, components).gated(ones.split(components.sizes())):
        after = model(x)
    rounds = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert torch.allclose(after, plain, rtol=0, atol=close) if rounds else torch.equal(after, plain)
    # One mask an example is each mask for its example.
    kept = masks(EXAMPLES, len(components))
    together = ablated(model, components, kept, x)
    for example in range(EXAMPLES):
        alone = ablated(model, components, kept[example], x, "hooks")[example]
        assert torch.allclose(together[example], alone, rtol=0, atol=close)
    # Gradients agree with differences.
    gates = (0.2 + 0.6 * torch.rand(EXAMPLES, len(components), dtype=torch.float64)).requires_grad_()
    with coar.ablate(model, components, gates):
        output = model(x).sum()
    (gradient,) = torch.autograd.grad(output, gates, allow_unused=True)
    gradient = torch.zeros_like(gates) if gradient is None else gradient  # of a router that takes the largest
    direction, step = torch.randn_like(gates), 1e-3 if name in MIXED else 1e-6
    values = [ablated(model, components, gates.detach() + s * step * direction, x).sum() for s in (1, -1)]
    difference = float(values[0] - values[1]) / (2 * step)
    accuracy = {"rel": 1e-2 if name in MIXED else 1e-4, "abs": 1e-5}
    assert float((gradient * direction).sum()) == pytest.approx(difference, **accuracy)
    # Nothing is left behind.
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    # Hooks and weights agree, where weights can say it; else the reason is told.
    reasons = [masking.constants.reason_against(model, group, components.stand_in) for group in components.groups]
    state = copy.deepcopy(model.state_dict())
    if any(reasons):
        with pytest.raises(CoarError, match="cannot be written into the weights"):
            ablated(model, components, torch.zeros(len(components), dtype=torch.bool), x, "weights")
    else:
        for mask in (kept[0], gates.detach()[0]):
            if mask.dtype != torch.bool and any(group.by_weights == "zero" for group in components.groups):
                continue
            by_hooks, by_weights = (ablated(model, components, mask, x, how) for how in ("hooks", "weights"))
            assert torch.allclose(by_hooks, by_weights, rtol=0, atol=max(close, 1e-6))  # float32 means, float64 model
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_a_rule_that_cannot_take_values_says_so_before_the_first_pass(x):
    model = build("LSTM")
    for ablation in (coar.Mean([{"inputs": x}]), coar.Values(torch.zeros(1)), coar.Patch({"inputs": x})):
        with pytest.raises(CoarError, match=r"cannot stand in for the components of .*weight_ih_l0.*exclude"):
            coar.find_components(model, ablation=ablation)


def test_experts_in_a_list_have_means_and_no_partners(x):
    model = ListedExperts().double()
    components = coar.find_components(model, "expert", ablation=coar.Mean([{"inputs": drawn(2, 9)}]))
    kept = torch.tensor([False, True, True])
    with by_hand(model, components, kept, lambda g, r, like: components.stand_in.values[g.parameter].double()):
        expected = model(x)
    assert torch.allclose(ablated(model, components, kept, x), expected, rtol=0, atol=1e-12)
    with pytest.raises(CoarError, match=r"experts.*other tokens"):
        coar.find_components(model, "expert", ablation=coar.Patch({"inputs": x}))


def test_means_at_every_position(x):
    model = build("linear")
    data = [{"inputs": drawn(2)}]
    components = coar.find_components(model, ablation=coar.Mean(data, per_position=True))
    (seen,) = seen_by_hand(model, components, data[0]["inputs"])["layer.weight"]
    kept = torch.tensor([False, True, False, True, True])
    with by_hand(model, components, kept, lambda *_: seen.mean(0).float().double()):
        expected = model(x)
    assert torch.allclose(ablated(model, components, kept, x), expected, rtol=0, atol=1e-10)
    with pytest.raises(CoarError, match=r"every position.*same length"):
        ablated(model, components, kept, x[:, :3])
    with pytest.raises(CoarError, match="another value for every position"):
        ablated(model, components, kept, x, "weights")
    with pytest.raises(CoarError, match="no mean for every position"):
        coar.find_components(build("positions first"), ablation=coar.Mean(data, per_position=True))


def test_padding_is_not_averaged():
    torch.manual_seed(0)
    model = Masked()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])  # as many examples as positions
    inputs = torch.randn(3, 3, 4)
    padded = {"x": inputs, "attention_mask": mask}
    mean = coar.find_components(model, ablation=coar.Mean([padded])).stand_in.values["layer.weight"]
    expected = model.layer(inputs)[mask.bool()].mean(0)
    assert torch.allclose(mean, expected, atol=1e-6)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.layer(x) * attention_mask[..., None]).sum(1)


# ------------------------------------------------------------------------------------------------------ runs and files


class Small(nn.Module):
    """A convolution without a bias before its normalisation, and a linear layer that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.out = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.hidden(self.norm(self.conv(inputs)).relu().mean((2, 3))).relu())


def small():
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.norm.bias.normal_()
    return model


def images(seed=0, n_batches=2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4)
    return [{"inputs": torch.randn(4, 3, 6, 6, generator=generator), "labels": labels} for _ in range(n_batches)]


def of_kind(kind, data):
    return {"mean": coar.Mean, "resample": coar.Resample, "patch": lambda d: coar.Patch(images(7))}[kind](data)


@functools.cache
def of_zero(method):
    """Weights where zero stands in."""
    model = small()
    components = coar.find_components(model, exclude="out")
    return coar.attribute(model, images(), components, method=method, ablated_fraction=0.2, progress=False).weights


@pytest.mark.parametrize("method", [coar.PathGradient(rounds=8), coar.Regression(n_masks=60)])
@pytest.mark.parametrize("kind", ["mean", "resample", "patch"])
def test_attributions_are_of_what_stands_in(kind, method, tmp_path):
    model, data = small(), images()
    components = coar.find_components(model, exclude="out", ablation=of_kind(kind, data))
    attributions = coar.attribute(model, data, components, method=method, ablated_fraction=0.2, progress=False)
    report = coar.evaluate(attributions, model, data, fractions=[0.2], n_masks=40, progress=False)
    assert report.correlation[0.2] > 0.9
    assert not torch.allclose(of_zero(method), attributions.weights, atol=1e-2)
    # From the files, the same: means are in them, partners are given again and known by their hashes.
    attributions.save_pretrained(tmp_path / "a")
    loaded = coar.Attributions.from_pretrained(tmp_path / "a")
    assert loaded.components == attributions.components and loaded.provenance.ablation["name"] == kind
    assert kind in (tmp_path / "a" / "README.md").read_text()
    if kind == "mean":
        again = coar.evaluate(loaded, model, data, fractions=[0.2], n_masks=40, progress=False)
    else:
        with pytest.raises(DataError, match=r"files do not hold those.*paired\(data\)"):
            coar.evaluate(loaded, model, data, fractions=[0.2], progress=False)
        with pytest.raises(DataError):
            other = coar.Patch(images(8)).paired(data)
            coar.evaluate(loaded, model, other, fractions=[0.2], n_masks=5, progress=False)
        paired = of_kind(kind, data).paired(data)
        again = coar.evaluate(loaded, model, paired, fractions=[0.2], n_masks=40, progress=False)
    assert torch.equal(again.measured[0.2], report.measured[0.2])


def test_altered_values_are_not_read(tmp_path):
    model, data = small(), images()
    components = coar.find_components(model, ablation=coar.Mean(data))
    coar.attribute(model, data, components, progress=False).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "stand_ins.safetensors"
    other = coar.find_components(model, ablation=coar.Mean(images(5)))
    coar.attribute(model, data, other, progress=False).save_pretrained(tmp_path / "b")
    path.write_bytes((tmp_path / "b" / path.name).read_bytes())
    with pytest.raises(CoarError, match="not what the components were attributed with"):
        coar.Attributions.from_pretrained(tmp_path / "a")


def test_a_run_does_not_go_on_with_something_else_standing_in(tmp_path):
    model, data = small(), images()
    coar.attribute(model, data, coar.find_components(model), out=tmp_path / "run", progress=False)
    components = coar.find_components(model, ablation=coar.Mean(data))
    with pytest.raises(CoarError, match="ablation"):
        coar.attribute(model, data, components, out=tmp_path / "run", progress=False)


def test_masks_together_and_batches_of_another_size_change_nothing():
    model, data = small(), images()
    components = coar.find_components(model, ablation=coar.Patch(images(7)))
    whole = [{name: torch.cat([batch[name] for batch in data]) for name in data[0]}]
    method = coar.Regression(n_masks=40)
    one = coar.attribute(model, data, components, method=method, progress=False)
    with coar.running(masks_together=4):
        other = coar.attribute(model, whole, components, method=method, progress=False)
    assert torch.allclose(one.weights, other.weights, atol=1e-4)


def test_partners_run_once_a_batch_for_many_masks():
    model, (batch, _) = small(), images()
    components = coar.find_components(model, ablation=coar.Patch(images(7)))
    runs = []
    model.conv.register_forward_hook(lambda *_: runs.append(1))
    masked = masking.MaskedModel(model, components)
    (batch,) = coar.Patch(images(7)[:1]).paired([batch])
    batch = {name: value for name, value in batch.items() if not name.endswith("labels")}
    with torch.no_grad():
        for kept in masks(5, len(components)):
            with masked.ablated(kept):
                model(**batch)
    assert len(runs) == 5 + 1


# -------------------------------------------------------------------------------------------------------------- edits


def test_constants_go_into_biases_and_shifts_and_come_back():
    model, data = small(), images()
    components = coar.find_components(model, exclude="out", ablation=coar.Mean(data))
    assert dict(components.stand_in.absorbed) == {"conv.weight": "norm"}
    attributions = coar.attribute(model, data, components, progress=False)
    edited = coar.edit(model, attributions, decrease=[0], n_components=4)
    kept = torch.ones(len(components), dtype=torch.bool)
    kept[coar.models.record(edited)["edit"]["indices"]] = False
    x = images(9, 1)[0]["inputs"]
    plain = small()
    plain.load_state_dict(edited.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain(x), ablated(model, components, kept, x, "hooks"), atol=1e-5)
    restored = coar.undo(edited, model)
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_weights_cannot_say_is_refused_with_the_reason():
    model, data = small(), images()
    for ablation, reason in (
        (coar.Patch(images(7)), "another value for every example"),
        (coar.Values(torch.zeros(11)), "'conv' has no bias"),
    ):
        components = coar.find_components(model, exclude="out", ablation=ablation)
        attributions = coar.attribute(model, data, components, progress=False)
        with pytest.raises(CoarError, match=reason):
            coar.edit(model, attributions, decrease=[0], n_components=11)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_stand_in():
    model, data = small(), images()
    with pytest.raises(DataError, match="over no examples"):
        coar.find_components(model, ablation=coar.Mean([]))
    with pytest.raises(CoarError, match=r"unknown ablation 'median'"):
        coar.find_components(model, ablation="median")
    with pytest.raises(CoarError, match=r"hf_coar\.Mean\("):
        coar.find_components(model, ablation="mean")
    with pytest.raises(CoarError, match=r"values of shape \[3\].*\[15\]"):
        coar.find_components(model, ablation=coar.Values(torch.zeros(3)))
    with pytest.raises(CoarError, match="not all finite"):
        coar.find_components(model, ablation=coar.Values(torch.full((15,), torch.nan)))
    silent = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    silent.forward = lambda inputs: silent["a"](inputs)
    with pytest.raises(CoarError, match=r"1 modules did not run on these examples.*: b;"):
        coar.find_components(silent, ablation=coar.Mean([{"inputs": torch.zeros(2, 3)}]))
    components = coar.find_components(model, ablation=coar.Mean(data))
    other = small()
    with torch.no_grad():
        other.conv.weight.mul_(2)
    with pytest.raises(ModelMismatchError, match="taken of a model with weights"):
        coar.attribute(other, data, components, progress=False)
    without = dataclasses.replace(components, groups=components.groups[:1])
    wrong = dataclasses.replace(coar.find_components(model), stand_in=without.stand_in, groups=(
        dataclasses.replace(components.groups[1], size=4, parameter="out.weight", module="out"),))  # fmt: skip
    with pytest.raises(ModelMismatchError, match="of other components: 4 values"):
        stand_in = dataclasses.replace(without.stand_in, values={"conv.weight": torch.zeros(6)})
        masking.MaskedModel(model, dataclasses.replace(wrong, stand_in=stand_in))


def test_partners_that_do_not_fit():
    tokens = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 9]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    short = {name: value[:, :2] for name, value in tokens.items()}
    with pytest.raises(DataError, match=r"3 tokens in 'input_ids' and their partners 2"):
        coar.Patch(short).paired([tokens])
    padded = {**tokens, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    padded["input_ids"] = torch.tensor([[5, 6, 7], [5, 4, 4]])
    with pytest.raises(DataError, match=r"example 1 has 3 tokens and its partner 2; they first differ at token 1"):
        coar.Patch(padded).paired([tokens])
    with pytest.raises(DataError, match="only 2 partners, and more examples"):
        coar.Patch(tokens).paired([tokens, tokens])
    with pytest.raises(DataError, match="2 examples, and more partners"):
        coar.Patch([tokens, tokens]).paired([tokens])
    with pytest.raises(DataError, match="nothing to resample from"):
        coar.find_components(small(), ablation=coar.Resample([]))
    model, data = small(), images()
    components = coar.find_components(model, ablation=coar.Resample(data[:1], seed=1))
    with pytest.raises(DataError, match=r"none of the 4 examples to resample from .*shapes \{'inputs': \[3, 5, 5\]\}"):
        ablated(model, components, torch.zeros(15, dtype=torch.bool), torch.randn(2, 3, 5, 5))


def test_an_example_is_never_its_own_stand_in():
    data = images(0, 1)
    joined = coar.Resample(data, seed=5).joined(data[0])
    same = (joined["inputs"] == joined["partner_inputs"]).flatten(1).all(1)
    assert not same.any()
    again = coar.Resample(data, seed=5).joined({"inputs": data[0]["inputs"].flip(0)})
    assert torch.equal(again["partner_inputs"].flip(0), joined["partner_inputs"])


@pytest.mark.parametrize("kind", ["patch", "resample"])
def test_where_partners_are_alike_there_is_nothing_to_reach(kind):
    """With one prompt of the decoder its first layer makes the same for both, and no gradient says so."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=24, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model, prompt = T5ForConditionalGeneration(config).eval(), torch.tensor([[3, 4], [5, 6]])
    data, others = ([{"input_ids": torch.randint(2, 24, (2, 6)), "labels": prompt}] for _ in range(2))
    ablation = coar.Patch(others) if kind == "patch" else coar.Resample(others, seed=0)
    heads = coar.find_components(model, "head", ablation=ablation)
    options = {"ablated_fraction": 0.2, "progress": False}
    found = coar.attribute(model, data, heads, method=coar.PathGradient(rounds=2), **options)
    size = found.weights.abs().mean(0)
    inside = torch.tensor([component.group.module == "decoder.block.0.layer.0.SelfAttention.o" for component in heads])
    assert inside.sum() == 2 and (size[inside] < 1e-6).all() and (size[~inside] > 1e-6).all()


def test_zero_is_the_default_and_stays_as_it_was():
    model = small()
    assert coar.find_components(model).stand_in is None
    assert coar.find_components(model, ablation="zero") == coar.find_components(model)
    assert "ablation" not in coar.find_components(model).to_json()


# ------------------------------------------------------------------------------------- offloaded and in half precision


def test_offloaded_models_and_half_precision():
    accelerate = pytest.importorskip("accelerate")
    model, data = small(), images()
    components = coar.find_components(model, exclude="out", ablation=coar.Mean(data))
    kept, x = masks(1, len(components))[0], data[0]["inputs"]
    expected = ablated(model, components, kept, x)
    offloaded = accelerate.cpu_offload(small())
    there = coar.find_components(offloaded, exclude="out", ablation=coar.Mean(data))
    assert there == components
    assert torch.allclose(ablated(offloaded, there, kept, x), expected, atol=1e-6)
    masking.MaskedModel(offloaded, there).ablate_for_good(kept)
    with torch.no_grad():
        assert torch.allclose(offloaded(x), expected, atol=1e-5)
    half = small().to(torch.bfloat16)
    rough = [{"inputs": batch["inputs"].to(torch.bfloat16)} for batch in data]
    found = coar.find_components(half, exclude="out", ablation=coar.Mean(rough))
    assert torch.allclose(ablated(half, found, kept, x.to(torch.bfloat16)).float(), expected, atol=0.1)
