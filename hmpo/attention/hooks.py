"""Listening to attention that does not go through the shared attention functions.

Whether a module with queries and keys computes attention at all is seen, not believed: while its
forward pass runs, the softmax or the fused product that turns its queries and keys into weights is
watched for, and what goes into it is read, after any rotation, mask, scale or bias. A module in
which there is none (linear attention, convolutions) is left alone and reported. Inside a compiled
graph nothing can be watched; there queries and keys are the outputs of their projections, every
pair of tokens counts, and only modules whose code names a softmax are read.
`nn.MultiheadAttention` hands its inputs and masks to a hook, which projects them once more.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from hmpo.attention.logits import MASKED_BELOW, AttentionCall, SeenScores
from hmpo.attention.lse import KERNELS
from hmpo.attention.sites.plain import projection_pair
from hmpo.attention.sites.projections import out_features
from hmpo.attention.sites.site import AttentionSite
from hmpo.attention.tap import (
    Listener,
    add_listener,
    captures,
    is_recorded,
    notify,
    notify_compiled,
)

SOFTMAX = torch.ops.aten._softmax.default
PRODUCT = "scaled_dot_product_attention"
UNSEEN = "its forward pass computes no softmax of queries and keys (linear attention?): left alone"

_attends: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def computes_attention(module: nn.Module) -> bool | None:
    """Whether a module outside the shared functions was seen to attend; None before it ran."""
    return _attends.get(module)


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
        handles: list[Any] = [
            module.register_forward_pre_hook(_MultiheadHook(site), with_kwargs=True)
        ]
    else:
        names, children = projection_pair(module), dict(module.named_children())
        assert names is not None, "checked by `plain_attention`"
        width = out_features(children[names[1]]) // site.kv_heads
        pair = _QueryKeyPair(site, _static_scale(module, width))
        handles = [
            children[name].register_forward_hook(_ProjectionHook(pair, side))
            for side, name in enumerate(names)
        ]
        handles.append(_WatchedForward(module, pair))

    def end() -> None:
        remove_listener()
        while handles:
            handles.pop().remove()

    return end


class _QueryKeyPair:
    """What one forward pass of a module showed of its queries and keys."""

    def __init__(self, site: AttentionSite, scale: float | None) -> None:
        self.site, self.scale = site, scale
        self.outputs: dict[int, Tensor] = {}
        """By side: 0 queries, 1 keys."""
        self.seen = False
        """Was attention seen in this forward pass?"""
        self.active = False
        """Is one being watched?"""

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """One forward pass: did it attend? Where that cannot be told it says nothing."""
        self.outputs.clear()
        self.active, self.seen = True, False
        try:
            yield
            told = len(self.outputs) == 2 and self._sizes()[1] != self._width()
            if self.seen or (told and module not in _attends):
                _attends[module] = self.seen
        finally:
            self.active = False
            self.outputs.clear()

    def add(self, side: int, output: Tensor) -> None:
        """The output of one projection."""
        if not self.active and not torch.compiler.is_compiling():
            return
        self.outputs[side] = output.detach()
        module = self.site.module()
        if len(self.outputs) == 2 and module is not None and torch.compiler.is_compiling():
            query, key = self.outputs[0], self.outputs[1]
            self.outputs.clear()
            query, key = _by_head(query, self.site.heads), _by_head(key, self.site.kv_heads)
            if self.scale is not None:
                notify_compiled(id(module), query, key, None, self.scale, causal=False)

    def scores(self, scores: Tensor, dim: Any) -> None:
        """What goes into a softmax: the logits of this forward pass, if their shape says so."""
        if len(self.outputs) < 2 or scores.ndim < 3 or dim not in (-1, scores.ndim - 1):
            return
        (queries, keys), batch = self._sizes(), self._batch()
        if scores.shape[-2:] != (queries, keys) or scores.shape[:-2].numel() != (
            batch * self.site.heads
        ):
            return
        module = self.site.module()
        if module is None or (keys == self._width() and not _attends.get(module)):
            return  # it may be a softmax over features
        self.seen = True
        with torch.no_grad():
            logits = scores.detach().view(batch, self.site.heads, queries, keys)
            if queries == keys:  # a token sees itself, unless it is padding
                hidden = logits.diagonal(dim1=-2, dim2=-1) <= MASKED_BELOW
                logits = logits.masked_fill(hidden.unsqueeze(-1), -torch.inf)
            maxima = logits.amax((0, 2, 3)).float()
            maxima = maxima.masked_fill(maxima <= MASKED_BELOW, -torch.inf)
        self._tell(module, SeenScores(maxima=maxima))

    def product(self, query: Tensor, key: Tensor, **options: Any) -> None:
        """A call of a fused kernel."""
        module, scale = self.site.module(), options.get("scale")
        if query.ndim != 4 or query.shape[1] != self.site.heads or module is None:
            return
        mask = options.get("attn_mask")
        mask = options.get("attn_bias") if mask is None else mask
        while mask is not None and mask.ndim < 4:
            mask = mask.unsqueeze(0)
        self.seen = True
        call = AttentionCall(
            query=query.detach(),
            key=key.detach(),
            mask=None if mask is None else mask.detach(),
            causal=bool(options.get("is_causal", False)) and mask is None,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        )
        self._tell(module, call)

    def _tell(self, module: nn.Module, call: AttentionCall | SeenScores) -> None:
        if is_recorded():
            notify(id(module), call)
        elif (calls := captures(module)) is not None:
            calls.append(call)

    def _sizes(self) -> tuple[int, int]:
        """Tokens of the queries and of the keys."""
        return self.outputs[0].shape[-2], self.outputs[1].shape[-2]

    def _batch(self) -> int:
        return self.outputs[0].shape[:-2].numel()

    def _width(self) -> int:
        return self.outputs[1].shape[-1] // self.site.kv_heads


def _static_scale(module: nn.Module, width: int) -> float | None:
    """An upper bound of the factor on q . k, from the module's code; None where none attends."""
    names: set[str] = set()
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        for value in vars(kind).values():
            code = getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None)
            names |= set(getattr(code, "co_names", ()))
    scale = getattr(module, "scaling", None)
    if PRODUCT not in names and "softmax" not in names:
        return None
    if isinstance(scale, float):
        return scale
    return width**-0.5 if PRODUCT in names else max(1.0, width**-0.5)


