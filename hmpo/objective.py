"""The clipped power-mean surrogate: one pure function, of which GRPO, GSPO, GMPO ... are settings.

    d_it = log pi(y_it) - log pi_old(y_it)                              token log ratios
    J    = sum_i omega_i A_i M_p(clip(d_i; A_i))                        token clip
    J    = sum_i omega_i min(M_p(d_i) A_i, clip(M_p(d_i)) A_i)          sequence clip
    loss = -J + kl_coef sum_i omega_i mean_t KL_it

omega_i is 1/N (sequence_mean), L_i / sum L (token_mean) or L_i / (N max_length) (constant). N and
sum L may be given as global `Denominators`, so that micro-batches add up to the whole.

As A_i is constant in a response, min(x A, clip(x) A) = A min(x, hi) for A >= 0 and A max(x, lo)
for A < 0, for tokens (PPO, arXiv 1707.06347, equation 7; GMPO, arXiv 2507.20673) as
for sequences (GSPO, arXiv 2507.18071, equation 5). A clipped token keeps its weight in the mean
and gets no gradient; exactly on a bound the gradient flows, as it does through PPO's minimum.

A mean above e^20 is continued linearly in its logarithm (`EXP_LIMIT`), so that ratios which can
only come from a broken sampler stay finite and still push in the right direction; they are
counted in `ratio/clamped`. A non-finite log-prob or advantage that counts gives a NaN loss. What
stands in padding reaches neither the value nor the gradient.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config import ObjectiveConfig
from hmpo.divergence import exp_minus_tangent, k3, token_kl
from hmpo.errors import ConfigError, ShapeError
from hmpo.means import effective_sample_size, log_power_mean
from hmpo.types import Denominators, ObjectiveOutput

EXP_LIMIT = 20.0
"""Largest exponent (nat) given to exp."""


def power_mean_objective(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    denominators: Denominators | None = None,
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
        denominators: counts over the whole minibatch, if these rows are a part of it.

    Returns:
        The scalar loss to minimise (0 if no row counts) and the detached metrics.

    Raises:
        ShapeError: shapes or dtypes do not fit.
        ConfigError: `config.kl_coef` > 0 without `ref_logprobs`.
    """
    inputs = (logprobs, old_logprobs, mask, advantages, config)
    options = {"ref_logprobs": ref_logprobs, "exponent": exponent}
    loss = power_mean_loss(*inputs, **options, denominators=denominators)
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
    denominators: Denominators | None = None,
) -> Float[Tensor, ""]:
    """The loss of `power_mean_objective` alone; same arguments and errors."""
    _check(logprobs, old_logprobs, mask, advantages, ref_logprobs, exponent)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = _row_advantages(advantages, mask, log_ratio.dtype)
    omega = _row_weights(mask, config, denominators, log_ratio.dtype)
    p = _exponent(advantages, config, exponent)

    loss = -(omega * advantages * _clipped_mean(log_ratio, mask, advantages, p, config)).sum()
    if config.kl_coef > 0:
        loss = loss + config.kl_coef * (omega * _row_kl(logprobs, ref_logprobs, mask, config)).sum()
    return loss


def count_denominators(mask: Bool[Tensor, "N T"]) -> Denominators:
    """Rows with at least one token, and tokens, of a whole minibatch."""
    return Denominators(sequences=int(mask.any(1).sum()), tokens=int(mask.sum()))


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
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = _row_advantages(advantages, mask, log_ratio.dtype)
    p = _exponent(advantages, config, exponent)
    metrics = _count_metrics(mask, config, log_ratio)
    rows = mask.any(1)
    if not bool(rows.any()):
        return metrics
    omega = _row_weights(mask, config, None, log_ratio.dtype)
    means = _clipped_mean(log_ratio, mask, advantages, p, config)
    metrics |= {
        "pg_loss": -(omega * advantages * means).sum(),
        "kl_loss": log_ratio.new_tensor(0.0),
        "kl/k1": -log_ratio[mask].mean(),
        "kl/k3": exp_minus_tangent(log_ratio[mask]).mean(),
    }
    if config.kl_coef > 0:
        kl = _row_kl(logprobs, ref_logprobs, mask, config)
        metrics["kl_loss"] = config.kl_coef * (omega * kl).sum()
    if ref_logprobs is not None:
        metrics["kl/ref"] = k3(logprobs[mask] - ref_logprobs[mask]).mean()
    p = torch.as_tensor(p, dtype=log_ratio.dtype, device=log_ratio.device).expand(rows.shape)[rows]
    log_ratio, mask, advantages = log_ratio[rows], mask[rows], advantages[rows]
    metrics |= _row_metrics(p, advantages)
    metrics |= _ratio_metrics(log_ratio, mask, p)
    metrics |= _clip_metrics(log_ratio, mask, advantages, p, config)
    return metrics


