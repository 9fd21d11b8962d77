"""The gradient of a minibatch, added up over micro-batches to exactly that of the whole."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.attention.tap import record_without_gradient
from hmpo.config import TrainerConfig
from hmpo.config.objective import MismatchConfig, ObjectiveConfig
from hmpo.logprobs.responses import ResponseLogprobs, response_loss, token_logprobs_and_entropy
from hmpo.models.policy import autocast
from hmpo.objective.entropy import entropy_weights
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.mismatch import join_weights, on_policy_rows
from hmpo.objective.terms import count_denominators, minibatch_band
from hmpo.ranks.world import Ranks
from hmpo.stopwatch import section
from hmpo.trainer.learning import backward
from hmpo.trainer.passes import Passes
from hmpo.trainer.rows import ALONE, joined, prompt_numbers, rows_of_rank
from hmpo.types import Band, Batch, Denominators, MinibatchGradient


def accumulate(
    policy: nn.Module,
    batch: Batch,
    config: TrainerConfig,
    objective: ObjectiveConfig,
    exponent: Float[Tensor, ""] | None,
    mismatch: MismatchConfig | None = None,
    ranks: Ranks = ALONE,
) -> MinibatchGradient:
    """Back-propagate a minibatch in micro-batches.

    Of several ranks each back-propagates its share of the rows; the gradients that they leave add
    up to that of the minibatch, and what is returned is of all rows on each.

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
        ranks: that share the work.
    """
    mask = batch.rollout.response_mask & batch.valid[:, None]
    idle, passes = idle_rows(batch, objective), Passes(policy, ranks)
    share = rows_of_rank(batch.rollout, ranks, idle)
    micro = micro_batches(batch, passes.size(config.micro_batch_size), share)
    denominators, band = count_denominators(mask), None
    if objective.needs_band and len(micro) == 1 and ranks.alone:
        denominators = None  # nothing is left out, so the objective measures its own band
    elif objective.needs_band:
        new = _logprobs(policy, batch, config, micro, passes)
        old = batch.rollout.old_logprobs
        band = minibatch_band(new, old, mask, batch.advantages, objective, exponent=exponent)
    loss = MinibatchLoss(
        batch=batch,
        mask=mask,
        objective=dataclasses.replace(objective, entropy_coef=0.0),
        entropy_weights=_entropy_weights(batch, mask, objective),
        exponent=exponent,
        mismatch=mismatch,
        denominators=denominators,
        band=band,
    )
    parts: list[Part] = []
    if passes.shards is not None:
        parts, micro = in_step(policy, loss, config, micro, idle, passes), []
    for rows in micro:
        if denominators is None:
            parts.append(all_then_loss(policy, loss, config, rows, idle[rows]))
        else:
            parts += by_response(policy, loss, config, rows, idle[rows])
    return whole_minibatch(parts, batch, ranks)


@torch.no_grad()
def _logprobs(
    policy: nn.Module,
    batch: Batch,
    config: TrainerConfig,
    micro: Sequence[Tensor],
    passes: Passes,
) -> Float[Tensor, "M T"]:
    """Log-probs of all rows, of which each rank runs its own micro-batches."""
    missing = passes.missing(len(micro))
    found = [_forward(policy, batch.select(rows), config, passes).logprobs for rows in micro]
    passes.make_up(missing, batch.rollout, config, gradient=False)
    return joined(found, micro, batch.rollout, passes.ranks)


def whole_minibatch(parts: Sequence["Part"], batch: Batch, ranks: Ranks) -> MinibatchGradient:
    """What all ranks' parts came to, the same on each."""
    rows = [part.rows for part in parts]
    nothing = batch.rollout.old_logprobs.new_zeros(())
    return MinibatchGradient(
        loss=ranks.total(torch.stack([part.loss for part in parts] or [nothing]).sum()),
        logprobs=joined([part.logprobs for part in parts], rows, batch.rollout, ranks),
        entropy=joined([part.entropy for part in parts], rows, batch.rollout, ranks),
        packed=ranks.any(bool(parts) and parts[-1].packed),
    )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a minibatch after their backward pass, detached."""

    rows: Int[Tensor, " m"]
    """Their numbers in the minibatch."""
    loss: Float[Tensor, ""]
    """Theirs; the parts' losses add up to the minibatch's."""
    logprobs: Float[Tensor, "m T"]
    entropy: Float[Tensor, "m T"]
    packed: bool
    """As in `MinibatchGradient`."""


@dataclass(frozen=True, kw_only=True)
class MinibatchLoss:
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
    entropy_weights: Tensor | None = None
    """What the entropy at each token takes off the loss, where there is a bonus; the objective has
    none then."""

    def of(self, new: Float[Tensor, "m T"], rows: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        """The loss of the given rows, whose log-probs are `new`."""
        with section("objective"):
            batch, mask = self.batch.select(rows), self.mask[rows]
            weights = batch.weights
            if self.mismatch is not None:
                on_policy = on_policy_rows(
                    new.detach(),
                    batch.rollout.sampling_logprobs,
                    mask,
                    batch.advantages,
                    self.mismatch,
                )
                weights = join_weights(weights, on_policy)
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


def all_then_loss(
    policy: nn.Module,
    loss: MinibatchLoss,
    config: TrainerConfig,
    rows: Int[Tensor, " m"],
    idle: Bool[Tensor, " m"],
) -> Part:
    """Back-propagate a micro-batch whose loss needs all of its log-probs first.

    Args:
        policy: the model that is trained; its gradients are added to.
        loss: of the minibatch.
        config: precision and temperature.
        rows: of the micro-batch, in the minibatch.
        idle: which of them go forward only.
    """
    result = _training_forward(policy, loss.batch.select(rows), config, idle)
    part = loss.of(result.logprobs, rows)
    if loss.entropy_weights is not None:
        part = part - (loss.entropy_weights[rows] * result.entropy).sum()
    backward(part, due=not bool(idle.all()))
    return Part(
        rows=rows,
        loss=part.detach(),
        logprobs=result.logprobs.detach(),
        entropy=result.entropy.detach(),
        packed=result.packed,
    )


def by_response(
    policy: nn.Module,
    loss: MinibatchLoss,
    config: TrainerConfig,
    rows: Int[Tensor, " m"],
    idle: Bool[Tensor, " m"],
) -> list[Part]:
    """Back-propagate a micro-batch whose loss is a sum over its responses; arguments as above.

    The rows that have a gradient come first, in one pass over the vocabulary where that serves;
    then the loss of the idle ones, if there are any.
    """
    passes, moving, still = Passes(policy), rows[~idle], rows[idle]
    parts = [_moved(policy, loss, config, moving, passes)] if len(moving) else []
    return parts + ([_still(policy, loss, config, still, passes)] if len(still) else [])


def in_step(
    policy: nn.Module,
    loss: MinibatchLoss,
    config: TrainerConfig,
    micro: Sequence[Int[Tensor, " m"]],
    idle: Bool[Tensor, " M"],
    passes: Passes,
) -> list[Part]:
    """Back-propagate this rank's micro-batches of a sharded policy, by as many passes as others.

    Args:
        policy: the model that is trained; its gradients are added to.
        loss: of the minibatch.
        config: precision and temperature.
        micro: rows of each micro-batch.
        idle: which rows of the minibatch go forward only.
        passes: through the policy.
    """
    moving = [own for rows in micro if len(own := rows[~idle[rows]])]
    still = [own for rows in micro if len(own := rows[idle[rows]])]
    rollout = loss.batch.rollout
    missing = passes.missing(len(moving))
    parts = [_moved(policy, loss, config, rows, passes) for rows in moving]
    passes.make_up(missing, rollout, config, gradient=True)
    missing = passes.missing(len(still))
    parts += [_still(policy, loss, config, rows, passes) for rows in still]
    passes.make_up(missing, rollout, config, gradient=False)
    return parts


def _moved(
    policy: nn.Module, loss: MinibatchLoss, config: TrainerConfig, rows: Tensor, passes: Passes
) -> Part:
    """Rows that have a gradient, in one pass over the vocabulary where that serves."""
    rollout, weights = loss.batch.rollout.select(rows), loss.entropy_weights
    with section("logprobs"), autocast(rollout.response_ids.device, config):
        trained = passes.run(
            lambda: response_loss(
                policy,
                rollout.input_ids,
                rollout.attention_mask,
                rollout.response_ids.shape[1],
                lambda new, some: loss.of(new, rows[some]),
                temperature=config.temperature,
                chunk=config.logprob_chunk,
                counted=rollout.counted,
                entropy_weights=None if weights is None else weights[rows],
            )
        )
    backward(trained.loss, due=True)
    return Part(
        rows=rows,
        loss=trained.loss.detach(),
        logprobs=trained.logprobs,
        entropy=trained.entropy,
        packed=trained.packed,
    )


@torch.no_grad()
def _still(
    policy: nn.Module, loss: MinibatchLoss, config: TrainerConfig, rows: Tensor, passes: Passes
) -> Part:
    """Rows that go forward only."""
    with record_without_gradient():
        result = _forward(policy, loss.batch.select(rows), config, passes)
    return Part(
        rows=rows,
        loss=loss.of(result.logprobs, rows),
        logprobs=result.logprobs,
        entropy=result.entropy,
        packed=result.packed,
    )


def idle_rows(batch: Batch, objective: ObjectiveConfig) -> Bool[Tensor, " M"]:
    """Rows of a minibatch whose gradient is zero whatever the policy says of them.

    The surrogate of a response is multiplied by its advantage and weight, and what a clip band or
    a denominator takes from other rows is constant. So without a KL or entropy term a row with
    advantage or weight 0, or without a token that counts, adds nothing to any gradient. A penalty
    that does not scale with the advantage draws at rows with advantage 0, too. If all rows are
    idle, one is not called idle, so that every parameter gets its gradient of zeros, and an
    optimizer with momentum moves as it would.
    """
    mask = batch.rollout.response_mask & batch.valid[:, None]
    drawn = objective.proximal_coef > 0 and objective.proximal == "k2"
    idle = ~mask.any(1) if drawn else _zero_rows(batch.advantages, mask)
    if batch.weights is not None:
        idle |= _zero_rows(batch.weights, mask)
    if objective.kl_coef > 0 or objective.entropy_coef > 0:
        return torch.zeros_like(idle)
    lengths = batch.rollout.extents
    shortest = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()
    spared = idle.all() & (torch.arange(len(idle), device=idle.device) == shortest)
    return idle & ~spared  # all on the device: nothing waits for it here


def _entropy_weights(batch: Batch, mask: Tensor, objective: ObjectiveConfig) -> Tensor | None:
    """What the entropy at each token of a whole minibatch weighs; None without a bonus."""
    if objective.entropy_coef == 0:
        return None
    dtype = batch.rollout.old_logprobs.dtype
    return entropy_weights(mask, objective, count_denominators(mask), dtype)


def _zero_rows(factors: Tensor, mask: Tensor) -> Tensor:
    """Rows whose every counted token has factor 0, or that have none; factors (M,) or (M, T)."""
    factors = factors[:, None] if factors.ndim == 1 else factors
    return ((factors == 0) | ~mask).all(1)


def micro_batches(
    batch: Batch, size: int | None, share: Int[Tensor, " k"] | None = None
) -> list[Int[Tensor, " m"]]:
    """Row numbers of each micro-batch: rows of one prompt together, the longest first.

    Any split gives the same gradient; this one leaves the least to pad and prompts to share.

    Args:
        batch: the minibatch.
        size: rows of a micro-batch; None for all.
        share: the rows that are split, rising; None for all.
    """
    rollout = batch.rollout
    rows, device = len(batch.rewards), batch.rewards.device
    share = torch.arange(rows, device=device) if share is None else share
    if size is None or size >= len(share):
        return [share] if len(share) else []
    number = prompt_numbers(rollout)
    longest = torch.zeros_like(number).scatter_reduce_(0, number, rollout.extents, "amax")
    keys = zip((-longest[number]).tolist(), number.tolist(), (-rollout.extents).tolist())
    chosen = set(share.tolist())
    order = [i for _, i in sorted((key, i) for i, key in enumerate(keys)) if i in chosen]
    return list(torch.tensor(order, device=device).split(size))


def _training_forward(
    policy: nn.Module, batch: Batch, config: TrainerConfig, idle: Tensor
) -> ResponseLogprobs:
    """Of all rows (M, T); idle ones without gradient, but recorded by a logit tracker."""
    if not bool(idle.any()):
        return _forward(policy, batch, config)
    moving, still = (~idle).nonzero()[:, 0], idle.nonzero()[:, 0]
    results = []
    if len(moving):
        results.append(_forward(policy, batch.select(moving), config))
    with torch.no_grad(), record_without_gradient():
        results.append(_forward(policy, batch.select(still), config))
    order = torch.cat([moving, still]).argsort()
    return ResponseLogprobs(
        logprobs=torch.cat([result.logprobs for result in results])[order],
        entropy=torch.cat([result.entropy for result in results])[order],
        packed=results[-1].packed,
    )


def _forward(
    policy: nn.Module, batch: Batch, config: TrainerConfig, passes: Passes | None = None
) -> ResponseLogprobs:
    """Log-probs and entropy of some rows under the policy."""
    rollout, passes = batch.rollout, passes or Passes(policy)
    with section("logprobs"), autocast(rollout.response_ids.device, config):
        return passes.run(
            lambda: token_logprobs_and_entropy(
                policy,
                rollout.input_ids,
                rollout.attention_mask,
                rollout.response_ids.shape[1],
                temperature=config.temperature,
                chunk=config.logprob_chunk,
                counted=rollout.counted,
            )
        )
