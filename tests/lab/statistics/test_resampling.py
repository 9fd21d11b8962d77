"""Several tasks, seeds and prompts: values by slow loops, intervals that cover as promised."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from hmpo.errors import StatisticsError
from hmpo.lab.statistics import resampling
from hmpo.lab.statistics.intervals import t_from
from tests.oracles import statistics as oracle

SCORES = st.lists(st.integers(0, 16).map(lambda k: k / 16), min_size=2, max_size=9)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_iqm_is_scipys_trimmed_mean(values):
    assert resampling.iqm(values) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-12)


@given(SCORES, SCORES)
def test_the_probability_of_improvement_is_the_share_of_pairs(a, b):
    e = resampling.probability_of_improvement([a], [b], paired=False)
    assert e.value == pytest.approx(oracle.improvement(a, b))
    assert 0 <= e.low <= e.value <= e.high <= 1 and e.low < e.high
    back = resampling.probability_of_improvement([b], [a], paired=False)
    np.testing.assert_allclose([back.low, back.high], [1 - e.high, 1 - e.low], atol=1e-12)
    u = stats.mannwhitneyu(a, b).statistic
    assert e.value * len(a) * len(b) == pytest.approx(u)


def test_tasks_weigh_alike_in_the_probability_of_improvement():
    a, b = {"easy": [0.9, 0.8], "hard": [0.1, 0.2, 0.3]}, {"easy": [0.1, 0.2], "hard": [0.3] * 3}
    e = resampling.probability_of_improvement(a, b)
    assert e.value == pytest.approx((1.0 + 0.5 / 3) / 2)
    assert e.n == 2


def test_complete_separation_has_wilsons_interval():
    e = resampling.probability_of_improvement([[1.0] * 10], [[0.0] * 10])
    expected = stats.binomtest(10, 10).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose([e.low, e.high], expected)


def test_the_profile_is_the_share_above_and_never_rises():
    tasks, tau = [[0.1, 0.5, 0.9], [0.5, 0.7]], [0.0, 0.5, 0.6, 0.95]
    profile = resampling.performance_profile(tasks, tau)
    expected = [np.mean([np.mean([s > t for s in task]) for task in tasks]) for t in tau]
    np.testing.assert_allclose(profile.share, expected)
    assert (np.diff(profile.share) <= 0).all()
    assert (profile.low <= profile.share).all() and (profile.share <= profile.high).all()
    assert profile.low[0] < 1.0 and profile.high[-1] > 0.0  # all on one side is no certainty


@given(
    st.integers(2, 5).flatmap(
        lambda p: st.lists(
            st.lists(st.integers(0, 4).map(float), min_size=p, max_size=p), min_size=2, max_size=5
        )
    )
)
def test_seeds_and_prompts_are_weighed_by_the_two_way_analysis_of_variance(d):
    mean, rows, columns, _ = resampling.two_level_effects(np.array(d))
    of_seeds, of_prompts, rest = oracle.two_way(d)
    s, p = len(d), len(d[0])
    assert mean == pytest.approx(oracle.mean([v for row in d for v in row]))
    variance = np.mean(rows**2) / s + np.mean(columns**2) / p  # of resampled means
    expected = (of_seeds + max(of_prompts - rest, 0.0)) / (s * p)
    assert variance == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_of_two_levels_tends_to_that_variance():
    rng = np.random.default_rng(0)
    a, b = (rng.random((10, 64)) < 0.5 + 0.1 * rng.normal(size=(10, 1)) for _ in "ab")
    e = resampling.two_level_bootstrap(a, b, draws=20_000)
    d = a.astype(float) - b
    mean, rows, columns, df = resampling.two_level_effects(d)
    error = math.sqrt(np.mean(rows**2) / 10 + np.mean(columns**2) / 64)
    _, low, high, _ = t_from(mean, np.float64(error), df, 0.95)
    assert e.value == pytest.approx(d.mean())
    np.testing.assert_allclose([e.low, e.high], [low, high], atol=0.02 * (high - low))
    assert resampling.two_level_bootstrap(b, a, draws=500).value == pytest.approx(-e.value)


def test_the_same_seed_gives_the_same_interval_and_identical_runs_one_of_width_zero():
    rng = np.random.default_rng(1)
    tasks = [rng.random(8), rng.random(8)]
    assert resampling.stratified_iqm(tasks, 200, 3) == resampling.stratified_iqm(tasks, 200, 3)
    assert resampling.stratified_iqm(tasks, 200, 3) != resampling.stratified_iqm(tasks, 200, 4)
    same = resampling.stratified_iqm(tasks, 200, against=tasks)
    assert same.value == same.low == same.high == 0.0 and same.p_value == 1.0
    bits = rng.random((4, 16)) < 0.5
    same = resampling.two_level_bootstrap(bits, bits, draws=200)
    assert same.value == same.low == same.high == 0.0 and same.p_value == 1.0


def test_the_difference_of_two_iqms_turns_its_sign_with_the_methods():
    rng = np.random.default_rng(2)
    a, b = ([rng.random(9), rng.random(7)] for _ in "ab")
    ours = resampling.stratified_iqm(a, 300, against=b)
    theirs = resampling.stratified_iqm(b, 300, against=a)
    assert ours.value == resampling.iqm([*a[0], *a[1]]) - resampling.iqm([*b[0], *b[1]])
    np.testing.assert_allclose([theirs.low, theirs.high], [-ours.high, -ours.low], atol=1e-12)


def test_ten_seeds_cover_what_they_promise():
    rng = np.random.default_rng(3)
    size = 2000

    def covered(low, high, truth):
        share = float(np.mean((low <= truth) & (truth <= high)))
        assert 0.93 < share < 0.97, share

    a, b = ([m + 0.05 * rng.normal(size=(size, 10)) for m in (0.3, 0.5, 0.6)] for _ in "ab")
    _, low, high, _ = resampling.iqm_interval(a, b, 400, 0, 0.95)
    covered(low, high, 0.0)
    _, low, high = resampling.improvement(a, b, False, 0.95)
    covered(low, high, 0.5)
    tau = 0.45
    counts = np.array([(x > tau).sum(-1) for x in a])
    truth = np.mean(special.ndtr((np.array([0.3, 0.5, 0.6]) - tau) / 0.05))
    _, low, high = resampling.stratified_share(counts, np.full((3, 1), 10), 0.95)
    share = float(np.mean((low <= truth) & (truth <= high)))
    assert share > 0.9, share  # one threshold alone is discrete
    d = (
        0.1 * rng.normal(size=(size, 10, 1))
        + 0.1 * rng.normal(size=(size, 1, 40))
        + rng.normal(size=(size, 10, 40))
    )
    mean, rows, columns, df = resampling.two_level_effects(d)
    error = np.sqrt(np.mean(rows**2, -1) / 10 + np.mean(columns**2, -1) / 40)
    covered(*t_from(mean, error, df, 0.95)[1:3], 0.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: resampling.iqm([]), "at least 1"),
        (lambda: resampling.stratified_iqm([]), "no task"),
        (lambda: resampling.stratified_iqm([[0.1]]), "a task with one run"),
        (lambda: resampling.stratified_iqm([[0.1, math.nan]]), "by_task, task 0: 1 of 2"),
        (lambda: resampling.stratified_iqm([[0.1, 0.2]], draws=5), "draws: got 5"),
        (
            lambda: resampling.stratified_iqm([[0.1, 0.2]], against=[[0.1, 0.2, 0.3]]),
            "as many seeds",
        ),
        (lambda: resampling.two_level_bootstrap([[1.0, 0.0]]), "at least 2"),
        (
            lambda: resampling.two_level_bootstrap(np.ones((2, 3)), np.ones((3, 2))),
            r"got shape \(3, 2\), expected \(2, 3\)",
        ),
        (
            lambda: resampling.probability_of_improvement([[0.1, 0.2]], [[0.1, 0.2, 0.3]]),
            "paired runs",
        ),
        (lambda: resampling.performance_profile([[0.1]], [math.nan]), "thresholds: 1 of 1"),
    ],
)
def test_scores_that_do_not_fit_are_refused(call, match):
    with pytest.raises(StatisticsError, match=match):
        call()