class _Watch(TorchDispatchMode):
    """Shows a pair every softmax and every fused product that runs inside, as kernels do."""

    def __init__(self, pair: _QueryKeyPair) -> None:
        super().__init__()
        self.pair = pair

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SOFTMAX:
            self.pair.scores(args[0], args[1])
        elif func in KERNELS:
            names = (argument.name for argument in func._schema.arguments)
            self.pair.product(**dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)


class _WatchedForward:
    """Stands in a module's `__dict__` for its forward pass, and watches it. Copies do not.

    It holds the module weakly.
    """

    def __init__(self, module: nn.Module, pair: _QueryKeyPair) -> None:
        self.module, self.pair = weakref.ref(module), pair
        self.before = vars(module).get("forward")
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None, "a module that runs is alive"
        if torch.compiler.is_compiling() or not (is_recorded() or captures(module) is not None):
            return self._forward(module, *args, **kwargs)
        with self.pair.watching(module), _Watch(self.pair):
            return self._forward(module, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there; one that somebody wrapped meanwhile passes calls through."""
        module = self.module()
        if module is not None and vars(module).get("forward") is self:
            del vars(module)["forward"]
            if self.before is not None:
                vars(module)["forward"] = self.before
        self.pair = _QueryKeyPair(self.pair.site, None)

    def _forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def __reduce__(self) -> Any:  # the class's own: a copy has nothing else yet when it is asked
        return getattr, (self.module(), "forward")


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
        if output.numel() > 0:
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
