"""Train/inference mismatch: what is weighed, left out and measured where the sampler differs.

The sampler drew token t with probability mu_t; the trainer's own old policy gives it pi_old,t:

    rho_t = pi_old,t / mu_t          token            rho = prod_t rho_t          response
    truncate  w = min(max(rho, low), high)            TIS, arXiv 1606.02647
    mask      w = rho inside [low, high], else 0      IcePop, MIS, arXiv 2510.18855

The weights are constants that multiply the gradient (`power_mean_loss`, `weights`). A response may
also be left out as a whole: by the geometric mean of rho over its tokens, or, if its advantage is
negative, by that of pi / mu (the off-policy mask of DeepSeek-V3.2). What is left out stays in the
denominators: a mask changes which terms are summed, not what the others weigh.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import MismatchConfig
from hmpo.objective.kl import exp_minus_tangent
from hmpo.objective.masking import masked_difference, thinned, without_padding

SUM_LIMIT = 20.0
"""Largest |log rho| of a response (nat) whose exponential is taken."""


@torch.no_grad()
def mismatch_weights(
    old_logprobs: Float[Tensor, "N T"],
    sampling_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    config: MismatchConfig,
) -> Float[Tensor, " N"] | Float[Tensor, "N T"] | None:
    """Weights of a rollout's gradient: per token, per response, or None where all are 1.

    Args:
        old_logprobs: log-probs of the response tokens by the trainer's old policy (nat).
        sampling_logprobs: log-probs of the distribution that they were drawn from (nat).
        mask: True on response tokens.
        config: what to correct.

    Returns:
        Weights >= 0; a row without tokens has weight 1, padding any.
    """
    log_rho = _log_rho(old_logprobs, sampling_logprobs, mask)
    weights = None
    if config.correction != "none":
        whole = config.level == "sequence"
        rho = (log_rho.sum(1) if whole else log_rho).clamp(-SUM_LIMIT, SUM_LIMIT).exp()
        weights = rho.clamp(config.low, config.high)
        if config.correction == "mask":
            weights = torch.where(weights == rho, rho, 0)
    if config.sequence_low is None and config.sequence_high is None:
        return weights
    kept = _inside(_token_mean(log_rho, mask), config.sequence_low, config.sequence_high)
    return join_weights(weights, kept)


@torch.no_grad()
def on_policy_rows(
    logprobs: Float[Tensor, "N T"],
    sampling_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: MismatchConfig,
) -> Bool[Tensor, " N"] | None:
    """False for responses that the off-policy mask leaves out; None if it is off.

    Args:
        logprobs: log-probs of the response tokens by the policy in training (nat).
        sampling_logprobs: log-probs of the distribution that they were drawn from (nat).
        mask: True on response tokens.
        advantages: one per response; of one per token the mean counts.
        config: with `off_policy_low`.
    """
    if config.off_policy_low is None:
        return None
    log_mean = _token_mean(_log_rho(logprobs, sampling_logprobs, mask), mask)
    if advantages.ndim == 2:
        advantages = _token_mean(without_padding(advantages, mask), mask)
    return (advantages >= 0) | _inside(log_mean, config.off_policy_low, None)


def join_weights(
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None, kept: Bool[Tensor, " N"] | None
) -> Float[Tensor, " N"] | Float[Tensor, "N T"] | None:
    """Weights with 0 for the responses that are not kept; None where all are 1.

    Args:
        weights: per response, per token, or None for 1.
        kept: False for responses left out; None keeps all.
    """
    if kept is None:
        return weights
    if weights is None:
        return kept.to(torch.float32)
    return weights * (kept if weights.ndim == 1 else kept.unsqueeze(1))


@torch.no_grad()
def mismatch_metrics(
    old_logprobs: Float[Tensor, "N T"],
    sampling_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None,
) -> dict[str, Tensor]:
    """How far sampler and trainer are apart, by telemetry name; empty without response tokens.

    Moments of rho weigh all tokens equally. `mismatch/ess` is (sum rho)^2 / (n sum rho^2),
    `mismatch/chi2_tok` and `mismatch/chi2_seq` the mean of rho^2 less 1 over tokens and over
    responses, k1 and k3 estimate KL(sampler || old policy), and the perplexity gap is the
    response mean of its per-token log.

    Args:
        old_logprobs: log-probs of the response tokens by the trainer's old policy (nat).
        sampling_logprobs: log-probs of the distribution that they were drawn from (nat).
        mask: True on response tokens.
        weights: what `mismatch_weights` gave.
    """
    rows = mask.any(1)
    if not bool(rows.any()):
        return {}
    log_rho = _log_rho(old_logprobs, sampling_logprobs, mask)
    tokens, per_row = log_rho[mask], _token_mean(log_rho, mask)[rows]
    rho = tokens.clamp(-SUM_LIMIT, SUM_LIMIT).exp()
    whole = log_rho[rows].sum(1).clamp(-SUM_LIMIT / 2, SUM_LIMIT / 2).exp()
    low, high = torch.quantile(thinned(rho), rho.new_tensor([0.01, 0.99]))
    metrics = {
        "mismatch/k1": -tokens.mean(),
        "mismatch/k3": exp_minus_tangent(tokens.clamp(max=SUM_LIMIT)).mean(),
        "mismatch/ppl_gap": -per_row.mean(),
        "mismatch/rho_mean": rho.mean(),
        "mismatch/rho_min": rho.min(),
        "mismatch/rho_p01": low,
        "mismatch/rho_p99": high,
        "mismatch/rho_max": rho.max(),
        "mismatch/ess": rho.sum().square() / (rho.numel() * rho.square().sum()),
        "mismatch/chi2_tok": rho.square().mean() - 1,
        "mismatch/chi2_seq": whole.square().mean() - 1,
    }
    if weights is not None:
        in_use, exact = (weights[rows], whole) if weights.ndim == 1 else (weights[mask], rho)
        metrics["mismatch/masked_frac"] = (in_use == 0).to(rho.dtype).mean()
        truncated = (in_use != 0) & ((in_use - exact).abs() > 1e-6 * exact)
        metrics["mismatch/truncated_frac"] = truncated.to(rho.dtype).mean()
    return metrics


def _log_rho(numerator: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Token log ratios to the sampler, 0 on padding."""
    return masked_difference(numerator, sampling_logprobs, mask)


def _token_mean(log_rho: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's tokens; 0 for a row without."""
    return log_rho.sum(1) / mask.sum(1).clamp(min=1)


def _inside(log_mean: Tensor, low: float | None, high: float | None) -> Tensor:
    """Whether the geometric mean lies between two ratios."""
    ratio = log_mean.clamp(-SUM_LIMIT, SUM_LIMIT).exp()
    inside = torch.ones_like(ratio, dtype=torch.bool)
    if low is not None:
        inside &= ratio >= low
    return inside if high is None else inside & (ratio <= high)
