"""The largest attention logit of each query head: a cheap upper bound, and the exact value.

A logit is `scale * q . k` as softmax sees it before any additive bias or soft cap: after rotary
embedding, for visible (query, key) pairs of real tokens only. Pure functions of tensors; no
gradients, no host synchronisation, memory bounded by `BLOCK_ELEMENTS` scores.

Padding is read off the attention mask itself: in a causal language model a token always sees
itself, so a query row whose diagonal entry is masked is padding, left or right.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19
"""Scores held at once by `exact_max` (2 MiB of float32)."""
NORM_ELEMENTS = 1 << 16
"""Entries of half-precision queries or keys that are cast to float32 at once for their norms."""
BLOCK_ROWS = 128
"""Query rows held at once: without a mask, keys after the block are skipped."""
MASKED_BELOW = -1e4
"""An additive mask entry at or below this hides its pair; above it, the pair counts."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call of an attention function, detached.

    Example: 8 query heads over 2 key heads, 2 prompts of 16 tokens, head width 64:
    `query` (2, 8, 16, 64), `key` (2, 2, 16, 64), `mask` (2, 1, 16, 16) bool.
    """

    query: Float[Tensor, "B H Q D"]
    """Queries after rotary embedding."""
    key: Float[Tensor, "B G K D"]
    """Keys after rotary embedding, not repeated: query head h reads key head h // (H // G)."""
    mask: Tensor | None
    """(B or 1, H or 1, Q, K): bool with True visible, or an additive float mask, or None."""
    causal: bool
    """Without a mask: does query i see keys 0..i only? Ignored when there is a mask."""
    scale: float
    """Positive factor on q . k."""
    lse: Float[Tensor, "B H Q"] | None = None
    """Log-sum-exp of the visible logits of each row, where the kernel kept it. A row that sees
    nothing has any value."""
    own_tokens: bool = True
    """Are query i and key i the same token? Else the mask's diagonal says nothing of padding."""
    borrowed: bool = False
    """May the tensors be overwritten after the call? True inside compiled graphs."""

    @property
    def nbytes(self) -> int:
        """Bytes of the queries, keys and log-sum-exps."""
        return self.query.nbytes + self.key.nbytes + (0 if self.lse is None else self.lse.nbytes)


@dataclass(frozen=True, eq=False, kw_only=True)
class SeenScores:
    """An attention call of which the logits themselves were seen, as they went into a softmax."""

    maxima: Float[Tensor, " H"]
    """Largest visible logit of each query head, float32; -inf without a visible pair."""


def visible_pairs(mask: Tensor) -> Tensor:
    """The pairs that a mask lets through."""
    return mask if mask.dtype == torch.bool else mask > MASKED_BELOW


