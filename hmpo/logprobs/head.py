"""From hidden states and the vocabulary projection to token log-probs and entropy.

The (n, V) logits are never in memory as a whole: `hmpo.logprobs.schemes` has the ways to take the
projection, and here is the choice. The projection's own gradient is a (V, H) matrix, in whose
shadow a buffer of `BUFFER` bytes stands. A GPU passes over that matrix for every block, in the
time of a thousand rows' products, so blocks are larger there.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hmpo.logprobs.fold import statistics_dtype
from hmpo.logprobs.schemes import Logprobs, Plan
from hmpo.logprobs.tiles import tiled_logprobs

BUFFER = 64 << 20
"""Bytes of one block of logits, unless fewer rows than `LEAST_ROWS` would fit."""
LEAST_ROWS = 128
"""A product of fewer rows reads the projection from memory more often than it computes."""
STORE = 64 << 20
"""Bytes of logits that may wait for the backward pass, which saves computing them again."""
GPU_ROWS = 8
"""Rows of a block on CUDA for each that was asked for."""


class Limits(NamedTuple):
    """What a head may hold on a device."""

    buffer: int
    """Bytes of one block of logits."""
    store: int
    """Bytes of logits that wait for the backward pass."""
    factor: int
    """Rows of a block for each row asked for."""


def limits(device: torch.device) -> Limits:
    """The constants above on a CPU; a 32nd and a 16th of its memory on a GPU."""
    if device.type != "cuda":
        return Limits(BUFFER, STORE, 1)
    total = torch.cuda.get_device_properties(device).total_memory
    return Limits(total // 32, total // 16, GPU_ROWS)


def head_logprobs(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 512,
    with_entropy: bool = True,
    store: int | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets and entropy, without materialising the (n, V) logits.

    Args:
        hidden: what the projection reads, one row for each target.
        weight: the projection; logits are `hidden @ weight.T + bias`.
        bias: of the projection, or None.
        targets: token ids.
        temperature: logits are divided by it, after the softcap.
        softcap: c of a model whose logits are c tanh(logits / c), or None.
        chunk: the most rows whose logits are in memory together, `GPU_ROWS` times that on CUDA.
        with_entropy: False saves its part where nobody asks for it; it is NaN then.
        store: bytes of logits that may be kept for the backward pass; None takes the device's.

    Returns:
        (log-probs, entropy), in nats, differentiable, float32 (float64 for float64 weights).
        Under autocast the products run in the autocast's precision.
    """
    compute = compute_dtype(weight)
    size = len(targets) * len(weight) * compute.itemsize
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    store = limits(weight.device).store if store is None else store
    scheme = "recompute"
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not differentiable and not with_entropy and _tiles(hidden, weight, compute):
        cap = {"temperature": temperature, "softcap": softcap}
        picked = tiled_logprobs(hidden.detach(), weight.detach(), bias, targets, **cap)
        return picked, torch.full_like(picked, torch.nan)
    if differentiable:
        frozen = not any(t.requires_grad for t in tensors[1:])
        scheme = "frozen" if frozen else "store" if size <= store else "recompute"
    plan = Plan(
        scheme=scheme,
        rows=block_rows(weight, chunk),
        temperature=temperature,
        softcap=softcap,
        with_entropy=with_entropy,
        compute=compute,
    )
    return Logprobs.apply(hidden, weight, bias, targets, plan)


def _tiles(hidden: Tensor, weight: Tensor, compute: torch.dtype) -> bool:
    """Whether sums over tiles in the logits' own precision do: a CPU, float32 or better."""
    exact = compute in (torch.float32, torch.float64) and hidden.dtype == weight.dtype == compute
    return exact and weight.device.type == "cpu"


def block_rows(weight: Float[Tensor, "V H"], chunk: int) -> int:
    """Rows of one block of logits: `chunk` by the device's factor, or what its buffer holds."""
    buffer, _, factor = limits(weight.device)
    row = len(weight) * compute_dtype(weight).itemsize
    return max(1, min(factor * chunk, max(LEAST_ROWS, buffer // row)))


def compute_dtype(weight: Float[Tensor, "V H"]) -> torch.dtype:
    """Precision of the products: the weight's, or the autocast's where that is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def logits_logprobs(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`head_logprobs` of logits that are there already, by autograd."""
    logits = logits.to(statistics_dtype(logits.dtype))
    logprobs = functional.log_softmax(logits / temperature, dim=-1)
    # p log p is 0 * -inf for tokens that a model rules out by -inf logits, and so is its gradient:
    # log p is replaced before the product, whose gradient then meets finite numbers only.
    finite = torch.where(logprobs > -torch.inf, logprobs, 0.0)
    terms = torch.where(logprobs > -torch.inf, finite.exp() * finite, 0.0)
    return logprobs.gather(1, targets[:, None])[:, 0], -terms.sum(-1)
