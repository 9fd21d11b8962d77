"""CUDA graphs on a CPU: what is captured is a list of operations on tensors at fixed places.

Like the real thing, a capture executes nothing that lasts, a replay runs the very operations of
the capture with the numbers that were in them, and asking for a value, or for a shape that depends
on values, is an error.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = (
    "item",
    "is_nonzero",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "lift_fresh",
    "repeat_interleave",
)
"""Operations that make the host wait for the device, or copy from it."""


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recording(TorchDispatchMode):
    """Runs operations, writes them down, and remembers what they are about to overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.fresh: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1].rstrip("_")
        masks = name in ("index", "index_put") and any(
            x.dtype == torch.bool for x in tensors(args[1])
        )
        if name in REFUSED or masks:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors(value) if written else []:
                if place(x) not in self.fresh and place(x) not in self.before:
                    whole = x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())
                    self.before[place(x)] = whole, whole.clone()
        out = func(*args, **kwargs)
        known = {place(x) for x in tensors((args, kwargs))}
        self.fresh |= {place(x) for x in tensors(out)} - known
        self.calls.append((func, args, kwargs, out))
        return out


class RecordedGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    made: int = 0
    replays: int = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for func, args, kwargs, out in self.calls:
            for new, old in zip(tensors(func(*args, **kwargs)), tensors(out)):
                assert new.shape == old.shape
                if place(new) != place(old):
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """In the place of `torch.cuda.graph`."""
    recording = _Recording()
    try:
        with recording:
            yield
    finally:
        for whole, before in recording.before.values():
            whole.copy_(before)
    graph.calls = recording.calls
    RecordedGraph.made += 1
