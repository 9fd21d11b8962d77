"""Attention with one projection for queries, keys and values.

How the three lie in it cannot be seen from its shape, so the modules are listed by class name:
one after the other (Phi-3, GPT-2 by columns) or interleaved head by head (GPT-NeoX, Persimmon;
GPT-BigCode does either).
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from hmpo.attention.sites.norms import find_norms, gain_target
from hmpo.attention.sites.projections import Block, out_features, projection_rows
from hmpo.attention.sites.rows import Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget, hidden_reason

Layout = tuple[str, int, int, int, bool]
"""Projection's name, query heads, key heads, head width, interleaved."""


def _phi3(module: Any) -> Layout:
    config, width = module.config, module.head_dim
    return "qkv_proj", config.num_attention_heads, config.num_key_value_heads, width, False


def _gpt2(module: Any) -> Layout:
    return "c_attn", module.num_heads, module.num_heads, module.head_dim, False


def _gpt_neox(module: Any) -> Layout:
    heads = module.config.num_attention_heads
    return "query_key_value", heads, heads, module.head_size, True


def _persimmon(module: Any) -> Layout:
    return "query_key_value", module.num_heads, module.num_heads, module.head_dim, True


def _gpt_bigcode(module: Any) -> Layout:
    many = not module.multi_query
    return "c_attn", module.num_heads, module.kv_heads, module.head_dim, many


LAYOUTS: dict[str, Callable[[nn.Module], Layout]] = {
    "Phi3Attention": _phi3,
    "Phi4MultimodalAttention": _phi3,
    "GPT2Attention": _gpt2,
    "ImageGPTAttention": _gpt2,
    "GPTNeoXAttention": _gpt_neox,
    "PersimmonAttention": _persimmon,
    "GPTBigCodeAttention": _gpt_bigcode,
}


def fused_projection(name: str, module: nn.Module) -> AttentionSite | str | None:
    """A site for a module whose class is in `LAYOUTS`."""
    layout = LAYOUTS.get(type(module).__name__)
    if layout is None:
        return None
    if getattr(module, "is_cross_attention", False):
        return "cross-attention is not clipped"
    label, heads, kv_heads, width, _ = layout(module)
    expected = (heads + 2 * kv_heads) * width
    found = out_features(dict(module.named_children()).get(label))
    if found != expected:
        return f"{label} gives {found} features, expected {expected}"
    hidden = hidden_reason(module)
    return AttentionSite(name, heads, kv_heads, weakref.ref(module), resolve, hidden)


def resolve(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    """The query rows and the key rows of the one projection, weight and bias."""
    norms = find_norms(module)
    if isinstance(norms, str):
        return norms
    label, heads, kv_heads, width, interleaved = LAYOUTS[type(module).__name__](module)
    if norms != (None, None):
        return gain_target(site, norms, width, scope)
    query = Block(heads=heads, length=width, stride=3 * width if interleaved else width)
    key = Block(
        heads=kv_heads,
        length=width,
        start=width if interleaved else heads * width,
        stride=query.stride,
    )
    projection = dict(module.named_children())[label]
    found = projection_rows(projection, label, (query, key), scope)
    if isinstance(found, str):
        return found
    how = f"rows of q and k inside {label}, head by head"
    return ClipTarget(query=tuple(found[0]), key=tuple(found[1]), how=how)
