"""The two elementwise passes between the products of the vocabulary projection.

With raw logits a (n, V), softcap c and temperature tau, everything here is of

    z = c tanh(a / c) / tau      (z = a / tau without a softcap)      log p = z - lse(z)

`fold` reduces a row to three numbers and leaves it as it is; `gradient_in_place` turns it into
the gradient that the next products need. Both compute in float32 (float64 for float64 logits)
whatever the logits' precision, on a few rows at a time that stay in the processor's cache: the
five to seven passes over them then cost less than one pass through memory each. On CUDA the
kernels of `hmpo.logprobs.triton_fold` do the same in one pass, where they run (`triton_kernels`);
these here are what serves everywhere else, and what the kernels are tested against.
"""

import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

logger = logging.getLogger(__name__)

CACHED = 1 << 17
"""Logits of one thread that are worked on together: 512 KiB in float32, a part of its cache."""
LAUNCHED = 1 << 26
"""The same on a GPU, whose operations want many rows: 256 MiB in float32."""

FLOOR = -1e4
"""Log-probs are cut here where they multiply a probability, which is exactly 0 from there on:
a token ruled out by a logit of -inf would otherwise give 0 * -inf."""


def fold(
    logits: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-prob of each target, log-sum-exp of z, and entropy (nat); NaN for an entropy not asked.

    The logits are not changed.
    """
    if (kernels := _kernels(logits)) is not None:
        return kernels.fold(logits, targets, temperature, softcap, with_entropy)
    kind = statistics_dtype(logits.dtype)
    picked = logits.gather(1, targets[:, None])[:, 0].to(kind)
    picked = _scaled(picked, temperature, softcap, torch.empty_like(picked))
    tops, totals, moments = [], [], []
    scratch = logits.new_empty((2, *_block(logits)), dtype=kind)
    for block in logits.split(max(1, scratch.shape[1])):
        first, second = scratch[:, : len(block)]
        z = _scaled(block, temperature, softcap, first)
        tops.append(z.amax(1))
        below = torch.sub(z, tops[-1][:, None], out=first)
        if with_entropy:
            weights = torch.exp(below.clamp_(min=FLOOR), out=second)
            totals.append(weights.sum(1))
            moments.append(weights.mul_(below).sum(1))
        else:
            totals.append(below.exp_().sum(1))
    total = torch.cat(totals)
    lse = total.log() + torch.cat(tops)
    # Both terms are >= 0: nothing cancels, however sure the policy is.
    entropy = total.log() - torch.cat(moments) / total if moments else lse * torch.nan
    return picked - lse, lse, entropy


def gradient_in_place(
    logits: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    lse: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"],
    grad_picked: Float[Tensor, " n"],
    grad_entropy: Float[Tensor, " n"] | None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Overwrite raw logits by the gradient with respect to them.

    With g and h the incoming gradients of log-prob and entropy H, y the target:

        dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H)      da = dz (1 - tanh(a / c)^2) / tau

    Args:
        logits: raw, as `fold` read them; overwritten.
        targets: token ids.
        lse: from `fold`.
        entropy: from `fold`; read only with `grad_entropy`.
        grad_picked: g.
        grad_entropy: h, or None where the entropy carries no gradient.
        temperature: as in `fold`.
        softcap: as in `fold`.
    """
    if (kernels := _kernels(logits)) is not None:
        kernels.gradient_in_place(
            logits, targets, lse, entropy, grad_picked, grad_entropy, temperature, softcap
        )
        return
    kind = lse.dtype
    own = logits.dtype == kind
    grad_picked = grad_picked.to(kind)[:, None] / temperature
    slope = rest = None
    if grad_entropy is not None:
        slope = -grad_entropy.to(kind)[:, None] / temperature
        rest = slope * entropy[:, None] - grad_picked
    scratch = logits.new_empty((3, *_block(logits)), dtype=kind)
    for rows in blocks(len(logits), scratch.shape[1]):
        first, second, third = scratch[:, : rows.stop - rows.start]
        block = logits[rows]
        z = _scaled(block, temperature, softcap, first)
        if softcap is not None:
            torch.mul(z, temperature / softcap, out=third).square_().neg_().add_(1)
        out = block if own else first
        torch.sub(z, lse[rows, None], out=out)
        if slope is None or rest is None:
            out.exp_().mul_(-grad_picked[rows])
        else:
            p = torch.exp(out, out=second)
            out.clamp_(min=FLOOR).mul_(slope[rows]).add_(rest[rows]).mul_(p)
        out.scatter_add_(1, targets[rows, None], grad_picked[rows])
        if softcap is not None:
            out.mul_(third)
        if not own:
            block.copy_(out)


def _kernels(logits: Tensor) -> Any | None:
    """The Triton kernels where they serve these logits; they compute in float32."""
    return None if logits.dtype == torch.float64 else triton_kernels(logits.device)


@functools.cache
def triton_kernels(device: torch.device) -> Any | None:
    """`hmpo.logprobs.triton_fold` where its kernels run, else None: torch's operations serve.

    On CUDA the kernels are tried once on two rows; that they cannot run (no Triton, no compiler
    for its launcher, a card that it does not know) is logged once. Elsewhere Triton is not even
    imported.

    Args:
        device: where the logits are.
    """
    if device.type != "cuda":
        return None
    try:
        kernels = importlib.import_module("hmpo.logprobs.triton_fold")
        logits = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
        targets = torch.zeros(2, dtype=torch.long, device=device)
        picked, lse, entropy = kernels.fold(logits, targets)
        kernels.gradient_in_place(logits, targets, lse, entropy, picked, picked)
        torch.cuda.synchronize(device)
    except Exception as error:
        # Whatever a compiler's tool chain raises is a reason not to use it, and it is told.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("log-probs on %s without Triton kernels, slower (%s)", device, reason)
        return None
    return kernels


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, temperature: float, softcap: float | None, out: Tensor) -> Tensor:
    """The values z of raw logits: in `out`, or the logits themselves where z is what they are."""
    if softcap is not None:
        out = torch.mul(logits.to(out.dtype), 1 / softcap, out=out).tanh_()
        return out.mul_(softcap / temperature)
    if temperature != 1 or logits.dtype != out.dtype:
        return torch.mul(logits.to(out.dtype), 1 / temperature, out=out)
    return logits


def _block(logits: Tensor) -> tuple[int, int]:
    """Rows and columns that are worked on together."""
    n, width = logits.shape
    on_cpu = logits.device.type == "cpu"
    entries = CACHED * torch.get_num_threads() if on_cpu else LAUNCHED
    return min(n, max(1, entries // width)), width


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover n rows in order."""
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + size))
