"""Masks and gates are a pure function of (seed, index), pinned to golden values."""

import numpy as np
import pytest
import torch

from hf_coar.errors import CoarError
from hf_coar.runs import sampling
from hf_coar.runs.sampling import BACKGROUND, BASELINES, BOOTSTRAP, EVALUATION, MASKS, PATHS, Masks

PURPOSES = (MASKS, PATHS, BACKGROUND, EVALUATION, BOOTSTRAP, BASELINES)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().double().numpy(), b.flatten().double().numpy())[0, 1])


# Golden values: a change of any of them makes every run that was begun before unresumable and every result
# irreproducible. Change them only together with the format version.


def test_golden_words():
    assert sampling.words(0, MASKS, 0, 0, 6).tolist() == [
        149215387, 49592932, 2628306354, 1037445899, 1569730169, 478570405,
    ]  # fmt: skip
    assert sampling.words(7, PATHS, 3, 2, 4).tolist() == [3034174488, 3937724837, 1421489534, 1665897364]


def test_golden_mask():
    ablated = (~Masks(24, 0.25, 4, 5, MASKS).rows(2, 3)[0]).nonzero().flatten().tolist()
    assert ablated == [1, 6, 12, 23]


def test_golden_uniforms():
    expected = np.float32([0.2136935591697693, 0.07515114545822144, 0.28593677282333374])
    assert (sampling.uniforms(1, PATHS, 0, 0, 3) == expected).all()


def test_golden_split():
    assert sampling.balanced_split(3, PATHS, 1, 1, 10, 3).tolist() == [0, 2, 0, 1, 1, 0, 2, 2, 0, 1]


def test_purposes_are_distinct():
    assert len(set(PURPOSES)) == len(PURPOSES)


def test_words_are_pure_and_prefixes_of_each_other():
    torch.manual_seed(1)
    np.random.seed(1)
    first = sampling.words(11, MASKS, 5, 3, 1000)
    np.random.seed(2)
    assert (sampling.words(11, MASKS, 5, 3, 1000) == first).all()
    assert (sampling.words(11, MASKS, 5, 3, 101) == first[:101]).all()
    assert first.dtype == np.uint32


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 63, 1001])
def test_words_from_anywhere_on(start):
    for count in (1, 2, 5, 64):
        assert np.array_equal(
            sampling.words(3, 6, 5, 2, count, start), sampling.words(3, 6, 5, 2, start + count)[start:]
        )


@pytest.mark.parametrize("changed", [(12, MASKS, 5, 3), (11, EVALUATION, 5, 3), (11, MASKS, 6, 3), (11, MASKS, 5, 4)])
def test_every_argument_of_words_gives_a_stream_of_its_own(changed):
    here, there = sampling.words(11, MASKS, 5, 3, 4000), sampling.words(*changed, 4000)
    assert not np.intersect1d(here, there).size > 2  # a shifted stream would share nearly all of its words
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.06


def test_neighbouring_seeds_do_not_overlap():
    one = Masks(64, 0.5, 50, 0, MASKS).rows(0, 50)
    two = Masks(64, 0.5, 50, 1, MASKS).rows(0, 50)
    assert not {tuple(row) for row in one.tolist()} & {tuple(row) for row in two.tolist()}


@pytest.mark.parametrize("seed", [2**32, 2**53, 2**63 - 2, 2**63, 2**64 - 2])
@pytest.mark.filterwarnings("error")
def test_large_seeds_have_streams_of_their_own(seed):
    # from 2^63 on, NumPy makes floats of the list [seed, purpose], so that neighbouring seeds share one stream and
    # 2^64 - 1 is the same as 0 (with a RuntimeWarning); np.array([seed, purpose], dtype=np.uint64) would be exact.
    streams = {tuple(sampling.words(s, MASKS, 0, 0, 4).tolist()) for s in (0, seed, seed + 1)}
    assert len(streams) == 3


