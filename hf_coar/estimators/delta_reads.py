"""Delta reads: the exact effect of a component through its own nonlinearity, from the same single backward pass.

The derivative of the output to a gate at level g sees the slope of the component's activation function f at one point.
What is wanted is the difference between the component in place and ablated. Where the gated value reaches f through
nothing but batch normalisation, additions and multiplications by numbers, x = ... + g * u, that difference is known
exactly: f(x + (1 - g) u) - f(x - g u). So a delta read is

    derivative to the gate + sum over the f reached of  grad_f * [f(x + (1 - g) u) - f(x - g u) - f'(x) u]

with grad_f the gradient arriving at the value of f. A normalisation that takes in nothing but the component (of every
channel by itself, or of a layer that is one component) forgets its size, so that no gate on it has a slope: there the
difference is taken of the normalisation itself, see `contributions`. It needs no knowledge of the model: what is
element-wise is found by running (module calls without parameters are tried out, functions are known by name), and where
nothing is found the correction is zero and the derivative is left.

*Smoothing*: what is read averages over random ablations, which move the x of every f. The slope of f at the one x of a
pass is a noisy sample of the average slope, above all where f has a kink. So the backward pass can take the slope of f
averaged over a window around x, [f(x + w) - f(x - w)] / 2 w, while the forward pass stays as it is. A window as wide as
the ablations move x would be right for a single pass; over many passes a narrower one leaves less bias
(`scripts/benchmark_estimators.py` compares).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import KeyedRef

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_coar.errors import ModelError
from hf_coar.estimators.contributions import NORMALISATIONS, Contribution, Norm, Normalised, Tracked, normalisation
from hf_coar.estimators.trying import Bounds
from hf_coar.masking import FiredGroups
from hf_coar.masking.sites import replace_forward

ELEMENTWISE = frozenset(
    {
        "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
        "sigmoid", "sigmoid_", "tanh", "tanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "celu_", "selu",
        "selu_", "softplus", "logsigmoid",
    }
)  # fmt: skip
_INFINITE = float("inf")
# What of these is left as it is: between the bounds, beyond which there is nothing but them.
_CLAMPS: dict[str, Callable[..., Bounds]] = {
    "relu": lambda *_: (0.0, _INFINITE),
    "relu_": lambda *_: (0.0, _INFINITE),
    "relu6": lambda *_: (0.0, 6.0),
}
_ADD = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "sub_", "__sub__", "__isub__"})
_MULTIPLY = frozenset({"mul", "mul_", "__mul__", "__imul__", "__rmul__", "div", "div_", "__truediv__", "__itruediv__"})
_SAME = frozenset({"contiguous", "to", "float", "dropout", "type_as", "clone"})


class DeltaReads:
    """What belongs to gates, such as corrections to their derivatives, collected where the gates are spread out."""

    def __init__(self) -> None:
        """Nothing was collected yet."""
        self._levels: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, level: Tensor, values: Tensor) -> None:
        """Add to what the gates of `level` are corrected by; `values` has the shape of the activation."""
        values = values.sum_to_size(level.shape)
        if id(level) in self._levels:
            values = values + self._levels[id(level)][1]
        self._levels[id(level)] = (level, values)

    def corrections(self, gates: Sequence[Tensor]) -> list[Tensor]:
        """By gates, tensors of their shapes."""
        if not self._levels:
            return [torch.zeros_like(gate) for gate in gates]
        levels, values = zip(*self._levels.values(), strict=True)
        # How gates were spread over an activation (windows, positions, blocks), autograd knows to gather again.
        gathered = torch.autograd.grad(levels, gates, values, allow_unused=True)
        return [torch.zeros_like(gate) if g is None else g for gate, g in zip(gates, gathered, strict=True)]


class _Tracker(TorchFunctionMode):
    """Follows gated outputs to the element-wise functions that consume them."""

    def __init__(self, reads: DeltaReads, smoothing: Tensor | None) -> None:
        super().__init__()
        self.reads, self.smoothing = reads, smoothing
        # By tensor, as long as somebody holds it: what nobody reads any more takes its contributions with it. (Torch's
        # own dictionary of weak tensors does the same and takes several times as long, for every operation of a model.)
        # With its version: what is written into holds something else.
        self._tracked: dict[int, tuple[KeyedRef, int, list[Tracked]]] = {}
        self.paused = 0

    def observe(self, gated: Tensor, plain: Tensor, end: Tensor | None, level: Tensor) -> None:
        """A gate was applied: gated = end + level * (plain - end)."""
        end = None if end is None else end.detach()
        self._track(gated, [*self.contributions(gated), Contribution(plain.detach(), end, level)])

    def contributions(self, tensor: Any) -> list[Tracked]:
        """What is tracked in a tensor, as it is now."""
        found = self._tracked.get(id(tensor))
        return [] if found is None or found[1] != tensor._version else found[2]

    def concerns(self, x: Tensor) -> bool:
        """Whether an element-wise function of x is not to run as usual."""
        return bool(self.contributions(x)) or (self.smoothing is not None and x.requires_grad)

    def _track(self, tensor: Tensor, contributions: list[Tracked]) -> None:
        if contributions:
            tracked = self._tracked
            gone = KeyedRef(tensor, lambda ref: tracked.pop(ref.key, None), id(tensor))
            tracked[id(tensor)] = (gone, tensor._version, contributions)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("input")
        if self.paused or not isinstance(first, Tensor):
            return func(*args, **kwargs)
        others, rest = args[1:], {key: value for key, value in kwargs.items() if key != "input"}
        if name in ELEMENTWISE and self.concerns(first):
            bounds = _CLAMPS[name](*others) if name in _CLAMPS else None
            return self.through(lambda x: func(x, *others, **rest), first, bounds)
        if name == "batch_norm" and (scale := _batch_norm_scale(first, *others, **rest)) is not None:
            held = self.contributions(first)
            result = _Scaled.apply(first, scale, lambda x: func(x, *others, **rest))
            self._track(result, _scaled(held, scale.to(result.dtype)))
            return result
        operands = args[:2] or (first,)
        held = [self.contributions(operand) for operand in operands]  # before anything is written into them
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and any(held):
            # Whose shape is another one was broadcast, and its parts would have to be.
            alike = [some if self._same_shape(x, result) else [] for x, some in zip(operands, held, strict=True)]
            self._follow(name, args, kwargs, first, alike, result)
        return result

    def _follow(
        self, name: str, args: tuple, kwargs: dict, first: Tensor, held: list[list[Tracked]], result: Tensor
    ) -> None:
        """Tracks in a result what its first two operands held."""
        if name in _ADD:
            if "sub" in name and any(held[1:]):
                return  # the second operand enters with the other sign; rare, and then the derivative is left
            self._track(result, [one for some in held for one in some])
        elif name in _SAME:
            self._track(result, held[0])
        elif name in NORMALISATIONS:
            self._normalised(first, held[0], result, normalisation(name, args, kwargs))
        elif name in _MULTIPLY and len(args) > 1 and isinstance(args[1], int | float):
            self._track(result, _scaled(held[0], args[1] if "mul" in name else 1 / args[1]))

    def _normalised(self, x: Tensor, held: list[Tracked], result: Tensor, found: Norm | None) -> None:
        """Follows what a normalisation takes together with nothing else, and corrects its reads."""
        if found is None or not held:
            return
        norm, axes = found
        behind = [Normalised(one, norm, x.detach()) for one in held if _is_one(one.level, x, axes)]
        self._track(result, [*behind])
        if behind and result.requires_grad:
            result.register_hook(partial(_correct_normalised, behind, self.reads))

    @staticmethod
    def _same_shape(operand: Any, result: Tensor) -> bool:
        return isinstance(operand, Tensor) and operand.shape == result.shape

    def through(self, function: Callable[[Tensor], Tensor], x: Tensor, bounds: Bounds | None = None) -> Tensor:
        """Run an element-wise function, smoothed if asked for, and correct the reads when the gradient comes back.

        The function is kept for the backward pass and must not hold x: written in place, x would hold itself for good.
        """
        contributions = self.contributions(x)
        followed = _Followed(function, x.detach(), self.smoothing, contributions, self.reads, bounds)
        self.paused += 1
        try:
            if self.smoothing is not None and x.requires_grad:
                return followed.smoothed(x)
            if contributions:
                followed.x = x.detach().clone()  # the function may write into it
            value = function(x)
        finally:
            self.paused -= 1
        if value.requires_grad and contributions:
            value.register_hook(followed.correct)
        return value

    def through_norm(self, norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run a normalisation of the last axis, as one whatever it is made of."""
        self.paused += 1
        held = self.contributions(x)
        try:
            result = norm(x)
        finally:
            self.paused -= 1
        self._normalised(x, held, result, (norm, (x.dim() - 1,)))
        return result

    def forget(self) -> None:
        """Let go of the tensors that were followed."""
        self._tracked.clear()


