"""Which rows of a weight are one map: the heads of a projection, or query, key and value.

A fused projection holds three maps in one matrix, and every projection of an attention layer holds
one for each head. Muon can orthogonalise them together or apart.
"""

from dataclasses import dataclass

from torch import nn

from hmpo.attention.sites import AttentionSite, find_sites, hidden_sites
from hmpo.attention.sites.families import (
    CONV1D,
    QUERY_KEY_VALUE,
    FusedLayout,
    fused_layout,
    latent_query,
)
from hmpo.attention.sites.projections import out_features

SEPARATE = tuple(name for names in QUERY_KEY_VALUE for name in names)
"""Children of an attention module whose outputs are heads."""


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """How the outputs of a weight divide into maps, see `Muon`."""

    sizes: tuple[int, ...] | None = None
    """Output rows of each map; None: all of them are one."""
    repeats: int = 1
    """How often that pattern comes; the same part of every repeat belongs to one map."""
    transposed: bool = False
    """Whether outputs are columns (GPT-2's Conv1D)."""

    def group_settings(self) -> dict[str, object]:
        """As keys of a parameter group."""
        return {
            "split_sizes": self.sizes,
            "split_repeats": self.repeats,
            "transposed": self.transposed,
        }

    def __str__(self) -> str:
        if self.sizes is None:
            return "whole"
        if self.repeats > 1:
            return f"{len(self.sizes)} maps, interleaved in {self.repeats} heads"
        if len(set(self.sizes)) == 1:
            return f"{len(self.sizes)} blocks of {self.sizes[0]}"
        return f"blocks of {', '.join(map(str, self.sizes))}"


def head_layouts(
    model: nn.Module, *, per_head: bool = False, split_fused: bool = True
) -> dict[int, HeadLayout]:
    """Layouts by `id` of the weight; those of a weight that is one map are left out.

    Args:
        model: any model; attention that is not recognised is left whole.
        per_head: every head of queries, keys and values apart. Latent attention: the heads of the
            second projections. Heads of the output projection are no rows and stay together.
        split_fused: query, key and value apart where one matrix holds them.
    """
    layouts: dict[int, HeadLayout] = {}
    for module in model.modules():
        if type(module).__name__ == CONV1D:
            layouts[id(module.weight)] = HeadLayout(transposed=True)
    for site in (*find_sites(model)[0], *hidden_sites(model)):
        for weight, sizes, repeats in _divided(site, per_head, split_fused):
            transposed = layouts.get(id(weight), HeadLayout()).transposed
            layouts[id(weight)] = HeadLayout(sizes=sizes, repeats=repeats, transposed=transposed)
    return layouts


Division = tuple[object, tuple[int, ...], int]
"""A weight, and the `sizes` and `repeats` of its `HeadLayout`."""


def _divided(site: AttentionSite, per_head: bool, split_fused: bool) -> list[Division]:
    module = site.module()
    if module is None:
        return []
    children = dict(module.named_children())
    layout = fused_layout(module)
    if layout is not None:
        return _fused(children[layout.projection].weight, layout, per_head, split_fused)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim // module.num_heads
        if module.in_proj_weight is not None:
            layout = FusedLayout(
                projection="in_proj", heads=site.heads, kv_heads=site.heads, width=width
            )
            return _fused(module.in_proj_weight, layout, per_head, split_fused)
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [(w, (width,) * site.heads, 1) for w in weights if per_head]
    if not per_head:
        return []
    if "kv_b_proj" in children:
        names = (latent_query(children), "kv_b_proj")
        return [_heads(children[name], site.heads) for name in names]
    query = next(n for n in SEPARATE if n in children) if set(SEPARATE) & set(children) else None
    if query is None:
        return []
    width = getattr(module, "head_dim", None)
    width = width if isinstance(width, int) else out_features(children[query]) // site.heads
    linear = [c for n, c in children.items() if n in SEPARATE and isinstance(c, nn.Linear)]
    return [_heads(c, c.out_features // width) for c in linear if c.out_features % width == 0]


def _fused(
    weight: object, layout: FusedLayout, per_head: bool, split_fused: bool
) -> list[Division]:
    heads, kv_heads, width = layout.heads, layout.kv_heads, layout.width
    if per_head:
        return [(weight, (width,) * (heads + 2 * kv_heads), 1)]
    if not split_fused:
        return []
    if layout.interleaved:
        return [(weight, (width,) * 3, heads)]
    return [(weight, (heads * width, kv_heads * width, kv_heads * width), 1)]


def _heads(projection: nn.Module, heads: int) -> Division:
    return projection.weight, (out_features(projection) // heads,) * heads, 1
