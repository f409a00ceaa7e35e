"""Fused graphs: what a flat graph does between matrix products is compiled, and one kernel does the work of thirty.

Beside products and convolutions a gate pass is element-wise work, whose time on a GPU is that of the bytes it moves.
Torch's compiler fuses it. For a whole graph of thousands of operations that takes minutes; cut at the products, a
network of equal blocks has 16 to 44 kinds of stretches, however deep it is, each of which is compiled once.
"""

import logging
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_coar.models.calling import unheard
from hf_coar.models.launched import reason

logger = logging.getLogger(__name__)

# Operations of a stretch that is compiled. What is done at the ends for every group of gates of a deep network is more,
# takes half a minute to compile, which grows with depth, and 2 % of a pass.
_LARGEST = 200
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")  # and attention, by its name
# It counts from where memory begins, and compiled from where its input does.
_ABSOLUTE = ("as_strided", "as_strided_copy", "as_strided_scatter")


def fused(graph: fx.GraphModule, inputs: Sequence[Tensor], level: int = logging.INFO) -> fx.GraphModule:
    """A graph with its stretches between products compiled; the graph itself where that fails, which is said.

    Args:
        graph: of tensor operations alone, as `make_fx` gives it; what it holds by itself (weights) is read anew in
            every call.
        inputs: of the shapes and strides that they will always have.
        level: of the line that says that it failed.
    """
    begun = time.monotonic()
    try:
        plain = torch.autocast(inputs[0].device.type, enabled=False)  # casts are part of the graph
        with warnings.catch_warnings(), unheard(), torch.no_grad(), plain:
            warnings.simplefilter("ignore")  # of products in full precision, which are not compiled here
            found, n_kinds = _fused(graph, inputs)
            found(*inputs)  # kernels are made, and strides looked at, in the first call
    except Exception as error:  # whatever stands against it: a compiler that is not there, an operation it cannot do
        torch.cuda.empty_cache()
        logger.log(level, "operations are not fused: %s", reason(error))
        return graph
    seconds = time.monotonic() - begun
    logger.info("operations between products are fused: %d kinds, in %.1f s", n_kinds, seconds)
    return found


@dataclass(frozen=True)
class _Part:
    """A stretch as a graph of its own, and what kind it is: two of a kind are the same."""

    kind: str
    graph: fx.Graph = field(compare=False)


@lru_cache(maxsize=512)
def _compiled(part: _Part) -> Callable[..., Any]:
    """Compiled operations; kept for other runs, as they hold no weights and models of one architecture share them."""
    examples = [node.meta["val"] for node in part.graph.find_nodes(op="placeholder")]
    return torch._inductor.compile(fx.GraphModule({}, part.graph), examples)


class _Stretch(nn.Module):
    """Compiled operations, as a module that a graph can call."""

    def __init__(self, operations: Any) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.operations(*inputs)


def _fused(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, int]:
    flat, held = _functional(graph, inputs)
    whole, copies = fx.Graph(), {}
    for node, name in zip(flat.find_nodes(op="placeholder"), [None] * len(inputs) + held, strict=True):
        copies[node] = whole.placeholder(node.name) if name is None else whole.get_attr(name)
    modules, numbers = {name: attrgetter(name)(graph) for name in held}, {}
    for stretch in _stretches(flat):
        if _stays(stretch[0]) or len(stretch) > _LARGEST:
            for node in stretch:
                copies[node] = whole.node_copy(node, copies.__getitem__)
            continue
        part, takes, gives = _cut(stretch)
        number = numbers.setdefault(part.kind, len(numbers))
        if f"stretch_{number}" not in modules:
            modules[f"stretch_{number}"] = _Stretch(_compiled(part))
        called = whole.call_module(f"stretch_{number}", tuple(copies[node] for node in takes))
        copies |= {node: whole.call_function(operator.getitem, (called, place)) for place, node in enumerate(gives)}
    whole.output(fx.map_arg(flat.output_node().args[0], copies.__getitem__))
    return fx.GraphModule(modules, whole), len(numbers)


def _functional(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[fx.Graph, list[str]]:
    """The graph without operations that write, so that it can be cut anywhere; and names of what it holds by itself.

    Its placeholders are those of the inputs, and after them one for each name.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    held = list(dict.fromkeys(node.target for node in graph.graph.find_nodes(op="get_attr")))

    def run(*values: Tensor) -> Any:
        return _WithAttributes(graph, dict(zip(held, values[len(inputs) :], strict=True))).run(*values[: len(inputs)])

    trace = make_fx(torch.func.functionalize(run, remove="mutations"), tracing_mode="fake")
    flat = trace(*inputs, *(attrgetter(name)(graph) for name in held)).graph
    flat.eliminate_dead_code()
    return flat, held


class _WithAttributes(fx.Interpreter):
    """Runs a graph with these in the places of what it holds by itself."""

    def __init__(self, graph: fx.GraphModule, attributes: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self._attributes = attributes

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._attributes[target]


def _stays(node: fx.Node) -> bool:
    """Whether an operation is left as it is."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return name in (*_PRODUCTS, *_ABSOLUTE) or "dot_product_attention" in name


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Products, each with what takes its outputs apart, and all that lies between two of them, in the graph's order."""
    stretch: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or (node.target is operator.getitem and _stays(node.args[0])):
            continue
        if _stays(node):
            if stretch:
                yield stretch
            yield [node, *(user for user in node.users if user.target is operator.getitem)]
            stretch = []
        else:
            stretch.append(node)
    if stretch:
        yield stretch


def _cut(stretch: list[fx.Node]) -> tuple[_Part, list[fx.Node], list[fx.Node]]:
    """A stretch alone; what it takes and what it gives."""
    inside = set(stretch)
    takes = list(dict.fromkeys(one for node in stretch for one in node.all_input_nodes if one not in inside))
    gives = [node for node in stretch if any(user not in inside for user in node.users)]
    graph, copies = fx.Graph(), {}
    for number, node in enumerate(takes):
        copies[node] = graph.placeholder(f"given_{number}")
        copies[node].meta["val"] = node.meta["val"]
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    return _Part(_kind(graph), graph), takes, gives


def _kind(graph: fx.Graph) -> str:
    """A description, equal for stretches that do the same to tensors of equal shapes, strides, types and places."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def described(node: fx.Node) -> str:
        if node.op == "placeholder":
            value = node.meta["val"]
            return f"{value.dtype}{list(value.shape)}{value.stride()}{value.device}"
        return f"{node.target}{fx.map_arg((node.args, node.kwargs), lambda one: f'%{numbers[one]}')}"

    compiled_for = f"{torch.are_deterministic_algorithms_enabled()} {torch.get_default_dtype()}"
    return "\n".join([compiled_for, *map(described, graph.nodes)])
