"""The laws of ablation, measured on one model: three ways to the same logits, rows, gates of one, gradients, saving."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_models import TinyModel, primary_output, to_double
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_coar as coar
from hf_coar import masking, models
from hf_coar.components import Components, Group
from hf_coar.errors import NoComponentsError

ABLATED = 0.15
SEEN = 1e-6  # of the logits' scale: an ablation that moves them less shows nothing


@dataclass
class Report:
    """Largest differences found, by law, relative to the scale of the logits; and what could not be done.

    Attributes:
        differences: "hooks", "weights", "rows", "ones", "rows of ones", "gradient",
            "saved".
        effect: how far zeroing by hand moved the logits at all: the smaller of two draws.
        inert: zeroing all components by hand moves nothing: they have no effect, whatever a mask does.
        counts: components by granularity.
        unused: parameters that the forward does not use.
        bypassed: parameters that are read without their module running.
        notes: laws that the model itself does not allow to be measured.
        dtype: in which the logits were compared.
        mixed: parts of the model compute in float32 whatever its weights are (norms, routers).
        by_hooks: all gates enter at the output or input of a module that sees the examples of the batch.
    """

    differences: dict[str, float] = field(default_factory=dict)
    effect: float = 0.0
    inert: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    bypassed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    mixed: bool = False
    by_hooks: bool = True

    def failures(self) -> list[str]:
        """The laws that do not hold within the tolerances."""
        double = self.dtype == torch.float64 and not self.mixed
        exact = 1e-9 if double else 1e-5
        # A copy of a weight, which lies elsewhere in memory, and a batch of one may round otherwise.
        ones = 0.0 if self.by_hooks else exact
        limits = {"ones": ones, "saved": 1e-5, "gradient": 1e-4 if double else 5e-2}
        return [f"{law} {value:.1e}" for law, value in self.differences.items() if not value <= limits.get(law, exact)]


def component_numbers(group: Group, shape: torch.Size) -> Tensor:
    """For every entry of a weight the number of its component, worked out coordinate by coordinate."""
    coordinates = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    row = coordinates[group.axis]
    if group.stack_axis is not None:
        row = row + coordinates[group.stack_axis] // (shape[group.stack_axis] // group.stacks) * shape[group.axis]
    return row // group.block


class Constant(nn.Module):
    """In the place of a parametrization: the weight is this, whatever is stored."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *stored: Tensor) -> Tensor:
        return self.value


def zeroed_by_hand(model: nn.Module, components: Components, kept: Tensor) -> nn.Module:
    """A copy of the model with ablated slices set to zero, written without the package's own slicing."""
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for group, gates in zip(components.groups, kept.split(components.sizes()), strict=True):
            if gates.all():
                continue
            if ".parametrizations." in group.parameter:
                owner, _, rest = group.parameter.partition(".parametrizations.")
                module, name = duplicate.get_submodule(owner), rest.split(".")[0]
                weight = getattr(module, name)
                module.parametrizations[name][0] = Constant(weight * gates[component_numbers(group, weight.shape)])
            else:
                weight = dict(duplicate.named_parameters(remove_duplicate=False))[group.parameter]
                weight.masked_fill_(~gates[component_numbers(group, weight.shape)], 0)
    return duplicate


def check(tiny: TinyModel, granularity: str = "unit", seed: int = 0, thorough: bool = True) -> Report:
    """Measure the laws on a tiny model.

    Args:
        tiny: made by `tiny_models`.
        granularity: of the components.
        seed: of masks and gates.
        thorough: also gates of one, gradients and saving; else only the ways to the ablated logits.
    """
    report, single = Report(), tiny
    try:
        double = to_double(tiny)
        with torch.no_grad():
            plain = logits_of(double)
        tiny = double if bool(plain.isfinite().all()) else tiny
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        pass  # kernels without float64
    with torch.no_grad(), _Precision() as precision:
        plain = logits_of(tiny)
    report.dtype, report.mixed = plain.dtype, precision.lower
    components = coar.find_components(tiny.model, granularity)
    report.counts[granularity] = len(components)
    report.by_hooks = all(g.site in ("output", "input") and not g.routed for g in components.groups)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(2, len(components), generator=generator)
    silent = _silent(tiny, components, plain, report)
    scale = float(plain.abs().max().clamp_min(1e-6))

    def far(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) / scale if a.numel() else 0.0

    with torch.no_grad():
        kept, hand = _with_effect(tiny, components, drawn, silent, plain, far)
        report.effect = min(far(plain[e], hand[e][e]) for e in range(2))
        report.inert = report.effect <= SEEN and not kept.any()
        by_weights = [_ablated(tiny, components, row, "weights") for row in kept]
        report.differences["weights"] = max(map(far, hand, by_weights))
        reached = kept[0] | silent
        reached_by_hand = _by_hand(tiny, components, reached) if silent.any() else hand[0]
        report.differences["hooks"] = far(reached_by_hand, _ablated(tiny, components, reached, "hooks"))
        rows = _ablated(tiny, components, kept, "hooks")
        report.differences["rows"] = max(far(hand[e][e], rows[e]) for e in range(2))
    if thorough:
        report.differences["ones"] = _ones(tiny, components, plain, (len(components),), far)
        # Modules that run once an example round as batches of one do, so this one need not be bit for bit.
        report.differences["rows of ones"] = _ones(tiny, components, plain, (2, len(components)), far)
        try:
            report.differences["gradient"] = _gradient(tiny, components, silent, generator)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            report.notes.append("its forward lets no gradient through")
        report.differences["saved"] = _saved(single, components, kept[0])
        if report.differences["saved"] > 1e-5 and _saved(single, components, torch.ones_like(kept[0])) > 1e-5:
            del report.differences["saved"]
            report.notes.append("its library does not load what it saves")
    return report


