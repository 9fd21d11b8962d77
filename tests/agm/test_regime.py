"""The regime of the dispersion: what it sees, when, and what it does not fall for."""

import math
import random

import pytest

from hmpo.agm import AdaptiveAGMController, RegimeConfig
from hmpo.agm.regime import GAP, ahm_iterations
from tests.agm.streams import autocorrelated, step

FREE = RegimeConfig(gap_target=None)


def follow(gaps, config=FREE, **fields):
    controller = AdaptiveAGMController(config)
    return [controller.update(step(i, **{GAP: g, **fields})) for i, g in enumerate(gaps)]


def noisy(n, seed=0, memory=0.5, sd=0.25, level=1e-2):
    return [level * math.exp(x) for x in autocorrelated(random.Random(seed), memory, sd, n)]


def regimes(decisions):
    return [decision["regime"] for decision in decisions]


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
@pytest.mark.parametrize("gap", [1e-9, 1e-4, 0.3, 2.0, 20.0, 90.0])
def test_iterations_are_those_of_the_iteration(gap, tol):
    a, h, n = gap / 2, -gap / 2, 0  # logs of the two means
    while a - h > tol:
        mean = math.log((math.exp(a) + math.exp(h)) / 2)
        a, h, n = mean, a + h - mean, n + 1
    assert ahm_iterations(gap, tol, 1000) == n


def test_iterations_are_capped():
    assert ahm_iterations(1e300, 1e-6, 12) == 12


def test_rate_reacts_within_window():
    decisions = follow([1e-3] * 200 + [2.0] * 3)
    assert decisions[199]["convergence_rate"] == pytest.approx(1 - math.tanh(5e-4))
    assert decisions[200]["convergence_rate"] == pytest.approx(1 - math.tanh(1.0))


def test_unstable_detected_on_spike():
    gaps = noisy(150)
    for i in range(120, 125):
        gaps[i] *= 20
    told = regimes(follow(gaps))
    assert "unstable" not in told[:121]
    assert told[121] == "unstable"  # the second of the burst
    assert told[-1] != "unstable"


def test_unstable_is_seen_above_a_high_rate_too():
    assert follow([1e-2] * 60 + [0.3] * 3)[-1]["convergence_rate"] > 0.7
    assert regimes(follow([1e-2] * 60 + [0.3] * 3))[-1] == "unstable"


def test_steady_growth_is_seen_and_forgiven_while_rewards_rise():
    gaps = [1e-2 * 2 ** (i / 10) for i in range(40)]
    gaps = [1e-2] * 40 + [g * math.exp(x) for g, x in zip(gaps, noisy(40, sd=0.02, level=0))]
    told = regimes(follow(gaps))
    assert {"struggling", "unstable"} & set(told[55:])
    controller = AdaptiveAGMController(RegimeConfig(gap_target=None, z_hi=1e9))
    rising = [
        controller.update(step(i, **{GAP: g, "reward/mean": i / 80})) for i, g in enumerate(gaps)
    ]
    assert "struggling" not in regimes(rising)


def test_period2_detected_in_the_gap():
    rng = random.Random(1)
    gaps = [1e-2 * math.exp(0.9 * (-1) ** i + 0.05 * rng.gauss(0, 1)) for i in range(40)]
    decisions = follow(gaps)
    assert decisions[-1]["oscillation"] > 0.9
    assert decisions[-1]["regime"] == "unstable"


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("sd", [0.1, 0.25, 0.4])
def test_stationary_noise_is_hardly_ever_unstable(memory, sd):
    told = [r for seed in range(12) for r in regimes(follow(noisy(400, seed, memory, sd)))]
    assert told.count("unstable") / len(told) <= 0.005


def test_one_nan_is_one_unstable_record():
    gaps = noisy(60)
    gaps[40] = math.nan
    decisions = follow(gaps)
    assert [i for i, regime in enumerate(regimes(decisions)) if regime == "unstable"] == [40]
    assert decisions[40].reason == "nonfinite"


def test_small_gaps_do_no_harm_however_they_move():
    rng = random.Random(4)
    gaps = [1e-3 * math.exp(1.5 * rng.gauss(0, 1)) for _ in range(200)]
    gaps = [min(g, 0.019) for g in gaps]
    assert "unstable" in regimes(follow(gaps))
    assert "unstable" not in regimes(follow(gaps, RegimeConfig(gap_target=2e-2)))


def test_a_lasting_new_level_becomes_the_usual_one():
    told = regimes(follow(noisy(100) + noisy(300, seed=5, level=0.1)))
    assert "unstable" in told[100:130]
    assert "unstable" not in told[-50:]


def test_only_the_stalest_updates_are_compared():
    controller, told = AdaptiveAGMController(FREE), []
    for i, gap in enumerate(noisy(60)):
        for staleness in range(4):
            record = step(4 * i + staleness, rollout=i, staleness=staleness)
            record[GAP] = gap * staleness / 3 if staleness else 1e-15
            told.append(controller.update(record)["regime"])
    assert "unstable" not in told
    assert len(controller.gaps) == controller.config.window
    assert list(controller.gaps.steps)[-2:] == [235, 239]


def test_a_restart_forgets_the_other_course():
    controller = AdaptiveAGMController(FREE)
    for i, gap in enumerate(noisy(60)):
        controller.update(step(i, **{GAP: gap}))
    assert controller.update(step(10, **{GAP: 5.0}))["regime"] == "initialization"
    assert controller.course.restarts == 1
