"""Between text and token ids: left-padded prompts, stop tokens, decoded responses."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hmpo.errors import ModelError


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token where the tokenizer itself puts one before a text, else nothing.

    `tiny-sort` and most Llamas use one, SmolLM2 does not.
    """
    ids = list(tokenizer("").input_ids)
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token ids of the prompts, left-padded to the longest, and the mask of real tokens.

    No special token is added except the start token of a tokenizer that uses one. The tensors
    are on the CPU.

    Raises:
        ModelError: no prompts, an empty one, a character the vocabulary lacks, or a tokenizer
            with neither pad nor end token.
    """
    if not prompts:
        raise ModelError("prompts: got none, expected at least one")
    prefix = prefix_ids(tokenizer)
    rows = [[*prefix, *ids] for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]
    unknown = _unknown_id(tokenizer)
    for prompt, row in zip(prompts, rows):
        if not row:
            raise ModelError("prompts: got an empty prompt, expected at least one token")
        if unknown is not None and unknown in row:
            raise ModelError(f"prompt {prompt!r}: holds characters the tokenizer does not know")
    length = max(map(len, rows))
    token_ids = torch.full((len(rows), length), _pad_id(tokenizer), dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        token_ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return token_ids, mask


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids that end a response: the end token and EVERY token whose text contains a stop string.

    A stop string that spans two tokens ends a row by id only when one token holds all of it;
    `decode_responses` cuts the text there in any case.

    Returns:
        Ids in ascending order.

    Raises:
        ModelError: no id ends a response, or an empty stop string.
    """
    if any(not text for text in stop):
        raise ModelError("stop: got an empty string, expected strings of at least one character")
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if stop:
        special = set(tokenizer.all_special_ids)
        ordinary = [index for index in range(len(tokenizer)) if index not in special]
        texts = tokenizer.batch_decode([[index] for index in ordinary])
        ends |= {i for i, text in zip(ordinary, texts) if any(s in text for s in stop)}
    if not ends:
        raise ModelError(f"stop: got {list(stop)!r}, but no token ends a response; name others")
    return tuple(sorted(ends))


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    response_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    stop: Sequence[str],
) -> list[str]:
    """Texts of the responses, up to the first stop string, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(response_ids.cpu(), response_mask.cpu())]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [_before_stop(text, stop) for text in texts]


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or the end token where there is none (padding is masked anyway)."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ModelError("tokenizer: has neither a pad token nor an end token; set one")


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of unknown text, unless it doubles as the start, end or pad token."""
    double = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in double else tokenizer.unk_token_id
