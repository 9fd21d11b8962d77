"""What predicts each response token: hidden states of a model, packed or padded.

A Hugging Face causal LM is taken apart at its vocabulary projection, so that the hidden states of
response positions alone meet it (`hmpo.logprobs.head`); one whose logits are more than that
projection gives logits instead, and so does a plain `nn.Module` that maps token ids (N, S) to
logits (N, S, V), which is taken to be causal.

Shift: the token at position s is predicted by the hidden state at s - 1, so a response that
starts at P is scored from the states P - 1 .. P + T - 2.
"""

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.attention.packed import pick
from hmpo.attention.packing import cut, pack
from hmpo.attention.packing_check import can_pack, model_inputs, window
from hmpo.attention.tap import not_recorded
from hmpo.errors import ModelError
from hmpo.logprobs.tied import TiedGradient
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import embeddable, is_hugging_face, unwrap
from hmpo.models.probe import masked_inputs, policy_facts, refuse_length
from hmpo.ranks.shard import shards_of

PASS_TOKENS = 256
"""Tokens that cost as much time as one more pass through a model."""


class SplitModel(NamedTuple):
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


class States(NamedTuple):
    """What predicts each response token, in order of rows."""

    values: Float[Tensor, "n _"]
    """Hidden states (n, H), or logits (n, V) where logits are more than the projection."""
    split: SplitModel | None
    """What turns hidden states into logits; None where `values` are logits."""
    packed: bool
    """Whether the rows went through the model as one packed sequence."""


