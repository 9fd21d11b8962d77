"""Largest attention logit of every query head, by loops in float64.

Independent of `hmpo.attention`: queries and keys are recomputed from the inputs of the attention
module (projection, bias, rotary embedding), never taken from the attention interface.
"""

import math

import torch
from torch import nn


def max_logits(query, key, keep, scale, *, causal=True):
    """Loop over every (row, head, query, key): query (B,H,S,D), key (B,G,S,D), keep (B,S) bool.

    A pair counts when both tokens are kept and, if `causal`, the key is not after the query.
    """
    batch, heads, length, _ = query.shape
    group = heads // key.shape[1]
    best = [-math.inf] * heads
    query, key = query.double(), key.double()
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(i + 1 if causal else length):
                    if keep[b, i] and keep[b, j]:
                        dot = float(query[b, h, i] @ key[b, h // group, j])
                        best[h] = max(best[h], dot * scale)
    return torch.tensor(best, dtype=torch.float64)


def rotate(x, cos, sin):
    """Rotary embedding of x (B,heads,S,D) written out: pairs (i, i + D/2) turned by one angle."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    c, s = cos[:, None, :, :half], sin[:, None, :, :half]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def model_max_logits(model, input_ids, attention_mask=None):
    """Per attention module: (H,) float64 maxima of one forward, for Llama-like attention."""
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    found, handles = {}, []

    def hook(name):
        def before(module, args, kwargs):
            x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).double()
            cos, sin = (t.double() for t in kwargs["position_embeddings"])
            dim = module.head_dim
            tensors = []
            for projection in (module.q_proj, module.k_proj):
                y = x @ projection.weight.double().T
                if projection.bias is not None:
                    y = y + projection.bias.double()
                y = y.unflatten(-1, (-1, dim)).transpose(1, 2)
                tensors.append(rotate(y, cos.expand(y.shape[0], -1, -1), sin))
            found[name] = max_logits(*tensors, keep.bool(), dim**-0.5)

        return before

    for name, module in model.named_modules():
        if isinstance(getattr(module, "q_proj", None), nn.Module):
            handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
