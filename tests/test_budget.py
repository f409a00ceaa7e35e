"""Cost first: what a budget affords, in forward passes and in minutes; the hybrid; the fallback without gradients."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import build_net
from torch import nn

import hf_coar as coar
from hf_coar.errors import CoarError, RunMismatchError
from hf_coar.estimators import ESTIMATORS, LeaveOneOut, NeuronConductance, Size
from hf_coar.estimators import budget as budgets
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs.problem import Problem

METHODS = {
    "path_gradient": coar.PathGradient(),
    "regression": coar.Regression(),
    "hybrid": coar.Regression(prior=coar.PathGradient(rounds=2)),
    "neuron_conductance": NeuronConductance(),
}
LOOK = 16  # forward passes of one example before the first: of two, together and alone, and three times of four
NUMBERS = {"path_gradient": ("rounds", 2), "regression": ("n_masks", 1), "hybrid": ("n_masks", 1)}
NUMBERS |= {"neuron_conductance": ("n_steps", 1)}  # what a budget decides, and its steps


def attribute(model, data, **options):
    options = {"ablated_fraction": 0.1, "progress": False, **options}
    return coar.attribute(model, data, **options)


# ------------------------------------------------------------------------------------------------ what a budget affords


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("passes", [60, 61.5, 100, 1234])
@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_as_much_as_is_affordable_and_no_more(name, passes, fraction):
    method, (number, step) = METHODS[name], NUMBERS[name]
    passes += 10  # two rounds at 5 % cost 60, and three masks are the fewest
    if name == "path_gradient":
        method = method.bare()  # where a budget is small, its checks are left out first
    size = Size(50, fraction)
    chosen = method.sized(passes, size)
    more = replace(chosen, **{number: getattr(chosen, number) + step})
    assert chosen.cost(size) <= passes < more.cost(size)
    assert replace(chosen, **{number: getattr(method, number)}) == method, "nothing else changes"


def test_rounds_are_even():
    size = Size(9, 0.05)
    assert [coar.PathGradient().sized(passes, size).rounds for passes in (60, 119, 159, 240)] == [2, 2, 4, 6]
    bare = coar.PathGradient(n_flips=0, check_masks=0)
    assert [bare.sized(passes, size).rounds for passes in (60, 119, 120, 240)] == [2, 2, 4, 8]


def test_flips_and_checks_go_before_rounds():
    chosen = [coar.PathGradient().sized(passes, Size(9, 0.05)) for passes in (98, 99)]
    assert [method.n_flips for method in chosen] == [0, None]
    assert [method.check_masks for method in chosen] == [0, None]


def test_a_budget_below_two_rounds_is_for_single_passes():
    assert [coar.PathGradient().sized(passes, Size(9, 0.05)).passes for passes in (3, 59, 60)] == [1, 19, None]


@pytest.mark.parametrize(
    ("method", "passes", "least"),
    [(coar.PathGradient(), 2, "3"), (coar.Regression(), 2.5, "3"), (LeaveOneOut(), 50, "51")],
)
def test_too_small_a_budget_says_what_is_needed(method, passes, least):
    with pytest.raises(CoarError, match=rf"budget of {passes}.*costs {least}"):
        method.sized(passes, Size(50, 0.05))


def test_a_method_without_a_number_fits_or_does_not(mlp):
    assert LeaveOneOut().sized(51, Size(50, 0.05)) == LeaveOneOut()
    with pytest.raises(CoarError, match="no number of rounds"):
        attribute(mlp.model, [mlp.batch], method=LeaveOneOut(), budget="1 min")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [(240, (240, False)), (1.5, (1.5, False)), ("240", (240, False)), ("20 min", (1200, True)), ("90s", (90, True)),
     ("1.5 h", (5400, True)), ("0.5 sec", (0.5, True))],
)  # fmt: skip
def test_budgets_are_read(text, parsed):
    assert budgets.parse(text) == pytest.approx(parsed)


@pytest.mark.parametrize("budget", [0, -5, float("nan"), float("inf"), True, "", "20 years", "min", "-3 min", "0 min"])
def test_budgets_that_make_no_sense(budget, mlp):
    with pytest.raises(CoarError, match="budget="):
        attribute(mlp.model, [mlp.batch], budget=budget)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_tells_the_cost_of_its_parts(name):
    method, size = ESTIMATORS[name](), Size(40, 0.05)
    parts = method.parts(size)
    assert method.cost(size) == sum(part.cost for part in parts) >= 1
    assert any(part.differentiates for part in parts) == method.differentiates
    assert all(part.n_numbers >= 1 for part in parts)


# --------------------------------------------------------------------------------------------------------- in attribute


def test_a_budget_in_passes_is_kept(mlp, tmp_path):
    passes = []
    mlp.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    found = attribute(mlp.model, [mlp.batch], budget=35, method=coar.Regression(), out=tmp_path)
    assert found.config["method"]["n_masks"] == 35 and found.config["cost"] == 35
    assert sum(passes) == 4 * 35 + LOOK, "the masks, and a look at the model"
    assert json.loads((tmp_path / "run.json").read_text())["method"]["n_masks"] == 35


def test_a_budget_sizes_rounds(mlp):
    # At 10 % a round is 15 passes; then there are 8 flips and one, 10 far reads, and 20 checks.
    found = attribute(mlp.model, [mlp.batch], method=coar.PathGradient(), budget=61 + 39)
    assert found.config["method"]["rounds"] == 4


def test_another_budget_in_passes_is_another_run(mlp, tmp_path):
    settings = {"method": coar.PathGradient(), "out": tmp_path}
    attribute(mlp.model, [mlp.batch], budget=30 + 39, **settings)
    with pytest.raises(RunMismatchError, match=r"method\.rounds was 2, now 4"):
        attribute(mlp.model, [mlp.batch], budget=60 + 39, **settings)


class Clock:
    """A clock by which every pass of the model takes a second for every example."""

    def __init__(self, model, monkeypatch):
        self.now, self.rate, self.of_batch = 0.0, 1.0, False
        model.register_forward_hook(self._tick)
        monkeypatch.setattr(budgets.time, "monotonic", lambda: self.now)

    def _tick(self, module, inputs, output):
        self.now += self.rate * (1 if self.of_batch else len(output))


def problem(net, data):
    masked = MaskedModel(net.model, coar.find_components(net.model))
    return Problem(masked, data, outputs.get("margin"), 0.1, 0)


def test_a_budget_in_minutes_is_timed_and_kept(mlp, tmp_path, monkeypatch):
    clock = Clock(mlp.model, monkeypatch)
    data = [mlp.batch] * 3
    found = attribute(mlp.model, data, method=coar.Regression(), budget="10 min", out=tmp_path)
    # Eight masks on one example, and on one more, take 16 of the 600 seconds; two more would go beyond a twentieth.
    assert found.config["method"]["n_masks"] == (600 - 16) // 12 == 48
    assert json.loads((tmp_path / "run.json").read_text())["method"]["n_masks"] == 48
    clock.rate, before = 50.0, clock.now
    again = attribute(mlp.model, data, method=coar.Regression(), budget="10 min", out=tmp_path)
    assert clock.now == before + LOOK * clock.rate, "a look at the model; nothing is timed or run again"
    assert torch.equal(found.weights, again.weights)


def test_a_run_that_was_broken_off_keeps_its_number(mlp, tmp_path, monkeypatch):
    clock = Clock(mlp.model, monkeypatch)

    class Broken:
        def __iter__(self):
            yield mlp.batch
            raise RuntimeError("the stream broke")

        def __len__(self):
            return 2

    with pytest.raises(RuntimeError, match="broke"):
        attribute(mlp.model, Broken(), method=coar.Regression(), budget="3 min", out=tmp_path)
    clock.rate = 5.0
    found = attribute(mlp.model, [mlp.batch] * 2, method=coar.Regression(), budget="3 min", out=tmp_path)
    assert found.config["method"]["n_masks"] == (180 - 16) // 8


def test_timing_takes_a_small_part_of_the_time(mlp, tmp_path, monkeypatch):
    clock = Clock(mlp.model, monkeypatch)
    batch = {name: value.repeat_interleave(8, 0) for name, value in mlp.batch.items()}
    chosen = budgets.choose(coar.Regression(), "20 min", problem(mlp, [batch] * 4), tmp_path)
    assert clock.now <= 0.06 * 20 * 60
    assert chosen.n_masks == (1200 - clock.now) // 128


def test_a_batch_that_is_cheaper_together_is_timed_as_such(mlp, tmp_path, monkeypatch):
    """As on a GPU, where thirty examples take as long as one."""
    clock = Clock(mlp.model, monkeypatch)
    clock.of_batch = True
    batch = {name: value.repeat_interleave(8, 0) for name, value in mlp.batch.items()}
    chosen = budgets.choose(coar.Regression(), "60 min", problem(mlp, [batch] * 4), tmp_path)
    # Pieces of 1, 1, 2, 4, 8 and 16 examples take 8 s each; then half a second an example and pass.
    assert clock.now == 6 * 8
    assert chosen.n_masks == (3600 - 48) * 16 // 128


def test_too_few_minutes(mlp, monkeypatch):
    Clock(mlp.model, monkeypatch)
    with pytest.raises(CoarError, match="too small"):
        attribute(mlp.model, [mlp.batch], method=coar.Regression(), budget="20 s")  # 16 of them go into timing


def test_minutes_on_the_real_clock(mlp):
    found = attribute(mlp.model, [mlp.batch], method=coar.PathGradient(), budget="3 s")
    assert found.config["method"]["rounds"] >= 2 and found.config["method"]["rounds"] % 2 == 0


def test_minutes_for_what_has_no_number(mlp):
    with pytest.raises(CoarError, match=r"LeaveOneOut.*leave budget out"):
        attribute(mlp.model, [mlp.batch], method=LeaveOneOut(), budget="1 min")


def test_minutes_for_a_stream_of_unknown_length(mlp):
    class Stream:
        def __iter__(self):
            yield mlp.batch

    with pytest.raises(CoarError, match="stream of unknown length"):
        attribute(mlp.model, Stream(), budget="1 min")


# -------------------------------------------------------------------------------------------------------------- hybrid


def test_the_hybrid_costs_both_and_says_so(convnet, tmp_path):
    method = coar.Regression(n_masks=40, prior=coar.PathGradient(rounds=2))
    found = attribute(convnet.model, [convnet.batch], method=method, out=tmp_path)
    assert found.config["cost"] == 40 + 30
    assert found.config["method"]["prior"]["name"] == "path_gradient"
    again = attribute(convnet.model, [convnet.batch], method=method, out=tmp_path)
    assert torch.equal(found.weights, again.weights)
    with pytest.raises(RunMismatchError, match="prior"):
        attribute(convnet.model, [convnet.batch], method=coar.Regression(n_masks=40), out=tmp_path)


def test_the_hybrid_is_better_than_its_few_masks_alone(demo_pair):
    model, data = demo_pair
    options = {"ablated_fraction": 0.1, "progress": False}
    correlations = {}
    for name, method in {
        "alone": coar.Regression(n_masks=40),
        "hybrid": coar.Regression(n_masks=40, prior=coar.PathGradient(rounds=2)),
    }.items():
        found = coar.attribute(model, data, method=method, **options)
        report = coar.evaluate(found, model, data, fractions=(0.1,), n_masks=60, progress=False)
        correlations[name] = report.correlation[0.1]
    assert correlations["hybrid"] > correlations["alone"] + 0.1


def test_a_solver_that_takes_no_prior():
    with pytest.raises(CoarError, match=r"Lasso takes no prior.*Ridge"):
        coar.Regression(solver=coar.Lasso(), prior=coar.PathGradient())


@pytest.mark.parametrize("solver", [coar.Lasso(), coar.ARD()], ids=lambda s: type(s).__name__)
def test_other_solvers_in_a_run(mlp, solver):
    found = attribute(mlp.model, [mlp.batch], method=coar.Regression(n_masks=30, solver=solver))
    assert found.weights.isfinite().all() and found.config["method"]["solver"]["name"] == type(solver).__name__


# ------------------------------------------------------------------------------------------------- without gradients


class NoGradient(nn.Module):
    """A net whose forward blocks gradients."""

    def __init__(self):
        super().__init__()
        self.inner = build_net("mlp").model

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


def test_without_gradients_the_default_is_a_regression_and_says_so(mlp, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_coar"):
        found = attribute(NoGradient().eval(), [mlp.batch], budget=50)
    assert found.config["method"]["name"] == "regression" and found.config["method"]["solver"]["name"] == "ARD"
    assert found.config["method"]["n_masks"] == 50
    assert "no gradient reaches the gates" in caplog.text


def test_a_method_that_was_chosen_is_not_replaced(mlp):
    with pytest.raises(coar.CoarError, match="no gradient"):
        attribute(NoGradient().eval(), [mlp.batch], method=coar.PathGradient(2))


def test_with_gradients_the_default_stays_quiet(mlp, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_coar"):
        found = attribute(mlp.model, [mlp.batch], budget=200)
    assert found.config["method"]["name"] == "leave_one_out" and "no gradient" not in caplog.text
