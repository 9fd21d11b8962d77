"""The clipped power-mean surrogate: one pure function, of which GRPO, GSPO, GMPO ... are settings.

    d_it = log pi(y_it) - log pi_old(y_it)                              token log ratios
    J    = sum_i omega_i A_i M_p(clip(d_i; A_i))                        token clip
    J    = sum_i omega_i min(M_p(d_i) A_i, clip(M_p(d_i)) A_i)          sequence clip
    loss = -J + kl_coef sum_i omega_i mean_t KL_it - entropy_coef sum_i omega_i mean_t H_it

`power_mean_loss` is these lines; its symbols are functions of `hmpo.objective.terms`. Limits stand
in two places, on tokens before the mean and on the mean, of which a setting uses one at most
(`token_clamp` aside, which holds tokens on both sides and may stand before a sequence clip).
omega_i is 1/N (sequence_mean), L_i / sum L (token_mean), L_i / (N max_length) (constant) or L_i / N
(length_sum). N and sum L may be given as global `Denominators`, and what a drift-centred or z-wide
band takes from the batch as a `Band`, so that micro-batches add up to the whole. Three settings
replace the clip (`hmpo.objective.bounds` has the formulas): SAPO's soft gate, M_p(gate(d_i)); and,
outside the family, as there is no mean to differentiate,

    J    = sum_i omega_i A_i mean_t const(w_it) log pi(y_it)            detached: CISPO, DPPO, ...
    J    = sum_i omega_i A_i mean_t log pi(y_it)                        unweighted: REINFORCE

where w_it is the clipped ratio or one of the functions of `hmpo.objective.weights`, which has the
penalties of `proximal_coef`, too: a further term, weighted as a row's mean is.

As A_i is constant in a response, min(x A, clip(x) A) = A min(x, hi) for A >= 0 and A max(x, lo)
for A < 0, for tokens (PPO, arXiv 1707.06347, equation 7; GMPO, arXiv 2507.20673) as
for sequences (GSPO, arXiv 2507.18071, equation 5). A clipped token keeps its weight in the mean
and gets no gradient; exactly on a bound the gradient flows, as it does through PPO's minimum.

With `segments = "turn"` i counts the turns of all responses (`hmpo.objective.segments`): each has
its own mean and clip, and of its response's omega_i the share of its tokens; with `"token"` the
tokens, whose mean is their ratio. A_i is the response's, or the segment's own. Where there is no
mean, A_i may be A_it.

A mean above e^20 is continued linearly in its logarithm (`EXP_LIMIT`), so that ratios which can
only come from a broken sampler stay finite and still push in the right direction; they are
counted in `ratio/clamped`. A non-finite log-prob or advantage that counts gives a NaN loss. What
stands in padding reaches neither the value nor the gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import ConfigError
from hmpo.objective.bounds import measure_band
from hmpo.objective.entropy import entropy_bonus
from hmpo.objective.exponent import exponent_in_force
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.segments import exponent_by_turn, tokens_by_turn, turns_of
from hmpo.objective.terms import (
    check_tokens,
    log_ratios,
    mean_ratios,
    row_advantages,
    row_kl,
    row_weights,
    segment_advantages,
    weighted_logprobs,
    with_row_corrections,
)
from hmpo.objective.weights import limit_or_weigh, row_penalties
from hmpo.types import Band, Denominators, ObjectiveOutput, Tokens


def power_mean_objective(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    entropy: Float[Tensor, "N T"] | None = None,
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
        advantages: one per response, or per token: equal within a mean (`config.segments`).
        config: the member of the family.
        ref_logprobs: log-probs under the frozen reference; needed if `config.kl_coef` > 0.
        entropy: of the policy at each token (nat); needed if `config.entropy_coef` > 0, and then
            carries a gradient.
        exponent: overrides the config's exponents, for all rows or per row; differentiable.
        weights: constants (`hmpo.objective.mismatch`): one per response multiplies its advantage;
            one per token the gradient of its log-prob, not the value. 0 takes it out of the
            gradient, not out of the denominators. The KL term is not weighted.
        denominators: counts over the whole minibatch, if these rows are a part of it.
        band: `minibatch_band` likewise, if `config.needs_band`; else that of these rows.

    Returns:
        The scalar loss to minimise (0 if no row counts) and the detached metrics.

    Raises:
        ShapeError: shapes or dtypes do not fit, or advantages vary within a segment.
        ConfigError: `config.kl_coef` > 0 without `ref_logprobs`, `config.entropy_coef` > 0 without
            `entropy`, or `config.needs_band` with `denominators` and no `band`.
    """
    inputs = (logprobs, old_logprobs, mask, advantages, config)
    known = {"ref_logprobs": ref_logprobs, "exponent": exponent, "band": band}
    more = {"entropy": entropy, "weights": weights, "denominators": denominators}
    loss = power_mean_loss(*inputs, **known, **more)
    metrics = objective_metrics(*inputs, **known)
    return ObjectiveOutput(loss=loss, metrics=metrics)


def power_mean_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
    *,
    ref_logprobs: Float[Tensor, "N T"] | None = None,
    entropy: Float[Tensor, "N T"] | None = None,
    exponent: Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None,
    denominators: Denominators | None = None,
    band: Band | None = None,
) -> Float[Tensor, ""]:
    """The loss of `power_mean_objective` alone; same arguments and errors."""
    whole = Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
        weights=weights,
    )
    check_tokens(whole, exponent)
    measures_band = config.needs_band and band is None
    if measures_band and denominators is not None:
        raise _no_band(config)

    turns = turns_of(mask, config)
    tokens = tokens_by_turn(whole, turns)
    log_pi = weighted_logprobs(tokens)
    d = log_ratios(log_pi, tokens)
    a = segment_advantages(tokens, config, d.dtype)
    limited = limit_or_weigh(d, tokens.logprobs, tokens.mask, a, config)
    p = exponent_by_turn(exponent, turns)
    p = exponent_in_force(d, tokens.mask, row_advantages(a, tokens.mask), config, p, limited)
    if measures_band:
        # a sequence clip has limited nothing yet
        band = measure_band(limited, tokens.mask, p, config)
    penalties = row_penalties(d, tokens.logprobs, tokens.mask, a, config)
    del d  # a (N, T) tensor less while the mean is taken
    m = mean_ratios(limited, log_pi, tokens, a, p, config, band)
    omega = row_weights(whole, config, denominators, m.dtype)
    of_rows = omega if turns is None else turns.weights(omega)
    corrected = with_row_corrections(of_rows, tokens)
    loss = -torch.dot(corrected * a if a.ndim == 1 else corrected, m)
    if penalties is not None:
        loss = loss + config.proximal_coef * torch.dot(corrected, penalties)
    if config.kl_coef > 0:
        loss = loss + config.kl_coef * (omega * row_kl(whole, config)).sum()
    if config.entropy_coef > 0:
        loss = loss - entropy_bonus(entropy, mask, config, denominators)
    return loss


def _no_band(config: ObjectiveConfig) -> ConfigError:
    """What a part of a minibatch is told that cannot know the band of the whole."""
    return ConfigError(
        "band: got None with denominators, expected minibatch_band(...) of the whole "
        f"minibatch with clip_center = {config.clip_center!r}, clip_width = {config.clip_width!r}"
    )
