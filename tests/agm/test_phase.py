"""Phases of training and the exponents that go with them."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.agm import PhaseConfig, StrategyConfig, TrainingPhaseAdaptiveAGM, TrainingPhaseDetector
from hmpo.agm.phase import moved
from tests.agm.streams import autocorrelated, step


def follow(rewards, regime="stable_learning", config=None, name="reward/mean"):
    detector = TrainingPhaseDetector(config)
    return [
        detector.update(step(i, **{name: r, "decision/regime": regime}))
        for i, r in enumerate(rewards)
    ]


def phases(decisions):
    return [decision["phase"] for decision in decisions]


def noise(n, seed=0, sd=0.02, memory=0.0):
    return autocorrelated(random.Random(seed), memory, sd, n)


def test_phase_reacts_to_performance():
    rising = [0.2 + 0.005 * i + x for i, x in enumerate(noise(100))]
    falling = [0.8 - 0.005 * i + x for i, x in enumerate(noise(100))]
    assert phases(follow(rising))[-1] == "exploitation"
    assert phases(follow(falling))[-1] == "instability"


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_phase_scale_invariant(scale):
    rewards = [0.2 + min(0.4, 0.005 * i) + x for i, x in enumerate(noise(300))]
    assert phases(follow([scale * r for r in rewards])) == phases(follow(rewards))
    assert phases(follow([scale + r for r in rewards])) == phases(follow(rewards))


def test_a_straight_improvement_is_no_instability():
    told = phases(follow([0.1 + 0.01 * i for i in range(80)]))
    assert "instability" not in told and told[-1] == "exploitation"


def test_a_falling_loss_is_progress():
    losses = [2.0 - 0.01 * i + x for i, x in enumerate(noise(100))]
    config = PhaseConfig(mode="min", performance="loss")
    assert phases(follow(losses, config=config, name="loss"))[-1] == "exploitation"


def test_plateau_and_then_convergence():
    told = phases(follow([0.7] * 300))
    assert "plateau" in told
    assert told[-1] == "convergence"
    assert told.index("convergence") - told.index("plateau") >= 50


def test_no_phase_before_there_is_data():
    decisions = follow([0.1 * i for i in range(19)])
    assert not any(decision["warm"] for decision in decisions)
    assert set(phases(decisions)) == {"exploration"}


def test_instability_needs_two_records_and_no_wait():
    detector = TrainingPhaseDetector()
    for i in range(60):
        detector.update(step(i, **{"decision/regime": "normal_learning"}))
    told = [
        detector.update(step(60 + i, **{"decision/regime": "unstable"}))["phase"] for i in range(2)
    ]
    assert told == ["exploration", "instability"]


def test_struggling_must_last():
    detector = TrainingPhaseDetector()
    rewards = iter(noise(100, sd=0.1))
    regimes = ["normal_learning"] * 60 + ["struggling"] * 2 + ["normal_learning"] * 10
    for i, regime in enumerate(regimes):
        decision = detector.update(
            step(i, **{"decision/regime": regime, "reward/mean": next(rewards)})
        )
    assert decision["phase"] != "instability"
    for i in range(4):
        decision = detector.update(step(72 + i, **{"decision/regime": "struggling"}))
    assert decision["phase"] == "instability"


@pytest.mark.parametrize(("memory", "most"), [(0.0, 0.002), (0.5, 0.01)])
def test_trendless_noise_rarely_changes_the_phase(memory, most):
    changes = 0
    for seed in range(5):
        told = phases(follow([0.5 + x for x in noise(400, seed, memory=memory)], "normal_learning"))
        changes += sum(a != b for a, b in pairwise(told))
    assert changes / 2000 <= most


def test_another_level_starts_the_rewards_anew():
    detector = TrainingPhaseDetector()
    for i in range(120):
        level = 1 if i < 60 else 2
        reward = 0.9 if level == 1 else 0.3
        decision = detector.update(
            step(
                i,
                **{
                    "reward/mean": reward,
                    "curriculum/level": level,
                    "decision/regime": "normal_learning",
                },
            )
        )
        assert decision["phase"] != "instability"


def test_nan_rewards_are_counted_and_not_seen():
    rewards = [0.5] * 60 + [math.nan] * 30
    decisions = follow(rewards)
    assert decisions[-1]["phase"] == decisions[59]["phase"]
    assert decisions[-1].reason == "nonfinite"


def strategy(phase, p=0.0, number=0, warm=True, since=0, config=None):
    told = {"decision/phase": phase, "decision/warm": warm, "decision/since_step": since}
    return TrainingPhaseAdaptiveAGM(config).update(step(number, **{"ratio/p": p, **told}))


@pytest.mark.parametrize(
    ("phase", "name", "target"),
    [
        ("exploration", "arithmetic_weighted_agm", 0.6),
        ("exploitation", "standard_agm", 0.0),
        ("instability", "harmonic_weighted_agm", -0.6),
        ("convergence", "geometric_mean_direct", 0.0),
        ("plateau", "oscillating_agm", 0.0),
    ],
)
def test_every_phase_has_its_strategy(phase, name, target):
    decision = strategy(phase)
    assert decision["strategy"] == name and decision["p_target"] == pytest.approx(target)
    assert decision["weight"] == pytest.approx((target + 1) / 2)


def test_strategy_waits_for_data():
    decision = strategy("exploration", p=-1.0, warm=False)
    assert decision["strategy"] == "keep" and decision["p"] == -1.0


def test_oscillation_swings_around_zero():
    swing = [strategy("plateau", number=i)["p_target"] for i in range(10)]
    assert max(swing) == pytest.approx(0.3 * math.sin(2 * math.pi * 0.2))
    assert sum(swing) == pytest.approx(0.0, abs=1e-12)


@given(st.floats(-5, 5), st.sampled_from(["exploration", "exploitation", "instability", "plateau"]))
def test_p_moves_at_most_a_tenth_per_update(p, phase):
    for number in range(5):
        decision = strategy(phase, p=p, number=number)
        assert abs(decision["p"] - p) <= 0.1 + 1e-12
        p = decision["p"]


@given(st.floats(-2, 2), st.floats(-9, 9))
def test_p_stays_in_its_bounds_and_arrives(p, target):
    for _ in range(45):
        p = moved(p, target, 0.1, -2.0, 2.0)
        assert -2 <= p <= 2
    assert p == max(-2, min(2, target))


def test_weighted_mean_of_a_strategy_is_its_power_mean_to_second_order():
    rng, weight = random.Random(0), 0.8
    d = [0.05 * rng.gauss(0, 1) for _ in range(4000)]
    p = 2 * weight - 1

    def log_mean(q):
        return math.log(math.fsum(math.exp(q * x) for x in d) / len(d)) / q

    blend = weight * log_mean(1.0) + (1 - weight) * log_mean(-1.0)
    assert blend == pytest.approx(log_mean(p), abs=2e-6)
    assert StrategyConfig().exploration_p == pytest.approx(p)