def _count_metrics(mask: Tensor, config: ObjectiveConfig, log_ratio: Tensor) -> dict[str, Tensor]:
    """Counts and bounds."""
    low, high = config.log_bounds
    return {
        "n_seq": mask.any(1).sum(),
        "n_tokens": mask.sum(),
        "clip/lo": log_ratio.new_tensor(low),
        "clip/hi": log_ratio.new_tensor(high),
        "clip/center": log_ratio.new_tensor(0.0),
    }


def _row_metrics(p: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """Advantages, and exponents over all rows and those of each sign (all, if there are none)."""
    positive = advantages >= 0
    return {
        "ratio/p": p.mean(),
        "ratio/p_std": p.std(correction=0),
        "ratio/p_pos": p[positive].mean() if bool(positive.any()) else p.mean(),
        "ratio/p_neg": p[~positive].mean() if bool((~positive).any()) else p.mean(),
        "adv/mean": advantages.mean(),
        "adv/var": advantages.var(correction=0),
        "adv/abs_mean": advantages.abs().mean(),
    }


def _ratio_metrics(log_ratio: Tensor, mask: Tensor, p: Tensor) -> dict[str, Tensor]:
    """Means of the unclipped ratios, their spread, and effective sample sizes."""
    log_a, log_g, log_h = (log_power_mean(log_ratio, mask, q) for q in (1.0, 0.0, -1.0))
    gap = (log_a - log_h).clamp(min=0)  # never negative; rounding of equal ratios may be
    skew = 0.5 * (log_a + log_h) - log_g
    log_m = log_power_mean(log_ratio, mask, p)
    m, d = _exp(log_m), log_ratio[mask]
    whole = log_ratio.sum(1).clamp(-EXP_LIMIT, EXP_LIMIT).exp()
    return {
        "ratio/logA": log_a.mean(),
        "ratio/logG": log_g.mean(),
        "ratio/logH": log_h.mean(),
        "ratio/log_gap_mean": gap.mean(),
        "ratio/log_gap_p50": gap.quantile(0.5),
        "ratio/log_gap_p95": gap.quantile(0.95),
        "ratio/log_gap_max": gap.max(),
        "ratio/log_skew_mean": skew.mean(),
        "ratio/d_mean": d.mean(),
        "ratio/d_var": d.var(correction=0),
        "ratio/d_min": d.min(),
        "ratio/d_max": d.max(),
        "ratio/m_mean": m.mean(),
        "ratio/m_std": m.std(correction=0),
        "ratio/m_min": m.min(),
        "ratio/m_max": m.max(),
        "ratio/clamped": (log_m > EXP_LIMIT).sum(),
        "ratio/ess_tok": effective_sample_size(log_ratio, mask, p).mean(),
        "ratio/ess_seq": whole.sum().square() / (whole.numel() * whole.square().sum()),
    }


def _clip_metrics(
    log_ratio: Tensor, mask: Tensor, advantages: Tensor, p: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """Shares of clipped units; a unit is a token or, with a sequence clip, a response."""
    low, high = config.log_bounds
    if config.clip_level == "sequence":
        x, sign = log_power_mean(log_ratio, mask, p), advantages
    else:
        x, sign = log_ratio[mask], advantages.unsqueeze(1).expand_as(mask)[mask]
    above, below = x > high, x < low
    positive, negative = sign > 0, sign < 0
    return {
        "clip/frac": _share((above & positive) | (below & negative), torch.ones_like(positive)),
        "clip/frac_pos": _share(above & positive, positive),
        "clip/frac_neg": _share(below & negative, negative),
        "clip/frac_band": _share(above | below, torch.ones_like(positive)),
    }


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Count of `part` over count of `whole`; 0 of none."""
    return part.sum() / whole.sum().clamp(min=1)


def _clipped_mean(
    log_ratio: Tensor, mask: Tensor, advantages: Tensor, p: float | Tensor, config: ObjectiveConfig
) -> Tensor:
    """M_p(clip(d)) for a token clip, clip(M_p(d)) for a sequence clip, M_p(d) without."""
    match config.clip_level:
        case "token":
            return _exp(log_power_mean(_clip(log_ratio, advantages, config), mask, p))
        case "sequence":
            return _exp(_clip(log_power_mean(log_ratio, mask, p), advantages, config))
        case _:
            return _exp(log_power_mean(log_ratio, mask, p))


def _clip(x: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Tensor:
    """The branch of PPO's minimum: min(x, hi) where A >= 0, max(x, lo) where A < 0."""
    low, high = config.log_bounds
    rows = advantages.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(rows >= 0, x.clamp(max=high), x.clamp(min=low))


def _exp(x: Tensor) -> Tensor:
    """The exponential up to x = 20, its tangent there beyond."""
    return torch.exp(x.clamp(max=EXP_LIMIT)) * (1 + torch.relu(x - EXP_LIMIT))


def _counted(x: Tensor, mask: Tensor) -> Tensor:
    """Padding replaced by 0 before any arithmetic; float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, x, torch.zeros_like(x))


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Token log ratios, 0 on padding. An infinite one becomes NaN, as a clip would hide it."""
    d = _counted(logprobs, mask) - _counted(old_logprobs.detach(), mask)
    return torch.where(d.isfinite(), d, torch.full_like(d, math.nan))


def _row_advantages(advantages: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Advantages as constants, 0 for a row without tokens."""
    return _counted(advantages.detach(), mask.any(1)).to(dtype)


def _row_kl(
    logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Token mean of KL(pi || ref) for each row (nat); 0 for a row without tokens."""
    if ref_logprobs is None:
        raise ConfigError(
            f"ref_logprobs: got None, expected (N, T) log-probs with kl_coef = {config.kl_coef}"
        )
    ref_logprobs = _counted(ref_logprobs.detach(), mask)
    per_token = token_kl(_counted(logprobs, mask), ref_logprobs, config.kl_estimator)
    return per_token.sum(1) / mask.sum(1).clamp(min=1)


def _row_weights(
    mask: Tensor, config: ObjectiveConfig, denominators: Denominators | None, dtype: torch.dtype
) -> Tensor:
    """omega_i; 0 for a row without tokens."""
    lengths = mask.sum(1).to(dtype)
    if denominators is None:
        sequences, tokens = mask.any(1).sum().clamp(min=1), mask.sum().clamp(min=1)
    else:
        sequences, tokens = max(denominators.sequences, 1), max(denominators.tokens, 1)
    match config.reduction:
        case "sequence_mean":
            return mask.any(1).to(dtype) / sequences
        case "token_mean":
            return lengths / tokens
        case _:
            assert config.max_length is not None, "checked by ObjectiveConfig"
            return lengths / (sequences * config.max_length)


def _exponent(
    advantages: Tensor, config: ObjectiveConfig, exponent: Tensor | None
) -> float | Tensor:
    """The exponent in force: one number, or one per row."""
    if exponent is not None:
        return exponent
    positive, negative = config.exponent_for(positive=True), config.exponent_for(positive=False)
    if positive == negative:
        return positive
    return torch.where(
        advantages >= 0, advantages.new_tensor(positive), advantages.new_tensor(negative)
    )


def _check(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    exponent: Tensor | None,
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
