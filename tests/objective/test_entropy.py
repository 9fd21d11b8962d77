"""The entropy bonus: its loss, its gradient through every head, and the rule of its coefficient."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from hmpo import members
from hmpo.config import ObjectiveConfig, PowerMeanConfig
from hmpo.errors import ConfigError
from hmpo.logprobs import head, one_pass
from hmpo.logprobs.responses import response_loss, token_logprobs_and_entropy
from hmpo.objective.entropy import EntropyCoefficient, entropy_weights
from hmpo.objective.loss import power_mean_loss, power_mean_objective
from hmpo.telemetry.records import step_record
from hmpo.trainer.gradient import idle_rows
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.types import Denominators
from tests.attention.families import family
from tests.objective.test_weights import batch as make_batch
from tests.oracles.entropy import bonus
from tests.support import in_float64, tiny_causal, tiny_llama
from tests.trainer.rank_cases import adamw

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11]]
REDUCTIONS = {
    "sequence_mean": {},
    "token_mean": {},
    "constant": {"max_length": 9},
    "length_sum": {},
}


def low_tokens(prompts, completions, completion_ids, **columns) -> list[float | None]:
    values: list[float | None] = [sum(t < 8 for t in row) / len(row) for row in completion_ids]
    values[2] = None
    return values


def trainer_with(objective: ObjectiveConfig, model: Any = None, **changes: Any) -> PowerMeanTrainer:
    model = model or in_float64(tiny_llama(seed=1))
    settings = {"group_size": 4, "max_length": 6, "eos_token": (2, 7), "minibatches": 2}
    settings |= {"total_updates": 8, "on_reward_error": "skip", "objective": objective}
    config = PowerMeanConfig(**settings | changes)
    return PowerMeanTrainer(model, None, adamw(model), config, low_tokens)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_bonus_is_that_of_the_loops_whole_and_in_parts(reduction: str) -> None:
    new, old, mask, advantages = make_batch(0.3)
    mask[6] = False
    entropy = torch.rand(8, 10, generator=torch.Generator().manual_seed(1)).double()
    entropy[~mask] = math.nan
    plain = ObjectiveConfig(reduction=reduction, **REDUCTIONS[reduction])
    config = dataclasses.replace(plain, entropy_coef=0.3)
    rows = [row[keep].tolist() for row, keep in zip(entropy, mask, strict=True)]
    expected = 0.3 * bonus(rows, reduction, REDUCTIONS[reduction].get("max_length"))
    without = power_mean_loss(new, old, mask, advantages, plain)
    found = power_mean_objective(new, old, mask, advantages, config, entropy=entropy)
    assert (without - found.loss).item() == pytest.approx(expected, rel=1e-12)
    counts, total = Denominators(sequences=7, tokens=int(mask.sum())), 0.0
    for part in torch.arange(8).split(3):
        inputs = [x[part] for x in (new, old, mask, advantages)]
        total += power_mean_loss(*inputs, config, entropy=entropy[part], denominators=counts).item()
    assert total == pytest.approx(found.loss.item(), abs=1e-12)


def test_the_gradient_of_the_loss_in_log_probs_and_entropy_is_that_of_differences() -> None:
    new, old, mask, advantages = make_batch(0.3)
    config = ObjectiveConfig(entropy_coef=0.3, reduction="token_mean")
    entropy = torch.rand(8, 10).double().requires_grad_()

    def loss(logprobs: Tensor, values: Tensor) -> Tensor:
        return power_mean_loss(logprobs, old, mask, advantages, config, entropy=values)

    assert gradcheck(loss, (new.detach().requires_grad_(), entropy))


def test_a_bonus_without_the_entropy_is_refused() -> None:
    with pytest.raises(ConfigError, match="entropy: got None, expected the entropy"):
        power_mean_loss(*make_batch(0.3), ObjectiveConfig(entropy_coef=0.1))


@pytest.fixture(params=["kept", "one pass", "in blocks", "softcap"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways through the vocabulary projection."""
    if request.param != "kept":
        monkeypatch.setattr(head, "STORE", 0)  # logits are not kept
    if request.param == "in blocks":
        monkeypatch.setattr(one_pass, "block_rows", lambda weight, chunk: 1)
        monkeypatch.setattr(head, "block_rows", lambda weight, chunk: 3)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_of_the_mean_entropy_is_that_of_the_logits(
    path: str, temperature: float
) -> None:
    model = in_float64(tiny_llama(seed=4))
    if path == "softcap":
        model = in_float64(family("gemma3", gain=3.0, final_logit_softcapping=0.6)).eval()
    ids = torch.randint(3, 16, (5, 11), generator=torch.Generator().manual_seed(7))
    attended = torch.ones_like(ids, dtype=torch.bool)
    attended[:, :2] = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 1], [0, 1]]).bool()
    attended[2, 8:], attended[3, 6:] = False, False
    mask = attended[:, -7:]
    weights = torch.rand(5, 7, generator=torch.Generator().manual_seed(8)).double() * mask
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.0, 2.0]).double()

    def policy_loss(new: Tensor, rows: slice) -> Tensor:
        return -(new * advantages[rows, None]).sum() / 9

    found = response_loss(
        model,
        ids,
        attended,
        7,
        policy_loss,
        temperature=temperature,
        chunk=4,
        entropy_weights=weights,
    )
    found.loss.backward()
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attended.long(), position_ids=positions).logits
    logits = logits[:, -8:-1] / temperature
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    picked = logs.gather(2, ids[:, -7:, None])[..., 0]
    loss = policy_loss(picked * mask, slice(0, 5)) - (weights * entropy).sum()
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    for one, parameter in zip(own, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["hmpo", "grpo", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("store", [True, False])
def test_micro_batches_give_the_gradient_of_the_whole_minibatch(
    name: str, size: int, store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not store:
        monkeypatch.setattr(head, "STORE", 0)
    objective = dataclasses.replace(members.BY_NAME[name](), entropy_coef=0.2)
    trainers = [trainer_with(objective, micro_batch_size=micro) for micro in (None, size)]
    losses = []
    for trainer in trainers:
        trainer.begin_rollout(PROMPTS, {})
        trainer.next_update()
        trainer.optimizer.zero_grad()
        minibatch = trainer.minibatch()
        assert not idle_rows(minibatch, objective).any(), "each row is drawn"
        losses.append(trainer.gradient(minibatch).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    for one, other in zip(*(t.policy.parameters() for t in trainers), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [tiny_llama, tiny_causal])
def test_the_gradient_of_a_minibatch_is_that_of_the_objective(model: Any) -> None:
    objective = ObjectiveConfig(entropy_coef=0.2, clip_low=0.01, clip_high=0.01)
    trainer = trainer_with(objective, in_float64(model(seed=2)), qk_clip=False)
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()
    trainer.optimizer.zero_grad()
    minibatch = trainer.minibatch()
    trainer.gradient(minibatch)
    found = [p.grad.clone() for p in trainer.policy.parameters()]
    trainer.optimizer.zero_grad()
    rollout = minibatch.rollout
    result = token_logprobs_and_entropy(
        trainer.policy, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    power_mean_loss(
        result.logprobs,
        rollout.old_logprobs,
        rollout.response_mask & minibatch.valid[:, None],
        minibatch.advantages,
        objective,
        entropy=result.entropy,
    ).backward()
    for one, parameter in zip(found, trainer.policy.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=0, atol=1e-12)


def test_a_record_has_the_coefficient_and_what_the_bonus_adds() -> None:
    trainer = trainer_with(ObjectiveConfig(entropy_coef=0.2, reduction="token_mean"))
    metrics = trainer.update_step(PROMPTS)
    step_record("run", metrics)
    assert metrics["entropy_coef"] == 0.2
    assert metrics["entropy_loss"] == pytest.approx(-0.2 * metrics["entropy"], rel=1e-9)
    trainer.begin_rollout(PROMPTS, {})
    record = trainer.next_update()
    whole = record["pg_loss"] + record["kl_loss"] + record["entropy_loss"]
    assert record["loss"] == pytest.approx(whole, abs=1e-9)
    plain = trainer_with(ObjectiveConfig()).update_step(PROMPTS)
    assert not {"entropy_coef", "entropy_loss"} & plain.keys()


def test_the_coefficient_rises_below_its_target_and_falls_and_rests_above() -> None:
    config = ObjectiveConfig(
        entropy_coef=0.01, entropy_target=1.0, entropy_coef_delta=0.02, entropy_coef_max=0.04
    )
    follower = EntropyCoefficient(config)
    seen = [(follower.value, follower.held)]
    for entropy in (2.0, 0.5, 1.0, 0.9, math.nan, 1.5, 0.2):
        follower.follow(entropy)
        seen.append((round(follower.value, 9), round(follower.held, 9)))
    assert seen == [
        (0.0, 0.01),
        (0.0, 0.0),
        (0.02, 0.02),
        (0.04, 0.04),
        (0.04, 0.04),
        (0.04, 0.04),
        (0.0, 0.02),
        (0.04, 0.04),
    ]
    again = EntropyCoefficient(config)
    again.load_state_dict(follower.state_dict())
    assert (again.value, again.held) == (follower.value, follower.held)
    fixed = EntropyCoefficient(ObjectiveConfig(entropy_coef=0.3))
    fixed.follow(0.0)
    assert fixed.value == 0.3 and fixed.state_dict() == {}


def test_an_adaptive_coefficient_goes_on_after_a_resume_to_the_bit() -> None:
    objective = ObjectiveConfig(entropy_target=9.0, entropy_coef_delta=0.1)
    whole, cut, again = (trainer_with(objective) for _ in range(3))
    first = whole.update_step(PROMPTS)
    assert first["entropy_coef"] == 0.1, "the first update had none"
    cut.begin_rollout(PROMPTS, {})
    cut.next_update()
    again.load_state_dict(cut.state_dict())
    again.next_update()
    assert whole.update_step(PROMPTS) == again.update_step(PROMPTS)
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_update_in_which_nothing_counts_leaves_the_coefficient_alone() -> None:
    objective = ObjectiveConfig(entropy_target=9.0, entropy_coef_delta=0.1)
    trainer = trainer_with(objective)
    trainer.collector.rewards.functions["low_tokens"] = lambda completions, **given: (
        [None] * len(completions)
    )
    metrics = trainer.update_step(PROMPTS)
    assert metrics["n_tokens"] == 0 and trainer.in_force.entropy.held == 0.0


def test_weights_of_a_bonus_add_up_to_its_coefficient() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    config = ObjectiveConfig(entropy_coef=0.5)
    weights = entropy_weights(mask, config, None, torch.float64)
    assert weights.tolist() == [[0.125, 0.125, 0.0], [0.0, 0.0, 0.0], [0.25, 0.0, 0.0]]
