"""Reading prompts for the fast decoder: each once, packed without its padding.

All prompts' tokens go through the projections as the rows of one matrix; only attention sees them
as padded rows. In the last layer the keys and values of all tokens are needed, but the query and
what follows it of the last token alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from hmpo.sampling.weights import DecoderWeights, Scratch, as_pairs, rotate

Pair = tuple[Float[Tensor, "H B P D"], Float[Tensor, "H B P D"]]


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
    seen = None if places.numel() == mask.numel() else mask[:, None, None]
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
            read = _attend(weights, query, pair, seen, causal=False).flatten(1)
        else:
            query = _spread(weights, q, turn[:, 0], mask, places)
            read = _attend(weights, query, pair, seen, causal=True)
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
    seen: Bool[Tensor, "B 1 1 P"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "B S Q D"]:
    """What the heads read, by prompt; rows of padding hold anything."""
    keys, values = pair
    allowed = seen
    if causal and seen is not None:
        width = seen.shape[-1]
        lower = torch.ones(width, width, dtype=torch.bool, device=seen.device).tril_()
        # Padding looks at itself: a row that may look at nothing would be NaN.
        allowed = (seen & lower) | torch.eye(width, dtype=torch.bool, device=seen.device)
    read = functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=allowed,
        is_causal=causal and seen is None,
        scale=1.0,  # the queries are scaled
        enable_gqa=weights.repeat > 1,
    )
    return read.transpose(1, 2)