def _scaled(held: list[Tracked], scale: Any) -> list[Tracked]:
    return [one.scaled(scale) for one in held]


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative at x."""
    with torch.enable_grad():
        variable = x.detach().clone().requires_grad_()
        return torch.autograd.grad(function(variable + 0).sum(), variable)[0]


@torch.no_grad()
def _mean_slope(
    function: Callable[[Tensor], Tensor], x: Tensor, smoothing: Tensor, bounds: Bounds | None = None
) -> Tensor:
    """The slope averaged over a uniform window around x, whose standard deviation is `smoothing` times that of x."""
    # Of one example, or one position of one: images have their example first, sequences any order of axes.
    axes = tuple(range(1, x.dim())) if x.dim() > 3 else (-1,)
    mean_square = torch.linalg.vector_norm(x, dim=axes, keepdim=True).square() / math.prod(x.shape[a] for a in axes)
    # Not x.std(), which is several times slower.
    deviation = (mean_square - x.mean(axes, keepdim=True).square()).clamp_min(_SMALL**2).sqrt()
    half = (smoothing * 3**0.5) * deviation
    if bounds is not None:
        low, high = bounds
        slope = _share_above(x, half, low)
        return slope if high == _INFINITE else slope.sub_(_share_above(x, half, high))
    return function(x + half).sub_(function(x - half)).div_(2 * half)


def _share_above(x: Tensor, half: Tensor, bound: float) -> Tensor:
    """Which part of the window around x lies above a bound; in a third of the time that two values and a ratio take."""
    scale = 0.5 / half
    # Not addcmul, whose loop over small factors takes up to five times as long as both of these.
    return x.mul(scale).add_(0.5 - bound * scale).clamp_(0, 1)


_SMALL = 1e-6


class _Followed:
    """An element-wise function with all that its backward pass wants; slopes and excesses are made there, and not kept.

    Attributes:
        function: element-wise.
        x: what goes into it.
        smoothing: of its slope, see `followed`.
        contributions: to x.
        reads: what is corrected. It does not hold its tracker: a tensor would hold itself.
        wrote: whether the function wrote into x.
        bounds: between which the function leaves its input as it is, and beyond which it gives these; None for others.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        smoothing: Tensor | None,
        contributions: list[Tracked],
        reads: DeltaReads,
        bounds: Bounds | None,
    ) -> None:
        self.function, self.x, self.smoothing, self.wrote, self.bounds = function, x, smoothing, False, bounds
        self.contributions, self.reads = contributions, reads

    def smoothed(self, x: Tensor) -> Tensor:
        """function(x), in place if it is, with its mean slope."""
        if not x._is_view():
            return _WithSlope.apply(x, self)
        # Into a view no function of our own may write.
        result = _WithSlope.apply(x.clone(), self)
        return x.copy_(result) if self.wrote else result

    def value(self, x: Tensor) -> Tensor:
        """function(x), while x is kept for the slope."""
        self.x, version = x.clone(), x._version  # what goes into a function may be written into later, too
        value = self.function(x)
        self.wrote = x._version != version
        if self.wrote and not torch._C._is_alias_of(value, x):
            raise ModelError("an activation writes into what it is given, and returns something else")
        return x if self.wrote else value

    def slope(self) -> Tensor:
        """The slope that the backward pass takes."""
        if self.smoothing is None:
            return _slope(self.function, self.x)
        return _mean_slope(self.function, self.x, self.smoothing, self.bounds)

    def correct(self, gradient: Tensor, slope: Tensor | None = None) -> None:
        """Adds to the reads by how much the exact difference of every contribution exceeds slope × part."""
        slope = self.slope() if slope is None else slope
        for contribution in self.contributions:
            # In place: a new tensor of some megabytes is new pages to the system, which take longer than to fill them.
            excess = _excess(self.function, self.x, slope, contribution).mul_(gradient)
            self.reads.add(contribution.level, excess)


