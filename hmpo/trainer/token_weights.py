"""What multiplies each token's log-prob in the gradient of an update."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.trainer.gradient import MinibatchLoss
from hmpo.types import Batch


def token_weights(
    batch: Batch,
    logprobs: Float[Tensor, "M T"],
    objective: ObjectiveConfig,
    exponent: Float[Tensor, ""] | None,
    mismatch: MismatchConfig | None = None,
) -> Float[Tensor, "M T"]:
    """What multiplies the gradient of each token's log-prob in that of minus the loss.

    An entropy bonus, which moves all tokens at a place, is left out.

    Args:
        batch: a minibatch of M responses.
        logprobs: theirs, under the policy before the step.
        objective: the member of the family in force.
        exponent: overrides the objective's own exponent.
        mismatch: as in `accumulate`.
    """
    mask = batch.rollout.response_mask & batch.valid[:, None]
    with torch.enable_grad():
        new = logprobs.detach().clone().requires_grad_(True)
        loss = MinibatchLoss(
            batch=batch,
            mask=mask,
            objective=dataclasses.replace(objective, entropy_coef=0.0),
            exponent=exponent,
            mismatch=mismatch,
            denominators=None,
            band=None,
        ).of(new, torch.arange(len(mask), device=mask.device))
        (slope,) = torch.autograd.grad(loss, new)
    return -slope
