"""A loss and its gradient in one pass over the vocabulary, where responses do not look at others.

A loss that couples tokens only within a response (every member of the family, once the counts it
is divided by are known) is a sum over blocks of whole responses. Such a block knows the gradient
of its own log-probs as soon as it has them, so its logits turn into their gradient on the spot:
three products with the projection, where a loss that waits for all log-probs needs a fourth to
compute the logits again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmpo.errors import ShapeError
from hmpo.logprobs.fold import statistics_dtype
from hmpo.logprobs.head import block_rows, compute_dtype, limits
from hmpo.logprobs.schemes import BackwardRows, Gradients, Head, Plan, compacted
from hmpo.logprobs.tied import TiedGradient

BlockLoss = Callable[[Tensor, slice], Tensor]
"""(log-probs (m,) of the tokens of some responses, which responses) -> their part of the loss."""


class OnePass(NamedTuple):
    """What one pass over the vocabulary gives."""

    loss: Float[Tensor, ""]
    """The sum over all blocks; carries the gradient."""
    logprobs: Float[Tensor, " n"]
    """Detached: a term added to the loss outside its blocks would have no gradient."""
    entropy: Float[Tensor, " n"]
    """Detached; NaN where it was not asked for."""


def one_pass(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    lengths: Sequence[int],
    loss_of: BlockLoss,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 512,
    with_entropy: bool = True,
    entropy_weights: Float[Tensor, " n"] | None = None,
    tied: TiedGradient | None = None,
) -> OnePass:
    """Loss, log-probs and entropy of responses whose hidden states follow each other.

    Args:
        hidden: what the projection reads, one row for each target, response after response.
        weight: the projection; logits are `hidden @ weight.T + bias`.
        bias: of the projection, or None.
        targets: token ids.
        lengths: tokens of each response; 0 is allowed.
        loss_of: the part of the loss of some responses, differentiable in their log-probs; the
            parts must add up to the whole.
        temperature: logits are divided by it, after the softcap.
        softcap: c of a model whose logits are c tanh(logits / c), or None.
        chunk: as in `head_logprobs`, unless a single response has more rows.
        with_entropy: False saves its part where nobody asks for it.
        entropy_weights: constants; the loss is less by the sum of each times the entropy of its
            row, gradient included. None, or without entropy: no such term.
        tied: takes the projection's gradient, where an `embed` of its own is sure to hand it on;
            elsewhere autograd adds the two.

    Raises:
        ShapeError: the lengths do not add up to the rows.
    """
    if sum(lengths) != len(targets):
        raise ShapeError(
            f"lengths: got a sum of {sum(lengths)}, expected {len(targets)}, one for each target"
        )
    plan = Plan(
        rows=block_rows(weight, chunk),
        temperature=temperature,
        softcap=softcap,
        with_entropy=with_entropy,
        compute=compute_dtype(weight),
    )
    inputs = _Inputs(
        lengths=lengths,
        groups=whole_responses(lengths, plan.rows),
        loss_of=loss_of,
        plan=plan,
        tied=tied,
        entropy_weights=entropy_weights if with_entropy else None,
        differentiate=torch.is_grad_enabled(),
    )
    return OnePass(*_OnePass.apply(hidden, weight, bias, targets, inputs))


def one_pass_serves(weight: Float[Tensor, "V H"], lengths: Sequence[int], chunk: int) -> bool:
    """Whether one pass saves a product and its blocks fit.

    Where the logits may be kept (`hmpo.logprobs.head.STORE`), or no gradient is taken, it saves
    nothing. A response is too long if it has more than twice the rows of a block: blocks that end
    anywhere need less memory.
    """
    row = len(weight) * compute_dtype(weight).itemsize
    fits = max(lengths, default=0) <= 2 * block_rows(weight, chunk)
    return torch.is_grad_enabled() and fits and sum(lengths) * row > limits(weight.device).store


def whole_responses(lengths: Sequence[int], rows: int) -> list[slice]:
    """Slices of adjacent responses with at most `rows` tokens, or with a single response."""
    groups, start, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and tokens + length > rows:
            groups.append(slice(start, i))
            start, tokens = i, 0
        tokens += length
    return [*groups, slice(start, len(lengths))] if lengths else []


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What `_OnePass` is given besides tensors."""

    lengths: Sequence[int]
    groups: list[slice]
    """Responses of each block."""
    loss_of: BlockLoss
    plan: Plan
    tied: TiedGradient | None
    entropy_weights: Tensor | None
    differentiate: bool


class _OnePass(torch.autograd.Function):
    """(loss, log-probs, entropy); the gradients are made in the forward pass and handed out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, inputs):  # type: ignore[override]
        plan, differentiate = inputs.plan, inputs.differentiate
        n, wanted = len(targets), ctx.needs_input_grad[:3]
        tokens = [sum(inputs.lengths[group]) for group in inputs.groups]
        picked = hidden.new_empty(n, dtype=statistics_dtype(plan.compute))
        entropy, loss = torch.empty_like(picked), picked.new_zeros(())
        sums = Gradients.wanted(wanted if differentiate else (False,) * 3, hidden, weight, bias)
        if sums.hidden is not None:
            sums.hidden.zero_()  # rows without gradient are never written
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head.of(weight, bias, plan, max(tokens, default=0))
            stop = 0
            for group, count in zip(inputs.groups, tokens):
                rows = slice(stop, stop := stop + count)
                x, y = hidden[rows].to(plan.compute), targets[rows]
                logits = head.logits(x)
                picked[rows], lse, entropy[rows] = head.fold(logits, y)
                part, g = _block_gradient(inputs.loss_of, picked[rows], group)
                loss += part
                h = None
                if inputs.entropy_weights is not None:
                    h = -inputs.entropy_weights[rows].to(entropy.dtype)
                    loss += h.dot(entropy[rows])
                if differentiate and any(wanted):
                    block = BackwardRows(x, y, lse, entropy[rows], g, h)
                    _add(head, sums, logits, block, rows)
                del logits  # oneDNN brings its own: never two at a time
        ctx.gradients = sums.like(weight, bias) if differentiate else None
        ctx.tied = inputs.tied
        ctx.mark_non_differentiable(picked, entropy)
        return loss, picked, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[override]  (three outputs, three gradients)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of one pass are handed out once; run it again")
        if grad.device.type != "cpu" or float(grad) != 1:
            gradients = tuple(None if x is None else x.mul_(grad) for x in gradients)
        if ctx.tied is not None and ctx.tied.receives():
            ctx.tied.total, gradients = gradients[1], (gradients[0], None, gradients[2])
        return *gradients, None, None  # neither targets nor what is no tensor


def _block_gradient(loss_of: BlockLoss, logprobs: Tensor, group: slice) -> tuple[Tensor, Tensor]:
    """A block's part of the loss, and its gradient with respect to the block's log-probs."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        part = loss_of(leaf, group)
        g = torch.autograd.grad(part, leaf, allow_unused=True)[0] if part.requires_grad else None
    return part.detach(), torch.zeros_like(leaf) if g is None else g


def _add(head: Head, sums: Gradients, logits: Tensor, block: BackwardRows, rows: slice) -> None:
    """Turn a block's logits into their gradient and add up what it gives."""
    kept = block.with_gradient()
    where: slice | Tensor = rows
    if kept is not None:
        block, logits, where = block.take(kept), compacted(logits, kept), kept + rows.start
    head.differentiate(logits, block)
    sums.add(head, logits, block.hidden, where)
