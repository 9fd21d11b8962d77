"""The small statistics against slow exact ones, and what they promise at their edges."""

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.agm.primitives import (
    CERTAIN,
    EwStat,
    Latch,
    Multiplier,
    Window,
    centre_and_scale,
    line,
    median,
    rank,
    robust_z,
    trend,
)
from tests.oracles import agm as oracle

SMALL = st.floats(-1e3, 1e3)


def filled(values, size=None, block=1, every=1) -> Window:
    window = Window(size or max(1, len(values)), block)
    for i, value in enumerate(values):
        window.push(i * every, value)
    return window


def again(part, fresh):
    fresh.load_state_dict(json.loads(json.dumps(part.state_dict())))
    return fresh


def test_window_keeps_the_last_values_and_counts_bad_ones():
    window = filled([1.0, math.nan, 2.0, math.inf, 3.0, 4.0], size=3)
    assert list(window.values) == [2.0, 3.0, 4.0]
    assert list(window.steps) == [2, 4, 5]
    assert window.bad == 2 and window.full


def test_window_of_blocks_averages_steps_and_values():
    window = filled([1.0, 3.0, 5.0, 7.0, 9.0], size=8, block=2)
    assert list(window.values) == [2.0, 6.0]
    assert list(window.steps) == [0.5, 2.5]
    restored = again(window, Window(8, 2))
    for part in (window, restored):
        assert part.push(5, 11.0)
    assert restored.state_dict() == window.state_dict()
    assert list(window.values)[-1] == 10.0


@given(st.lists(SMALL, min_size=4, max_size=30), st.integers(1, 7))
def test_trend_equals_the_exact_one(values, every):
    window = filled(values, every=every)
    found = trend(window)
    if found.sd == 0.0:
        return
    slope, t, effect, rho = oracle.trend(list(window.steps), values)
    scale = max(map(abs, values)) or 1.0
    assert found.slope == pytest.approx(slope, rel=1e-6, abs=1e-11 * scale)
    if found.sd > 1e-6 * scale:
        assert found.t == pytest.approx(t, rel=1e-5, abs=1e-5)
        assert found.effect == pytest.approx(effect, rel=1e-5, abs=1e-5)
        assert found.rho == pytest.approx(rho, rel=1e-5, abs=1e-5)


@given(st.lists(SMALL, min_size=5, max_size=30), st.floats(0.01, 100), SMALL)
def test_trend_knows_no_unit(values, scale, shift):
    plain = line(range(len(values)), values)
    other = line(range(len(values)), [scale * v + shift for v in values])
    if plain.sd > 1e-3 and plain.sd * scale > 1e-6 * abs(shift):
        assert other.t == pytest.approx(plain.t, rel=1e-5, abs=1e-6)
        assert other.effect == pytest.approx(plain.effect, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-9, 1e9])
def test_constant_has_no_trend_and_no_oscillation(value):
    found = trend(filled([value] * 50))
    assert (found.t, found.effect, found.sd, found.oscillation) == (0.0, 0.0, 0.0, 0.0)


def test_line_without_residual_is_certain():
    assert line(range(20), [0.1 * i for i in range(20)]).t == CERTAIN
    assert line(range(20), [-0.1 * i for i in range(20)]).effect == -CERTAIN


@pytest.mark.parametrize("n", [0, 1, 2])
def test_two_points_are_no_trend(n):
    assert trend(filled([1.0] * n, size=5)) is None


def test_values_at_one_step_are_no_trend():
    assert line([3, 3, 3, 3], [1.0, 2.0, 3.0, 4.0]) is None


def test_trend_is_that_of_the_present_entries():
    values = [random.Random(1).random() for _ in range(40)]
    window = Window(10)
    for i, value in enumerate(values):
        window.push(i, value)
        if i >= 2:
            first = max(0, i - 9)
            assert trend(window) == line(range(first, i + 1), values[first : i + 1])
    window.clear()
    assert trend(window) is None


