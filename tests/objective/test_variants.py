"""HoelderPO in three forms, REINFORCE, the sign-aware mean: loops, limits, what they equal."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmpo import members
from hmpo.config import ExponentConfig, ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.bounds import limit_tokens
from hmpo.objective.calibration import clip_scale
from hmpo.objective.exponent import exponent_source
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators, minibatch_band
from tests.objective.cases import BOTH, assert_equals, batch, loss_and_gradient, rows_of
from tests.oracles import objective as oracle

EXPONENTS = pytest.mark.parametrize("p", [-2.0, -1.0, 0.5, 2.0])
CLAMP = math.log1p(0.2)


def fixed(make, p: float) -> ObjectiveConfig:
    """A member of the schedule at one exponent."""
    return dataclasses.replace(make(), p=p, exponent=ExponentConfig())


@BOTH
@EXPONENTS
def test_holder_equals_the_loops_of_its_code(dtype, p):
    def code(d, a, low, high):
        return oracle.holder(d, a, p, low, high)

    assert_equals(code, fixed(members.holder, p), dtype, overflow=p < 0)


@BOTH
@EXPONENTS
def test_holder_token_equals_the_loops_of_its_code(dtype, p):
    def code(d, a, low, high):
        return oracle.holder_token(d, a, p, low, high)

    assert_equals(code, fixed(members.holder_token, p), dtype, overflow=False)


@BOTH
@EXPONENTS
@pytest.mark.parametrize("outer", [0.2, 0.02])
def test_holder_clamped_equals_the_loops_of_its_code(dtype, p, outer):
    """Also with an outer clip so narrow that it acts."""
    config = fixed(members.holder_clamped, p)
    config = dataclasses.replace(config, clip_low=outer, clip_high=outer)
    clamp = torch.tensor(CLAMP, dtype=dtype).item()

    def code(d, a, low, high):
        return oracle.holder_clamped(d, a, p, clamp, low, high)

    assert_equals(code, config, dtype, overflow=True)


def test_a_clamp_gives_the_gradient_of_torch_clamp_and_its_ends_keep_theirs():
    values = [CLAMP, -CLAMP, CLAMP + 1e-9, -CLAMP - 1e-9, 0.1, 80.0, -80.0]
    config = ObjectiveConfig(p=-1.0, clip_level="none", token_clamp=CLAMP)
    for adv in (1.0, -1.0):
        d = torch.tensor([values], dtype=torch.float64)
        mask = torch.ones_like(d, dtype=torch.bool)
        loss, grad = loss_and_gradient(config, d, mask, torch.tensor([adv]).double())
        x = d.clone().requires_grad_()
        torch_loss = -adv / x.clamp(-CLAMP, CLAMP).neg().exp().mean()
        torch_loss.backward()
        torch.testing.assert_close(loss, torch_loss.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, x.grad, rtol=1e-14, atol=1e-17)
        assert (grad != 0).tolist()[0] == [True, True, False, False, True, False, False]


def test_a_wide_clamp_changes_no_bit_and_a_clamped_mean_stays_within_the_outer_band():
    d, mask, advantages = batch(-0.2, 0.2)
    for clip in ({}, {"clip_center": "drift", "clip_space": "log"}):
        plain = dataclasses.replace(fixed(members.holder, 0.5), **clip)
        wide = dataclasses.replace(plain, token_clamp=100.0)
        one, two = (loss_and_gradient(c, d, mask, advantages) for c in (plain, wide))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    clamped = fixed(members.holder_clamped, 2.0)
    free = dataclasses.replace(clamped, clip_level="none")
    one, two = (loss_and_gradient(c, d, mask, advantages) for c in (clamped, free))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("changes", [{}, {"clip_center": "drift"}, {"clip_width": "z"}])
def test_micro_batches_of_a_clamped_objective_add_up_to_the_whole(changes):
    config = dataclasses.replace(
        fixed(members.holder_clamped, 2.0), clip_space="log", clip_low=0.03, clip_high=0.03,
        **changes,
    )  # fmt: skip
    d, mask, advantages = batch(-0.2, 0.2)
    zero = torch.zeros_like(d)
    loss, grad = loss_and_gradient(config, d, mask, advantages)
    band = minibatch_band(d, zero, mask, advantages, config) if config.needs_band else None
    x = d.clone().requires_grad_()
    counts = count_denominators(mask)
    parts = [
        power_mean_loss(
            x[s], zero[s], mask[s], advantages[s], config, denominators=counts, band=band
        )
        for s in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    total = torch.stack(parts).sum()
    total.backward()
    torch.testing.assert_close(total.detach(), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(x.grad, grad, rtol=1e-13, atol=1e-17)


def test_metrics_of_a_clamp_count_its_tokens_and_clip_what_the_loss_clips():
    config = dataclasses.replace(fixed(members.holder_clamped, 1.0), clip_low=0.06, clip_high=0.06)
    d = torch.tensor([[3.0, -0.1], [0.01, 0.02]], dtype=torch.float64)
    mask, advantages = torch.ones_like(d, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    inputs = d, torch.zeros_like(d), mask, advantages
    found = objective_metrics(*inputs, config)
    assert found["clip/token_frac"].item() == 0.25
    assert found["clip/frac"].item() == 0.0, "its mean is 1.052, of the free ratios 10.5"
    free = dataclasses.replace(config, token_clamp=None)
    found = objective_metrics(*inputs, free)
    assert "clip/token_frac" not in found and found["clip/frac"].item() == 0.5


def test_calibration_measures_the_mean_of_clamped_tokens():
    config = dataclasses.replace(fixed(members.holder_clamped, 1.0), clip_share=0.5)
    d, mask, advantages = batch(-0.2, 0.2, overflow=False)
    scale = clip_scale(d, mask, advantages, 1.0, config, 0.5)
    held = limit_tokens(d, mask, advantages, config)
    plain = dataclasses.replace(config, token_clamp=None)
    assert scale == clip_scale(held, mask, advantages, 1.0, plain, 0.5)
    assert scale != clip_scale(d, mask, advantages, 1.0, plain, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_clamp": 0.0}, "token_clamp: got 0.0"),
        ({"token_clamp": 0.1}, "token_clamp: got 0.1, expected None but with gate"),
        ({"token_clamp": 0.1, "gate": "detached"}, "token_clamp: got 0.1"),
        ({"gate": "unweighted"}, "clip_level: got 'token', expected \"none\" with gate"),
        (
            {"gate": "unweighted", "clip_level": "none", "dual_clip": 3.0},
            "dual_clip: got 3.0, expected None",
        ),
        (
            {
                "gate": "unweighted",
                "clip_level": "none",
                "exponent": ExponentConfig(kind="linear"),
            },
            "exponent.kind: got 'linear'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**changes)


# --- the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [members.holder, members.holder_clamped, members.holder_token])
def test_the_exponent_of_holder_is_fixed_within_a_rollout_and_ends_at_its_end(make):
    source = exponent_source(make(), torch.device("cpu"), 20, 4)
    found = [source.value(update) for update in range(24)]
    expected = [2.0] * 4 + [1.0] * 4 + [0.0] * 4 + [-1.0] * 4 + [-2.0] * 8
    assert found == expected


def test_a_last_rollout_that_is_cut_short_has_the_end_and_per_update_moves_with_each():
    by_rollout = exponent_source(members.holder(), torch.device("cpu"), 9, 4)
    assert [by_rollout.value(u) for u in range(9)] == [2.0] * 4 + [0.0] * 4 + [-2.0]
    old = dataclasses.replace(members.holder(), exponent=ExponentConfig(kind="linear"))
    by_update = exponent_source(old, torch.device("cpu"), 5, 4)
    assert [by_update.value(u) for u in range(5)] == [2.0, 1.0, 0.0, -1.0, -2.0]


def test_a_schedule_by_rollouts_needs_two_of_them():
    with pytest.raises(ConfigError, match=r"exponent.updates: got 4 with 4 updates per rollout"):
        exponent_source(members.holder(), torch.device("cpu"), 4, 4)


# --- REINFORCE and the sign-aware mean ---------------------------------------------------------


@BOTH
def test_reinforce_equals_its_loops_whatever_the_ratios(dtype):
    d, mask, advantages = batch(-0.2, 0.2, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    old = -3 * torch.rand(8, 10, generator=generator, dtype=torch.float64).to(dtype)
    new = (d + old).requires_grad_()
    loss = power_mean_loss(new, old, mask, advantages, members.reinforce())
    loss.backward()
    expected, slopes = oracle.reinforce(rows_of(new.detach(), mask), advantages.double().tolist())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for row, keep, slope in zip(new.grad, mask, slopes, strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=tolerance, abs=1e-14)
        assert not row[~keep].any()


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_on_policy_the_gradient_of_reinforce_is_that_of_grpo(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    logprobs = -3 * torch.rand(len(lengths), 6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    found = []
    for config in (members.reinforce(), members.grpo()):
        x = logprobs.clone().requires_grad_()
        power_mean_loss(x, logprobs, mask, advantages, config).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-14, atol=1e-17)


def test_off_policy_reinforce_weighs_by_one_and_still_measures_the_ratios():
    d = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    mask, one = torch.ones_like(d, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    _, grad = loss_and_gradient(members.reinforce(), d, mask, one)
    _, weighted = loss_and_gradient(
        dataclasses.replace(members.cispo(), clip_level="none"), d, mask, one
    )
    assert grad.tolist()[0] == pytest.approx([-1 / 3] * 3, rel=1e-15)
    torch.testing.assert_close(weighted, grad * d.exp(), rtol=1e-14, atol=0)
    found = objective_metrics(d, torch.zeros_like(d), mask, one, members.reinforce())
    assert found["ratio/d_min"].item() == -1.0 and found["ratio/d_max"].item() == 0.5
    assert found["clip/frac"].item() == 0.0
    assert found["pg_loss"].item() == pytest.approx(0.5 / 3)


@BOTH
def test_sign_aware_equals_its_loops(dtype):
    assert_equals(oracle.sign_aware, members.sign_aware(), dtype, overflow=False)
