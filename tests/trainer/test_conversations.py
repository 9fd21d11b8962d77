"""Rollouts with tokens of an environment between those sampled, through the updates."""

import dataclasses

import pytest
import torch

from hmpo import members
from hmpo.config import GSPOConfig, ObjectiveConfig
from hmpo.logprobs import responses
from hmpo.objective.loss import power_mean_loss
from hmpo.trainer import PowerMeanTrainer
from hmpo.trainer.gradient import accumulate, idle_rows
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.types import Batch
from tests.support import in_float64, tiny_causal, tiny_llama
from tests.trainer.test_gradient import SETTINGS, batch_of

MEMBERS = {
    "hmpo": members.hmpo(),
    "turns": ObjectiveConfig(segments="turn"),
    "drift": ObjectiveConfig(
        segments="turn", clip_level="sequence", clip_center="drift", clip_width="z", p=-2.0
    ),
    "tokens": ObjectiveConfig(segments="turn", reduction="token_mean"),
}


def conversations(model) -> Batch:
    """`batch_of`, of which the environment wrote some tokens between those sampled."""
    batch = batch_of(model)
    rollout = batch.rollout
    sampled = rollout.response_mask.clone()
    sampled[:, 1] = False
    sampled[::2, 3:5] = False
    assert ((sampled[:, 1:] & ~sampled[:, :-1]).sum(1) > 1).any(), "two turns before another"
    old = torch.where(sampled, rollout.old_logprobs, 0)
    rollout = dataclasses.replace(
        rollout,
        response_mask=sampled,
        attended_mask=rollout.response_mask,
        old_logprobs=old,
        sampling_logprobs=torch.where(sampled, rollout.sampling_logprobs, 0),
    )
    return dataclasses.replace(batch, rollout=rollout)


def by_rows(model, batch, objective):
    """The loss from each row alone, without padding, through whole logits."""
    rollout = batch.rollout
    logprobs = []
    for i in range(len(batch.rewards)):
        seen = rollout.attention_mask[i]
        ids = rollout.input_ids[i][seen]
        out = model(ids[None])
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[0, :-1]
        picked = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        row = torch.zeros(len(seen), dtype=picked.dtype)
        row[seen.nonzero()[1:, 0]] = picked
        logprobs.append(row[rollout.prompt_ids.shape[1] :])
    mask = rollout.response_mask & batch.valid[:, None]
    new = torch.stack(logprobs)
    return power_mean_loss(new, rollout.old_logprobs, mask, batch.advantages.double(), objective)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_gradient_of_conversations_is_that_of_rows_alone(monkeypatch, kind, name, one_pass, size):
    monkeypatch.setattr(responses, "one_pass_serves", lambda *_: one_pass)
    model = in_float64(tiny_llama() if kind == "llama" else tiny_causal(40)).eval()
    batch, objective = conversations(model), MEMBERS[name]
    expected = by_rows(model, batch, objective)
    expected.backward()
    slopes = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    config = dataclasses.replace(SETTINGS, micro_batch_size=size)
    got = accumulate(model, batch, config, objective, None)
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-9, atol=1e-13)
    rest = ~batch.rollout.response_mask
    assert not got.logprobs[rest].any() and not got.entropy[rest].any()


def test_what_stands_in_the_environments_tokens_scores_changes_no_bit():
    """Old log-probs, references and weights of tokens that were not sampled are never read."""
    model = tiny_llama()
    batch = conversations(model)
    results = []
    for fill in (0.0, float("nan")):
        mask = batch.rollout.response_mask
        old = torch.where(mask, batch.rollout.old_logprobs, fill)
        ref = torch.where(mask, batch.rollout.old_logprobs - 0.1, fill)
        weights = torch.where(mask, 0.5, fill)
        rollout = dataclasses.replace(batch.rollout, old_logprobs=old)
        changed = dataclasses.replace(batch, rollout=rollout, ref_logprobs=ref, weights=weights)
        model.zero_grad()
        objective = ObjectiveConfig(segments="turn", kl_coef=0.1)
        loss = accumulate(model, changed, SETTINGS, objective, None).loss
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_idle_rows_and_trimming_heed_what_is_attended():
    batch = conversations(tiny_llama())
    trimmed = batch.select(torch.tensor([0, 1])).trimmed()
    rollout = trimmed.rollout
    assert rollout.attended_mask is not None
    assert rollout.response_ids.shape[1] == int(rollout.attended_mask.sum(1).max())
    assert int(rollout.lengths.max()) < int(rollout.extents.max())
    assert idle_rows(batch, members.hmpo())[4:8].all()


@pytest.mark.parametrize("kind", ["power_mean", "gspo"])
def test_a_conversation_in_use_is_saved_and_trained_on(kind):
    """Through a checkpoint's state the next update is the same to the bit."""
    records, weights = [], []
    for resumed in (False, True):
        model = tiny_llama()
        batch = conversations(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        keys = {"group_size": 4, "max_length": 7, "eos_token": 2, "minibatches": 2}
        if kind == "gspo":
            trainer = GSPOTrainer(model, None, optimizer, GSPOConfig(**keys), lambda **_: [0.0])
            valid = dataclasses.replace(batch, valid=torch.ones_like(batch.valid))
            batch = valid
        else:
            config = dataclasses.replace(SETTINGS, minibatches=2, objective=MEMBERS["turns"])
            trainer = PowerMeanTrainer(model, None, optimizer, config, lambda **_: [0.0])
        trainer.batch, trainer.rollouts = batch, 1
        if resumed:
            state = trainer.state_dict()
            assert state["trainer"]["batch"]["rollout"]["attended_mask"] is not None
            trainer.batch = None
            trainer.load_state_dict(state)
        records.append([trainer.next_update(), trainer.next_update()])
        weights.append([p.detach().clone() for p in model.parameters()])
    assert repr(records[0]) == repr(records[1])
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
    counted = batch.rollout.response_mask & batch.valid[:, None]
    assert sum(record["n_tokens"] for record in records[0]) == int(counted.sum())


def test_a_batch_without_an_environment_is_saved_as_it_always_was():
    batch = batch_of(tiny_llama())
    assert "attended_mask" not in batch.state_dict()["rollout"]
    again = Batch.from_state_dict(batch.state_dict(), torch.device("cpu"))
    assert again.rollout.attended_mask is None and again.rollout.counted is None
