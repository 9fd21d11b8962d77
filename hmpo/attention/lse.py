"""The log-sum-exp of every attention row, as the fused kernel itself computed it.

Every fused kernel keeps LSE_i = log sum_j exp(s_ij) of the visible logits for its backward pass,
and max_j s_ij <= LSE_i <= max_j s_ij + log n. It is read where autograd saved it, after the call:
the model's own operation runs untouched, so outputs and gradients cannot change. Where hooks
change what autograd saves (gradient checkpointing, activation offloading), reading there would
recompute or copy, and without gradients nothing is saved; then the kernel's second output is
caught as it passes the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SAVED_AS = {
    "ScaledDotProductFlashAttentionForCpuBackward0": "_saved_logsumexp",
    "ScaledDotProductFlashAttentionBackward0": "_saved_logsumexp",
    "ScaledDotProductEfficientAttentionBackward0": "_saved_log_sumexp",
    "ScaledDotProductCudnnAttentionBackward0": "_saved_logsumexp",
}
"""Autograd nodes of the fused kernels, and where they keep the log-sum-exp."""
KERNELS = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""The same kernels as operators; the log-sum-exp is their second output."""
NODES_AFTER = 8
"""Autograd nodes looked at behind the attention's output: views, a copy, a slice."""


def call_with_lse(function: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], Tensor | None]:
    """What `function` returns, and the log-sum-exp of the one attention kernel it ran, raw.

    None where no fused kernel ran, more than one did, or none kept it.
    """
    plain = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    if plain and torch.is_grad_enabled():
        result = function()
        return result, _from_graph(result[0])
    with _CatchLse() as caught:
        result = function()
    return result, caught.outputs[0] if len(caught.outputs) == 1 else None


def rows_of(raw: Tensor | None, batch: int, heads: int, queries: int) -> Tensor | None:
    """The log-sum-exp as float32 (B, H, Q), or None if it has another layout."""
    if raw is None:
        return None
    if raw.ndim == 4 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    if raw.ndim != 3 or raw.shape[:2] != (batch, heads) or raw.shape[2] < queries:
        return None
    return raw[..., :queries]  # the efficient kernel pads its rows


def kernel_error(width: int) -> float:
    """How far a kernel's float32 logit may be from q . k, as a part of |q| |k|."""
    return (width + 8) * torch.finfo(torch.float32).eps + reduced_precision()


def reduced_precision() -> float:
    """The part of that error that a float32 product does not have: TF32, bfloat16 passes."""
    return {"highest": 0.0, "high": 2**-9}.get(torch.get_float32_matmul_precision(), 2**-7)


def lse_bound(
    lse: Float[Tensor, "B H Q"], rows: Tensor | None, slack: Float[Tensor, " H"]
) -> Float[Tensor, " H"]:
    """Upper bound of each head's largest logit.

    Args:
        lse: log-sum-exp of each row.
        rows: query rows that count, (b, h, Q), or None for all.
        slack: the kernel's possible error, see `kernel_error`.
    """
    if rows is not None:
        lse = lse.masked_fill(~rows, -torch.inf)
    return lse.amax(0).amax(1) + slack  # ten times as fast as both at once, for many prompts


def _from_graph(output: Tensor) -> Tensor | None:
    node = output.grad_fn
    for _ in range(NODES_AFTER):
        if node is None:
            return None
        saved = SAVED_AS.get(node.name())
        if saved is not None:
            lse: Tensor = getattr(node, saved)
            return lse.detach() if lse.numel() else None
        node = node.next_functions[0][0] if node.next_functions else None
    return None


class _CatchLse(TorchDispatchMode):
    """Keeps the second output of every fused attention kernel that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KERNELS and out[1] is not None and out[1].numel():  # some give none, some empty
            self.outputs.append(out[1].detach())
        return out
