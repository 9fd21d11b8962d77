"""Words follow numbers, whichever way the methods are named."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hmpo.errors import StatisticsError
from hmpo.lab.statistics import power
from hmpo.lab.statistics.equivalence import two_one_sided
from hmpo.lab.statistics.intervals import holm
from hmpo.lab.statistics.verdicts import direction, verdict

DIFFERENCES = st.lists(st.integers(-64, 64).map(lambda k: k / 512), min_size=1, max_size=12)
SPREAD = np.array([-1.0, 1.0] * 5)


@given(DIFFERENCES, st.floats(0.001, 0.1), st.none() | st.floats(0, 1))
def test_swapping_the_methods_swaps_better_and_worse_and_nothing_else(d, smallest, p):
    ours = verdict(d, smallest, p)
    theirs = verdict([-x for x in d], smallest, p)
    swapped = {"better": "worse", "worse": "better"}
    assert theirs.word == swapped.get(ours.word, ours.word)
    assert (theirs.detectable, theirs.seeds_needed) == (ours.detectable, ours.seeds_needed)


@given(DIFFERENCES, st.floats(0.001, 0.1), st.none() | st.floats(0, 1))
def test_the_word_is_what_its_rule_says(d, smallest, p):
    v = verdict(d, smallest, p)
    tested = v.estimate.p_value if p is None or len(d) == 1 else p
    apart = v.estimate.excludes_zero and tested < 0.05 and abs(v.estimate.value) >= smallest
    assert (v.word in ("better", "worse")) == apart
    if v.word in ("better", "worse"):
        assert (v.estimate.value > 0) == (v.word == "better")
    assert (v.word == "no difference") == (not apart and v.equivalence.equivalent)
    assert v.seeds_needed is None or (v.word == "undecided" and v.seeds_needed >= 1)
    assert "nan" not in v.sentence and "inf" not in v.sentence and "\n" not in v.sentence
    assert v.word.split()[0] in v.sentence


def test_a_clear_gain_is_better_only_while_holm_and_the_smallest_difference_let_it():
    d = 0.03 + 0.01 * SPREAD
    v = verdict(d, 0.02, method="hmpo", baseline="grpo")
    assert v.word == "better"
    assert v.sentence == (
        "hmpo is better than grpo by 3.0 points of success "
        "(95 % interval +2.2 to +3.8, 10 seeds, p < 0.0001)"
    )
    assert verdict(d, 0.02, adjusted_p=0.2).word == "undecided"
    assert "correction for the number" in verdict(d, 0.02, adjusted_p=0.2).sentence
    assert verdict(d, 0.031).word == "undecided"
    assert "may be less than the 3.1 that matter" in verdict(d, 0.031).sentence
    assert verdict(d, 0.05).word == "no difference"


def test_identical_runs_are_no_difference_without_nan_or_warning():
    v = verdict([0.0] * 10, 0.02)
    assert v.word == "no difference" and v.detectable == 0.0
    assert "(90 % interval +0.0 to +0.0, 10 seeds)" in v.sentence


def test_one_seed_is_undecided_and_gives_no_interval():
    v = verdict([0.5], 0.02)
    assert (v.word, v.detectable, v.seeds_needed) == ("undecided", None, None)
    assert "one seed, which gives no interval" in v.sentence


def test_undecided_names_the_seeds_by_the_power_calculation():
    d = 0.05 * SPREAD
    v, sd = verdict(d, 0.02), float(np.std(d, ddof=1))
    total = max(power.seeds_needed(sd, 0.02), power.seeds_for_equivalence(sd, 0.02))
    assert v.seeds_needed == total - 10
    assert v.sentence.endswith(f"about {total - 10} more seeds would decide")
    assert v.detectable == pytest.approx(power.detectable(sd, 10))
    wild = verdict(SPREAD, 0.001)
    assert wild.seeds_needed is None and "more than 1000 seeds" in wild.sentence


def test_near_the_smallest_difference_the_observed_one_tells_the_seeds():
    d = 0.018 + 0.004 * SPREAD
    v, sd = verdict(d, 0.02), float(np.std(d, ddof=1))
    assert v.word == "undecided"
    total = power.seeds_for_equivalence(sd, 0.02, float(np.mean(d)))
    assert v.seeds_needed == total - 10 > 0


def test_unit_and_scale_are_the_callers():
    v = verdict(3 + SPREAD, 1.0, unit="steps", scale=1.0)
    assert "by 3.0 steps" in v.sentence


def test_direction_works_on_arrays():
    mean = np.array([0.03, -0.03, 0.03, 0.01])
    low, high = mean - 0.005, mean + 0.005
    p = np.array([0.01, 0.01, 0.2, 0.01])
    np.testing.assert_array_equal(direction(mean, low, high, p, 0.02, 0.05), [1, -1, 0, 0])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: verdict([0.1, math.nan], 0.02), "NaN or infinite"),
        (lambda: verdict([0.1, 0.2], 0.0), "smallest: got 0.0"),
        (lambda: verdict([0.1, 0.2], 0.02, 1.5), "adjusted_p: got 1.5"),
        (lambda: verdict([0.1, 0.2], 0.02, alpha=0.0), "alpha|level"),
    ],
)
def test_numbers_without_a_verdict_are_refused(call, match):
    with pytest.raises(StatisticsError, match=match):
        call()


def test_equivalence_in_a_family_is_adjusted_as_a_hand_computation_says():
    """Margin 2; five seeds each, t of four degrees of freedom from a table's quantiles."""
    # standard errors by hand: sd 1.0 / sqrt(5); room 2 - |mean|
    base = np.array([-1.2649110640673518, -0.6324555320336759, 0.0, 0.6324555320336759,
                     1.2649110640673518])  # fmt: skip
    assert base.std(ddof=1) == pytest.approx(1.0)
    means = (0.0, 0.8, 0.95)
    ts = [(2 - mean) * math.sqrt(5) for mean in means]  # 4.472, 2.683, 2.348
    own = [stats.t.sf(t, 4) for t in ts]  # 0.00553, 0.0275, 0.0393
    assert [round(p, 4) for p in own] == [0.0055, 0.0275, 0.0393]
    by_hand = [3 * own[0], 2 * own[1], max(2 * own[1], own[2])]  # 0.0166, 0.0551, 0.0551
    found = holm([two_one_sided(base + mean, 2.0).p_value for mean in means])
    assert found == pytest.approx(by_hand)
    words = [
        verdict(base + mean, 2.0, adjusted_equivalence=p).word
        for mean, p in zip(means, found, strict=True)
    ]
    assert words == ["no difference", "undecided", "undecided"]
    alone = [verdict(base + mean, 2.0).word for mean in means]
    assert alone == ["no difference"] * 3
    late = verdict(base + 0.8, 2.0, adjusted_equivalence=found[1])
    assert "equivalent, but not after correction" in late.sentence
    assert late.seeds_needed is not None and late.seeds_needed > 0
    first = verdict(base, 2.0, adjusted_equivalence=found[0])
    assert "Holm-adjusted p = 0.017" in first.sentence
    with pytest.raises(StatisticsError, match="adjusted_equivalence"):
        verdict(base, 2.0, adjusted_equivalence=1.5)
