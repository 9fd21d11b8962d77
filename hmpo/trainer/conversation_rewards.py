"""Rewards of conversations: what environments gave, and what reward functions say of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hmpo.environments.pool import COLUMN, REWARD, Environments, environment_reward
from hmpo.rewards import Rewards
from hmpo.trainer.conversation import Conversations
from hmpo.types import Event


def environments_of(
    environment: Callable[[], Any] | Environments | None,
    tools: Sequence[Callable[..., Any]],
    max_turns: int,
    tokenizer: Any,
) -> Environments | None:
    """What a trainer's policy talks with, from its arguments; None for one turn a response."""
    if isinstance(environment, Environments) or (environment is None and not tools):
        return environment
    return Environments(environment, tools=tools, max_turns=max_turns, tokenizer=tokenizer)


def with_environment(functions: Any, environments: Environments | None) -> Any:
    """Reward functions, with that of the environments before them if those give any.

    Args:
        functions: one, several, a mapping from name to function, or None for none of one's own.
        environments: what the policy talks with, if it does.
    """
    if environments is None or not environments.rewards:
        return functions
    own: dict[str, Callable[..., Any]] = {REWARD: environment_reward}
    if functions is None:
        return own
    if isinstance(functions, Mapping):
        return own | dict(functions)
    listed = functions if isinstance(functions, Sequence) else [functions]
    return [environment_reward, *listed]


def scored_parts(
    talked: Conversations,
    columns: Mapping[str, Sequence[Any]],
    rewards: Rewards,
    *,
    step: int,
    seed: int | None,
) -> dict[str, Any]:
    """The fields of `ScoredResponses`.

    Args:
        talked: the conversations.
        columns: by name, a value for each.
        rewards: what scores them.
        step: updates done.
        seed: of random numbers that time-limited reward functions draw.
    """
    given = {**columns, COLUMN: talked.rewards}
    result = rewards(
        talked.openings, talked.completions, talked.token_ids, given, step=step, seed=seed
    )
    return {
        "rollout": talked.rollout,
        "rewards": torch.tensor(result.total, device=talked.rollout.finished.device),
        "prompts": talked.openings,
        "completions": talked.texts,
        "columns": dict(columns),
        "result": result,
        "conversations": talked,
    }


def environment_events(talked: Conversations | None, step: int) -> list[Event]:
    """Faults of environments as events of the run."""
    faults = {} if talked is None else talked.faults
    return [
        Event(name="environment_error", step=step, data={"sample": i, "detail": detail})
        for i, detail in faults.items()
    ]
