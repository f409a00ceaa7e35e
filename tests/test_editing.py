"""Editing: rules worked out by hand, choosing by validation, records, undo, and errors."""

import copy
import functools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import build_net, same_state, state_of
from torch import nn

import hf_coar as coar
from hf_coar import editing, models
from hf_coar.editing import choosing
from hf_coar.errors import CoarError, ModelMismatchError


def batches(n_examples=24, size=8, seed=0):
    """Random images and labels for the convolutional network."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_examples, 2, 5, 5, generator=generator)
    labels = torch.randint(0, 3, (n_examples,), generator=generator)
    return [{"inputs": inputs[i : i + size], "labels": labels[i : i + size]} for i in range(0, n_examples, size)]


def attribute(model, data, method, **options):
    return coar.attribute(model, data, method=method, **{"ablated_fraction": 0.1, "progress": False, **options})


@functools.cache
def attributed():
    """Attributions of all batches; made once."""
    return attribute(build_net("convnet").model, batches(), coar.PathGradient(4))


@pytest.fixture
def judged(convnet):
    """A model, its data and its attributions."""
    return convnet.model, batches(), copy.deepcopy(attributed())


def welch_by_hand(weights, targets, reference):
    """Welch's t with population variances, written out."""
    scores = []
    for column in np.asarray(weights, dtype=np.float64).T:
        a, b = column[targets], column[reference]
        error = math.sqrt(np.mean((a - a.mean()) ** 2) / len(a) + np.mean((b - b.mean()) ** 2) / len(b))
        scores.append((a.mean() - b.mean()) / error)
    return scores


def test_welch_scores():
    weights = torch.tensor([[1.0, 4.0, -2.0], [2.0, 4.5, 0.0], [0.0, 1.0, 7.0], [0.5, -1.0, 6.0], [1.5, 0.0, 9.0]])
    for targets, reference in (([0, 1], [2, 3, 4]), ([0], [1, 2]), ([4, 2, 0], [1, 3])):
        expected = welch_by_hand(weights, targets, reference)
        assert editing.welch_scores(weights, targets, reference).tolist() == pytest.approx(expected, rel=1e-6)
    # By hand: targets 3 and 1 (mean 2, variance 1), references 0, 0, 3 (mean 1, variance 2): 1 / sqrt(1/2 + 2/3).
    column = torch.tensor([[3.0], [1.0], [0.0], [0.0], [3.0]])
    assert editing.welch_scores(column, [0, 1], [2, 3, 4]).item() == pytest.approx(1 / math.sqrt(7 / 6))


def test_a_component_without_effect_has_score_zero():
    assert editing.welch_scores(torch.zeros(4, 2), [0], [1, 2, 3]).tolist() == [0, 0]


@pytest.fixture
def small(judged):
    """Attributions of four examples and three components whose ranking is plain to see."""
    _, _, found = judged
    components = coar.find_components(nn.Linear(2, 3))
    weights = torch.tensor([[-5.0, 0.0, 5.0], [-5.1, 0.1, 5.1], [0.1, 0.0, 0.1], [0.0, 0.1, 0.0]])
    identity = found.identity.rows([0, 1, 2, 3])
    return coar.Attributions(weights, torch.zeros(4), None, components, identity, found.config)


def test_ranking(small):
    rank = editing.rank_components
    assert rank(small, increase=[0, 1]).tolist() == [0, 1, 2]
    assert rank(small, decrease=[0, 1]).tolist() == [2, 1, 0]
    assert rank(small, increase=[0], decrease=[1], reference=[2, 3])[0] in (0, 1, 2)
    assert rank(small, increase=[0, 1], reference=[2]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to edit for"),
        ({"increase": [], "decrease": []}, "nothing to edit for"),
        ({"increase": [0, 1, 2, 3]}, "no references"),
        ({"increase": [0], "reference": []}, "no references"),
        ({"increase": [4]}, r"\[4\].*0 to 3"),
        ({"decrease": [-1]}, r"\[-1\]"),
        ({"increase": [0], "reference": [9]}, r"\[9\]"),
        ({"increase": [0, 1], "decrease": [1]}, r"\[1\].*increase and decrease"),
        ({"increase": [0], "reference": [0, 2]}, r"\[0\].*increase and reference"),
        ({"decrease": [3], "reference": [3]}, r"\[3\].*decrease and reference"),
    ],
)
def test_targets_that_make_no_sense(small, options, message):
    with pytest.raises(CoarError, match=message):
        editing.rank_components(small, **options)


