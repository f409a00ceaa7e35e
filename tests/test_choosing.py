"""What is chosen for the user: ablated fraction and method; leave-one-out with pairs; laws against exact values."""

import pytest
import torch
from torch import nn

import hf_coar as coar
from hf_coar.errors import DataError
from hf_coar.estimators import choosing, flips
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs.problem import Problem


class Few(nn.Module):
    """Eight components that interact."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(2 * self.first(x)))


N, FRACTION = 8, 0.1


@pytest.fixture(scope="module")
def few():
    """Model, data, and the outputs [256, examples] under all masks, bool [256, 8]."""
    torch.manual_seed(3)
    model = Few().eval()
    nn.init.normal_(model.second.weight, std=1.5)
    batch = {"x": torch.randn(10, 6), "labels": torch.arange(10) % 3}
    masked, logit = MaskedModel(model, coar.find_components(model)), outputs.get("logit")
    kept = (torch.arange(2**N)[:, None] >> torch.arange(N) & 1).bool()
    found = []
    with torch.no_grad():
        for row in kept:
            with masked.ablated(row):
                found.append(logit.of(model, batch))
    return model, [batch], kept, torch.stack(found).double()


def banzhaf(kept, values, fraction):
    """Effects averaged over all sets of the others, each ablated with a probability: [examples, components]."""
    gone = (~kept).sum(1).double()
    chance = fraction**gone * (1 - fraction) ** (kept.shape[1] - gone)
    columns = []
    for on in kept.T:
        with_it = (chance[on, None] * values[on]).sum(0) / (1 - fraction)
        columns.append(with_it - (chance[~on, None] * values[~on]).sum(0) / fraction)
    return torch.stack(columns, dim=1)


def attribute(few, method, **options):
    options = {"output": "logit", "ablated_fraction": FRACTION, "progress": False, **options}
    return coar.attribute(few[0], few[1], method=method, **options)


def error(found, exact):
    return float((found.weights - exact).norm() / exact.norm())


# -------------------------------------------------------------------------------------------- laws against exact values


def test_estimators_converge_to_the_banzhaf_value(few):
    exact = banzhaf(*few[2:], FRACTION)
    cheap, dear = (error(attribute(few, coar.Regression(m, coar.Ridge(0.0))), exact) for m in (100, 6000))
    assert dear < 0.06 and dear < 0.5 * cheap
    rounds = [error(attribute(few, coar.PathGradient(r, n_flips=0, check_masks=0)), exact) for r in (4, 128)]
    assert rounds[1] < 0.2 and rounds[1] < rounds[0]


def test_contexts_converge_to_the_banzhaf_value(few):
    exact = banzhaf(*few[2:], FRACTION)
    method = {n: coar.PathGradient(passes=n, smooth=False, max_outliers=0) for n in (20, 800)}
    cheap, dear = (error(attribute(few, one), exact) for one in method.values())
    assert dear < 0.06 and dear < 0.5 * cheap


def test_pairs_bring_leave_one_out_to_the_banzhaf_value(few):
    exact = banzhaf(*few[2:], FRACTION)
    singles, paired = (error(attribute(few, coar.baselines.LeaveOneOut(k)), exact) for k in (0, N))
    assert paired < 0.3 * singles and paired < 0.05


def test_weights_far_from_the_whole_model_are_told(few, caplog):
    """At large fractions weights of single effects and pairs are further off than a regression's; nothing said so."""
    for fraction, told in ((0.1, False), (0.5, True)):
        caplog.clear()
        with caplog.at_level("WARNING", "hf_coar"):
            found = attribute(few, "auto", ablated_fraction=fraction)
        assert found.provenance.method_name == "leave_one_out"
        assert ("hold near the whole model" in caplog.text) == told
        assert any("Regression(n_masks=200)" in line for line in found.provenance.warnings) == told
        exact, fitted = banzhaf(*few[2:], fraction), attribute(few, coar.Regression(200), ablated_fraction=fraction)
        assert (error(found, exact) > error(fitted, exact)) == told, (error(found, exact), error(fitted, exact))


def test_weights_that_are_exact_are_not_warned_of(caplog):
    """Of a single component there is nothing that its effect could depend on."""
    model, batch = nn.Sequential(nn.Linear(4, 1)).eval(), {"x": torch.randn(3, 4)}
    with caplog.at_level("WARNING", "hf_coar"):
        coar.attribute(model, [batch], output=lambda logits, _: logits[:, 0], ablated_fraction=0.5, progress=False)
    assert "near the whole model" not in caplog.text


