"""Triton kernels for the elementwise part of log-probs: one read of a logits tile each way.

The matrix products stay with cuBLAS; what the two kernels save is the temporaries that torch's
own operations write between them (`hmpo.logprobs.fold`, their fallback). Triton is imported here
and nowhere else in hmpo, and this module only by `hmpo.logprobs.fold.triton_kernels`, on CUDA.

With z the logits of one row after softcap and temperature, m their running maximum,
s = sum exp(z - m) and t = sum exp(z - m) (z - m), taken in one pass (the online softmax of
Milakov and Gimelshein, arXiv 1805.02867, equations 2 to 4, with one more sum):

    log-sum-exp = m + log s,    log p_y = (z_y - m) - log s,    entropy = log s - t / s.

t is summed about the maximum and not about 0, so logits of any size lose nothing. The kernels
are marked `no_type_check` because Triton reads their source and cannot read a checker's wrapper.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096
"""Vocabulary entries that one program holds at a time."""
WARPS = 8
"""Warps of one program: 16 entries of a block a thread."""
LOWEST = tl.constexpr(-3e38)
"""Nearly the least float32: adding an entropy to it does not overflow."""


def fold(
    logits: Float[Tensor, "R V"],
    targets: Int[Tensor, " R"],
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = True,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Log-probs of the targets, log-sum-exp and entropy of a tile of logits.

    Args:
        logits: bfloat16, float16 or float32; each row in adjacent memory. Not changed.
        targets: token ids.
        temperature: logits are divided by it, after the softcap.
        softcap: c of c tanh(logits / c); None for none.
        with_entropy: False leaves it out; NaN stands in its place.
        block: vocabulary entries of one step of a program, a power of two.
        warps: of one program.

    Returns:
        (log-prob, log-sum-exp, entropy) in nats, float32.
    """
    rows, width = logits.shape
    picked = torch.empty(rows, device=logits.device)
    lse, entropy = torch.empty_like(picked), torch.full_like(picked, torch.nan)
    if rows:
        with torch.cuda.device_of(logits):
            launch: Any = _fold_kernel[(rows,)]
            launch(
                logits,
                logits.stride(0),
                targets,
                picked,
                lse,
                entropy,
                width,
                1 / temperature,
                1.0 if softcap is None else softcap,
                ENTROPY=with_entropy,
                SOFTCAP=softcap is not None,
                BLOCK=min(block, triton.next_power_of_2(width)),
                num_warps=warps,
            )
    return picked, lse, entropy


def gradient_in_place(
    logits: Float[Tensor, "R V"],
    targets: Int[Tensor, " R"],
    lse: Float[Tensor, " R"],
    entropy: Float[Tensor, " R"],
    grad_picked: Float[Tensor, " R"],
    grad_entropy: Float[Tensor, " R"] | None,
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> None:
    """Write the gradient of the logits over the logits.

    With g and h the incoming gradients of log-prob and entropy H, before temperature and softcap:
    dz = g (1[v = y] - p_v) - h p_v (log p_v + H).

    Args:
        logits: the tile that `fold` read, in any of its precisions; overwritten.
        targets: token ids.
        lse: log-sum-exp of each row, from `fold`.
        entropy: of each row, from `fold`.
        grad_picked: gradient of the log-probs.
        grad_entropy: gradient of the entropies; None where nothing asks for it.
        temperature: the same as in `fold`.
        softcap: the same as in `fold`.
        block: vocabulary entries of one program, a power of two.
        warps: of one program.
    """
    rows, width = logits.shape
    if rows:
        block = min(block, triton.next_power_of_2(width))
        with torch.cuda.device_of(logits):
            launch: Any = _gradient_kernel[(rows, triton.cdiv(width, block))]
            launch(
                logits,
                logits.stride(0),
                targets,
                lse,
                entropy,
                grad_picked.contiguous(),
                lse if grad_entropy is None else grad_entropy.contiguous(),
                width,
                1 / temperature,
                1.0 if softcap is None else softcap,
                ENTROPY=grad_entropy is not None,
                SOFTCAP=softcap is not None,
                BLOCK=block,
                num_warps=warps,
            )


@triton.jit
@no_type_check
def _squashed(x, cap):
    """tanh(x / cap), from the exponential of a number that is never positive."""
    low = tl.exp(-2 * tl.abs(x) / cap)
    size = (1 - low) / (1 + low)
    return tl.where(x < 0, -size, size)


@triton.jit
@no_type_check
def _fold_kernel(
    logits,
    stride,
    targets,
    picked,
    lse,
    entropy,
    width,
    inverse,
    cap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the row is read once."""
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary may pass 2^31
    start = logits + row * stride
    peak = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < width
        z = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = cap * _squashed(z, cap)
        z = tl.where(inside, z * inverse, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=0))
        # Ruled-out tokens have z = -inf, and while no other was seen so has the maximum: sums
        # are about `base` then, so that no difference of infinities arises.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fall = tl.where(peak == float("-inf"), base, peak) - base
        below = z - base
        share = tl.exp(below)
        shrink = tl.exp(fall)
        if ENTROPY:
            terms = share * tl.maximum(below, LOWEST)
            moment = shrink * (moment + fall * mass) + tl.sum(terms, axis=0)
        mass = shrink * mass + tl.sum(share, axis=0)
        peak = higher
    aim = tl.load(start + tl.load(targets + row)).to(tl.float32)
    if SOFTCAP:
        aim = cap * _squashed(aim, cap)
    log_mass = tl.log(mass)
    tl.store(picked + row, (aim * inverse - peak) - log_mass)
    tl.store(lse + row, peak + log_mass)
    if ENTROPY:
        tl.store(entropy + row, log_mass - moment / mass)


@triton.jit
@no_type_check
def _gradient_kernel(
    logits,
    stride,
    targets,
    lse,
    entropy,
    grad_picked,
    grad_entropy,
    width,
    inverse,
    cap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each block of each row: read, turned into the gradient, written back."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    where = logits + row * stride + place
    z = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    slope = inverse
    if SOFTCAP:
        bent = _squashed(z, cap)
        slope = inverse * (1 - bent * bent)
        z = cap * bent
    # The least finite number, so that p log p is 0 and not 0 * -inf for a ruled-out token.
    logp = tl.maximum(z * inverse - tl.load(lse + row), LOWEST)
    p = tl.exp(logp)
    g = tl.load(grad_picked + row).to(tl.float32)
    out = tl.where(place == tl.load(targets + row), g, 0.0) - g * p
    if ENTROPY:
        h = tl.load(grad_entropy + row).to(tl.float32)
        out -= h * p * (logp + tl.load(entropy + row))
    tl.store(where, (out * slope).to(logits.dtype.element_ty), mask=inside)
