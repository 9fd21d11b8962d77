"""Two one-sided tests: as scipy's, and the words that belong to them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.equivalence import one_sided, two_one_sided


@given(
    st.lists(st.integers(-50, 50).map(lambda k: k / 640), min_size=2, max_size=12),
    st.floats(0.001, 0.2),
)
def test_the_two_tests_are_scipys_and_agree_with_the_interval(differences, margin):
    e = two_one_sided(differences, margin)
    if len(set(differences)) > 1:
        above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
        assert e.p_value == pytest.approx(max(above, below), rel=1e-9, abs=1e-14)
        if abs(e.p_value - 0.05) > 1e-9:
            inside = -margin < e.interval.low and e.interval.high < margin
            assert e.equivalent == inside
    else:
        assert e.equivalent == (abs(differences[0]) < margin)
    assert e.interval.level == pytest.approx(0.9)


def test_runs_that_are_identical_are_equivalent_and_one_seed_decides_nothing():
    e = two_one_sided([0.0] * 10, 0.02)
    assert e.equivalent and e.p_value == 0.0 and e.interval.low == e.interval.high == 0.0
    assert not two_one_sided([0.0], 0.02).equivalent
    assert two_one_sided([0.0], 0.02).p_value is None


def test_equivalence_is_claimed_wrongly_as_often_as_alpha_says():
    d = np.random.default_rng(1).normal(0.02, 0.005, (40_000, 10))
    wrong = int((one_sided(d, 0.02) < 0.05).sum())
    assert stats.binomtest(wrong, 40_000, 0.05).pvalue > 1e-4


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(StatisticsError, match="margin"):
        two_one_sided([0.1, 0.2], margin)
