"""How the explorer runs a model: the output that was attributed, as far as it can be had, and the logits beside it."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.attributions import Attributions
from hf_coar.errors import CoarError
from hf_coar.models import calling, outputs, tasks
from hf_coar.models.building import first_line
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output, OutputFunction
from hf_coar.storage.registry import dotted

logger = logging.getLogger(__name__)

# What a model, a call or an output of somebody's own may raise on data that are not what they expect.
_FAILURES = (CoarError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def _tell(what: str, error: Exception) -> None:
    """Warn of what cannot be shown, unless memory ran out."""
    if models.is_out_of_memory(error):
        raise error
    _warn(f"{what} cannot be shown: {first_line(error)}")


@functools.cache
def _warn(message: str) -> None:
    """Once."""
    logger.warning("explorer: %s", message)


def _unknown(found: Any, batch: Mapping[str, Any]) -> Tensor:
    """In the place of an output that somebody wrote elsewhere, and that is not here."""
    return torch.full((data_module.size(batch),), torch.nan)


def bound(
    attributions: Attributions, model: nn.Module, given: Output | OutputFunction | None, call: Call | None
) -> Output:
    """The output that was attributed, with the call and the alignment that it was attributed with.

    Args:
        attributions: that name it.
        model: of them.
        given: the output, where it is not registered.
        call: the call, where it was one of somebody's own.
    """
    of = attributions.provenance
    name = of.output or "margin"
    try:
        found = outputs.recorded(name) if given is None else outputs.get(given)
        if given is not None and found.name != name:
            raise CoarError(f"the attributions are of the output {name!r}, and {found.name!r} is given")
        if of.call != (call and dotted(call)):
            raise CoarError(f"the model was attributed with call={of.call}, and is opened with {call and dotted(call)}")
        bound = tasks.bind(model, found, call)
    except CoarError as error:
        _warn(f"{error}; the attributions are shown, and nothing is measured")
        return Output(name, of.unit or "of your own", _unknown, takes="output", call=tasks.of(model).run)
    return bound if of.alignment is None else replace(bound, alignment=of.alignment)


def read(model: nn.Module, output: Output, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Logits and outputs, as far as this model and this output have any: None, and NaN, where they cannot be.

    Args:
        model: as it is now.
        output: from `bound`.
        batch: on the model's device.

    Returns:
        logits float32 [examples, …], and outputs float32 [examples] on the CPU.
    """
    unknown = torch.full((data_module.size(batch),), torch.nan)
    try:
        found = (output.call or models.call)(model, batch)
    except _FAILURES as error:
        _tell("the model's outputs", error)
        return None, unknown
    try:
        logits = calling.logits_of(found).float()
    except CoarError:
        logits = None  # boxes, masks, a loss: the output is all that is shown
    if output.function is _unknown:
        return logits, unknown
    try:
        return logits, output(found, batch).cpu()
    except _FAILURES as error:
        _tell(f"the output {output.name}", error)
        return logits if output.alignment is None else None, unknown
