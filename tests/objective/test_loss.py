import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.bounds import EXP_LIMIT
from hmpo.objective.exponent import matched_exponent
from hmpo.objective.kl import token_kl
from hmpo.objective.loss import power_mean_loss, power_mean_objective
from hmpo.objective.means import log_power_mean
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators
from tests.objective.cases import (
    BOTH,
    CLIPPING,
    LENGTHS,
    OPEN,
    assert_equals,
    batch,
    loss_and_gradient,
)
from tests.oracles import objective as oracle


@BOTH
def test_family_equals_grpo(dtype):
    assert_equals(oracle.grpo, members.grpo(), dtype, overflow=False)


@BOTH
def test_family_equals_dapo(dtype):
    assert_equals(oracle.dapo, members.dapo(), dtype, overflow=False)


@BOTH
def test_family_equals_drgrpo(dtype):
    def paper(*inputs):
        return oracle.drgrpo(*inputs, 512)

    assert_equals(paper, members.dr_grpo(512), dtype, overflow=False)


@BOTH
def test_family_equals_gspo(dtype):
    assert_equals(oracle.gspo, members.gspo(), dtype, overflow=True)


@BOTH
def test_family_equals_gmpo(dtype):
    assert_equals(oracle.gmpo, members.gmpo(), dtype, overflow=True)


@BOTH
def test_family_equals_hmpo_callsys(dtype):
    assert_equals(oracle.hmpo_callsys, members.hmpo(), dtype, overflow=True)


@BOTH
@pytest.mark.parametrize("p", [-2.0, -1.0, 0.5, 2.0])
def test_family_equals_holder_seq(dtype, p):
    config = ObjectiveConfig(p=p, clip_level="sequence", clip_low=0.1, clip_high=0.1)

    def paper(d, a, low, high):
        return oracle.holder(d, a, p, low, high)

    assert_equals(paper, config, dtype, overflow=p < 0)


@pytest.mark.parametrize("make", CLIPPING)
def test_bounds_bind_on_the_active_side_only(make):
    """A sequence or token on a bound keeps its gradient; beyond it, on the active side, none."""
    config = make()
    low, high = config.log_bounds
    for adv, bound, outward in ((1.0, high, 1), (-1.0, low, -1)):
        advantages = torch.tensor([adv], dtype=torch.float64)
        mask = torch.ones(1, 1, dtype=torch.bool)
        for step, kept in ((0.0, True), (-1e-9 * outward, True), (1e-9 * outward, False)):
            d = torch.tensor([[bound + step]], dtype=torch.float64)
            _, grad = loss_and_gradient(config, d, mask, advantages)
            assert bool(grad.any()) is kept
        other_side = torch.tensor([[-5.0 * outward]], dtype=torch.float64)
        assert loss_and_gradient(config, other_side, mask, advantages)[1].any()


def test_tie_convention_is_that_of_ppo_in_torch():
    """At p = 1 value and gradient equal torch.minimum(r A, clip(r) A), ties included."""
    low, high = -0.4, 0.4
    d = torch.tensor([[low, high, 0.0, 0.5, -0.5, 0.39]], dtype=torch.float64)
    mask = torch.ones_like(d, dtype=torch.bool)
    for adv in (1.0, -1.0):
        advantages = torch.tensor([adv], dtype=torch.float64)
        loss, grad = loss_and_gradient(ObjectiveConfig(p=1.0), d, mask, advantages)
        x = d.clone().requires_grad_()
        clipped = x.clamp(low, high).exp()
        ppo = -torch.minimum(x.exp() * adv, clipped * adv).mean()
        ppo.backward()
        torch.testing.assert_close(loss, ppo.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, x.grad, rtol=1e-14, atol=1e-16)


def test_seq_clip_p1_is_not_grpo():
    token, sequence = (ObjectiveConfig(p=1.0, clip_level=level) for level in ("token", "sequence"))
    d, mask, advantages = batch(*token.log_bounds, overflow=False)
    _, of_token = loss_and_gradient(token, d, mask, advantages)
    _, of_sequence = loss_and_gradient(sequence, d, mask, advantages)
    assert (of_token - of_sequence).abs().max() > 0.01
    quiet = 0.01 * d.clamp(-1, 1)
    same = [loss_and_gradient(config, quiet, mask, advantages) for config in (token, sequence)]
    torch.testing.assert_close(same[0], same[1])


