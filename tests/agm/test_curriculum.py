"""Levels: intervals decide, evidence is spent once, what was applied is read from the records."""

import random

import pytest

from hmpo.agm import AGMCurriculumController, CurriculumConfig
from hmpo.errors import ConfigError
from tests.agm.streams import step

CONFIG = CurriculumConfig(levels=4)


def ask(controller, number, successes, trials=32, level=1, regime="normal_learning"):
    fields = {"success/k": successes, "success/n": trials, "curriculum/level": level}
    return controller.update(step(number, **fields, **{"decision/regime": regime}))


def run(rate_of, n=200, config=CONFIG, apply=True, regime="normal_learning"):
    controller, level, told = AGMCurriculumController(config), 1, []
    for i in range(n):
        decision = ask(controller, i, round(32 * rate_of(level, i)), level=level, regime=regime)
        told.append(decision)
        if apply:
            level = decision["level"]
    return told


def test_curriculum_one_promotion_per_evidence():
    told = run(lambda level, i: 1.0)
    at = [i for i, decision in enumerate(told) if decision["curriculum"] == "promote"]
    assert at == [19, 39, 59]  # a dwell apart, and the top level stays
    assert told[-1].reason == "top_level_mastered" and told[-1]["level"] == 4


def test_unapplied_promotion_is_repeated_and_goes_no_further():
    told = run(lambda level, i: 1.0, apply=False)
    assert {decision["level"] for decision in told} == {1, 2}


@pytest.mark.parametrize(("trials", "needed"), [(32, 31), (128, 112)])
def test_promotion_needs_a_sample(trials, needed):
    config = CurriculumConfig(levels=4, dwell=0, confirm=1, min_trials=trials)
    for successes, wanted in ((needed - 1, "hold"), (needed, "promote")):
        decision = ask(AGMCurriculumController(config), 0, successes, trials)
        assert decision["curriculum"] == wanted


def test_few_trials_decide_nothing():
    controller = AGMCurriculumController(CurriculumConfig(levels=2, dwell=0, confirm=1))
    assert ask(controller, 0, 32).reason == "few_trials"
    assert ask(controller, 1, 32)["curriculum"] == "promote"


def test_demotion_is_reachable():
    told = run(lambda level, i: 1.0 if level == 1 else 0.1, n=45)
    assert [d["curriculum"] for d in told if d["curriculum"] != "hold"] == ["promote", "demote"]


def test_mastery_while_unstable_is_consolidated():
    assert run(lambda level, i: 1.0, n=40, regime="unstable")[-1]["curriculum"] == "consolidate"


def test_struggling_at_a_level_that_is_too_hard_goes_back():
    controller = AGMCurriculumController(CONFIG)
    for i in range(30):
        decision = ask(controller, i, 19, level=2, regime="struggling")
    assert decision["curriculum"] == "demote" and decision["level"] == 1


def test_old_trials_of_a_weaker_policy_are_dropped():
    told = run(lambda level, i: 0.1 if i < 500 else 1.0, n=520)
    assert told[499]["level"] == 1 and told[-1]["level"] == 2


def test_a_rollout_counts_once():
    controller = AGMCurriculumController(CONFIG)
    for i in range(8):
        ask_again = step(
            i,
            rollout=0,
            staleness=i,
            **{"curriculum/level": 1, "decision/regime": "normal_learning"},
        )
        controller.update(ask_again)
    assert controller.totals[0] == [32, 64]


def test_rate_between_the_bounds_neither_promotes_nor_demotes():
    rng = random.Random(0)
    told = run(lambda level, i: sum(rng.random() < 0.6 for _ in range(32)) / 32, n=500)
    assert {d["curriculum"] for d in told} == {"hold"}


def test_mix_keeps_some_of_the_level_below():
    controller = AGMCurriculumController(CONFIG)
    assert controller.mix(1) == {1: 1.0}
    assert controller.mix(3) == {2: 0.2, 3: 0.8}


def test_bounds_must_leave_room():
    with pytest.raises(ConfigError, match=r"demote: got 0\.7, expected at least 0\.2 below"):
        CurriculumConfig(promote=0.8, demote=0.7)


def test_an_unknown_level_is_told():
    assert ask(AGMCurriculumController(CONFIG), 0, 32, level=9).reason == "unknown_level"
