"""The largest factor on a LoRA adapter that keeps every attention logit at or under tau.

With queries q0 + c dq and keys k0 + c dk a pair's logit is a parabola in c, a + b c + d c^2.
Starting at c = 1, go down to where the last pair that is over tau at c came under it: every c in
between is over tau for that pair, so nothing is skipped. Repeated until no pair is over, that ends
at the largest c in [0, 1] with S(c) <= tau, however S rises and falls, or nowhere. A pair is over
tau on at most two intervals, so it ends; in practice after one to three rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.attention.logits import BLOCK_ELEMENTS, AttentionCall, real_rows, visible_pairs

AIM = 1 - 2e-5
"""Part of tau that is aimed at: what rounding the weights may add stays below tau."""
OVER = 1 - 1e-5
"""Part of tau above which a pair is over; above `AIM`, so that a root that was reached stays."""
RECHECKED = 0.999
"""Part of tau above which a pair is computed again in float64."""

Agree = Callable[[Tensor], Tensor]
"""Takes the smallest of each factor over all ranks."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitCall:
    """One attention call of N heads, the adapter's part of queries and keys apart.

    Example: 2 heads above tau, 3 prompts of 10 tokens, width 8: all four tensors (3, 2, 10, 8).
    """

    query: Float[Tensor, "B N Q D"]
    """What the base makes of the queries, after rotary embedding."""
    query_step: Float[Tensor, "B N Q D"]
    """What the adapter adds."""
    key: Float[Tensor, "B N K D"]
    key_step: Float[Tensor, "B N K D"]
    mask: Tensor | None
    """(B or 1, N or 1, Q, K) as in `AttentionCall`."""
    causal: bool
    scale: float


def split(base: AttentionCall, whole: AttentionCall, heads: Tensor) -> SplitCall:
    """Take the same call without and with its adapter apart, for some query heads."""
    keys = heads // (whole.query.shape[1] // whole.key.shape[1])
    query, key = _wide(base.query[:, heads]), _wide(base.key[:, keys])
    mask = whole.mask
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, heads]
    return SplitCall(
        query=query,
        query_step=_wide(whole.query[:, heads]) - query,
        key=key,
        key_step=_wide(whole.key[:, keys]) - key,
        mask=mask,
        causal=whole.causal,
        scale=whole.scale,
    )


def largest_factors(
    calls: list[SplitCall],
    tau: float,
    groups: int,
    agree: Agree,
    key_factor: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " G"]:
    """The largest c in [0, 1] of each group of heads with all of its logits <= tau.

    Args:
        calls: all calls of one layer since the last step; N is a multiple of `groups`.
        tau: largest logit allowed.
        groups: G; the N / G heads of a group, one after the other, share c.
        agree: makes the ranks agree.
        key_factor: None scales the adapter's part of queries and keys by c; a factor for each
            head keeps that of the keys there and scales the queries' alone.

    Returns:
        float64 on the CPU; 1 where nothing is over, -inf where no factor will do.
    """
    factor = torch.ones(groups, dtype=torch.float64)
    while True:
        each = factor.repeat_interleave(heads_of(calls, groups) // groups)
        lower = [each, *(_descend(call, each, tau, key_factor) for call in calls)]
        lower = agree(torch.stack(lower).amin(0).view(groups, -1).amin(1))
        if torch.equal(lower, factor):
            return factor
        factor = lower


def heads_of(calls: list[SplitCall], default: int) -> int:
    """Heads N of the calls; `default` without calls."""
    return calls[0].query.shape[1] if calls else default


def last_root(
    a: Float[Tensor, " P"], b: Float[Tensor, " P"], d: Float[Tensor, " P"], c: Float[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """The largest x in [0, c) with a + b x + d x^2 = 0, or -inf; float64."""
    square = b * b - 4 * a * d
    s = -0.5 * (b + torch.copysign(square.clamp_min(0).sqrt(), b))
    roots = torch.stack([s / d, a / s])  # 0 / 0 and x / 0 are no roots: comparisons drop them
    return roots.where((roots >= 0) & (roots < c) & (square >= 0), -torch.inf).amax(0)


def _descend(
    call: SplitCall, factor: Tensor, tau: float, key_factor: Tensor | None
) -> Float[Tensor, " N"]:
    """For each head, the lowest of the pairs' last points at or under tau, going down from c."""
    device = call.query.device
    c = factor.clamp_min(0).to(device)
    lowest = factor.to(device)
    for a, b, d, visible in _pairs(call, key_factor):
        at = c.to(a)[:, None, None]
        near = ((a + at * (b + at * d)) > tau * RECHECKED) & visible
        head = near.nonzero()[:, 1]
        a, b, d, at = a[near].double(), b[near].double(), d[near].double(), c[head]
        over = a + at * (b + at * d) > tau * OVER
        roots = last_root(a - tau * AIM, b, d, at).where(over, at)
        lowest = lowest.scatter_reduce(0, head, roots, "amin")
    return lowest.cpu()


def _pairs(
    call: SplitCall, key_factor: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Bool[Tensor, "..."]]]:
    """Blocks (b, N, q, K) of a, b and d of all pairs, and which of them are visible."""
    (batch, heads, rows, _), keys = call.query.shape, call.key.shape[2]
    step = max(1, min(batch, BLOCK_ELEMENTS // max(1, heads * rows * keys)))
    row_step = max(1, min(rows, BLOCK_ELEMENTS // max(1, step * heads * keys)))
    key, key_step, fixed = call.key, call.key_step, key_factor is not None
    if key_factor is not None:
        key = key + key_step * key_factor.to(key)[:, None, None]
    with torch.autocast(call.query.device.type, enabled=False):
        for start in range(0, batch, step):
            some = slice(start, start + step)
            left, left_step = key[some].mT, key_step[some].mT
            for row in range(0, rows, row_step):
                part = slice(row, row + row_step)
                query, query_step = call.query[some, :, part], call.query_step[some, :, part]
                query, query_step = query * call.scale, query_step * call.scale
                a, b = query @ left, query_step @ left
                d = torch.zeros_like(a) if fixed else query_step @ left_step
                b = b if fixed else b.add_(query @ left_step)
                yield a, b, d, _visible(call, some, part)


def _visible(call: SplitCall, some: slice, part: slice) -> Bool[Tensor, "b n q K"]:
    """The visible pairs of real tokens in a block; broadcasts."""
    rows, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    if call.mask is None:
        row, key = torch.arange(rows, device=device), torch.arange(keys, device=device)
        row = row if call.causal else row + keys
        return (key <= row[part, None])[None, None]
    one = slice(None) if call.mask.shape[0] == 1 else some
    as_call = AttentionCall(
        query=call.query, key=call.key, mask=call.mask, causal=call.causal, scale=call.scale
    )
    pairs, real = visible_pairs(call.mask[one, :, part, :keys]), real_rows(as_call)
    return pairs if real is None else pairs & real[one, :, part, None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