def test_ahm_is_not_gspo():
    """sqrt(A H) of skewed tokens is another number than GSPO's geometric mean."""
    d = torch.tensor([[0.0, 0.0, math.log(8.0)]], dtype=torch.float64)
    mask = torch.ones_like(d, dtype=torch.bool)
    one = torch.ones(1, dtype=torch.float64)
    values = [
        -loss_and_gradient(dataclasses.replace(OPEN, p=p), d, mask, one)[0]
        for p in (1.0, 0.0, -1.0)
    ]
    assert (values[0] * values[2]).sqrt().item() == pytest.approx(2.169305, abs=1e-6)
    assert values[1].item() == pytest.approx(2.0)


def test_all_p_equal_on_policy():
    _, mask, advantages = batch(-0.4, 0.4)
    d = torch.zeros(8, 10, dtype=torch.float64)
    results = []
    for p in (-50.0, -3.0, -1.0, 0.0, 1e-4, 0.5, 1.0, 3.0):
        results.append(loss_and_gradient(ObjectiveConfig(p=p), d, mask, advantages))
    for loss, grad in results:
        assert loss.item() == pytest.approx(-advantages.mean().item(), rel=1e-15)
        plain = -advantages / 8 / mask.sum(1)
        torch.testing.assert_close(grad, plain.unsqueeze(1) * mask, rtol=1e-14, atol=0)


def test_default_eps_by_clip_level():
    """GSPO's band at sequence level, ten to a thousand times wider ones at token level.

    HoelderPO's code has a token's band at sequence level.
    """
    for config in (make() for make in CLIPPING):
        low, high = config.log_bounds
        if config.name == "luspo":
            assert (low, high) == (math.log1p(-2e-3), math.log1p(2.5e-3))
        elif config.name == "holder":
            assert (low, high) == (math.log1p(-0.2), math.log1p(0.2))
        elif config.clip_level == "sequence":
            assert (low, high) == (math.log1p(-3e-4), math.log1p(4e-4))
        else:
            assert -0.4 <= low <= -0.2
            assert 0.18 <= high <= 0.4


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence", "none"])
def test_micro_batches_add_up(reduction, level):
    config = ObjectiveConfig(
        clip_level=level, reduction=reduction, max_length=64, kl_coef=0.1, kl_estimator="k3"
    )
    d, mask, advantages = batch(*ObjectiveConfig().log_bounds)
    mask[6] = False
    ref = torch.randn(8, 10, dtype=torch.float64)
    whole, grad = loss_and_gradient(config, d, mask, advantages, ref_logprobs=ref)
    denominators = count_denominators(mask)
    assert (denominators.sequences, denominators.tokens) == (7, sum(LENGTHS) - 1 - LENGTHS[6])
    for sizes in ([1] * 8, [3, 5], [2, 2, 2, 2], [8]):
        parts = [
            loss_and_gradient(
                config,
                d[rows],
                mask[rows],
                advantages[rows],
                ref_logprobs=ref[rows],
                denominators=denominators,
            )
            for rows in torch.arange(8).split(sizes)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_kl_term_shares_the_reduction(estimator):
    d, mask, advantages = batch(-0.4, 0.4)
    d = d.clamp(-2, 2)
    ref = 0.1 * torch.randn(8, 10, dtype=torch.float64)
    per_token = token_kl(d, ref, estimator) * mask
    lengths = mask.sum(1)
    expected = {
        "sequence_mean": (per_token.sum(1) / lengths).mean(),
        "token_mean": per_token.sum() / lengths.sum(),
        "constant": per_token.sum() / (8 * 64),
    }
    for reduction, kl in expected.items():
        free = ObjectiveConfig(reduction=reduction, max_length=64, kl_estimator=estimator)
        anchored = dataclasses.replace(free, kl_coef=0.5)
        without, _ = loss_and_gradient(free, d, mask, advantages)
        output = power_mean_objective(
            d, torch.zeros_like(d), mask, advantages, anchored, ref_logprobs=ref
        )
        torch.testing.assert_close(output.loss - without, 0.5 * kl, rtol=1e-12, atol=1e-14)
        assert output.metrics["kl_loss"].item() == pytest.approx(0.5 * kl.item())
        assert output.metrics["pg_loss"].item() == pytest.approx(without.item())
        k3 = (token_kl(d, ref, "k3") * mask).sum() / lengths.sum()
        assert output.metrics["kl/ref"].item() == pytest.approx(k3.item())
    with pytest.raises(ConfigError, match="ref_logprobs: got None"):
        power_mean_loss(d, d, mask, advantages, dataclasses.replace(OPEN, kl_coef=0.5))


def test_exponents_by_advantage_sign_and_override():
    d, mask, advantages = batch(-0.4, 0.4)
    split = ObjectiveConfig(p=0.3, p_positive=-0.9, p_negative=1.1)
    loss, grad = loss_and_gradient(split, d, mask, advantages)
    per_row = torch.where(advantages >= 0, advantages.new_tensor(-0.9), advantages.new_tensor(1.1))
    override = loss_and_gradient(ObjectiveConfig(), d, mask, advantages, exponent=per_row)
    assert torch.equal(loss, override[0])
    assert torch.equal(grad, override[1])
    one = torch.tensor(-0.9, dtype=torch.float64, requires_grad=True)
    scalar, _ = loss_and_gradient(ObjectiveConfig(p=5.0), d, mask, advantages, exponent=one)
    fixed, _ = loss_and_gradient(ObjectiveConfig(p=-0.9), d, mask, advantages)
    assert torch.equal(scalar, fixed)
    assert one.grad.abs() > 0


@pytest.mark.parametrize("level", ["token", "sequence", "none"])
def test_gradcheck(level):
    """In the log-probs and in a learnable exponent, away from the kinks."""
    config = ObjectiveConfig(
        clip_level=level, kl_coef=0.2, kl_estimator="k3", clip_low=0.1, clip_high=0.2
    )
    generator = torch.Generator().manual_seed(4)
    d = 0.4 * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 0, 4]).unsqueeze(1)
    ref = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    d.requires_grad_()
    p = torch.tensor(-0.6, dtype=torch.float64, requires_grad=True)

    def loss(x, q):
        zero = torch.zeros_like(x)
        return power_mean_loss(x, zero, mask, advantages, config, ref_logprobs=ref, exponent=q)

    assert gradcheck(loss, (d, p))


