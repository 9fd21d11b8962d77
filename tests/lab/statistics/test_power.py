"""Power: as scipy's noncentral t, and solved both ways."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from hmpo.errors import StatisticsError
from hmpo.lab.statistics import power


@pytest.mark.parametrize("n", [2, 3, 10, 20, 200])
@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_power_is_the_tail_of_the_noncentral_t(n, alpha):
    edge = stats.t.ppf(1 - alpha / 2, n - 1)
    for effect in (0.0, 0.3, 1.0, 3.0):
        shift = effect * math.sqrt(n)
        expected = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
        if not math.isnan(expected):
            ours = power.power_paired(0.02, n, effect * 0.02, alpha)
            assert ours == pytest.approx(expected, abs=2e-7), effect


@pytest.mark.parametrize(
    ("n", "margin", "difference"), [(3, 2.0, 0.0), (10, 1.0, 0.2), (50, 0.4, 0.1)]
)
def test_the_power_of_equivalence_is_the_integral_over_the_sample_sd(n, margin, difference):
    edge, unit = stats.t.ppf(0.95, n - 1), math.sqrt(n)

    def at(s):
        room = margin * unit - edge * s
        inside = stats.norm.cdf(room - difference * unit) - stats.norm.cdf(
            -room - difference * unit
        )
        return max(inside, 0.0) * stats.chi.pdf(s * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1)

    expected, _ = integrate.quad(at, 0, margin * unit / edge, limit=200, epsabs=1e-10)
    assert power.power_equivalence(1.0, n, margin, difference) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("n", [2, 5, 20, 500])
def test_what_is_detectable_is_seen_with_the_wanted_chance(n):
    d, m = power.detectable(0.03, n, 0.8), power.detectable_margin(0.03, n, 0.9)
    assert power.power_paired(0.03, n, d) == pytest.approx(0.8, abs=1e-9)
    assert power.power_equivalence(0.03, n, m) == pytest.approx(0.9, abs=1e-9)
    assert power.detectable(0.06, n, 0.8) == pytest.approx(2 * d)  # it scales with the sd


@pytest.mark.parametrize("difference", [0.01, 0.02, 0.1])
def test_the_seeds_needed_are_the_fewest(difference):
    n = power.seeds_needed(0.03, difference)
    assert power.power_paired(0.03, n, difference) >= 0.8
    assert n == 2 or power.power_paired(0.03, n - 1, difference) < 0.8
    m = power.seeds_for_equivalence(0.03, difference)
    assert power.power_equivalence(0.03, m, difference) >= 0.8
    assert m == 2 or power.power_equivalence(0.03, m - 1, difference) < 0.8


def test_a_well_known_table_of_sample_sizes_is_met():
    # Two-sided paired t, alpha .05, power .8: 199, 34 and 15 pairs for effects .2, .5 and .8.
    assert [power.seeds_needed(1.0, d) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]


def test_extremes_are_answered_without_nan():
    assert power.detectable(0.0, 10) == power.detectable_margin(0.0, 10) == 0.0
    assert power.seeds_needed(0.0, 0.01) == power.seeds_for_equivalence(0.0, 0.01) == 2
    assert power.seeds_needed(1.0, 0.001) is power.seeds_for_equivalence(1.0, 0.001) is None
    assert power.seeds_for_equivalence(0.03, 0.02, 0.02) is None  # at the margin: never
    assert power.power_paired(1.0, 2, 1e6) == pytest.approx(1.0)
    assert power.power_equivalence(1.0, 2, 1e-9) == pytest.approx(0.0, abs=1e-9)
    assert power.seeds_text(None) == "more than 1000 seeds"
    assert [power.seeds_text(n) for n in (1, 12)] == ["1 seed", "12 seeds"]


def test_a_pilot_tells_how_badly_it_knows_the_sd():
    d = np.random.default_rng(0).normal(0, 0.02, 5)
    told = power.pilot(d, 0.8)
    assert told.sd == pytest.approx(np.std(d, ddof=1))
    assert told.sd_upper == pytest.approx(told.sd * math.sqrt(4 / stats.chi2.ppf(0.2, 4)))
    assert "points from 5 seeds" in told.sentence and "80 % confidence" in told.sentence
    wide = np.random.default_rng(1).normal(0, 1, (4000, 5))
    over = np.mean([power.pilot(x, 0.8).sd_upper >= 1.0 for x in wide])
    assert stats.binomtest(round(over * 4000), 4000, 0.8).pvalue > 1e-4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: power.detectable(0.1, 1), "got 1 seeds"),
        (lambda: power.detectable(-0.1, 5), "sd: got -0.1"),
        (lambda: power.seeds_needed(0.1, 0.0), "difference: got 0.0"),
        (lambda: power.seeds_needed(0.1, 0.1, power=0.01), "power: got 0.01"),
        (lambda: power.power_equivalence(0.1, 5, 0.0), "margin: got 0.0"),
        (lambda: power.pilot([0.1]), "at least 2"),
        (lambda: power.pilot([0.1, math.inf]), "NaN or infinite"),
    ],
)
def test_questions_without_an_answer_are_refused(call, match):
    with pytest.raises(StatisticsError, match=match):
        call()
