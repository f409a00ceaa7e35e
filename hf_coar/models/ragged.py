"""Ragged examples: each with as many entries as it has (nodes of a molecule, patches of an image), packed for one pass.

In a batch such entries are lists with one tensor an example, which can be divided, joined and known again like any
other. A forward gets them one after the other; what it gets, and which entry is whose, is a `Packing`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_coar.errors import DataError
from hf_coar.models.inside import set_inside

GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}  # patches by frames, rows, columns
_MERGED = (4, 9, 16)  # patches that vision towers join into one


@dataclass(frozen=True)
class Packing:
    """Several examples, packed.

    Attributes:
        inputs: as the forward gets them.
        owners: by what is counted ("nodes", "edges", …): which example every entry belongs to, int64 [entries].
        count: of examples.
        some: (numbers of examples, in any order, one as often as it is named) -> these, packed.
    """

    inputs: Mapping[str, Any]
    owners: Mapping[str, Tensor]
    count: int
    some: "Callable[[Sequence[int]], Packing]"


_PACKED: ContextVar[Packing | None] = ContextVar("packed", default=None)


@contextmanager
def packed(packing: Packing) -> Iterator[Mapping[str, Any]]:
    """Inside the block masks know how the inputs were packed, which are given."""
    with set_inside(_PACKED, packing):
        yield packing.inputs


def current() -> Packing | None:
    """How the inputs of the model that runs now were packed; None where they were not."""
    return _PACKED.get()


def pack(inputs: Mapping[str, Any]) -> Packing | None:
    """The inputs of a forward, packed; None where there is nothing to pack: all are tensors with examples first.

    Args:
        inputs: `edge_index`, a list of int64 [2, edges] with one an example, and what belongs to its nodes and edges;
            or patches of images and their grids, lists of [patches, values] and int64 [images, 3].
    """
    if isinstance(inputs.get("edge_index"), list | tuple):
        return _chosen(inputs, _graphs)
    if any(isinstance(inputs.get(grid), list | tuple) for grid in GRIDS):
        return _chosen(inputs, _patches)
    return None


Pack = Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, Tensor]]]


def _chosen(examples: Mapping[str, Any], make: Pack) -> Packing:
    def some(order: Sequence[int]) -> Packing:
        taken = {
            name: value[list(order)] if isinstance(value, Tensor) and value.dim() else [value[i] for i in order]
            for name, value in examples.items()
            if isinstance(value, Tensor | list | tuple)
        }
        rest = {name: value for name, value in examples.items() if name not in taken}
        return _chosen({**rest, **taken}, make)

    inputs, owners = make(examples)
    count = next(len(value) for value in examples.values() if isinstance(value, list | tuple))
    return Packing(inputs, owners, count, some)


def _owners(counts: Sequence[int], device: torch.device) -> Tensor:
    """[2, 3] -> [0, 0, 1, 1, 1]."""
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))


def _graphs(examples: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    edges = examples["edge_index"]
    per_node = next((n for n in _NODES if isinstance(examples.get(n), list | tuple)), None)
    if per_node is None:
        raise DataError(
            f"graphs need what their nodes are, one of {', '.join(_NODES)}; there are {', '.join(examples)}"
        )
    device, counts = edges[0].device, [len(one) for one in examples[per_node]]
    firsts = [sum(counts[:place]) for place in range(len(counts))]
    inputs = {
        name: torch.cat(list(value)) if isinstance(value, list | tuple) else value for name, value in examples.items()
        if name != "edge_index"
    }  # fmt: skip
    inputs["edge_index"] = torch.cat([one + first for one, first in zip(edges, firsts, strict=True)], dim=1)
    inputs["batch"] = _owners(counts, device)
    of_edges = _owners([one.shape[1] for one in edges], device)
    loops = torch.cat([of_edges, inputs["batch"]])  # layers that join every node with itself append these edges
    return inputs, {"nodes": inputs["batch"], "edges": of_edges, "edges and nodes": loops}


_NODES = ("x", "z", "node_attr", "pos", "node_features", "atom_fea", "h")


def _patches(examples: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    inputs = {
        name: torch.cat(list(value)) if isinstance(value, list | tuple) else value for name, value in examples.items()
    }
    owners: dict[str, Tensor] = {}
    for grid, patches in GRIDS.items():
        if not isinstance(examples.get(grid), list | tuple):
            continue
        device, counts = examples[grid][0].device, [len(one) for one in examples[patches]]
        owners[patches] = _owners(counts, device)
        for share in _MERGED:
            if all(count % share == 0 for count in counts):
                owners[f"{patches} / {share}"] = _owners([count // share for count in counts], device)
        owners[grid] = _owners([len(one) for one in examples[grid]], device)
    return inputs, owners


# ------------------------------------------------------------------------------------------------- back into examples


def unpacked(item: Any) -> Any:
    """A batch in which ragged entries are lists with one tensor an example, of a packed one; any other as it is.

    Args:
        item: a `Batch` of PyTorch Geometric; a mapping with `edge_index` and the vector `batch`, the example of every
            node; or one with patches [patches of all images, values] and their grids [examples, 3].

    Raises:
        DataError: which image belongs to which example cannot be told.
    """
    if hasattr(item, "to_data_list") and hasattr(item, "edge_index"):
        graphs = [graph.to_dict() for graph in item.to_data_list()]
        return _labelled({name: [one[name] for one in graphs] for name in graphs[0] if _in_all(name, graphs)})
    if not isinstance(item, Mapping):
        return item
    if isinstance(item.get("edge_index"), Tensor) and isinstance(item.get("batch"), Tensor):
        return _labelled(_split_graphs(item))
    found = dict(item)
    for grid, patches in GRIDS.items():
        if isinstance(item.get(grid), Tensor) and isinstance(item.get(patches), Tensor) and item[patches].dim() == 2:
            found |= _split_patches(item, grid, patches)
    return found


def _in_all(name: str, graphs: Sequence[Mapping[str, Any]]) -> bool:
    return all(isinstance(graph.get(name), Tensor) for graph in graphs)


def _labelled(found: dict[str, Any]) -> dict[str, Any]:
    """`y` is what others call `labels`; a number or a row of them an example is one tensor."""
    if "y" in found and "labels" not in found:
        found["labels"] = found.pop("y")
    labels = found.get("labels")
    if isinstance(labels, list) and all(isinstance(one, Tensor) and one.numel() == labels[0].numel() for one in labels):
        flat = torch.stack([one.flatten() for one in labels])
        if flat.shape[1] == 1 or labels[0].dim() == 2:
            found["labels"] = flat[:, 0] if flat.shape[1] == 1 else flat
    return found


def _split_graphs(item: Mapping[str, Any]) -> dict[str, Any]:
    owners, edges = item["batch"].long(), item["edge_index"]
    n = int(owners.max()) + 1
    of_nodes = [(owners == example).nonzero()[:, 0] for example in range(n)]
    of_edges = [(owners[edges[0]] == example).nonzero()[:, 0] for example in range(n)]
    inside = torch.zeros_like(owners)
    for places in of_nodes:
        inside[places] = torch.arange(len(places), device=owners.device)
    found: dict[str, Any] = {"edge_index": [inside[edges[:, places]] for places in of_edges]}
    for name, value in item.items():
        if name in ("edge_index", "batch", "ptr") or not isinstance(value, Tensor) or not value.dim():
            continue
        if name.startswith("edge_") and len(value) == edges.shape[1]:
            found[name] = [value[places] for places in of_edges]
        elif len(value) == len(owners) and not (name in ("y", "label", "labels") and len(value) == n):
            found[name] = [value[places] for places in of_nodes]
        else:
            found[name] = value
    return found


def _split_patches(item: Mapping[str, Any], grid: str, patches: str) -> dict[str, Any]:
    counts, texts = item[grid].prod(1).tolist(), item.get("input_ids")
    if texts is None or len(texts) != len(counts) or sum(counts) != len(item[patches]):
        raise DataError(
            f"{patches} hold the patches of {len(counts)} images, and which belongs to which example cannot be told; "
            f"give {patches} and {grid} as lists, one tensor an example"
        )
    return {patches: list(item[patches].split(counts)), grid: list(item[grid].split(1))}
