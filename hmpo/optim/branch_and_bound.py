"""Exact maxima of single heads from the log-sum-exp of their rows.

A row's largest logit is at most its log-sum-exp. So rows are computed in the order of their
log-sum-exp, in float32, and the search ends at the first row whose log-sum-exp is no larger than
the best logit so far. On a trained model, whose large rows are peaked, that is a handful of rows
out of thousands; on flat attention it degrades to computing every row once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmpo.optim.attention_max import AttentionCall, real_rows, seen

FIRST_ROWS = 4
"""Rows computed before anything is sorted."""
BLOCK_SCORES = 1 << 16
"""Scores held at once (256 KiB of float32)."""
BLOCK_KEYS = 2048
"""Keys cast to float32 and multiplied at once."""


@torch.no_grad()
def max_by_lse(
    call: AttentionCall, heads: Int[Tensor, " N"], slack: Float[Tensor, " H"]
) -> tuple[Float[Tensor, " N"], int]:
    """Largest logit of each of `heads`, in float32 or better, and how many rows were computed.

    Args:
        call: an attention call with its log-sum-exp.
        heads: query heads to look at.
        slack: per head, how far a row's log-sum-exp may be below its true value.

    Asks the device a few times for each head.
    """
    assert call.lse is not None
    rows = real_rows(call)
    found, computed = [], 0
    with torch.autocast(call.query.device.type, enabled=False):
        for head in heads.tolist():
            limit = call.lse[:, head] + slack[head]
            limit = limit.masked_fill(limit.isnan(), torch.inf)  # says nothing: to be computed
            if rows is not None:
                limit = limit.masked_fill(~rows[:, head if rows.shape[1] > 1 else 0], -torch.inf)
            best, count = _head_max(call, head, limit)
            found.append(best)
            computed += count
    return torch.tensor(found, dtype=torch.float32, device=call.query.device), computed


def _head_max(call: AttentionCall, head: int, limit: Tensor) -> tuple[float, int]:
    """One head: prompts in the order of their largest limit; limit (B, Q)."""
    tops = limit.amax(1).tolist()
    best, computed = -torch.inf, 0
    for b in sorted(range(len(tops)), key=lambda b: -tops[b]):
        if best != best or tops[b] <= best:
            break
        best, count = _prompt_max(call, b, head, limit[b], best)
        computed += count
    return best, computed


def _prompt_max(
    call: AttentionCall, b: int, head: int, limit: Tensor, best: float
) -> tuple[float, int]:
    """One head of one prompt: the first few rows, then blocks of what is left; limit (Q,)."""
    first = limit.topk(min(FIRST_ROWS, len(limit))).indices
    best = _larger(best, _rows_max(call, b, head, first))
    computed = len(first)
    left = limit.index_fill(0, first, -torch.inf)
    rows = (left > best).nonzero().flatten()
    rows = rows[left[rows].argsort(descending=True)]
    limits = left[rows].tolist()
    step = max(1, BLOCK_SCORES // min(BLOCK_KEYS, call.key.shape[2]))
    for start in range(0, len(rows), step):
        if limits[start] <= best:
            break
        block = rows[start : start + step]
        best = _larger(best, _rows_max(call, b, head, block))
        computed += len(block)
    return best, computed


def _larger(a: float, b: float) -> float:
    """The larger number, or NaN if there is one."""
    return a if a != a or b <= a else b


def _rows_max(call: AttentionCall, b: int, head: int, rows: Int[Tensor, " n"]) -> float:
    """Largest visible logit of some rows, block of keys by block of keys."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = call.query[b, head, rows].to(dtype)
    key = call.key[b, head // (call.query.shape[1] // call.key.shape[1])]
    causal = call.mask is None and call.causal
    last = int(rows.max()) + 1 if causal else key.shape[0]
    best = None
    for start in range(0, min(last, key.shape[0]), BLOCK_KEYS):
        stop = min(last, key.shape[0], start + BLOCK_KEYS)
        scores = query @ key[start:stop].to(dtype).T
        if causal:
            columns = torch.arange(start, stop, device=rows.device)
            scores.masked_fill_(columns > rows[:, None], -torch.inf)
        elif call.mask is not None:
            mask = call.mask[b if call.mask.shape[0] > 1 else 0]
            mask = mask[head if mask.shape[0] > 1 else 0]
            scores.masked_fill_(~seen(mask[rows, start:stop]), -torch.inf)
        top = scores.amax()
        best = top if best is None else torch.maximum(best, top)
    assert best is not None, "attention has keys"
    return float((best * call.scale).float())
