"""When to stop, and above all when not to."""

import math
import random

import pytest

from hmpo.agm import AGMConvergenceDetector, StopConfig
from tests.agm.streams import autocorrelated, evaluation, step


def phase(number, name="exploration", **fields):
    return step(number, **{"decision/phase": name, **fields})


def test_missing_metrics_do_not_stop():
    detector = AGMConvergenceDetector()
    for i in range(200):
        decision = detector.update({"type": "step", "step": i})
        assert decision.insufficient_data == "rollout"
        detector.update({"type": "eval", "step": i})
    assert detector.stop is None and detector.counts["missing"] == 400


def test_nan_triggers_nonfinite():
    detector = AGMConvergenceDetector()
    told = [detector.update(phase(i, **{"ratio/log_gap_mean": math.nan}))["stop"] for i in range(3)]
    assert told == ["continue_training", "continue_training", "nonfinite"]
    assert detector.update(phase(3))["fault"] is True  # latched


def test_a_skipped_update_now_and_then_is_no_reason():
    detector = AGMConvergenceDetector()
    for i in range(300):
        detector.update(phase(i, nonfinite=int(i % 3 == 0)))
    assert detector.stop is None


def test_divergence_is_told_after_three_records():
    detector = AGMConvergenceDetector()
    told = [detector.update(phase(i, **{"ratio/log_gap_mean": 1.5}))["stop"] for i in range(4)]
    assert told == ["continue_training"] * 2 + ["diverged"] * 2


def run_evals(values, name="plateau", config=None):
    """The detector fed an evaluation every 10 updates; the evaluation it stopped at, or None."""
    detector = AGMConvergenceDetector(config)
    for i, value in enumerate(values):
        detector.update(phase(10 * i, name))
        if detector.update(evaluation(10 * i, value))["stop"] != "continue_training":
            return i, detector.stop
    return None


def test_plateau_robust_to_noise():
    rising = [0.2 + 0.002 * i for i in range(300)]
    for seed in range(5):
        noise = autocorrelated(random.Random(seed), 0.3, 0.03, 300)
        assert run_evals([r + x for r, x in zip(rising, noise)]) is None
        flat = [0.6 + x for x in noise]
        stopped = run_evals(flat)
        assert stopped is not None and stopped[1] == "plateau" and stopped[0] >= 50


def test_flat_evaluations_alone_are_no_plateau():
    assert run_evals([0.6] * 200, name="exploitation") is None
    assert run_evals([0.6] * 200, name="plateau") == (59, "plateau")


def test_a_plateau_waits_for_its_least_steps():
    assert run_evals([0.6] * 200, config=StopConfig(patience=2, min_steps=0)) == (11, "plateau")
    assert run_evals([0.6] * 200, config=StopConfig(patience=2, min_steps=300)) == (30, "plateau")


def test_target_needs_the_interval_not_the_rate():
    detector = AGMConvergenceDetector(StopConfig(target=0.8))
    assert detector.update(evaluation(5, 0.85, trials=32))["stop"] == "continue_training"
    assert detector.update(evaluation(6, 0.9, trials=512))["stop"] == "target_reached"
    without = evaluation(7, 0.9)
    del without["eval/sampled_k"]
    assert AGMConvergenceDetector().update(without).insufficient_data is None
    asked = AGMConvergenceDetector(StopConfig(target=0.8)).update(without)
    assert asked.insufficient_data == "eval/sampled_k"


@pytest.mark.parametrize(
    "still", [{"ratio/log_gap_mean": 0.0, "grad_norm": 0.0}, {"adv/zero_frac": 1.0}]
)
def test_a_run_that_cannot_move_is_a_fault(still):
    detector = AGMConvergenceDetector()
    for i in range(50):
        decision = detector.update(phase(i, **still))
    assert decision["stop"] == "stalled" and decision["fault"] is True


def test_a_zero_gap_alone_is_no_success_and_no_fault():
    detector = AGMConvergenceDetector()
    for i in range(300):
        decision = detector.update(phase(i, **{"ratio/log_gap_mean": 0.0}))
    assert decision["stop"] == "continue_training"


def test_budget():
    detector = AGMConvergenceDetector(StopConfig(max_steps=10))
    told = [detector.update(phase(i))["stop"] for i in range(10)]
    assert told == ["continue_training"] * 9 + ["budget"]
