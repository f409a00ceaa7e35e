"""The interval of an evaluation, what it judges at by default, and what it says of what is left."""

import pytest
import torch
from conftest import build_net

import hf_coar as coar
from hf_coar.judging import evaluation
from hf_coar.runs import fidelity


def pair(n_masks, n_examples, generator, loud=0.0):
    """Predicted and measured outputs whose masks share noise between the examples, as masks do."""
    predicted = torch.randn(n_masks, n_examples, generator=generator)
    shared = torch.randn(n_masks, 1, generator=generator)
    noise = torch.randn(n_masks, n_examples, generator=generator)
    return predicted, predicted + 0.8 * shared + (0.4 + loud) * noise


def test_the_interval_covers_the_grand_mean_over_mask_seeds():
    generator = torch.Generator().manual_seed(0)
    grand = float(fidelity.correlation(*pair(40_000, 12, generator)).mean())
    covered, narrow = 0, 0
    for seed in range(40):
        predicted, measured = pair(60, 12, generator)
        low, high = evaluation.bootstrap_interval(predicted, measured, seed)
        covered += low <= grand <= high
        by_example = fidelity.correlation(predicted, measured)
        half = 1.96 * float(by_example.std()) / 12**0.5  # what examples alone tell
        narrow += abs(float(by_example.mean()) - grand) <= half
    assert covered >= 36 and narrow < covered - 5


def test_the_interval_is_reproducible_and_widens_with_the_level():
    predicted, measured = pair(30, 6, torch.Generator().manual_seed(1))
    first = evaluation.bootstrap_interval(predicted, measured, 3)
    assert first == evaluation.bootstrap_interval(predicted, measured, 3)
    low, high = evaluation.bootstrap_interval(predicted, measured, 3, level=0.5)
    assert first[0] < low < high < first[1]


@pytest.mark.parametrize(
    ("fitted", "n_components", "fractions"),
    [
        (0.05, 832, (0.05, 0.0125, 4 / 832)),
        (0.05, 320, (0.05, 0.0125)),
        (0.05, 12, (0.05, 4 / 12)),
        (0.01, 17_056, (0.01, 0.0025, 4 / 17_056)),
        (0.05, 4, (0.05,)),
    ],
)
def test_default_fractions(fitted, n_components, fractions):
    assert evaluation.default_fractions(fitted, n_components) == pytest.approx(fractions)


def test_an_evaluation_says_what_is_left(demo_attributions, demo_pair, caplog):
    report = coar.evaluate(demo_attributions, *demo_pair, fractions=(0.05, 0.5), n_masks=8, progress=False)
    output, kept = report.left(0.05)
    measured, whole = report.measured[0.05], demo_attributions.forecast.unablated
    assert output == pytest.approx(float(measured.mean()))
    assert kept == pytest.approx(float(((measured > 0) == (whole > 0)).float().mean()))
    entry = report.to_json()["fractions"][0]
    assert entry["output"] == pytest.approx(output) and entry["decisions"] == pytest.approx(kept)
    assert "% kept" in str(report)
    assert report.left(0.5)[1] < 0.25 and "hardly a model" in caplog.text


def test_of_a_function_of_ones_own_that_function_is_asked_for():
    """No name brings a function back, and another one of that name would be another output."""

    def first_logit(logits, batch):
        return logits[:, 0]

    net = build_net("mlp")
    how = {"method": coar.baselines.LeaveOneOut(), "progress": False}
    attributions = coar.attribute(net.model, [net.batch], output=first_logit, **how)
    with pytest.raises(coar.CoarError, match=r"of '.*first_logit', .*: give that function again as output=…"):
        coar.evaluate(attributions, net.model, [net.batch], n_masks=3, progress=False)
    coar.evaluate(attributions, net.model, [net.batch], n_masks=3, output=first_logit, progress=False)
