"""From hidden states and the vocabulary projection to token log-probs and entropy.

The logits of `chunk` rows at a time meet memory, and are computed again in the backward pass.
Log-softmax runs in float32 (float64 for float64 weights) whatever the precision of the product.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def head_logprobs(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    with_entropy: bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets and entropy, without materialising the (n, V) logits.

    Args:
        hidden: what the projection reads, one row for each target.
        weight: the projection; logits are `hidden @ weight.T + bias`.
        bias: of the projection, or None.
        targets: token ids.
        temperature: logits are divided by it first.
        chunk: the most rows whose logits are in memory together.
        with_entropy: False where nobody asks for the entropy; what comes in its place is
            unspecified.

    Returns:
        (log-probs, entropy), in nats, differentiable, float32 (float64 for float64 weights).
        Under autocast the product runs in the autocast's precision.
    """
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


def logits_logprobs(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`head_logprobs` of logits that are there already, by autograd."""
    logprobs = functional.log_softmax(_upcast(logits) / temperature, dim=-1)
    # exp(logp) * logp is 0 * -inf for tokens that a model rules out by -inf logits.
    terms = torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0)
    return logprobs.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
