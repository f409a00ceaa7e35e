"""Stability: reliability from standard errors, agreement of two seeds, and that the one foretells the other."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import build_net

import hf_coar as coar
from hf_coar.errors import CoarError, DataError
from hf_coar.judging import stability


@pytest.fixture(scope="module")
def attributed():
    """The convolutional network under two seeds, plain means over the rounds."""
    net = build_net("convnet")
    options = {"method": coar.PathGradient(rounds=4, shrink=False), "ablated_fraction": 0.1, "progress": False}
    return net, [coar.attribute(net.model, [net.batch], seed=seed, **options) for seed in (0, 1)]


def changed(attributions, **changes):
    """The same attributions but for some fields."""
    names = ("weights", "bias", "standard_errors", "components", "identity", "config")
    return coar.Attributions(**{**{name: getattr(attributions, name) for name in names}, **changes})


def planted(n_examples=40, n_components=4000, noise=0.5):
    """Two attributions of the same truth, whose standard errors are right, and the truth."""
    net = build_net("mlp")
    template = coar.attribute(
        net.model, [net.batch], method=coar.baselines.RandomWeights(), progress=False, ablated_fraction=0.1
    )
    group = replace(template.components.groups[0], size=n_components)
    components = replace(template.components, groups=(group,))
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(n_examples, n_components, generator=generator)
    identity = replace(
        template.identity,
        hashes={name: value[:1].expand(n_examples, -1).clone() for name, value in template.identity.hashes.items()},
        labels=torch.zeros(n_examples, dtype=torch.long),
    )
    return truth, [
        changed(
            template,
            weights=truth + noise * torch.randn(truth.shape, generator=generator),
            bias=torch.zeros(n_examples),
            standard_errors=torch.full(truth.shape, noise),
            components=components,
            identity=identity,
            config={**template.config, "seed": seed},
        )
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_reliability_is_the_correlation_of_two_seeds(noise):
    truth, (first, second) = planted(noise=noise)
    expected = 1 / (1 + noise**2)
    found = stability.reliability(first)
    assert found.shape == (40,) and found.dtype == torch.float32
    assert float(found.mean()) == pytest.approx(expected, abs=0.02)
    agreement = stability.agreement(first, second)
    assert float(agreement.pearson.mean()) == pytest.approx(expected, abs=0.02)
    to_truth = stability.agreement(first, changed(second, weights=truth))
    assert float(to_truth.pearson.mean()) == pytest.approx(expected**0.5, abs=0.02)


def test_reliability_by_hand():
    _, (first, _) = planted(n_examples=2, n_components=4)
    weights = torch.tensor([[1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    errors = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])
    found = stability.reliability(changed(first, weights=weights, standard_errors=errors))
    assert found[0].item() == pytest.approx(0.75) and found[1].isnan()


def test_errors_that_all_seeds_share_are_not_noise():
    _, (first, _) = planted(n_examples=2, n_components=4)
    weights = torch.tensor([[1.0, 3.0, 1.0, 3.0], [2.0, 2.0, 1.0, 2.0]])
    errors = (torch.full((2, 4), 0.25) + (0.1 * weights) ** 2).sqrt()
    config = {**first.config, "checked": {"uncertain": 0.1}}
    found = changed(first, weights=weights, standard_errors=errors, config=config)
    assert stability.reliability(found)[0].item() == pytest.approx(0.75)
    assert found.stability() == pytest.approx(float(stability.reliability(found).mean()))


def test_more_rounds_by_spearman_and_brown():
    assert stability.longer(torch.tensor([0.5, 1.0]), 2).tolist() == pytest.approx([2 / 3, 1.0])
    assert stability.longer(torch.tensor([2 / 3]), 0.5).tolist() == pytest.approx([0.5])
    with pytest.raises(CoarError, match="factor=0"):
        stability.longer(torch.tensor([0.5]), 0)


def test_ranks_share_ties():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert stability.ranks(values).tolist() == [[2.5, 0.0, 2.5, 1.0], [1.5, 1.5, 1.5, 1.5]]


def test_rank_correlation_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    _, (first, second) = planted(n_examples=5, n_components=50)
    rounded = [changed(a, weights=(2 * a.weights).round()) for a in (first, second)]  # many ties
    found = stability.agreement(*rounded)
    for example in range(5):
        a, b = (x.weights[example].numpy() for x in rounded)
        assert found.spearman[example].item() == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-5)
        assert found.pearson[example].item() == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-5)


def test_rank_correlation_does_not_mind_a_monotone_change():
    _, (first, second) = planted(n_examples=3, n_components=100)
    found = stability.agreement(first, changed(second, weights=first.weights.exp()))
    assert found.spearman.tolist() == pytest.approx([1.0] * 3) and (found.pearson < 0.95).all()


def test_the_top_that_is_shared():
    _, (first, second) = planted(n_examples=1, n_components=6)
    a = changed(first, weights=torch.tensor([[5.0, -4.0, 3.0, 0.1, 0.2, 0.3]]))
    b = changed(second, weights=torch.tensor([[5.0, 4.0, 0.0, 0.1, 0.2, 6.0]]))
    assert stability.agreement(a, b, n_top=3).top.tolist() == pytest.approx([2 / 3])
    everything = stability.agreement(a, b, n_top=100)
    assert everything.n_top == 6 and everything.top.tolist() == [1.0]


def test_standard_errors_of_a_run_foretell_the_next(attributed):
    _, (first, second) = attributed
    expected = float(stability.reliability(first).mean())
    measured = float(stability.agreement(first, second).pearson.mean())
    assert 0.3 < expected < 1 and measured == pytest.approx(expected, abs=0.12)


def test_an_agreement_as_text_and_json(attributed):
    found = stability.agreement(*attributed[1], n_top=5)
    figures = json.loads(json.dumps(found.to_json()))
    assert figures["n_top"] == 5 and figures["n_examples"] == 4
    assert f"{figures['spearman']:.3f}" in str(found) and "Spearman" in str(found)


# -------------------------------------------------------------------------------------------------------- in the report


def test_the_report_tells_the_reliability(attributed):
    net, (first, _) = attributed
    report = coar.evaluate(first, net.model, [net.batch], fractions=(0.1,), n_masks=5, seed=9, progress=False)
    assert torch.equal(report.reliability, stability.reliability(first))
    assert report.to_json()["reliability"] == pytest.approx(float(report.reliability.mean()))
    assert f"{report.mean_reliability:.3f}" in str(report) and "reliability" in str(report)


def test_without_standard_errors_the_report_has_none(attributed):
    net, (first, _) = attributed
    bare = changed(first, standard_errors=None)
    report = coar.evaluate(bare, net.model, [net.batch], fractions=(0.1,), n_masks=5, seed=9, progress=False)
    assert report.reliability is None and report.to_json()["reliability"] is None
    assert "reliability" not in str(report)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_compared(attributed):
    _, (first, second) = attributed
    with pytest.raises(CoarError, match="seed 0 and the same settings"):
        stability.agreement(first, first)
    with pytest.raises(CoarError, match="different components"):
        stability.agreement(first, planted()[1][0])
    hashes = {name: value + 1 for name, value in second.identity.hashes.items()}
    others = changed(second, identity=replace(second.identity, hashes=hashes))
    with pytest.raises(DataError):
        stability.agreement(first, others)
    with pytest.raises(CoarError, match="n_top=0"):
        stability.agreement(first, second, n_top=0)
    with pytest.raises(CoarError, match=r"no standard errors.*another seed"):
        stability.reliability(changed(first, standard_errors=None))
