"""Rewards of conversations: what environments gave, and what reward functions say of them."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from hmpo.config import TrainerConfig
from hmpo.environments.pool import COLUMN, REWARD, Environments, environment_reward
from hmpo.errors import ConfigError
from hmpo.models.chat import PromptOptions, refuse_options
from hmpo.rewards import RewardResult, Rewards
from hmpo.stopwatch import section
from hmpo.trainer.conversation import Conversations
from hmpo.trainer.responses import repeated_columns
from hmpo.types import Event


def environments_of(
    environment: Callable[[], Any] | Environments | None,
    tools: Sequence[Callable[..., Any]],
    max_turns: int | None,
    tokenizer: Any,
) -> Environments | None:
    """What a trainer's policy talks with, from its arguments; None for one turn a response.

    Raises:
        ConfigError: one of them is not read beside the others.
    """
    limit = {} if max_turns is None else {"max_turns": max_turns}
    if isinstance(environment, Environments):
        beside = [*limit, *(["tools"] if tools else [])]
        if beside:
            raise ConfigError(
                f"{beside[0]}: got it beside Environments(...), which has its own; give it to that"
            )
        return environment
    if environment is None and not tools:
        if limit:
            raise ConfigError(
                f"max_turns: got {max_turns} without environment or tools, where a response is "
                "one turn; leave it out"
            )
        return None
    return Environments(environment, tools=tools, tokenizer=tokenizer, **limit)


def rewards_of(given: Any, environments: Environments | None, config: TrainerConfig) -> Rewards:
    """What scores a trainer's responses: the reward functions, and the environments' own rewards.

    Args:
        given: reward functions, or the `Rewards` of some; None for none of one's own.
        environments: what the policy talks with, if it does.
        config: of the trainer.

    Raises:
        ConfigError: nothing gives a reward.
        RewardError: functions that cannot be used.
    """
    gives = environments is not None and environments.rewards
    if given is None and not gives:
        who = "there is no environment" if environments is None else "nothing it talks with does"
        raise ConfigError(
            f"reward_fn: got None, and {who}, so there is no reward; expected a function, or an "
            "environment with step or get_reward"
        )
    if not isinstance(given, Rewards):
        return Rewards(
            with_environment(given, environments),
            on_error=config.on_reward_error,
            timeout=config.reward_timeout,
            max_steps=config.total_updates or 0,
        )
    has = environment_reward in given.functions.values()
    return given.joined({REWARD: environment_reward}) if gives and not has else given


def refuse_columns(names: Collection[str]) -> None:
    """Refuse columns of a task whose names are taken where there is an environment.

    Raises:
        ConfigError: one line that names the column.
    """
    for name in ("prompt", COLUMN):
        if name in names:
            raise ConfigError(f"column {name}: the name is taken with an environment; rename it")


def refuse_given(
    columns: Mapping[str, Sequence[Any]], environments: Environments, options: PromptOptions | None
) -> None:
    """Refuse, before anybody talks, what no environment is to blame for.

    Args:
        columns: of the prompts.
        environments: what the policy talks with.
        options: how prompts become token ids.

    Raises:
        ConfigError: a column whose name is taken.
        ModelError: a template variable that the chat template does not read.
    """
    refuse_columns(columns)
    if options is not None and options.template:
        refuse_options(environments.tokenizer, options.template)


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
        if REWARD in functions:
            raise ConfigError(
                f"reward {REWARD!r}: the name is that of the environment's own; rename the function"
            )
        return own | dict(functions)
    listed = functions if isinstance(functions, Sequence) else [functions]
    return [environment_reward, *listed]


@section("rewards")
def scored_parts(
    talked: Conversations,
    columns: Mapping[str, Sequence[Any]],
    group_size: int,
    rewards: Rewards,
    *,
    step: int,
    seed: int | None,
) -> dict[str, Any]:
    """The fields of `ScoredResponses`.

    Args:
        talked: the conversations.
        columns: by name, a value for each prompt.
        group_size: G, conversations per prompt.
        rewards: what scores them.
        step: updates done.
        seed: of random numbers that time-limited reward functions draw.
    """
    columns = repeated_columns(columns, len(talked.openings) // group_size, group_size)
    given = {**columns, COLUMN: talked.rewards}
    result = rewards(
        talked.openings, talked.completions, talked.token_ids, given, step=step, seed=seed
    )
    result = _without(result, talked.faults)
    return {
        "rollout": talked.rollout,
        "rewards": torch.tensor(result.total, device=talked.rollout.finished.device),
        "prompts": talked.openings,
        "completions": talked.texts,
        "columns": columns,
        "result": result,
        "conversations": talked,
    }


def _without(result: RewardResult, faults: Mapping[int, str]) -> RewardResult:
    """The rewards without those of conversations that failed, whatever functions say of them."""
    if not faults:
        return result
    lost = [i in faults for i in range(len(result.total))]

    def kept(values: list[float]) -> list[float]:
        return [math.nan if gone else value for value, gone in zip(values, lost, strict=True)]

    total = kept(result.total)
    return dataclasses.replace(
        result,
        total=total,
        by_function={name: kept(values) for name, values in result.by_function.items()},
        dropped=sum(map(math.isnan, total)),
        events=tuple(event for event in result.events if event.sample not in faults),
    )


def environment_events(talked: Conversations | None, step: int) -> list[Event]:
    """Faults of environments as events of the run."""
    faults = {} if talked is None else talked.faults
    return [
        Event(name="environment_error", step=step, data={"sample": i, "detail": detail})
        for i, detail in faults.items()
    ]
