"""Attention with a q_proj and a k_proj (Llama, Mistral, Qwen, Gemma, OLMo and their kin)."""

import weakref

from torch import nn

from hmpo.attention.sites.norms import find_norms, gain_target
from hmpo.attention.sites.projections import HeadSlices, out_features, projection_rows
from hmpo.attention.sites.rows import HeadRows, Scope
from hmpo.attention.sites.site import AttentionSite, ClipTarget, hidden_reason


def separate_projections(name: str, module: nn.Module) -> AttentionSite | str | None:
    """A site for a module with q_proj and k_proj, or q_proj and the keys of an earlier layer."""
    children = dict(module.named_children())
    borrows = _keys_are_read_elsewhere(module) and "k_proj" not in children
    if "q_proj" not in children or not ("k_proj" in children or borrows):
        return None
    width = width_of(module)
    if width < 1:
        return f"{type(module).__name__} has no head_dim"
    sides = ("q_proj",) if borrows else ("q_proj", "k_proj")
    rows = [out_features(children[side]) for side in sides]
    if any(r == 0 or r % width for r in rows):
        return f"{' and '.join(sides)} give {rows} features, expected multiples of {width}"
    share = getattr(module, "num_key_value_groups", None)
    heads = rows[0] // width
    kv_heads = rows[-1] // width if not borrows else heads // (share or 1)
    if isinstance(share, int) and not borrows and kv_heads * share < heads:
        heads = kv_heads * share  # q_proj gives more than queries, for example a gate
    if heads % kv_heads:
        return f"{heads} query heads do not divide into {kv_heads} key heads"
    return AttentionSite(
        name=name,
        heads=heads,
        kv_heads=kv_heads,
        module=weakref.ref(module),
        resolve=resolve,
        hidden=hidden_reason(module),
    )


def resolve(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    """What to scale: gains where queries or keys are normalised, else rows of the projections."""
    clamp = getattr(getattr(module, "config", None), "clip_qkv", None)
    if clamp is not None:
        return f"clip_qkv={clamp} clamps the projections, so logits are not linear in them"
    norms = find_norms(module)
    if isinstance(norms, str):
        return norms
    if norms == (None, None):
        return _rows_of_projections(module, site, scope)
    return gain_target(site, norms, width_of(module), scope, alone=_keys_are_read_elsewhere(module))


def width_of(module: nn.Module) -> int:
    """Width of a head; 0 if the module does not say."""
    width = getattr(module, "head_dim", 0)
    return width if isinstance(width, int) else 0


def _keys_are_read_elsewhere(module: nn.Module) -> bool:
    """Whether the layer stores its keys for later layers, or reads those of an earlier one.

    Scaling such keys would move other layers' logits, so the queries take all of gamma.
    """
    return bool(
        getattr(module, "is_kv_shared_layer", False)
        or getattr(module, "store_full_length_kv", False)
    )


def _rows_of_projections(module: nn.Module, site: AttentionSite, scope: Scope) -> ClipTarget | str:
    children, width = dict(module.named_children()), width_of(module)
    alone = _keys_are_read_elsewhere(module)
    sides: list[tuple[HeadRows, ...]] = []
    for name, heads in (("q_proj", site.heads), ("k_proj", site.kv_heads))[: 1 if alone else 2]:
        projection = children[name]
        if out_features(projection) != heads * width:
            return f"{name} gives {out_features(projection)} features, expected {heads} heads"
        rows = projection_rows(projection, name, (HeadSlices(heads=heads, length=width),), scope)
        if isinstance(rows, str):
            return rows
        sides.append(tuple(rows[0]))
    if alone:
        how = "rows of q, head by head; other layers read the same keys"
        return ClipTarget(query=sides[0], key=(), how=how)
    return ClipTarget(query=sides[0], key=sides[1], how="rows of q and k, head by head")
