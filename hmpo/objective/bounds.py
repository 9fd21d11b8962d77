"""What limits a ratio: the clip band and its two branches, SAPO's gate, the end of exp.

    clamp     max(min(d, c), -c) of each token, whatever the sign        `token_clamp`
    band      [low, high] around 0, or around the drift c = mean_i (log M_p - log M_1)
    clip      min(x, high) for A >= 0, max(x, low) for A < 0              PPO, arXiv 1707.06347
    dual      and min(x, log c) for A < 0                                 arXiv 1912.09729
    gate      (4 / tau) sigmoid(tau (r - 1))                              SAPO, arXiv 2511.20347

x is a token log ratio or the log of a sequence's mean. For old-policy samples with normal token
noise of variance v, log M_p lies around (p - 1) v / 2 with a width of sigma / sqrt(L): a band
around 0 is one-sided for long responses and p != 1, and one of fixed width unfair to lengths.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.masking import limited, without_padding
from hmpo.objective.means import Exponent, ahm_mean, log_power_mean
from hmpo.types import Band

EXP_LIMIT = 20.0
"""Largest exponent (nat) given to exp."""


def exp_linear(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The exponential up to x = 20, its tangent there beyond."""
    return _ExpLinear.apply(x)


class _ExpLinear(torch.autograd.Function):
    """Its slope is exp(min(x, 20)), which is all it keeps."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        slope = x.clamp(max=EXP_LIMIT).exp_()
        ctx.save_for_backward(slope)
        return (x - EXP_LIMIT).relu_().add_(1).mul_(slope)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return grad * ctx.saved_tensors[0]


def log_mean(
    log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], p: Exponent, config: ObjectiveConfig
) -> Float[Tensor, " N"]:
    """Log of the configured mean of each row's ratios (nat); `p` is that of a power mean.

    `log_ratio` holds 0 on padding.
    """
    if config.mean == "ahm":
        return ahm_mean(log_ratio, mask, config.ahm_weight, padded=True)
    return log_power_mean(log_ratio, mask, p, padded=True)


@torch.no_grad()
def measure_band(
    log_ratio: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], p: Exponent, config: ObjectiveConfig
) -> Band:
    """Centre and scale of the clip band from a whole minibatch; the centre is exactly 0 for p = 1.

    Args:
        log_ratio: token log ratios (nat), 0 on padding, after `clamp_tokens`.
        mask: True on response tokens; rows without any do not count.
        p: exponent in force.
        config: the member of the family.
    """
    rows, tokens = mask.any(1).sum().clamp(min=1), mask.sum().clamp(min=1)
    drift = log_mean(log_ratio, mask, p, config) - log_power_mean(log_ratio, mask, 1.0)
    centred = (log_ratio - log_ratio.sum() / tokens) * mask
    sigma = (centred.square().sum() / tokens).sqrt().clamp(min=config.clip_sigma)
    return Band(center=drift.sum() / rows, sigma=sigma)


def row_bounds(
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    band: Band | None = None,
    lengths: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Lower and upper bound of each row's band (nat).

    Args:
        advantages: one per response.
        config: the member of the family.
        band: of the whole minibatch; needed by `config.needs_band`.
        lengths: tokens per response; needed by `config.clip_width = "z"`.
    """
    low, high = (torch.full_like(advantages, bound) for bound in config.log_bounds)
    if config.clip_width == "z":
        assert band is not None and lengths is not None, "measured by the objective"
        unit = band.sigma / lengths.clamp(min=1).sqrt()
        low, high = low * unit, high * unit
    if config.sign_convention == "paper":
        low = torch.where(advantages < 0, -high, low)
    if config.clip_center == "drift":
        assert band is not None, "measured by the objective"
        low, high = low + band.center, high + band.center
    return low, high


