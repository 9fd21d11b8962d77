"""Token log-probs and entropy of responses, without materialising the logits.

For a Hugging Face causal LM only the hidden states of response positions meet the vocabulary
projection, in blocks of `chunk` rows (`hmpo.logprobs.head`); the memory above the model's own is
one (chunk, V) buffer. Log-softmax runs in float32 (float64 for float64 models) whatever the model's
precision. A plain `nn.Module` that maps token ids (N, S) to logits (N, S, V) is served as well; it
is taken to be causal.

Shift: the token at position s is predicted by the hidden state at s - 1, so a response that
starts at P is scored from the states P - 1 .. P + T - 2.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.attention.packed import can_pack, model_inputs, note, pick, window
from hmpo.attention.packing import cut, pack
from hmpo.errors import ModelError, ShapeError
from hmpo.logprobs.head import head_logprobs, logits_logprobs
from hmpo.logprobs.one_pass import one_pass, one_pass_serves
from hmpo.logprobs.tied import TiedGradient
from hmpo.models.policy import evaluating, is_hugging_face, position_ids, unwrap

PASS_TOKENS = 256
"""Tokens that cost as much time as one more pass through a model."""


class Projection(NamedTuple):
    """A model taken apart at its vocabulary projection."""

    base: nn.Module
    """From token ids to hidden states."""
    head: nn.Linear
    softcap: float | None
    """c of c tanh(logits / c), or None."""

    @property
    def weight(self) -> Tensor:
        """(V, H)."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,), or None."""
        return self.head.bias


