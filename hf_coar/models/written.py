"""Written down: what a pass does to tensors, as one flat graph of operations.

The pass is run, and a mode below autograd sees every operation of its forward and backward passes, with the tensors
that it takes and gives. `torch.fx.experimental.proxy_tensor.make_fx` does the same on tensors without values, and take.
ten times as long: it works out of every operation what it would give.
"""

from collections.abc import Sequence
from operator import getitem
from typing import Any
from weakref import KeyedRef

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hf_coar.errors import ModelError
from hf_coar.models.launched import Operations

_PAST = ("tolist", "numpy", "__array__", "__dlpack__")
_LIFT = torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default


def written(run: Operations, inputs: Sequence[Tensor], n_given: int = 0) -> fx.GraphModule:
    """The graph of what a pass does; all that it reads beside its inputs is held by the graph.

    Args:
        run: is run once, on the inputs.
        inputs: all that it depends on beside tensors that stay where they are, such as weights.
        n_given: how many of them, the first, whoever uses the graph answers for: what is seen in their values
            (whether a mask leaves anything out, say) is taken to be so.

    Raises:
        ModelError: it looks at a value of anything else.
        Exception: whatever it raises itself.
    """
    inputs = [one.detach() for one in inputs]  # one that is given twice is two
    writer = _Writer(inputs, n_given)
    with writer, _Looks(writer):
        results = run(*inputs)
        writer.graph.output(tuple(map(writer.node, results)))
    return fx.GraphModule(writer.held, writer.graph)


class _Writer(TorchDispatchMode):
    """Writes every operation into a graph.

    Attributes:
        graph: of what was done.
        held: by name, tensors that were there before.
    """

    def __init__(self, inputs: Sequence[Tensor], n_given: int) -> None:
        super().__init__()
        self.graph, self.held = fx.Graph(), {}
        # By tensor, which is not kept for it: a pass takes the memory that it takes anyway.
        self._nodes: dict[int, tuple[KeyedRef, fx.Node]] = {}
        places = [self._know(one, self.graph.placeholder(f"input_{at}")) for at, one in enumerate(inputs)]
        self._given = set(places[:n_given])  # and what is made of these and of numbers of the program alone

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every operation comes by here, those of the backward pass, too."""
        kwargs = kwargs or {}
        if func in _LIFT:  # a copy, as what is written into it is not to be found in the next pass
            func = _LIFT[1]
        given = pytree.tree_map_only(Tensor, self.node, (args, kwargs))  # before anything is written into them
        node = self.graph.call_function(func, *given)
        if func in _LIFT or all(one in self._given for one in node.all_input_nodes):
            self._given.add(node)
        elif _is_of_values(func, args):
            raise _refusal(func)
        result = func(*args, **kwargs)
        self._know(result, node)
        return result

    def is_given(self, tensor: Tensor) -> bool:
        """Whether others answer for the values of a tensor."""
        return self.node(tensor) in self._given

    def node(self, tensor: Tensor) -> fx.Node:
        """What gives a tensor; one that was there before is held."""
        found = self._nodes.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        name = f"held_{len(self.held)}"
        self.held[name] = tensor
        return self._know(tensor, self.graph.get_attr(name))

    def _know(self, result: Any, node: fx.Node) -> fx.Node:
        if isinstance(result, Tensor):
            nodes = self._nodes
            nodes[id(result)] = (KeyedRef(result, lambda ref: _forget(nodes, ref), id(result)), node)
        elif isinstance(result, tuple | list):
            for place, one in enumerate(result):
                part = self.graph.call_function(getitem, (node, place))
                self._given |= {part} if node in self._given else set()
                self._know(one, part)
        return node


def _forget(nodes: dict[int, tuple[KeyedRef, fx.Node]], ref: KeyedRef) -> None:
    """A tensor is gone; another may have its number already."""
    if (found := nodes.get(ref.key)) is not None and found[0] is ref:
        del nodes[ref.key]


class _Looks(TorchFunctionMode):
    """Refuses what reads values past all operations, unless they are given."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self._writer = writer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Every function and method comes by here."""
        if getattr(func, "__name__", "") in _PAST and not self._writer.is_given(args[0]):
            raise _refusal(func)
        return func(*args, **(kwargs or {}))


def _is_of_values(func: Any, args: tuple) -> bool:
    """Whether the result of an operation is a number, or of a shape that only values tell."""
    if torch.Tag.dynamic_output_shape in func.tags:
        # Where indices are numbers, the shape is theirs.
        by_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
        masks = (torch.bool, torch.uint8)
        return not by_index or any(isinstance(one, Tensor) and one.dtype in masks for one in args[1])
    return torch.Tag.data_dependent_output in func.tags


def _refusal(func: Any) -> ModelError:
    name = getattr(func, "__name__", func)
    return ModelError(f"what it does depends on values, and not on shapes alone ({name})")
