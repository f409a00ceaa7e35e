"""The model is what it was: one at a time holds it, what a forward writes is put back, unfit ones are told early."""

import asyncio
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import same_state, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import hf_coar as coar
from hf_coar import models
from hf_coar.attributions import rows
from hf_coar.errors import CoarError, DataError, ModelError, NonFiniteOutputError
from hf_coar.estimators import Regression

OPTIONS = {"ablated_fraction": 0.1, "progress": False}


class Net(nn.Module):
    """A backbone and a head, between which something happens; statistics and a counter are kept."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.head(self.between(self.backbone(x)))


def net(between=lambda x: x, seed=0):
    torch.manual_seed(seed)
    return Net(between).eval()


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.randn(count, 6, generator=generator), "labels": torch.arange(count) % 3}


# ----------------------------------------------------------------------------------------------------- one at a time


def in_thread(work):
    """The error that some work in another thread ends with."""
    errors = []

    def run():
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="the other")
    thread.start()
    thread.join()
    return errors[0] if errors else None


def test_a_second_thread_gets_an_error_and_nothing_is_changed():
    model = net()
    components, before = coar.find_components(model), state_of(model)
    kept = torch.ones(len(components), dtype=torch.bool)
    kept[::2] = False

    def ablate():
        with coar.ablate(model, components, kept):
            pass

    uses = [
        ablate,
        lambda: coar.attribute(model, [batch()], **OPTIONS),
        lambda: coar.attribute(model.backbone, [batch()], **OPTIONS),  # the same parameters
    ]
    with coar.ablate(model, components, ~kept):
        for use in uses:
            error = in_thread(use)
            assert isinstance(error, ModelError) and "in use" in str(error) and "'the other'" in str(error)
        ablate()  # within one thread blocks may lie in each other
        assert in_thread(lambda: coar.attribute(net(), [batch()], **OPTIONS)) is None, "another model is free"
    assert same_state(model, before)
    assert in_thread(ablate) is None, "it is free afterwards"


def test_threads_at_once_leave_the_weights_alone():
    model, results = net(), []
    expected, before = coar.attribute(model, [batch()], method=Regression(30), **OPTIONS).weights, state_of(model)
    start = threading.Barrier(4)

    def work():
        start.wait()
        try:
            results.append(coar.attribute(model, [batch()], method=Regression(30), **OPTIONS).weights)
        except ModelError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_state(model, before)
    assert len(results) == 4 and all(isinstance(r, ModelError) or torch.equal(r, expected) for r in results)
    assert any(isinstance(r, ModelError) for r in results)


def test_a_second_asyncio_task_gets_an_error():
    model = net()
    components, before = coar.find_components(model), state_of(model)

    async def ablate(index):
        kept = torch.ones(len(components), dtype=torch.bool)
        kept[index] = False
        with coar.ablate(model, components, kept):
            await asyncio.sleep(0.01)

    async def both():
        return await asyncio.gather(ablate(0), ablate(1), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None and isinstance(second, ModelError) and "task" in str(second)
    assert same_state(model, before)


# --------------------------------------------------------------------------------------------------------- put back


class Stateful(nn.Module):
    """Statistics that are updated whatever the mode, a counter, and a cache that grows with what was seen."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.longest = 0
        self.eval()

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.num_batches_tracked += 1
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("cache", torch.arange(len(x)), persistent=False)
        return self.fc(x) + 0 * self.cache[: len(x), None]


@pytest.mark.parametrize("how", ["attribute", "per example"])
def test_buffers_and_caches_are_put_back(how):
    model = Stateful()
    model(batch(2)["inputs"])
    mean, cache = model.mean.clone(), model.cache
    if how == "attribute":
        coar.attribute(model, [batch(8)], method=Regression(9), **OPTIONS)
    else:
        components = coar.find_components(model)
        with models.frozen(model), coar.ablate(model, components, torch.ones(8, len(components)).bool(), how="hooks"):
            model(batch(8)["inputs"])
    assert torch.equal(model.mean, mean) and int(model.num_batches_tracked) == 1
    assert model.longest == 2 and model.cache is cache
    model(batch(4)["inputs"])  # what it keeps fits together


def test_hooks_that_a_model_gives_itself_go_with_its_note_of_them():
    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.recorded = nn.Linear(6, 3), []

        def forward(self, x):
            if not getattr(self, "hooked", False):
                self.fc.register_forward_hook(lambda module, args, output: self.recorded.append(output))
                self.hooked = True
            self.recorded.clear()
            return self.fc(x) + len(self.recorded)

    model = Recording()
    for _ in range(2):
        with models.frozen(model):
            model(torch.zeros(2, 6))
        assert not model.fc._forward_hooks and not hasattr(model, "hooked")
    model(torch.zeros(2, 6))
    assert len(model.recorded) == 1


