import math
import subprocess
import sys

import pytest
import torch

from hmpo.errors import ConfigError, NonFiniteError, ShapeError
from hmpo.objective.advantages import group_advantages, zero_variance_groups
from tests.oracles import objective as oracle


def test_values_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    population = group_advantages(rewards, 3, std_ddof=0)
    third = math.sqrt(2) / 3
    expected = [2 / 3 / third, -1 / 3 / third, -1 / 3 / third]
    assert population[:3].tolist() == pytest.approx(expected)
    assert group_advantages(rewards, 3)[3:].tolist() == [-1.0, 0.0, 1.0]
    assert group_advantages(rewards, 3, scale="none")[3:].tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_shared_advantage_function(scale, ddof):
    """One function for every trainer: both deviations, equal to the loops."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    expected = oracle.group_advantages(rewards.tolist(), 6, scale, ddof)
    ours = group_advantages(rewards, 6, scale=scale, std_ddof=ddof)
    assert ours.tolist() == pytest.approx(expected, rel=1e-13)
    single = group_advantages(rewards.float(), 6, scale=scale, std_ddof=ddof)
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for size in (0, 1, -2):
        with pytest.raises(ConfigError, match=f"group_size: got {size}"):
            group_advantages(rewards, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_reward_group_zero_advantage(dtype):
    for size in (2, 3, 6, 7):
        constants = torch.arange(1, 400, dtype=dtype) / 100
        rewards = constants.repeat_interleave(size)
        for scale in ("std", "none"):
            advantages = group_advantages(rewards, size, scale=scale)
            assert torch.equal(advantages, torch.zeros_like(rewards))
        assert zero_variance_groups(rewards, size).all()


def test_rounding_noise_is_no_signal_but_a_small_difference_is():
    noise = torch.tensor([0.1 + 0.2, 0.3, 1e6, 1e6 + 0.5, 1.0, 1.001], dtype=torch.float64)
    assert zero_variance_groups(noise, 2).tolist() == [True, True, False]
    assert group_advantages(noise, 2)[:4].tolist() == [0.0] * 4
    assert group_advantages(noise, 2, tol=0.0)[2:4].abs().min() > 0


def test_invalid_rewards_are_left_out():
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 3.0, nan, 2.0, nan, nan, nan, math.inf, 5.0, 5.0, 5.0])
    valid = rewards.isfinite()
    ours = group_advantages(rewards, 3, valid=valid)
    half = math.sqrt(0.5)
    assert ours.tolist() == pytest.approx([-half, 0, half] + [0.0] * 9)
    assert zero_variance_groups(rewards, 3, valid=valid).tolist() == [False, True, True, True]
    finite_but_invalid = torch.tensor([1.0, 1e30, 3.0])
    chosen = torch.tensor([True, False, True])
    assert group_advantages(finite_but_invalid, 3, valid=chosen).tolist() == ours[:3].tolist()


def test_non_finite_valid_reward_is_an_error_with_its_row():
    with pytest.raises(NonFiniteError, match=r"rows \[1, 3\]"):
        group_advantages(torch.tensor([0.0, math.nan, 1.0, math.inf]), 2)


def test_wrong_settings():
    rewards = torch.zeros(4)
    with pytest.raises(ShapeError, match=r"got torch.float32 \(4,\), expected .* group_size = 3"):
        group_advantages(rewards, 3)
    with pytest.raises(ConfigError, match="tol"):
        group_advantages(rewards, 2, tol=-1.0)


def test_half_precision_rewards():
    ours = group_advantages(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), 2)
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


def test_validation_survives_optimise_flag():
    code = """
import torch
from hmpo.objective.advantages import group_advantages
from hmpo.errors import ConfigError, ShapeError
wrong = [
    (torch.zeros(2, 2), {}, ShapeError, "got torch.float32 (2, 2)"),
    (torch.zeros(4, dtype=torch.long), {}, ShapeError, "got torch.int64 (4,)"),
    (torch.zeros(4), {"valid": torch.ones(3, dtype=torch.bool)}, ShapeError, "expected bool (4,)"),
    (torch.zeros(4), {"scale": "var"}, ConfigError, "scale: got 'var'"),
    (torch.zeros(4), {"std_ddof": 2}, ConfigError, "std_ddof: got 2"),
]
for rewards, options, kind, message in wrong:
    try:
        group_advantages(rewards, 2, **options)
    except kind as error:
        if message not in str(error):
            raise SystemExit(f"{error!r} lacks {message!r}")
    else:
        raise SystemExit(f"accepted: {message}")
"""
    subprocess.run([sys.executable, "-O", "-c", code], check=True, timeout=120)
