"""Calling a model: one forward pass, frozen while it is watched, and which of its modules are head and embeddings."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.models.libraries import library


@functools.lru_cache(maxsize=32)
def _forward_parameters(model_class: type[nn.Module]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(model_class.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset(parameter.name for parameter in parameters), takes_any


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One forward pass: the model's logits, first axis = example.

    `labels` stay out of it. A transformers model gets the rest by name, any other model its one input positionally
    (or all by name, where there are several and its forward takes those names).

    Raises:
        ModelError: the batch does not fit the model's forward.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not inputs:
        raise ModelError("the batch holds nothing but labels; the model needs an input")
    names, takes_any = _forward_parameters(type(model))
    if library(model) == "transformers":
        if "use_cache" in names and "use_cache" not in inputs:
            inputs["use_cache"] = False  # a cache of keys and values is memory spent for nothing here
        output = model(**inputs)
    elif len(inputs) == 1:
        output = model(next(iter(inputs.values())))
    elif takes_any or set(inputs) <= names:
        output = model(**inputs)
    else:
        raise ModelError(
            f"{type(model).__name__}.forward takes {sorted(names - {'self'})}, and the batch holds {sorted(inputs)}; "
            "give one input, or inputs named as the forward names them"
        )
    return _logits_of(output, model)


def _logits_of(output: Any, model: nn.Module) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if found is None and isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor):
        raise ModelError(
            f"{type(model).__name__} returned a {type(output).__name__} without logits; "
            "attribute a model with a task head, or wrap it in a module that returns one tensor"
        )
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient to any parameter, with every flag put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            if parameter.is_floating_point():
                parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in wanted:
            if parameter.is_floating_point():
                parameter.requires_grad_(required)


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter (an offloaded model's own hooks move what they need)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    if any(True for _ in model.parameters()):
        return torch.device("cpu")
    raise CoarError(f"{type(model).__name__} has no parameters, so it has no components")


def output_modules(model: nn.Module) -> list[nn.Module]:
    """The classifier or language-model head, as the model's own library tells; empty for a plain module."""
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
    embeddings = model.get_output_embeddings()
    if isinstance(embeddings, nn.Module):
        return [embeddings]
    # Task models are a backbone under `base_model_prefix` and, beside it, what the task needs: the head.
    base = model.base_model
    if base is model:
        return []
    return [child for child in model.children() if child is not base and any(True for _ in child.parameters())]


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that look up vectors of tokens, positions or types."""
    # A vision model's "input embedding" is its patch convolution, which holds filters like any other.
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
