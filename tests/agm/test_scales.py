"""Advice on three scales."""

import math
import random

import pytest

from hmpo.agm import MultiScaleAGMFramework, ScalesConfig
from hmpo.agm.scales import AGMTracker
from tests.agm.streams import autocorrelated, step

SMALL = ScalesConfig(scales=(10, 40, 100))


def follow(rewards, gaps=None, regimes=None, config=SMALL):
    controller, told = MultiScaleAGMFramework(config), []
    for i, reward in enumerate(rewards):
        gap = gaps[i] if gaps else 1e-3
        regime = regimes[i] if regimes else "normal_learning"
        fields = {"ratio/log_gap_mean": gap, "reward/mean": reward, "decision/regime": regime}
        told.append(controller.update(step(i, **fields)))
    return told


def noise(n, sd=0.02, seed=0):
    return autocorrelated(random.Random(seed), 0.3, sd, n)


def test_no_strategic_action_in_warmup():
    told = follow([0.5 + x for x in noise(400)], config=ScalesConfig())
    assert {d["strategic"] for d in told} == {"insufficient_data"}
    assert {d["tactical"] for d in told[:49]} == {"insufficient_data"}
    assert told[-1]["tactical"] != "insufficient_data"


def test_unstable_is_an_emergency_at_once():
    assert follow([0.5], regimes=["unstable"])[0]["immediate"] == "emergency_conservative_mode"


def test_a_falling_gap_with_steady_rewards_may_speed_up():
    gaps = [1e-2] * 60 + [3e-3] * 3
    assert follow([0.5] * 63, gaps)[-1]["immediate"] == "accelerate_slightly"


@pytest.mark.parametrize(
    ("gaps", "advice"),
    [
        ([1e-2 * math.exp(0.9 * (-1) ** i) for i in range(100)], "dampen_oscillations"),
        ([1e-3 * math.exp(0.03 * i) for i in range(100)], "increase_stability"),
        ([1e-1 * math.exp(-0.03 * i) for i in range(100)], "increase_exploration"),
        ([1e-2] * 100, "maintain_course"),
    ],
)
def test_tactical_advice(gaps, advice):
    gaps = [g * math.exp(x) for g, x in zip(gaps, noise(100, 0.01, seed=2))]
    assert follow([0.5] * 100, gaps)[-1]["tactical"] == advice


def test_strategic_advice_follows_the_rewards():
    rising = [0.2 + 0.005 * i + x for i, x in enumerate(noise(120))]
    assert follow(rising)[-1]["strategic"] == "maintain_strategy"
    assert follow([0.5] * 120)[-1]["strategic"] == "curriculum_advancement"


def test_a_fall_with_danger_asks_once_for_the_best_checkpoint():
    rewards = [min(0.8, 0.2 + 0.01 * i) for i in range(100)]
    rewards += [0.8 - 0.008 * i for i in range(95)]
    regimes = ["normal_learning"] * 120 + ["unstable"] * 75
    told = follow([r + x for r, x in zip(rewards, noise(195, 0.005))], regimes=regimes)
    at = [i for i, d in enumerate(told) if d["strategic"] == "reset_to_checkpoint"]
    assert len(at) == 1 and at[0] > 120
    assert 60 < told[at[0]]["reset_to_step"] < 145


def test_a_fall_without_danger_is_no_reason_to_go_back():
    rewards = [0.8 - 0.005 * i for i in range(150)]
    assert "reset_to_checkpoint" not in {d["strategic"] for d in follow(rewards)}


def test_a_long_view_keeps_few_entries():
    tracker = AGMTracker(1000, 0.5, 50)
    for i in range(3000):
        tracker.push(i, 1e-3 * i)
    assert len(tracker.rewards) == 50 and tracker.rewards.block == 20
    assert tracker.trend.slope == pytest.approx(1e-3)
