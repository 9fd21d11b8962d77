"""Token log-probs and entropy of responses, without materialising the logits.

For a Hugging Face causal LM only the hidden states of response positions (`hmpo.logprobs.states`)
meet the vocabulary projection, in blocks of `chunk` rows (`hmpo.logprobs.head`); the memory above
the model's own is one (chunk, V) buffer. Log-softmax runs in float32 (float64 for float64 models)
whatever the model's precision. A plain `nn.Module` that maps token ids (N, S) to logits (N, S, V)
is served as well; it is taken to be causal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.errors import ShapeError
from hmpo.logprobs.head import head_logprobs, logits_logprobs
from hmpo.logprobs.one_pass import OnePass, one_pass, one_pass_serves
from hmpo.logprobs.states import States, response_states, split_head
from hmpo.logprobs.tied import TiedGradient
from hmpo.models.evaluation import evaluating, evaluating_backward
from hmpo.models.policy import bare_policy, is_hugging_face


@dataclass(frozen=True, kw_only=True)
class ResponseLogprobs:
    """Log-probs and entropy of responses, 0 on padding.

    Example: four rows of at most 8 tokens through a Llama: `logprobs` (4, 8), `entropy` (4, 8),
    `packed` True.
    """

    logprobs: Float[Tensor, "N T"]
    """Natural log-probs of the response tokens."""
    entropy: Float[Tensor, "N T"]
    """Of the distribution at each of those tokens, in nats."""
    packed: bool
    """Whether the rows went through the model as one packed sequence."""


@dataclass(frozen=True, kw_only=True)
class ResponseLoss:
    """A loss over responses with what it was made from; only the loss carries a gradient."""

    loss: Float[Tensor, ""]
    logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    """As in `ResponseLogprobs`."""
    packed: bool
    """As in `ResponseLogprobs`."""


def token_logprobs(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    counted: Bool[Tensor, "N T"] | None = None,
) -> Float[Tensor, "N T"]:
    """Log-probs of the last `response_length` tokens of each row.

    Args:
        policy: a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
        input_ids: prompts (left-padded) followed by responses (right-padded).
        attention_mask: True on real tokens.
        response_length: T, the columns that hold the responses.
        temperature: logits are divided by it first.
        chunk: rows of one block of the vocabulary projection.
        counted: True on the response tokens that are asked for, where others stand between, as
            what an environment added to a conversation; those are read, and 0. None asks for all.

    Returns:
        Natural log-probs, differentiable, float32 (float64 for a float64 policy); 0 on padding.
        Dropout is off, in the backward pass too, and the policy's training flags are restored.

    Raises:
        ShapeError: a row without a token before its response, padding elsewhere than left of the
            prompts and right of the responses, no rows, or `counted` on padding.
        ModelError: a policy that cannot be taken apart, as the message says.
    """
    return _response_logprobs(
        policy,
        input_ids,
        attention_mask,
        response_length,
        temperature=temperature,
        chunk=chunk,
        counted=counted,
        with_entropy=False,
    ).logprobs


def token_logprobs_and_entropy(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    counted: Bool[Tensor, "N T"] | None = None,
) -> ResponseLogprobs:
    """`token_logprobs`, and the entropy in nats of the distribution at each of those tokens.

    Both are differentiable. Entropy is 0 on padding.
    """
    return _response_logprobs(
        policy,
        input_ids,
        attention_mask,
        response_length,
        temperature=temperature,
        chunk=chunk,
        counted=counted,
        with_entropy=True,
    )


def response_loss(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    loss_of: Callable[[Tensor, slice], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    counted: Bool[Tensor, "N T"] | None = None,
    entropy_weights: Float[Tensor, "N T"] | None = None,
) -> ResponseLoss:
    """A loss that is a sum over responses, in one pass over the vocabulary where that saves work.

    Args:
        policy: as in `token_logprobs`, and so are all others but this one:
        input_ids: token ids.
        attention_mask: True on real tokens.
        response_length: T.
        loss_of: (log-probs (m, T) of some rows, which rows) -> their part of the loss. It is
            called with any split of the rows, and the parts must add up to the whole.
        temperature: logits are divided by it first.
        chunk: rows of one block.
        counted: as in `token_logprobs`.
        entropy_weights: constants; the loss is less by the sum of each times the entropy at its
            token, gradient included. None for no such term.
    """
    policy = bare_policy(policy)
    lengths = _lengths(input_ids, attention_mask, response_length, counted)
    mask = attention_mask[:, -response_length:]
    with evaluating(policy):
        tied = _tied(policy, lengths, chunk)
        states = response_states(policy, input_ids, attention_mask, response_length, tied)
        states, mask = _asked(states, mask, counted)
        targets = input_ids[:, -response_length:][mask]
        weights = None if entropy_weights is None else entropy_weights[mask]
        options: dict[str, Any] = {"temperature": temperature, "chunk": chunk}
        options["entropy_weights"] = weights
        if states.split is not None and one_pass_serves(states.split.weight, lengths, chunk):
            result = _by_response(
                states, targets, mask, loss_of, lengths=lengths, tied=tied, **options
            )
        else:
            result = _all_then_loss(states, targets, mask, loss_of, **options)
    evaluating_backward(policy, result.loss)
    return ResponseLoss(
        loss=result.loss,
        logprobs=result.logprobs.detach(),
        entropy=result.entropy.detach(),
        packed=states.packed,
    )


def _by_response(
    states: States,
    targets: Tensor,
    mask: Tensor,
    loss_of: Callable[[Tensor, slice], Tensor],
    *,
    temperature: float,
    chunk: int,
    entropy_weights: Tensor | None,
    lengths: list[int],
    tied: TiedGradient | None,
) -> OnePass:
    """Loss, log-probs and entropy (N, T) from blocks of whole responses."""
    split = states.split
    assert split is not None, "one pass is through a vocabulary projection"

    def block_loss(values: Tensor, rows: slice) -> Tensor:
        return loss_of(_scattered(values, mask[rows]), rows)

    result = one_pass(
        states.values,
        split.weight,
        split.bias,
        targets,
        lengths,
        block_loss,
        temperature=temperature,
        softcap=split.softcap,
        chunk=chunk,
        entropy_weights=entropy_weights,
        tied=tied,
    )
    return OnePass(result.loss, _scattered(result.logprobs, mask), _scattered(result.entropy, mask))


def _all_then_loss(
    states: States,
    targets: Tensor,
    mask: Tensor,
    loss_of: Callable[[Tensor, slice], Tensor],
    *,
    temperature: float,
    chunk: int,
    entropy_weights: Tensor | None,
) -> OnePass:
    """Loss, log-probs and entropy (N, T), the loss of all log-probs at once."""
    picked, entropy = _of_states(states, targets, temperature=temperature, chunk=chunk)
    logprobs = _scattered(picked, mask)
    with torch.autocast(mask.device.type, enabled=False):
        loss = loss_of(logprobs, slice(0, len(mask)))
        if entropy_weights is not None:
            loss = loss - entropy_weights.to(entropy.dtype).dot(entropy)
    return OnePass(loss, logprobs, _scattered(entropy, mask))


def _response_logprobs(
    policy: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    *,
    temperature: float,
    chunk: int,
    counted: Tensor | None,
    with_entropy: bool,
) -> ResponseLogprobs:
    """Log-probs and entropy (N, T); NaN for an entropy that is not asked for."""
    policy = bare_policy(policy)
    _lengths(input_ids, attention_mask, response_length, counted)
    mask = attention_mask[:, -response_length:]
    with evaluating(policy):
        states = response_states(policy, input_ids, attention_mask, response_length)
        states, mask = _asked(states, mask, counted)
        targets = input_ids[:, -response_length:][mask]
        picked, entropy = _of_states(
            states, targets, temperature=temperature, chunk=chunk, with_entropy=with_entropy
        )
    logprobs, spread = _scattered(picked, mask), _scattered(entropy, mask)
    evaluating_backward(policy, logprobs, spread)
    return ResponseLogprobs(logprobs=logprobs, entropy=spread, packed=states.packed)


def _of_states(
    states: States,
    targets: Tensor,
    *,
    temperature: float,
    chunk: int,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (n,) of what `response_states` gave."""
    split = states.split
    if split is None:
        return logits_logprobs(states.values, targets, temperature)
    return head_logprobs(
        states.values,
        split.weight,
        split.bias,
        targets,
        temperature=temperature,
        softcap=split.softcap,
        chunk=chunk,
        with_entropy=with_entropy,
    )


