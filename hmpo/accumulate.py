"""The gradient of a minibatch, added up over micro-batches to exactly that of the whole."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.collect import autocast
from hmpo.config import TrainerConfig
from hmpo.logprobs import token_logprobs_and_entropy
from hmpo.mismatch import join_weights, on_policy_rows
from hmpo.objective import count_denominators, minibatch_band, power_mean_loss
from hmpo.objective_config import MismatchConfig, ObjectiveConfig
from hmpo.stopwatch import section
from hmpo.types import Batch


def accumulate(
    policy: nn.Module,
    batch: Batch,
    config: TrainerConfig,
    objective: ObjectiveConfig,
    exponent: Float[Tensor, ""] | None,
    mismatch: MismatchConfig | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "M T"], Float[Tensor, "M T"]]:
    """Back-propagate a minibatch in micro-batches.

    Where the clip depends on the whole minibatch (`objective.needs_band`), a forward pass
    without gradient comes first, unless there is only one micro-batch.

    Args:
        policy: the model that is trained; its gradients are added to.
        batch: a minibatch of M responses.
        config: micro-batch size, precision and temperature.
        objective: the member of the family in force.
        exponent: overrides the objective's own exponent.
        mismatch: its off-policy mask, which looks at the policy in training; the other
            corrections come with the batch.

    Returns:
        (loss (), log-probs (M, T), entropy (M, T)), all detached.
    """
    rows = len(batch.rewards)
    size = config.micro_batch_size or rows
    parts = [slice(start, start + size) for start in range(0, rows, size)]
    old, advantages = batch.rollout.old_logprobs, batch.advantages
    mask = batch.rollout.response_mask & batch.valid[:, None]
    denominators, band = count_denominators(mask), None
    if objective.needs_band and len(parts) == 1:
        denominators = None  # nothing is left out, so the objective measures its own band
    elif objective.needs_band:
        with torch.no_grad():
            whole = torch.cat([_forward(policy, batch, part, config)[0] for part in parts])
        band = minibatch_band(whole, old, mask, advantages, objective, exponent=exponent)
    losses, logprobs, entropies = [], [], []
    for part in parts:
        new, entropy = _forward(policy, batch, part, config)
        weights = None if batch.weights is None else batch.weights[part]
        if mismatch is not None:
            drawn = batch.rollout.sampling_logprobs[part]
            kept = on_policy_rows(new.detach(), drawn, mask[part], advantages[part], mismatch)
            weights = join_weights(weights, kept)
        with section("objective"):
            loss = power_mean_loss(
                new,
                old[part],
                mask[part],
                advantages[part],
                objective,
                ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[part],
                exponent=exponent,
                weights=weights,
                denominators=denominators,
                band=band,
            )
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
        logprobs.append(new.detach())
        entropies.append(entropy.detach())
    return torch.stack(losses).sum(), torch.cat(logprobs), torch.cat(entropies)


def _forward(
    policy: nn.Module, batch: Batch, part: slice, config: TrainerConfig
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (M, T) of some rows under the policy."""
    rollout = batch.rollout
    with section("logprobs"), autocast(rollout.response_ids.device, config):
        return token_logprobs_and_entropy(
            policy,
            rollout.input_ids[part],
            rollout.attention_mask[part],
            rollout.response_ids.shape[1],
            temperature=config.temperature,
            chunk=config.logprob_chunk,
        )
