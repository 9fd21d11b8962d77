"""Products with the vocabulary projection, by the faster of the two libraries in torch for a CPU.

torch multiplies float32 matrices by MKL, which on AMD processors without AVX-512 reaches about half
of what oneDNN does; torch carries oneDNN too, but its float32 product only as an operator without
gradient. The processor decides (`hmpo.processor`), never a clock: a choice by timing could differ
between a run and its continuation.
`HMPO_MATMUL` = `mkl`, `onednn` or `auto` decides instead. Anything but float32 on a CPU goes to
torch, float64 among it.
"""

import functools
import os

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.errors import require
from hmpo.processor import is_slow_under_mkl

CHOICES = ("mkl", "onednn", "auto")


def project(
    x: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    out: Float[Tensor, "n V"] | None = None,
) -> Float[Tensor, "n V"]:
    """`x @ weight.T + bias`, without gradient: in `out` if torch computes it, else a new tensor."""
    if _onednn(x):
        return _linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def times(gradient: Float[Tensor, "n V"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "n H"]:
    """`gradient @ weight`, without gradient of its own."""
    return _linear(gradient, weight.t(), None) if _onednn(gradient) else gradient @ weight


def add_outer(
    total: Float[Tensor, "V H"], gradient: Float[Tensor, "n V"], x: Float[Tensor, "n H"]
) -> None:
    """`total += gradient.T @ x`.

    On CUDA the product reaches a total of higher precision as it is accumulated there, in float32;
    elsewhere as it is rounded to the precision of its factors.
    """
    if total.dtype == torch.float32 != x.dtype and total.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)
    elif total.dtype != x.dtype:
        total += gradient.t() @ x
    elif _onednn(x):
        total += _linear(gradient.t(), x.t(), None)
    else:
        total.addmm_(gradient.t(), x)


def matmul_library() -> str:
    """`mkl` or `onednn`: what multiplies float32 matrices with the vocabulary on this CPU."""
    wanted = os.environ.get("HMPO_MATMUL", "auto")
    require(wanted in CHOICES, "HMPO_MATMUL", wanted, f"one of {', '.join(CHOICES)}")
    if wanted == "mkl" or not has_onednn():
        return "mkl"
    return "onednn" if wanted == "onednn" or is_slow_under_mkl() else "mkl"


@functools.cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN, with the operator as it is used here: it is a private one."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(2, 3)
    try:
        return bool((_linear(x, x, torch.ones(2)) == 4).all())
    except (AttributeError, RuntimeError):
        return False


def _onednn(x: Tensor) -> bool:
    served = x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0
    return served and matmul_library() == "onednn"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
