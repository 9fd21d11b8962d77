"""What single attention modules are called with, kept so that they can be run once more.

Only references are kept, and no graph hangs on them. While autograd keeps the same hidden states
for its backward pass they cost nothing; from then to the step they cost tokens x hidden width for
every call, up to `KEEP_INPUT_BYTES` for all layers together. `InputStore.arm` leaves out the layers
that are far from tau.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.attention.hooks import Hook
from hmpo.attention.tap import is_recorded

KEEP_INPUT_BYTES = 1 << 30
"""Inputs of attention modules that one tracker keeps from one step to the next."""
EMPTY_CACHE = "DynamicCache"
"""The cache that transformers makes by itself; while it is empty a second run needs none."""


@dataclass(frozen=True, eq=False)
class KeptInput:
    """One call of an attention module: arguments without gradients, and its autocast setting."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: torch.dtype | None
    """None where autocast was off."""


class InputStore:
    """Inputs of the watched modules since the last `take()`, by name."""

    def __init__(self) -> None:
        self.armed: dict[str, bool] = {}
        """Watched layers, and whether their inputs are kept."""
        self.reset()

    def reset(self) -> None:
        """Drop everything."""
        self.calls: dict[str, list[KeptInput]] = {}
        self.lost: dict[str, str] = {}
        """Layers of which not every call could be kept, and why."""
        self.first: dict[str, int] = {}
        """Calls of each layer whose recomputation in the backward pass is still to come."""
        self._bytes: dict[int, int] = {}

    def arm(self, names: Iterable[str], near: bool) -> None:
        """Keep the inputs of these layers from now on, or not."""
        self.armed.update(dict.fromkeys(names, near))

    def take(self) -> tuple[dict[str, list[KeptInput]], dict[str, str]]:
        """What was kept and what was not, by layer; starts afresh."""
        calls, lost = self.calls, self.lost
        self.reset()
        return calls, lost

    def add(self, name: str, call: KeptInput | str) -> None:
        """Keep a call, or note why it cannot be kept; one lost call makes the others useless."""
        if isinstance(call, KeptInput):
            sizes = {t.untyped_storage().data_ptr(): t.nbytes for t in _tensors(call)}
            self._bytes |= sizes  # masks and positions are the same tensors in every layer
            if sum(self._bytes.values()) > KEEP_INPUT_BYTES:
                call = f"the inputs of attention exceed {KEEP_INPUT_BYTES >> 20} MiB"
        if isinstance(call, str):
            self.lost[name] = call
            self.calls.pop(name, None)
        elif name not in self.lost:
            self.calls.setdefault(name, []).append(call)


class InputHook(Hook):
    """Hook before one attention module. It holds no module."""

    def __init__(self, name: str, store: InputStore) -> None:
        self.name, self.store = name, weakref.proxy(store)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the call if its layer is armed and the call `is_recorded`."""
        if torch.compiler.is_compiling() or not is_recorded():
            return
        store, name = self.store, self.name
        if not store.armed[name]:
            return
        if torch._C._current_graph_task_id() != -1:  # checkpointing computes a call again
            if store.first.get(name):
                store.first[name] -= 1
                return
        elif torch.is_grad_enabled():  # nothing is computed again without gradients
            store.first[name] = store.first.get(name, 0) + 1
        store.add(name, kept_input(module, args, kwargs))


def kept_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> KeptInput | str:
    """The call with detached tensors and without its empty cache, or why it cannot run again."""
    for cache in filter(_is_cache, (*args, *kwargs.values())):
        kind, layer = type(cache).__name__, getattr(module, "layer_idx", None)
        if kind != EMPTY_CACHE or cache.get_seq_length(0 if layer is None else layer):
            return f"it is called with a {kind} that holds earlier keys"
    kwargs = {name: _plain(x) for name, x in kwargs.items()}
    device = next(module.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return KeptInput(_plain(args), kwargs, device, autocast)


def _is_cache(x: Any) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(x).__mro__)


def _plain(x: Any) -> Any:
    """Tensors without gradients, no cache, the rest as it is."""
    if isinstance(x, Tensor):
        return x.detach()
    if isinstance(x, tuple):
        return tuple(map(_plain, x))
    return None if _is_cache(x) else x


def _tensors(call: KeptInput) -> list[Tensor]:
    flat: list[Any] = [*call.args, *call.kwargs.values()]
    inner = [y for x in flat if isinstance(x, tuple) for y in x]
    return [x for x in [*flat, *inner] if isinstance(x, Tensor)]
