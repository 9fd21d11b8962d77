"""Between text and token ids: left-padded prompts, stop tokens, decoded responses."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hmpo.attention.embedding import input_embedding
from hmpo.errors import ModelError
from hmpo.models.policy import is_hugging_face, unwrap

_of_source: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()
"""By tokenizer of a loaded policy: end tokens that the model beside it names."""
ANCHOR = "0"
"""Text that other text is put beside, to see what it becomes in company."""


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: a start token, several, or nothing.

    `tiny-sort` and most Llamas use one, SmolLM2 none, ChatGLM two.
    """
    whole = list(tokenizer(ANCHOR).input_ids)
    bare = list(tokenizer(ANCHOR, add_special_tokens=False).input_ids)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Token ids of the prompts, left-padded to the longest, and the mask of real tokens.

    No special token is added but what the tokenizer itself puts before a text, and that only
    where the prompt does not begin with it (a rendered chat template often does). The tensors are
    on the CPU.

    Raises:
        ModelError: no prompts, an empty one, a lone surrogate, a character that the vocabulary
            lacks, or a tokenizer with neither pad nor end token.
    """
    return left_padded(text_rows(tokenizer, prompts), pad_token_id(tokenizer))


def text_rows(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, without padding; see `encode_prompts`."""
    if not prompts:
        raise ModelError("prompts: got none, expected at least one")
    for prompt in prompts:
        _check_text(prompt)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError("tokenizer: has neither a pad token nor an end token; set one")
    prefix, unknown = prefix_ids(tokenizer), unknown_id(tokenizer)
    rows = []
    for prompt, ids in zip(
        prompts, tokenizer(list(prompts), add_special_tokens=False).input_ids, strict=True
    ):
        row = [*prefix, *ids] if list(ids[: len(prefix)]) != prefix else list(ids)
        if not row:
            raise ModelError("prompts: got an empty prompt, expected at least one token")
        if unknown is not None and unknown in row:
            raise ModelError(f"prompt {prompt!r}: holds characters the tokenizer does not know")
        rows.append(row)
    return rows


def left_padded(
    rows: Sequence[Sequence[int]], pad: int
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Rows of token ids as one tensor, padding before them, and the mask of real tokens."""
    length = max(map(len, rows))
    token_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        token_ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = True
    return token_ids, mask


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    stop: Sequence[str],
    model: nn.Module | None = None,
) -> tuple[int, ...]:
    """Ids that end a response: the end tokens and EVERY token whose text contains a stop string.

    End tokens are those of the tokenizer and of the model's generation_config and config, as
    transformers' `generate` has it: a chat model often ends its turn with another token than the
    tokenizer's. The model is `model`, and that which `load_policy` loaded with the tokenizer. A
    stop string that is a special token is its id. A token's text is what it adds behind other
    text; a stop string that spans two tokens ends a row by `StopStrings`, and `decode_responses`
    cuts the text there in any case.

    Returns:
        Ids in ascending order.

    Raises:
        ModelError: no id ends a response, or an empty stop string.
    """
    if any(not text for text in stop):
        raise ModelError("stop: got an empty string, expected strings of at least one character")
    ends = set(end_token_ids(tokenizer, model))
    if stop and tokenizer is not None:
        special = special_tokens(tokenizer)
        ends |= {index for index, text in special.items() if text in stop}
        ordinary = [index for index in range(len(tokenizer)) if index not in special]
        texts = _texts_behind(tokenizer, ordinary)
        ends |= {i for i, text in zip(ordinary, texts) if any(s in text for s in stop)}
    if not ends:
        raise ModelError(f"stop: got {list(stop)!r}, but no token ends a response; name others")
    return tuple(sorted(ends))


def end_token_ids(tokenizer: Any, model: nn.Module | None = None) -> tuple[int, ...]:
    """End tokens of the tokenizer and of the model's own settings, those of its vocabulary.

    Args:
        tokenizer: or None.
        model: a transformers model; any other module names none.
    """
    found = [getattr(tokenizer, "eos_token_id", None)]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        found += _of_source.get(tokenizer, ())
    rows = None
    if model is not None and is_hugging_face(model):
        core: Any = unwrap(model)
        generation = getattr(core, "generation_config", None)
        found += [getattr(generation, "eos_token_id", None)]
        found += [getattr(_text_config(model), "eos_token_id", None)]
        rows = vocabulary_size(model)
    ids = [i for item in found for i in (item if isinstance(item, list | tuple) else [item])]
    named = {int(i) for i in ids if i is not None}
    return tuple(sorted(i for i in named if i >= 0 and (rows is None or i < rows)))


def remember_end_tokens(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Let `stop_token_ids` of this tokenizer know what the model loaded with it names."""
    _of_source[tokenizer] = end_token_ids(None, model)


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    response_ids: Int[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    stop: Sequence[str],
) -> list[str]:
    """Texts of the responses, up to the first stop string, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(response_ids.cpu(), response_mask.cpu())]
    special = special_tokens(tokenizer)
    plain, mixed = parted_stop(stop, special.values())
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    if mixed:
        kept = tokenizer.batch_decode(rows, skip_special_tokens=False)
        for index, text in enumerate(kept):
            begin = _before_stop(text, mixed)
            if begin != text:
                for name in special.values():
                    begin = begin.replace(name, "")
                texts[index] = begin
    return [_before_stop(text, plain) for text in texts]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By id the text of every token that decoding may skip."""
    ids = set(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids |= {index for index, token in added.items() if token.special}
    return {index: tokenizer.decode([index]) for index in sorted(ids) if index is not None}


def parted_stop(
    stop: Sequence[str], special: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stop strings of plain text, and those that hold a special token."""
    names = [name for name in special if name]
    mixed = tuple(text for text in stop if any(name in text for name in names))
    return tuple(text for text in stop if text not in mixed), mixed


def pad_token_id(tokenizer: Any, model: nn.Module | None = None) -> int:
    """What fills padding, which is masked anyway: the pad token, else the end token, else 0."""
    sources = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    if model is not None and is_hugging_face(model):
        sources.append(getattr(_text_config(model), "pad_token_id", None))
    for candidate in sources:
        if isinstance(candidate, int) and candidate >= 0:
            return candidate
    return 0


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of a transformers model's embedding; None for any other module."""
    embedding = input_embedding(unwrap(model)) if is_hugging_face(model) else None
    return getattr(embedding, "num_embeddings", None)


def _text_config(model: nn.Module) -> Any:
    core: Any = unwrap(model)
    return core.config.get_text_config()


def _texts_behind(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text before it.

    Alone a token may read otherwise: WordPiece shows its "##", sentencepiece drops a blank.
    """
    anchor = list(tokenizer(ANCHOR, add_special_tokens=False).input_ids)
    before = str(tokenizer.decode(anchor))
    texts = list(map(str, tokenizer.batch_decode([[*anchor, index] for index in ids])))
    return [
        text[len(before) :] if text.startswith(before) else str(tokenizer.decode([index]))
        for index, text in zip(ids, texts)
    ]


def _check_text(prompt: Any) -> None:
    """Refuse what no tokenizer can read."""
    if not isinstance(prompt, str):
        raise ModelError(f"prompt {prompt!r}: got {type(prompt).__name__}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ModelError(
            f"prompt {prompt!a}: holds a lone surrogate, which is no character; remove it"
        )


def _before_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    ends = [text.find(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of unknown text, unless it doubles as the start, end or pad token."""
    double = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in double else tokenizer.unk_token_id