def test_batch_normalisation_in_training_mode_inside_a_forward():
    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            self.norm.train()
            return self.fc(self.norm(x) if len(x) > 1 else x)

    model = Training().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="not its own"):  # statistics of a batch mix its examples
        coar.attribute(model, [batch()], method=Regression(9), **OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.norm.training


def test_a_block_inside_a_block_is_undone_at_its_own_end():
    """Passes of the outer block begin where those of the inner one did, not where they ended."""
    model = Stateful()
    model(batch(2)["inputs"])
    with models.frozen(model):
        model(batch(4)["inputs"])
        mean, cache = model.mean.clone(), model.cache
        with models.frozen(model):
            model.register_forward_hook(lambda *of: None)
            model.train()
            model.fc.weight.requires_grad_()
            model.noted = True
            model(batch(8)["inputs"])
        assert torch.equal(model.mean, mean) and model.cache is cache and model.longest == 4
        assert not (model.training or model._forward_hooks or hasattr(model, "noted"))
        assert not model.fc.weight.requires_grad
    assert model.longest == 2 and model.fc.weight.requires_grad


def test_to_hold_a_model_asks_for_no_names(monkeypatch):
    """Blocks are entered for every batch; to go through the names of 300 modules takes longer than a small pass."""
    model, asked = net().train(), []
    original = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda *of, **how: asked.append(1) or original(*of, **how))
    with models.frozen(model):
        assert not model.head.training
    assert model.head.training and not asked


