from dataclasses import replace

import pytest

from hmpo.lab.study.plan import Plan
from hmpo.lab.study.scores import bits, pass_rate, score, time_to
from tests.lab.study.suites import make_outcome

PLAN = Plan(name="s")
LEFT_OUT = Plan(name="s", protocol={"crash": "left_out"})


def outcome(rates, steps=(0, 10, 20, 30, 40), **changes):
    evals = {"step": list(steps), "tokens": [100 * s for s in steps], "sampled": list(rates)}
    return replace(make_outcome("c", 1, 0.5), evals=evals, **changes)


def test_the_endpoint_is_the_mean_of_the_last_three_evaluations_with_the_final_one() -> None:
    assert score(outcome([0.1, 0.2, 0.3, 0.4, 0.8]), PLAN).success == pytest.approx(0.5)


def test_the_evaluation_before_training_is_no_part_of_the_endpoint() -> None:
    found = score(outcome([0.9, 0.2, 0.4], steps=(0, 10, 20)), PLAN)
    assert found.success == pytest.approx(0.3) and found.start == 0.9
    assert score(outcome([0.9], steps=(0,)), PLAN).success is None


def test_evaluations_that_were_not_measured_are_passed_over() -> None:
    assert score(outcome([0.1, 0.2, None, 0.4, 0.6]), PLAN).success == pytest.approx(0.4)


def test_a_crash_scores_nothing_unless_the_protocol_leaves_it_out() -> None:
    crashed = outcome([0.1, 0.2, 0.3, 0.4, 0.8], status="failed")
    assert (score(crashed, PLAN).success, score(crashed, PLAN).auc) == (0.0, 0.0)
    assert score(crashed, LEFT_OUT).success is None and score(crashed, LEFT_OUT).failed


def test_the_area_is_the_mean_height_of_the_straight_lines_between_evaluations() -> None:
    assert score(outcome([0.0, 1.0, 1.0], steps=(0, 10, 40)), PLAN).auc == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("rates", "gap", "expected"),
    [
        ([0.2, 0.6, 0.6, 0.6, 0.29], 0.1, True),
        ([0.2, 0.6, 0.6, 0.6, 0.31], 0.1, False),
        ([0.2, 0.6, 0.6, 0.6, 0.6], 1.2, True),
        ([0.2, 0.6, 0.6, 0.6, 0.6], None, False),
    ],
)
def test_a_run_diverged_when_its_gap_or_the_loss_of_its_best_says_so(rates, gap, expected) -> None:
    assert score(outcome(rates, metrics={"g_max": gap}), PLAN).diverged is expected


@pytest.mark.parametrize(
    ("rates", "changes", "expected"),
    [
        ([0.2, 0.6, 0.6, 0.6, 0.6], {}, False),
        ([0.2, 0.6, 0.6, 0.6, 0.29], {}, True),  # below half of its best
        ([0.3, 0.25, 0.25, 0.25, 0.26], {}, False),  # below its start, as chance has it
        ([0.3, 0.25, 0.25, 0.25, 0.16], {}, True),  # below its start by more than that
        ([0.2, 0.6, 0.6, 0.6, 0.6], {"status": "failed"}, True),
        ([0.2, 0.6, 0.6, 0.6, 0.6], {"metrics": {"g_max": 2.0}}, False),  # diverged, yet learned
        ([0.3, 0.25, 0.25, 0.25, 0.16], {"before": {}}, False),  # of how many nobody said
    ],
)
def test_a_run_collapsed_when_it_failed_or_lost_what_it_had(rates, changes, expected) -> None:
    sizes = {"before": {"n": 256}, "after": {"n": 256}}
    assert score(outcome(rates, **{**sizes, **changes}), PLAN).collapsed is expected


def test_time_to_target_is_that_of_the_first_evaluation_above_it_or_censored() -> None:
    run = outcome([0.9, 0.2, 0.5, 0.4, 0.8])
    assert time_to(run, 0.5) == (20, True)
    assert time_to(run, 0.5, "tokens") == (2000, True)
    assert time_to(run, 0.85) == (40, False)


def test_pass_at_k_needs_all_of_its_counts() -> None:
    assert pass_rate({"pass_at": 5, "pass_n": 8, "k": 4}) == (5, 8, 4)
    assert pass_rate({"pass_at": 9, "pass_n": 8, "k": 4}) is None
    assert pass_rate({"pass_at": 5}) is None


def test_bits_are_read_from_the_most_significant_digit_and_without_padding() -> None:
    kept = ["", "80", "c0", "e0", "a0"]  # 5 prompts in two digits
    run = outcome([0.1] * 5, passed=kept, after={"n": 5})
    assert bits(run, 2) == [1.0, 0.5, 1.0, 0.0, 0.0]
    assert bits(run, 1) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert bits(replace(run, passed=[]), 2) is None
    assert bits(replace(run, after={"n": 9}), 2) is None
