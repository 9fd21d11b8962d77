"""The gradient of a minibatch, added up over micro-batches to exactly that of the whole."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.attention.packed import was_packed
from hmpo.attention.tap import record_without_gradient
from hmpo.config import TrainerConfig
from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.logprobs.responses import response_loss, token_logprobs_and_entropy
from hmpo.models.policy import autocast
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.mismatch import join_weights, on_policy_rows
from hmpo.objective.terms import count_denominators, minibatch_band
from hmpo.stopwatch import section
from hmpo.types import Band, Batch, Denominators, MinibatchGradient


def accumulate(
    policy: nn.Module,
    batch: Batch,
    config: TrainerConfig,
    objective: ObjectiveConfig,
    exponent: Float[Tensor, ""] | None,
    mismatch: MismatchConfig | None = None,
) -> MinibatchGradient:
    """Back-propagate a minibatch in micro-batches.

    Rows whose gradient is known to be zero (`idle_rows`) go forward only: their log-probs,
    the loss, all denominators and what a logit tracker reads are as if they did not.

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
        Loss, log-probs and entropy, all detached.
    """
    mask = batch.rollout.response_mask & batch.valid[:, None]
    idle = idle_rows(batch, objective)
    parts = micro_batches(batch, config.micro_batch_size)
    denominators, band = count_denominators(mask), None
    if objective.needs_band and len(parts) == 1:
        denominators = None  # nothing is left out, so the objective measures its own band
    elif objective.needs_band:
        with torch.no_grad():
            whole = torch.cat([_forward(policy, batch.select(part), config)[0] for part in parts])
        whole = whole[torch.cat(parts).argsort()]
        inputs = batch.rollout.old_logprobs, mask, batch.advantages, objective
        band = minibatch_band(whole, *inputs, exponent=exponent)
    terms = _Terms(batch, mask, objective, exponent, mismatch, denominators, band)
    sides = []
    for part in parts:
        if denominators is None:
            sides.append(_together(policy, terms, config, part, idle[part]))
        else:
            sides += _apart(policy, terms, config, part, idle[part])
    rows, losses, logprobs, entropies = zip(*sides)
    order = torch.cat(rows).argsort()
    return MinibatchGradient(
        loss=torch.stack(losses).sum(),
        logprobs=torch.cat(logprobs)[order],
        entropy=torch.cat(entropies)[order],
        packed=was_packed(policy),
    )


_Side = tuple[Tensor, Tensor, Tensor, Tensor]
"""Row numbers (m,), their loss (), log-probs (m, T) and entropy (m, T), detached."""


@dataclass(frozen=True)
class _Terms:
    """The loss of some rows of a minibatch; with denominators, the sum over any split is its own.

    An exponent that depends on the log-probs depends on those of its own response.
    """

    batch: Batch
    mask: Tensor
    objective: ObjectiveConfig
    exponent: Tensor | None
    mismatch: MismatchConfig | None
    denominators: Denominators | None
    band: Band | None

    def loss(self, new: Tensor, rows: Tensor) -> Tensor:
        """Of the given rows, whose log-probs are (m, T)."""
        with section("objective"):
            batch, mask = self.batch.select(rows), self.mask[rows]
            weights = batch.weights
            if self.mismatch is not None:
                drawn = batch.rollout.sampling_logprobs
                inner = new.detach(), drawn, mask, batch.advantages
                weights = join_weights(weights, on_policy_rows(*inner, self.mismatch))
            return power_mean_loss(
                new,
                batch.rollout.old_logprobs,
                mask,
                batch.advantages,
                self.objective,
                ref_logprobs=batch.ref_logprobs,
                exponent=self.exponent,
                weights=weights,
                denominators=self.denominators,
                band=self.band,
            )


def _together(
    policy: nn.Module, terms: _Terms, config: TrainerConfig, part: Tensor, idle: Tensor
) -> _Side:
    """All log-probs of a micro-batch, then its loss."""
    new, entropy = _training_forward(policy, terms.batch.select(part), config, idle)
    loss = terms.loss(new, part)
    if loss.requires_grad:
        loss.backward()
    return part, loss.detach(), new.detach(), entropy.detach()


def _apart(
    policy: nn.Module, terms: _Terms, config: TrainerConfig, part: Tensor, idle: Tensor
) -> list[_Side]:
    """Loss and gradient of the rows that have one, then the loss of the idle ones."""
    sides, moving, still = [], part[~idle], part[idle]
    if len(moving):
        rollout = terms.batch.rollout.select(moving)
        with section("logprobs"), autocast(rollout.response_ids.device, config):
            loss, new, entropy = response_loss(
                policy,
                rollout.input_ids,
                rollout.attention_mask,
                rollout.response_ids.shape[1],
                lambda new, rows: terms.loss(new, moving[rows]),
                temperature=config.temperature,
                chunk=config.logprob_chunk,
            )
        if loss.requires_grad:
            loss.backward()
        sides.append((moving, loss.detach(), new, entropy))
    if len(still):
        with torch.no_grad():
            with record_without_gradient():
                new, entropy = _forward(policy, terms.batch.select(still), config)
            sides.append((still, terms.loss(new, still), new, entropy))
    return sides


def idle_rows(batch: Batch, objective: ObjectiveConfig) -> Bool[Tensor, " M"]:
    """Rows of a minibatch whose gradient is zero whatever the policy says of them.

    The surrogate of a response is multiplied by its advantage and weight, and what a clip band or
    a denominator takes from other rows is constant. So without a KL term a row with advantage or
    weight 0, or without a token that counts, adds nothing to any gradient. If all rows are such,
    one is not called idle, so that every parameter gets its gradient of zeros, and an optimizer
    with momentum moves as it would.
    """
    mask = batch.rollout.response_mask & batch.valid[:, None]
    idle = (batch.advantages == 0) | ~mask.any(1)
    weights = batch.weights
    if weights is not None:
        weights = weights[:, None] if weights.ndim == 1 else weights
        idle |= ((weights == 0) | ~mask).all(1)
    if objective.kl_coef > 0:
        return torch.zeros_like(idle)
    lengths = batch.rollout.lengths
    shortest = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()
    spared = idle.all() & (torch.arange(len(idle), device=idle.device) == shortest)
    return idle & ~spared  # all on the device: nothing waits for it here


def micro_batches(batch: Batch, size: int | None) -> list[Int[Tensor, " m"]]:
    """Row numbers of each micro-batch: rows of one prompt together, the longest first.

    Any split gives the same gradient; this one leaves the least to pad and prompts to share.
    """
    rollout = batch.rollout
    rows, device = len(batch.rewards), batch.rewards.device
    if size is None or size >= rows:
        return [torch.arange(rows, device=device)]
    prompts = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    number = prompts.unique(dim=0, return_inverse=True)[1]
    longest = torch.zeros_like(number).scatter_reduce_(0, number, rollout.lengths, "amax")
    keys = zip((-longest[number]).tolist(), number.tolist(), (-rollout.lengths).tolist())
    order = [i for _, i in sorted((key, i) for i, key in enumerate(keys))]
    return list(torch.tensor(order, device=device).split(size))


def _training_forward(
    policy: nn.Module, batch: Batch, config: TrainerConfig, idle: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (M, T); idle rows without gradient, but recorded by a logit tracker."""
    if not bool(idle.any()):
        return _forward(policy, batch, config)
    rows, parts = [(~idle).nonzero()[:, 0], idle.nonzero()[:, 0]], []
    if len(rows[0]):
        parts.append(_forward(policy, batch.select(rows[0]), config))
    with torch.no_grad(), record_without_gradient():
        parts.append(_forward(policy, batch.select(rows[1]), config))
    order = torch.cat(rows).argsort()
    logprobs, entropy = (torch.cat(side)[order] for side in zip(*parts))
    return logprobs, entropy


def _forward(policy: nn.Module, batch: Batch, config: TrainerConfig) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (M, T) of some rows under the policy."""
    rollout = batch.rollout
    with section("logprobs"), autocast(rollout.response_ids.device, config):
        return token_logprobs_and_entropy(
            policy,
            rollout.input_ids,
            rollout.attention_mask,
            rollout.response_ids.shape[1],
            temperature=config.temperature,
            chunk=config.logprob_chunk,
        )
