"""Solvers: laws over every solver in `hf_coar.solvers`, against a float64 reference and brute-force refitting."""

import inspect

import pytest
import torch

from hf_coar import solvers
from hf_coar.errors import CoarError
from hf_coar.solvers import Ridge

# Whatever class in the module has a `fit` is tested, in its default configuration.
SOLVERS = [
    value
    for value in vars(solvers).values()
    if inspect.isclass(value) and value.__module__ == solvers.__name__ and hasattr(value, "fit")
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
    return all(torch.allclose(a.double(), b, atol=tolerance, rtol=tolerance) for a, b in zip(fitted, expected))


def test_something_is_tested():
    assert Ridge in SOLVERS


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
    # BUG: `Ridge(n_strengths=0)` is taken, and `fit` ends in torch's "stack expects a non-empty TensorList".
    with pytest.raises(CoarError, match="n_strengths"):
        Ridge(n_strengths=0)