@pytest.mark.parametrize("fraction", [0.0125, 0.05, 0.3, 0.9])
def test_fraction_of_masks(fraction):
    rows = Masks(500, fraction, 400, 3, MASKS).rows(0, 400)
    assert rows.dtype == torch.bool and rows.shape == (400, 500)
    error = (fraction * (1 - fraction) / rows.numel()) ** 0.5
    assert abs(float((~rows).double().mean()) - fraction) < 4 * error
    # Components are ablated independently: their counts spread as a binomial, neither fixed nor clustered.
    spread = float((~rows).double().sum(1).var()) / (500 * fraction * (1 - fraction))
    assert 0.7 < spread < 1.4


def test_masks_of_two_fractions_and_two_purposes_are_independent():
    a = Masks(200, 0.3, 100, 3, MASKS).rows(0, 100)
    for other in (Masks(200, 0.31, 100, 3, MASKS), Masks(200, 0.3, 100, 3, EVALUATION), Masks(200, 0.3, 100, 4, MASKS)):
        assert abs(correlation(a, other.rows(0, 100))) < 0.03


def test_slices_of_rows_agree():
    masks = Masks(33, 0.2, 20, 9, MASKS)
    whole = masks.rows(0, 20)
    assert torch.equal(torch.cat([masks.rows(0, 7), masks.rows(7, 8), masks.rows(8, 20)]), whole)
    assert torch.equal(masks.rows(13, 14), whole[13:14])
    assert torch.equal(Masks(33, 0.2, 999, 9, MASKS).rows(0, 20), whole), "more masks must not change the first ones"


def test_uniforms_are_uniform_and_their_complement_is_exact():
    draw = sampling.uniforms(0, PATHS, 0, 0, 100_000)
    assert draw.dtype == np.float32
    assert draw.min() > 0 and draw.max() < 1
    assert abs(draw.mean() - 0.5) < 0.004
    assert np.abs(np.quantile(draw, [0.1, 0.25, 0.75, 0.9]) - [0.1, 0.25, 0.75, 0.9]).max() < 0.006
    assert (1 - (1 - draw) == draw).all()


@pytest.mark.parametrize(("count", "n_blocks"), [(10, 3), (100, 10), (7, 7), (5, 8), (1, 4)])
def test_balanced_split(count, n_blocks):
    block = sampling.balanced_split(4, PATHS, 2, 1, count, n_blocks)
    sizes = np.bincount(block, minlength=n_blocks)
    assert block.shape == (count,) and sizes.shape == (n_blocks,)
    assert sizes.max() - sizes.min() <= 1


def test_splits_vary_and_no_pair_is_tied_together():
    splits = np.stack([sampling.balanced_split(4, PATHS, example, 1, 40, 4) for example in range(300)])
    together = np.mean(splits[:, :1] == splits[:, 1:], axis=0)
    assert np.abs(together - 9 / 39).max() < 0.11


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None, True])
def test_bad_seeds(seed):
    with pytest.raises(CoarError, match="seed=") as caught:
        sampling.check_seed(seed)
    assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_good_seeds(seed):
    sampling.check_seed(seed)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), "0.05", None])
def test_bad_fractions(fraction):
    with pytest.raises(CoarError, match="ablated_fraction=") as caught:
        sampling.check_fraction(fraction)
    assert repr(fraction) in str(caught.value)


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 0.999])
def test_good_fractions(fraction):
    sampling.check_fraction(fraction)


def test_the_order_of_a_split_keeps_equal_words_in_place():
    ties = sampling.words(3, sampling.PATHS, 1, 2, 5000) % np.uint32(70_000) * np.uint32(61_001)
    assert (sampling._stable_order(ties) == np.argsort(ties, kind="stable")).all()
    assert len(np.unique(ties)) < 5000


def test_what_a_device_makes_of_words_is_the_same_bit_for_bit():
    words = [sampling.words(7, sampling.PATHS, example, 3, 4999) for example in range(3)]
    here = torch.from_numpy(np.stack(words).view(np.int32)).long() & 0xFFFFFFFF
    levels = [sampling.uniforms(7, sampling.PATHS, example, 3, 4999) for example in range(3)]
    assert torch.equal(sampling.uniforms_of(here), torch.from_numpy(np.stack(levels)))
    splits = [sampling.balanced_split(7, sampling.PATHS, example, 3, 4999, 7) for example in range(3)]
    assert torch.equal(sampling.balanced_splits_of(here, 7), torch.from_numpy(np.stack(splits)))
