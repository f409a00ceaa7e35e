"""Calling a model: one forward pass, frozen while it is watched, and which of its modules are head and embeddings."""

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.models import ragged
from hf_coar.models.holding import check_usable, held, modules_of, state_kept
from hf_coar.models.inside import set_inside
from hf_coar.models.libraries import library, wrapped

Call = Callable[[nn.Module, Mapping[str, Any]], Any]

TARGETS = ("labels",)  # what a batch holds for the output alone, whatever the task
POSITIONS = "positions"  # the entry that says which token of an example plays which role
PARTNER = "partner_"  # before the names of entries of the example whose values stand in for ablated components


@functools.lru_cache(maxsize=32)
def _forward_parameters(model_class: type[nn.Module]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(model_class.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = (parameter.name for parameter in parameters if parameter.kind not in _STARRED)
    return frozenset(named) - {"self"}, takes_any


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def forward_names(model: nn.Module) -> tuple[frozenset[str], bool]:
    """The names of a forward's arguments, and whether it also takes any other by name."""
    return _forward_parameters(type(wrapped(model)))


_LISTENER: ContextVar[Callable[[], None] | None] = ContextVar("hf_coar_listener", default=None)


def heard(listener: Callable[[], None] | None) -> AbstractContextManager[None]:
    """Inside the block `listener` is called after every forward pass whose output is taken, see `outputs.Output.of`."""
    return set_inside(_LISTENER, listener)


def unheard() -> AbstractContextManager[None]:
    """Inside the block nobody hears of passes."""
    return heard(None)


def tell() -> None:
    """A forward pass is done."""
    listener = _LISTENER.get()
    if listener is not None:
        listener()


def call(model: nn.Module, batch: Mapping[str, Any], without: Collection[str] = TARGETS) -> Any:
    """Run the model on a batch, first axis = example: all that its forward returns.

    What the forward names goes to it by name; targets and whatever else the batch holds are the output's. A plain
    module whose forward names none of the entries gets its one input by position, or all of them where its forward
    takes any name.

    Args:
        model: any module.
        batch: entries by name.
        without: entries that the forward must not see although it names them, such as `labels`.

    Raises:
        ModelError: the batch does not fit the model's forward.
    """
    inputs = {name: value for name, value in batch.items() if name not in without and not _is_about(name)}
    if not inputs:
        raise ModelError(f"the batch holds nothing but {', '.join(batch) or 'nothing'}; the model needs an input")
    names, takes_any = forward_names(model)
    named = {name: value for name, value in inputs.items() if name in names}
    if takes_any and library(wrapped(model)) == "torch":
        named = inputs
    if "use_cache" in names:
        named.setdefault("use_cache", False)  # a cache of keys and values is memory spent for nothing here
    packing = ragged.pack(inputs)
    if packing is not None:
        with ragged.packed(packing) as flat:
            return model(**named | {name: flat[name] for name in flat if name in named or name in names})
    if set(named) - {"use_cache"}:
        return model(**named)
    # Nothing is named as the forward has it: the one input, or that of a pair (inputs, labels), or an image.
    place = by_position(inputs, without)
    if place is None or library(wrapped(model)) in ("transformers", "diffusers"):
        raise ModelError(
            f"{type(model).__name__}.forward takes {', '.join(sorted(names))}, and the batch holds "
            f"{', '.join(sorted(inputs))}; name the inputs as the forward does, or give call=, a function of "
            "(model, batch)"
        )
    return model(inputs[place])


_BY_POSITION = ("inputs", "pixel_values")


def by_position(batch: Mapping[str, Any], without: Collection[str] = TARGETS) -> str | None:
    """The one entry that a forward gets by position where it names none of them; None where that could be several."""
    inputs = [name for name in batch if name not in without and not _is_about(name)]
    return next((name for name in _BY_POSITION if name in inputs), inputs[0] if len(inputs) == 1 else None)


def _is_about(name: str) -> bool:
    """Whether an entry says something of the example that no forward wants: its partner, or who plays which role."""
    return name.startswith(PARTNER) or name == POSITIONS


def n_examples(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: entries of its first axis."""
    return len(next(iter(batch.values())))


def row(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A batch of one example, of its tensors and lists alike."""
    return {name: value[index : index + 1] for name, value in batch.items()}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what is under way there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # of other memory the copy waits for all that the device was given before
    return tensor.to(device, non_blocking=True)


def to(value: Any, device: torch.device) -> Any:
    """An entry of a batch, or a whole batch, with all tensors in it on a device."""
    if isinstance(value, Tensor):
        moved = sent(value, device)
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved
    if isinstance(value, Mapping):
        return {name: to(one, device) for name, one in value.items()}
    return [to(one, device) for one in value] if isinstance(value, list | tuple) else value


_ALONE: ContextVar[int | None] = ContextVar("alone", default=None)


def alone(model: nn.Module, batch: Mapping[str, Any], run: Call) -> list[Any]:
    """What `run` (model, batch) makes of every example of a batch by itself; masks know which example it is."""
    return [one_alone(model, batch, run, index) for index in range(n_examples(batch))]


def one_alone(model: nn.Module, batch: Mapping[str, Any], run: Call, index: int) -> Any:
    """What `run` (model, batch) makes of one example of a batch by itself."""
    one = row(batch, index)
    with set_inside(_ALONE, index), under_way(one):
        return run(model, one)


def example_alone() -> int | None:
    """The number of the example that the model is running on, inside `alone`."""
    return _ALONE.get()


_PROBING: ContextVar[bool] = ContextVar("probing", default=False)


def probing() -> AbstractContextManager[None]:
    """Inside the block the model runs on a few of the examples of its batch, to see where they are."""
    return set_inside(_PROBING, True)


def is_probing() -> bool:
    """Whether the model runs on other examples than those of the batch that it was given."""
    return _PROBING.get()


_OWN_GATES: ContextVar[bool] = ContextVar("own_gates", default=False)


def own_gates() -> AbstractContextManager[None]:
    """Inside the block every example of a batch has gates of its own."""
    return set_inside(_OWN_GATES, True)


def gates_are_own() -> bool:
    """Whether the examples of a batch have gates of their own, so that none may share a pass of its inputs."""
    return _OWN_GATES.get()


_UNDER_WAY: ContextVar[Mapping[str, Any] | None] = ContextVar("under_way", default=None)


def under_way(batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Inside the block a model runs on this batch: masks find in it what its forward is not given."""
    return set_inside(_UNDER_WAY, batch)


def batch_under_way() -> Mapping[str, Any] | None:
    """The batch that a model is running on, inside `under_way`."""
    return _UNDER_WAY.get()


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """One forward pass: the model's logits, first axis = example; see `call`.

    Raises:
        ModelError: the batch does not fit the model's forward, or it returns no logits.
    """
    return logits_of(call(model, batch), type(model).__name__)


def logits_of(output: Any, model: str = "the model") -> Tensor:
    """The logits in what a forward returned: its `.logits`, those of a mapping, the first of a tuple, a tensor itself.

    Raises:
        ModelError: there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and type(output) in (tuple, list) and output:
        found = output[0]
    if found is None and isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor):
        fields = f" with {', '.join(output)}" if isinstance(output, Mapping) else ""
        raise ModelError(
            f"{model} returned a {type(output).__name__}{fields}, which has no logits; leave output='auto', or give "
            "a function of (what the model returns, batch): outputs.Output(name, unit, function, takes='output')"
        )
    return found


def _without_inference_mode() -> AbstractContextManager[Any]:
    # To leave it switches gradients on as well, so that nothing is done where it is not on.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint")  # transformers, timm, others


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient to any parameter; flags, buffers and attributes are put back afterwards.

    Gradient checkpointing is off inside: it would run modules again in the backward, when their hooks are gone. So are
    what `Module.compile` made, as every hook would be compiled anew, and inference mode.

    Raises:
        ModelError: another thread holds the model, or it is of a kind that cannot be held, see `holding.check_usable`.
    """
    check_usable(model)
    with held(model), state_kept(model), _without_inference_mode():
        modules = modules_of(model)
        wanted = [
            (one, one.requires_grad) for module in modules for one in module._parameters.values() if one is not None
        ]
        try:
            if any(module.training for module in modules):
                model.eval()
            for module in modules:
                own = vars(module)
                own.pop("_compiled_call_impl", None)  # which is put back with all other attributes
                for name in _CHECKPOINTING:
                    if own.get(name) is True:
                        setattr(module, name, False)
            for parameter, required in wanted:
                if required and parameter.is_floating_point():
                    parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in wanted:
                if parameter.requires_grad != required and parameter.is_floating_point():
                    parameter.requires_grad_(required)


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter (an offloaded model's own hooks move what they need)."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):  # one by one: the first nearly always tells
        if tensor.device.type != "meta":
            return tensor.device
    if any(True for _ in model.parameters()):
        return torch.device("cpu")
    raise CoarError(f"{type(model).__name__} has no parameters, so it has no components")


def output_modules(model: nn.Module) -> list[nn.Module]:
    """The classifier or language-model head, as the model's own library tells; empty for a plain module."""
    model = wrapped(model)
    if library(model) == "timm":
        found = _flatten(model.get_classifier())
        return [module for module in found if any(True for _ in module.parameters())]
    if library(model) == "transformers":
        return _transformers_heads(model)
    return []


def _flatten(found: Any) -> list[nn.Module]:
    if isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList):
        return [found]
    return [module for item in found or () for module in _flatten(item)]


def _transformers_heads(model: nn.Module) -> list[nn.Module]:
    embeddings = word_embeddings(model, "output")
    if embeddings is not None:
        return [embeddings]
    # Task models are a backbone under `base_model_prefix` and, beside it, what the task needs: the head.
    base = model.base_model
    if base is model:
        return []
    return [child for child in model.children() if child is not base and any(True for _ in child.parameters())]


def word_embeddings(model: nn.Module, side: str = "input") -> nn.Module | None:
    """The table of the words that a model reads ("input") or writes ("output"), as it says; None where it says none.

    Classes of one's own may leave that to a base class that cannot tell, which transformers 5 says by an error.
    """
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = None if get is None else get()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that look up vectors of tokens, positions or types."""
    # A vision model's "input embedding" is its patch convolution, which holds filters like any other.
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