def test_targets_may_be_tensors_and_arrays(small):
    # Once wrong: `increase or ()` asks a tensor or an array for its truth, which fails for more than one target.
    expected = editing.rank_components(small, increase=[0, 1]).tolist()
    assert editing.rank_components(small, increase=torch.tensor([0, 1])).tolist() == expected
    assert editing.rank_components(small, increase=np.array([0, 1]), reference=np.array([2, 3])).tolist() == expected


def test_edit_refuses(judged):
    model, _, found = judged
    for n_components in (0, -1, 14, 2.0, True, "3", [3]):
        with pytest.raises(CoarError, match=r"n_components=.*1 to 13"):
            coar.edit(model, found, increase=[0], n_components=n_components)
    with pytest.raises(CoarError, match="nothing to edit"):
        coar.edit(model, found)
    with pytest.raises(ModelMismatchError):
        coar.edit(build_net("mlp").model, found, increase=[0])
    edited = coar.edit(model, found, increase=[0], n_components=1)
    with pytest.raises(ModelMismatchError):
        coar.edit(edited, found, increase=[0], n_components=1)


def margins(model, data):
    with torch.no_grad():
        return torch.cat([coar.outputs.get("margin")(models.logits(model, batch), batch) for batch in data])


def test_edits_move_the_targets_the_right_way(demo_pair, demo_attributions):
    model, data = demo_pair
    before, state = margins(model, data), state_of(model)
    own, others = {"increase": [], "decrease": []}, {"increase": [], "decrease": []}
    for target in range(12):
        for direction in own:
            edited = coar.edit(model, demo_attributions, **{direction: [target]}, n_components=8)
            change = margins(edited, data) - before
            own[direction].append(float(change[target]))
            others[direction].append(float(change.sum() - change[target]) / 11)
    # A margin that is large already may not rise further, so that this is said of most of the targets and their mean.
    assert sum(change > 0 for change in own["increase"]) >= 10 and np.mean(own["increase"]) > 0.5
    assert sum(change < 0 for change in own["decrease"]) >= 10 and np.mean(own["decrease"]) < -1
    assert abs(np.mean(others["increase"])) < np.mean(own["increase"]) / 2
    assert abs(np.mean(others["decrease"])) < -np.mean(own["decrease"]) / 2
    assert same_state(model, state)


def test_an_edit_is_the_ablation_of_the_best_ranked(judged):
    model, data, found = judged
    state = state_of(model)
    edited = coar.edit(model, found, increase=[3], decrease=[4], n_components=3)
    chosen = editing.rank_components(found, increase=[3], decrease=[4])[:3]
    kept = editing.kept_without(len(found.components), chosen)
    assert (~kept).sum() == 3
    with torch.no_grad(), coar.ablate(model, found.components, kept):
        expected = model(data[0]["inputs"])
    assert torch.equal(edited(data[0]["inputs"]), expected)
    assert same_state(model, state)
    assert not {id(p) for p in edited.parameters()} & {id(p) for p in model.parameters()}
    record = models.record(edited)["edit"]
    assert record["indices"] == chosen.tolist()
    assert record["components"] == [str(found.components[int(i)]) for i in chosen]
    assert record["increase"] == [3] and record["decrease"] == [4]
    assert "edit" not in models.record(model)


LOADED_ALONE = """
import sys

import safetensors.torch
import timm
import torch
import transformers

torch.set_num_threads(1)
folder = sys.argv[1]
inputs = safetensors.torch.load_file(folder + "/inputs.safetensors")
tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
results = {}
with torch.no_grad():
    model = SNIPPET_TIMM
    results["timm"] = model.eval()(inputs["pixel_values"])
    model = SNIPPET_TRANSFORMERS
    results["transformers"] = model.eval()(**tokens).logits
    model = SNIPPET_BERT
    results["bert"] = model.eval()(**tokens).logits
safetensors.torch.save_file({k: v.contiguous() for k, v in results.items()}, folder + "/logits.safetensors")
"""


