"""Listening to attention that does not go through the shared attention functions, by hooks.

Queries and keys are the outputs of their projections, whichever comes first. What follows them
(rotary embedding, masks, the product itself) is out of sight, so every pair of tokens counts.
`nn.MultiheadAttention` hands its inputs and masks to the hook, which projects them once more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hmpo.attention.logits import MASKED_BELOW, AttentionCall
from hmpo.attention.sites.plain import projection_pair
from hmpo.attention.sites.site import AttentionSite
from hmpo.attention.tap import Listener, attend, is_heard, report, tell


def listen_outside(site: AttentionSite, listener: Listener) -> Callable[[], None]:
    """Call `listener` with every attention call of a site outside the shared functions.

    Only calls made while gradients are enabled are heard.

    Returns:
        A function that ends this listening; calling it twice does no harm.
    """
    module = site.module()
    assert module is not None, "sites are made from living modules"
    silence = attend(module, listener)
    if isinstance(module, nn.MultiheadAttention):
        handles = [module.register_forward_pre_hook(_Multihead(site), with_kwargs=True)]
    else:
        pair, names = _Pair(site), projection_pair(module)
        assert names is not None, "checked by `plain_attention`"
        children = dict(module.named_children())
        handles = [
            children[name].register_forward_hook(_Side(pair, side))
            for side, name in enumerate(names)
        ]

    def end() -> None:
        silence()
        while handles:
            handles.pop().remove()

    return end


class _Pair:
    """Queries and keys of one forward pass, until both are there."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.held: dict[int, Tensor] = {}

    def take(self, side: int, output: Tensor) -> None:
        self.held[side] = output.detach()
        if len(self.held) == 2:
            query, key = self.held[0], self.held[1]
            self.held.clear()
            module = self.site.module()
            if module is not None:
                self.tell(module, query, key)

    def tell(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        query = _by_head(query, self.site.heads)
        key = _by_head(key, self.site.kv_heads)
        scale = getattr(module, "scaling", None)
        scale = float(scale) if isinstance(scale, float) else query.shape[-1] ** -0.5
        if torch.compiler.is_compiling():
            report(id(module), query, key, None, scale, False)
            return
        call = AttentionCall(query=query, key=key, mask=None, causal=False, scale=scale)
        tell(id(module), call)


class _Nothing:
    """What a copied or pickled model gets in the place of a hook."""

    def __call__(self, *args: Any) -> None:
        return None


class Hook:
    """Hooks stay behind when a model is copied or pickled: they belong to one tracker."""

    def __deepcopy__(self, memo: Any) -> _Nothing:
        return _Nothing()

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Side(Hook):
    """Hook on one projection."""

    def __init__(self, pair: _Pair, side: int) -> None:
        self.pair, self.side = pair, side

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_heard() and output.numel() > 0:
            self.pair.take(self.side, output)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, S, H D) or (S, H D) to (B, H, S, D)."""
    x = x.unflatten(-1, (heads, -1)).transpose(-2, -3)
    return x.flatten(0, -4) if x.ndim > 3 else x.unsqueeze(0)


class _Multihead(Hook):
    """Hook before `nn.MultiheadAttention`."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not is_heard():
            return
        assert isinstance(module, nn.MultiheadAttention)
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key = given["query"], given["key"]
        if not query.numel():
            return
        with torch.no_grad():
            sides = [self._project(module, x, i) for i, x in enumerate((query, key))]
            mask = _multihead_mask(given, module.num_heads, *sides)
        call = AttentionCall(
            query=sides[0],
            key=sides[1],
            mask=mask,
            causal=False,
            scale=sides[0].shape[-1] ** -0.5,
            own_tokens=query is key,
        )
        tell(id(module), call)

    def _project(self, module: nn.MultiheadAttention, x: Tensor, side: int) -> Tensor:
        """Queries (side 0) or keys (side 1), (B, H, S, D)."""
        wide = module.embed_dim
        rows = slice(side * wide, (side + 1) * wide)
        weight = (module.q_proj_weight, module.k_proj_weight)[side]
        weight = module.in_proj_weight[rows] if weight is None else weight
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        if x.ndim == 3 and not module.batch_first:
            x = x.transpose(0, 1)
        return _by_head(linear(x, weight, bias), module.num_heads)


def _multihead_mask(given: dict[str, Any], heads: int, query: Tensor, key: Tensor) -> Tensor | None:
    """Visible pairs (B or 1, H or 1, Q, K) bool, or None if all are."""
    padding, pairs = given.get("key_padding_mask"), given.get("attn_mask")
    visible = None
    if padding is not None:
        seen = ~padding if padding.dtype == torch.bool else padding > MASKED_BELOW
        visible = seen.view(query.shape[0], 1, 1, key.shape[2])
        visible = visible.expand(-1, 1, query.shape[2], -1)
    if pairs is not None:
        seen = ~pairs if pairs.dtype == torch.bool else pairs > MASKED_BELOW
        seen = seen[None, None] if seen.ndim == 2 else seen.unflatten(0, (-1, heads))
        visible = seen if visible is None else visible & seen
    return visible
