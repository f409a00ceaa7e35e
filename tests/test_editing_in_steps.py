"""Edits in steps: the model is attributed anew after every few ablations."""

import json

import pytest
import torch
from conftest import build_net, same_state, state_of
from test_editing import attribute, batches
from torch import nn

import hf_coar as coar
from hf_coar import editing, models
from hf_coar.editing.stepwise import PATIENCE
from hf_coar.errors import CoarError, ModelMismatchError

SIDES = {"decrease": [0, 1, 2], "reference": range(8, 24)}


@pytest.fixture
def convnet():
    """13 filters; its data; and a function that attributes it, which counts its calls."""
    data, calls = batches(), []

    def attributing(model):
        calls.append(attribute(model, data, coar.PathGradient(rounds=0)))
        return calls[-1]

    return build_net("convnet").model, data, attributing, calls


def line(width):
    """A model with so many units in a row, and its components."""
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
    return model, coar.find_components(model, include=["0"])


def gone(model):
    """Which units of `line` are ablated."""
    return (model[0].weight.detach() == 0).all(1).nonzero()[:, 0].tolist()


def test_steps_rank_the_rest_anew():
    model, components = line(7)
    state, seen = state_of(model), []

    def rank(it, ablated):
        """Turns round after every step, and puts what is gone first."""
        assert gone(it) == sorted(ablated.tolist())
        seen.append(ablated.tolist())
        order = torch.arange(7).flip(0) if len(seen) % 2 else torch.arange(7)
        return torch.cat([ablated, order[~torch.isin(order, ablated)]])

    found = [ablated.tolist() for ablated in editing.steps(model, components, rank, most=5, step=2)]
    assert found == [[6, 5], [6, 5, 0, 1], [6, 5, 0, 1, 4]]
    assert seen == [[], [6, 5], [6, 5, 0, 1]]
    assert same_state(model, state)


@pytest.mark.parametrize("rule", sorted(editing.RULES))
def test_a_single_step_is_an_edit_at_once(convnet, rule):
    model, _, attributing, calls = convnet
    options = {**SIDES, "rule": rule, "n_components": 4}
    in_steps, at_once = (
        coar.edit(model, attributing, step=4, **options),
        coar.edit(model, attributing(model), **options),
    )
    assert len(calls) == 2
    assert same_state(in_steps, state_of(at_once))
    a, b = (models.record(one)["edit"] for one in (in_steps, at_once))
    assert a.pop("step") == 4 and a == b


def test_what_is_gone_has_no_weight_and_is_not_taken_twice(convnet):
    model, _, attributing, calls = convnet
    state = state_of(model)
    edited = coar.edit(model, attributing, **SIDES, rule="covariance", n_components=7, step=3)
    record = models.record(edited)["edit"]
    assert len(calls) == 3 and len(set(record["indices"])) == 7
    for taken, found in zip((0, 3, 6), calls, strict=True):
        assert (found.weights[:, record["indices"][:taken]] == 0).all()
        ranking = editing.rank_components(found, **SIDES, rule="covariance").tolist()
        left = [index for index in ranking if index not in record["indices"][:taken]]
        assert record["indices"][taken : taken + 3] == left[: min(3, 7 - taken)]
    assert same_state(model, state)
    assert torch.equal(coar.undo(edited, model).state_dict()["conv2.weight"], model.state_dict()["conv2.weight"])


def test_a_linear_model_is_the_same_in_steps_and_at_once():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    data = [{"input": torch.randn(9, 5), "labels": torch.randint(0, 3, (9,))}]

    def attributing(it):
        components = coar.find_components(it, include=["*", ""])
        quick = {"method": coar.PathGradient(0), "ablated_fraction": 0.3, "progress": False}
        return coar.attribute(it, data, components, output="logit", **quick)

    options = {"increase": [0, 1], "rule": "penalised", "n_components": 3}
    first, second = coar.edit(model, attributing, step=1, **options), coar.edit(model, attributing, step=3, **options)
    assert models.record(first)["edit"]["indices"] == models.record(second)["edit"]["indices"]


def forwards(it, ablated):
    """Ranks by place."""
    return torch.arange(40)


def test_a_walk_ends_when_nothing_gets_better():
    model, components = line(40)
    numbers = []

    def goal(it):
        numbers.append(len(gone(it)))
        return -abs(numbers[-1] - 11)

    choice, ablated = editing.choose_in_steps(model, components, {"forwards": forwards}, goal, most=40, step=4)
    assert choice.best.n_components == 11 and choice.best.goal == 0
    assert numbers[: 3 + PATIENCE] == [4, 8, 12, 16, 20, 24] and max(numbers) == 24
    assert sorted(numbers[6:]) == [9, 10, 11, 13, 14, 15]
    assert ablated["forwards"].tolist() == list(range(24))


def test_a_walk_goes_on_as_long_as_constraints_come_nearer():
    model, components = line(40)
    constraint = editing.AtLeast(lambda it: float(len(gone(it))), 30)
    choice, _ = editing.choose_in_steps(
        model, components, {"forwards": forwards}, lambda it: -float(len(gone(it))), constraint, most=40, step=4
    )
    assert choice.best.n_components == 30 and choice.best.slack == 0
    with pytest.raises(CoarError, match=r"none of 5 candidates satisfies.*misses by 10"):
        editing.choose_in_steps(
            model, components, {"forwards": forwards}, lambda _: 0.0, constraint, most=20, step=4
        )  # fmt: skip


