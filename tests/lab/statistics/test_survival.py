"""Kaplan-Meier and log-rank: as scipy's, and what a median's interval promises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.survival import kaplan_meier, log_rank
from tests.oracles import statistics as oracle

RUNS = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=15)


@given(RUNS)
def test_the_curve_is_the_oracles_and_scipys_and_stays_in_its_interval(runs):
    times, reached = [float(t) for t, _ in runs], [r for _, r in runs]
    km = kaplan_meier(times, reached)
    expected = oracle.kaplan_meier(times, reached)
    assert [t for t, _ in expected] == list(km.times)
    np.testing.assert_allclose(km.survival, [s for _, s in expected], atol=1e-12)
    theirs = stats.ecdf(
        stats.CensoredData(
            uncensored=[t for t, r in zip(times, reached) if r],
            right=[t for t, r in zip(times, reached) if not r],
        )
    ).sf
    np.testing.assert_allclose(theirs.evaluate(km.times), km.survival, atol=1e-12)
    assert (np.diff(km.survival) <= 0).all()
    assert (km.low >= 0).all() and (km.high <= 1).all()
    assert (km.low <= km.survival).all() and (km.survival <= km.high).all()
    assert (km.n, km.reached) == (len(runs), sum(reached))


@given(RUNS)
def test_the_median_lies_in_its_interval_and_is_none_where_half_never_reach(runs):
    km = kaplan_meier([float(t) for t, _ in runs], [r for _, r in runs])
    assert (km.median is None) == (not km.survival.size or km.survival[-1] > 0.5)
    if km.median is not None:
        assert km.median.low <= km.median.value
        assert km.median.high is None or km.median.value <= km.median.high


def test_without_censoring_the_intervals_are_wilsons_and_interpolated_order_statistics():
    times = np.sort(np.random.default_rng(0).exponential(1.0, 10))
    km = kaplan_meier(times, [True] * 10)
    for k in range(1, 11):
        low, high = stats.binomtest(10 - k, 10).proportion_ci(0.95, "wilson")
        np.testing.assert_allclose([km.low[k - 1], km.high[k - 1]], [low, high], atol=1e-12)
    # Between the second and third from each end, by Hettmansperger and Sheather's formula.
    outer, inner = (1 - 2 * stats.binom.cdf(d - 1, 10, 0.5) for d in (2, 3))
    share = (outer - 0.95) / (outer - inner)
    weight = 8 * share / (2 + 6 * share)
    assert km.median.value == pytest.approx((times[4] + times[5]) / 2)
    assert km.median.low == pytest.approx(times[1] + weight * (times[2] - times[1]))
    assert km.median.high == pytest.approx(times[8] + weight * (times[7] - times[8]))


def test_a_step_that_passes_one_half_is_not_interpolated():
    # Three censored at 200 and 240: the last of six takes the curve from 2/3 to 0 at 280, so that
    # 280 is the only time by which half have reached the target, and no earlier one can be its end.
    km = kaplan_meier([80, 160, 200, 240, 240, 280], [1, 1, 0, 0, 0, 1])
    np.testing.assert_allclose(km.survival, [5 / 6, 4 / 6, 0])
    assert km.median is not None
    assert km.median.value == 280 and km.median.high == 280 and 80 < km.median.low < 160


@given(st.lists(st.integers(1, 6), min_size=2, max_size=30).filter(lambda t: len(set(t)) < len(t)))
def test_with_tied_times_the_interval_is_that_of_the_sign_test(times):
    grid = sorted({*times, *(t + 0.5 for t in times)})  # each event time and one beyond it
    kept = [
        m
        for m in grid
        if stats.binom.cdf(sum(t <= m for t in times), len(times), 0.5) > 0.025
        and stats.binom.cdf(sum(t >= m for t in times), len(times), 0.5) > 0.025
    ]
    median = kaplan_meier(times, [True] * len(times)).median
    assert median is not None and kept
    by_half = [m for m in sorted(times) if 2 * sum(t <= m for t in times) >= len(times)]
    assert min(kept) <= by_half[0] <= max(kept)
    all_few = stats.binom.cdf(0, len(times), 0.5) > 0.025  # then nothing can be excluded
    assert median.low == (0 if all_few else min(kept))
    last = max(times)
    assert median.high == (None if all_few else last if max(kept) > last else max(kept))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=25))
def test_the_median_of_uncensored_times_is_numpys(times):
    median = kaplan_meier(times, [True] * len(times)).median
    assert median is not None and median.value == np.median(times)


def test_the_end_is_open_where_few_have_reached_the_target():
    km = kaplan_meier([1, 2, 3, 4, 5, 6, 9, 9, 9, 9], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert km.median.value == 5.5 and km.median.high is None
    assert kaplan_meier([5.0, 5.0], [False, False]).median is None


@given(RUNS, RUNS)
def test_log_rank_is_scipys(a, b):
    groups = [([float(t) for t, _ in g], [r for _, r in g]) for g in (a, b)]
    chi2, p = log_rank(groups)
    events = sorted({t for t, r in [*a, *b] if r})
    if not any(sum(t >= m for t, _ in a) and sum(t >= m for t, _ in b) for m in events):
        assert (chi2, p) == (0.0, 1.0)  # no moment at which both could have had an event
        return
    sides = [
        stats.CensoredData(
            uncensored=[t for t, r in zip(*g) if r], right=[t for t, r in zip(*g) if not r]
        )
        for g in groups
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        theirs = stats.logrank(*sides)
    if math.isnan(theirs.statistic):
        assert chi2 == pytest.approx(0.0, abs=1e-9)
        return
    assert chi2 == pytest.approx(theirs.statistic**2, rel=1e-9, abs=1e-9)
    assert p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-9)


def test_log_rank_of_three_methods_ignores_their_order_and_sees_a_slow_one():
    rng = np.random.default_rng(2)
    groups = [(rng.exponential(scale, 20), [True] * 20) for scale in (1.0, 1.0, 6.0)]
    chi2, p = log_rank(groups)
    assert log_rank(groups[::-1])[0] == pytest.approx(chi2)
    assert p < 0.001 < log_rank(groups[:2])[1]


def test_the_median_is_covered_as_often_as_promised_with_ten_runs():
    rng = np.random.default_rng(3)
    inside = []
    for _ in range(1500):
        t = rng.exponential(1.0, 10)
        e = kaplan_meier(np.minimum(t, 1.4), t <= 1.4).median
        inside.append(
            e is None or (e.low <= math.log(2) and (e.high is None or math.log(2) <= e.high))
        )
    assert 0.93 < np.mean(inside) < 0.97


@pytest.mark.parametrize(
    ("times", "reached", "match"),
    [
        ([1.0, 2.0], [True], "2 times and 1 marks"),
        ([-1.0], [True], "times: got -1.0"),
        ([1.0], [0.5], "expected true or false"),
        ([math.inf], [False], "NaN or infinite"),
    ],
)
def test_times_that_are_none_are_refused(times, reached, match):
    with pytest.raises(StatisticsError, match=match):
        kaplan_meier(times, reached)
