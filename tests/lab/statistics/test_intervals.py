"""Means, differences and rates: equal to scipy and to slow loops, with the promised coverage."""

import math
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from hmpo.errors import HmpoError, MissingDependencyError, StatisticsError
from hmpo.lab.statistics import intervals
from tests.oracles import statistics as oracle

SMALL = st.lists(st.integers(-50, 50).map(lambda k: k / 64), min_size=2, max_size=12)


@given(SMALL.filter(lambda d: len(set(d)) > 1))
def test_paired_t_is_scipys(differences):
    ours = intervals.paired_t(differences, 0.9)
    theirs = stats.ttest_rel(differences, np.zeros(len(differences)))
    low, high = theirs.confidence_interval(0.9)
    np.testing.assert_allclose(
        [ours.value, ours.low, ours.high, ours.p_value],
        [oracle.mean(differences), low, high, theirs.pvalue],
        rtol=1e-9,
        atol=1e-12,
    )
    assert (ours.n, ours.level) == (len(differences), 0.9)


@pytest.mark.parametrize("value", [0.0, 0.05, -0.1])
def test_identical_differences_give_an_interval_of_width_zero_and_no_nan(value):
    e = intervals.paired_t([value] * 8)
    assert e.low == pytest.approx(value, abs=1e-15) and e.high == pytest.approx(value, abs=1e-15)
    assert e.p_value == pytest.approx(1.0 if value == 0 else 0.0, abs=1e-12)
    assert e.excludes_zero == (value != 0)


def test_one_seed_gives_neither_interval_nor_p():
    e = intervals.paired_t([0.3])
    assert (e.value, e.low, e.high, e.p_value, e.n) == (0.3, None, None, None, 1)
    assert not e.excludes_zero


@given(SMALL, SMALL)
def test_welch_is_scipys(a, b):
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    ours, theirs = intervals.welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(
        [ours.low, ours.high, ours.p_value],
        [*theirs.confidence_interval(0.95), theirs.pvalue],
        rtol=1e-9,
        atol=1e-12,
    )


def test_welch_of_scores_without_variance_has_an_interval_of_width_zero():
    e = intervals.welch([0.5, 0.5], [0.25, 0.25, 0.25])
    assert (e.low, e.value, e.high, e.p_value) == (0.25, 0.25, 0.25, 0.0)
    assert intervals.welch([0.5, 0.5], [0.5, 0.5]).p_value == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    np.testing.assert_allclose(intervals.holm(p_values), oracle.holm(p_values), rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_holm_keeps_the_order_never_lowers_and_follows_a_permutation(p_values, random):
    adjusted = intervals.holm(p_values)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()
    shuffled = list(range(len(p_values)))
    random.shuffle(shuffled)
    np.testing.assert_array_equal(
        intervals.holm([p_values[i] for i in shuffled]), adjusted[shuffled]
    )


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_has_scipys_wilson_interval(case):
    k, n = case
    ours = intervals.rate(k, n)
    theirs = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=1e-12)
    score = intervals.score_interval(np.array(k / n), np.array(float(n)), stats.norm.ppf(0.975))
    np.testing.assert_allclose(score, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe (1998), table II, method 10, to four places.
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_of_rates_is_newcombes(counts, low, high):
    e = intervals.rate_difference(*counts)
    assert (round(e.low, 4), round(e.high, 4)) == (low, high)
    k, n, j, m = counts
    swapped = intervals.rate_difference(j, m, k, n)
    assert swapped.low == pytest.approx(-e.high) and swapped.high == pytest.approx(-e.low)


def test_t_and_welch_cover_the_truth_as_often_as_they_promise():
    rng = np.random.default_rng(0)
    for n in (3, 10, 20):
        d = rng.normal(0.2, 1.0, (40_000, n))
        _, low, high, p = intervals.t_interval(d, 0.95)
        share = np.mean((low <= 0.2) & (high >= 0.2))
        assert stats.binomtest(round(share * 40_000), 40_000, 0.95).pvalue > 1e-4
        np.testing.assert_array_equal(p < 0.05, (low > 0) | (high < 0))
        _, low, high, _ = intervals.welch_interval(d, 3 * d[::-1], 0.95)
        share = np.mean((low <= -0.4) & (high >= -0.4))
        assert abs(share - 0.95) < 0.02  # Welch's degrees of freedom are approximate


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: intervals.paired_t([0.1, math.nan]), "1 of 2 numbers are NaN or infinite"),
        (lambda: intervals.paired_t([]), r"got shape \(0,\), expected at least 1"),
        (lambda: intervals.paired_t([[0.1], [0.2]]), r"got shape \(2, 1\), expected 1 axes"),
        (lambda: intervals.paired_t(["a", "b"]), "expected numbers"),
        (lambda: intervals.paired_t([0.1, 0.2], 1.0), "level: got 1.0"),
        (lambda: intervals.welch([0.1], [0.1, 0.2]), "at least 2"),
        (lambda: intervals.holm([0.1, 1.2]), r"expected \[0, 1\]"),
        (lambda: intervals.rate(3, 2), "got 3 of 2"),
        (lambda: intervals.rate_difference(0, 0, 1, 2), "got 0 of 0"),
    ],
)
def test_what_no_statistic_can_be_made_of_is_refused_in_one_line(call, match):
    with pytest.raises(StatisticsError, match=match) as error:
        call()
    assert isinstance(error.value, HmpoError) and "\n" not in str(error.value)


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.delitem(sys.modules, "hmpo.lab.statistics.inputs", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[lab\]'"):
        __import__("hmpo.lab.statistics.inputs")
