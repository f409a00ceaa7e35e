"""Solvers: laws over every solver of `estimators.solvers`, against a float64 reference and brute-force refitting."""

import inspect
import math

import pytest
import torch

from hf_coar.errors import CoarError
from hf_coar.estimators import solvers
from hf_coar.estimators.solvers import ARD, Lasso, Ridge, systems
from hf_coar.estimators.solvers.design import Design, counts, diagonal_of_inverse, weighted_counts

# Whatever class in the module has a `fit` is tested, in its default configuration.
SOLVERS = [
    value
    for value in vars(solvers).values()
    if inspect.isclass(value) and value.__module__.startswith(solvers.__name__) and hasattr(value, "fit")
    if not getattr(value, "_is_protocol", False)
]
SHAPES = [(300, 40), (60, 90), (50, 50), (41, 40)]  # (masks, components): primal, dual and both sides of the border


def problem(n_masks, n_components, n_examples=7, noise=0.0, seed=0, fraction=0.2):
    """Masks, outputs, and the weights and biases that made them."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n_masks, n_components, generator=generator) > fraction
    weights = torch.randn(n_examples, n_components, generator=generator, dtype=torch.float64)
    bias = torch.randn(n_examples, generator=generator, dtype=torch.float64)
    outputs = masks.double() @ weights.T + bias
    outputs += noise * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return masks, outputs, weights, bias


def reference(masks, outputs, strength):
    """Ridge with an intercept by the normal equations in float64; outputs may be one column or many."""
    x, y = masks.double(), outputs.double()
    mean, y_mean = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ (y - y_mean)).T
    return weights, y_mean - weights @ mean


def least_norm(masks, outputs):
    """Least squares with an intercept, of least norm, by a pseudo-inverse in float64."""
    x, y = masks.double(), outputs.double()
    weights = (torch.linalg.pinv(x - x.mean(0)) @ (y - y.mean(0))).T
    return weights, y.mean(0) - weights @ x.mean(0)


def leave_one_out(masks, outputs, strength):
    """Mean squared error of every example when each mask in turn is left out of the fit, by refitting."""
    errors = []
    for left_out in range(len(masks)):
        rest = torch.arange(len(masks)) != left_out
        weights, bias = reference(masks[rest], outputs[rest], strength)
        errors.append(outputs[left_out].double() - bias - weights @ masks[left_out].double())
    return torch.stack(errors).square().mean(0)


def close(fitted, expected, tolerance=1e-5):
    return all(
        torch.allclose(a.double(), b, atol=tolerance, rtol=tolerance) for a, b in zip(fitted, expected, strict=True)
    )


def test_something_is_tested():
    assert set(SOLVERS) >= {Ridge, Lasso, ARD}


@pytest.fixture(params=SOLVERS, ids=lambda solver: solver.__name__)
def solver(request):
    return request.param()


# --------------------------------------------------------------------------------------------- laws over every solver


@pytest.mark.parametrize(("n_masks", "n_components"), SHAPES)
def test_shapes_and_dtypes(solver, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components)
    weights, bias = solver.fit(masks, outputs.float())
    assert weights.shape == (7, n_components) and bias.shape == (7,)
    assert weights.dtype == bias.dtype == torch.float32
    assert weights.isfinite().all() and bias.isfinite().all()


def test_planted_answer_is_recovered(solver):
    masks, outputs, weights, bias = problem(400, 30, noise=0.05)
    fitted, fitted_bias = solver.fit(masks, outputs.float())
    assert (fitted - weights).abs().max() < 0.05
    assert (fitted_bias - bias).abs().max() < 0.2


def test_planted_sparse_answer_is_seen_with_fewer_masks_than_components(solver):
    masks, _, _, _ = problem(150, 300, n_examples=5)
    weights = torch.zeros(5, 300, dtype=torch.float64)
    for example in range(5):
        weights[example, 31 * example + 7] = 10.0
    fitted, _ = solver.fit(masks, masks.double() @ weights.T + 3.0)
    assert (fitted.argmax(1) == weights.argmax(1)).all()


@pytest.mark.parametrize(("n_masks", "n_components"), [(200, 30), (40, 60)])
def test_order_of_masks_components_and_examples_does_not_matter(solver, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.5)
    weights, bias = solver.fit(masks, outputs)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(n_masks, generator=generator), torch.randperm(n_components, generator=generator)
    examples = torch.randperm(7, generator=generator)
    permuted = solver.fit(masks[rows][:, columns], outputs[rows][:, examples])
    assert close(permuted, (weights[examples][:, columns].double(), bias[examples].double()))


def test_examples_do_not_influence_each_other(solver):
    if isinstance(solver, ARD):
        pytest.skip("its prior variances are shared by all examples, which is the point of it")
    masks, outputs, _, _ = problem(100, 30, noise=0.5)
    outputs[:, 3] *= 1e4
    weights, bias = solver.fit(masks, outputs)
    alone = solver.fit(masks, outputs[:, 2:3])
    assert close(alone, (weights[2:3].double(), bias[2:3].double()))


@pytest.mark.parametrize(("n_masks", "n_components"), [(200, 30), (40, 60)])
def test_outputs_shifted_and_scaled(solver, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.5)
    weights, bias = solver.fit(masks, outputs)
    shifted = solver.fit(masks, 2 * outputs + 100)
    assert close(shifted, (2 * weights.double(), 2 * bias.double() + 100), 1e-4)


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 20), (20, 60)])
def test_a_component_that_no_mask_ablates_gets_nothing(solver, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.5)
    masks[:, 5] = True
    weights, bias = solver.fit(masks, outputs)
    assert weights[:, 5].abs().max() < 1e-5
    assert weights.isfinite().all() and bias.isfinite().all()


def test_constant_outputs_give_the_constant(solver):
    masks, _, _, _ = problem(60, 20)
    weights, bias = solver.fit(masks, torch.full((60, 2), 4.5))
    assert weights.abs().max() < 1e-6 and bias.tolist() == pytest.approx([4.5, 4.5], abs=1e-5)


def test_arguments_stay_as_they_were(solver):
    masks, outputs, _, _ = problem(60, 20)
    copies = masks.clone(), outputs.clone()
    solver.fit(masks, outputs)
    assert torch.equal(masks, copies[0]) and torch.equal(outputs, copies[1])


def test_numbers_that_do_not_match_are_an_error(solver):
    masks, outputs, _, _ = problem(60, 20)
    with pytest.raises(CoarError, match=r"60.*59"):
        solver.fit(masks, outputs[:59])
    with pytest.raises(CoarError, match="at least 3"):
        solver.fit(masks[:2], outputs[:2])


# -------------------------------------------------------------------------------------------------------------- ridge


@pytest.mark.parametrize(("n_masks", "n_components"), SHAPES)
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_ridge_solves_the_normal_equations(n_masks, n_components, strength):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.3)
    assert close(Ridge(strength).fit(masks, outputs), reference(masks, outputs, strength))


@pytest.mark.parametrize("n_masks", [5000, 4097])
def test_ridge_in_chunks(n_masks):
    masks, outputs, _, _ = problem(n_masks, 12, n_examples=2, noise=0.3)
    assert close(Ridge(2.0).fit(masks, outputs), reference(masks, outputs, 2.0))


def test_ridge_in_chunks_of_components():
    masks, outputs, _, _ = problem(8, 4500, n_examples=2, noise=0.3)
    expected = least_norm(masks, outputs)
    assert close(Ridge(0.0).fit(masks, outputs), expected)


@pytest.mark.parametrize(("n_masks", "n_components"), SHAPES)
def test_strength_zero_is_least_squares_of_least_norm(n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.3)
    assert close(Ridge(0.0).fit(masks, outputs), least_norm(masks, outputs), 1e-4)


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 20), (20, 60)])
def test_strength_zero_with_twins_and_repeated_masks(n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.3)
    masks[:, 3] = masks[:, 4]  # two components that are always ablated together share their weight
    masks[1], masks[2] = masks[0], masks[0]
    weights, bias = Ridge(0.0).fit(masks, outputs)
    assert close((weights, bias), least_norm(masks, outputs), 1e-4)
    assert torch.allclose(weights[:, 3], weights[:, 4], atol=1e-5)


@pytest.mark.parametrize(("n_masks", "n_components"), [(40, 12), (25, 40), (30, 29)])
def test_strength_is_chosen_by_exact_leave_one_out_error(n_masks, n_components):
    generator = torch.Generator().manual_seed(5)
    masks, outputs, _, _ = problem(n_masks, n_components, n_examples=8)
    noise = torch.logspace(-2, 1.5, 8, dtype=torch.float64)
    outputs = outputs + noise * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    centred = masks.double() - masks.double().mean(0)
    largest = float(torch.linalg.matrix_norm(centred, 2)) ** 2
    candidates = torch.logspace(-6, 1, 15, dtype=torch.float64) * largest
    errors = torch.stack([leave_one_out(masks, outputs, float(strength)) for strength in candidates])
    chosen = errors.argmin(0)
    assert chosen.unique().numel() >= 3, "the examples should ask for different strengths"
    weights, bias = Ridge(n_strengths=15).fit(masks, outputs)
    for example, index in enumerate(chosen):
        column = outputs[:, example : example + 1]
        expected = reference(masks, column, float(candidates[index]))
        assert close((weights[example : example + 1], bias[example : example + 1]), expected, 1e-4), example


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_bad_strength(strength):
    with pytest.raises(CoarError, match="strength"):
        Ridge(strength=strength)


def test_bad_number_of_strengths():
    with pytest.raises(CoarError, match="n_strengths"):
        Ridge(n_strengths=0)


# --------------------------------------------------------------------- ridge by one factorisation a strength (large)


@pytest.fixture
def factored(monkeypatch):
    """Small problems take the way of large ones."""
    monkeypatch.setattr(systems, "SPECTRAL_UP_TO", 0)


@pytest.mark.parametrize(("n_masks", "n_components"), SHAPES)
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_factored_ridge_solves_the_normal_equations(factored, n_masks, n_components, strength):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.3)
    assert close(Ridge(strength).fit(masks, outputs), reference(masks, outputs, strength), 1e-3)


@pytest.mark.parametrize(("n_masks", "n_components"), [(40, 12), (25, 40), (30, 29)])
@pytest.mark.parametrize("strength", [0.1, 3.0])
@pytest.mark.parametrize("make", [systems.Spectral, systems.Factored])
def test_both_systems_leave_one_out(make, n_masks, n_components, strength):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.5)
    centred = outputs - outputs.mean(0)
    residuals, _ = make(Design(masks)).left_out(centred, strength)
    assert torch.allclose(residuals.double().square().mean(0), leave_one_out(masks, outputs, strength), rtol=1e-4)


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 12), (40, 60)])
def test_the_search_ends_where_no_neighbour_is_better(factored, n_masks, n_components):
    generator = torch.Generator().manual_seed(5)
    masks, outputs, _, _ = problem(n_masks, n_components, n_examples=8)
    noise = torch.logspace(-2, 1.5, 8, dtype=torch.float64)
    outputs = outputs + noise * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    system, search = Ridge()._searched(Design(masks), outputs, None)
    chosen = search.strength
    assert chosen.unique().numel() >= 3, "the examples should ask for different strengths"
    low, high = system.mean_eigenvalue() * 3.0**-11, system.mean_eigenvalue() * 3.0**3
    for example, strength in enumerate(chosen.tolist()):
        errors = [float(leave_one_out(masks, outputs, strength * f)[example]) for f in (1 / 3, 1.0, 3.0)]
        assert errors[1] <= errors[0] * 1.05 or strength < 1.1 * low
        assert errors[1] <= errors[2] * 1.05 or strength > high / 1.1
        expected = reference(masks, outputs[:, example : example + 1], strength)
        weights, bias = Ridge().fit(masks, outputs)
        assert close((weights[example : example + 1], bias[example : example + 1]), expected, 1e-3)


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 20), (20, 60)])
def test_the_factored_ridge_survives_twins_and_strength_zero(factored, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.3)
    masks[:, 3] = masks[:, 4]
    masks[1], masks[2] = masks[0], masks[0]
    masks[:, 7] = True
    assert close(Ridge(0.0).fit(masks, outputs), least_norm(masks, outputs), 1e-4)


@pytest.mark.parametrize("as_floats", [False, True])
def test_counts_are_exact(monkeypatch, as_floats):
    if as_floats:
        monkeypatch.setattr("hf_coar.estimators.solvers.design._multiplies_bytes", lambda masks: False)
    monkeypatch.setattr("hf_coar.estimators.solvers.design._BLOCK", 16)
    masks, _, _, _ = problem(45, 301)
    ablated = (~masks).double()
    assert torch.equal(counts(masks, torch.float64), ablated @ ablated.T)
    assert torch.equal(counts(masks.T, torch.float64), ablated.T @ ablated)
    weights = torch.rand(301, dtype=torch.float64)
    assert torch.allclose(weighted_counts(masks, weights, torch.float64), ablated * weights @ ablated.T)


def test_a_scaled_design_is_the_product_with_the_scale():
    masks, outputs, weights, _ = problem(45, 30)
    scale = torch.rand(30, dtype=torch.float64)
    dense = (masks.double() - masks.double().mean(0)) * scale
    design = Design(masks, scale)
    assert torch.allclose(design.times(weights.T), dense @ weights.T)
    assert torch.allclose(design.transposed(outputs), dense.T @ outputs)
    assert torch.allclose(design.gram_of_masks(torch.float64), dense @ dense.T)
    assert torch.allclose(design.gram_of_components(torch.float64), dense.T @ dense)
    assert torch.allclose(design.rows(3, 9), dense[3:9]) and torch.allclose(design.columns(3, 9), dense[:, 3:9])


def test_the_diagonal_of_the_inverse():
    matrix = torch.randn(70, 90, dtype=torch.float64)
    matrix = matrix @ matrix.T
    found = diagonal_of_inverse(torch.linalg.cholesky(matrix), block=16)
    assert torch.allclose(found, torch.linalg.inv(matrix).diagonal())


# ----------------------------------------------------------------------------------------------- a prior (the hybrid)


def mean_correlation(fitted, weights, seed=9):
    """Of predictions and truth on fresh masks, mean over the examples."""
    masks = torch.rand(400, weights.shape[1], generator=torch.Generator().manual_seed(seed)) > 0.2
    predicted, truth = masks.double() @ fitted.double().T, masks.double() @ weights.T
    return float(
        torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(predicted.T, truth.T, strict=True)]).mean()
    )


@pytest.mark.parametrize("solver", [Ridge(), ARD()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 90), (200, 60)])
def test_a_good_prior_helps_and_a_useless_one_does_no_harm(solver, n_masks, n_components):
    generator = torch.Generator().manual_seed(3)
    masks, outputs, weights, _ = problem(n_masks, n_components, noise=2.0)
    alone = mean_correlation(solver.fit(masks, outputs)[0], weights)
    useless = torch.randn(weights.shape, generator=generator)
    good = 3 * (weights + 0.5 * useless)  # of the wrong scale, too
    with_good = mean_correlation(solver.fit(masks, outputs, good)[0], weights)
    assert with_good > max(alone, mean_correlation(good, weights)) + 0.002
    assert mean_correlation(solver.fit(masks, outputs, useless)[0], weights) > alone - 0.015
    assert mean_correlation(solver.fit(masks, outputs, -good)[0], weights) > alone - 0.015


def test_a_perfect_prior_is_taken_whole():
    masks, outputs, weights, bias = problem(40, 60)
    assert close(Ridge().fit(masks, outputs, 0.5 * weights), (weights, bias), 1e-3)


@pytest.mark.parametrize("large", [False, True])
def test_the_factor_of_the_prior_is_of_least_leave_one_out_error(monkeypatch, large):
    if large:
        monkeypatch.setattr(systems, "SPECTRAL_UP_TO", 0)
    masks, outputs, weights, _ = problem(25, 40, noise=0.5)
    prior = weights + torch.randn(weights.shape, generator=torch.Generator().manual_seed(3))
    _, search = Ridge(strength=2.0)._searched(Design(masks), outputs, prior)
    predicted = masks.double() @ prior.T

    def error(factor):
        return leave_one_out(masks, outputs - factor * predicted, 2.0)

    assert (search.factor > 0.2).all()
    best = error(search.factor)
    assert torch.allclose(best, search.error, rtol=1e-4)
    assert (best <= error(search.factor * 1.05)).all() and (best <= error(search.factor * 0.95)).all()


def test_a_prior_of_another_shape(solver):
    masks, outputs, _, _ = problem(30, 20)
    if isinstance(solver, Lasso):
        pytest.skip("it takes no prior")
    with pytest.raises(CoarError, match=r"\[7, 19\].*\[7, 20\]"):
        solver.fit(masks, outputs, torch.zeros(7, 19))


# -------------------------------------------------------------------------------------------------------------- lasso


@pytest.mark.parametrize(("n_masks", "n_components"), [(120, 30), (60, 90), (30, 100)])
@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_lasso_agrees_with_scikit_learn(n_masks, n_components, fraction):
    linear_model = pytest.importorskip("sklearn.linear_model")
    masks, outputs, _, _ = problem(n_masks, n_components, n_examples=3, noise=1.0)
    centred = masks.double() - masks.double().mean(0)
    strength = fraction * float((centred.T @ outputs).abs().max()) / n_masks
    weights, bias = Lasso(strength, tolerance=1e-8, n_iterations=20000).fit(masks, outputs)
    for example in range(3):
        model = linear_model.Lasso(alpha=strength, tol=1e-12, max_iter=200000)
        model.fit(masks.double().numpy(), outputs[:, example].numpy())
        assert torch.allclose(weights[example].double(), torch.from_numpy(model.coef_), atol=2e-4)
        assert float(bias[example]) == pytest.approx(model.intercept_, abs=2e-3)


def test_lasso_finds_the_few_components_that_matter():
    masks, _, _, _ = problem(80, 200, n_examples=4)
    generator = torch.Generator().manual_seed(2)
    weights = torch.zeros(4, 200, dtype=torch.float64)
    for row in weights:
        row[torch.randperm(200, generator=generator)[:5]] = torch.tensor([4.0, -3, 2, 5, -2], dtype=torch.float64)
    outputs = masks.double() @ weights.T + 0.3 * torch.randn(80, 4, generator=generator, dtype=torch.float64)
    fitted, _ = Lasso().fit(masks, outputs)
    assert mean_correlation(fitted, weights) > 0.99
    assert mean_correlation(fitted, weights) > mean_correlation(Ridge().fit(masks, outputs)[0], weights) + 0.1
    assert ((fitted != 0).sum(1) < 100).all()


def test_a_strength_above_all_correlations_leaves_only_the_bias():
    masks, outputs, _, _ = problem(60, 20)
    weights, bias = Lasso(strength=1e4).fit(masks, outputs)
    assert (weights == 0).all() and torch.allclose(bias.double(), outputs.mean(0), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lasso(strength=-1.0), "strength=-1"),
        (lambda: Lasso(n_strengths=0), "n_strengths=0"),
        (lambda: ARD(n_iterations=0), "n_iterations=0"),
        (lambda: ARD(tolerance=float("nan")), "tolerance=nan"),
    ],
)
def test_solvers_that_make_no_sense(make, message):
    with pytest.raises(CoarError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------- ARD


def shared_relevance(n_masks, n_components, n_examples=12):
    """Examples that agree on which components matter, and not on their weights."""
    generator = torch.Generator().manual_seed(7)
    masks, _, _, _ = problem(n_masks, n_components)
    relevance = torch.randn(n_components, generator=generator, dtype=torch.float64).mul(1.5).exp()
    weights = torch.randn(n_examples, n_components, generator=generator, dtype=torch.float64) * relevance
    outputs = masks.double() @ weights.T
    noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    return masks, outputs + 0.3 * outputs.std(0) * noise, weights


@pytest.mark.parametrize(("n_masks", "n_components"), [(80, 160), (200, 100)])
def test_ard_learns_which_components_matter(n_masks, n_components):
    masks, outputs, weights = shared_relevance(n_masks, n_components)
    gain = mean_correlation(ARD().fit(masks, outputs)[0], weights)
    gain -= mean_correlation(Ridge().fit(masks, outputs)[0], weights)
    assert gain > 0.02
    variances = list(ARD().variances(Design(masks), outputs))[-1].variances
    truth = weights.square().mean(0)
    ranks = torch.stack([variances.argsort().argsort(), truth.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.5


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 90), (90, 60)])
@pytest.mark.parametrize("pseudo", [0, 4])
def test_no_iteration_of_ard_lowers_the_evidence_and_they_converge(n_masks, n_components, pseudo):
    masks, outputs, _ = shared_relevance(n_masks, n_components)
    solver = ARD(n_iterations=200, tolerance=0.0, pseudo_examples=pseudo)
    states = list(solver.variances(Design(masks), outputs))
    evidence = torch.tensor([state.evidence for state in states])
    assert (evidence.diff() > -1e-6).all()
    assert evidence.diff()[-5:].max() < 1e-3 * (evidence[-1] - evidence[0])
    assert len(list(ARD().variances(Design(masks), outputs))) < 40, "it should stop by itself"


def test_the_evidence_of_ard_by_brute_force_in_both_spaces():
    for n_masks, n_components in ((30, 31), (31, 30)):
        masks, outputs, _ = shared_relevance(n_masks, n_components)
        states = list(ARD(n_iterations=3, tolerance=0.0, pseudo_examples=0).variances(Design(masks), outputs))
        x = masks.double() - masks.double().mean(0)
        y = outputs - outputs.mean(0)
        y = y / y.square().mean(0).sqrt()
        covariance = states[1].noise * torch.eye(n_masks, dtype=torch.float64) + x * states[1].variances @ x.T
        quadratic = (y * torch.linalg.solve(covariance, y)).sum(0).mean()
        assert states[2].evidence == pytest.approx(
            float(-0.5 * (torch.logdet(covariance) - math.log(states[1].noise) + quadratic) / n_masks), rel=1e-6
        )


@pytest.mark.parametrize(("n_masks", "n_components"), [(60, 20), (30, 50)])
def test_of_many_masks_some_are_left_out(monkeypatch, n_masks, n_components):
    masks, outputs, _, _ = problem(n_masks, n_components, noise=0.5)
    centred = outputs - outputs.mean(0)
    whole, _ = systems.Factored(Design(masks)).left_out(centred, 2.0)
    monkeypatch.setattr(systems, "_LEFT_OUT", 13)
    some, _ = systems.Factored(Design(masks)).left_out(centred, 2.0)
    assert some.shape == (13, 7) and torch.allclose(some.double(), whole[-13:].double(), rtol=1e-4, atol=1e-4)
