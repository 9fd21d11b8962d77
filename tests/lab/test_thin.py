"""Long series in few points: extremes stay, immense values are left out, states are strips."""

import math

from hmpo.lab import thin


def test_moving_average_skips_nan_and_stops_where_the_window_is_not_full():
    values = [1.0, 2.0, math.nan, 4.0, 5.0]
    smooth = thin.moving_average(values, 3)
    assert math.isnan(smooth[0]) and math.isnan(smooth[4])
    assert smooth[1:4] == [1.5, 3.0, 4.5]
    sawtooth = thin.moving_average([0.0, 1.0, 2.0, 3.0] * 3, 4)
    assert sawtooth[2:11] == [1.5] * 9 and math.isnan(sawtooth[1]) and math.isnan(sawtooth[11])


def test_a_long_series_keeps_its_extremes_in_few_points_and_a_short_one_stays():
    steps = range(200_000)
    values = [math.sin(i / 5000) for i in steps]
    values[77_777], values[150_001], values[9] = 50.0, -50.0, math.nan
    at, kept = thin.thin(steps, values)
    assert len(at) == len(kept) <= 2 * thin.MOST and at == sorted(at)
    assert dict(zip(at, kept))[77_777] == 50.0 and dict(zip(at, kept))[150_001] == -50.0
    assert thin.thin([1, 5, 9], [3.0, 1.0, 2.0]) == ([1, 5, 9], [3.0, 1.0, 2.0])


def test_immense_values_are_not_drawn():
    _, kept = thin.thin(range(4), [1.0, 1e308, math.inf, -2.0])
    assert kept[0] == 1.0 and kept[3] == -2.0 and math.isnan(kept[1]) and math.isnan(kept[2])
    _, kept = thin.thin(range(9000), [math.nan] * 9000)
    assert all(map(math.isnan, kept)) and len(kept) == thin.MOST


def test_a_smoothed_series_is_the_moving_average_at_fewer_places():
    values = [float(i % 7) for i in range(30_000)]
    steps, smooth = thin.smoothed(range(30_000), values, 70)
    assert len(steps) == thin.MOST and steps[-1] == 29_999
    whole = thin.moving_average(values[:3000], 70)
    assert [s for i, s in zip(steps, smooth) if 100 < i < 2900] == [
        whole[i] for i in steps if 100 < i < 2900
    ]
    assert thin.smoothed([0, 1, 2], [1.0, 2.0, 3.0], 3)[1][1] == 2.0


def test_a_state_is_one_strip_as_long_as_it_lasts_and_few_strips_however_it_flickers():
    calm = [(0, "a"), (1, "a"), (2, "b"), (3, "b"), (4, "a")]
    assert thin.strips(calm, 5) == [(0, 2, "a"), (2, 4, "b"), (4, 5, "a")]
    assert thin.strips([], 0) == []
    flicker = [(i, "ab"[i % 2] if i % 10 else "b") for i in range(20_000)]
    strips = thin.strips(flicker, 20_000)
    assert len(strips) == 400 and {state for _, _, state in strips} == {"b"}
    assert strips[0][0] == 0 and strips[-1][1] == 20_000
