"""The clipped power-mean surrogate: one pure function, of which GRPO, GSPO, GMPO ... are settings.

    d_it = log pi(y_it) - log pi_old(y_it)                              token log ratios
    J    = sum_i omega_i A_i M_p(clip(d_i; A_i))                        token clip
    J    = sum_i omega_i min(M_p(d_i) A_i, clip(M_p(d_i)) A_i)          sequence clip
    loss = -J + kl_coef sum_i omega_i mean_t KL_it

omega_i is 1/N (sequence_mean), L_i / sum L (token_mean), L_i / (N max_length) (constant) or L_i / N
(length_sum). N and sum L may be given as global `Denominators`, and what a drift-centred or z-wide
band takes from the batch as a `Band`, so that micro-batches add up to the whole. Two settings
replace the clip (`hmpo.objective.bounds` has the formulas): SAPO's soft gate, M_p(gate(d_i)); and,
outside the family, as there is no mean to differentiate,

    J    = sum_i omega_i A_i mean_t const(clip(r_it)) log pi(y_it)      detached: CISPO, TIS

As A_i is constant in a response, min(x A, clip(x) A) = A min(x, hi) for A >= 0 and A max(x, lo)
for A < 0, for tokens (PPO, arXiv 1707.06347, equation 7; GMPO, arXiv 2507.20673) as
for sequences (GSPO, arXiv 2507.18071, equation 5). A clipped token keeps its weight in the mean
and gets no gradient; exactly on a bound the gradient flows, as it does through PPO's minimum.

A mean above e^20 is continued linearly in its logarithm (`EXP_LIMIT`), so that ratios which can
only come from a broken sampler stay finite and still push in the right direction; they are
counted in `ratio/clamped`. A non-finite log-prob or advantage that counts gives a NaN loss. What
stands in padding reaches neither the value nor the gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError, ShapeError
from hmpo.objective.bounds import (
    EXP_LIMIT,
    active_bounds,
    exp_linear,
    log_mean,
    measure_band,
    row_bounds,
    soft_gate,
)
from hmpo.objective.exponent import matched_exponent
from hmpo.objective.kl import exp_minus_tangent, k3, token_kl
from hmpo.objective.masking import limited, masked_difference, scaled_gradient, without_padding
from hmpo.objective.means import Exponent
from hmpo.objective.metrics import (
    clip_metrics,
    count_metrics,
    count_units,
    ratio_metrics,
    row_metrics,
)
from hmpo.types import Band, Denominators, ObjectiveOutput

__all__ = [
    "EXP_LIMIT",
    "count_denominators",
    "exponent_in_force",
    "minibatch_band",
    "objective_metrics",
    "power_mean_loss",
    "power_mean_objective",
]


def power_mean_objective(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None,
    denominators: Denominators | None = None,
    band: Band | None = None,
) -> ObjectiveOutput:
    """Loss and metrics of the power-mean surrogate.

    Args:
        logprobs: log-probs of the response tokens under the policy (nat); carries the gradient.
        old_logprobs: log-probs of the same tokens under the behaviour policy.
        mask: True on response tokens. A row without tokens does not count.
        advantages: one per response.
        config: the member of the family.
        ref_logprobs: log-probs under the frozen reference; needed if `config.kl_coef` > 0.
        exponent: overrides the config's exponents, for all rows or per row; differentiable.
        weights: constants that correct for what the sampler did differently
            (`hmpo.objective.mismatch`): one per response multiplies its advantage; one per token
            multiplies the gradient of that token's log-prob and leaves the value alone. 0 takes a
            response or token out of the gradient, not out of the denominators. The KL term is not
            weighted.
        denominators: counts over the whole minibatch, if these rows are a part of it.
        band: `minibatch_band` of the whole minibatch, if these rows are a part of it and
            `config.needs_band`; measured from these rows otherwise.

    Returns:
        The scalar loss to minimise (0 if no row counts) and the detached metrics.

    Raises:
        ShapeError: shapes or dtypes do not fit.
        ConfigError: `config.kl_coef` > 0 without `ref_logprobs`, or `config.needs_band` with
            `denominators` and no `band`.
    """
    inputs = (logprobs, old_logprobs, mask, advantages, config)
    options = {"ref_logprobs": ref_logprobs, "exponent": exponent, "band": band}
    loss = power_mean_loss(*inputs, **options, weights=weights, denominators=denominators)
    return ObjectiveOutput(loss=loss, metrics=objective_metrics(*inputs, **options))


def power_mean_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None,
    denominators: Denominators | None = None,
    band: Band | None = None,
) -> Float[Tensor, ""]:
    """The loss of `power_mean_objective` alone; same arguments and errors."""
    _check(logprobs, old_logprobs, mask, advantages, ref_logprobs, exponent, weights)
    free, lengths = logprobs, mask.sum(1)
    if weights is not None and weights.ndim == 2:
        logprobs = scaled_gradient(logprobs, without_padding(weights.detach(), mask))
    log_ratio = masked_difference(logprobs, old_logprobs, mask)
    advantages = _row_advantages(advantages, lengths, log_ratio.dtype)
    omega = _row_weights(lengths, config, denominators, log_ratio.dtype)
    if config.needs_band and band is None:
        if denominators is not None:
            raise ConfigError(
                "band: got None with denominators, expected minibatch_band(...) of the whole "
                f"minibatch with clip_center = {config.clip_center!r}, "
                f"clip_width = {config.clip_width!r}"
            )
        p = exponent_in_force(log_ratio, mask, advantages, config, exponent)
        band = measure_band(log_ratio, mask, p, config)

    bounds = _bounds(lengths, advantages, config, band)
    clipped = _limited_tokens(log_ratio, mask, advantages, config, bounds)
    p = exponent_in_force(log_ratio, mask, advantages, config, exponent, clipped)
    del log_ratio  # a (N, T) tensor less while the mean is taken
    mean = _limited_mean(clipped, logprobs, mask, p, config, bounds)
    if weights is not None and weights.ndim == 1:
        omega = omega * torch.where(lengths > 0, weights.detach(), 0)
    loss = -torch.dot(omega * advantages, mean)
    if config.kl_coef > 0:
        omega = _row_weights(lengths, config, denominators, mean.dtype)
        loss = loss + config.kl_coef * (omega * _row_kl(free, ref_logprobs, mask, config)).sum()
    return loss


def count_denominators(mask: Bool[Tensor, "N T"]) -> Denominators:
    """Rows with at least one token, and tokens, of a whole minibatch."""
    sequences, tokens = torch.stack((mask.any(1).sum(), mask.sum())).tolist()
    return Denominators(sequences=sequences, tokens=tokens)


@torch.no_grad()
def minibatch_band(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    *,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
) -> Band:
    """Centre and scale of the clip band of a whole minibatch, to be handed to its parts."""
    log_ratio = masked_difference(logprobs, old_logprobs, mask)
    advantages = _row_advantages(advantages, mask.sum(1), log_ratio.dtype)
    p = exponent_in_force(log_ratio, mask, advantages, config, exponent)
    return measure_band(log_ratio, mask, p, config)


def exponent_in_force(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None,
    clipped: Float[Tensor, "N T"] | None = None,
) -> Exponent:
    """The exponent that the objective uses: one number, or one per row.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        mask: True on response tokens.
        advantages: one per response.
        config: the member of the family.
        exponent: what a source says, which then is the answer; None leaves it to `config`.
        clipped: the log ratios after a token clip, where they are known already.
    """
    if exponent is not None:
        return exponent
    if config.exponent.kind == "matched":
        return matched_exponent(log_ratio, mask, advantages, config, clipped)
    positive, negative = config.exponent_for(positive=True), config.exponent_for(positive=False)
    if positive == negative:
        return positive
    return torch.where(
        advantages >= 0, advantages.new_tensor(positive), advantages.new_tensor(negative)
    )


@torch.no_grad()
def objective_metrics(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    band: Band | None = None,
) -> dict[str, Tensor]:
    """Detached scalars by telemetry name, over the rows with at least one token.

    `pg_loss` is -J of these rows by their own denominators, `kl_loss` what the KL term adds.
    Token moments weigh all tokens equally, sequence moments all rows; variances are population
    variances. `clip/frac` counts the units (tokens or sequences, as the clip) whose clipped
    branch is active: above the upper bound with A > 0, below the lower one with A < 0;
    `clip/frac_pos` and `clip/frac_neg` are the shares among the units of that sign (0 if there
    are none) and `clip/frac_band` is the share outside the band whatever the sign.
    Without any counted row only the counts and bounds are returned.

    Arguments and errors are those of `power_mean_objective`.
    """
    _check(logprobs, old_logprobs, mask, advantages, ref_logprobs, exponent)
    log_ratio, lengths = masked_difference(logprobs, old_logprobs, mask), mask.sum(1)
    advantages = _row_advantages(advantages, lengths, log_ratio.dtype)
    p = exponent_in_force(log_ratio, mask, advantages, config, exponent)
    counted = count_units(mask, advantages)
    if config.needs_band and band is None:
        band = measure_band(log_ratio, mask, p, config)
    metrics = count_metrics(mask, log_ratio, config, band if counted.rows else None, counted)
    if not counted.rows:
        return metrics
    omega = _row_weights(lengths, config, None, log_ratio.dtype)
    bounds = _bounds(lengths, advantages, config, band)
    limited_ratio = _limited_tokens(log_ratio, mask, advantages, config, bounds)
    means = _limited_mean(limited_ratio, logprobs, mask, p, config, bounds)
    d = counted.of_tokens(log_ratio)
    metrics |= {
        "pg_loss": -(omega * advantages * means).sum(),
        "kl_loss": log_ratio.new_tensor(0.0),
        "kl/k1": -d.mean(),
        "kl/k3": exp_minus_tangent(d).mean(),
    }
    if config.kl_coef > 0:
        kl = _row_kl(logprobs, ref_logprobs, mask, config)
        metrics["kl_loss"] = config.kl_coef * (omega * kl).sum()
    if ref_logprobs is not None:
        to_ref = counted.of_tokens(logprobs) - counted.of_tokens(ref_logprobs)
        metrics["kl/ref"] = k3(to_ref).mean()
    p = torch.as_tensor(p, dtype=log_ratio.dtype, device=log_ratio.device).expand(len(mask))
    p, advantages = counted.of_rows(p), counted.of_rows(advantages)
    log_ratio, mask = counted.of_rows(log_ratio), counted.of_rows(mask)
    log_m = log_mean(log_ratio, mask, p, config)
    metrics |= row_metrics(p, advantages, counted)
    metrics |= ratio_metrics(log_ratio, mask, p, log_m, d)
    metrics |= clip_metrics(mask, advantages, config, band, log_m, d)
    return metrics


def _bounds(
    lengths: Tensor, advantages: Tensor, config: ObjectiveConfig, band: Band | None
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each row at which its gradient ends."""
    low, high = row_bounds(lengths.to(advantages.dtype), advantages, config, band)
    return active_bounds(low, high, advantages, config)