@pytest.mark.parametrize("make", CLIPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_ratios_stay_finite_and_are_counted(make, dtype):
    """The linear continuation beyond e^20 keeps pushing a runaway bad response down."""
    config = make()
    d = torch.tensor([[80.0, 80.0], [-80.0, -80.0], [80.0, -80.0]], dtype=dtype)
    mask = torch.ones_like(d, dtype=torch.bool)
    for adv in (1.0, -1.0):
        advantages = torch.full((3,), adv, dtype=dtype)
        loss, grad = loss_and_gradient(config, d, mask, advantages)
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert grad.norm().isfinite()
        if adv < 0:
            assert (grad[0] > 0).all()
            value = math.exp(EXP_LIMIT) * (1 + 80 - EXP_LIMIT)
            alone, _ = loss_and_gradient(config, d[:1], mask[:1], advantages[:1])
            share = {"dr_grpo": 2 / 3000, "luspo": 2.0}.get(config.name, 1.0)
            assert alone.item() == pytest.approx(value * share, rel=1e-5)
    metrics = objective_metrics(d, torch.zeros_like(d), mask, advantages, config)
    matched = config.exponent.kind == "matched"
    p = (
        matched_exponent(d, mask, advantages, config)
        if matched
        else config.exponent_for(positive=False)
    )
    expected = (log_power_mean(d, mask, p) > EXP_LIMIT).sum()
    assert metrics["ratio/clamped"].item() == expected.item() >= 1


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", list(members.BY_NAME.values()))
def test_padding_reaches_neither_value_nor_gradient(make, garbage):
    config = dataclasses.replace(make(), kl_coef=0.1)
    d, mask, advantages = batch(*config.log_bounds)
    mask[2] = False
    inputs = {"logprobs": d - 1, "old_logprobs": torch.full_like(d, -1.0), "ref": d * 0 - 0.9}
    inputs["logprobs"] = inputs["logprobs"].clamp(-3, 1)

    def evaluate(tensors, adv):
        logprobs = tensors["logprobs"].clone().requires_grad_()
        output = power_mean_objective(
            logprobs, tensors["old_logprobs"], mask, adv, config, ref_logprobs=tensors["ref"]
        )
        output.loss.backward()
        return output.loss.detach(), logprobs.grad, output.metrics

    clean = evaluate(inputs, advantages)
    assert clean[0].isfinite()
    dirty = {k: torch.where(mask, v, torch.full_like(v, garbage)) for k, v in inputs.items()}
    bad_row = advantages.clone()
    bad_row[2] = garbage
    for loss, grad, metrics in (evaluate(dirty, advantages), evaluate(inputs, bad_row)):
        assert torch.equal(loss, clean[0])
        assert torch.equal(grad, clean[1])
        assert {k: v.item() for k, v in metrics.items()} == {
            k: v.item() for k, v in clean[2].items()
        }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", list(members.BY_NAME.values()))
def test_non_finite_input_that_counts_is_not_hidden(make, bad):
    """Even where a clip would swallow the infinity, and where the advantage is 0."""
    config = make()
    d, mask, _ = batch(*config.log_bounds)
    for value in (1.0, -1.0, 0.0):
        advantages = torch.full((8,), value, dtype=torch.float64)
        for name in ("new", "old"):
            new, old = d.clone(), torch.zeros_like(d)
            (new if name == "new" else old)[0, 2] = bad
            assert not power_mean_loss(new, old, mask, advantages, config).isfinite()
    advantages[1] = bad
    assert not power_mean_loss(d, torch.zeros_like(d), mask, advantages, config).isfinite()


def test_batch_without_tokens_gives_zero_loss_and_gradient():
    d, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for make in members.BY_NAME.values():
        loss, grad = loss_and_gradient(make(), d, mask, torch.ones(2))
        assert loss.item() == 0.0
        assert not grad.any()
        metrics = objective_metrics(d, d, mask, torch.ones(2), make())
        assert metrics["n_seq"].item() == metrics["n_tokens"].item() == 0
        assert "ratio/logA" not in metrics


def test_advantages_and_behaviour_policy_carry_no_gradient():
    d, mask, advantages = batch(-0.4, 0.4)
    old, advantages = torch.zeros_like(d).requires_grad_(), advantages.requires_grad_()
    logprobs = d.clone().requires_grad_()
    power_mean_loss(logprobs, old, mask, advantages, ObjectiveConfig()).backward()
    assert old.grad is None
    assert advantages.grad is None
    assert logprobs.grad is not None


def test_half_precision_logprobs_are_upcast():
    d, mask, advantages = batch(-0.4, 0.4, dtype=torch.float32, overflow=False)
    d = d.bfloat16()
    loss, grad = loss_and_gradient(members.hmpo(), d, mask, advantages)
    wide, _ = loss_and_gradient(members.hmpo(), d.float(), mask, advantages)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, wide)