_is_projection: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""By policy: are its logits its projection of the hidden states, and nothing more?"""


def response_states(
    policy: nn.Module,
    input_ids: Int[Tensor, "N S"],
    attention_mask: Bool[Tensor, "N S"],
    response_length: int,
    tied: TiedGradient | None = None,
) -> States:
    """What predicts each response token, in order of rows.

    The rows go through the model as one packed sequence (`hmpo.attention.packing`) where the model
    can be packed, else padded in parts of like length. To be called in evaluation mode.

    Args:
        policy: as in `token_logprobs`.
        input_ids: as there.
        attention_mask: as there.
        response_length: as there.
        tied: embeds the tokens of packed rows, where the weight is the projection's too.
    """
    input_ids = embeddable(policy, input_ids, attention_mask)
    at_once = shards_of(policy) is not None
    if not is_hugging_face(policy):
        run = functools.partial(_plain_logits, policy)
        logits = _padded(run, input_ids, attention_mask, response_length, at_once=at_once)
        return States(logits, None, packed=False)
    core, split = unwrap(policy), split_head(policy)
    facts = policy_facts(policy)
    if facts.one_rope is not None:
        longest = int(attention_mask.sum(1).max())
        refuse_length(policy, longest, f"row of {longest} tokens")
    keeps = "logits_to_keep" in inspect.signature(core.forward).parameters
    if (split is not None or keeps) and facts.positions and can_pack(policy, core):
        packed = pack(input_ids, attention_mask, response_length)
        if packed is not None and packed.longest <= window(core):
            if split is None:
                inputs = model_inputs(core, packed) | {"logits_to_keep": packed.predictors}
                return States(policy(**inputs).logits[0], None, packed=True)
            with contextlib.nullcontext() if tied is None else tied.embedding():
                hidden = split.base(**model_inputs(core, packed)).last_hidden_state[0]
            hidden = pick(packed, hidden)
            return States(hidden, split, packed=True)
    run = functools.partial(_padded_states, policy, split, keeps)
    values = _padded(run, input_ids, attention_mask, response_length, at_once=at_once)
    return States(values, split, packed=False)


def _padded(
    run: Callable[[Tensor, Tensor, int], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    *,
    at_once: bool,
) -> Tensor:
    """Rows of `run` (M, S), (M, S), T -> (M, T, C) at response tokens, in parts of like length.

    At once where weights are gathered by all ranks for each pass, which makes one of any rows.
    """
    mask = attention_mask[:, -response_length:]
    sizes = attention_mask.sum(1).tolist()
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    parts = cut([sizes[i] for i in order], PASS_TOKENS)
    if at_once or len(parts) == 1:
        return run(input_ids, attention_mask, response_length)[mask]
    states, places, start = [], torch.zeros_like(mask, dtype=torch.long), 0
    for part in parts:
        rows = torch.tensor(order[part], device=mask.device)
        ids, real = input_ids[rows], attention_mask[rows]
        left = int(real[:, :-response_length].any(0).long().argmax())
        length = max(1, int(mask[rows].any(0).sum()))
        right = ids.shape[1] - response_length + length
        ids, real = ids[:, left:right], real[:, left:right]
        response = mask[rows]
        states.append(run(ids, real, length)[response[:, :length]])
        numbers = start + response.flatten().long().cumsum(0).view(response.shape) - 1
        places[rows] = numbers
        start += len(states[-1])
    return torch.cat(states).index_select(0, places[mask])


def _padded_states(
    policy: nn.Module,
    split: SplitModel | None,
    keeps: bool,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
) -> Tensor:
    """Hidden states (M, T, H) or logits (M, T, V) that predict the response columns."""
    facts = policy_facts(policy)
    if not facts.left_padding:
        return _moved_left(policy, split, input_ids, attention_mask, response_length)
    inputs = _model_inputs(input_ids, attention_mask, facts.positions)
    if split is not None:
        return split.base(**inputs).last_hidden_state[:, -response_length - 1 : -1]
    if keeps:
        inputs["logits_to_keep"] = response_length + 1
    return policy(**inputs).logits[:, -response_length - 1 : -1]


def _moved_left(
    policy: nn.Module,
    split: SplitModel | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
) -> Tensor:
    """`_padded_states` of a model that padding before a row disturbs: the rows begin at 0."""
    facts = policy_facts(policy)
    order = (~attention_mask).to(torch.int8).argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        inputs = _model_inputs(ids, mask, facts.positions)
        return policy(**inputs).logits if split is None else split.base(**inputs).last_hidden_state

    if facts.right_padding:
        values = run(ids, mask)
    else:  # each row alone
        lengths, parts = mask.sum(1).tolist(), []
        for row, length in enumerate(lengths):
            part = run(ids[row : row + 1, :length], mask[row : row + 1, :length])
            parts.append(functional.pad(part, (0, 0, 0, ids.shape[1] - length)))
        values = torch.cat(parts)
    return at_responses(values, attention_mask, response_length)


def _model_inputs(
    input_ids: Tensor, attention_mask: Tensor, positions: bool = True
) -> dict[str, object]:
    masked = masked_inputs(attention_mask, positions=positions)
    return {"input_ids": input_ids, **masked, "use_cache": False}


def at_responses(
    values: Float[Tensor, "N S C"], attention_mask: Bool[Tensor, "N S"], response_length: int
) -> Float[Tensor, "N T C"]:
    """Of rows that were moved to the left edge, what predicts each response column.

    Args:
        values: states or logits of the moved rows.
        attention_mask: of the rows as they were.
        response_length: T, the columns that hold the responses there.
    """
    prompts = attention_mask[:, :-response_length].sum(1, keepdim=True)
    steps = torch.arange(response_length, device=values.device)
    where = (prompts - 1 + steps).clamp(0, values.shape[1] - 1)
    return values.gather(1, where[:, :, None].expand(-1, -1, values.shape[2]))


def split_head(policy: nn.Module) -> SplitModel | None:
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
    if policy not in _is_projection:
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        inputs = _model_inputs(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad(), evaluating(policy), not_recorded():
            whole = policy(**inputs).logits
            hidden = base(**inputs).last_hidden_state
            fits = hidden.shape[-1] == head.in_features  # else something widens it, as in RemBERT
            parts = head(hidden) if fits else torch.empty(0)
        capped = parts if softcap is None else softcap * torch.tanh(parts / softcap)
        _is_projection[policy] = torch.equal(whole, capped)
    return SplitModel(base, head, softcap) if _is_projection[policy] else None


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
    return at_responses(logits, attention_mask, response_length)
