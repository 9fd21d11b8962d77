"""Responses and columns as reward functions take them, and reward faults as events."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hmpo.errors import ConfigError
from hmpo.models import decode_responses
from hmpo.rewards import RewardResult
from hmpo.sampling.options import SamplingOptions
from hmpo.trainer.prompts import EncodedPrompts
from hmpo.types import Event, Rollout


def with_ends(options: SamplingOptions, ends: Sequence[int]) -> SamplingOptions:
    """The options with further ids that end a response."""
    tokens = tuple(sorted({*options.eos_tokens, *ends}))
    return dataclasses.replace(options, eos_tokens=tokens) if ends else options


def texts_of(
    tokenizer: Any,
    ids: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    stop: Sequence[str],
    ends: Sequence[int],
) -> list[str]:
    """Texts of sampled turns, up to the first stop string.

    Args:
        tokenizer: of the policy.
        ids: what was sampled.
        mask: which of them are real.
        stop: strings that end a turn.
        ends: ids that end one too: no part of it, also where their tokens are not special.
    """
    if ends:
        mask = mask & ~torch.isin(ids, torch.tensor(ends, device=ids.device))
    return decode_responses(tokenizer, ids, mask, stop)


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
    texts = texts_of(tokenizer, rollout.response_ids, rollout.response_mask, stop, asked.ends)
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