def test_pairs_are_the_interactions(few):
    kept, values = few[2:]
    found = attribute(few, coar.baselines.LeaveOneOut(N))
    assert len(found.pairs) == N * (N - 1) // 2

    def without(*gone):
        row = torch.ones(N, dtype=torch.bool)
        row[list(gone)] = False
        return values[(kept == row).all(1)][0]

    for (i, j), interaction in list(found.pairs.items())[::5]:
        wanted = without(i, j) - without(i) - without(j) + without()
        assert torch.allclose(interaction.double(), wanted, atol=1e-5)
        predicted = found.predict(torch.ones(N).index_fill(0, torch.tensor([i, j]), 0))[0]
        assert torch.allclose(predicted.double(), without(i, j), atol=1e-4)


def test_pairs_predict_better_and_are_saved(few, tmp_path):
    model, batches, *_ = few
    options = {"fractions": (0.3,), "n_masks": 80, "progress": False}
    found, singles = (attribute(few, coar.baselines.LeaveOneOut(k)) for k in (N, 0))
    better, worse = (coar.evaluate(each, model, batches, **options).correlation[0.3] for each in (found, singles))
    assert better > worse + 0.005
    found.save_pretrained(tmp_path)
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert loaded.pairs.keys() == found.pairs.keys()
    kept = torch.rand(6, N)
    assert torch.equal(loaded.predict(kept), found.predict(kept))
    assert singles.pairs == {}


