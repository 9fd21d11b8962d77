"""The one door for prompts: whatever a caller has, as left-padded ids with their mask.

Beside it: the token ids that a configuration leaves to the tokenizer, and reading all prompts of a
task before a run begins.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.config import TrainerConfig
from hmpo.errors import ConfigError, ModelError
from hmpo.models.chat import PromptOptions, prompt_rows, turn_end_ids
from hmpo.models.policy import is_hugging_face, unwrap
from hmpo.models.probe import refuse_length
from hmpo.models.tokens import (
    left_padded,
    pad_token_id,
    stop_token_ids,
    vocabulary_size,
)
from hmpo.rewards.messages import is_conversation
from hmpo.tasks import Task

Prompts = (
    Sequence[str | Sequence[Mapping]]
    | Sequence[Sequence[int]]
    | Tensor
    | tuple[Tensor, Tensor]
    | Mapping
)
"""Text or conversations (with a tokenizer), lists of token ids, ids (B, P) without padding, or
padded ids with their mask: a pair, or what a tokenizer returns. A conversation is a list of
messages, which the tokenizer's chat template renders."""
C = TypeVar("C", bound=TrainerConfig)
FORMS = (
    "expected texts, conversations, lists of token ids, ids (B, P) without padding, or (ids, mask)"
)


def with_tokens(config: C, policy: nn.Module, tokenizer: Any, stop: Sequence[str]) -> C:
    """`config` with the ids that it leaves to the tokenizer and the policy.

    Args:
        config: of a trainer; what it names itself stays.
        policy: a transformers model has settings of its own, any other module has none.
        tokenizer: or None.
        stop: strings that end a response too.
    """
    changes: dict[str, Any] = {}
    if config.eos_token is None and (tokenizer is not None or is_hugging_face(policy)):
        with contextlib.suppress(ModelError):  # nothing names one
            changes["eos_token"] = stop_token_ids(tokenizer, stop, policy)
    if config.pad_token is None:
        changes["pad_token"] = pad_token_id(tokenizer, policy)
    return dataclasses.replace(config, **changes)


def knows_padding(config: TrainerConfig, policy: nn.Module, tokenizer: Any) -> bool:
    """Whether the pad token is known, and known to be nothing else than padding."""
    if tokenizer is not None:
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends
    if not is_hugging_face(policy):
        return False
    core: Any = unwrap(policy)
    own = core.config.get_text_config()
    ends = (getattr(own, "bos_token_id", None), *config.stop_tokens)
    return getattr(own, "pad_token_id", None) is not None and own.pad_token_id not in ends


class EncodedPrompts(NamedTuple):
    """Prompts as they go to the sampler."""

    given: list[Any]
    """As the reward functions see them: text, messages, or token ids without padding."""
    ids: Int[Tensor, "B P"]
    mask: Bool[Tensor, "B P"]
    chat: bool = False
    """Whether they are conversations: completions are messages then."""
    ends: tuple[int, ...] = ()
    """Ids that end the assistant's turn of a conversation, besides the policy's own end tokens."""


def prompts_for(
    policy: nn.Module,
    prompts: Any,
    tokenizer: Any,
    config: TrainerConfig,
    options: PromptOptions | None = None,
) -> EncodedPrompts:
    """`encoded`, with what is known of the policy's tokens.

    Args:
        policy: what reads them.
        prompts: see `Prompts`.
        tokenizer: for text and messages; or None.
        config: `with_tokens`.
        options: how text and messages become ids.
    """
    return encoded(
        prompts,
        tokenizer,
        config.pad_token or 0,
        vocabulary=vocabulary_size(policy),
        pads=knows_padding(config, policy, tokenizer),
        options=options,
    )


