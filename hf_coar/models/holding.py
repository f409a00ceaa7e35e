"""Holding a model: who changes it for a while holds it, keeps all others away, and leaves it as it was."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import ModelError, check_kind


@dataclass
class _Hold:
    model: nn.Module
    owner: tuple[int, Any]  # thread and asyncio task
    name: str
    depth: int = 0


_guard = threading.Lock()
_holds: dict[int, _Hold] = {}  # by the id of the model


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside the block this thread (or asyncio task) alone may change the model; it may enter again.

    Raises:
        ModelError: another one holds the model, or one that shares parameters with it.
    """
    hold = _enter(model)
    try:
        yield
    finally:
        with _guard:
            hold.depth -= 1
            if not hold.depth:
                del _holds[id(model)]


def _enter(model: nn.Module) -> _Hold:
    owner, name = _me()
    with _guard:
        for hold in _holds.values():
            if hold.owner != owner and _overlap(hold.model, model):
                raise ModelError(
                    f"{type(model).__name__} is in use: {hold.name} has changed it for a while (it ablates components "
                    f"or runs it frozen), and changes of {name} would mix with those for good; wait for the other to "
                    "end, or give each a copy (copy.deepcopy(model))"
                )
        hold = _holds.setdefault(id(model), _Hold(model, owner, name))
        hold.depth += 1
        return hold


def _me() -> tuple[tuple[int, Any], str]:
    """This thread and asyncio task, and their names."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    name = f"thread {threading.current_thread().name!r}"
    return (threading.get_ident(), task), name if task is None else f"{name}, task {task.get_name()!r}"


def _overlap(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    ours = {id(parameter) for parameter in one.parameters()}
    return any(id(parameter) in ours for parameter in other.parameters())


# ------------------------------------------------------------------------------------------------------------ as it was

_OWN = frozenset(vars(nn.Module())) - {"training"}  # parameters, buffers, modules, hooks
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, plain attributes and hooks of all modules are afterwards what they were.

    Statistics of batch normalisation, counters, caches that a forward makes. All kinds together, as a cache lies in a
    buffer and how far it reaches in an attribute, and as transformers hooks a model at its first forward and notes in
    an attribute that it did: one without the other, and hidden states are recorded twice.
    """
    attributes = [(module, {name: value for name, value in vars(module).items() if name not in _OWN})
                  for module in model.modules()]  # fmt: skip
    buffers = [(module, {name: _Kept.of(value) for name, value in module._buffers.items()})
               for module in model.modules()]  # fmt: skip
    hooks = [(table, set(table)) for module in model.modules() for table in map(vars(module).get, _HOOKS)]
    try:
        yield
    finally:
        for table, kept in hooks:
            for key in table.keys() - kept:
                del table[key]
        for module, kept in attributes:
            for name in [name for name in vars(module) if name not in _OWN and name not in kept]:
                del module.__dict__[name]
            module.__dict__.update(kept)
        for module, tensors in buffers:
            for name in module._buffers.keys() - tensors.keys():
                del module._buffers[name]
            for name, tensor in tensors.items():
                module._buffers[name] = tensor.put_back()


@dataclass(frozen=True)
class _Kept:
    """A buffer and what it held."""

    tensor: Tensor | None
    values: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor | None) -> "_Kept":
        if tensor is None or tensor.is_meta or tensor.layout is not torch.strided:
            return cls(tensor)  # sparse ones (graphs) are inputs rather than state, and cannot be compared
        return cls(tensor, tensor.detach().clone())

    def put_back(self) -> Tensor | None:
        # Torch's own counters do not see what batch normalisation writes.
        if self.values is not None and not torch.equal(self.tensor, self.values):
            with torch.no_grad():
                self.tensor.copy_(self.values)
        return self.tensor


# ------------------------------------------------------------------------------------------------------- what is usable


def check_usable(model: nn.Module) -> None:
    """Raises `ModelError` for a model whose modules cannot be hooked, or whose weights cannot be changed."""
    check_is_model(model)
    name = type(model).__name__
    scripted = next((where for where, module in model.named_modules() if _is_scripted(module)), None)
    if scripted is not None:
        raise ModelError(
            f"{name} holds TorchScript ({scripted or 'the model itself'}), whose modules take no hooks; give the "
            "Python module that it was made from"
        )
    _check_not_shared(model)
    _check_not_compiled(model)
    for where, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"{where!r} of {name} has no shape yet (a lazy module); run the model once on a batch, then try again"
            )
        if tensor.is_inference():
            raise ModelError(
                f"{where!r} of {name} was made under torch.inference_mode(), and can be neither changed nor "
                "differentiated; load the model outside of it, or take copy.deepcopy(model) there"
            )


def check_is_model(model: Any) -> None:
    """Raises `CoarError` for what is no module, such as the id of one that was not loaded yet."""
    inner = getattr(model, "model", None)
    instead = "a module, such as hf_coar.load(id, data) or models.load_model(id) gives"
    if isinstance(inner, nn.Module):
        instead = f"the module inside it, its .model, a {type(inner).__name__}"  # of a pipeline, a trainer
    check_kind(model, nn.Module, "the model", instead)


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def _check_not_shared(model: nn.Module) -> None:
    """Raises `ModelError` where a pass needs all processes at once: those of a run are each at another."""
    way_out = (
        "spread it over the devices of one process with device_map='auto', where it does not fit on one; the processes "
        "of a run share its examples by themselves, each with a model of its own"
    )
    for where, module in model.named_modules():
        kind = next((one.__name__ for one in type(module).__mro__ if one.__name__ in _WRAPPERS), None)
        if kind is not None:
            what = f"{where!r} of {type(model).__name__}" if where else "the model"
            raise ModelError(
                f"{what} is wrapped in {kind}; give the model inside it (accelerator.unwrap_model), or {way_out}"
            )
    for where, parameter in model.named_parameters():
        if any(one.__name__ == "DTensor" for one in type(parameter.data).__mro__):
            raise ModelError(
                f"{where!r} of {type(model).__name__} is sharded over processes (tensor parallelism or FSDP); {way_out}"
            )


def _check_not_compiled(model: nn.Module) -> None:
    """Raises `ModelError` for the wrapper of `torch.compile`: names of its modules and its record would be its own."""
    for where, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            what = f"{where!r} of {type(model).__name__} is" if where else "the model is"
            raise ModelError(
                f"{what} wrapped by torch.compile, which would compile its hooks anew for every pass; give the module "
                "that it was made from (its _orig_mod), and let hf_coar.running(compile=True) compile what pays"
            )


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction)