def active_bounds(
    low: Float[Tensor, " N"],
    high: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The bounds whose crossing takes the gradient away, the others infinite.

    For A >= 0 the upper one, for A < 0 the lower one and, with a dual clip, its logarithm. The
    constant weights of a detached gate are cut on both sides whatever the sign, unless tokens
    drop out instead.
    """
    if config.gate == "detached" and config.weight.bound == "cap":
        return low, high
    ceiling = math.inf if config.dual_clip is None else math.log(config.dual_clip)
    positive = advantages >= 0
    return low.masked_fill(positive, -math.inf), high.masked_fill(~positive, ceiling)


def limit_tokens(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
) -> Float[Tensor, "N T"]:
    """What the mean is taken of (nat): the token log ratios gated, clipped, or as they are.

    With an unweighted gate they are exactly 0, the logarithm of weight 1; NaN stays NaN.

    The bounds of a token clip do not depend on the minibatch (`ObjectiveConfig.needs_band`), so
    this needs neither a `Band` nor an exponent.

    Args:
        log_ratio: token log ratios (nat), 0 on padding.
        mask: True on response tokens.
        advantages: one per response; their sign decides which bound is active.
        config: the member of the family.
    """
    if config.gate == "soft":
        return soft_gate(log_ratio, mask, advantages, config)
    if config.gate == "unweighted":
        return log_ratio * 0
    if config.clip_level != "token":
        return clamp_tokens(log_ratio, config)
    low, high = row_bounds(advantages, config)
    low, high = active_bounds(low, high, advantages, config)
    return limited(log_ratio, low, high)


def clamp_tokens(log_ratio: Float[Tensor, "N T"], config: ObjectiveConfig) -> Float[Tensor, "N T"]:
    """The token log ratios (nat) within +-`config.token_clamp`; as they are without one.

    The gradient flows inside and exactly on the two ends, as through torch.clamp.
    """
    if config.token_clamp is None:
        return log_ratio
    width = log_ratio.new_full((len(log_ratio),), config.token_clamp)
    return limited(log_ratio, -width, width)


def limit_means(
    log_mean: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
    band: Band | None,
) -> Float[Tensor, " N"]:
    """The logs of the means (nat), between their active bounds if the clip is on sequences.

    Args:
        log_mean: log of each response's mean (nat).
        lengths: tokens per response.
        advantages: one per response; their sign decides which bound is active.
        config: the member of the family.
        band: of the whole minibatch; needed by `config.needs_band`.
    """
    if config.clip_level != "sequence":
        return log_mean
    low, high = row_bounds(advantages, config, band, lengths)
    low, high = active_bounds(low, high, advantages, config)
    return log_mean.clamp(low, high)


def soft_gate(
    log_ratio: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    config: ObjectiveConfig,
) -> Float[Tensor, "N T"]:
    """Log of SAPO's gate (4 / tau) sigmoid(tau (r - 1)), whose slope in r is 1 at r = 1.

    0 on padding. Ratios above e^20 are continued linearly (`exp_linear`).
    """
    positive, negative = config.gate_positive, config.gate_negative
    tau = torch.where(
        advantages >= 0, advantages.new_tensor(positive), advantages.new_tensor(negative)
    )
    return _SoftGate.apply(log_ratio, mask, tau.unsqueeze(1))


class _SoftGate(torch.autograd.Function):
    """The gate and its slope tau r' sigmoid(-tau (r - 1)) in the log ratio; keeps the slope."""

    @staticmethod
    def forward(ctx, d: Tensor, mask: Tensor, tau: Tensor) -> Tensor:
        slope = d.clamp(max=EXP_LIMIT).exp_()
        x = (d - EXP_LIMIT).relu_().add_(1).mul_(slope).sub_(1).mul_(tau).neg_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slope.mul_(x.sigmoid()).mul_(tau))
        # log sigmoid(-x) = -log(1 + e^x), which is -x to rounding above 40
        gate = softplus(x, threshold=40).neg_()
        del x
        return without_padding(gate.add_(torch.log(4 / tau)), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        return grad * ctx.saved_tensors[0], None, None
