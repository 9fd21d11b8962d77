"""Curves: fits that find the truth, envelopes by full enumeration, reward where KL is equal."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from hmpo.errors import StatisticsError
from hmpo.lab.statistics import curves
from tests.oracles import statistics as oracle

COMPUTE = np.arange(1.0, 41.0) * 8


@pytest.mark.parametrize("truth", [(0.1, 0.7, 60.0, 2.0), (0.3, 0.2, 100.0, 1.0)])
@pytest.mark.parametrize("known", [True, False])
def test_a_curve_without_noise_is_fitted_exactly(truth, known):
    reward = [oracle.sigmoid(c, *truth) for c in COMPUTE]
    fit = curves.fit_sigmoid(COMPUTE, reward, truth[0] if known else None)
    assert [fit.start, fit.top, fit.middle, fit.slope] == pytest.approx(truth, rel=1e-4)
    assert fit.residual < 1e-7
    np.testing.assert_allclose(fit.at(COMPUTE), reward, atol=1e-6)


def test_the_fit_is_no_worse_than_scipys_from_the_truth():
    truth = (0.1, 0.7, 60.0, 2.0)
    noise = 0.02 * np.random.default_rng(0).normal(size=COMPUTE.size)
    reward = np.array([oracle.sigmoid(c, *truth) for c in COMPUTE]) + noise
    fit = curves.fit_sigmoid(COMPUTE, reward)
    theirs, _ = optimize.curve_fit(oracle.sigmoid, COMPUTE, reward, p0=truth)
    best = float(np.sum((oracle.sigmoid(COMPUTE, *theirs) - reward) ** 2))
    ours = float(np.sum((fit.at(COMPUTE) - reward) ** 2))
    assert ours == pytest.approx(best, rel=1e-5)
    assert fit.residual == pytest.approx(math.sqrt(ours / (COMPUTE.size - 4)))


def test_a_flat_curve_is_fitted_by_a_line():
    fit = curves.fit_sigmoid(COMPUTE, np.full(COMPUTE.size, 0.3))
    np.testing.assert_allclose(fit.at([1.0, 1e6]), 0.3, atol=1e-9)


def test_the_first_half_foretells_the_second_unless_training_breaks():
    truth = (0.1, 0.7, 60.0, 2.0)
    noise = 0.01 * np.random.default_rng(1).normal(size=COMPUTE.size)
    reward = np.array([oracle.sigmoid(c, *truth) for c in COMPUTE]) + noise
    kept = curves.sigmoid_check(COMPUTE, reward, noise=0.01)
    collapsed = curves.sigmoid_check(COMPUTE, np.where(COMPUTE > 240, 0.0, reward), noise=0.01)
    assert kept.error < 5 * kept.noise < collapsed.error
    assert collapsed.bias < -0.2
    off = reward[20:] - kept.fit.at(COMPUTE[20:])
    assert kept.error == pytest.approx(math.sqrt(np.mean(off**2)))
    assert kept.fit == curves.fit_sigmoid(COMPUTE[:20], reward[:20])
    assert "points" in kept.sentence
    shuffled = np.random.default_rng(2).permutation(COMPUTE.size)
    assert curves.sigmoid_check(COMPUTE[shuffled], reward[shuffled], noise=0.01) == kept


@given(st.lists(st.integers(0, 20).map(lambda k: k / 20), min_size=1, max_size=6), st.data())
def test_the_expected_best_is_the_mean_over_every_draw(scores, data):
    replace = data.draw(st.booleans())
    draws = data.draw(st.integers(1, 4 if replace else len(scores)))
    expected = oracle.expected_best(scores, draws, replace)
    assert np.sort(scores) @ curves.draw_weights(len(scores), draws, replace) == pytest.approx(
        expected
    )
    one = curves.expected_best([[s] for s in scores], draws, replace)
    assert one.value == pytest.approx(expected)
    assert (one.low, one.n) == (None, 1)


def test_a_larger_budget_never_expects_less_and_reaches_the_best_cell():
    scores = np.array([0.2, 0.5, 0.4])[:, None] + 0.01 * np.arange(4.0)
    values = [curves.expected_best(scores, k).value for k in (1, 2, 3)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(scores.mean()) and values[2] == pytest.approx(0.515)


def test_each_seed_is_scored_by_what_the_other_seeds_chose():
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 0.3, 0.3]])
    # Seed 0: the others choose cell 1; seeds 1 and 2: the others' means are .5 and .15.
    np.testing.assert_allclose(curves.expected_best_by_seed(scores, 2), [0.0, 0.0, 0.0])
    tied = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(curves.expected_best_by_seed(tied, 1), 2 / 3)


def test_the_best_of_equal_cells_is_not_praised_for_luck():
    noise = np.random.default_rng(3).normal(size=(3000, 5, 6))
    fair = curves.best_by_seed(noise, 5).mean()
    plain = noise.mean(-1).max(-1).mean()
    assert abs(fair) < 0.02 < 0.4 < plain


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=7),
    st.lists(st.integers(0, 8), min_size=7, max_size=7),
    st.integers(0, 9),
)
def test_reward_is_read_where_a_path_first_reaches_a_kl(path, reward, level):
    kl = [k / 8 for k in path]
    expected = oracle.first_at(kl, reward, level / 8)
    got = curves._first_at(np.array(kl), np.array(reward[: len(kl)], float), np.array([level / 8]))
    if expected is None:
        assert np.isnan(got).all()
    else:
        assert got[0] == pytest.approx(expected)


def test_reward_at_equal_kl_is_paired_and_says_how_many_seeds_reach_it():
    steps = np.arange(11.0)
    fast = [(steps / 10, steps / 10 + 0.1 * i) for i in range(3)]
    slow = [(steps / 20, steps / 20 + 0.1 * i - 0.05) for i in range(3)]
    same = curves.reward_at_kl(fast, slow)
    np.testing.assert_allclose(same.kl, np.arange(1, 11) / 20)
    for e in [*same.differences, same.mean]:
        assert (e.value, e.n) == (pytest.approx(0.05), 3)
        assert e.low == pytest.approx(0.05) and e.high == pytest.approx(0.05)
    np.testing.assert_allclose(same.reward_a - same.reward_b, 0.05)
    short = [*slow[:2], (steps[:3] / 20, steps[:3] / 20 + 0.15)]
    some = curves.reward_at_kl(fast, short, kl=[0.05, 0.4])
    assert [e.n for e in some.differences] == [3, 2] and some.mean.n == 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: curves.fit_sigmoid([1, 2, 3], [1, 2, 3]), "at least 5"),
        (lambda: curves.fit_sigmoid([0, 1, 2, 3, 4], [1] * 5), "numbers > 0"),
        (lambda: curves.fit_sigmoid([1, 1, 2, 3, 4], [1] * 5), "at least 5 different"),
        (lambda: curves.fit_sigmoid([1, 2, 3, 4, 5], [1] * 6), "got 6 numbers, expected 5"),
        (lambda: curves.fit_sigmoid([1, 2, 3, 4, 5], [1] * 5, math.nan), "start: got nan"),
        (lambda: curves.sigmoid_check(COMPUTE[:6], COMPUTE[:6]), "at least 10"),
        (lambda: curves.draw_weights(3, 4), "got 4 of 3 cells"),
        (lambda: curves.expected_best([[0.1, math.nan]], 1), "scores: 1 of 2"),
        (lambda: curves.reward_at_kl([], []), "got 0 and 0 runs"),
        (lambda: curves.reward_at_kl([([0.0], [1.0])], [([0.0], [1.0])]), "no range"),
        (
            lambda: curves.reward_at_kl([([0, 1], [0, 1])], [([0, 1], [0, 1])], kl=[2.0]),
            "no pair of runs spans 2",
        ),
        (lambda: curves.reward_at_kl([([0, 1], [0])], [([0, 1], [0, 1])]), "2 KLs and 1"),
    ],
)
def test_curves_that_are_none_are_refused(call, match):
    with pytest.raises(StatisticsError, match=match):
        call()
