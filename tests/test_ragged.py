"""Ragged batches: graphs and patches of images, each example with as many entries as it has, in one pass together."""

import functools
from types import SimpleNamespace

import pytest
import task_cases
import torch
from exactness import zeroed_by_hand
from torch import nn
from torch_geometric import nn as gnn
from torch_geometric.data import Batch, Data

import hf_coar as coar
from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import DataError
from hf_coar.estimators import choosing
from hf_coar.explore import measuring
from hf_coar.explore.source import open_source
from hf_coar.explore.tab import View
from hf_coar.explore.tabs import examples
from hf_coar.models import ragged

NODES, EDGES = 5, 3  # values of a node, of an edge


class Graphs(nn.Module):
    """Two layers of messages, the mean over the nodes, two classes."""

    def __init__(self, layer, **options):
        super().__init__()
        made = [layer(n, 8, **options) for n in (NODES, 8)]
        self.layers, self.head, self.edges = nn.ModuleList(made), nn.Linear(8, 3), "edge_dim" in options

    def forward(self, x, edge_index, edge_attr, batch):
        for layer in self.layers:
            x = layer(x, edge_index, edge_attr) if self.edges else layer(x, edge_index)
            x = x.relu()
        return self.head(gnn.global_mean_pool(x, batch))


def gin(n_in, n_out):
    return gnn.GINConv(nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, n_out)))


def edged(n_in, n_out):
    return gnn.GINEConv(nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()), edge_dim=EDGES)


class Edged(Graphs):
    """Messages that hold what the edges are."""

    def __init__(self):
        super().__init__(edged)
        self.edges = True


LAYERS = {
    "gin": lambda: Graphs(gin), "gcn": lambda: Graphs(gnn.GCNConv), "sage": lambda: Graphs(gnn.SAGEConv),
    "gat": lambda: Graphs(gnn.GATConv, heads=1), "edges": Edged,
    "transformer": lambda: Graphs(gnn.TransformerConv, edge_dim=EDGES),
}  # fmt: skip


def graphs(sizes=(3, 6, 4, 9)):
    """Rings of these sizes, with a chord more in every second one."""
    draw, found = torch.Generator().manual_seed(0), []
    for label, n in enumerate(sizes):
        ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
        edges = torch.cat([ring, ring.flip(0), torch.tensor([[0], [2]])[:, : label % 2]], dim=1)
        more = {"edge_attr": torch.randn(edges.shape[1], EDGES, generator=draw), "y": torch.tensor([label % 3])}
        found.append(Data(x=torch.randn(n, NODES, generator=draw), edge_index=edges, **more))
    return found


@functools.cache
def made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LAYERS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def masks(n_components, n=4):
    return torch.rand(n, n_components, generator=torch.Generator().manual_seed(1)) > 0.3


def margins(logits, labels):
    return coar.outputs.get("margin")(logits, {"labels": labels})


@pytest.mark.parametrize("name", LAYERS)
def test_every_graph_has_components_of_its_own(name):
    model, batch = made(name), Batch.from_data_list(graphs())
    components = coar.find_components(model, exclude=["head"])
    kept = masks(len(components))
    seen = data_module.as_batch(batch)
    with torch.no_grad():
        with coar.ablate(model, components, kept, how="hooks"):
            found = models.logits(model, seen)
        for row, graph in enumerate(graphs()):
            by_hand = zeroed_by_hand(model, components, kept[row])
            alone = by_hand(graph.x, graph.edge_index, graph.edge_attr, torch.zeros(len(graph.x), dtype=torch.long))
            assert torch.allclose(found[row], alone[0], atol=1e-5)
        assert torch.allclose(
            models.logits(model, seen), model(batch.x, batch.edge_index, batch.edge_attr, batch.batch), atol=1e-6
        )


def test_counts_that_agree_in_one_batch_are_told_apart_in_the_next():
    model = made("gin")
    components = coar.find_components(model, exclude=["head"])
    for sizes in ((4, 4, 4, 4), (3, 6, 4, 9), (5, 5, 3, 3)):
        batch, kept = data_module.as_batch(Batch.from_data_list(graphs(sizes))), masks(len(components))
        with torch.no_grad(), coar.ablate(model, components, kept):
            found = models.logits(model, batch)
        for row in range(4):
            with torch.no_grad(), coar.ablate(model, components, kept[row]):
                alone = models.logits(model, data_module.rows(batch, row, row + 1))
            assert torch.allclose(found[row], alone[0], atol=1e-5), (sizes, row)


def test_graphs_run_together_and_not_one_by_one():
    model, batch, calls = made("gin"), data_module.as_batch(Batch.from_data_list(graphs())), []
    components = coar.find_components(model, exclude=["head"])
    with coar.ablate(model, components, masks(len(components))), torch.no_grad():
        models.logits(model, batch)  # the first one looks where the graphs are
        hook = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        models.logits(model, batch)
        hook.remove()
    assert len(calls) == 1


def test_a_vector_of_examples_is_as_good_as_a_batch_of_the_library():
    whole = Batch.from_data_list(graphs())
    by_name = {name: whole[name] for name in ("x", "edge_index", "edge_attr", "batch")} | {"labels": whole.y}
    one, other = data_module.as_batch(whole), data_module.as_batch(by_name)
    assert one.keys() == other.keys() == {"x", "edge_index", "edge_attr", "labels"}
    for name, value in one.items():
        assert len(value) == 4 and all(torch.equal(a, b) for a, b in zip(value, other[name], strict=True))
    again = ragged.pack(data_module.take(one, [3, 1, 3])).inputs
    wanted = Batch.from_data_list([graphs()[i] for i in (3, 1, 3)])
    assert torch.equal(again["edge_index"], wanted.edge_index) and torch.equal(again["batch"], wanted.batch)


