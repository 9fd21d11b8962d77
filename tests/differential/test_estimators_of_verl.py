"""Estimators of advantages against verl's own; run by `make peers-test`.

verl has advantages per token, equal in a response, and epsilons in denominators, which are handed
0 where it lets one: its whitening adds 1e-8 to the variance, of which the tolerance is.
"""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="the peer verl is missing: make peers-test has it")

from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import FixedKLController, agg_loss, get_adv_estimator_fn

from hmpo.adapters.verl import AGGREGATION
from hmpo.config import ObjectiveConfig
from hmpo.objective.entropy import entropy_weights
from hmpo.objective.estimators import estimate_advantages
from tests.oracles import advantages as oracle

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.25, 1.0, 1.0, 0.0, 0.5, 0.0]).double()
SECOND = torch.tensor([0.0, 1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 1.0]).double()
LENGTHS = torch.tensor([3, 1, 4, 1, 5, 6, 2, 6, 5, 3, 5, 6])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)


def theirs(name: str, rewards=REWARDS, **options) -> torch.Tensor:
    """verl's advantage of each response, from a reward at its last token."""
    spread = torch.zeros(MASK.shape, dtype=torch.float64)
    spread[torch.arange(12), LENGTHS - 1] = rewards
    found, _ = get_adv_estimator_fn(name)(
        token_level_rewards=spread,
        response_mask=MASK.double(),
        index=np.array([f"prompt {g}" for g in GROUPS.tolist()]),
        **options,
    )
    for row, keep in zip(found, MASK, strict=True):
        assert row[keep].isnan().all() or ((row[keep] == row[0]).all() and not row[~keep].any())
    return found[:, 0].double()


CONFIG = AlgoConfig(gamma=1.0)
WHITENED = 1e-7
SAME = [
    ("group_std", "grpo", {"epsilon": 0.0}, 1e-12),
    ("group", "grpo", {"norm_adv_by_std_in_grpo": False}, 1e-12),
    ("rloo", "rloo", {}, 1e-12),
    ("reinforce_pp", "reinforce_plus_plus", {"config": CONFIG}, WHITENED),
    ("reinforce_pp_baseline", "reinforce_plus_plus_baseline", {}, WHITENED),
    ("pass_at_k", "grpo_passk", {"epsilon": 1e-300, "config": CONFIG}, 1e-12),
]
SILENT = GROUPS == 2
"""A group of equal rewards: verl divides 0 by 0 where its epsilon is 0."""


@pytest.mark.parametrize(("name", "verl", "options", "tolerance"), SAME)
def test_estimator_equals_verl(name, verl, options, tolerance):
    weighed = {"lengths": LENGTHS} if tolerance == WHITENED else {}
    ours = estimate_advantages(REWARDS, GROUPS, name, **weighed).values
    other = theirs(verl, **options)
    told = ~SILENT if name in ("group_std", "reinforce_pp_baseline") else ~SILENT | SILENT
    torch.testing.assert_close(ours[told], other[told], rtol=tolerance, atol=tolerance)
    assert bool(ours[SILENT].any()) is (name == "reinforce_pp")


def test_whitening_gives_a_silent_group_what_ours_does_not():
    """verl subtracts the mean of the batch from the 0 of equal rewards; ours leaves it 0."""
    other = theirs("reinforce_plus_plus_baseline")
    assert other[SILENT].abs().max() > 1e-3


def test_gdpo_equals_verl():
    """verl casts the single rewards to float32; these are exact in it, the sums are not."""
    config = AlgoConfig(gdpo_reward_keys=["one", "two"], gdpo_reward_weights=[1.0, 0.5], gamma=1.0)
    columns = {"one": REWARDS.numpy(), "two": SECOND.numpy()}
    attended = torch.cat([torch.ones(12, 2, dtype=torch.long), MASK.long()], 1)
    batch = {"prompts": torch.zeros(12, 2), "attention_mask": attended}
    other = theirs("gdpo", config=config, non_tensor_batch=columns, batch=batch, epsilon=1e-12)
    table = torch.stack([REWARDS, SECOND], 1)
    weights = torch.tensor([1.0, 0.5])
    ours = estimate_advantages(table, GROUPS, "gdpo", weights=weights, lengths=LENGTHS).values
    torch.testing.assert_close(ours[~SILENT], other[~SILENT], rtol=1e-6, atol=1e-6)


def test_a_group_of_one_has_its_reward_in_verl_and_nothing_here():
    """verl takes 0 and 1 for the mean and deviation of a single reward."""
    groups = GROUPS.clone()
    groups[2] = 9
    spread = torch.zeros(MASK.shape, dtype=torch.float64)
    spread[torch.arange(12), LENGTHS - 1] = REWARDS
    found, _ = get_adv_estimator_fn("grpo")(
        token_level_rewards=spread, response_mask=MASK.double(), index=groups.numpy()
    )
    assert found[2, 0].item() == pytest.approx(0.5, rel=1e-5)
    ours = estimate_advantages(REWARDS, groups, "group_std")
    assert ours.values[2] == 0 and ours.single == 1


@pytest.mark.parametrize(("kl", "name"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_a_kl_in_the_reward_is_that_of_verl(kl, name):
    """verl takes it off each token, and an estimator of groups sums these; its k3 ends at 10."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports of Ray is deprecated
        from verl.trainer.ppo.ray_trainer import apply_kl_penalty
    generator = torch.Generator().manual_seed(1)
    old, ref = (0.3 * torch.randn(MASK.shape, generator=generator).double() for _ in range(2))
    scores = torch.zeros(MASK.shape, dtype=torch.float64)
    scores[torch.arange(12), LENGTHS - 1] = REWARDS
    fields = {"response_mask": MASK.double(), "token_level_scores": scores}
    fields |= {"old_log_probs": old, "ref_log_prob": ref}
    data, _ = apply_kl_penalty(
        DataProto(batch=TensorDict(fields, batch_size=[12])), FixedKLController(0.3), kl
    )
    kept = [
        oracle.divergence(a[keep].tolist(), b[keep].tolist(), name, "sum")
        for a, b, keep in zip(old, ref, MASK, strict=True)
    ]
    expected = REWARDS - 0.3 * torch.tensor(kept, dtype=torch.float64)
    found = (data.batch["token_level_rewards"] * MASK).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", AGGREGATION)
def test_an_entropy_bonus_weighs_tokens_as_verl_does(reduction):
    generator = torch.Generator().manual_seed(2)
    entropy = torch.rand(MASK.shape, generator=generator).double()
    length = {"max_length": 9} if reduction == "constant" else {}
    config = ObjectiveConfig(entropy_coef=0.3, reduction=reduction, **length)
    counts = {"batch_num_tokens": int(MASK.sum()), "global_batch_size": 12, "dp_size": 1}
    counts |= {"loss_scale_factor": 9} if length else {}
    other = agg_loss(
        loss_mat=entropy, loss_mask=MASK.double(), loss_agg_mode=AGGREGATION[reduction], **counts
    )
    ours = (entropy_weights(MASK, config, None, torch.float64) * entropy).sum()
    assert ours.item() == pytest.approx(0.3 * other.item(), rel=1e-7)
