"""Drawing tokens: one uniform number per row, inverse CDF in two levels, log-prob for free.

The unnormalised probabilities exp(z - max z) are summed in blocks of `BLOCK` tokens; the running
sum over blocks finds the block, the running sum inside it the token. Sums over blocks and inside
a block are float64. Nothing else walks over the vocabulary: the log-prob of the drawn token is
the logarithm of its share of the sum that is known already. A vocabulary of at most `SMALL` tokens
has one level, a running sum over all of it: fewer operations, each of which costs as much there.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hmpo.sampling.options import SamplingOptions

BLOCK = 128
"""Tokens of one block of the first level."""
SMALL = 1024
"""Largest vocabulary whose running sum is taken over single tokens."""
CANDIDATES = 256
"""Tokens that are sorted for top-p before all of them are (a row rarely needs more)."""
BELOW_ONE = 1 - 2**-53
"""The largest float64 below 1: a target times it lies strictly below the sum it is a share of."""


class Drawn(NamedTuple):
    """One token a row."""

    token: Int[Tensor, " N"]
    logprob: Float[Tensor, " N"]
    """At the temperature, of the whole vocabulary."""
    sampling_logprob: Float[Tensor, " N"]
    """Of the distribution drawn from, which top-k and top-p may have truncated."""


def draw_tokens(
    logits: Float[Tensor, "N V"],
    uniform: Float[Tensor, " N"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Drawn:
    """Tokens by inverse CDF, with their untruncated and truncated log-probs.

    Args:
        logits: unnormalised, any floating dtype; taken in float32 or better, not changed.
        uniform: numbers in [0, 1), one per row, float64.
        temperature: 0 is greedy.
        top_k: 0 keeps all; tokens as probable as the k-th stay.
        top_p: 1 keeps all.
    """
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    return draw_in_place(logits.clone(), uniform, options)


def draw_in_place(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"], options: SamplingOptions
) -> Drawn:
    """`draw_tokens` in the memory of `logits` (where they are float32 or float64)."""
    temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        top, token = logits.max(-1)
        picked = top - logits.logsumexp(-1)
        return Drawn(token, picked, torch.zeros_like(picked))
    weights = logits.sub_(logits.amax(-1, keepdim=True))
    if temperature != 1:
        weights.div_(temperature)
    weights.exp_()
    truncated = 0 < top_k < weights.shape[1] or top_p < 1
    if not truncated and weights.shape[1] <= SMALL:
        return _small_inverse_cdf(weights, uniform)
    blocks = _block_sums(weights)
    total = blocks.sum(-1)
    if truncated:
        _truncate(weights, top_k, top_p)
        blocks = _block_sums(weights)
    token = _inverse_cdf(weights, blocks, uniform)
    mass = weights.gather(1, token[:, None])[:, 0].double()
    picked = (mass / total).log().to(weights.dtype)
    if not truncated:
        return Drawn(token, picked, picked)
    return Drawn(token, picked, (mass / blocks.sum(-1)).log().to(weights.dtype))


def _small_inverse_cdf(weights: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]) -> Drawn:
    """Tokens and their log-probs by one running sum over the vocabulary."""
    running = weights.cumsum(-1, dtype=torch.float64)
    total = running[:, -1:]
    target = total * uniform[:, None].clamp(max=BELOW_ONE).mul_(BELOW_ONE)
    token = torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)
    picked = (weights.gather(1, token) / total).log_().to(weights.dtype)[:, 0]
    return Drawn(token[:, 0], picked, picked)


def _block_sums(weights: Float[Tensor, "N V"]) -> Float[Tensor, "N K"]:
    """Sums over blocks of tokens, the last of which may be short, as float64."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    return sums.double()


def _inverse_cdf(weights: Tensor, blocks: Tensor, uniform: Tensor) -> Int[Tensor, " N"]:
    """The token at which the running sum passes the given share of the whole."""
    ends = functional.pad(blocks.cumsum(-1), (1, 0))
    target = ends[:, -1:] * uniform[:, None].clamp(max=BELOW_ONE) * BELOW_ONE
    block = torch.searchsorted(ends[:, 1:].contiguous(), target, right=True)
    block.clamp_(max=blocks.shape[1] - 1)
    start, end = ends.gather(1, block), ends.gather(1, block + 1)
    index = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    beyond = index >= weights.shape[1]
    inside = weights.gather(1, index.clamp_(max=weights.shape[1] - 1)).double()
    running = inside.masked_fill_(beyond, 0).cumsum(-1)
    # The two sums of a block differ in their last bits, so the rest is carried over as a share.
    share = ((target - start) / (end - start)).clamp_(max=BELOW_ONE)
    place = torch.searchsorted(running, running[:, -1:] * share * BELOW_ONE, right=True)
    return index.gather(1, place.clamp_(max=BLOCK - 1))[:, 0]


def _truncate(weights: Float[Tensor, "N V"], top_k: int, top_p: float) -> None:
    """Tokens outside top-k, then outside top-p of what is left, get weight 0 (in place)."""
    width = weights.shape[1]
    if 0 < top_k < width:
        bound = weights.topk(top_k, dim=-1).values[:, -1:]
        weights.masked_fill_(weights < bound, 0)
    if top_p == 1:
        return
    limit = top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
    values, index = weights.topk(min(width, CANDIDATES), dim=-1)
    running = values.cumsum(-1, dtype=torch.float64)
    if bool((running[:, -1:] < limit).any()):
        values, index = weights.sort(dim=-1, descending=True)
        running = values.cumsum(-1, dtype=torch.float64)
    # A token stays while the mass before it is below top_p: the first always stays.
    values = values.masked_fill(running - values >= limit, 0)
    weights.zero_().scatter_(1, index, values)