class _WithSlope(torch.autograd.Function):
    """An element-wise function with the slope that it is to have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, followed: _Followed) -> Tensor:
        ctx.followed = followed
        value = followed.value(x)
        if followed.wrote:
            ctx.mark_dirty(x)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        slope = ctx.followed.slope()
        ctx.followed.correct(gradient, slope)
        return slope.mul_(gradient), None


class _Scaled(torch.autograd.Function):
    """A function that is a multiple by channel and a shift, and whose slope needs nothing of what went into it.

    Torch's own backward pass of batch normalisation keeps its input and, on a CPU, adds up gradients of scale and shift
    that nobody asked for: a tenth of a gate pass of the demo, a fifth of one of MobileNetV2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(scale)
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient * ctx.saved_tensors[0]).to(gradient.dtype), None, None


@torch.no_grad()
def _excess(function: Callable[[Tensor], Tensor], x: Tensor, slope: Tensor, contribution: Tracked) -> Tensor:
    whole, without, difference = contribution.ends(x)
    return function(whole).sub_(function(without)).addcmul_(slope, difference, value=-1)


def _is_one(level: Tensor, x: Tensor, axes: Sequence[int]) -> bool:
    """Whether one gate covers all that is taken together along some axes of x."""
    return level.dim() == x.dim() and all(level.shape[axis] == 1 for axis in axes)


