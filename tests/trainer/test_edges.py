"""The edge table: inputs at which peers turn non-finite, for every member, in value and gradient.

Padding, rows without tokens and log ratios of +-80 give finite numbers. A non-finite log-prob at
a token that counts is told, with its place, and never repaired: the loss is NaN, the trainer
names sequence and token, skips the update and counts it.
"""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from tests.objective.cases import batch
from tests.support import tiny_llama
from tests.trainer.test_trainer import PROMPTS, settings, trainer_for, weights

SEQUENCE = dataclasses.replace(members.gspo(), clip_space="log", clip_low=2.0, clip_high=2.0)
CONFIGS = {name: make() for name, make in members.BY_NAME.items()} | {
    "closed_form": dataclasses.replace(
        members.pmpo(),
        exponent=dataclasses.replace(members.pmpo().exponent, matching="closed_form"),
    ),
    "dual": dataclasses.replace(members.hmpo(), dual_clip=3.0),
    "drift": dataclasses.replace(SEQUENCE, p=-1.0, clip_center="drift"),
    "z": dataclasses.replace(SEQUENCE, p=-1.0, clip_center="drift", clip_width="z"),
    "kl": dataclasses.replace(members.grpo(), kl_coef=0.1),
}
MEMBERS = pytest.mark.parametrize("name", CONFIGS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def evaluate(config, new, old, mask, advantages):
    new = new.clone().requires_grad_()
    ref = torch.where(mask, new.detach() - 0.1, torch.full_like(old, math.nan))
    inputs = (old, mask, advantages, config)
    loss = power_mean_loss(new, *inputs, ref_logprobs=ref)
    loss.backward()
    metrics = objective_metrics(new.detach(), *inputs, ref_logprobs=ref)
    return loss.detach(), new.grad, {k: v.item() for k, v in metrics.items()}


def inputs(dtype=torch.float64):
    d, mask, advantages = batch(-0.2, 0.2, overflow=False)
    d = d.clamp(-2, 2)
    old = torch.full_like(d, -1.5)
    return (d + old).to(dtype), old.to(dtype), mask, advantages.to(dtype)


@MEMBERS
@DTYPES
def test_padding_holds_anything(name, dtype):
    new, old, mask, advantages = inputs(dtype)
    clean = evaluate(CONFIGS[name], new, old, mask, advantages)
    assert clean[0].isfinite() and clean[1].isfinite().all() and clean[1].any()
    for value in (math.nan, math.inf, -math.inf):
        dirty = [torch.where(mask, x, torch.full_like(x, value)) for x in (new, old)]
        for one, two in ((dirty[0], old), (new, dirty[1]), dirty):
            loss, grad, metrics = evaluate(CONFIGS[name], one, two, mask, advantages)
            assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1])
            assert metrics == clean[2]


@MEMBERS
@DTYPES
def test_rows_without_tokens_count_as_absent(name, dtype):
    new, old, mask, advantages = inputs(dtype)
    keep = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    mask[2] = False
    loss, grad, metrics = evaluate(CONFIGS[name], new, old, mask, advantages)
    rest = evaluate(CONFIGS[name], new[keep], old[keep], mask[keep], advantages[keep])
    torch.testing.assert_close(loss, rest[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad[keep], rest[1], rtol=1e-2, atol=1e-6)
    assert not grad[2].any()
    assert metrics == pytest.approx(rest[2], rel=1e-5, abs=1e-6)
    none = evaluate(CONFIGS[name], new, old, torch.zeros_like(mask), advantages)
    assert none[0] == 0 and not none[1].any()


@MEMBERS
@DTYPES
def test_log_ratios_of_eighty_stay_finite(name, dtype):
    new, old, mask, advantages = inputs(dtype)
    for value in (80.0, -80.0):
        for sign in (1.0, -1.0):
            for columns in (slice(0, 1), slice(None)):
                moved = new.clone()
                moved[:, columns] = value - 1.5
                loss, grad, metrics = evaluate(
                    CONFIGS[name], moved, old, mask, sign * advantages.abs()
                )
                assert loss.isfinite() and grad.isfinite().all()
                assert all(
                    math.isfinite(v) or k in ("clip/lo", "clip/hi") for k, v in metrics.items()
                ), metrics


@MEMBERS
@DTYPES
def test_non_finite_token_that_counts_makes_the_loss_nan(name, dtype):
    new, old, mask, advantages = inputs(dtype)
    ref = torch.zeros_like(old)
    for value in (math.nan, math.inf, -math.inf):
        for row in (0, 3, 4):  # A > 0, A = 0, A < 0
            for side in (0, 1):
                spoilt = [new.clone(), old.clone()]
                spoilt[side][row, 1] = value
                given = (*spoilt, mask, advantages, CONFIGS[name])
                assert power_mean_loss(*given, ref_logprobs=ref).isnan()


@pytest.mark.parametrize("name", members.BY_NAME)
def test_trainer_names_the_token_and_skips(name):
    model = tiny_llama()
    objective = members.BY_NAME[name]()
    trainer = trainer_for(model, settings(objective=objective, total_updates=4), sgd=False)
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()
    trainer.batch.rollout.old_logprobs[:, 0] = -math.inf
    before = weights(model)
    record = trainer.next_update()
    assert torch.equal(weights(model), before)
    assert record["update_skipped"] == 1 and trainer.totals["optim/skipped_total"] == 1
    (event,) = trainer.drain_events()
    assert event.data == {"site": "old_logprob", "sequence": 0, "token": 0}