_PLAIN_HEAD: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def token_logprobs(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Float[Tensor, "N T"]:
    """Log-probs of the last `response_length` tokens of each row.

    Args:
        policy: a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
        input_ids: prompts (left-padded) followed by responses (right-padded).
        attention_mask: True on real tokens.
        response_length: T, the columns that hold the responses.
        temperature: logits are divided by it first.
        chunk: rows of one block of the vocabulary projection.

    Returns:
        Natural log-probs, differentiable, float32 (float64 for a float64 policy); 0 on padding.
        Dropout is off, and the policy's training flags are restored.
    """
    inputs = (policy, input_ids, attention_mask, response_length)
    return _values(*inputs, temperature, chunk, with_entropy=False)[0]


def token_logprobs_and_entropy(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """`token_logprobs`, and the entropy in nats of the distribution at each of those tokens.

    Both are differentiable. Entropy is 0 on padding.
    """
    inputs = (policy, input_ids, attention_mask, response_length)
    return _values(*inputs, temperature, chunk)


def response_loss(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    loss_of: Callable[[Tensor, slice], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """A loss that is a sum over responses, in one pass over the vocabulary where that saves work.

    Args:
        policy: as in `token_logprobs`.
        input_ids: as there.
        attention_mask: as there.
        response_length: as there.
        loss_of: (log-probs (m, T) of some rows, which rows) -> their part of the loss. It is
            called with any split of the rows, and the parts must add up to the whole.
        temperature: as there.
        chunk: as there.

    Returns:
        (loss, log-probs, entropy). Only the loss carries a gradient.
    """
    inputs = (policy, input_ids, attention_mask, response_length)
    mask = attention_mask[:, -response_length:]
    lengths = mask.sum(1).tolist()
    with evaluating(policy):
        tied = _tied(policy, lengths, chunk)
        targets, states, head = _targets_and_states(*inputs, tied)
        if head is not None and one_pass_serves(head.weight, lengths, chunk):

            def block_loss(values: Tensor, rows: slice) -> Tensor:
                return loss_of(_scattered(values, mask[rows]), rows)

            options = {"temperature": temperature, "softcap": head.softcap, "chunk": chunk}
            found = one_pass(
                states, head.weight, head.bias, targets, lengths, block_loss, tied=tied, **options
            )
            return found.loss, _scattered(found.logprobs, mask), _scattered(found.entropy, mask)
        picked, entropy = _of_states(states, head, targets, temperature, chunk)
    logprobs = _scattered(picked, mask)
    with torch.autocast(mask.device.type, enabled=False):
        loss = loss_of(logprobs, slice(0, len(mask)))
    return loss, logprobs.detach(), _scattered(entropy, mask).detach()


def _values(
    policy: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    temperature: float,
    chunk: int,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (N, T)."""
    mask = attention_mask[:, -response_length:]
    with evaluating(policy):
        inputs = (policy, input_ids, attention_mask, response_length)
        targets, states, head = _targets_and_states(*inputs)
        picked, entropy = _of_states(states, head, targets, temperature, chunk, with_entropy)
    return _scattered(picked, mask), _scattered(entropy, mask)


def _of_states(
    states: Tensor,
    head: Projection | None,
    targets: Tensor,
    temperature: float,
    chunk: int,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (n,) of what `response_states` gave."""
    if head is None:
        return logits_logprobs(states, targets, temperature)
    return head_logprobs(
        states,
        head.weight,
        head.bias,
        targets,
        temperature=temperature,
        softcap=head.softcap,
        chunk=chunk,
        with_entropy=with_entropy,
    )


def _tied(policy: nn.Module, lengths: list[int], chunk: int) -> TiedGradient | None:
    """Where the two gradients of a tied weight meet, if one pass will make that of the head."""
    split = _split_head(policy) if is_hugging_face(policy) else None
    if split is None or not one_pass_serves(split.weight, lengths, chunk):
        return None
    return TiedGradient.of(split.base, split.weight)


def _targets_and_states(
    policy: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    tied: TiedGradient | None = None,
) -> tuple[Tensor, Tensor, Projection | None]:
    """Response tokens (n,) and `response_states`."""
    width = input_ids.shape[1]
    if not 0 < response_length < width:
        raise ShapeError(
            f"response_length: got {response_length}, expected 1 to {width - 1} "
            f"(input_ids has {width} columns and needs at least one prompt token)"
        )
    targets = input_ids[:, -response_length:][attention_mask[:, -response_length:]]
    return targets, *response_states(policy, input_ids, attention_mask, response_length, tied)


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    """Values (n,) at the places of a mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def response_states(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    tied: TiedGradient | None = None,
) -> tuple[Float[Tensor, "n _"], Projection | None]:
    """What predicts each response token, in order of rows.

    The rows go through the model as one packed sequence (`hmpo.attention.packing`) where the model
    can be packed, else padded in parts of like length. To be called in evaluation mode.

    Returns:
        (hidden states (n, H), vocabulary projection), or (logits (n, V), None) where logits are
        more than that projection.
    """
    if not is_hugging_face(policy):
        run = functools.partial(_plain_logits, policy)
        return _padded(run, input_ids, attention_mask, response_length), None
    core, split = unwrap(policy), _split_head(policy)
    keeps = "logits_to_keep" in inspect.signature(core.forward).parameters
    if (split is not None or keeps) and can_pack(policy, core):
        packed = pack(input_ids, attention_mask, response_length)
        if packed is not None and packed.longest <= window(core):
            note(policy, True)
            if split is None:
                inputs = model_inputs(packed) | {"logits_to_keep": packed.predictors}
                return policy(**inputs).logits[0], None
            inputs = model_inputs(packed)
            if tied is not None:
                inputs["inputs_embeds"] = tied.embed(inputs.pop("input_ids"))
            return pick(packed, split.base(**inputs).last_hidden_state[0]), split
    note(policy, False)
    run = functools.partial(_padded_states, policy, split, keeps)
    hidden = _padded(run, input_ids, attention_mask, response_length)
    return hidden, split


def _padded(
    run: Callable[[Tensor, Tensor, int], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
) -> Tensor:
    """Rows of `run` (M, S), (M, S), T -> (M, T, C) at response tokens, in parts of like length."""
    mask = attention_mask[:, -response_length:]
    sizes = attention_mask.sum(1).tolist()
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    parts = cut([sizes[i] for i in order], PASS_TOKENS)
    if len(parts) == 1:
        return run(input_ids, attention_mask, response_length)[mask]
    states, places, start = [], torch.zeros_like(mask, dtype=torch.long), 0
    for part in parts:
        rows = torch.tensor(order[part], device=mask.device)
        ids, seen = input_ids[rows], attention_mask[rows]
        left = int(seen[:, :-response_length].any(0).long().argmax())
        length = max(1, int(mask[rows].any(0).sum()))
        right = ids.shape[1] - response_length + length
        ids, seen = ids[:, left:right], seen[:, left:right]
        inner = mask[rows]
        states.append(run(ids, seen, length)[inner[:, :length]])
        numbers = start + inner.flatten().long().cumsum(0).view(inner.shape) - 1
        places[rows] = numbers
        start += len(states[-1])
    return torch.cat(states).index_select(0, places[mask])


def _padded_states(
    policy: nn.Module,
    split: Projection | None,
    keeps: bool,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
) -> Tensor:
    """Hidden states (M, T, H) or logits (M, T, V) that predict the response columns."""
    inputs = _model_inputs(input_ids, attention_mask)
    if split is not None:
        return split.base(**inputs).last_hidden_state[:, -response_length - 1 : -1]
    if keeps:
        inputs["logits_to_keep"] = response_length + 1
    return policy(**inputs).logits[:, -response_length - 1 : -1]


def _model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, object]:
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "position_ids": position_ids(attention_mask),
        "use_cache": False,
    }


def _split_head(policy: nn.Module) -> Projection | None:
    """Decoder and vocabulary projection where logits are exactly that, softcapped or not.

    Models that scale or adapt their logits are told apart by one comparison on two tokens, made
    once for each policy; they go through whole logits.

    Raises:
        ModelError: a peft adapter sits on the projection.
    """
    core: Any = unwrap(policy)  # a transformers model, see `is_hugging_face`
    head, base = core.get_output_embeddings(), core.base_model
    if type(head) is not nn.Linear or base is core:
        _refuse_adapter(head)
        return None
    softcap = getattr(core.config.get_text_config(), "final_logit_softcapping", None)
    if policy not in _PLAIN_HEAD:
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        inputs = _model_inputs(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad(), evaluating(policy):
            whole = policy(**inputs).logits
            parts = head(base(**inputs).last_hidden_state)
        capped = parts if softcap is None else softcap * torch.tanh(parts / softcap)
        _PLAIN_HEAD[policy] = torch.equal(whole, capped)
    return Projection(base, head, softcap) if _PLAIN_HEAD[policy] else None


def _refuse_adapter(head: Any) -> None:
    """An error for a projection with a tuner's layers, whose weight alone is not what it does."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        raise ModelError(
            f"vocabulary projection: got peft's {type(head).__module__}.{type(head).__name__}, "
            "expected a plain linear layer, whose products with the vocabulary are taken in "
            "blocks; leave the output embeddings (lm_head) out of target_modules, or train "
            "them as a whole with modules_to_save"
        )


def _plain_logits(
    policy: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int
) -> Float[Tensor, "N T V"]:
    """Response logits of a module without an attention mask: rows are moved to the left edge."""
    order = (~attention_mask).to(torch.int8).argsort(dim=1, stable=True)
    logits = policy(input_ids.gather(1, order))
    if not isinstance(logits, Tensor) or logits.shape[:2] != input_ids.shape:
        received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"policy returned {received}, expected logits of shape "
            f"({input_ids.shape[0]}, {input_ids.shape[1]}, vocabulary)"
        )
    prompts = attention_mask[:, :-response_length].sum(1, keepdim=True)
    steps = torch.arange(response_length, device=input_ids.device)
    where = (prompts - 1 + steps).clamp_max(input_ids.shape[1] - 1)
    return logits.gather(1, where[:, :, None].expand(-1, -1, logits.shape[2]))
