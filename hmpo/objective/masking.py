"""Padding taken out, and limits put on, without the cost of selecting by a boolean mask.

Selecting by a mask (`where`, `masked_fill`, a clamp with tensor bounds) costs ten to twenty times
a multiplication on a CPU. A product would turn a NaN in the padding into a NaN; an AND of the
bits does not. All functions here are exact.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def without_padding(x: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """The values where `mask` holds and 0 elsewhere, whatever stands there; float32 at least.

    Differentiable in `x`: the gradient is 0 on padding.
    """
    return _WithoutPadding.apply(x.to(torch.promote_types(x.dtype, torch.float32)), mask)


def masked_difference(
    x: Float[Tensor, "N T"], y: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """The difference x - y (nat) where `mask` holds and 0 elsewhere; differentiable in `x` alone.

    In float32 at least. A difference that is not finite is NaN, as a limit would hide an infinite
    one.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _MaskedDifference.apply(x.to(dtype), y.detach().to(dtype), mask)


def limited(
    x: Float[Tensor, "N T"], low: Float[Tensor, " N"], high: Float[Tensor, " N"]
) -> Float[Tensor, "N T"]:
    """Each row of `x` between its two bounds, min(max(x, low), high); differentiable in `x`.

    The gradient flows inside the bounds and exactly on them, as it does through a clamp.
    """
    return _Limited.apply(x, low.unsqueeze(1), high.unsqueeze(1))


QUANTILE_LIMIT = 2**24
"""Most values that `torch.quantile` takes."""


def thinned(values: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """All values, or every k-th of more than a quantile takes."""
    return values[:: -(-values.numel() // QUANTILE_LIMIT)]


def scaled_gradient(x: Float[Tensor, "N T"], scale: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """`x` itself, whose gradient is multiplied by `scale`."""
    return _ScaledGradient.apply(x, scale)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return grad * ctx.saved_tensors[0].to(grad.dtype), None


class _WithoutPadding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return _kept(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return _kept(grad, ctx.saved_tensors[0]), None


class _MaskedDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        full = _full(mask, x.dtype)
        d = _and(x, full).sub_(_and(y, full))
        return d.add_(d * 0)  # inf * 0 is NaN, and z + 0 is z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return _kept(grad, ctx.saved_tensors[0]), None, None


class _Limited(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        y = torch.minimum(torch.maximum(x, low), high)
        ctx.save_for_backward(x == y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return _kept(grad, ctx.saved_tensors[0]), None, None


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """The bits of `x` where `mask` holds, no bits (which is +0) elsewhere."""
    return _and(x, _full(mask, x.dtype))


def _full(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits of a number of `dtype` where `mask` holds, none elsewhere."""
    return mask.to(_BITS[dtype]).neg_()


def _and(x: Tensor, bits: Tensor) -> Tensor:
    """The common bits, as a new tensor like `x`."""
    return torch.bitwise_and(x.contiguous().view(bits.dtype), bits).view(x.dtype)
