"""Reading prompts for the fast decoder: each once, packed without its padding.

All prompts' tokens go through the projections as the rows of one matrix; only attention sees them
as padded rows. In the last layer the keys and values of all tokens are needed, but the query and
what follows it of the last token alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from hmpo.sampling.weights import DecoderWeights, Scratch, as_pairs, rotate

Pair = tuple[Float[Tensor, "H B P D"], Float[Tensor, "H B P D"]]
"""Keys and values of all prompts in one layer."""


@dataclass(frozen=True, kw_only=True)
class DistinctPrompts:
    """The prompts of a rollout, each once.

    Example: three prompts of which two are equal, two responses each: `ids` (2, 5), `mask`
    (2, 5), `prompt_of` [0, 0, 1, 1, 0, 0].
    """

    ids: Int[Tensor, "D P"]
    """Left-padded."""
    mask: Bool[Tensor, "D P"]
    """True on prompt tokens."""
    prompt_of: Int[Tensor, " N"]
    """The prompt that each of the N = B * G rows answers."""


def distinct_prompts(
    ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"], group_size: int
) -> DistinctPrompts:
    """Prompts that differ, and which of them each of the B * G rows answers."""
    marked = torch.where(mask, ids, -1)
    distinct, prompt_of = marked.unique(dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        prompt_of = torch.arange(len(ids), device=ids.device)
    else:
        mask = distinct >= 0
        ids = torch.where(mask, distinct, 0)
    return DistinctPrompts(ids=ids, mask=mask, prompt_of=prompt_of.repeat_interleave(group_size))


def read_prompts(
    weights: DecoderWeights, ids: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"]
) -> tuple[Float[Tensor, "B V"], list[Pair]]:
    """Logits of the token after each prompt, and every layer's keys and values of the prompts.

    Args:
        weights: of the model.
        ids: left-padded.
        mask: True on prompt tokens.

    Returns:
        (logits, (keys, values) by layer; 0 on padding).
    """
    places = mask.flatten().nonzero()[:, 0]
    turn = weights.turn((mask.cumsum(1) - 1).flatten()[places])
    ends = mask.sum(1).cumsum(0) - 1
    scratch = Scratch(weights.embedding)
    x = functional.embedding(ids.flatten()[places], weights.embedding)
    visible = None if places.numel() == mask.numel() else mask[:, None, None]
    stored = []
    for layer in weights.layers:
        q, k, v = weights.parts(weights.queries_keys_values(layer, x, scratch))
        pair = (
            _spread(weights, k, turn[:, 1], mask, places),
            _spread(weights, v, None, mask, places),
        )
        stored.append(pair)
        if layer is weights.layers[-1]:
            x = x[ends]
            query = _spread(weights, q[ends], turn[ends, 0], mask[:, -1:], None)
            read = _attend(weights, query, pair, visible, causal=False).flatten(1)
        else:
            query = _spread(weights, q, turn[:, 0], mask, places)
            read = _attend(weights, query, pair, visible, causal=True)
            read = read.flatten(0, 1)[places].flatten(1)
        x = layer.out.add_to(x, read, scratch)
        x = layer.mlp(x, weights.dtype, scratch)
    return weights.logits(x, scratch), stored


def _spread(
    weights: DecoderWeights,
    x: Float[Tensor, "n H D"],
    turn: Tensor | None,
    mask: Bool[Tensor, "B P"],
    places: Int[Tensor, " n"] | None,
) -> Float[Tensor, "H B P D"]:
    """Packed heads, rotated where `turn` is given, at their places among the padded prompts."""
    wide = x.new_empty(x.shape[1], len(x), x.shape[2], dtype=weights.dtype)
    if turn is None:
        wide.copy_(x.transpose(0, 1))
    else:
        rotate(as_pairs(x), turn, as_pairs(wide.transpose(0, 1)))
    if places is None or len(places) == mask.numel():
        return wide.view(-1, *mask.shape, x.shape[2])
    padded = x.new_zeros(x.shape[1], mask.numel(), x.shape[2], dtype=weights.dtype)
    return padded.index_copy_(1, places, wide).view(-1, *mask.shape, x.shape[2])


def _attend(
    weights: DecoderWeights,
    query: Float[Tensor, "Q B S D"],
    pair: Pair,
    visible: Bool[Tensor, "B 1 1 P"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "B S Q D"]:
    """What the heads read, by prompt; rows of padding hold anything."""
    keys, values = pair
    allowed = visible
    if causal and visible is not None:
        width = visible.shape[-1]
        lower = torch.ones(width, width, dtype=torch.bool, device=visible.device).tril_()
        # Padding looks at itself: a row that may look at nothing would be NaN.
        allowed = (visible & lower) | torch.eye(width, dtype=torch.bool, device=visible.device)
    read = functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=allowed,
        is_causal=causal and visible is None,
        scale=1.0,  # the queries are scaled
        enable_gqa=weights.repeat > 1,
    )
    return read.transpose(1, 2)
