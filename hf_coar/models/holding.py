"""Holding a model: who changes it for a while holds it, keeps all others away, and leaves it as it was."""

import asyncio
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once: `model.modules()`, whose nested generators take ten times as long."""
    found, known = [model], {id(model)}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, plain attributes and hooks of all modules are afterwards what they were.

    Statistics of batch normalisation, counters, caches that a forward makes. All kinds together, as a cache lies in a
    buffer and how far it reaches in an attribute, and as transformers hooks a model at its first forward and notes in
    an attribute that it did: one without the other, and hidden states are recorded twice.
    """
    kept = [_State(module) for module in modules_of(model)]
    try:
        yield
    finally:
        for state in kept:
            state.put_back()


class _State:
    """What a module holds beside parameters and modules. Blocks are entered for every batch: each look here counts."""

    __slots__ = ("attributes", "buffers", "hooks", "module", "names")

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        self.module, self.names = module, list(own)
        self.attributes = {name: value for name, value in own.items() if name not in _OWN}
        self.buffers = {name: _Kept.of(value) for name, value in module._buffers.items()}
        self.hooks = [(table, set(table)) for table in map(own.get, _HOOKS) if table]

    def put_back(self) -> None:
        own = vars(self.module)
        before = {id(table): keys for table, keys in self.hooks}
        for table in map(own.get, _HOOKS):
            if table:
                for key in table.keys() - before.get(id(table), ()):
                    del table[key]
        own.update(self.attributes)
        if list(own) != self.names:
            for name in [name for name in own if name not in _OWN and name not in self.attributes]:
                del own[name]
        buffers = self.module._buffers
        for name in buffers.keys() - self.buffers.keys():
            del buffers[name]
        for name, tensor in self.buffers.items():
            buffers[name] = tensor.put_back()


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
    modules = modules_of(model)
    if any(_is_scripted(type(module)) for module in modules):
        scripted = next(where for where, module in model.named_modules() if _is_scripted(type(module)))
        raise ModelError(
            f"{name} holds TorchScript ({scripted or 'the model itself'}), whose modules take no hooks; give the "
            "Python module that it was made from"
        )
    _check_not_shared(model, modules)
    _check_not_compiled(model, modules)
    if any(is_lazy(tensor) or tensor.is_inference() for tensor in _tensors_of(modules)):
        _refuse_tensors(model)


def _tensors_of(modules: list[nn.Module]) -> Iterator[Tensor]:
    """All parameters and buffers, those that are shared several times: names, which take long, are for errors."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor


def _refuse_tensors(model: nn.Module) -> None:
    """Raises `ModelError` for the first parameter or buffer that cannot be changed."""
    name = type(model).__name__
    for where, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
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


def _check_not_shared(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raises `ModelError` where a pass needs all processes at once: those of a run are each at another."""
    way_out = (
        "spread it over the devices of one process with device_map='auto', where it does not fit on one; the processes "
        "of a run share its examples by themselves, each with a model of its own"
    )
    if any(_wrapper(type(module)) for module in modules):
        where, kind = next((where, kind) for where, one in model.named_modules() if (kind := _wrapper(type(one))))
        what = f"{where!r} of {type(model).__name__}" if where else "the model"
        raise ModelError(
            f"{what} is wrapped in {kind}; give the model inside it (accelerator.unwrap_model), or {way_out}"
        )
    if any(_is_sharded(tensor) for module in modules for tensor in module._parameters.values() if tensor is not None):
        where = next(where for where, parameter in model.named_parameters() if _is_sharded(parameter))
        raise ModelError(
            f"{where!r} of {type(model).__name__} is sharded over processes (tensor parallelism or FSDP); {way_out}"
        )


def _check_not_compiled(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raises `ModelError` for the wrapper of `torch.compile`: names of its modules and its record would be its own."""
    if any(type(module).__name__ == "OptimizedModule" for module in modules):
        where = next(where for where, one in model.named_modules() if type(one).__name__ == "OptimizedModule")
        what = f"{where!r} of {type(model).__name__} is" if where else "the model is"
        raise ModelError(
            f"{what} wrapped by torch.compile, which would compile its hooks anew for every pass; give the module "
            "that it was made from (its _orig_mod), and let hf_coar.running(compile=True) compile what pays"
        )


def _is_sharded(parameter: Tensor) -> bool:
    return _is_distributed(type(parameter.data))


# What a class says of its instances is asked once a class.


@functools.lru_cache(maxsize=1024)
def _is_scripted(kind: type) -> bool:
    return issubclass(kind, torch.jit.ScriptModule | torch.jit.ScriptFunction)


@functools.lru_cache(maxsize=1024)
def _wrapper(kind: type) -> str | None:
    return next((one.__name__ for one in kind.__mro__ if one.__name__ in _WRAPPERS), None)


@functools.lru_cache(maxsize=64)
def _is_distributed(kind: type) -> bool:
    return any(one.__name__ == "DTensor" for one in kind.__mro__)
