"""Gradients of several objectives on the same responses, and the angles between them.

In the space of token log-probs a gradient is dloss / dlogprob, known from the recorded tensors
alone. In the space of weights it is that vector times the Jacobian of the log-probs, one backward
pass for each objective. The angle between two is told as cosine distance 1 - cos, computed as
|u - v|^2 / 2 of the unit vectors, which keeps all digits of small ones.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hmpo.checkpoint import RecordedBatch
from hmpo.config import TrainerConfig
from hmpo.lab.probe.variants import Variant
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import autocast
from hmpo.objective.loss import power_mean_loss
from hmpo.types import Rollout

LARGEST = 2**31
"""Most bytes of gradients in the space of weights that are kept; of more, every k-th weight."""
_COLUMNS = 2**18
"""Coordinates compared at a time."""


@torch.enable_grad()
def token_direction(batch: RecordedBatch, variant: Variant) -> Float[Tensor, "N T"]:
    """What an objective adds to the log-probs by one step: -dloss/dlogprob, float64, 0 on padding.

    Without a KL term. Raises what `power_mean_loss` does.
    """
    logprobs = batch.logprobs.detach().double().requires_grad_()
    exponent = variant.exponent
    weights = batch.weights
    loss = power_mean_loss(
        logprobs,
        batch.old_logprobs.double(),
        batch.mask,
        batch.advantages.double(),
        variant.objective,
        exponent=None if exponent is None else torch.tensor(exponent, dtype=torch.float64),
        weights=None if weights is None else weights.double(),
    )
    return -torch.autograd.grad(loss, logprobs)[0]


def cosine_distances(vectors: Float[Tensor, "V D"]) -> Float[Tensor, "V V"]:
    """Cosine distance 1 - cos of each pair, float64, in [0, 2]; NaN with a vector that is 0."""
    if not vectors.shape[1]:
        return torch.full((len(vectors),) * 2, math.nan, dtype=torch.float64)
    norms = vectors.new_zeros(len(vectors), dtype=torch.float64)
    parts = range(0, vectors.shape[1], _COLUMNS)
    scale = vectors.abs().amax(1, keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1)
    for start in parts:
        norms += (vectors[:, start : start + _COLUMNS].double() / scale).square().sum(1)
    unit = 1 / (scale * norms.sqrt().unsqueeze(1))
    squares = vectors.new_zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in parts:
        part = vectors[:, start : start + _COLUMNS].double() * unit
        for i in range(len(part) - 1):
            apart = (part[i + 1 :] - part[i]).square_().sum(1)
            squares[i, i + 1 :] += apart
            squares[i + 1 :, i] += apart
    empty = norms == 0
    return (squares / 2).masked_fill(empty.unsqueeze(1) | empty.unsqueeze(0), math.nan)


def thinning(policy: nn.Module, vectors: int) -> int:
    """Every which weight is kept, so that so many gradients fit into `LARGEST` bytes."""
    count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return max(1, -(-vectors * count * 4 // LARGEST))


def parameter_directions(
    policy: nn.Module,
    rollout: Rollout,
    directions: Float[Tensor, "V N T"],
    config: TrainerConfig,
) -> Float[Tensor, "V D"]:
    """Gradients in the space of trainable weights: the Jacobian of the log-probs, applied.

    Args:
        policy: as it was when the directions were taken; its `grad` fields are left alone.
        rollout: the responses.
        directions: what `token_direction` gave, one for each objective.
        config: precision, temperature, micro-batches.

    Returns:
        Float32 on the CPU; every k-th weight alone where all would take more than `LARGEST` bytes.
    """
    weights = [p for p in policy.parameters() if p.requires_grad]
    step = thinning(policy, len(directions))
    different, where = directions.flatten(1).unique(dim=0, return_inverse=True)
    directions = different.view(-1, *directions.shape[1:])
    kept = -(-sum(p.numel() for p in weights) // step)
    total = torch.zeros(len(directions), kept)
    with evaluating(policy):
        for rows in _micro_batches(len(rollout.finished), config.micro_batch_size):
            some = rollout.select(rows.to(rollout.response_ids.device))
            parts = directions[:, rows]
            moving = parts.abs().amax((1, 2)) > 0
            if not bool(moving.any()):
                continue
            with torch.enable_grad(), autocast(some.response_ids.device, config):
                logprobs = token_logprobs(
                    policy,
                    some.input_ids,
                    some.attention_mask,
                    some.response_ids.shape[1],
                    temperature=config.temperature,
                    chunk=config.logprob_chunk,
                    counted=some.counted,
                )
            for i in moving.nonzero()[:, 0].tolist():
                total[i] += _applied(logprobs, parts[i].to(logprobs), weights)[::step]
            del logprobs
    return total[where]


def _applied(logprobs: Tensor, direction: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Gradient of sum(direction * logprobs) in the weights, as one vector on the CPU."""
    gradients: Iterable[Tensor | None] = torch.autograd.grad(
        logprobs, weights, direction, retain_graph=True, allow_unused=True
    )
    flat = [
        (torch.zeros_like(w) if g is None else g).detach().float().flatten()
        for w, g in zip(weights, gradients, strict=True)
    ]
    return torch.cat(flat).cpu()


def _micro_batches(rows: int, size: int | None) -> list[Int[Tensor, " m"]]:
    """Row numbers, in order, `size` at a time."""
    return list(torch.arange(rows).split(size or rows))