def test_memory_of_the_residuals_lowers_t():
    rng, x, values = random.Random(3), 0.0, []
    for _ in range(100):
        x = 0.9 * x + rng.gauss(0, 1)
        values.append(x)
    found = trend(filled(values))
    plain = found.slope / (found.sd / math.sqrt(sum((i - 49.5) ** 2 for i in range(100))))
    assert found.rho > 0.5
    assert abs(found.t) < 0.6 * abs(plain)


def test_period2_detected():
    found = trend(filled([0.9 * (-1) ** i for i in range(20)]))
    assert found.oscillation == pytest.approx(0.95, abs=0.02)
    assert trend(filled([math.sin(i / 5) for i in range(40)])).oscillation == 0.0


@given(st.lists(SMALL, min_size=1, max_size=40), st.floats(0.5, 20))
def test_weighted_statistics_equal_their_definition(values, halflife):
    stat = EwStat(halflife)
    for value in values:
        stat.push(value)
    mean, var = oracle.weighted(values, halflife)
    assert stat.mean == pytest.approx(mean, abs=1e-8)
    assert stat.var == pytest.approx(var, rel=1e-6, abs=1e-6)


def test_weighted_mean_of_a_constant_is_the_constant_from_the_start():
    stat = EwStat(100)
    stat.push(0.7)
    assert stat.mean == 0.7 and stat.var == 0.0
    assert not stat.push(math.nan) and stat.bad == 1 and stat.n == 1


def test_latch_needs_a_run_stays_for_its_dwell_and_leaves_below_exit():
    latch = Latch(enter=4.0, exit=2.0, confirm=2, dwell=3)
    assert [latch.push(x) for x in (5, 1, 5, 4)] == [False, False, False, True]
    assert [latch.push(x) for x in (1, 1, 3, 2)] == [True, True, True, False]
    assert [latch.push(x) for x in (5, 5)] == [False, True]


def test_latch_is_not_moved_by_nan():
    latch = Latch(enter=1.0, exit=0.5)
    assert not latch.push(math.nan)
    latch.push(2.0)
    assert latch.push(math.nan)


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.floats(0.1, 1), st.floats(1, 9))
def test_multiplier_keeps_its_bounds_and_its_step(deltas, low, high):
    factor = Multiplier(low, high, step=1.25)
    for delta in deltas:
        before = factor.value
        after = factor.moved(delta)
        assert factor.value == before  # proposing is free
        factor.set(after)
        assert low <= after <= high
        assert before / 1.25 * (1 - 1e-12) <= after <= before * 1.25 * (1 + 1e-12)


def test_robust_z_is_not_moved_by_an_outlier_of_the_reference():
    reference = [0.0, 0.1, -0.1, 0.2, -0.2, 1e9]
    assert robust_z(1.0, reference, floor=0.1) == pytest.approx(0.95 / (1.4826 * 0.15))
    assert centre_and_scale([3.0, 3.0], floor=0.1) == (3.0, 0.1)


def test_rank_counts_ties_by_half():
    assert rank(2.0, [1.0, 2.0, 2.0, 3.0]) == 0.5
    assert rank(9.0, [1.0, 2.0]) == 1.0
    assert rank(1.0, []) == 0.5


def test_state_of_every_part_continues_bit_for_bit():
    rng = random.Random(5)
    values = [rng.gauss(0, 1) for _ in range(60)]
    parts = [
        (Window(20), lambda p, i, x: p.push(i, x)),
        (EwStat(7), lambda p, i, x: p.push(x)),
        (Latch(1, 0, 2, 3), lambda p, i, x: p.push(x)),
        (Multiplier(0.5, 2, 1.25), lambda p, i, x: p.set(p.moved(x))),
    ]
    fresh = [Window(20), EwStat(7), Latch(1, 0, 2, 3), Multiplier(0.5, 2, 1.25)]
    for (part, push), other in zip(parts, fresh):
        for i, x in enumerate(values[:33]):
            push(part, i, x)
        other = again(part, other)
        for i, x in enumerate(values[33:]):
            push(part, 33 + i, x)
            push(other, 33 + i, x)
        assert other.state_dict() == part.state_dict()


@given(st.lists(SMALL, min_size=1, max_size=30))
def test_median_is_the_known_one(values):
    assert median(values) == statistics.median(values)
