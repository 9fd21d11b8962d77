"""Multi-head latent attention (DeepSeek-V2/V3, Kimi K2): K2's rules, arXiv 2507.20534, alg. 1.

A head's logit is q_nope . k_nope + q_rope . k_rope. k_rope is one vector for all heads, so
q_rope takes all of gamma and the two nope parts share it.
"""

import weakref

from torch import nn

from hmpo.attention.sites.families import LATENT_WIDTHS, latent_query
from hmpo.attention.sites.projections import HeadSlices, out_features, projection_rows
from hmpo.attention.sites.rows import Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget, hidden_reason


def latent_attention(name: str, module: nn.Module) -> AttentionSite | str | None:
    """A site for a module with kv_b_proj, and q_b_proj or q_proj."""
    children = dict(module.named_children())
    if "kv_b_proj" not in children:
        return None
    if not all(isinstance(getattr(module, width, None), int) for width in LATENT_WIDTHS):
        return f"{type(module).__name__} has kv_b_proj without {', '.join(LATENT_WIDTHS)}"
    nope, rope, value = (int(getattr(module, width)) for width in LATENT_WIDTHS)
    label = latent_query(children)
    keys, queries = out_features(children["kv_b_proj"]), out_features(children.get(label))
    heads = keys // (nope + value)
    if heads < 1 or heads * (nope + value) != keys or heads * (nope + rope) != queries:
        return f"kv_b_proj and {label} give {[keys, queries]} features, expected those of heads"
    return AttentionSite(
        name=name,
        heads=heads,
        kv_heads=heads,
        module=weakref.ref(module),
        resolve=resolve,
        hidden=hidden_reason(module),
    )


def resolve(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    """Nope rows of queries and keys share gamma, rope rows of the queries take all of it."""
    children = dict(module.named_children())
    nope, rope, value = (int(getattr(module, width)) for width in LATENT_WIDTHS)
    label, heads = latent_query(children), site.heads
    parts = (
        HeadSlices(heads=heads, length=nope, stride=nope + rope),
        HeadSlices(heads=heads, length=rope, start=nope, stride=nope + rope),
    )
    query = projection_rows(children[label], label, parts, scope)
    if isinstance(query, str):
        return query
    keys = (HeadSlices(heads=heads, length=nope, stride=nope + value),)
    key = projection_rows(children["kv_b_proj"], "kv_b_proj", keys, scope)
    if isinstance(key, str):
        return key
    return ClipTarget(
        query=tuple(query[0]),
        key=tuple(key[0]),
        both=tuple(query[1]),
        how=f"nope rows of {label} and kv_b_proj, rope rows of {label}, head by head",
    )
