"""Responses and columns as reward functions take them, and reward faults as events."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hmpo.errors import ConfigError
from hmpo.models import decode_responses
from hmpo.rewards import RewardResult
from hmpo.trainer.prompts import EncodedPrompts
from hmpo.types import Event, Rollout


def completions_of(
    rollout: Rollout, tokenizer: Any, stop: Sequence[str], asked: EncodedPrompts
) -> tuple[list[Any], list[list[int]]]:
    """(texts, messages of the assistant, or token ids; token ids) of the responses."""
    token_ids = [
        row[: int(length)].tolist()
        for row, length in zip(rollout.response_ids.cpu(), rollout.lengths.cpu())
    ]
    if tokenizer is None:
        return token_ids, token_ids
    mask = rollout.response_mask
    if asked.ends:  # the end of a turn is no part of it, also where its token is not special
        ends = torch.tensor(asked.ends, device=mask.device)
        mask = mask & ~torch.isin(rollout.response_ids, ends)
    texts = decode_responses(tokenizer, rollout.response_ids, mask, stop)
    if not asked.chat:
        return texts, token_ids
    return [[{"role": "assistant", "content": text}] for text in texts], token_ids


def repeated_columns(
    columns: Mapping[str, Sequence[Any]], prompts: int, group_size: int
) -> dict[str, list[Any]]:
    """Per-prompt columns, with a value for each response."""
    for name, values in columns.items():
        if len(values) != prompts:
            raise ConfigError(
                f"column {name}: got {len(values)} values, expected {prompts} (one a prompt)"
            )
    return {k: [v for v in values for _ in range(group_size)] for k, values in columns.items()}


def reward_events(result: RewardResult, step: int) -> list[Event]:
    """Reward faults as events of the run."""
    return [
        Event(
            name=event.name,
            step=step,
            data={"function": event.function, "sample": event.sample, "detail": event.detail},
        )
        for event in result.events
    ]