def test_the_best_of_several_walks(convnet):
    model, data, attributing, _ = convnet
    lower = editing.mean_output(data, "margin", [0, 1, 2])
    kept = editing.Keep(editing.mean_output(data, "margin", range(8, 24)), 0.3)

    def by_log_prob(it):
        return attribute(it, data, coar.PathGradient(rounds=0), output="log_prob")

    edited = coar.edit(
        model, [attributing, by_log_prob], **SIDES, rule=["covariance", "welch"], validation=lambda it: -lower(it),
        constraint=kept, step=1, n_components=6,
    )  # fmt: skip
    record = models.record(edited)["edit"]
    json.dumps(record)
    assert (
        len({rule for rule, *_ in record["tried"]}) == 4
        and record["step"] == 1
        and record["output"] in ("margin", "log_prob")
    )
    goals = [goal for *_, goal in record["tried"] if goal is not None]
    assert lower(edited) == pytest.approx(-max(goals), abs=1e-5) and lower(edited) < lower(model)
    assert kept.bind(model)(edited) >= -1e-6


def test_the_whole_model_is_attributed_once_for_all_rules(convnet):
    model, data, attributing, calls = convnet
    coar.edit(
        model,
        attributing,
        **SIDES,
        rule=["covariance", "welch"],
        validation=editing.accuracy(data),
        step=6,
        n_components=6,
    )
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, "step=0; in steps it must be a whole number from 1 to 13"),
        ({"n_components": 14}, "n_components=14; in steps it must be a whole number from 1 to 13"),
        ({"n_components": [1, 2]}, r"n_components=\[1, 2\]; in steps"),
        ({"gate": 0.5}, "gate=0.5, step=None: steps need a function"),
        ({"rule": "auto"}, "no validation"),
    ],
)
def test_steps_that_make_no_sense(convnet, options, message):
    model, _, attributing, _ = convnet
    with pytest.raises(CoarError, match=message):
        coar.edit(model, attributing, **SIDES, **options)


def test_functions_must_attribute_the_model_that_they_are_given(convnet):
    model, data, attributing, calls = convnet
    found, state = attributing(model), state_of(model)
    with pytest.raises(CoarError, match="returned None; it must return those of its model"):
        coar.edit(model, lambda it: None, **SIDES)
    with pytest.raises(ModelMismatchError):
        coar.edit(model, lambda it: found, **SIDES, step=2)
    with pytest.raises(CoarError, match="differ in components or examples"):
        fewer = [{name: part[:4] for name, part in batch.items()} for batch in data]
        coar.edit(
            model,
            lambda it: attribute(it, data if same_state(it, state) else fewer, coar.PathGradient(rounds=0)),
            **SIDES, step=2,
        )  # fmt: skip
    calls.clear()
    with pytest.raises(CoarError, match="unknown rule 'wlech'"):
        coar.edit(model, attributing, **SIDES, rule=["penalised", "wlech"], validation=lambda _: 0.0)
    assert not calls


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_survives_what_goes_wrong_in_a_step(convnet, error):
    model, _, attributing, calls = convnet
    state = state_of(model)

    def failing(_):
        if calls:
            raise error
        return attributing(model)

    with pytest.raises(error):
        coar.edit(model, failing, **SIDES, step=2, n_components=6)
    assert same_state(model, state)

    def judging(it):
        judged.append(it)
        if len(judged) == 2:
            raise error
        return 0.0

    judged = []
    with pytest.raises(error):
        coar.edit(model, attributing, **SIDES, step=2, n_components=6, validation=judging)
    assert same_state(model, state)


def test_a_coarse_constraint_does_not_end_a_walk():
    model, components = line(40)
    constraint = editing.AtLeast(lambda it: float(len(gone(it)) >= 30), 1)
    choice, _ = editing.choose_in_steps(
        model, components, {"forwards": forwards}, lambda it: -float(len(gone(it))), constraint, most=40, step=4
    )
    assert choice.best.n_components == 30


def test_importance_goes_by_the_boundary_of_the_output(convnet):
    model, data, _, _ = convnet

    def sides_of(output):
        found = attribute(model, data, coar.PathGradient(rounds=0), output=output)
        seen = []
        editing.rank_components(found, **SIDES, rule=lambda sides: seen.append(sides) or torch.arange(13))
        return found, seen[0].boundary

    def margin(logits, batch):
        """A function of one's own that has the name of another."""
        return logits[:, 0]

    assert sides_of("margin")[1] == 0.0 and sides_of("log_prob")[1] is None and sides_of(margin)[1] is None
    found, boundary = sides_of(coar.outputs.Output("mine", "points", margin, boundary=2.0))
    assert boundary == 2.0
    # Importance is even without a boundary.
    weights = found.weights.double()
    for place, even in ((None, True), (0.0, False)):
        given = editing.Sides([(1, weights[:3])], weights[3:], torch.linspace(-3, 3, 21).double(), place)
        importance = editing.rules._importance(given)
        assert importance.mean().item() == pytest.approx(1) and bool((importance == 1).all()) == even


def test_attributions_and_functions_do_not_mix(convnet):
    model, _, attributing, _ = convnet
    found = attributing(model)
    with pytest.raises(CoarError, match="one or the other"):
        coar.edit(model, [attributing, found], **SIDES, rule="auto", validation=lambda _: 0.0)
    with pytest.raises(CoarError, match="'a-folder' is neither attributions nor a function"):
        coar.edit(model, "a-folder", **SIDES)
    with pytest.raises(CoarError, match="step=2: steps need a function"):
        coar.edit(model, found, **SIDES, step=2)