class Chained(nn.Module):
    """Eight of forty neurons that all are needed: without one or without all of them the logit falls by the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 40, bias=False)
        nn.init.normal_(self.first.weight, 1 / 6, 0.01)

    def forward(self, x):
        each = self.first(x)
        shown = each[:, :8].amin(1) + 0.01 * each[:, 8:].sum(1)
        return torch.stack([shown, torch.zeros_like(shown)], dim=1)


def test_pairs_of_strong_sets_do_not_add_up_to_more_than_there_is(tmp_path):
    torch.manual_seed(0)
    model, batch = Chained().eval(), {"x": 1 + torch.rand(8, 6), "labels": torch.zeros(8, dtype=torch.long)}
    found = attribute((model, [batch]), coar.baselines.LeaveOneOut(8, check_masks=20))
    masked, logit = MaskedModel(model, found.components), outputs.get("logit")
    missed = []
    for count in (4, 6, 8):
        kept = torch.ones(len(found.components), dtype=torch.bool)
        kept[:count] = False
        with torch.no_grad(), masked.ablated(kept):
            measured = logit.of(model, batch)
        missed.append(float((found.predict(kept[None])[0] - measured).abs().mean()))
    assert max(missed) < 4  # 28 interactions, each as large as an effect, would be some twenty
    found.save_pretrained(tmp_path)
    loaded = coar.Attributions.from_pretrained(tmp_path)
    assert torch.equal(loaded.predict(kept[None]), found.predict(kept[None]))
    assert loaded.forecast.far.trust == found.forecast.far.trust > 0


# --------------------------------------------------------------------------------------------------------- the method


def problem(model, batches, fraction=0.05, output="logit"):
    return Problem(MaskedModel(model, coar.find_components(model)), batches, outputs.get(output), fraction, 0)


def test_few_components_are_ablated_one_by_one_with_pairs(few):
    method, reason = choosing.best_method(problem(few[0], few[1]))
    assert isinstance(method, coar.baselines.LeaveOneOut) and method.pairs_among == N and "one by one" in reason
    found = attribute(few, "auto")
    assert found.provenance.method_name == "leave_one_out" and found.pairs
    assert any("leave_one_out" in line for line in found.provenance.chosen)


def test_many_components_take_path_gradient(demo_pair):
    model, batches = demo_pair
    method, reason = choosing.best_method(problem(model, batches, 0.05, "margin"))
    assert method == coar.PathGradient() and "too many" in reason


@pytest.mark.parametrize(("noise", "rounds"), [(-1.0, 4), (1.0, 8)])
def test_fragile_models_with_noisy_gradients_take_more_rounds(demo_pair, monkeypatch, noise, rounds, tmp_path):
    """Four rounds predicted fresh masks of a MobileNetV2, made and ablated at 1 %, with .65, eight with .74."""
    monkeypatch.setattr(choosing, "_NOISE", noise)
    posed = problem(*demo_pair, 0.01, "margin")
    monkeypatch.setattr(choosing, "_DEARER", 1)
    method, reason = choosing.best_method(posed)
    assert method == coar.PathGradient(rounds) and ("so that 8 are taken" in reason) == (rounds == 8)
    begun, _ = choosing.kept(tmp_path, posed, method, {"method": reason})
    monkeypatch.setattr(choosing, "_NOISE", -noise)  # another look does not change a run
    again, said = choosing.kept(tmp_path, posed, coar.PathGradient(), {"method": "another look"})
    assert again == begun == method and said == {"method": reason}


@pytest.mark.parametrize(("noise", "name"), [(-1.0, "path_gradient"), (1.0, "leave_one_out")])
def test_a_look_decides_in_between(demo_pair, monkeypatch, noise, name):
    monkeypatch.setattr(choosing, "_NOISE", noise)
    method, reason = choosing.best_method(problem(*demo_pair, 0.04, "margin"))
    assert method.name == name and "reliability of 0." in reason
    assert getattr(method, "pairs_among", 16) == 16 and ("among the 16 strongest" in reason) == (
        name != "path_gradient"
    )


@pytest.mark.parametrize(("more", "among"), [(0, 0), (1, 2), (5, 3), (10_000, 16)])
def test_a_budget_affords_as_many_pairs_as_are_left(demo_pair, monkeypatch, more, among):
    monkeypatch.setattr(choosing, "_NOISE", 1.0)
    posed = problem(*demo_pair, 0.04, "margin")
    method, reason = choosing.best_method(posed, budget=len(posed.components) + 21 + more)
    assert method.pairs_among == among and ("pairs" in reason) == (among > 0)


def test_a_budget_has_to_afford_one_by_one(few):
    n_components = len(coar.find_components(few[0]))
    exact = n_components + 1 + 20
    by_budget = ((exact - 1, "path_gradient"), (exact, "leave_one_out"), ("0.0001 s", "path_gradient"))
    for budget, name in (*by_budget, ("2 min", "leave_one_out")):
        assert choosing.best_method(problem(few[0], few[1]), budget=budget)[0].name == name
    pairs = n_components * (n_components - 1) // 2
    found = attribute(few, "auto", budget=exact + pairs)
    assert found.provenance.method["pairs_among"] == n_components and found.provenance.cost == exact + pairs


def test_minutes_that_afford_one_by_one_take_it_and_resume_with_it(few, tmp_path, monkeypatch):
    found = attribute(few, "auto", budget="2 min", out=tmp_path)
    assert found.provenance.method["name"] == "leave_one_out" and not (tmp_path / "budget.json").exists()
    monkeypatch.setattr(choosing.budgets, "affordable", lambda *given: 1.0)  # a slower machine goes on with the run
    again = attribute(few, "auto", budget="2 min", out=tmp_path)
    assert torch.equal(again.weights, found.weights)


class Blocked(nn.Module):
    """Lets no gradient through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x):
        with torch.no_grad():
            return self.second(self.first(x))


@pytest.mark.parametrize(("width", "name"), [(20, "leave_one_out"), (4000, "regression")])
def test_without_gradients(width, name):
    batch = {"x": torch.randn(2, 4), "labels": torch.tensor([0, 2])}
    method, reasons = choosing.settled(problem(Blocked(width).eval(), [batch]), None)
    reason = reasons["method"]
    assert method.name == name and "no gradient" in reason and "exclude" not in reason


def test_few_modules_without_a_gradient_can_be_left_out():
    """What is chosen for all is for the sake of one; without that one the default has its way."""

    class Half(Blocked):
        def forward(self, x):
            return self.second(torch.relu(self.first(x).detach()))

    batch = {"x": torch.randn(2, 4), "labels": torch.tensor([0, 2])}
    _, reasons = choosing.settled(problem(Half(4000).eval(), [batch]), None)
    assert "components without these (exclude=['first', …]) have the default" in reasons["method"]


# ------------------------------------------------------------------------------------------------------- the fraction


