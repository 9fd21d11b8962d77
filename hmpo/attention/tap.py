"""Listening to the attention of single modules, where Hugging Face models look it up.

A watched module's attention calls go through `attend` (`hmpo.attention.interface`), in the place of
the function that it looks up, whose name, mask and signature stay; nothing that other modules see
is touched, and everything is as before once the last listener leaves.

Inside `torch.compile` the call is one opaque operator, so that the graph does not break; it hands
the listener the same queries and keys when the graph runs. The log-sum-exp stays in the graph.

A packed call (`hmpo.attention.packed`) is split first, so the listener gets its batches.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.attention.interface import intercept
from hmpo.attention.logits import AttentionCall, SeenScores
from hmpo.attention.lse import call_with_lse, rows_of
from hmpo.attention.packed import unpacking
from hmpo.errors import ModelError

Listener = Callable[[AttentionCall | SeenScores], None]

_listeners: dict[int, list[Listener]] = {}
"""By id of the module, which a compiler can look up; a module that dies takes its entry along."""
_finalizers: dict[int, weakref.finalize] = {}
_captured: dict[int, list[AttentionCall | SeenScores]] = {}
"""By id of a module that is run once more, the calls it makes."""
_without_gradient = False
"""Are passes without gradients recorded now?"""
_deaf = False
"""Is nothing recorded now?"""


def listen(module: nn.Module, listener: Listener) -> Callable[[], None]:
    """Call `listener` with every attention call of `module` made while gradients are enabled.

    Passes under `torch.no_grad()` (sampling, reference and behaviour log-probs) are not recorded,
    but for those in a `record_without_gradient()` block.
    With gradient checkpointing the recomputed call is recorded, and in the non-reentrant mode the
    first one too. The listener must not hold `module`.

    Returns:
        A function that ends this listening; calling it twice does no harm.
    """
    ends = (add_listener(module, listener), intercept(module, attend))

    def end() -> None:
        for stop in ends:
            stop()

    return end


@contextmanager
def record_without_gradient() -> Iterator[None]:
    """Passes in this block are recorded although they need no gradients.

    For rows of an update whose gradient is known to be zero.
    """
    global _without_gradient
    before, _without_gradient = _without_gradient, True
    try:
        yield
    finally:
        _without_gradient = before


@contextmanager
def not_recorded() -> Iterator[None]:
    """Passes in this block are no training, whatever surrounds it: a model is asked something."""
    global _deaf
    before, _deaf = _deaf, True
    try:
        yield
    finally:
        _deaf = before


def is_recorded() -> bool:
    """Whether attention calls made now are part of training."""
    return (torch.is_grad_enabled() or _without_gradient) and not _deaf


def add_listener(module: nn.Module, listener: Listener) -> Callable[[], None]:
    """Register a listener of `module`; returns a function that removes it, once."""
    module_id = id(module)
    if module_id not in _listeners:
        _listeners[module_id] = []
        _finalizers[module_id] = weakref.finalize(module, _forget_module, module_id)
    listeners = _listeners[module_id]
    listeners.append(listener)

    def remove() -> None:
        if listener in listeners:
            listeners.remove(listener)
            if not listeners and _listeners.get(module_id) is listeners:
                _finalizers[module_id].detach()
                _forget_module(module_id)

    return remove


def listener_count() -> int:
    """Listeners of all modules of this process; a module that dies takes its own along."""
    return sum(map(len, _listeners.values()))


@contextmanager
def capture_calls(module: nn.Module) -> Iterator[list[Any]]:
    """The attention calls that `module`, which must have a listener, makes without gradients.

    They go to this list alone, not to the listeners.
    """
    calls: list[AttentionCall | SeenScores] = []
    _captured[id(module)] = calls
    try:
        yield calls
    finally:
        del _captured[id(module)]


def captures(module: nn.Module) -> list[Any] | None:
    """The list of `capture_calls` for this module, where one is being filled."""
    return _captured.get(id(module))


def _forget_module(module_id: int) -> None:
    del _listeners[module_id], _finalizers[module_id]


@functools.cache
def attend(live: Callable[[], Callable[..., Any]], eager: bool) -> Callable[..., Any]:
    """What an intercepted module calls: the function of the moment, heard and fed with batches."""
    return unpacking(_heard(live, eager), eager=eager)


def _heard(live: Callable[[], Callable[..., Any]], eager: bool) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        original = live()
        recorded = _listeners.get(id(module)) and is_recorded() and query.numel() > 0
        if not recorded:
            if id(module) in _captured:
                scale, causal = _scale_and_causal(module, query, options, eager=eager)
                _captured[id(module)].append(
                    AttentionCall(
                        query=query,
                        key=key,
                        mask=attention_mask,
                        causal=causal,
                        scale=scale,
                        own_tokens=_own_tokens(module, query, key),
                    )
                )
            return original(module, query, key, value, attention_mask, *args, **options)
        if args:
            raise ModelError(
                f"{type(module).__name__} passes {len(args)} positional options to attention; "
                "expected keywords; detach the logit tracker from this model"
            )
        run = functools.partial(original, module, query, key, value, attention_mask, **options)
        scale, causal = _scale_and_causal(module, query, options, eager=eager)
        if torch.compiler.is_compiling():
            mask = None if attention_mask is None else attention_mask.detach()
            notify_compiled(id(module), query.detach(), key.detach(), mask, scale, causal)
            return run()
        result, raw = (run(), None) if eager else call_with_lse(run)
        usable = attention_mask is None or attention_mask.dtype == torch.bool
        usable = (
            usable and options.get("position_bias") is None
        )  # else it is not of the logits alone
        batch, heads, queries, _ = query.shape
        call = AttentionCall(
            query=query.detach(),
            key=key.detach(),
            mask=None if attention_mask is None else attention_mask.detach(),
            causal=causal,
            scale=scale,
            lse=rows_of(raw, batch=batch, heads=heads, queries=queries) if usable else None,
            own_tokens=_own_tokens(module, query, key),
        )
        notify(id(module), call)
        return result

    return attention


def _own_tokens(module: nn.Module, query: Tensor, key: Tensor) -> bool:
    """Whether query i and key i are one token: not where other states are attended to."""
    return query.shape[2] == key.shape[2] or getattr(module, "is_causal", None) is not False


def _scale_and_causal(
    module: nn.Module, query: Any, options: dict[str, Any], *, eager: bool
) -> tuple[float, bool]:
    """What the call will do. Without a mask, eager attends to everything and sdpa causally."""
    scale, causal = options.get("scaling"), options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return scale, bool(causal) and query.shape[2] > 1 and not eager


def notify_compiled(
    module_id: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> None:
    """`notify` from inside a compiled graph, through an operator that does not break it."""
    torch.ops.hmpo.observe_logits(query, key, mask, _pulse, scale, causal, module_id)


def notify(module_id: int, call: AttentionCall | SeenScores) -> None:
    """Hand a call to the listeners of the module with this `id`."""
    for listener in tuple(_listeners.get(module_id, ())):
        listener(call)


_pulse = torch.zeros(1)
"""Written by `observe_logits`, so that no compiler takes it for an operator without effect."""


@torch.library.custom_op("hmpo::observe_logits", mutates_args=("pulse",))
def _observe_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    pulse: Tensor,
    scale: float,
    causal: bool,
    module_id: int,
) -> None:
    call = AttentionCall(query=query, key=key, mask=mask, causal=causal, scale=scale, borrowed=True)
    notify(module_id, call)


@_observe_logits.register_fake
def _(*args: Any) -> None:
    return None
