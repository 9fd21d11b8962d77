"""Rows of parameters, head by head: what a clip multiplies."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

Scope = Literal["trained", "all", "adapters"]
"""Which parameters may be scaled: those with gradients; frozen ones too; or only what LoRA adds,
which leaves the frozen base's own part of queries and keys as it is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRows:
    """Rows of one parameter that belong to heads: head h has `length` rows from start + h * stride.

    Example: keys of a fused (q, k, v) projection of 8 heads of width 64, interleaved head by
    head: `HeadRows(parameter=weight, heads=8, length=64, start=64, stride=192)`.
    """

    parameter: Tensor
    """An `nn.Parameter`, whole or a DTensor."""
    heads: int
    """Heads H; 1 where all heads share the rows."""
    length: int
    """Rows of a head."""
    start: int = 0
    """First row of head 0."""
    stride: int
    """Rows from one head to the next."""
    axis: int = 0
    """Axis that counts rows; 1 for `Conv1D`, whose weight is transposed."""
    offset: float = 0.0
    """The model multiplies by offset + parameter: 1 for gains kept as 1 + w."""

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for the same rows of the same parameter, also if it is tied to other modules."""
        return (id(self.parameter), self.axis, self.heads, self.length, self.start, self.stride)

    def fault(self) -> str | None:
        """Why these rows cannot be multiplied in place, or None."""
        weight = self.parameter
        if type(weight) is not nn.Parameter and not isinstance(weight, DTensor):
            return f"is a {type(weight).__name__}, expected a plain parameter"
        if not weight.is_floating_point() or weight.element_size() < 2:
            return f"is {weight.dtype}, expected floating point of 16 bits or more"
        rows = weight.shape[self.axis] if weight.ndim > self.axis else 0
        if rows < self.start + (self.heads - 1) * self.stride + self.length:
            return f"has {rows} rows on this rank, fewer than its heads need; it is sharded flat"
        return None

    @torch.no_grad()
    def scale(self, factors: Float[Tensor, " heads"], like: Tensor | None = None) -> None:
        """Multiply each head's rows by its factor, in float32 or better; 1 changes no bit.

        A sharded parameter is scaled shard by shard, wherever the shards cut the heads, without
        communication.

        Args:
            factors: one for each head, the same on every rank.
            like: scale this tensor instead, for example a float32 copy of the parameter.
        """
        weight = self.parameter if like is None else like
        rows = self._row_factors(factors, weight.shape[self.axis])
        rows = rows.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        rows = rows.view([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])
        if isinstance(weight, DTensor):  # each rank cuts its own part out of the whole vector
            mesh = weight.device_mesh
            rows = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if self.offset == 0.0:
            weight.mul_(rows)
        else:
            scaled = (weight + self.offset) * rows - self.offset
            weight.copy_(torch.where(rows == 1, weight, scaled))

    def _row_factors(self, factors: Tensor, rows: int) -> Float[Tensor, " rows"]:
        heads = torch.arange(self.heads)[:, None] * self.stride
        rows_of_heads = self.start + heads + torch.arange(self.length)
        full = factors.new_ones(rows)
        full[rows_of_heads.flatten()] = factors.repeat_interleave(self.length)
        return full
