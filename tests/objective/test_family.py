"""Every further member equals its own source's loops, in loss and gradient."""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.config import ExponentConfig, ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.exponent import LinearExponent, RewardExponent, matched_exponent
from hmpo.objective.metrics import objective_metrics
from tests.objective.cases import BOTH, assert_equals, batch, loss_and_gradient, rows_of
from tests.oracles import family as oracle
from tests.oracles import objective as basic


@BOTH
def test_gspo_equals_its_token_form(dtype):
    """The two differ only for advantages that vary within a response, which there are none of."""
    assert_equals(oracle.gspo_token, members.gspo(), dtype, overflow=True)


@BOTH
def test_family_equals_luspo(dtype):
    assert_equals(oracle.luspo, members.luspo(), dtype, overflow=True)


@BOTH
def test_family_equals_sapo(dtype):
    def paper(d, a, low, high):
        return oracle.sapo(d, a, 1.0, 1.05)

    assert_equals(paper, members.sapo(), dtype, overflow=True)


@BOTH
@pytest.mark.parametrize(
    ("config", "paper"),
    [
        (members.cispo(), lambda d, a, new: oracle.cispo(d, a, new, -math.inf, math.log(5))),
        (
            dataclasses.replace(members.cispo(), clip_low=0.2, clip_high=0.28),
            lambda d, a, new: oracle.cispo(d, a, new, math.log(0.8), math.log(1.28)),
        ),
        (members.tis(), lambda d, a, new: oracle.truncated(d, a, new, 2.0)),
    ],
    ids=["cispo", "cispo_two_sided", "tis"],
)
def test_detached_weights_equal_cispo_and_tis(dtype, config, paper):
    """The log-probs are those of the policy: not d, but d + log pi_old."""
    d, mask, advantages = batch(math.log(0.8), math.log(1.28), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    old = -3 * torch.rand(8, 10, generator=generator, dtype=torch.float64).to(dtype)
    new = (d + old).requires_grad_()
    from hmpo.objective.loss import power_mean_loss

    loss = power_mean_loss(new, old, mask, advantages, config)
    loss.backward()
    rounded = new.detach() - old
    values = rows_of(rounded, mask), advantages.double().tolist(), rows_of(new.detach(), mask)
    expected, slopes = paper(*values)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for row, keep, slope in zip(new.grad, mask, slopes, strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=tolerance, abs=1e-14)


@BOTH
@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.1, 0.05, 0.0, 0.0]])
def test_family_equals_apmpo(dtype, rewards):
    source = RewardExponent(members.apmpo())
    source.observe(torch.tensor(rewards, dtype=torch.float64))
    p, low, high = oracle.apmpo_rule(rewards, 0.8, 0.2, 0.2)
    assert source.value(0) == pytest.approx(p, rel=1e-14)
    assert source.objective.log_bounds == pytest.approx((math.log(low), math.log(high)), rel=1e-14)

    def paper(d, a, lower, upper):
        return oracle.apmpo(d, a, source.value(0), lower, upper)

    config = dataclasses.replace(source.objective, exponent=ExponentConfig(), p=source.value(0))
    assert_equals(paper, config, dtype, overflow=False)


