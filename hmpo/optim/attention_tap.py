"""Listening to the attention of single modules, where Hugging Face models look it up.

Transformers models look their attention function up by name at every call: "sdpa" in the
interface object of the modeling file, "eager" in the file's own globals. Both places are
wrapped under the name they already have: a new name would lose the attention mask, because
masks are made by the same name. A wrapper adds nothing for modules nobody listens to, and is
taken out again when the last listener leaves.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hmpo.errors import ModelError
from hmpo.optim.attention_max import AttentionCall

Listener = Callable[[AttentionCall], None]

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
EAGER = "eager_attention_forward"
IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention implementations that are wrapped."""

_listeners: weakref.WeakKeyDictionary[nn.Module, list[Listener]] = weakref.WeakKeyDictionary()
_taps: dict[tuple[int, str], "_Tap"] = {}


@dataclass(eq=False)
class _Tap:
    """One wrapped entry of one mapping, with the number of modules that need it."""

    place: MutableMapping[str, Any]
    name: str
    original: Callable
    wrapper: Callable
    users: int = 0


def modeling_globals(module: nn.Module) -> dict[str, Any]:
    """Globals of the file that defines the module's forward pass."""
    return inspect.unwrap(type(module).forward).__globals__


def listen(module: nn.Module, listener: Listener) -> Callable[[], None]:
    """Call `listener` with every attention call of `module` made while gradients are enabled.

    Passes under `torch.no_grad()` (sampling, reference and behaviour log-probs) are not heard.
    With gradient checkpointing the recomputed call is heard, and in the non-reentrant mode the
    first one too. The listener must not hold `module`.

    Returns:
        A function that ends this listening; calling it twice does no harm.
    """
    names = modeling_globals(module)
    places = [(names[INTERFACE], "sdpa"), (names, EAGER)]
    taps = [_acquire(place, name) for place, name in places if name in place]
    _listeners.setdefault(module, []).append(listener)
    return _Release(weakref.ref(module), listener, taps)


@dataclass(eq=False)
class _Release:
    module: "weakref.ref[nn.Module]"
    listener: Listener
    taps: list[_Tap]

    def __call__(self) -> None:
        module = self.module()
        if self.taps and module is not None:
            _listeners[module].remove(self.listener)
            if not _listeners[module]:
                del _listeners[module]
        while self.taps:
            _give_back(self.taps.pop())


def _acquire(place: MutableMapping[str, Any], name: str) -> _Tap:
    key = (id(place), name)
    tap = _taps.get(key)
    if tap is None or place[name] is not tap.wrapper:
        original = place[name]
        tap = _taps[key] = _Tap(place, name, original, _wrap(original, name))
        place[name] = tap.wrapper
    tap.users += 1
    return tap


def _give_back(tap: _Tap) -> None:
    tap.users -= 1
    if tap.users:
        return
    if _taps.get((id(tap.place), tap.name)) is tap:
        del _taps[id(tap.place), tap.name]
    if tap.place[tap.name] is not tap.wrapper:
        return  # somebody wrapped our wrapper: it stays below theirs and hears nobody
    if not isinstance(tap.place, dict):
        del tap.place[tap.name]  # an interface's own entry, which may shadow a shared one
        if tap.place.get(tap.name) is tap.original:
            return
    tap.place[tap.name] = tap.original


def _wrap(original: Callable, name: str) -> Callable:
    @functools.wraps(original)
    def attention(
        module: nn.Module,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        if module in _listeners and torch.is_grad_enabled() and query.numel():
            if args:
                raise ModelError(
                    f"{type(module).__name__} passes {len(args)} positional options to {name}; "
                    "expected keywords; detach the logit tracker from this model"
                )
            call = _describe(module, query, key, attention_mask, kw, eager=name == EAGER)
            for listener in tuple(_listeners[module]):
                listener(call)
        return original(module, query, key, value, attention_mask, *args, **kw)

    return attention


def _describe(
    module: nn.Module, query: Any, key: Any, mask: Any, options: dict[str, Any], *, eager: bool
) -> AttentionCall:
    """The call as data. Without a mask, eager attends to everything and sdpa causally."""
    scale, causal = options.get("scaling"), options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return AttentionCall(
        query=query.detach(),
        key=key.detach(),
        mask=None if mask is None else mask.detach(),
        causal=bool(causal) and query.shape[2] > 1 and not eager,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
    )