def _tied(policy: nn.Module, lengths: list[int], chunk: int) -> TiedGradient | None:
    """Where the two gradients of a tied weight meet, if one pass will make that of the head."""
    split = split_head(policy) if is_hugging_face(policy) else None
    if split is None or not one_pass_serves(split.weight, lengths, chunk):
        return None
    return TiedGradient.of(split.base, split.weight)


def _asked(states: States, mask: Tensor, counted: Tensor | None) -> tuple[States, Tensor]:
    """The states of the tokens that are asked for, and where these are."""
    if counted is None:
        return states, mask
    return states._replace(values=states.values[counted[mask]]), counted


def _lengths(
    input_ids: Tensor, attention_mask: Tensor, response_length: int, counted: Tensor | None
) -> list[int]:
    """Tokens asked for in each row, where the rows are such that each has one that predicts it.

    Raises:
        ShapeError: they are not.
    """
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape or len(input_ids) == 0:
        raise ShapeError(
            f"input_ids, attention_mask: got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}, expected (N, S) twice with at least one row"
        )
    width = input_ids.shape[1]
    if not 0 < response_length < width:
        raise ShapeError(
            f"response_length: got {response_length}, expected 1 to {width - 1} "
            f"(input_ids has {width} columns and needs at least one prompt token)"
        )
    before, mask = attention_mask[:, :-response_length], attention_mask[:, -response_length:]
    lengths = mask.sum(1)
    odd = (lengths > 0) & ~before[:, -1] | (mask[:, 1:] > mask[:, :-1]).any(1)
    if counted is not None:
        if counted.shape != mask.shape or bool((counted & ~mask).any()):
            raise ShapeError(
                f"counted: got {tuple(counted.shape)}, or True on padding, expected "
                f"{tuple(mask.shape)} with True on real tokens behind the prompt"
            )
        lengths = counted.sum(1)
    found = torch.where(odd, -1, lengths).tolist()  # one wait for the device
    if min(found) < 0:
        raise ShapeError(
            f"attention_mask: got a response token without a token before it in row "
            f"{found.index(-1)}, expected prompts of at least one token that end where the "
            "responses start, padded on the left, and responses padded on the right"
        )
    return found


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Values (n,) at the places of a mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
