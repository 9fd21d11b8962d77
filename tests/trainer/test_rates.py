"""The learning rate has one base, whoever sets it, and training starts from clean gradients."""

import copy
import logging

import pytest
import torch

from hmpo import HMPOConfig, HMPOTrainer
from hmpo.config import GSPOConfig, RunConfig, TrainerConfig
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError, ModelError
from hmpo.trainer import GSPOTrainer
from tests.support import tiny_llama

PROMPTS = [[5, 6, 7], [8, 9]]
KINDS = {"hmpo": (HMPOTrainer, HMPOConfig), "gspo": (GSPOTrainer, GSPOConfig)}


def low_tokens(completion_ids, **columns):
    return [sum(t < 8 for t in row) / len(row) for row in completion_ids]


def made(kind="hmpo", *, policy=None, ref=None, lr=0.5, optimizer=None, **changes):
    trainer, config = KINDS[kind]
    policy = policy or tiny_llama()
    optimizer = optimizer or torch.optim.SGD(policy.parameters(), lr=lr)
    settings = {"group_size": 4, "max_length": 4, "eos_token": (2,), "minibatches": 2}
    return trainer(policy, ref, optimizer, config(**settings | changes), low_tokens)


def rates(trainer, after=lambda: None, updates=4):
    seen = []
    while len(seen) < updates:
        if not trainer.pending_updates:
            trainer.begin_rollout(PROMPTS, {})
        seen.append(trainer.next_update()["lr"])
        after()
    return seen


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_outside_scheduler_decides_the_rate(kind):
    trainer = made(kind)
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1 / (step + 1))
    assert rates(trainer, scheduler.step) == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    trainer = made(kind)
    chained = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    assert rates(trainer, chained.step) == [0.5, 0.25, 0.125, 0.0625]


def test_a_scheduler_made_before_the_trainer_has_its_first_value_in_force():
    policy = tiny_llama()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    trainer = made(policy=policy, optimizer=optimizer)
    assert rates(trainer, scheduler.step) == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_a_hand_set_rate_stays_and_survives_a_resume():
    trainer = made()
    assert rates(trainer, updates=2) == [0.5, 0.5]
    trainer.optimizer.param_groups[0]["lr"] = 0.125
    trainer.lr_scale = 0.5
    assert rates(trainer, updates=2) == [0.0625, 0.0625]
    state = copy.deepcopy(trainer.state_dict())
    again = made()
    again.load_state_dict(state)
    again.lr_scale = 0.5
    assert rates(again, updates=2) == [0.0625, 0.0625]
    again.lr_scale = 1.0
    assert rates(again, updates=2) == [0.125, 0.125]


def test_a_state_without_outside_rates_is_what_it_was():
    trainer = made()
    rates(trainer, updates=2)
    assert "base_lrs" not in trainer.state_dict()["trainer"]


def test_our_schedule_goes_on_from_a_rate_that_was_set_and_says_so_once(caplog):
    trainer = made(lr_schedule="linear", total_updates=8)
    assert rates(trainer, updates=2) == [0.5, 0.4375]
    with caplog.at_level(logging.WARNING, "hmpo.trainer.rates"):
        trainer.optimizer.param_groups[0]["lr"] = 1.0
        assert rates(trainer, updates=2) == [0.75, 0.625]
        trainer.optimizer.param_groups[0]["lr"] = 2.0
        assert rates(trainer, updates=1) == [1.0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_that_somebody_left_are_not_added_in(kind):
    weights = []
    for left in (False, True):
        torch.manual_seed(0)
        trainer = made(kind, max_grad_norm=None)
        if left:
            for p in trainer.policy.parameters():
                p.grad = torch.full_like(p, 3.0)
        rates(trainer, updates=2)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))
    assert torch.equal(*weights)


def test_a_schedule_that_ends_before_the_run_is_refused():
    table = {"updates": 20, "trainer": {"lr_schedule": "cosine", "total_updates": 10}}
    with pytest.raises(ConfigError, match=r"total_updates: got 10, expected nothing, or at least"):
        run_config(table)
    assert run_config(table | {"updates": 10}).updates == 10
    assert RunConfig(updates=20, trainer=TrainerConfig(total_updates=10)).updates == 20
    trainer = made(lr_schedule="linear", total_updates=3)
    assert rates(trainer, updates=3)[-1] > 0
    with pytest.raises(ConfigError, match=r"total_updates: got 3 .* at least the 4 updates"):
        trainer.next_update()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_reference_that_moves_with_the_policy_is_refused(kind):
    policy = tiny_llama()
    with pytest.raises(ModelError, match="ref_model: got the policy itself"):
        made(kind, policy=policy, ref=policy)
    tied = copy.deepcopy(policy)
    tied.model.layers[0].mlp.up_proj.weight = policy.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"1 of the policy's weights .*up_proj.weight"):
        made(kind, policy=policy, ref=tied)
    view = copy.deepcopy(policy)
    for theirs, ours in zip(view.parameters(), policy.parameters()):
        theirs.data = ours.data
    with pytest.raises(ModelError, match=r"copy\.deepcopy"):
        made(kind, policy=policy, ref=view)


def test_frozen_weights_may_be_shared_with_the_reference():
    policy = tiny_llama()
    policy.requires_grad_(False)
    policy.lm_head.weight.requires_grad_(True)
    ref = copy.deepcopy(policy).requires_grad_(False)
    for theirs, ours in zip(ref.model.parameters(), policy.model.parameters()):
        theirs.data = ours.data
    optimizer = torch.optim.SGD([policy.lm_head.weight], lr=0.1)
    trainer = made(policy=policy, ref=ref, optimizer=optimizer)
    assert rates(trainer, updates=2) == [0.1, 0.1]
