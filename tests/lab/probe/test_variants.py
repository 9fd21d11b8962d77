"""Which objectives a probe looks at, and what of them a rollout decides."""

import math

import pytest
import torch

from hmpo.config import members
from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.lab.probe import probe_batch
from hmpo.lab.probe.variants import (
    alike,
    exponent_variants,
    member_variants,
    own_variant,
    without_limits,
)
from tests.lab.probe.recorded import recorded


def test_every_member_is_there_and_a_schedule_with_both_ends() -> None:
    found = {v.name: v for v in member_variants(None)}
    assert set(members.BY_NAME) <= set(found)
    for name in ("holder", "holder, end"):
        assert found[name].p == found[name].exponent
    assert found["holder"].p == 2.0 and found["holder, end"].p == -2.0
    assert found["grpo"].p == 1.0 and found["hmpo"].p == -1.0
    assert found["reinforce"].p is None and found["sign_aware"].p is None
    assert found["cispo"].p is None and found["pmpo"].p is None and found["ahm"].p is None


def test_a_reward_adaptive_exponent_sees_the_rewards_that_are_finite() -> None:
    rewards = torch.tensor([0.5, 1.0, math.nan, 0.0], dtype=torch.float64)
    found = next(v for v in member_variants(rewards) if v.name == "apmpo")
    assert found.p == pytest.approx(math.exp(-0.8 * 0.5))
    assert found.objective.clip_high > members.apmpo().clip_high


@pytest.mark.parametrize("rewards", [[1.5, 0.9], [-1.0], [math.nan, math.nan]])
def test_rewards_that_it_is_not_made_for_leave_it_as_it_begins(rewards: list[float]) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    found = next(v for v in member_variants(values) if v.name == "apmpo")
    assert found.objective == members.apmpo()
    probe = probe_batch(recorded(rows=len(rewards), rewards=values))
    assert any("no mean in [0, 1]" in note for note in probe.notes)


def test_exponents_are_sorted_once_each_and_at_least_two() -> None:
    names = [v.name for v in exponent_variants((1.0, -2.0, 1.0), None)]
    assert names == ["p = -2", "p = 1"]
    with pytest.raises(ConfigError, match="at least two"):
        exponent_variants((1.0, 1.0), None)


def test_limits_and_weights_of_responses_are_taken_off_one_by_one() -> None:
    for variant in member_variants(None):
        free = without_limits(variant).objective
        assert free.clip_level == "none" and free.gate == "clip" and free.token_clamp is None
        assert free.reduction == variant.objective.reduction
        equal = alike(variant).objective
        assert equal.reduction == "sequence_mean"
        assert equal.clip_level == variant.objective.clip_level


def test_the_run_s_own_objective_has_no_kl_term_and_says_its_exponent() -> None:
    objective = ObjectiveConfig(p=0.5, kl_coef=0.1)
    assert own_variant(objective, None).objective.kl_coef == 0
    assert own_variant(objective, None).p == 0.5
    assert own_variant(objective, torch.tensor(0.25)).p == 0.25
    assert own_variant(ObjectiveConfig(p_positive=1.0), None).p is None
    matched = ObjectiveConfig(exponent=ExponentConfig(kind="matched"))
    assert own_variant(matched, None).p is None