def encoded(
    prompts: Any,
    tokenizer: Any,
    pad_token: int,
    *,
    vocabulary: int | None,
    pads: bool = True,
    options: PromptOptions | None = None,
) -> EncodedPrompts:
    """Prompts of any accepted form.

    Args:
        prompts: see `Prompts`.
        tokenizer: for text and messages.
        pad_token: fills padding.
        vocabulary: token ids are below it; None where nobody knows.
        pads: whether `pad_token` is known to be no part of a prompt: a tensor without a mask that
            has it at an edge is then refused, because its padding would be read as prompt.
        options: how text and messages become ids; token ids are taken as they are.

    Raises:
        ConfigError: one line that says what was received and what is accepted.
    """
    if isinstance(prompts, str | bytes):
        raise ConfigError(f"prompts: got one {type(prompts).__name__}, {FORMS}; put it in a list")
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise ConfigError(f"prompts: got a mapping with {sorted(map(str, prompts))}, {FORMS}")
        ids, mask = prompts["input_ids"], prompts.get("attention_mask")
        prompts = ids if mask is None else (torch.as_tensor(ids), torch.as_tensor(mask))
    if isinstance(prompts, tuple) and [getattr(x, "ndim", 0) for x in prompts] == [2, 2]:
        return _of_rows(_unmasked(*map(torch.as_tensor, prompts)), pad_token, vocabulary)
    if isinstance(prompts, Tensor) or hasattr(prompts, "dtype"):
        ids = torch.as_tensor(prompts)
        _check_tensor(ids, pad_token if pads else None)
        return _of_rows(ids.tolist(), pad_token, vocabulary)
    if not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts: got a {type(prompts).__name__}, {FORMS}")
    if len(prompts) == 0:
        raise ConfigError("prompts: got none, expected at least one prompt")
    chat = all(map(is_conversation, prompts))
    if chat or all(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            what = "messages" if chat else "text"
            raise ConfigError(f"prompts: got {what}, expected token ids (or pass a tokenizer)")
        rows = prompt_rows(tokenizer, prompts, options or PromptOptions())
        padded = left_padded(rows, pad_token_id(tokenizer))
        if not chat:
            return EncodedPrompts(list(prompts), *padded)
        given = [[dict(message) for message in prompt] for prompt in prompts]
        return EncodedPrompts(given, *padded, chat=True, ends=turn_end_ids(tokenizer))
    return _of_rows(
        [_ids(prompt, index) for index, prompt in enumerate(prompts)], pad_token, vocabulary
    )


def _of_rows(rows: list[list[int]], pad_token: int, vocabulary: int | None) -> EncodedPrompts:
    """Rows of ids, checked."""
    for index, row in enumerate(rows):
        if not row:
            raise ConfigError(f"prompts[{index}]: got no token, expected at least one")
        low, high = min(row), max(row)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wrong = low if low < 0 else high
            limit = "ids >= 0" if vocabulary is None else f"ids from 0 to {vocabulary - 1}"
            raise ConfigError(f"prompts[{index}]: got token id {wrong}, expected {limit}")
    return EncodedPrompts(rows, *left_padded(rows, pad_token))


def _ids(prompt: Any, index: int) -> list[int]:
    """One prompt given as token ids."""
    if isinstance(prompt, Mapping) or is_conversation(prompt):
        what = "one chat message" if isinstance(prompt, Mapping) else "messages beside others"
        raise ConfigError(f"prompts[{index}]: got {what}, {FORMS}, one form for all prompts")
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        raise ConfigError(f"prompts[{index}]: got a {type(prompt).__name__}, {FORMS}")
    for item in prompt:
        if isinstance(item, bool) or not isinstance(item, int):
            raise ConfigError(f"prompts[{index}]: got {item!r}, expected token ids (integers)")
    return list(prompt)


def _unmasked(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Rows of a padded tensor without their padding, on whichever side."""
    _check_tensor(ids, None)
    if mask.shape != ids.shape:
        raise ConfigError(
            f"prompts: got a mask of shape {tuple(mask.shape)}, expected {tuple(ids.shape)}"
        )
    real = mask.bool()
    if bool((real.int().diff(dim=1).abs().sum(1) > 1).any()):
        raise ConfigError("prompts: got a mask with holes, expected each prompt in one piece")
    return [row[keep].tolist() for row, keep in zip(ids, real.to(ids.device))]


def _check_tensor(ids: Tensor, pad_token: int | None) -> None:
    """Integers (B, P), without padding at an edge where `pad_token` is given."""
    if ids.ndim != 2 or ids.numel() == 0:
        raise ConfigError(f"prompts: got a tensor of shape {tuple(ids.shape)}, expected (B, P)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"prompts: got a tensor of {ids.dtype}, expected integer token ids")
    if pad_token is not None and bool((ids[:, [0, -1]] == pad_token).any()):
        raise ConfigError(
            f"prompts: got a tensor with the pad token {pad_token} at an edge and no mask, which "
            "would be read as prompt; give (ids, mask), or lists of different lengths"
        )


TRIED = 16
"""Prompts of an endless task that are read before a run begins, of each split."""
PART = 1024
"""Prompts that are encoded at once."""


def check_prompts(
    task: Task,
    tokenizer: Any,
    policy: nn.Module,
    max_length: int,
    options: PromptOptions | None = None,
) -> None:
    """Read a task's prompts as a rollout would, before the run begins.

    All prompts of a task that lists them (`every_prompt`, as that of a JSONL file), else the first
    of both splits.

    Args:
        task: where they come from.
        tokenizer: of the policy.
        policy: what reads them.
        max_length: longest response, in tokens.
        options: how text and messages become ids.

    Raises:
        ModelError: one line with the prompt's place: it cannot be encoded, or is too long.
    """
    if hasattr(task, "every_prompt"):
        listed = list(task.every_prompt())
    else:
        names = [("training", task.train), ("held-out", task.heldout)]
        listed = [
            (f"task {task.name}, {split} prompt {index}", make(index).prompt)
            for split, make in names
            for index in range(TRIED)
        ]
    for start in range(0, len(listed), PART):
        part = listed[start : start + PART]
        lengths = lengths_of(tokenizer, part, options or PromptOptions())
        tokens = max(lengths)
        place = part[lengths.index(tokens)][0]
        what = f"{place}: prompt of {tokens} tokens and max_length = {max_length}"
        refuse_length(policy, tokens + max_length, what)


def fit_prompts(task: Task, tokenizer: Any, options: PromptOptions) -> dict[str, int]:
    """Let a task that limits the length of its prompts measure them.

    Args:
        task: one with `fit`; any other is left alone.
        tokenizer: of the policy.
        options: how text and messages become ids.

    Returns:
        How many prompts were left out or cut, by reason; empty where none was.
    """
    fit = getattr(task, "fit", None)
    if fit is None:
        return {}
    whole = dataclasses.replace(options, max_tokens=None)

    def count(prompts: Sequence[Any]) -> list[int]:
        listed = [(f"task {task.name}", prompt) for prompt in prompts]
        starts = range(0, len(listed), PART)
        parts = [lengths_of(tokenizer, listed[start : start + PART], whole) for start in starts]
        return [tokens for part in parts for tokens in part]

    return dict(fit(count))


def lengths_of(
    tokenizer: Any, part: Sequence[tuple[str, Any]], options: PromptOptions
) -> list[int]:
    """Tokens of some prompts, (place, prompt) each.

    Raises:
        ModelError: one line with the place of a prompt that cannot be encoded.
    """
    try:
        return [len(row) for row in prompt_rows(tokenizer, [p for _, p in part], options)]
    except ModelError:
        for place, prompt in part:
            try:
                prompt_rows(tokenizer, [prompt], options)
            except ModelError as error:
                raise ModelError(f"{place}: {error}") from None
        raise