def test_validation_survives_optimise_flag():
    code = """
import torch
from hmpo.config import ObjectiveConfig
from hmpo.errors import ShapeError
from hmpo.objective.loss import power_mean_objective
good = dict(
    logprobs=torch.zeros(2, 3), old_logprobs=torch.zeros(2, 3),
    mask=torch.ones(2, 3, dtype=torch.bool), advantages=torch.zeros(2), config=ObjectiveConfig(),
)
power_mean_objective(**good)
wrong = {
    "logprobs: got (2, 0), expected (N, T)": {"logprobs": torch.zeros(2, 0)},
    "logprobs: got torch.int64": {"logprobs": torch.zeros(2, 3, dtype=torch.long)},
    "old_logprobs: got torch.float32 (2, 4), expected float (2, 3)":
        {"old_logprobs": torch.zeros(2, 4)},
    "mask: got torch.int64 (2, 3), expected bool (2, 3)": {"mask": torch.ones(2, 3).long()},
    "advantages: got torch.float32 (2, 2), expected float (2,) or (2, 3)":
        {"advantages": torch.zeros(2, 2)},
    "ref_logprobs: got torch.float32 (3, 2)": {"ref_logprobs": torch.zeros(3, 2)},
    "exponent: got torch.float32 (3,), expected float () or (2,)": {"exponent": torch.zeros(3)},
}
for message, change in wrong.items():
    try:
        power_mean_objective(**(good | change))
    except ShapeError as error:
        if message not in str(error):
            raise SystemExit(f"{error!r} lacks {message!r}")
    else:
        raise SystemExit(f"accepted: {message}")
"""
    subprocess.run([sys.executable, "-O", "-c", code], check=True, timeout=120)
