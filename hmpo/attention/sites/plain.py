"""Attention outside the shared attention functions: any module that projects queries and keys.

Its logits are read where it computes its softmax (`hmpo.attention.hooks`); a module that computes
none is left alone. `nn.MultiheadAttention` is called with its masks: the reading is the logit.
"""

import weakref
from typing import Any

from torch import nn

from hmpo.attention.sites.families import HEAD_COUNTS, HEAD_WIDTHS, QUERY_KEY
from hmpo.attention.sites.norms import find_norms
from hmpo.attention.sites.projections import HeadSlices, out_features, projection_rows, why_fixed
from hmpo.attention.sites.rows import HeadRows, Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget


def plain_attention(name: str, module: nn.Module, config: Any) -> AttentionSite | str | None:
    """A site for `nn.MultiheadAttention` or a module with a pair of children in `QUERY_KEY`.

    Args:
        name: the module's qualified name.
        module: any module.
        config: of the whole model, asked for the head width after the module and its own config.
    """
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None or module.add_zero_attn:
            return "MultiheadAttention adds keys of its own (add_bias_kv, add_zero_attn)"
        return AttentionSite(
            name=name or type(module).__name__,
            heads=module.num_heads,
            kv_heads=module.num_heads,
            module=weakref.ref(module),
            resolve=_resolve_multihead,
            tap="multihead",
        )
    pair = projection_pair(module)
    if pair is None:
        return None
    rows = [out_features(dict(module.named_children())[side]) for side in pair]
    width = _head_width(module, rows[0], config)
    if width is None or any(r % width for r in rows) or rows[0] % rows[1]:
        return (
            f"{' and '.join(pair)} give {rows} features, and nothing tells how they divide into "
            "heads; set head_dim or num_heads on the module"
        )
    if find_norms(module) != (None, None):
        return "queries or keys are normalised after the projections, where nobody can listen"
    return AttentionSite(
        name=name or type(module).__name__,
        heads=rows[0] // width,
        kv_heads=rows[1] // width,
        module=weakref.ref(module),
        resolve=_resolve_pair,
        tap="projections",
    )


def projection_pair(module: nn.Module) -> tuple[str, str] | None:
    """Names of the linear layers that make queries and keys."""
    children = dict(module.named_children())
    for query, key in QUERY_KEY:
        if out_features(children.get(query)) and out_features(children.get(key)):
            return query, key
    return None


def _head_width(module: nn.Module, features: int, config: Any) -> int | None:
    for place in (module, getattr(module, "config", None), config):
        for attribute in HEAD_WIDTHS:
            width = getattr(place, attribute, None)
            if isinstance(width, int) and width > 0:
                return width
        for attribute in HEAD_COUNTS:
            heads = getattr(place, attribute, None)
            if isinstance(heads, int) and heads > 0 and features % heads == 0:
                return features // heads
    return None


def _resolve_pair(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    pair, children = projection_pair(module), dict(module.named_children())
    if pair is None:
        return "its projections are gone"
    sides = []
    for name, heads in zip(pair, (site.heads, site.kv_heads), strict=True):
        length = out_features(children[name]) // heads
        slices = (HeadSlices(heads=heads, length=length),)
        rows = projection_rows(children[name], name, slices, scope)
        if isinstance(rows, str):
            return rows
        sides.append(tuple(rows[0]))
    how = f"rows of {pair[0]} and {pair[1]}, head by head"
    return ClipTarget(query=sides[0], key=sides[1], how=how)


def _resolve_multihead(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    assert isinstance(module, nn.MultiheadAttention)
    own = dict(module.named_parameters(recurse=False))
    width, heads = module.embed_dim // site.heads, site.heads
    first = HeadSlices(heads=heads, length=width)
    second = HeadSlices(heads=heads, length=width, start=module.embed_dim)
    places: dict[str, tuple[HeadSlices, ...]] = {
        "q_proj_weight": (first,),
        "k_proj_weight": (first,),
        "in_proj_weight": (first, second),
        "in_proj_bias": (first, second),
    }
    query: list[HeadRows] = []
    key: list[HeadRows] = []
    for label, parameter in own.items():
        slices = places.get(label, ())
        rows = [s.rows(parameter) for s in slices]
        for piece in rows:
            if (fault := why_fixed(piece, label, scope)) is not None:
                return fault
        if len(rows) == 2:
            query.append(rows[0])
            key.append(rows[1])
        elif rows:
            (query if label == "q_proj_weight" else key).append(rows[0])
    return ClipTarget(query=tuple(query), key=tuple(key), how="rows of q and k, head by head")