def _limited_tokens(
    log_ratio: Tensor,
    mask: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    bounds: tuple[Tensor, Tensor],
) -> Tensor:
    """What the mean is taken of: the token log ratios clipped, gated, or as they are."""
    if config.gate == "soft":
        return soft_gate(log_ratio, mask, advantages, config)
    return limited(log_ratio, *bounds) if config.clip_level == "token" else log_ratio


def _limited_mean(
    log_ratio: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    p: Exponent,
    config: ObjectiveConfig,
    bounds: tuple[Tensor, Tensor],
) -> Tensor:
    """M_p of what `_limited_tokens` gave, clipped if the clip is on sequences; or detached."""
    if config.gate == "detached":
        product = exp_linear(log_ratio.detach()) * without_padding(logprobs, mask)
        return product.sum(1) / mask.sum(1).clamp(min=1)
    mean = log_mean(log_ratio, mask, p, config)
    return exp_linear(mean.clamp(*bounds) if config.clip_level == "sequence" else mean)


def _row_advantages(advantages: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Advantages as constants, 0 for a row without tokens."""
    return torch.where(lengths > 0, advantages.detach(), 0).to(dtype)


def _row_kl(
    logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Token mean of KL(pi || ref) for each row (nat); 0 for a row without tokens."""
    if ref_logprobs is None:
        raise ConfigError(
            f"ref_logprobs: got None, expected (N, T) log-probs with kl_coef = {config.kl_coef}"
        )
    ref_logprobs = without_padding(ref_logprobs.detach(), mask)
    per_token = token_kl(without_padding(logprobs, mask), ref_logprobs, config.kl_estimator)
    return per_token.sum(1) / mask.sum(1).clamp(min=1)


def _row_weights(
    lengths: Tensor, config: ObjectiveConfig, denominators: Denominators | None, dtype: torch.dtype
) -> Tensor:
    """omega_i; 0 for a row without tokens."""
    counted = lengths > 0
    if denominators is None:
        total = lengths.sum() if config.reduction == "token_mean" else counted.sum()
        total = total.clamp(min=1)
    else:
        sequences, tokens = denominators.sequences, denominators.tokens
        total = max(tokens if config.reduction == "token_mean" else sequences, 1)
    if config.reduction == "constant":
        assert config.max_length is not None, "checked by ObjectiveConfig"
        total = total * config.max_length
    return (counted if config.reduction == "sequence_mean" else lengths).to(dtype) / total


def _check(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    exponent: Tensor | None,
    weights: Tensor | None = None,
) -> None:
    """Shapes and dtypes, for callers without the test hook."""
    if logprobs.ndim != 2 or logprobs.shape[1] == 0:
        raise ShapeError(f"logprobs: got {tuple(logprobs.shape)}, expected (N, T) with T >= 1")
    rows, shape = logprobs.shape[:1], logprobs.shape
    tensors = {
        "logprobs": (logprobs, [shape]),
        "old_logprobs": (old_logprobs, [shape]),
        "advantages": (advantages, [rows]),
        "ref_logprobs": (ref_logprobs, [shape]),
        "exponent": (exponent, [torch.Size(), rows]),
        "weights": (weights, [rows, shape]),
    }
    for name, (tensor, shapes) in tensors.items():
        if tensor is not None and not (tensor.shape in shapes and tensor.is_floating_point()):
            expected = " or ".join(str(tuple(s)) for s in shapes)
            raise ShapeError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected float {expected}"
            )
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"mask: got {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(shape)}"
        )
