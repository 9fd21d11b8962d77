"""A minibatch's gradient: any split gives the same, and rows without gradient need no backward."""

import dataclasses

import pytest
import torch

from hmpo import members
from hmpo.config import MismatchConfig, ObjectiveConfig, PowerMeanConfig
from hmpo.logprobs import responses
from hmpo.objective.loss import power_mean_loss
from hmpo.optim import LogitTracker
from hmpo.sampling.responses import sample_responses
from hmpo.trainer import gradient as module
from hmpo.trainer.gradient import accumulate, idle_rows, micro_batches
from hmpo.types import Batch
from tests.attention.families import family
from tests.support import in_float64, padded_prompts, tiny_causal, tiny_llama

MEMBERS = {name: make() for name, make in members.BY_NAME.items()} | {
    "drift": ObjectiveConfig(clip_level="sequence", clip_center="drift", p=-2.0),
    "z": ObjectiveConfig(clip_level="sequence", clip_width="z", clip_low=1.0, clip_high=1.0),
    "soft": ObjectiveConfig(gate="soft", clip_level="none"),
    "detached": ObjectiveConfig(gate="detached", reduction="token_mean"),
    "dual": ObjectiveConfig(dual_clip=3.0, reduction="length_sum"),
}
FREE = {name: o for name, o in MEMBERS.items() if o.kl_coef == 0}
SETTINGS = PowerMeanConfig(group_size=4, max_length=7, eos_token=2)


def batch_of(model, *, seed=0, advantages=None, weights=None) -> Batch:
    """Three groups of four; the second has no advantage, two other rows do not count."""
    ids, mask = padded_prompts(40)
    generator = torch.Generator().manual_seed(seed)
    rollout = sample_responses(
        model,
        ids,
        mask,
        group_size=4,
        max_length=7,
        eos_token=tuple(range(2, 12)),
        generator=generator,
    )
    dtype = next(model.parameters()).dtype
    noise = 0.2 * torch.randn(rollout.old_logprobs.shape, generator=generator)
    old = (rollout.old_logprobs + noise).to(dtype)
    rollout = dataclasses.replace(
        rollout, old_logprobs=old, sampling_logprobs=rollout.sampling_logprobs.to(dtype)
    )
    if advantages is None:
        advantages = torch.randn(12, generator=generator)
        advantages[4:8] = 0
    valid = torch.ones(12, dtype=torch.bool)
    valid[[1, 10]] = False
    rewards = torch.zeros(12)
    return Batch(
        rollout=rollout, rewards=rewards, advantages=advantages, valid=valid, weights=weights
    )


def gradient(model, batch, objective, **changes):
    """(loss, log-probs, entropy, gradients)."""
    model.zero_grad()
    config = dataclasses.replace(SETTINGS, objective=objective, **changes)
    mismatch = MismatchConfig(off_policy_low=0.9)
    result = accumulate(model, batch, config, objective, None, mismatch)
    gradients = [p.grad.clone() for p in model.parameters()]
    return result.loss, result.logprobs, result.entropy, gradients


def all_active(batch, objective):
    return torch.zeros(len(batch.rewards), dtype=torch.bool)


def largest(one, other) -> float:
    flat = zip([*one[:3], *one[3]], [*other[:3], *other[3]])
    return max(float((a - b).abs().max()) for a, b in flat)


@pytest.mark.parametrize("name", list(FREE))
@pytest.mark.parametrize("level", ["none", "response", "token"])
def test_idle_rows_have_no_gradient_in_the_objective(name, level) -> None:
    generator = torch.Generator().manual_seed(3)
    new = torch.randn(12, 7, dtype=torch.float64, generator=generator).mul_(0.1).requires_grad_()
    weights = {"none": None, "response": torch.rand(12), "token": torch.rand(12, 7)}[level]
    if weights is not None:
        weights[3] = 0
    batch = batch_of(tiny_llama(), weights=weights)
    mask = batch.rollout.response_mask & batch.valid[:, None]
    old = batch.rollout.old_logprobs.double()
    near = old + new[:, : mask.shape[1]]  # a token that is clamped has no gradient either
    loss = power_mean_loss(near, old, mask, batch.advantages, FREE[name], weights=weights)
    loss.backward()
    idle = idle_rows(batch, FREE[name])
    expected = {1, 4, 5, 6, 7, 10} | ({3} if weights is not None else set())
    if name == "dro":  # a token is drawn back whatever its advantage
        moved = expected - set((~mask.any(1)).nonzero()[:, 0].tolist()) - {3}
        assert moved and bool((new.grad[sorted(moved)] != 0).any(1).all())
        expected -= moved
    assert set(idle.nonzero()[:, 0].tolist()) == expected
    assert bool((new.grad[idle] == 0).all()) and bool((new.grad[~idle] != 0).any(1).any())