def test_the_demo_is_made_for_five_percent(demo_pair):
    model, batches = demo_pair
    fraction, reason = choosing.fraction(problem(model, batches, output="margin"))
    assert fraction == 0.05 and "decisions" in reason


class Fragile(nn.Module):
    """Right only while fewer than one in a hundred of its 1,000 components are ablated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1000, bias=False)
        nn.init.ones_(self.first.weight)

    def forward(self, x):
        count = self.first(torch.ones_like(x[:, :1])).sum(1)
        return torch.stack([count - 990, torch.zeros_like(count)], dim=1)


def test_a_fragile_model_gets_a_smaller_fraction():
    batch = {"x": torch.randn(4, 2), "labels": torch.zeros(4, dtype=torch.long)}
    fraction, reason = choosing.fraction(problem(Fragile().eval(), [batch], output="margin"))
    assert fraction in (0.01, 0.005) and "0% at 0.05, 0% at 0.02" in reason


def test_outputs_without_a_boundary(few):
    fraction, reason = choosing.fraction(problem(few[0], few[1], output="log_prob"))
    assert 0 < fraction <= 0.125 and "of the output" in reason


def test_what_survives():
    whole, found = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0], [-1.0, -2.0]])
    assert choosing._surviving(found, whole, None, 0.0) == 0.5
    nothing = torch.tensor([[-2.0, -5.0]])
    assert choosing._surviving(whole - 1, whole, nothing, None) == pytest.approx(0.75)
    assert choosing._surviving(found * torch.nan, whole, None, 0.0) < 1


def test_the_choice_is_recorded(few):
    found = attribute(few, "auto", ablated_fraction=None)
    fraction = found.provenance.ablated_fraction
    assert fraction == choosing.fraction(problem(few[0], few[1]))[0]
    assert any("ablated_fraction=" in line for line in found.provenance.chosen)


def test_a_run_keeps_its_choice(few, tmp_path, monkeypatch):
    first = attribute(few, "auto", ablated_fraction=None, out=tmp_path)
    monkeypatch.setattr(choosing, "FRACTIONS", (0.3,))
    monkeypatch.setattr(choosing, "best_method", lambda *of: (coar.PathGradient(2), "another look"))
    again = attribute(few, "auto", ablated_fraction=None, out=tmp_path)
    assert again.provenance == first.provenance and torch.equal(again.weights, first.weights)
    with pytest.raises(coar.CoarError, match="ablated_fraction"):
        attribute(few, "auto", ablated_fraction=0.2, out=tmp_path)  # what a person says is not overruled
    (tmp_path / "chosen.json").write_text('{"method": {"name": "nothing"}}')
    with pytest.raises(coar.CoarError, match="no choice"):
        attribute(few, "auto", ablated_fraction=None, out=tmp_path)


def test_a_fraction_that_ablates_nothing_is_told(few):
    with pytest.raises(coar.CoarError, match=r"8 components: hardly any .* take 0\.125"):
        attribute(few, "auto", ablated_fraction=0.001)
    with pytest.raises(coar.CoarError, match="hardly any mask"):
        coar.evaluate(attribute(few, "auto"), few[0], few[1], fractions=(0.001,), progress=False)


def test_one_component_and_one_example():
    model = nn.Sequential(nn.Linear(3, 1)).eval()
    found = coar.attribute(
        model, [{"input": torch.ones(1, 3), "labels": torch.zeros(1, dtype=torch.long)}], output="logit", progress=False
    )
    assert found.weights.shape == (1, 1)
    assert float(found.predict([False])[0]) == pytest.approx(float(model[0].bias), abs=1e-5)


def test_all_outputs_equal(few):
    silent = outputs.Output("silent", "nothing", lambda logits, batch: logits[:, 0] * 0)
    found = attribute(few, "auto", output=silent)
    assert not found.weights.any() and found.predict(torch.zeros(N)).abs().max() == 0
    method = coar.PathGradient(2)
    assert not attribute(few, method, output=silent).weights.any()


def test_masks_of_lists():
    masks = flips.Without(4, ((), (1, 3)))
    assert masks.count == 2 and masks.ablated_fraction == 0.5
    assert masks.rows(1, 2).int().tolist() == [[1, 0, 1, 0]]


def test_data_are_there_for_the_choice():
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    with pytest.raises(DataError, match="empty"):
        coar.attribute(model, [], progress=False)
