"""Token log-probs and entropy of responses, without materialising the logits.

For a Hugging Face causal LM only the hidden states of response positions meet the vocabulary
projection, in blocks of `chunk` rows; the blocks are computed again in the backward pass, so
the memory above the model's own is one (chunk, V) buffer. Log-softmax runs in float32 (float64
for float64 models) whatever the model's precision. A plain `nn.Module` that maps token ids
(N, S) to logits (N, S, V) is served as well; it is taken to be causal.

Shift: the token at position s is predicted by the hidden state at s - 1, so a response that
starts at P is scored from the states P - 1 .. P + T - 2.
"""

import contextlib
import inspect
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.errors import ModelError, ShapeError

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
    return token_logprobs_and_entropy(
        policy, input_ids, attention_mask, response_length, temperature=temperature, chunk=chunk
    )[0]


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
    width = input_ids.shape[1]
    if not 0 < response_length < width:
        raise ShapeError(
            f"response_length: got {response_length}, expected 1 to {width - 1} "
            f"(input_ids has {width} columns and needs at least one prompt token)"
        )
    mask = attention_mask[:, -response_length:]
    targets = input_ids[:, -response_length:][mask]
    with evaluating(policy):
        if not is_hugging_face(policy):
            logits = _plain_logits(policy, input_ids, attention_mask, response_length)
            picked, entropy = _from_logits(logits[mask], targets, temperature)
        elif (split := _split_head(policy)) is not None:
            base, head = split
            hidden = base(**_model_inputs(input_ids, attention_mask)).last_hidden_state
            hidden = hidden[:, -response_length - 1 : -1][mask]
            picked, entropy = _ChunkedLogprobs.apply(
                hidden, head.weight, head.bias, targets, temperature, chunk
            )
        else:
            inputs = _model_inputs(input_ids, attention_mask)
            if "logits_to_keep" in inspect.signature(unwrap(policy).forward).parameters:
                inputs["logits_to_keep"] = response_length + 1
            logits = policy(**inputs).logits[:, -response_length - 1 : -1]
            picked, entropy = _from_logits(logits[mask], targets, temperature)
    empty = picked.new_zeros(mask.shape)
    return empty.masked_scatter(mask, picked), empty.masked_scatter(mask, entropy)


def is_hugging_face(policy: nn.Module) -> bool:
    """Whether `policy` is a transformers model (or a peft wrapper of one)."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(unwrap(policy), transformers.PreTrainedModel)


def unwrap(policy: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper, or `policy` itself."""
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        return policy.get_base_model()
    return policy


@contextlib.contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Dropout off for the block; every module's training flag is restored after it.

    Where gradients are on, layers under gradient checkpointing keep their own flag (transformers
    checkpoints only in training mode); the modules inside them are in evaluation mode.
    """
    modules = list(policy.modules())
    flags = [module.training for module in modules]
    policy.eval()
    if torch.is_grad_enabled():
        for module, training in zip(modules, flags):
            if training and getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
    try:
        yield
    finally:
        for module, training in zip(modules, flags):
            module.training = training


def position_ids(attention_mask: Bool[Tensor, "N S"]) -> Int[Tensor, "N S"]:
    """Positions that count real tokens only, so that padding changes nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def _model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, object]:
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "position_ids": position_ids(attention_mask),
        "use_cache": False,
    }


def _split_head(policy: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """(decoder, vocabulary projection) where logits are exactly that projection, else None.

    Models that scale, cap or adapt their logits are told apart by one comparison on two
    tokens, made once for each policy.
    """
    core: Any = unwrap(policy)  # a transformers model, see `is_hugging_face`
    head, base = core.get_output_embeddings(), core.base_model
    if type(head) is not nn.Linear or base is core:
        return None
    if policy not in _PLAIN_HEAD:
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        inputs = _model_inputs(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad(), evaluating(policy):
            whole = policy(**inputs).logits
            parts = head(base(**inputs).last_hidden_state)
        _PLAIN_HEAD[policy] = torch.equal(whole, parts)
    return (base, head) if _PLAIN_HEAD[policy] else None


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


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _from_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = functional.log_softmax(_upcast(logits) / temperature, dim=-1)
    # exp(logp) * logp is 0 * -inf for tokens that a model rules out by -inf logits.
    terms = torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0)
    return logprobs.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


class _ChunkedLogprobs(torch.autograd.Function):
    """hidden (n, H), weight (V, H), targets (n,) -> log-probs (n,), entropy (n,).

    The gradient of the logits z of one row, with g and h the incoming gradients of log-prob
    and entropy H:  dz = (g (1[v = y] - p_v) - h p_v (log p_v + H)) / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk):  # type: ignore[override]
        device = hidden.device.type
        compute = weight.dtype
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        kind = torch.float64 if compute == torch.float64 else torch.float32
        picked = torch.empty(len(targets), dtype=kind, device=hidden.device)
        entropy, lse = torch.empty_like(picked), torch.empty_like(picked)
        with torch.autocast(device, enabled=False):
            cast, offset = weight.to(compute), None if bias is None else bias.to(compute)
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                logits = _upcast(functional.linear(hidden[rows].to(compute), cast, offset))
                logits /= temperature
                lse[rows] = logits.logsumexp(-1)
                picked[rows] = logits.gather(1, targets[rows, None])[:, 0] - lse[rows]
                logits -= lse[rows, None]
                entropy[rows] = -(logits.exp() * logits.clamp_min(torch.finfo(kind).min)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.temperature, ctx.chunk, ctx.compute = temperature, chunk, compute
        return picked, entropy

    @staticmethod
    def backward(ctx, grad_picked, grad_entropy):  # type: ignore[override]
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        compute, chunk = ctx.compute, ctx.chunk
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        d_bias = torch.zeros(len(weight), dtype=lse.dtype, device=weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            cast, offset = weight.to(compute), None if bias is None else bias.to(compute)
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                block = hidden[rows].to(compute)
                logprobs = _upcast(functional.linear(block, cast, offset)) / ctx.temperature
                logprobs -= lse[rows, None]
                gradient = logprobs.exp()
                logprobs.clamp_(min=torch.finfo(lse.dtype).min)
                logprobs += entropy[rows, None]
                scale = grad_picked[rows, None] + grad_entropy[rows, None] * logprobs
                gradient *= -scale
                gradient.scatter_add_(1, targets[rows, None], grad_picked[rows, None])
                gradient /= ctx.temperature
                narrow = gradient.to(compute)
                if d_hidden is not None:
                    d_hidden[rows] = (narrow @ cast).to(hidden.dtype)
                if need_weight:
                    d_weight += (narrow.T @ block).to(lse.dtype)
                if need_bias and bias is not None:
                    d_bias += gradient.sum(0)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if need_weight else None,
            d_bias.to(bias.dtype) if need_bias and bias is not None else None,
            None,
            None,
            None,
        )
