"""Nodes of one graph: examples that all come out of one pass of the whole graph."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import DataError
from hf_coar.models import calling
from hf_coar.models.calling import Call
from hf_coar.models.tasks.base import Batch, labels_of
from hf_coar.storage import files


def nodes(graph: Mapping[str, Any] | Any) -> Call:
    """A call for examples that are nodes of one graph: `attribute(call=tasks.nodes(graph))`.

    A batch holds `node`, int64 [examples], the numbers of the nodes, and `labels`. With one mask for all of them one
    pass tells the outputs of all; gates of their own cost every node a pass of the whole graph, so that "auto" takes
    the regression.

    Args:
        graph: the inputs of the forward by name, such as {"x": …, "edge_index": …}, or `Data` of PyTorch Geometric.
    """
    inputs = dict(graph) if isinstance(graph, Mapping) else graph.to_dict()
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    moved: dict[torch.device, dict[str, Any]] = {}

    def of_nodes(model: nn.Module, batch: Batch) -> Tensor:
        device = calling.device_of(model)
        if device not in moved:
            moved[device] = calling.to(inputs, device)
        logits = calling.logits_of(calling.call(model, moved[device], without=("y", "labels")), type(model).__name__)
        places = labels_of(batch, "node")
        if int(places.min()) < 0 or int(places.max()) >= len(logits):
            raise DataError(f"nodes run from {int(places.min())} to {int(places.max())}, and there are {len(logits)}")
        return logits[places]

    def run(model: nn.Module, batch: Batch) -> Tensor:
        if not calling.gates_are_own():
            return of_nodes(model, batch)
        return torch.cat(calling.alone(model, batch, of_nodes))

    run.shares_pass = True  # which says what the methods cost
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(inputs):
        digest.update(f"{name} {inputs[name].dtype} {tuple(inputs[name].shape)}\n".encode())
        digest.update(files.tensor_bytes(inputs[name]))
    run.__qualname__ = f"nodes({digest.hexdigest()})"  # what attributions remember of the call
    return run
