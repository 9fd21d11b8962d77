"""The gradient of a weight that is embedding and vocabulary projection at once, in one matrix.

Autograd makes a (V, H) gradient for each of the two uses and adds them up, so two such matrices
are in memory together, which is most of what a model with a large vocabulary needs. Here the
projection leaves its gradient with a `TiedGradient`, and the embedding, whose backward pass comes
last, adds the rows of its tokens to it and hands out the sum.

Nothing is left where nobody will fetch it: the projection asks `receives` in the backward pass,
which knows by then whether an embedding made here is still to run in it. Where none is (rows that
were padded, a model that cuts the graph, an embedding in another graph) each use gives its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hmpo.attention.embedding import input_embedding


class TiedGradient:
    """Where the projection's gradient waits for the embedding's, in one forward and backward."""

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table
        self.total: Float[Tensor, "V H"] | None = None
        self.receivers: list[Any] = []
        """Nodes of the graph that hand out `total`, each until its backward pass."""

    @classmethod
    def of(cls, base: nn.Module, weight: Tensor) -> "TiedGradient | None":
        """For a model whose embedding is plainly this weight; None for any other.

        A parameter of another class may be a shard, an embedding of another class or with hooks
        may do more than look rows up. On a GPU rows would be added in no fixed order.
        """
        table = input_embedding(base)
        if type(table) is not nn.Embedding or table.weight is not weight:
            return None
        plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
        plain = plain and weight.requires_grad and torch.is_grad_enabled()
        hooked = table._forward_hooks or table._forward_pre_hooks or "forward" in vars(table)
        unusual = table.sparse or table.scale_grad_by_freq or table.max_norm is not None
        return None if not plain or hooked or unusual else cls(table)

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... H"]:
        """What the embedding gives for these tokens."""
        rows = _Embed.apply(ids, self.table.weight, self)
        if rows.grad_fn is not None:
            self.receivers.append(rows.grad_fn)
        return rows

    @contextlib.contextmanager
    def embedding(self) -> Iterator[None]:
        """The table embeds by `embed` for the block, wherever the model calls it."""

        def instead(_: nn.Module, ids: tuple[Tensor, ...], rows: Tensor) -> Tensor:
            return self.embed(ids[0]) if ids else rows

        handle = self.table.register_forward_hook(instead)
        try:
            yield
        finally:
            handle.remove()

    def receives(self) -> bool:
        """Whether the backward pass that is running will come to one of the embeddings."""
        return any(map(torch._C._will_engine_execute_node, self.receivers))

    def take(self, receiver: Any) -> Tensor | None:
        """The projection's gradient, once; None where it took another way."""
        self.receivers = [node for node in self.receivers if node is not receiver]
        total, self.total = self.total, None
        return total


class _Embed(torch.autograd.Function):
    """ids, weight (V, H), the tied gradient -> rows of the weight."""

    @staticmethod
    def forward(ctx, ids, weight, tied):  # type: ignore[override]
        ctx.ids, ctx.tied, ctx.like = ids, tied, (weight.shape, weight.dtype, weight.device)
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        shape, dtype, device = ctx.like
        total = ctx.tied.take(ctx)
        if total is None:
            total = torch.zeros(shape, dtype=dtype, device=device)
        ids, rows = ctx.ids.flatten(), grad.reshape(-1, shape[1])
        if ctx.tied.table.padding_idx is not None:  # which has no gradient as an embedding
            rows = rows * (ids != ctx.tied.table.padding_idx)[:, None]
        return None, total.index_add_(0, ids, rows.to(dtype)), None
