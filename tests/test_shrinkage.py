"""Shrinkage makes noisy reads better, and its standard errors say by how much they may still be off."""

import pytest
import torch

from hf_coar.estimators.shrinkage import BLOCK, shrink

SIZES = (120, 80)


def planted(seed, n_examples=24, rounds=4, noise=1.0, bias=0.7):
    """True effects that vary by component and are alike between examples; noisy soft reads, biased hard reads."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(SIZES)
    scale = torch.rand(n, generator=generator) ** 2 * 2
    shared = torch.randn(3, n, generator=generator) * scale
    truth = torch.randn(n_examples, 3, generator=generator) @ shared / 2
    truth += 0.5 * scale * torch.randn(n_examples, n, generator=generator)
    reads = truth + noise * torch.randn(rounds, n_examples, n, generator=generator)
    hard = bias * truth + 0.4 * torch.randn(n_examples, n, generator=generator)
    return truth, reads.mean(0), hard, reads.var(0) / rounds


@pytest.mark.parametrize("n_examples", [1, 5, 24])
def test_shrunk_reads_are_nearer_to_the_truth(n_examples):
    ratios = []
    for seed in range(5):
        truth, soft, hard, variance = planted(seed, n_examples)
        weights, _ = shrink(soft, hard, variance, SIZES)
        ratios.append(float((weights - truth).square().mean() / (soft - truth).square().mean()))
    assert max(ratios) < 0.9


@pytest.mark.parametrize("rounds", [4, 8])
def test_95_percent_intervals_cover_90_to_99_percent_of_planted_effects(rounds):
    inside = []
    for seed in range(8):
        truth, soft, hard, variance = planted(seed, rounds=rounds)
        weights, errors = shrink(soft, hard, variance, SIZES)
        inside.append(((weights - truth).abs() < 1.96 * errors).float().mean())
    assert 0.90 <= float(torch.stack(inside).mean()) <= 0.99


@pytest.mark.parametrize("n_examples", [1, 24])
def test_the_unit_of_an_example_moves_nothing_but_its_own_numbers(n_examples):
    """Outputs of a regression, or of a saturated classifier, have effects of hundredfold sizes."""
    unit = 4.0 ** -torch.arange(n_examples)[:, None].remainder(5)
    _, soft, hard, variance = planted(2, n_examples)
    weights, errors = shrink(soft, hard, variance, SIZES)
    in_units = shrink(unit * soft, unit * hard, unit.square() * variance, SIZES)
    for found, wanted in zip(in_units, (weights, errors), strict=True):
        assert torch.allclose(found / unit, wanted, rtol=1e-4, atol=1e-6)


def test_examples_on_which_a_layer_does_nothing_say_nothing_of_the_others():
    """Of experts most examples ask none: without noise, they would be certain that its effects are 0."""
    _, soft, hard, variance = planted(2, 12)
    alone = shrink(soft, hard, variance, SIZES)
    padded = [torch.cat([values, torch.zeros(6, values.shape[1])]) for values in (soft, hard, variance)]
    together = shrink(*padded, SIZES)
    for found, wanted in zip(together, alone, strict=True):
        assert torch.equal(found[:12], wanted) and not found[12:].any()


def test_without_noise_the_soft_reads_stay():
    truth, _, hard, variance = planted(0)
    weights, errors = shrink(truth, hard, torch.zeros_like(variance), SIZES)
    assert torch.allclose(weights, truth, atol=1e-5)
    assert float(errors.max()) < 1e-4


def test_layers_of_few_components_without_noise_stay():
    """Fewer components than examples, so that what examples share is of low rank."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        soft, hard = torch.randn(2, 8, 1, generator=generator)
        weights, errors = shrink(soft, hard, torch.zeros(8, 1), (1,))
        assert torch.allclose(weights, soft, rtol=1e-3) and float(errors.max()) < 1e-3


def test_reads_of_zero_stay_zero():
    zero = torch.zeros(4, sum(SIZES))
    weights, errors = shrink(zero, zero, zero, SIZES)
    assert torch.equal(weights, zero)
    assert bool(errors.isfinite().all())


def test_blocks_of_examples_and_layers_do_not_touch_each_other():
    _, soft, hard, variance = planted(1, n_examples=BLOCK + 6)
    weights, errors = shrink(soft, hard, variance, SIZES)
    alone = shrink(soft[BLOCK:, :120], hard[BLOCK:, :120], variance[BLOCK:, :120], SIZES[:1])
    assert torch.equal(weights[BLOCK:, :120], alone[0])
    assert torch.equal(errors[BLOCK:, :120], alone[1])
