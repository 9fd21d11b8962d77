"""Exact maxima of single heads from the log-sum-exp of their rows.

A row's largest logit is at most its log-sum-exp. So rows are computed in the order of their
log-sum-exp, in float32, and the search ends at the first row whose log-sum-exp is no larger than
the best logit so far. On a trained model, whose large rows are peaked, that is a handful of rows
out of thousands; on flat attention it degrades to computing every row once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmpo.attention.logits import AttentionCall, real_rows, visible_pairs

FIRST_ROWS = 8
"""Rows computed one by one, best first, before the rest is taken in blocks."""
TIED = 1e-6
"""A row whose limit is above the best by no more than this part of it is not computed: that is
float32 rounding."""
BLOCK_SCORES = 1 << 16
"""Scores held at once (256 KiB of float32)."""
BLOCK_KEYS = 2048
"""Keys cast to float32 and multiplied at once."""
GATHER_SHARE = 1 / 32
"""Most memory for the keys of every head's best row, as a share of the queries'."""


@torch.no_grad()
def max_by_lse(
    call: AttentionCall, heads: Int[Tensor, " N"], slack: Float[Tensor, " H"]
) -> tuple[Float[Tensor, " N"], int]:
    """Largest logit of each of `heads`, in float32 or better, and how many rows were computed.

    Args:
        call: an attention call with its log-sum-exp.
        heads: query heads to read.
        slack: per head, how far a row's log-sum-exp may be below its true value, beyond the
            rounding of a float32 product.

    Asks the device a few times for each head.
    """
    assert call.lse is not None
    limit = call.lse[:, heads].add_(slack[heads][:, None])
    limit.masked_fill_(limit.isnan(), torch.inf)  # says nothing: to be computed
    rows = real_rows(call)
    if rows is not None:
        limit.masked_fill_(~(rows[:, heads] if rows.shape[1] > 1 else rows), -torch.inf)
    maxima, computed = [], 0
    with torch.autocast(call.query.device.type, enabled=False):
        bests, left = _best_rows(call, heads, limit)
        for n, head in enumerate(heads.tolist()):
            best, count = bests[n], int(bests[n] > -torch.inf)
            if not _no_better(left[n], best):
                best, more = _head_max(call, head, limit[:, n], best)
                count += more
            maxima.append(best)
            computed += count
    return torch.tensor(maxima, dtype=torch.float32, device=call.query.device), computed


def _best_rows(
    call: AttentionCall, heads: Tensor, limit: Tensor
) -> tuple[list[float], list[float]]:
    """The row of largest limit of every head, all heads in one product, taken out of `limit`.

    Returns the largest logit of that row, and the largest limit left, of each head. Most searches
    end here. Where the keys of these rows take too much memory, nothing is computed.
    """
    tops = limit.amax(2)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    gathered = len(heads) * call.key[0, 0].numel() * dtype.itemsize
    if gathered > call.query.nbytes * GATHER_SHARE:
        return [-torch.inf] * len(heads), tops.amax(0).tolist()
    each = torch.arange(len(heads), device=heads.device)
    top, b = tops.max(0)
    i = limit[b, each].argmax(1)
    limit[b, each, i] = -torch.inf
    tops[b, each] = limit[b, each].amax(1)
    query = call.query[b, heads, i].to(dtype)
    key = call.key[b, heads // (call.query.shape[1] // call.key.shape[1])].to(dtype)
    scores = (key @ query.unsqueeze(2)).squeeze(2)
    if call.mask is not None:
        here = (b if call.mask.shape[0] > 1 else 0, heads if call.mask.shape[1] > 1 else 0, i)
        scores.masked_fill_(~visible_pairs(call.mask[here]), -torch.inf)
    elif call.causal:
        scores.masked_fill_(
            torch.arange(key.shape[1], device=b.device) > i.unsqueeze(1), -torch.inf
        )
    best = (scores.amax(1) * call.scale).float().masked_fill_(top == -torch.inf, -torch.inf)
    return best.tolist(), tops.amax(0).tolist()


def _head_max(call: AttentionCall, head: int, limit: Tensor, best: float) -> tuple[float, int]:
    """One head: a few rows one by one, then prompt by prompt what is left; limit (B, Q)."""
    left = limit.contiguous()
    flat = left.view(-1)
    for computed in range(min(FIRST_ROWS, len(flat))):
        index = int(flat.argmax())
        if _no_better(float(flat[index]), best):
            return best, computed
        b, i = divmod(index, limit.shape[1])
        best = _larger(best, _rows_max(call, b, head, slice(i, i + 1), i + 1))
        flat[index] = -torch.inf
    computed = min(FIRST_ROWS, len(flat))
    tops = left.amax(1).tolist()
    for b in sorted(range(len(tops)), key=lambda b: -tops[b]):
        if _no_better(tops[b], best):
            break
        best, count = _prompt_max(call, b, head, left[b], best)
        computed += count
    return best, computed


def _prompt_max(
    call: AttentionCall, b: int, head: int, limit: Tensor, best: float
) -> tuple[float, int]:
    """One head of one prompt, in blocks of rows with falling limits (Q,)."""
    rows = (limit > best).nonzero().flatten()
    rows = rows[limit[rows].argsort(descending=True)]
    limits = limit[rows].tolist()
    step = max(1, BLOCK_SCORES // min(BLOCK_KEYS, call.key.shape[2]))
    computed = 0
    for start in range(0, len(rows), step):
        if _no_better(limits[start], best):
            break
        block = rows[start : start + step]
        best = _larger(best, _rows_max(call, b, head, block, int(block.max()) + 1))
        computed += len(block)
    return best, computed


def _no_better(limit: float, best: float) -> bool:
    """Is there nothing to gain below `limit`? Not after NaN either."""
    return best != best or limit <= best + (TIED * abs(best) if abs(best) < torch.inf else 0.0)


def _larger(a: float, b: float) -> float:
    """The larger number, or NaN if there is one."""
    return a if a != a or b <= a else b


def _rows_max(call: AttentionCall, b: int, head: int, rows: Tensor | slice, last: int) -> float:
    """Largest visible logit of some rows, block of keys by block of keys.

    Args:
        call: the attention call.
        b: prompt.
        head: query head.
        rows: query rows, or a slice of one row.
        last: without a mask and causal, keys from this one on are visible to none of the rows.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[b, head, rows].to(dtype)
    key = call.key[b, head // (call.query.shape[1] // call.key.shape[1])]
    causal = call.mask is None and call.causal
    last = min(last, key.shape[0]) if causal else key.shape[0]
    best = None
    for start in range(0, last, BLOCK_KEYS):
        stop = min(last, start + BLOCK_KEYS)
        scores = query @ key[start:stop].to(dtype).T
        if call.mask is not None:
            mask = call.mask[b if call.mask.shape[0] > 1 else 0]
            mask = mask[head if mask.shape[0] > 1 else 0]
            scores.masked_fill_(~visible_pairs(mask[rows, start:stop]), -torch.inf)
        elif causal and isinstance(rows, Tensor):
            columns = torch.arange(start, stop, device=rows.device)
            scores.masked_fill_(columns > rows[:, None], -torch.inf)
        top = scores.amax()
        best = top if best is None else torch.maximum(best, top)
    assert best is not None, "attention has keys"
    return float((best * call.scale).float())
