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
from hmpo.attention.tap import Listener, add_listener, is_recorded, notify, notify_compiled


def listen_outside(site: AttentionSite, listener: Listener) -> Callable[[], None]:
    """Call `listener` with every attention call of a site outside the shared functions.

    Only calls that `is_recorded` are passed on.

    Returns:
        A function that ends this listening; calling it twice does no harm.
    """
    module = site.module()
    assert module is not None, "sites are made from living modules"
    remove_listener = add_listener(module, listener)
    if isinstance(module, nn.MultiheadAttention):
        handles = [module.register_forward_pre_hook(_MultiheadHook(site), with_kwargs=True)]
    else:
        pair, names = _QueryKeyPair(site), projection_pair(module)
        assert names is not None, "checked by `plain_attention`"
        children = dict(module.named_children())
        handles = [
            children[name].register_forward_hook(_ProjectionHook(pair, side))
            for side, name in enumerate(names)
        ]

    def end() -> None:
        remove_listener()
        while handles:
            handles.pop().remove()

    return end


class _QueryKeyPair:
    """Outputs of a module's two projections in one forward pass, until both are there."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.outputs: dict[int, Tensor] = {}
        """By side: 0 queries, 1 keys."""

    def add(self, side: int, output: Tensor) -> None:
        self.outputs[side] = output.detach()
        if len(self.outputs) == 2:
            query, key = self.outputs[0], self.outputs[1]
            self.outputs.clear()
            module = self.site.module()
            if module is not None:
                self.notify(module, query, key)

    def notify(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        query = _by_head(query, self.site.heads)
        key = _by_head(key, self.site.kv_heads)
        scale = getattr(module, "scaling", None)
        scale = float(scale) if isinstance(scale, float) else query.shape[-1] ** -0.5
        if torch.compiler.is_compiling():
            notify_compiled(id(module), query, key, mask=None, scale=scale, causal=False)
            return
        call = AttentionCall(query=query, key=key, mask=None, causal=False, scale=scale)
        notify(id(module), call)


class _NoHook:
    """What a copied or pickled model gets in the place of a hook."""

    def __call__(self, *args: Any) -> None:
        return None


class Hook:
    """Hooks stay behind when a model is copied or pickled: they belong to one tracker."""

    def __deepcopy__(self, memo: Any) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> Any:
        return _NoHook, ()


class _ProjectionHook(Hook):
    """Hook on one projection."""

    def __init__(self, pair: _QueryKeyPair, side: int) -> None:
        self.pair, self.side = pair, side

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_recorded() and output.numel() > 0:
            self.pair.add(self.side, output)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, S, H D) or (S, H D) to (B, H, S, D)."""
    x = x.unflatten(-1, (heads, -1)).transpose(-2, -3)
    return x.flatten(0, -4) if x.ndim > 3 else x.unsqueeze(0)


class _MultiheadHook(Hook):
    """Hook before `nn.MultiheadAttention`."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not is_recorded():
            return
        assert isinstance(module, nn.MultiheadAttention)
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        query, key = arguments["query"], arguments["key"]
        if not query.numel():
            return
        with torch.no_grad():
            queries, keys = self._project(module, query, 0), self._project(module, key, 1)
            mask = _multihead_mask(arguments, module.num_heads, queries, keys)
        call = AttentionCall(
            query=queries,
            key=keys,
            mask=mask,
            causal=False,
            scale=queries.shape[-1] ** -0.5,
            own_tokens=query is key,
        )
        notify(id(module), call)

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


def _multihead_mask(
    arguments: dict[str, Any], heads: int, query: Tensor, key: Tensor
) -> Tensor | None:
    """Visible pairs (B or 1, H or 1, Q, K) bool, or None if all are."""
    padding, hidden = arguments.get("key_padding_mask"), arguments.get("attn_mask")
    visible = None
    if padding is not None:
        real = ~padding if padding.dtype == torch.bool else padding > MASKED_BELOW
        visible = real.view(query.shape[0], 1, 1, key.shape[2])
        visible = visible.expand(-1, 1, query.shape[2], -1)
    if hidden is not None:
        pairs = ~hidden if hidden.dtype == torch.bool else hidden > MASKED_BELOW
        pairs = pairs[None, None] if pairs.ndim == 2 else pairs.unflatten(0, (-1, heads))
        visible = pairs if visible is None else visible & pairs
    return visible