def test_edited_models_load_with_their_own_library_alone(
    demo_pair, demo_attributions, gpt2, bert, tmp_path, plain_process
):
    from safetensors.torch import load_file, save_file

    model, data = demo_pair
    inputs = {"pixel_values": next(iter(data))["pixel_values"], **gpt2.batch}
    save_file(inputs, tmp_path / "inputs.safetensors")
    found = {"timm": demo_attributions}
    for name, net in (("transformers", gpt2), ("bert", bert)):
        found[name] = attribute(net.model, [net.batch], coar.PathGradient(2), output=net.output)
    base = {"timm": model, "transformers": gpt2.model, "bert": bert.model}
    batch = {"timm": next(iter(data)), "transformers": gpt2.batch, "bert": gpt2.batch}
    code, expected = LOADED_ALONE, {}
    for name in base:
        edited = coar.edit(base[name], found[name], increase=[0], n_components=5)
        models.save_model(edited, tmp_path / name)
        code = code.replace(f"SNIPPET_{name.upper()}", models.load_snippet(edited, str(tmp_path / name)))
        kept = editing.kept_without(len(found[name].components), models.record(edited)["edit"]["indices"])
        with torch.no_grad(), coar.ablate(base[name], found[name].components, kept, how="weights"):
            expected[name] = models.logits(base[name], batch[name])
        with torch.no_grad():
            assert not torch.equal(expected[name], models.logits(base[name], batch[name]))
        assert json.loads((tmp_path / name / "coar_edit.json").read_text())["increase"] == [0]
    plain_process.run(code, tmp_path)
    loaded = load_file(tmp_path / "logits.safetensors")
    for name in base:
        assert torch.equal(loaded[name], expected[name]), name


# --------------------------------------------------------------------------------------------------------------- rules


def sides(*targets, reference, outputs=None):
    reference = torch.tensor(reference, dtype=torch.float64)
    outputs = torch.ones(len(reference), dtype=torch.float64) if outputs is None else outputs
    return editing.Sides(
        [(sign, torch.tensor(rows, dtype=torch.float64)) for sign, rows in targets], reference, outputs
    )


def test_gain_and_harm():
    given = sides((1, [[-2.0, 1.0], [-4.0, 3.0]]), (-1, [[1.0, 5.0]]), reference=[[1.0, 0.0], [3.0, -2.0]])
    # To raise: ablating -3 and 2 on average gives +3 and -2. To lower: 1 and 5. The mean of both sets.
    assert given.gain.tolist() == [2.0, 1.5]
    assert given.harm.tolist() == [2.0, -1.0]


def test_there_are_three_rules_and_two_are_tried_where_none_is_named():
    own = [name for name, found in editing.RULES.items() if found.__module__.startswith("hf_coar.")]
    assert sorted(own) == ["covariance", "penalised", "welch"] and sorted(editing.AUTO) == ["covariance", "welch"]


def test_welch_rewards_harm_and_covariance_does_not():
    # Both components raise the target alike. Ablating the first lowers the references evenly, the second leaves them.
    given = sides((1, [[-1.0, -1.0]]), reference=[[4.0, 0.5], [5.0, -0.5], [4.5, 0.0]])
    assert editing.RULES["welch"](given).tolist() == [0, 1]
    assert editing.RULES["covariance"](given).tolist() == [1, 0]