def test_graphs_are_attributed_evaluated_and_edited():
    from torch_geometric.loader import DataLoader

    model, data = made("gin"), DataLoader(graphs((3, 6, 4, 9, 5, 7)), batch_size=4)
    components = coar.find_components(model, exclude=["head"])
    attributions = coar.attribute(model, data, components, method=coar.PathGradient(rounds=4), progress=False)
    report = coar.evaluate(attributions, model, data, fractions=(0.1,), n_masks=40, progress=False)
    assert report.correlation[0.1] > 0.7
    edited = coar.edit(model, attributions, decrease=[0], n_components=3)
    batch = data_module.as_batch(next(iter(data)))
    with torch.no_grad():
        before, after = (margins(models.logits(one, batch), batch["labels"])[0] for one in (model, edited))
    assert after < before
    with pytest.raises(DataError, match="not those of before"):
        coar.evaluate(attributions, model, DataLoader(graphs((3, 6, 4, 8, 5, 7)), batch_size=4), progress=False)


def test_graphs_are_shown_in_the_explorer():
    model, data = made("gin"), [Batch.from_data_list(graphs()), Batch.from_data_list(graphs((5, 7)))]
    components = coar.find_components(model, exclude=["head"])
    attributions = coar.attribute(model, data, components, method=coar.PathGradient(rounds=0), progress=False)
    source = open_source(attributions, model, data)
    found = measuring.what_if(source, [0, 3], range(6))
    assert torch.equal(
        found.before.classes, torch.cat([models.logits(model, data_module.as_batch(one)).argmax(1) for one in data])
    )
    assert "edge_index" in examples.example(source, View(example=4)) and float(found.measured.abs().max()) > 0


# ------------------------------------------------------------------------------------------------------------ patches


def flat(batch):
    """The images in one tensor of patches."""
    return {**batch, **{name: torch.cat(batch[name]) for name in ("pixel_values", "image_grid_thw")}}


def test_patches_of_images_belong_to_their_examples():
    model, listed = task_cases.made("patches")
    batch = data_module.as_batch(flat(listed))
    assert [len(one) for one in batch["pixel_values"]] == [16, 32, 32, 64]
    for name, value in listed.items():
        assert all(torch.equal(a, b) for a, b in zip(value, batch[name], strict=True))
    method = coar.PathGradient(rounds=0)
    one, other = (coar.attribute(model, [each], method=method, progress=False) for each in (flat(listed), listed))
    assert torch.equal(one.weights, other.weights) and float(one.weights.abs().sum(1).min()) > 0


def test_patches_that_nobody_can_tell_apart_are_refused():
    batch = flat(task_cases.made("patches")[1])
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 9)
    with pytest.raises(DataError, match="which belongs to which example"):
        data_module.as_batch(batch)


# ------------------------------------------------------------------------------------------------- nodes of one graph


class Nodes(nn.Module):
    """Classes of the nodes of a graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = gnn.GCNConv(NODES, 8), gnn.GCNConv(8, 8), nn.Linear(8, 3)

    def forward(self, x, edge_index):
        return self.head(self.second(self.first(x, edge_index).relu(), edge_index).relu())


def one_graph():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, graph = Nodes().eval(), graphs((12,))[0]
    return (
        model,
        {"x": graph.x, "edge_index": graph.edge_index},
        {"node": torch.tensor([1, 5, 9, 4]), "labels": torch.arange(4) % 3},
    )


def test_nodes_of_a_graph_share_a_pass_and_the_cost_is_said(caplog):
    caplog.set_level("INFO")
    model, graph, batch = one_graph()
    call, components = coar.tasks.nodes(graph), coar.find_components(model, exclude=["head"])
    kept, passes = masks(len(components)), []
    with torch.no_grad():
        with coar.ablate(model, components, kept):
            found = call(model, batch)
        for row in range(4):
            alone = zeroed_by_hand(model, components, kept[row])(**graph)[batch["node"][row]]
            assert torch.allclose(found[row], alone, atol=1e-6)
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        with coar.ablate(model, components, kept[0]):
            call(model, batch)
        hook.remove()
    assert len(passes) == 1
    method = coar.PathGradient(n_flips=0, check_masks=0)
    options = {"method": method, "ablated_fraction": 0.05, "progress": False}
    attributions = coar.attribute(model, [batch], components, call=call, **options)
    assert (
        "4 examples of a batch share a pass" in caplog.text and "path_gradient 480 and regression 5000" in caplog.text
    )
    report = coar.evaluate(attributions, model, [batch], call=call, fractions=(0.1,), n_masks=20, progress=False)
    assert report.correlation[0.1] > 0.8
    other = coar.tasks.nodes({**graph, "x": graph["x"] + 1})
    with pytest.raises(coar.CoarError, match="give the same"):
        coar.evaluate(attributions, model, [batch], call=other, progress=False)


def test_many_nodes_are_attributed_by_masks_that_they_share(caplog):
    problem = SimpleNamespace(size=coar.estimators.Size(1600, 0.05), data=[{"node": torch.arange(60)}])
    assert choosing._of_shared_passes(problem, None)[0].name == "regression"
    assert "cheaper" not in caplog.text
    method = coar.PathGradient(rounds=4)
    assert choosing._of_shared_passes(problem, method)[0] is method
    assert "method='regression' is the cheaper one" in caplog.text