def real_rows(call: AttentionCall) -> Bool[Tensor, "b h Q"] | None:
    """Query rows that are no padding, or None if the call says nothing about padding."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is None or keys < queries or not call.own_tokens:
        return None
    diagonal = call.mask[..., :keys].diagonal(offset=keys - queries, dim1=-2, dim2=-1)
    return visible_pairs(diagonal)


def _visible_keys(call: AttentionCall) -> Tensor:
    """Keys (b, h, K) that some row sees."""
    assert call.mask is not None
    mask = call.mask[..., : call.key.shape[2]]
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8).amax(-2).bool()  # 50 times as fast as any() on a CPU
    return mask.amax(-2) > MASKED_BELOW


def logit_bound(call: AttentionCall) -> Float[Tensor, " H"]:
    """Upper bound of each head's largest logit by Cauchy-Schwarz: scale * max|q| * max|k|.

    Rounded upwards, so that it is never below the exact value of the same tensors (entries
    between 1e-19 and 1e19, or zero). -inf for a head without any visible pair.
    """
    width = call.query.shape[3]
    query, key = _norms(call.query), _norms(call.key)
    if call.mask is not None:
        rows, keys = real_rows(call), _visible_keys(call)
        query = query if rows is None else query.masked_fill_(~rows, -torch.inf)
        if keys.shape[1] > 1:  # a mask for each head
            key = key.repeat_interleave(keys.shape[1] // key.shape[1], dim=1)
        key = key.masked_fill_(~keys, -torch.inf)
    query, key = query.amax(-1), key.amax(-1)
    query = query.unflatten(1, (key.shape[1], -1))
    rounding = 1.0 + (width + 8) * torch.finfo(torch.float32).eps
    bound = query * key.unsqueeze(-1) * (call.scale * rounding)
    if call.mask is not None:
        empty = (query == -torch.inf) | (key == -torch.inf).unsqueeze(-1)
        bound = bound.masked_fill(empty, -torch.inf)
    return bound.amax(0).flatten().float()


def unmasked_bound(call: AttentionCall) -> Float[Tensor, " H"]:
    """Upper bound of each head's |q| |k|, times the scale, over all rows, hidden or not.

    Cheaper and looser than `logit_bound`: one maximum for all prompts, whatever the mask hides.
    """
    query, key = _longest(call.query), _longest(call.key)
    rounding = 1.0 + (call.query.shape[3] + 8) * torch.finfo(torch.float32).eps
    bound = query.view(len(key), -1) * key.mul_(call.scale * rounding)[:, None]
    return bound.flatten().float()


def _longest(x: Float[Tensor, "B h S D"]) -> Float[Tensor, " h"]:
    """Norm of the longest row of each head."""
    if x.stride(1) < x.stride(2):  # as projections leave it: half the time in memory's order
        return _norms(x.transpose(1, 2)).flatten(0, 1).amax(0)
    return _norms(x).amax(2).amax(0)


def _norms(x: Float[Tensor, "B h S D"]) -> Float[Tensor, "B h S"]:
    """Norms of the rows in float32 or better, without a float32 copy of a half-precision `x`."""
    if x.dtype in (torch.float32, torch.float64) or x.device.type != "cpu":
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    step = max(1, NORM_ELEMENTS * x.shape[2] // max(1, x.numel()))
    parts = [torch.linalg.vector_norm(p.float(), dim=-1) for p in x.split(step, dim=2)]
    return torch.cat(parts, dim=2)


def exact_max(call: AttentionCall, heads: Int[Tensor, " N"] | None = None) -> Float[Tensor, " _"]:
    """Each head's largest logit, in float32 or better, block by block.

    Args:
        call: the attention call.
        heads: query heads to read; None means all.

    Returns:
        float32 (N,), or (H,) without `heads`; -inf for a head without any visible pair.
    """
    query, key, mask = call.query, call.key, call.mask
    rows = real_rows(call)
    if heads is not None:
        key = key[:, heads // (query.shape[1] // key.shape[1])]
        query = query[:, heads]
        if mask is not None and mask.shape[1] > 1:
            mask, rows = mask[:, heads], None if rows is None else rows[:, heads]
    visible = None if mask is None else _Visible(mask, rows)
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, total, length, _), (_, groups, keys, width) = query.shape, key.shape
    best = torch.full((total,), -torch.inf, dtype=dtype, device=query.device)
    batch_step = max(1, min(batch, BLOCK_ELEMENTS // max(1, total * keys * 64)))
    row_step = max(1, min(BLOCK_ROWS, length, BLOCK_ELEMENTS // max(1, batch_step * total * keys)))
    with torch.autocast(query.device.type, enabled=False):
        for b in range(0, batch, batch_step):
            keys_t = key[b : b + batch_step].to(dtype).transpose(-1, -2)
            for start in range(0, length, row_step):
                stop = min(length, start + row_step)
                last = min(keys, stop) if mask is None and call.causal else keys
                block = query[b : b + batch_step, :, start:stop].to(dtype)
                size = block.shape[0]
                block = block.reshape(size, groups, -1, width)
                scores = (block @ keys_t[..., :last]).view(size, total, stop - start, last)
                if visible is not None:
                    scores.masked_fill_(~visible.block(b, size, start, stop, last), -torch.inf)
                elif call.causal:
                    scores.masked_fill_(_future(start, stop, last, query.device), -torch.inf)
                best = torch.maximum(best, scores.amax((0, 2, 3)))
    return (best * call.scale).float()


def _future(start: int, stop: int, last: int, device: torch.device) -> Bool[Tensor, "q k"]:
    rows = torch.arange(start, stop, device=device)
    return torch.arange(last, device=device)[None, :] > rows[:, None]


@dataclass(frozen=True)
class _Visible:
    """Blocks of the visible pairs, made on demand from a mask that may broadcast."""

    mask: Tensor
    rows: Tensor | None

    def block(self, b: int, size: int, start: int, stop: int, last: int) -> Tensor:
        one = slice(None) if self.mask.shape[0] == 1 else slice(b, b + size)
        pairs = visible_pairs(self.mask[one, :, start:stop, :last])
        return pairs if self.rows is None else pairs & self.rows[one, :, start:stop, None]
