"""Models whose weights accelerate keeps on disk or in the CPU's memory: every verb does what it does in memory."""

import copy

import pytest
import torch
from conftest import build_net

import hf_coar as coar
from hf_coar import models
from hf_coar.editing import edited
from hf_coar.errors import CoarError
from hf_coar.masking import MaskedModel
from hf_coar.models import offloading

NAMES = ("bert", "gpt2", "vit")


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """A net in memory, and the same one that `from_pretrained` leaves on disk, but for its embeddings."""
    net, folder = build_net(request.param), tmp_path_factory.mktemp(request.param)
    net.model.save_pretrained(folder)
    places = {name: "disk" for name, _ in net.model.named_children()}
    base = net.model.base_model_prefix
    if base in places:
        del places[base]
        places |= {f"{base}.{name}": "disk" for name, _ in getattr(net.model, base).named_children()}
    ties = {"lm_head", f"{base}.wte"} & set(places)  # accelerate wants tied weights in one place
    places |= dict.fromkeys(ties or [f"{base}.embeddings"], "cpu")
    loaded = type(net.model).from_pretrained(folder, device_map=places, offload_folder=folder / "offloaded")
    assert offloading.is_offloaded(loaded) and not offloading.is_offloaded(net.model)
    return net, loaded.eval()


def options():
    return {"method": coar.PathGradient(rounds=2), "ablated_fraction": 0.1, "progress": False}


def some(components, seed=0):
    """A mask that ablates a tenth."""
    return torch.rand(len(components), generator=torch.Generator().manual_seed(seed)) > 0.1


def test_the_fingerprint_does_not_depend_on_where_the_weights_are(pair, tmp_path):
    net, loaded = pair
    assert models.fingerprint(loaded) == models.fingerprint(net.model)
    other = copy.deepcopy(net.model)
    with torch.no_grad():
        next(iter(other.parameters())).flatten()[0] += 1
    other.save_pretrained(tmp_path)
    found = type(other).from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    assert models.fingerprint(found) == models.fingerprint(other) != models.fingerprint(loaded)


@pytest.mark.parametrize("how", ["auto", "hooks", "weights"])
@pytest.mark.parametrize("gates", [False, True], ids=["masks", "gates"])
def test_ablation_is_that_of_the_model_in_memory(pair, how, gates):
    net, loaded = pair
    components = coar.find_components(net.model)
    assert coar.find_components(loaded).to_json() == components.to_json()
    kept = some(components) if not gates else 0.5 + 0.5 * some(components).float()
    before = net.logits(loaded)
    torch.testing.assert_close(before, net.logits(), rtol=0, atol=0)
    with coar.ablate(net.model, components, kept, how="weights"):
        expected = net.logits()
    with coar.ablate(loaded, components, kept, how=how):
        found = net.logits(loaded)
        inside = models.fingerprint(loaded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3 and (inside != models.fingerprint(net.model)) == (how == "weights")
    torch.testing.assert_close(net.logits(loaded), before, rtol=0, atol=0)
    assert not any(isinstance(hook.weights_map, offloading.Overlay) for hook in hooks(loaded))


def hooks(model):
    return [hook for module in model.modules() for hook in offloading._hooks(module)]


def test_every_verb_on_a_model_on_disk(pair, tmp_path):
    net, loaded = pair
    in_memory = coar.attribute(net.model, [net.batch], output=net.output, **options())
    attributions = coar.attribute(loaded, [net.batch], output=net.output, **options())
    torch.testing.assert_close(attributions.weights, in_memory.weights, rtol=1e-4, atol=1e-5)
    report = coar.evaluate(attributions, net.model, [net.batch], fractions=(0.1,), n_masks=5, progress=False)
    again = coar.evaluate(in_memory, loaded, [net.batch], fractions=(0.1,), n_masks=5, progress=False)
    torch.testing.assert_close(report.correlation[0.1], again.correlation[0.1], rtol=1e-3, atol=1e-3)

    expected = coar.edit(net.model, in_memory, decrease=[0], n_components=6)
    changed = coar.edit(loaded, attributions, decrease=[0], n_components=6)
    assert models.fingerprint(changed) == models.fingerprint(expected) != models.fingerprint(net.model)
    torch.testing.assert_close(net.logits(changed), net.logits(expected), rtol=0, atol=0)
    assert models.fingerprint(loaded) == models.fingerprint(net.model)  # the original is as it was

    edited.save(changed, tmp_path / "edited")
    reloaded = type(net.model).from_pretrained(tmp_path / "edited").eval()
    torch.testing.assert_close(net.logits(reloaded), net.logits(expected), rtol=0, atol=0)
    for one, base in ((changed, loaded), (changed, net.model), (expected, loaded)):
        original = coar.undo(one, base)
        assert models.fingerprint(original) == models.fingerprint(net.model)
        torch.testing.assert_close(net.logits(original), net.logits(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["convnet", "timm_vit", "gpt2"])
def test_what_accelerate_moved_itself(name, tmp_path):
    """No `hf_device_map`, weights in the CPU's memory, any library."""
    import accelerate

    net = build_net(name)
    moved = accelerate.cpu_offload(build_net(name).model, execution_device=torch.device("cpu"))
    attributions = coar.attribute(moved, [net.batch], output=net.output, **options())
    changed = coar.edit(moved, attributions, decrease=[0], n_components=3)
    expected = coar.edit(net.model, attributions, decrease=[0], n_components=3)
    assert models.fingerprint(changed) == models.fingerprint(expected) != models.fingerprint(moved)
    models.save_model(changed, tmp_path)
    from safetensors.torch import load_file

    saved, wanted = load_file(tmp_path / "model.safetensors"), expected.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in saved.items())
    torch.testing.assert_close(net.logits(changed), net.logits(expected), rtol=0, atol=0)


def test_a_normalised_weight_that_is_offloaded():
    import accelerate

    torch.manual_seed(0)
    build = torch.nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 8)), torch.nn.Linear(8, 3)
    )
    moved = accelerate.cpu_offload(copy.deepcopy(build), execution_device=torch.device("cpu"))
    components = coar.find_components(build)
    kept, x = some(components), torch.randn(4, 6)
    kept[1] = False
    with coar.ablate(build, components, kept, how="weights"), torch.no_grad():
        expected = build(x)
    with coar.ablate(moved, components, kept, how="weights"), torch.no_grad():
        torch.testing.assert_close(moved(x), expected, rtol=0, atol=0)
    assert models.fingerprint(moved) == models.fingerprint(build)


def test_weights_that_are_nowhere_are_told():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
    components = coar.find_components(model)
    kept = torch.zeros(len(components), dtype=torch.bool)
    with pytest.raises(coar.CoarError, match="meta device"):
        MaskedModel(model, components).ablate_for_good(kept)


def test_weights_of_torchao_are_known_and_attributed_and_an_edit_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    plain = models.fingerprint(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert models.fingerprint(model) == models.fingerprint(model) != plain
    data = [{"input_ids": torch.randint(0, 40, (4, 8))}]
    attributions = coar.attribute(model, data, method=coar.PathGradient(rounds=2), progress=False)
    assert (
        coar.evaluate(attributions, model, data, fractions=(0.05,), n_masks=20, progress=False).correlation[0.05] > 0.7
    )
    with pytest.raises(CoarError, match="unquantised copy"):
        coar.edit(model, attributions, decrease=[0], n_components=2)
