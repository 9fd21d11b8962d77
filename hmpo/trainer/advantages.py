"""The advantages of a rollout: by the estimator that the settings name, or by a function."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.config import AdvantageConfig, PowerMeanConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError, NonFiniteError, ShapeError
from hmpo.objective.advantages import group_advantages, zero_variance_groups
from hmpo.objective.estimators import estimate_advantages
from hmpo.objective.kl import token_kl
from hmpo.objective.masking import without_padding
from hmpo.objective.segments import turns_of
from hmpo.objective.terms import advantages_of_rows
from hmpo.ranks.world import Ranks
from hmpo.trainer.rollout import Collected
from hmpo.types import Metrics, Rollout

AdvantageFn = Callable[[Rollout, Tensor, Tensor], Tensor]
"""(rollout of N responses, total rewards (N,), which of them count (N,)) -> advantages (N,), or
(N, T) with one for each token of `rollout.response_ids`. Rewards that do not count are NaN."""


def rollout_advantages(
    found: Collected, config: PowerMeanConfig
) -> tuple[Float[Tensor, " N"], Metrics]:
    """Advantages of a rollout's responses, and what they say of its groups.

    Args:
        found: the rollout with its rewards.
        config: which estimator.

    Raises:
        ConfigError: rewards that the estimator is not made for.
        NonFiniteError: a reward that counts is not finite, less its KL.
    """
    rewards, group = found.rewards, config.group_size
    dead = zero_variance_groups(rewards, group, valid=rewards.isfinite())
    told: Metrics = {"adv/zero_frac": float(dead.double().mean())}
    name = config.advantages.estimator
    if config.advantages.kl_in_reward > 0:
        kl = _response_kl(found, config.advantages)
        rewards = rewards - config.advantages.kl_in_reward * kl
        told["kl/in_reward"] = float(kl[found.valid].double().mean())
        told["reward/less_kl"] = float(rewards[found.valid].double().mean())
    if name is None:
        advantages = group_advantages(
            rewards,
            group,
            scale=config.advantage_scale,
            std_ddof=config.std_ddof,
            valid=found.valid,
        )
        return advantages, told
    values, valid = rewards.cpu(), found.valid.cpu()
    if name == "gdpo":
        values = torch.tensor(list(found.by_function.values()), dtype=torch.float64).T
        valid = valid[:, None] & values.isfinite()
    result = estimate_advantages(
        values,
        torch.arange(len(rewards)) // group,
        name,
        valid=valid,
        lengths=found.rollout.lengths.cpu() if config.advantages.over == "tokens" else None,
        weights=torch.tensor(found.weights) if name == "gdpo" else None,
        std_ddof=config.std_ddof,
    )
    for key in ("equal", "single", "empty", "dropped", "dead"):
        told[f"adv/{key}"] = getattr(result, key)
    return result.values.to(rewards), told


def _response_kl(found: Collected, config: AdvantageConfig) -> Float[Tensor, " N"]:
    """KL of the policy that sampled from the reference, over each response (nat)."""
    rollout, ref = found.rollout, found.ref_logprobs
    assert ref is not None, "the trainer has a reference"
    mask = rollout.response_mask
    own, other = (without_padding(x, mask) for x in (rollout.old_logprobs, ref))
    kl = without_padding(token_kl(own, other, config.kl_estimator), mask).double().sum(1)
    if config.kl_over == "mean":
        kl = kl / rollout.lengths.clamp(min=1)
    return kl.to(found.rewards)


def refuse_beside_function(config: PowerMeanConfig) -> None:
    """Refuse settings of advantages that a function of one's own leaves without effect.

    Raises:
        ConfigError: one line that names the field.
    """
    plain = PowerMeanConfig()
    for name in ("advantage_scale", "std_ddof", "advantages"):
        value, default = getattr(config, name), getattr(plain, name)
        if value != default:
            raise ConfigError(
                f"{name}: got {value!r}, expected {default!r} beside advantage_fn, which decides"
            )


def given_advantages(
    function: AdvantageFn, found: Collected, objective: ObjectiveConfig, ranks: Ranks
) -> tuple[Float[Tensor, " N"] | Float[Tensor, "N T"], Metrics]:
    """What a function of one's own says, 0 where nothing counts.

    Args:
        function: called once, by the first of the ranks.
        found: the rollout with its rewards.
        objective: in force; a mean of it has one advantage.
        ranks: that share the work.

    Raises:
        ConfigError: the function returns no tensor.
        ShapeError: its tensor has another shape, or varies within a segment.
        NonFiniteError: an advantage that counts is NaN or infinite.
    """
    rollout, rewards = found.rollout, found.rewards
    dead = zero_variance_groups(rewards, rollout.group_size, valid=rewards.isfinite())
    mask = rollout.response_mask & found.valid[:, None]
    with torch.no_grad():
        values = ranks.once(lambda: function(rollout, rewards, found.valid))
    if not isinstance(values, Tensor):
        raise ConfigError(
            f"advantage_fn: returned a {type(values).__name__}, expected a tensor (N,) or (N, T)"
        )
    shapes = [tuple(rewards.shape), tuple(mask.shape)]
    if tuple(values.shape) not in shapes or not values.is_floating_point():
        raise ShapeError(
            f"advantage_fn: returned {values.dtype} {tuple(values.shape)}, expected float "
            f"{shapes[0]} or {shapes[1]}"
        )
    values = values.detach().to(rewards)
    counted = found.valid if values.ndim == 1 else mask
    values = values.masked_fill(~counted, 0)
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise NonFiniteError(f"advantage_fn: returned NaN or infinity for response {row}")
    advantages_of_rows(values, mask, objective, turns_of(mask, objective))  # refuses several in one
    return values, {"adv/zero_frac": float(dead.double().mean())}