def _correct_normalised(behind: Sequence[Normalised], reads: DeltaReads, gradient: Tensor) -> None:
    for one in behind:
        reads.add(one.level, one.excess(gradient))


def _batch_norm_scale(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """The factor by channel, as precise as the computation, of a batch normalisation by constants; None for others."""
    if training or running_var is None or any(one is not None and one.requires_grad for one in (weight, bias)):
        return None
    scale = (running_var.to(torch.promote_types(running_var.dtype, torch.float32)) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale.view(1, -1, *[1] * (input.dim() - 2))


@contextmanager
def followed(
    activations: Mapping[nn.Module, Bounds | None],
    fired: FiredGroups,
    reads: DeltaReads,
    smoothing: Tensor | None = None,
    norms: Sequence[nn.Module] = (),
) -> Iterator[None]:
    """Inside the block forward passes are followed; the backward passes of what they computed fill `reads`.

    Args:
        activations: modules known to be element-wise, see `trying.elementwise_modules`.
        fired: of the gates that are active, which tell of every gated output.
        reads: filled later, while gradients flow.
        smoothing: the width of the windows over which slopes are averaged, in standard deviations of what goes into the
            function, a number []; None for none.
        norms: modules known to normalise their last axis, see `trying.normalising_modules`.
    """
    tracker = _Tracker(reads, smoothing)
    fired.observe = tracker.observe
    with ExitStack() as stack:
        for module, bounds in activations.items():
            stack.callback(replace_forward(module, partial(_followed, tracker, bounds)))
        for module in norms:
            stack.callback(replace_forward(module, partial(_normalising, tracker)))
        stack.callback(tracker.forget)
        stack.callback(setattr, fired, "observe", None)
        with tracker:
            yield


def _followed(tracker: _Tracker, bounds: Bounds | None, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if tracker.paused or not args or not tracker.concerns(args[0]):
            return forward(*args, **kwargs)
        x, *others = args
        return tracker.through(lambda value: forward(value, *others, **kwargs), x, bounds)

    return run


def _normalising(tracker: _Tracker, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if tracker.paused or len(args) != 1 or kwargs or not tracker.contributions(args[0]):
            return forward(*args, **kwargs)
        return tracker.through_norm(forward, args[0])

    return run
