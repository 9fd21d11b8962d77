"""Log-probs alone, by tiles of the vocabulary whose logits never leave the processor's cache.

Without gradient and entropy nothing of a row of logits is needed later: a running maximum and a
running sum are enough. So a block of rows meets the projection a tile of columns at a time, and
memory sees the hidden states and the projection only.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmpo.logprobs.matmul import project

ROWS, COLUMNS = 1024, 1024
"""Of one tile: 4 MiB of float32 logits."""


def tiled_logprobs(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " n"]:
    """Log-probs of the targets, in nats, without gradient; arguments as in `head_logprobs`."""
    buffer = hidden.new_empty(min(ROWS, len(hidden)) * min(COLUMNS, len(weight)))
    parts = [
        _block(x, weight, bias, y, temperature, softcap, buffer)
        for x, y in zip(hidden.split(ROWS), targets.split(ROWS))
    ]
    return torch.cat(parts)


def _block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    buffer: Tensor,
) -> Float[Tensor, " n"]:
    """Of a few rows. The maximum starts at a finite number, so that -inf leaves no NaN."""
    top = x.new_full((len(x), 1), torch.finfo(x.dtype).min)
    total, picked = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, len(weight), COLUMNS):
        part = weight[start : start + COLUMNS]
        out = buffer[: len(x) * len(part)].view(len(x), len(part))
        offset = None if bias is None else bias.detach()[start : start + COLUMNS]
        z = project(x, part, offset, out)
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        if temperature != 1:
            z.div_(temperature)
        place = targets[:, None] - start
        inside = (place >= 0) & (place < len(part))
        picked = torch.where(inside, z.gather(1, place.clamp(0, len(part) - 1)), picked)
        higher = torch.maximum(top, z.amax(1, keepdim=True))
        total = total * (top - higher).exp() + z.sub_(higher).exp_().sum(1, keepdim=True)
        top = higher
    return (picked - top - total.log())[:, 0]
