import copy
import dataclasses

import pytest
import torch

from hmpo import members
from hmpo.config import GSPOConfig, PowerMeanConfig
from hmpo.errors import NonFiniteError
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.support import in_float64, tiny_llama
from tests.trainer.test_trainer import PROMPTS, low_tokens, weights

SHARED = {"group_size": 4, "max_length": 6, "eos_token": (2, 7), "minibatches": 4, "epochs": 2}


def pair(lr: float = 0.02, **changes):  # eps: AdamW magnifies rounding by up to lr / eps
    models = in_float64(tiny_llama()), in_float64(tiny_llama())
    baseline = GSPOTrainer(
        models[0],
        None,
        torch.optim.AdamW(models[0].parameters(), lr=lr, eps=1e-5),
        GSPOConfig(**(SHARED | changes)),
        low_tokens,
    )
    family = PowerMeanTrainer(
        models[1],
        None,
        torch.optim.AdamW(models[1].parameters(), lr=lr, eps=1e-5),
        PowerMeanConfig(objective=members.gspo(), **(SHARED | changes)),
        low_tokens,
    )
    return baseline, family


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("lr", [2e-4, 2e-2])
def test_gspo_is_family_member(lr: float, micro: int | None) -> None:
    baseline, family = pair(lr, micro_batch_size=micro)
    clipped = 0.0
    for _ in range(3):
        for trainer in (baseline, family):
            trainer.begin_rollout(PROMPTS, {})
        while baseline.pending_updates:
            ours, theirs = family.next_update(), baseline.next_update()
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-12)
            assert ours["clip/frac"] == pytest.approx(theirs["clip/frac"], abs=1e-12)
            clipped += theirs["clip/frac"]
            gap = float((weights(baseline.policy) - weights(family.policy)).abs().max())
            assert gap < 1e-12
    assert clipped > 0, "the clip must act for the comparison to mean anything"


def test_gspo_records_what_the_family_does_with_equal_values() -> None:
    """All but what only the family knows: spread over exponents, bounds, advantages."""
    family_only = ("ratio/", "adv/", "clip/", "update/idle_frac", "kl_loss")
    baseline, family = pair()
    reference = in_float64(tiny_llama(seed=3))
    for trainer in (baseline, family):
        trainer.collector = dataclasses.replace(trainer.collector, ref=reference)
        trainer.begin_rollout(PROMPTS, {})
    while baseline.pending_updates:
        ours, theirs = family.next_update(), baseline.next_update()
        assert theirs.keys() <= ours.keys()
        missing = [name for name in ours.keys() - theirs.keys() if not name.startswith(family_only)]
        assert not missing
        apart = {"update/packed"}  # the witness never packs
        for name in theirs.keys() - apart:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-9, abs=1e-12), name
    assert {"kl/ref", "grad_norm_clipped", "adv/zero_frac"} <= theirs.keys()


def test_gspo_update_step_averages_over_the_updates_as_the_family_does() -> None:
    baseline, family = pair()
    ours, theirs = family.update_step(PROMPTS), baseline.update_step(PROMPTS)
    for name in ("loss", "pg_loss", "grad_norm", "update_skipped"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-12), name


def test_gspo_minibatches_carry_no_common_padding() -> None:
    baseline, _ = pair(minibatches=16, epochs=1)
    baseline.begin_rollout(PROMPTS, {})
    whole, rollouts, gradient = baseline.batch.rollout, [], baseline.gradient

    def watched(batch):
        rollouts.append(batch.rollout)
        return gradient(batch)

    baseline.gradient = watched
    while baseline.pending_updates:
        baseline.next_update()
    assert len(rollouts) == 16
    for rollout in rollouts:
        assert bool(rollout.prompt_mask.any(0).all()) and bool(rollout.response_mask.any(0).all())
    widths = {rollout.input_ids.shape[1] for rollout in rollouts}
    assert min(widths) < whole.input_ids.shape[1], "the comparison needs rows of unequal length"


def test_gspo_baseline_resumes_bit_identically_inside_a_rollout() -> None:
    straight, _ = pair()
    straight.update_step(PROMPTS)
    first, _ = pair()
    first.begin_rollout(PROMPTS, {})
    for _ in range(3):
        first.next_update()
    second, _ = pair()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    while second.pending_updates:
        second.next_update()
    assert torch.equal(weights(second.policy), weights(straight.policy))


def test_gspo_skips_a_nonfinite_update_and_stops_where_asked_to() -> None:
    baseline, _ = pair()
    baseline.begin_rollout(PROMPTS, {})
    baseline.batch.rollout.old_logprobs[:] = float("nan")
    before = weights(baseline.policy)
    assert baseline.next_update()["update_skipped"] == 1
    assert torch.equal(weights(baseline.policy), before)
    strict, _ = pair(on_nonfinite="stop")
    strict.begin_rollout(PROMPTS, {})
    strict.batch.rollout.old_logprobs[:] = float("nan")
    with pytest.raises(NonFiniteError, match="update 0"):
        strict.next_update()
