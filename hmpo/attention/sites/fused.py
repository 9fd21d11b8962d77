"""Attention with one projection for queries, keys and values.

How the three lie in it cannot be seen from its shape, so the classes are listed in `FAMILIES`: one
after the other (Phi-3, GPT-2 by columns) or interleaved head by head (GPT-NeoX, Persimmon;
GPT-BigCode does either).
"""

import weakref

from torch import nn

from hmpo.attention.sites.families import fused_layout
from hmpo.attention.sites.norms import find_norms, gain_target
from hmpo.attention.sites.projections import HeadSlices, out_features, projection_rows
from hmpo.attention.sites.rows import Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget, hidden_reason


def fused_projection(name: str, module: nn.Module) -> AttentionSite | str | None:
    """A site for a module whose class has a layout in `FAMILIES`."""
    layout = fused_layout(module)
    if layout is None:
        return None
    if getattr(module, "is_cross_attention", False):
        return "cross-attention is not clipped"
    expected = (layout.heads + 2 * layout.kv_heads) * layout.width
    features = out_features(dict(module.named_children()).get(layout.projection))
    if features != expected:
        return f"{layout.projection} gives {features} features, expected {expected}"
    return AttentionSite(
        name=name,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        module=weakref.ref(module),
        resolve=resolve,
        hidden=hidden_reason(module),
    )


def resolve(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    """The query rows and the key rows of the one projection, weight and bias."""
    norms = find_norms(module)
    if isinstance(norms, str):
        return norms
    layout = fused_layout(module)
    assert layout is not None, "sites of this kind are made from modules with a layout"
    if norms != (None, None):
        return gain_target(site, norms, layout.width, scope)
    width, label = layout.width, layout.projection
    query = HeadSlices(
        heads=layout.heads, length=width, stride=3 * width if layout.interleaved else width
    )
    key = HeadSlices(
        heads=layout.kv_heads,
        length=width,
        start=width if layout.interleaved else layout.heads * width,
        stride=query.stride,
    )
    projection = dict(module.named_children())[label]
    rows = projection_rows(projection, label, (query, key), scope)
    if isinstance(rows, str):
        return rows
    how = f"rows of q and k inside {label}, head by head"
    return ClipTarget(query=tuple(rows[0]), key=tuple(rows[1]), how=how)