@pytest.mark.parametrize("name", list(MEMBERS))
@pytest.mark.parametrize("size", [None, 5])
def test_leaving_idle_rows_out_of_the_backward_pass_changes_nothing(
    name, size, monkeypatch
) -> None:
    model, objective = in_float64(tiny_llama()), MEMBERS[name]
    batch = batch_of(model)
    if objective.kl_coef > 0:
        ref = batch.rollout.old_logprobs - 0.1
        batch = dataclasses.replace(batch, ref_logprobs=ref)
        assert not bool(idle_rows(batch, objective).any()), "the KL term reaches every row"
    found = gradient(model, batch, objective, micro_batch_size=size)
    monkeypatch.setattr(module, "idle_rows", all_active)
    want = gradient(model, batch, objective, micro_batch_size=None)
    assert largest(found, want) < 1e-12
    assert float(want[0].abs()) > 0 and max(float(g.abs().max()) for g in want[3]) > 1e-5


def test_idle_rows_run_without_gradient(monkeypatch) -> None:
    model, calls = tiny_llama(), []
    compute = responses.response_states

    def counted(policy, ids, *args):
        calls.append((len(ids), torch.is_grad_enabled()))
        return compute(policy, ids, *args)

    monkeypatch.setattr(responses, "response_states", counted)
    gradient(model, batch_of(model), members.hmpo())
    assert calls == [(6, True), (6, False)]


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("name", list(MEMBERS))
def test_one_pass_over_the_vocabulary_changes_no_gradient(name, size, monkeypatch) -> None:
    model, objective = in_float64(tiny_llama()), MEMBERS[name]
    batch, passes = batch_of(model), []
    inner = responses.one_pass

    def counted(*args, **options):
        passes.append(args[4])
        return inner(*args, **options)

    monkeypatch.setattr(responses, "one_pass", counted)
    want = gradient(model, batch, objective, micro_batch_size=size)
    assert not passes, "few logits may wait for the backward pass"
    monkeypatch.setattr("hmpo.logprobs.head.STORE", 0)
    found = gradient(model, batch, objective, micro_batch_size=size, logprob_chunk=7)
    assert largest(found, want) < 1e-12
    # A band that a single micro-batch measures of itself needs all log-probs first.
    assert len(passes) == (0 if objective.needs_band and size is None else 1 if size is None else 3)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_a_minibatch_without_any_advantage_moves_momentum_as_before(kind, monkeypatch) -> None:
    found = []
    for skip in (True, False):
        model = in_float64(tiny_llama()) if kind == "llama" else tiny_causal(40).double()
        batch = batch_of(model)
        nothing = dataclasses.replace(batch, advantages=torch.zeros(12))
        # An eps this large: AdamW multiplies a gradient's rounding by up to lr / eps.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3)
        with monkeypatch.context() as patch:
            if not skip:
                patch.setattr(module, "idle_rows", all_active)
            for b in (batch, nothing, nothing):
                grads = gradient(model, b, members.hmpo())[3]
                optimizer.step()
        assert all(bool((g == 0).all()) for g in grads)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((found[0] - found[1]).abs().max()) < 1e-12


@pytest.mark.parametrize("source", ["auto", "exact", "lse", "bound"])
def test_the_tracker_hears_idle_rows(source, monkeypatch) -> None:
    readings = []
    for skip in (True, False):
        model = family("llama")
        with (
            monkeypatch.context() as patch,
            LogitTracker(model, tau=20.0, source=source) as tracker,
        ):
            if not skip:
                patch.setattr(module, "idle_rows", all_active)
            gradient(model, batch_of(model), members.hmpo())
            readings.append(tracker.consume()["model.layers.0.self_attn"])
    mine, theirs = readings
    assert torch.equal(mine.exact, theirs.exact)
    both = mine.exact
    assert torch.allclose(mine.value[both], theirs.value[both], rtol=1e-6)
    if source in ("exact", "lse"):
        assert torch.allclose(mine.value, theirs.value, rtol=1e-6)


def test_micro_batches_keep_prompts_together_and_every_row_once() -> None:
    model = tiny_llama()
    batch = batch_of(model)
    rows = torch.tensor([9, 0, 4, 1, 8, 5, 11, 2, 6, 10, 3, 7])
    mixed = batch.select(rows)
    parts = micro_batches(mixed, 4)
    assert torch.cat(parts).sort()[0].tolist() == list(range(12))
    for part in parts:
        assert len({tuple(p.tolist()) for p in mixed.rollout.prompt_ids[part]}) == 1
        lengths = mixed.rollout.lengths[part].tolist()
        assert lengths == sorted(lengths, reverse=True)
    assert [len(p) for p in micro_batches(mixed, 5)] == [5, 5, 2]
    assert [p.tolist() for p in micro_batches(mixed, None)] == [list(range(12))]
    whole, split = (gradient(model, mixed, members.gspo(), micro_batch_size=s) for s in (None, 4))
    assert torch.allclose(whole[1], split[1], rtol=0, atol=2e-5), "rows are in their order again"