def test_forward_selection_cancels_drift():
    # 0 and 1 harm the same reference, 2 harms it the other way: after 0 comes 2, though 1 is as good as 0 alone.
    given = sides((1, [[-1.0, -0.99, -0.9, 0.5]]), reference=[[1.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert editing.RULES["covariance"](given).tolist() == [0, 2, 1, 3]


def test_references_near_the_boundary_count_more():
    # Each component harms one reference alike; the one whose reference is far from the boundary is cheaper.
    outputs = torch.tensor([0.1, 8.0], dtype=torch.float64)
    given = sides((1, [[-1.0, -1.0]]), reference=[[1.0, 0.0], [0.0, 1.0]], outputs=outputs)
    assert editing.RULES["covariance"](given).tolist() == [1, 0]


@pytest.mark.parametrize("name", editing.RULES)
def test_every_rule_orders_all_components(judged, name):
    _, _, found = judged
    n = len(found.components)
    for options in ({"increase": [0]}, {"decrease": [1, 2]}, {"increase": [3], "decrease": [[4, 5], [6]]}):
        ranking = editing.rank_components(found, **options, rule=name)
        assert sorted(ranking.tolist()) == list(range(n))
    # Raising what was to be lowered is another order.
    up, down = (editing.rank_components(found, rule=name, **{side: [0, 1, 2]}) for side in ("increase", "decrease"))
    assert up.tolist() != down.tolist()


def test_a_rule_of_ones_own(judged, registering):
    model, _, found = judged

    def backwards(sides):
        return torch.arange(sides.reference.shape[1]).flip(0)

    assert editing.rank_components(found, increase=[0], rule=backwards).tolist() == list(range(13))[::-1]
    record = models.record(coar.edit(model, found, increase=[0], rule=backwards, n_components=2))["edit"]
    assert record["indices"] == [12, 11] and record["rule"].endswith("backwards")
    editing.rule("backwards")(backwards)
    assert editing.rank_components(found, increase=[0], rule="backwards")[0] == 12
    del editing.RULES["backwards"]
    with pytest.raises(CoarError, match=r"unknown rule 'backwards'; there are .*welch"):
        editing.rank_components(found, increase=[0], rule="backwards")
    with pytest.raises(CoarError, match=r"rule 'welch' is taken by hf_coar\.editing\.rules\.welch"):
        editing.rule("welch")(backwards)


def test_every_set_of_targets_counts_alike(small):
    # Nine copies of one example in a set weigh no more than another set's one.
    weights = torch.cat([small.weights[:1].expand(9, -1), torch.tensor([[5.0, 0.0, -6.0]]), small.weights[2:]])
    identity = small.identity.rows(torch.zeros(12, dtype=torch.long))
    found = coar.Attributions(weights, torch.zeros(12), None, small.components, identity, small.config)
    together = editing.rank_components(found, increase=range(10), rule="penalised")
    apart = editing.rank_components(found, increase=[list(range(9)), [9]], rule="penalised")
    assert together[0] == 0 and apart[0] == 2


# ------------------------------------------------------------------------------------------------------------ choosing


def share_of(model, data):
    return editing.accuracy(data)(model)


def test_measures(judged):
    model, data, _ = judged
    with torch.no_grad():
        logits = torch.cat([model(batch["inputs"]) for batch in data])
    labels = torch.cat([batch["labels"] for batch in data])
    right = (logits.argmax(1) == labels).float()
    assert editing.accuracy(data)(model) == pytest.approx(float(right.mean()))
    assert editing.accuracy(data, [0, 9, 23])(model) == pytest.approx(float(right[[0, 9, 23]].mean()))
    groups = torch.arange(24) % 3
    worst = min(float(right[groups == group].mean()) for group in range(3))
    assert editing.worst_accuracy(data, groups)(model) == pytest.approx(worst)
    chosen = float(logits.log_softmax(1)[5, labels[5]])
    assert editing.mean_output(data, "log_prob", [5])(model) == pytest.approx(chosen, abs=1e-5)
    for wrong in ([24], [-1], []):
        with pytest.raises(CoarError, match="from 0 to 23"):
            editing.accuracy(data, wrong)
    with pytest.raises(CoarError, match="24 examples"):
        editing.worst_accuracy(data, groups[:5])


def test_choosing_by_validation(judged):
    model, _, found = judged
    state, n = state_of(model), len(found.components)
    rankings = {"forth": torch.arange(n), "back": torch.arange(n).flip(0)}
    weight = dict(model.named_parameters())["conv2.weight"]

    def gone(model):
        """How many of the six filters of conv2 are ablated; before them come four of conv1, after them three of fc."""
        return float((weight.detach().flatten(1) == 0).all(1).sum())

    choice = editing.choose(model, found.components, rankings, lambda it: -abs(gone(it) - 4), numbers=range(1, 9))
    assert (choice.best.rule, choice.best.n_components, choice.best.goal) == ("back", 7, 0)
    # "forth" gets there too, after the four filters of conv1: of equals the one that ablates fewest is taken.
    assert next(one.goal for one in choice.tried if one.rule == "forth" and one.n_components == 8) == 0
    # A constraint: no more than two of them. Goals are measured only where it holds.
    choice = editing.choose(
        model, found.components, rankings, gone, editing.AtMost(gone, 2), numbers=range(1, 9), gates=(0.0, 0.5)
    )
    assert choice.best.goal == 2 and choice.best.gate == 0.0 and choice.best.slack == 0
    assert all((one.goal is None) == (one.slack < 0) for one in choice.tried)
    with pytest.raises(CoarError, match=r"none of 16 candidates.*rule back with 8 components, misses by 2"):
        editing.choose(model, found.components, rankings, gone, editing.AtLeast(gone, 7), numbers=range(1, 9))
    assert same_state(model, state)


def test_constraints(judged):
    model, _, found = judged
    ranking = {"forth": torch.arange(13)}

    def place(it):
        return float(it.conv1.weight.detach().abs().sum())

    full = place(model)
    for constraint in (
        lambda it: place(it) > 0.4 * full,
        editing.Keep(place, 0.6 * full),
        editing.AtLeast(place, 0.4 * full),
    ):
        choice = editing.choose(
            model, found.components, ranking, lambda it: -place(it), constraint, numbers=range(1, 5)
        )
        after = -choice.best.goal
        assert 0.4 * full <= after < full
        assert all(one.goal is None or -one.goal >= 0.4 * full for one in choice.tried)


def test_constraints_on_means_keep_a_standard_error(judged):
    model, data, _ = judged
    accuracy = editing.accuracy(data)
    values = accuracy.each(model)
    error = float(values.std()) / math.sqrt(len(values))
    assert error > 0 and accuracy(model) == pytest.approx(float(values.mean()))
    assert editing.AtMost(accuracy, 0.9).bind(model)(model) == pytest.approx(0.9 - accuracy(model) - error)
    assert editing.AtLeast(accuracy, 0.1, errors=2).bind(model)(model) == pytest.approx(
        accuracy(model) - 2 * error - 0.1
    )
    kept = editing.Keep(accuracy, 0.01).bind(model)
    assert kept(model) == pytest.approx(0.01)  # nothing has changed, and that is certain
    other = build_net("convnet").model
    with torch.no_grad():
        other.fc.weight.neg_()
    change = accuracy.each(other) - values
    error = float(change.std()) / math.sqrt(len(change))
    assert error > 0
    assert kept(other) == pytest.approx(0.01 + float(change.mean()) - error)


def test_numbers_to_try():
    assert editing.numbers_to_try(832)[:8] == [1, 2, 3, 5, 8, 12, 18, 27]
    assert editing.numbers_to_try(832)[-1] == 166 and editing.numbers_to_try(3) == [1]
    assert editing.numbers_to_try(40, most=6) == [1, 2, 3, 5, 6]


def test_fine_numbers_lie_between_the_coarse_ones():
    from hf_coar.components import find_components

    wide = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
    components = find_components(wide, include=["0"])
    ranking = {"": torch.arange(100)}
    choice = editing.choose(
        wide, components, ranking, lambda it: -abs(float((it[0].weight.detach() == 0).all(1).sum()) - 15)
    )
    assert choice.best.n_components == 15 and 15 not in editing.numbers_to_try(100)


def test_choosing_refuses(judged):
    model, _, found = judged
    ranking = torch.arange(13)
    for numbers in ([], [0], [14], [1.5], [True]):
        with pytest.raises(CoarError, match="from 1 to 13"):
            editing.choose(model, found.components, {"": ranking}, lambda _: 0.0, numbers=numbers)
    with pytest.raises(CoarError, match="not an order of all 13"):
        editing.choose(model, found.components, {"": ranking[:5]}, lambda _: 0.0)
    with pytest.raises(CoarError, match="gates"):
        editing.choose(model, found.components, {"": ranking}, lambda _: 0.0, gates=[1.0])
    with pytest.raises(CoarError, match="validation gave nan"):
        editing.choose(model, found.components, {"": ranking}, lambda _: math.nan)
    with pytest.raises(CoarError, match=r"candidates \[0\]"):
        editing.choose_n_components(model, found.components, ranking, lambda _: 0.0, [0])
    with pytest.raises(CoarError, match=r"candidates \[True\]"):
        editing.choose_n_components(model, found.components, ranking, lambda _: 0.0, [True])


@pytest.mark.parametrize("validated", [False, True])
def test_a_number_of_components_is_whole_and_no_truth_value(judged, validated):
    model, _, found = judged
    options = {"decrease": [0], "validation": (lambda _: 0.0) if validated else None}
    edited = coar.edit(model, found, n_components=np.int64(2), **options)
    assert len(models.record(edited)["edit"]["indices"]) == 2
    with pytest.raises(CoarError, match=r"True.* from 1 to 13"):
        coar.edit(model, found, n_components=True, **options)


def test_automatic_edits(judged):
    model, data, found = judged
    other = attribute(model, data, coar.PathGradient(4), output="log_prob")
    state, options = state_of(model), {"decrease": [0, 1, 2], "reference": range(8, 24)}
    lower = editing.mean_output(data, "margin", [0, 1, 2])
    rest = editing.Keep(editing.mean_output(data, "margin", range(8, 24)), 0.3)
    edited = coar.edit(
        model, [found, other], **options, rule="auto", validation=lambda it: -lower(it), constraint=rest,
        n_components=range(1, 6),
    )  # fmt: skip
    record = models.record(edited)["edit"]
    assert same_state(model, state)
    assert record["rule"] in editing.AUTO and record["output"] in ("margin", "log_prob")
    assert len(record["tried"]) == 5 * 2 * len(editing.AUTO)
    ranking = editing.rank_components(
        {"margin": found, "log_prob": other}[record["output"]], **options, rule=record["rule"]
    )
    assert record["indices"] == ranking[: len(record["indices"])].tolist()
    goals = [goal for *_, slack, goal in record["tried"] if goal is not None]
    assert lower(edited) == pytest.approx(-max(goals), abs=1e-5)
    # No single rule with any number of components does better under the same constraint.
    assert rest.bind(model)(edited) >= -1e-6
    json.dumps(record)
    assert torch.equal(coar.undo(edited, model).state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])


def test_several_rules_need_a_validation(judged):
    model, _, found = judged
    for rule in ("auto", ["welch", "covariance"]):
        with pytest.raises(CoarError, match="no validation"):
            coar.edit(model, found, increase=[0], rule=rule)
    with pytest.raises(CoarError, match="differ in components or examples"):
        half = coar.Attributions(
            found.weights[:9], found.bias[:9], None, found.components,
            found.identity.rows(slice(9)), found.config,
        )  # fmt: skip
        coar.edit(model, [found, half], increase=[0], rule="auto", validation=lambda _: 0.0)
    with pytest.raises(CoarError, match="no attributions"):
        coar.edit(model, [], increase=[0])


# ------------------------------------------------------------------------------------------------------- partial edits


def test_partial_edits_scale_and_are_undone(judged):
    model, data, found = judged
    edited = coar.edit(model, found, increase=[0], n_components=3, gate=0.25)
    record = models.record(edited)["edit"]
    kept = torch.ones(13)
    kept[record["indices"]] = 0.25
    with torch.no_grad(), coar.ablate(model, found.components, kept):
        expected = model(data[0]["inputs"])
    assert torch.allclose(edited(data[0]["inputs"]), expected, atol=1e-6) and record["gate"] == 0.25
    assert not torch.equal(edited(data[0]["inputs"]), model(data[0]["inputs"]))
    restored = coar.undo(edited, model)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))
    for gate in (1.0, -0.1, math.nan, [0.5]):
        with pytest.raises(CoarError, match="gate="):
            coar.edit(model, found, increase=[0], n_components=3, gate=gate)
    best = coar.edit(
        model,
        found,
        increase=[0],
        n_components=[2],
        gate=(0.0, 0.5),
        validation=lambda it: float(it.conv1.weight.detach().norm()),
    )
    assert models.record(best)["edit"]["gate"] == 0.5 or "conv1.weight" not in models.record(best)["edit"]["parameters"]


def test_candidates_are_json(judged):
    model, _, found = judged
    choice = editing.choose(model, found.components, {"a": torch.arange(13)}, lambda _: 1.0, numbers=[2])
    assert asdict(choice.best) == {"rule": "a", "n_components": 2, "gate": 0.0, "slack": None, "goal": 1.0}


@pytest.mark.parametrize("truth", [bool, np.bool_, torch.tensor], ids=["bool", "numpy", "tensor"])
def test_a_constraint_that_says_no_is_no(truth):
    """A truth of numpy or torch is one too: as a number it were 0, which is enough."""
    assert choosing._slack(truth(False)) < 0 <= choosing._slack(truth(True))


@pytest.mark.parametrize("value", [None, "0.5 or so", torch.tensor([1.0, 2.0])], ids=type)
def test_a_validation_that_gives_no_number(value):
    with pytest.raises(CoarError, match=f"validation gave a {type(value).__name__} for an edited model; it must be"):
        choosing._number("validation", value)
