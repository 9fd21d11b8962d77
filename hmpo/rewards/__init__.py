"""Reward functions: TRL's signature, checked returns, weights, time limits that hold.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

The function is called by keyword, once for a whole rollout; sync or async. None for a sample
means "not applicable". Nothing unusable is ever repaired in silence: `Rewards` raises one line,
or drops the sample and reports a named event.
"""

from hmpo.rewards.compose import RewardEvent, RewardResult, Rewards, check_reward_fn
from hmpo.rewards.loading import load_reward
from hmpo.rewards.values import LIMIT, RewardFn

__all__ = [
    "LIMIT",
    "RewardEvent",
    "RewardFn",
    "RewardResult",
    "Rewards",
    "check_reward_fn",
    "load_reward",
]
