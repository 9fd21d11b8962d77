"""Constant weights of log-probs: one function w(R, A) of a ratio R, for `gate = "detached"`.

    J = sum_i omega_i A_i mean_t const(w_it) log pi(y_it)

    level     R_it = r_it, prod_{s <= t} r_is, or prod_s r_is       token, prefix, sequence
    ratio     w = R                     CISPO, arXiv 2506.13585; DPPO, 2602.04879; CTPO, 2605.07331
    inverse   w = 1 / min(R, e^high) for A >= 0, R for A < 0        ASPO, arXiv 2510.06062
    gamma     w = R^k e^(lambda (1 - R)), k and lambda by the sign  VESPO, arXiv 2602.10693

A clip cuts w to its bounds (`bound = "cap"`) or takes out the tokens beyond the bound of their
sign (`"mask"`): of R, or of the distance of the two policies at the token,

    tv        pi - pi_old
    kl        pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old) / (1 - pi))

Beside it the penalties that draw a token back to the old policy, whose gradient is a weight, too:

    k2        d^2 / 2                     DRO as verl has it: weight -d
    pearson   |A| pi_old (r - 1)^2 / 2    DRPO, arXiv 2606.09821: weight -|A| pi_old r (r - 1)
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.config.objective import ObjectiveConfig
from hmpo.config.weight import MASKING, WeightConfig
from hmpo.objective.bounds import active_bounds, exp_linear, limit_tokens, row_bounds
from hmpo.objective.masking import without_padding

PLAIN = WeightConfig()
LEAST = 1e-8
"""Least probability that a token is not sampled, as verl has it."""


class Outside(NamedTuple):
    """Which tokens a clip concerns (N, T)."""

    above: Bool[Tensor, "N T"]
    """Beyond the upper bound, whatever the sign of the advantage."""
    below: Bool[Tensor, "N T"]
    """Beyond the lower bound, whatever the sign of the advantage."""
    active: Bool[Tensor, "N T"]
    """Cut, or taken out, by what their sign makes of the bounds."""


def has_own_weight(config: ObjectiveConfig) -> bool:
    """Whether the weight is another one than a token's own ratio between two bounds."""
    return config.gate == "detached" and config.weight != PLAIN


def limit_or_weigh(
    log_ratio: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
) -> Float[Tensor, "N T"]:
    """`log_weights` where the weight is one of its own, else `limit_tokens` (nat)."""
    if config.gate == "unweighted":
        return log_ratio * 0
    if has_own_weight(config) or advantages.ndim == 2:
        return log_weights(log_ratio, logprobs, mask, advantages, config)
    return limit_tokens(log_ratio, mask, advantages, config)


@torch.no_grad()
def log_weights(
    log_ratio: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
) -> Float[Tensor, "N T"]:
    """Logarithms of the constant weights (nat), -inf where a token is taken out; NaN stays NaN.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        logprobs: of the policy (nat); anything on padding, where the result says nothing.
        mask: True on response tokens.
        advantages: one per response, or one per token.
        config: the member; `weight` says which function.
    """
    weight, positive = config.weight, _column(advantages) >= 0
    x = level_log_ratio(log_ratio, mask, config)
    if weight.kind == "gamma":
        power, decay = (
            torch.where(positive, x.new_tensor(up), x.new_tensor(down))
            for up, down in (
                (weight.power_positive, weight.power_negative),
                (weight.decay_positive, weight.decay_negative),
            )
        )
        log_w = power * x - decay * torch.expm1(x)
    elif weight.kind == "inverse":
        _, high = _bounds(mask, advantages, config)
        log_w = torch.where(positive, -torch.minimum(x, high), x)
    elif weight.bound == "cap":
        low, high = _bounds(mask, advantages, config)
        log_w = torch.minimum(torch.maximum(x, low), high)
    else:
        log_w = x
    if weight.cap is not None:
        log_w = log_w.clamp(max=math.log(weight.cap))
    if weight.bound == "mask":
        out = outside(log_ratio, logprobs, mask, advantages, config).active
        out = out & ~positive if weight.kind == "inverse" else out
        log_w = log_w.masked_fill(out, -math.inf)
    return log_w.expand_as(log_ratio)


def level_log_ratio(
    log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], config: ObjectiveConfig
) -> Float[Tensor, "N _"]:
    """Log of the ratio of `weight.level` (nat): one for each token, or one for each row."""
    if config.weight.level == "token":
        return log_ratio
    return log_ratio.cumsum(1) if config.weight.level == "prefix" else log_ratio.sum(1, True)


@torch.no_grad()
def outside(
    log_ratio: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
) -> Outside:
    """Which tokens lie beyond the bounds; what is NaN lies beyond none.

    Arguments are those of `log_weights`.
    """
    if config.clip_level != "none" and config.clip_space in MASKING:
        above, below = _far(log_ratio, without_padding(logprobs, mask), config)
        active = torch.where(_column(advantages) > 0, above, below)
        return Outside(above, below, active)
    x = level_log_ratio(log_ratio, mask, config).expand_as(log_ratio)
    low, high = _bounds(mask, advantages, config)
    floor, ceiling = _bounds(mask, advantages, config, active=True)
    return Outside(x > high, x < low, (x > ceiling) | (x < floor))


def _far(d: Tensor, new: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Tokens that gained, and that lost, more probability than the bounds allow."""
    old = new - d
    gain = new.exp() - old.exp()
    if config.clip_space == "tv":
        return gain > config.clip_high, gain < -config.clip_low
    rest, rest_old = (torch.expm1(x).neg_().clamp_(min=LEAST) for x in (new, old))
    kl = rest_old * torch.log(rest_old / rest) - old.exp() * d
    return (kl > config.clip_high) & (gain > 0), (kl > config.clip_low) & (gain < 0)


def _bounds(
    mask: Tensor, advantages: Tensor, config: ObjectiveConfig, *, active: bool = False
) -> tuple[Tensor, Tensor]:
    """Both bounds of R (nat), or those that act, to be compared with (N, T) or (N, 1)."""
    signs = advantages.flatten()
    bounds = row_bounds(signs, config)
    if active:
        bounds = active_bounds(*bounds, signs, config)
    low, high = (_column(bound.view_as(advantages)) for bound in bounds)
    if config.clip_width != "sqrt":
        return low, high
    count = mask.cumsum(1) if config.weight.level == "prefix" else mask.sum(1, True)
    unit = count.clamp(min=1).to(low.dtype).sqrt()
    return low * unit, high * unit


def _column(x: Tensor) -> Tensor:
    """One value a row as a column; one a token as it is."""
    return x.unsqueeze(1) if x.ndim == 1 else x


def row_penalties(
    log_ratio: Float[Tensor, "N T"],
    logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"],
    config: ObjectiveConfig,
) -> Float[Tensor, " N"] | None:
    """Each row's token mean of the penalty on the distance from the old policy; None without one.

    Arguments are those of `log_weights`; `log_ratio` carries the gradient.
    """
    if config.proximal_coef == 0:
        return None
    if config.proximal == "k2":
        penalty = 0.5 * log_ratio.square()
    else:
        old = without_padding(logprobs.detach(), mask) - log_ratio.detach()
        scale = 0.5 * old.exp() * _column(advantages.abs())
        penalty = scale * (exp_linear(log_ratio) - 1).square()
    return penalty.sum(1) / mask.sum(1).clamp(min=1)
