"""Advantages by a function of one's own, one per response or one per token."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hmpo import members
from hmpo.config import (
    AdvantageConfig,
    ExponentConfig,
    MismatchConfig,
    ObjectiveConfig,
    PowerMeanConfig,
)
from hmpo.errors import ConfigError, NonFiniteError, ShapeError
from hmpo.objective.advantages import group_advantages
from hmpo.objective.loss import power_mean_loss
from hmpo.telemetry.records import step_record
from hmpo.trainer.gradient import idle_rows
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.support import in_float64, tiny_llama
from tests.trainer.rank_cases import adamw, talking

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11]]
TOKENS = ObjectiveConfig(segments="token", p=-1.0, clip_low=0.05, clip_high=0.1)


def low_tokens(prompts, completions, completion_ids, **columns) -> list[float | None]:
    values: list[float | None] = [sum(t < 8 for t in row) / len(row) for row in completion_ids]
    values[2] = None
    return values


def of_groups(rollout: Any, rewards: Tensor, valid: Tensor) -> Tensor:
    """What the trainer has without a function."""
    return group_advantages(rewards, rollout.group_size, valid=valid)


def spread(rollout: Any, rewards: Tensor, valid: Tensor) -> Tensor:
    """The same for each token, NaN on padding."""
    whole = of_groups(rollout, rewards, valid)[:, None].expand_as(rollout.old_logprobs)
    return whole.masked_fill(~rollout.response_mask, math.nan)


def by_token(rollout: Any, rewards: Tensor, valid: Tensor) -> Tensor:
    """Another for each token; 0 for a whole response, and for a token of another."""
    generator = torch.Generator().manual_seed(3)
    shape = rollout.response_ids.shape
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values[1], values[4, 0] = 0.0, 0.0
    return values


def trainer_with(function: Any, objective: ObjectiveConfig, **changes: Any) -> PowerMeanTrainer:
    model = in_float64(tiny_llama(seed=1))
    settings = {"group_size": 4, "max_length": 6, "eos_token": (2, 7), "minibatches": 2}
    settings |= {"total_updates": 8, "on_reward_error": "skip", "objective": objective}
    config = PowerMeanConfig(**settings | changes)
    return PowerMeanTrainer(model, None, adamw(model), config, low_tokens, advantage_fn=function)


def trained(trainer: PowerMeanTrainer, rollouts: int = 1) -> tuple[list[dict], list[Tensor]]:
    metrics = [trainer.update_step(PROMPTS) for _ in range(rollouts)]
    return metrics, [p.detach() for p in trainer.policy.parameters()]


@pytest.mark.parametrize("name", members.BY_NAME)
def test_equal_advantages_of_a_response_train_as_the_estimator_does(name: str) -> None:
    member = members.BY_NAME[name]()
    plain, weights = trained(trainer_with(None, member))
    for function in (of_groups, spread):
        metrics, moved = trained(trainer_with(function, member))
        assert metrics == plain
        assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


@pytest.mark.parametrize(
    "objective", [TOKENS, members.cispo(), members.reinforce(), members.aspo(), members.vespo()]
)
@pytest.mark.parametrize("size", [1, 3, None])
def test_advantages_of_tokens_give_the_gradient_of_the_whole_minibatch(
    objective: ObjectiveConfig, size: int | None
) -> None:
    trainer = trainer_with(by_token, objective, micro_batch_size=size)
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()  # so that ratios differ from 1
    batch = trainer.minibatch()
    trainer.optimizer.zero_grad()
    found = trainer.gradient(batch)
    rollout, mask = batch.rollout, batch.rollout.response_mask & batch.valid[:, None]
    free = found.logprobs.clone().requires_grad_()
    loss = power_mean_loss(free, rollout.old_logprobs, mask, batch.advantages, objective)
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    whole = trainer_with(by_token, objective)
    whole.begin_rollout(PROMPTS, {})
    whole.next_update()
    whole.optimizer.zero_grad()
    whole.gradient(whole.minibatch())
    for one, other in zip(trainer.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)
    idle = idle_rows(batch, objective)
    assert bool(idle.any()) == bool((batch.advantages * mask == 0).all(1).any())
    step_record("run", trainer.next_update())  # each of its numbers has a definition


def test_a_trainer_goes_on_inside_a_rollout_to_the_bit() -> None:
    whole, cut = trainer_with(by_token, TOKENS), trainer_with(by_token, TOKENS)
    whole.begin_rollout(PROMPTS, {})
    whole.next_update()
    cut.begin_rollout(PROMPTS, {})
    cut.next_update()
    again = trainer_with(by_token, TOKENS)
    again.load_state_dict(cut.state_dict())
    assert whole.next_update() == again.next_update()
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_off_policy_mask_looks_at_the_mean_advantage_of_a_response() -> None:
    mismatch = MismatchConfig(off_policy_low=0.999)
    plain, weights = trained(trainer_with(None, members.hmpo(), mismatch=mismatch))
    metrics, moved = trained(trainer_with(spread, members.hmpo(), mismatch=mismatch))
    assert metrics == plain and all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(p=-0.5, exponent=ExponentConfig(kind="learnable", criterion="variance")),
        ObjectiveConfig(clip_share=0.2, clip_rollouts=1),
    ],
)
def test_what_follows_the_updates_follows_advantages_of_tokens(objective: ObjectiveConfig) -> None:
    plain, weights = trained(trainer_with(None, objective), rollouts=2)
    metrics, moved = trained(trainer_with(spread, objective), rollouts=2)
    assert metrics == plain and all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True))


def test_each_turn_of_a_conversation_may_have_an_advantage() -> None:
    def by_turn(rollout: Any, rewards: Tensor, valid: Tensor) -> Tensor:
        mask = rollout.response_mask
        starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        return starts.cumsum(1).double() * torch.where(valid, rewards, 0)[:, None]

    made = talking()
    objective = ObjectiveConfig(segments="turn")
    config = PowerMeanConfig(group_size=3, eos_token=2, max_length=10, objective=objective)
    trainer = PowerMeanTrainer(
        made.policy,
        None,
        adamw(made.policy),
        config,
        None,
        tokenizer=made.collector.tokenizer,
        environment=made.collector.environments,
        advantage_fn=by_turn,
    )
    metrics = trainer.update_step(made.prompts)
    assert math.isfinite(metrics["loss"]) and metrics["n_seq"] > 0
    trainer.in_force.source.objective = ObjectiveConfig()
    with pytest.raises(ShapeError, match="expected one for all tokens of a response"):
        trainer.begin_rollout(made.prompts, {})


@pytest.mark.parametrize(
    ("function", "error", "line"),
    [
        (lambda rollout, rewards, valid: [0.0], ConfigError, "returned a list, expected a tensor"),
        (lambda rollout, rewards, valid: rewards[:3], ShapeError, r"returned .* \(3,\), expected"),
        (lambda rollout, rewards, valid: rollout.lengths, ShapeError, "expected float"),
        (lambda rollout, rewards, valid: rewards / 0, NonFiniteError, "returned NaN or infinity"),
        (by_token, ShapeError, "advantages: got several in segment"),
    ],
)
def test_what_a_function_returns_is_looked_at(function: Any, error: type, line: str) -> None:
    trainer = trainer_with(function, members.hmpo())
    with pytest.raises(error, match=line) as caught:
        trainer.begin_rollout(PROMPTS, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantages", AdvantageConfig(estimator="rloo")),
        ("advantage_scale", "none"),
        ("std_ddof", 0),
    ],
)
def test_settings_that_a_function_leaves_without_effect_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got .* beside advantage_fn, which decides"):
        trainer_with(spread, members.hmpo(), **{name: value})