class _Precision(TorchDispatchMode):
    """Notes whether anything is computed in less than float64."""

    lower = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel() > 1:
            self.lower |= result.dtype != torch.float64
        return result


def logits_of(tiny: TinyModel, model: nn.Module | None = None) -> Tensor:
    return primary_output(TinyModel(tiny.name, model or tiny.model, tiny.batch).run())


def _ablated(tiny: TinyModel, components: Components, kept: Tensor, how: str) -> Tensor:
    with coar.ablate(tiny.model, components, kept, how=how):
        return logits_of(tiny)


def _by_hand(tiny: TinyModel, components: Components, kept: Tensor) -> Tensor:
    return logits_of(tiny, zeroed_by_hand(tiny.model, components, kept))


def _with_effect(
    tiny: TinyModel,
    components: Components,
    drawn: Tensor,
    silent: Tensor,
    plain: Tensor,
    far: Callable[[Tensor, Tensor], float],
) -> tuple[Tensor, list[Tensor]]:
    """One mask an example which moves that example's logits, and the logits with each, zeroed by hand.

    In each at least one component is ablated whose module runs. Masks that move nothing are drawn again with twice the
    share ablated, up to all of the components: what still moves nothing then has no effect.
    """
    first = int((~silent).nonzero()[0]) if not silent.all() else 0
    masks, hand = [], []
    for example, row in enumerate(drawn):
        share = ABLATED
        while True:
            kept = row >= share
            kept[first] = False
            logits = _by_hand(tiny, components, kept)
            if far(plain[example], logits[example]) > SEEN or not kept.any():
                break
            share *= 2
        masks.append(kept)
        hand.append(logits)
    return torch.stack(masks), hand


def _silent(tiny: TinyModel, components: Components, plain: Tensor, report: Report) -> Tensor:
    """Components whose modules did not run: without effect (noted as unused), or read past their modules.

    Which of the two is told by zeroing by hand, so that a mask that does nothing is not taken for a weight that does.
    """
    most = torch.full((len(components),), 0.75)
    with torch.no_grad(), masking.MaskedModel(tiny.model, components).gated(most.split(components.sizes())) as fired:
        logits_of(tiny)
    missing = {group.parameter for group in fired.missing()}
    for name in sorted(missing):
        kept = torch.cat([torch.full((g.size,), g.parameter != name) for g in components.groups])
        with torch.no_grad():
            changed = not torch.equal(_by_hand(tiny, components, kept), plain)
        (report.bypassed if changed else report.unused).append(name)
    return torch.cat([torch.full((g.size,), g.parameter in missing) for g in components.groups])


def _ones(
    tiny: TinyModel, components: Components, plain: Tensor, shape: tuple, far: Callable[[Tensor, Tensor], float]
) -> float:
    """How much gates of one with a gradient, so that they are all in place, change."""
    gates = torch.ones(shape, requires_grad=True)
    with masking.MaskedModel(tiny.model, components).gated(gates.split(components.sizes(), dim=-1)), torch.no_grad():
        return far(logits_of(tiny), plain)


def _gradient(tiny: TinyModel, components: Components, silent: Tensor, generator: torch.Generator) -> float:
    """Gradient along a random direction against a central difference, relative."""
    dtype = logits_of(tiny).dtype
    shape = (2, len(components))
    gates = 0.7 + 0.3 * torch.rand(shape, generator=generator, dtype=dtype)
    direction = torch.randn(shape, generator=generator, dtype=dtype)

    def value(at: Tensor) -> Tensor:
        with masking.MaskedModel(tiny.model, components).gated(at.split(components.sizes(), dim=-1)):
            logits = logits_of(tiny)
        return (logits * torch.cos(torch.arange(logits.numel(), dtype=dtype).view(logits.shape))).sum()

    gates.requires_grad_()
    for parameter in tiny.model.parameters():
        parameter.requires_grad_(False)
    (gradient,) = torch.autograd.grad(value(gates), gates, allow_unused=True)
    along = float((gradient * direction).sum())
    size = float(gradient.norm()) or 1.0
    best = float("inf")
    with torch.no_grad():
        # Smaller steps where a kink or a change of route lies within the larger one, and larger ones where a part of
        # the model (a norm, often) computes in float32 whatever its weights are.
        for step in (1e-3, 1e-5, 1e-7, 1e-8, 1e-9) if dtype == torch.float64 else (1e-2, 1e-3):
            moved = [value(gates.detach() + sign * step * direction) for sign in (1, -1)]
            best = min(best, abs(float(moved[0] - moved[1]) / (2 * step) - along) / size)
            if best < 1e-6:
                break
    return best


def _saved(tiny: TinyModel, components: Components, kept: Tensor) -> float:
    """How far a model that was edited, saved and loaded again is from the ablated one."""
    with torch.no_grad():
        expected = _ablated(tiny, components, kept, "weights")
    edited = copy.deepcopy(tiny.model)
    masking.MaskedModel(edited, components).ablate_for_good(kept)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if models.library(edited) == "transformers":
            models.save_model(edited, folder)
            again = type(edited).from_pretrained(folder).eval()
        else:  # the shrunk architectures have no names of their own that timm could load
            torch.save(edited.state_dict(), Path(folder) / "state.pt")
            again = copy.deepcopy(tiny.model)
            again.load_state_dict(torch.load(Path(folder) / "state.pt", weights_only=True))
        return float((logits_of(tiny, again) - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def granularities(model: nn.Module) -> dict[str, int]:
    """Number of components by granularity, of those that the model has."""
    found = {}
    for granularity in coar.components.GRANULARITIES:
        try:
            found[granularity] = len(coar.find_components(model, granularity))
        except NoComponentsError:
            continue
    return found