def test_apmpo_limits_of_equal_rewards_and_refusals():
    source = RewardExponent(members.apmpo())
    assert source.value(0) is None
    for rewards, p, high in (([0.0, 0.0], 1.0, 0.2), ([0.5, 0.5], math.exp(-0.4), 0.4)):
        source.observe(torch.tensor(rewards))
        assert source.value(0) == pytest.approx(p)
        assert source.objective.clip_high == pytest.approx(high)
    source.observe(torch.tensor([]))
    assert source.value(0) == pytest.approx(math.exp(-0.4))
    with pytest.raises(
        ConfigError, match=r"mean reward of -1, expected rewards scaled to \[0, 1\]"
    ):
        source.observe(torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize("saturation", [1.0, 0.6])
def test_family_equals_pmpo_reconstruction(saturation):
    """The root is found to rounding; the loss hardly depends on what is left of its error."""
    source = ExponentConfig(kind="matched", saturation=saturation)
    config = dataclasses.replace(members.pmpo(), exponent=source)
    low, high = config.log_bounds
    d, mask, advantages = batch(low, high, overflow=False)
    p = matched_exponent(d, mask, advantages, config)
    rows = rows_of(d, mask)
    for i, row in enumerate(rows):
        expected, _ = oracle.pmpo_exponent(row, advantages[i].item(), low, high, saturation)
        clipped = [min(v, high) if advantages[i] >= 0 else max(v, low) for v in row]
        if len(set(clipped)) > 1:
            assert p[i].item() == pytest.approx(expected, rel=1e-11)

    loss, grad = loss_and_gradient(config, d, mask, advantages)
    given = loss_and_gradient(members.grpo(), d, mask, advantages, exponent=p)
    torch.testing.assert_close((loss, grad), given, rtol=1e-14, atol=1e-16)
    value, slopes = oracle.pmpo(rows, advantages.tolist(), low, high, saturation)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    for row, keep, slope in zip(grad, mask, slopes, strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("matching", ["ess", "closed_form"])
def test_pmpo_endpoints(matching):
    """No clipped token: GRPO. All clipped, or f >= saturation: GMPO's mean. Monotone between."""
    source = ExponentConfig(kind="matched", matching=matching, saturation=0.75)
    config = dataclasses.replace(members.pmpo(), exponent=source)
    generator = torch.Generator().manual_seed(3)
    inside = 0.05 * torch.randn(1, 8, generator=generator, dtype=torch.float64)
    rows = [inside.clone() for _ in range(9)]
    for count, row in enumerate(rows):
        row[0, :count] = 0.5
    d = torch.cat(rows)
    mask, advantages = torch.ones_like(d, dtype=torch.bool), torch.ones(9, dtype=torch.float64)
    p = matched_exponent(d, mask, advantages, config)
    assert p[0] == 1.0 and not p[6:].any(), "exactly the endpoints"
    assert (p.diff() <= 0).all() and ((p[1:6] > 0) & (p[1:6] < 1)).all()
    for ends, other in ((slice(0, 1), 1.0), (slice(6, 9), 0.0)):
        part = d[ends], mask[ends], advantages[ends]
        one = loss_and_gradient(config, *part)
        two = loss_and_gradient(dataclasses.replace(members.grpo(), p=other), *part)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_pmpo_closed_form_is_close_to_the_solution():
    """p = sqrt(1 - f) within 0.06 of the solved exponent for sigma <= 0.3: a cheap ablation."""
    generator = torch.Generator().manual_seed(4)
    largest = 0.0
    for sigma in (0.05, 0.1, 0.3):
        d = sigma * torch.randn(64, 256, generator=generator, dtype=torch.float64)
        mask, advantages = torch.ones_like(d, dtype=torch.bool), torch.ones(64).double()
        config = dataclasses.replace(members.pmpo(), clip_space="log", clip_high=sigma)
        closed = dataclasses.replace(config.exponent, matching="closed_form")
        p = matched_exponent(d, mask, advantages, config)
        other = matched_exponent(d, mask, advantages, dataclasses.replace(config, exponent=closed))
        largest = max(largest, (p - other).abs().max().item())
    assert 0 < largest < 0.06


def test_matched_exponent_ignores_the_scale_of_the_ratios():
    """Multiplying all ratios, and the bounds with them, leaves p where it was."""
    generator = torch.Generator().manual_seed(6)
    d = 0.3 * torch.randn(16, 32, generator=generator, dtype=torch.float64)
    mask, advantages = torch.ones_like(d, dtype=torch.bool), torch.ones(16).double()
    config = dataclasses.replace(members.pmpo(), clip_space="log", clip_high=0.2)
    moved = dataclasses.replace(config, clip_high=0.5)
    torch.testing.assert_close(
        matched_exponent(d + 0.3, mask, advantages, moved),
        matched_exponent(d, mask, advantages, config),
        rtol=1e-9,
        atol=0,
    )


@BOTH
@pytest.mark.parametrize("weight", [0.5, 0.2, 1.0])
def test_family_equals_ahm(dtype, weight):
    config = dataclasses.replace(members.ahm(), ahm_weight=weight)

    def paper(d, a, low, high):
        return oracle.ahm(d, a, low, high, weight)

    assert_equals(paper, config, dtype, overflow=False)
    if weight == 1.0:
        assert_equals(basic.grpo, config, dtype, overflow=False)


def test_ahm_member_is_neither_gspo_nor_gmpo():
    d = torch.tensor([[0.0, 0.0, math.log(8.0)]], dtype=torch.float64)
    mask, one = torch.ones_like(d, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    config = ObjectiveConfig(mean="ahm", clip_level="none")
    assert -loss_and_gradient(config, d, mask, one)[0].item() == pytest.approx(2.169305, abs=1e-6)


def test_holder_schedule_goes_from_two_to_minus_two():
    config = members.holder()
    schedule = LinearExponent(config, 5, 1)
    assert [schedule.value(u) for u in range(7)] == [2.0, 1.0, 0.0, -1.0, -2.0, -2.0, -2.0]
    with pytest.raises(ConfigError, match="updates: got None"):
        LinearExponent(config, None)
    d, mask, advantages = batch(*config.log_bounds, overflow=False)
    for p in (2.0, -1.0):
        given = torch.tensor(p, dtype=torch.float64)
        one = loss_and_gradient(config, d, mask, advantages, exponent=given)
        low, high = config.log_bounds
        loss, _ = basic.holder(rows_of(d, mask), advantages.tolist(), p, low, high)
        assert one[0].item() == pytest.approx(loss, rel=1e-12)


def test_sapo_slope_is_that_of_the_ratio_on_policy_and_fades_away():
    mask, one = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    on_policy = torch.zeros(1, 3, dtype=torch.float64)
    _, grad = loss_and_gradient(members.sapo(), on_policy, mask, one)
    assert grad.tolist()[0] == pytest.approx([-1 / 3] * 3)
    far = torch.tensor([[3.0, 5.0, 80.0]], dtype=torch.float64)
    _, grad = loss_and_gradient(members.sapo(), far, mask, one)
    assert grad.abs().max() < 1e-5
    metrics = objective_metrics(far, torch.zeros_like(far), mask, one, members.sapo())
    assert metrics["clip/frac"].item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "learnable", "criterion": "surrogate"}, "allow_surrogate = true takes it"),
        ({"target": 1.0}, "target: got 1.0"),
        ({"bound": 0.0}, "bound: got 0.0"),
        ({"saturation": 0.0}, "saturation: got 0.0"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"updates": 1}, "updates: got 1"),
    ],
)
def test_exponent_settings_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        ExponentConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("linear", {"p_positive": 1.0}, "p_positive: got 1.0, expected None"),
        ("linear", {"mean": "ahm"}, "exponent.kind: got 'linear', expected \"fixed\""),
        ("matched", {"clip_level": "sequence"}, "exponent.kind: got 'matched'"),
        ("learnable", {"p": 5.0}, r"p: got 5.0, expected \|p\| < exponent.bound = 4.0"),
        ("learnable", {"p": 0.0}, "p: got 0.0, expected p != 0"),
    ],
)
def test_exponent_sources_without_effect_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(exponent=ExponentConfig(kind=kind), **options)