class Checkpointed(Net):
    """As timm does it: whatever the mode."""

    def __init__(self, reentrant):
        super().__init__()
        self.grad_checkpointing = True
        self.reentrant = reentrant

    def forward(self, x):
        if self.grad_checkpointing:
            return self.head(checkpoint(self.backbone, x, use_reentrant=self.reentrant))
        return self.head(self.backbone(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_off_meanwhile(reentrant):
    plain, model = net(), Checkpointed(reentrant).eval()
    model.load_state_dict(plain.state_dict())
    expected = coar.attribute(plain, [batch()], **OPTIONS).weights
    assert torch.equal(coar.attribute(model, [batch()], **OPTIONS).weights, expected)
    assert model.grad_checkpointing is True


def test_checkpointing_of_transformers_is_off_meanwhile(gpt2):
    gpt2.model.gradient_checkpointing_enable()
    on = [module for module in gpt2.model.modules() if getattr(module, "gradient_checkpointing", False)]
    with models.frozen(gpt2.model):
        assert on and not any(module.gradient_checkpointing for module in on)
    assert all(module.gradient_checkpointing for module in on)


# ------------------------------------------------------------------------------------------------ before the first pass


def test_a_stochastic_forward_is_told():
    for between in (lambda x: F.dropout(x, 0.1), lambda x: x + 0.01 * torch.randn_like(x)):
        for method in ("auto", Regression(9)):
            with pytest.raises(ModelError, match=r"stochastic forward: Net gives .*training=self\.training"):
                coar.attribute(net(between), [batch()], method=method, **OPTIONS)


def test_a_state_that_matters_is_told():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.count = nn.Linear(6, 3), 0

        def forward(self, x):
            self.count += 1
            return self.fc(x) * self.count

    with pytest.raises(ModelError, match="keeps a state"):
        coar.attribute(Counting(), [batch()], **OPTIONS)


def no_grad(x):
    with torch.no_grad():
        return x.clone()


BLOCKS = {
    "detach": lambda x: x.detach(),
    "no_grad": no_grad,
    "rounding": lambda x: (4 * x).round() / 4,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_gradient_that_does_not_arrive_is_told(block, caplog):
    model = net(BLOCKS[block])
    with pytest.raises(ModelError, match=r"reaches .* 2 of 3 modules of Net: backbone\.0, backbone\.2; .*Regression"):
        coar.attribute(model, [batch()], method=coar.PathGradient(), **OPTIONS)
    found = coar.attribute(model, [batch()], **OPTIONS)
    assert found.config["method"]["name"] == "leave_one_out", "the default needs none"
    assert "no gradient reaches the gates of Net (2 modules, such as backbone.0)" in caplog.text
    assert float(found.weights[:, :16].abs().max()) > 0.01


class Underivable(torch.autograd.Function):
    """As kernels of one's own are that have a forward alone."""

    @staticmethod
    def forward(context, x):
        return x * 1.0


FAILING = {
    "checkpoint": lambda x: checkpoint(torch.relu, x, use_reentrant=True),
    "no backward": Underivable.apply,
}


@pytest.mark.parametrize("between", FAILING)
def test_a_backward_that_fails_is_told(between, caplog):
    """Of a checkpoint without a flag, of a kernel without a derivative: the default needs no gradient then."""
    model = net(FAILING[between])
    with pytest.raises(ModelError, match=r"no gradient reaches .* 3 of 3 modules .*Regression"):
        coar.attribute(model, [batch()], method=coar.PathGradient(), **OPTIONS)
    assert caplog.text.count("backward of Net fails") == 1
    found = coar.attribute(model, [batch()], **OPTIONS)
    assert found.config["method"]["name"] == "leave_one_out" and found.provenance.chosen


def test_a_backbone_that_runs_without_gradients(caplog):
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    torch.manual_seed(0)
    found = coar.attribute(Frozen().eval(), [batch()], **OPTIONS)
    assert found.config["method"]["name"] == "leave_one_out" and "no gradient" in caplog.text


def told_of_gradients(attributions):
    """Whether the method was chosen because gradients do not arrive."""
    return "no gradient" in " ".join(attributions.provenance.chosen)


def test_what_has_no_gradient_and_no_effect_is_no_obstacle():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(6, 3)

        def forward(self, x):
            return super().forward(x) + 0 * self.extra(x).detach()

    torch.manual_seed(0)
    assert not told_of_gradients(coar.attribute(Unused().eval(), [batch()], **OPTIONS))


def test_dead_layers_are_no_obstacle():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-100)
    assert not told_of_gradients(coar.attribute(model, [batch()], **OPTIONS))


@pytest.fixture
def group(tmp_path):
    """A group of this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_models_whose_passes_need_all_processes_are_refused(group):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def net():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    wrapped = nn.parallel.DistributedDataParallel(net())
    sharded = (fully_shard(net(), mesh=group), parallelize_module(net(), group, {"0": ColwiseParallel()}))
    for model, message in (
        (wrapped, "the model is wrapped in DistributedDataParallel; give the model inside it"),
        (nn.Sequential(wrapped), "'0' of Sequential is wrapped in DistributedDataParallel"),
        *((model, r"'0.weight' of \w+ is sharded over processes .*device_map='auto'") for model in sharded),
    ):
        with pytest.raises(ModelError, match=message):
            coar.find_components(model)


def test_lazy_modules_scripts_and_inference_tensors_are_told():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(6, 3)), batch()["inputs"])
    with torch.inference_mode():
        inference = nn.Sequential(nn.Linear(6, 3))
    within = nn.Sequential(torch.compile(nn.Linear(6, 3), backend="eager"))
    told = (lazy, "lazy"), (scripted, "TorchScript"), (inference, "inference_mode"), (within, "_orig_mod")
    for model, message in told:
        with pytest.raises(CoarError, match=message):
            coar.attribute(model, [batch()], **OPTIONS)
        with pytest.raises(CoarError, match=message):
            coar.find_components(model)


def test_a_model_that_compiled_itself_runs_as_it_is_written():
    """Every hook was compiled anew for every pass: minutes, and estimates without what such hooks do not see."""
    plain, compiled, seen = net(), net(), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled.compile(backend=backend)
    of_itself = compiled._compiled_call_impl
    found, wanted = (coar.attribute(model, [batch()], **OPTIONS).weights for model in (compiled, plain))
    assert torch.equal(found, wanted)
    assert not seen and compiled._compiled_call_impl is of_itself


def test_inference_mode_is_left_for_a_run_and_no_longer():
    """No gradient reached the gates in it, and the default method gave way to another."""
    model, components = net(), coar.find_components(net(), "input")
    wanted = coar.attribute(model, [batch()], components, **OPTIONS).weights
    with torch.inference_mode():
        given = {name: value.clone() for name, value in batch().items()}
        found = coar.attribute(model, [given], components, **OPTIONS).weights
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------------------------------------------ out of memory


def test_memory_that_runs_out_in_the_probe_is_told_as_such():
    model = net()
    components = coar.find_components(model)

    def full(module, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    model.register_forward_pre_hook(full)
    with (
        pytest.raises(torch.OutOfMemoryError),
        coar.ablate(model, components, torch.zeros(4, len(components)).bool(), how="hooks"),
    ):
        model(batch()["inputs"])


# ---------------------------------------------------------------------------------------------------------- not finite


class Steep(Net):
    """A slope that is infinite at zero."""

    def forward(self, x):
        return self.head(torch.sqrt(torch.relu(self.backbone[0](x))))


def test_infinite_slopes_are_told_where_they_arise():
    torch.manual_seed(0)
    with pytest.raises(NonFiniteOutputError, match=r"of example 0 is -inf at component \d+ \(backbone\.0 neuron \d\)"):
        coar.attribute(Steep().eval(), [batch()], method=coar.PathGradient(rounds=2), **OPTIONS)


@pytest.mark.parametrize("of", ["weights", "standard_errors", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_gate_for_what_is_made_saved_and_loaded(of, value, tmp_path, monkeypatch):
    good = coar.attribute(net(), [batch()], method=coar.PathGradient(), **OPTIONS)
    parts = {name: getattr(good, name).clone() for name in ("weights", "bias", "standard_errors")}
    place = (2,) if of == "bias" else (2, 9)
    parts[of][place] = value

    def made():
        return coar.Attributions(
            parts["weights"], parts["bias"], parts["standard_errors"], good.components, good.identity, good.config
        )

    told = "bias of example 2" if of == "bias" else r"example 2 to component 9 \(backbone\.2 neuron 1\)"
    with pytest.raises(NonFiniteOutputError, match=told):
        made()
    getattr(good, of)[place] = value  # changed in place since
    with pytest.raises(NonFiniteOutputError, match=told):
        good.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(coar.Attributions, "_check_finite", lambda self: None)
        patch.setattr(rows, "check_finite", lambda *of: None)
        made().save_pretrained(tmp_path)
    with pytest.raises(NonFiniteOutputError, match="example 2"):
        coar.Attributions.from_pretrained(tmp_path)
