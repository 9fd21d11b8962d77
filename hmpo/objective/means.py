"""Power means of a response's token ratios, in log space, and what follows from them.

With d_t the log ratio of token t, L tokens and K(p) = log mean_t exp(p d_t):

    log M_p         = K(p) / p              (p = 0: mean d, the geometric mean)
    d log M_p / d d = softmax(p d)          (the token weights w)
    d log M_p / d p = KL(w || uniform)/p^2  (p = 0: Var(d) / 2)

References: power means, Hardy, Littlewood and Polya, Inequalities, chapter 2; the iteration of
arithmetic and harmonic means is Heron's method for the square root of A H. Everything is
evaluated around the centre or the dominating token, never as (logsumexp - log L) / p, whose
rounding error exceeds GSPO's clip band in float32 (the README of this folder says more). Half
precision is computed in float32, float64 stays float64. Padding may hold anything: it is replaced
before any arithmetic.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmpo.errors import ConfigError, ShapeError
from hmpo.objective.kl import exp_minus_tangent
from hmpo.objective.masking import without_padding

Exponent = float | int | Float[Tensor, ""] | Float[Tensor, " B"]

EXPM1_LIMIT = 4.0
"""Largest |p (d - mean d)| for the centred form; beyond it the dominating token is the anchor."""


def log_power_mean(
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    p: Exponent,
    *,
    padded: bool = False,
) -> Float[Tensor, " B"]:
    """Log of the power mean of each row's ratios, log M_p = (1/p) log mean_t exp(p d_t).

    Args:
        log_ratio: d, natural log ratios (nat); any value where `mask` is False.
        mask: True on the tokens that count.
        p: exponent, one for all rows or one per row; a tensor receives its gradient.
        padded: promises that `log_ratio` holds 0 where `mask` is False, which saves a pass.

    Returns:
        log M_p (nat) in float32, or float64 for float64 input. A row without tokens gives 0
        and passes no gradient. NaN at a counted token gives NaN.

    Raises:
        ShapeError: the shapes of `log_ratio`, `mask` and `p` do not fit.
        ConfigError: `p` is a number but not finite.
    """
    d, exponent = prepare(log_ratio, mask, p, padded)
    return _LogPowerMean.apply(d, mask, exponent)


def power_mean_weights(
    log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], p: Exponent
) -> Float[Tensor, "B T"]:
    """Token weights w = d log M_p / d d = softmax_t(p d); each row sums to 1.

    Takes and raises what `log_power_mean` does. Padding, and rows without tokens, hold 0.
    """
    d, exponent = prepare(log_ratio, mask, p)
    return _weights(d, mask, exponent)


def effective_sample_size(
    log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], p: Exponent
) -> Float[Tensor, " B"]:
    """Share of a row's tokens that the weights use: 1 / (L sum_t w_t^2) = exp(2K(p) - K(2p)).

    Takes and raises what `log_power_mean` does. In (0, 1]; 1 at p = 0 or for equal ratios, and
    0 for a row without tokens.
    """
    d, exponent = prepare(log_ratio, mask, p)
    squares = _weights(d, mask, exponent).square().sum(1)
    empty = squares == 0
    size = 1 / (_length(mask, d.dtype) * squares.masked_fill(empty, 1))
    return size.clamp(max=1).masked_fill(empty, 0)


def ahm_mean(
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: float = 0.5,
    *,
    padded: bool = False,
) -> Float[Tensor, " B"]:
    """Limit of the arithmetic-harmonic iteration in closed form: log sqrt(A H), differentiable.

    Its token weights are (softmax(d) + softmax(-d)) / 2. It equals the geometric mean only for
    ratios that are symmetric in log space: (1, 1, 8) gives 2.169, not 2. With another `weight`
    w in [0, 1] it is log(A^w H^(1-w)). Takes and raises what `log_power_mean` does.
    """
    arithmetic = log_power_mean(log_ratio, mask, 1.0, padded=padded)
    harmonic = log_power_mean(log_ratio, mask, -1.0, padded=padded)
    return weight * arithmetic + (1 - weight) * harmonic


def ahm_iterate(log_gap: Float[Tensor, "..."], steps: int) -> Float[Tensor, "..."]:
    """log(A_n / H_n) after `steps` arithmetic-harmonic steps from log(A_0 / H_0) = `log_gap`.

    Closed form 4 artanh(u^(2^n)) with u = tanh(log_gap / 4); the product A H never changes.

    Raises:
        ConfigError: `steps` is negative.
    """
    if steps < 0:
        raise ConfigError(f"steps: got {steps!r}, expected an integer >= 0")
    log_z = math.ldexp(1.0, min(steps, 1000)) * _log_tanh_quarter(log_gap)
    return 2 * (torch.log1p(log_z.exp()) - torch.log(-torch.expm1(log_z)))


def ahm_steps(log_gap: Float[Tensor, "..."], tolerance: float) -> Int[Tensor, "..."]:
    """Arithmetic-harmonic steps until (A_n - H_n) / (A_n + H_n) <= `tolerance`.

    Raises:
        ConfigError: `tolerance` is not between 0 and 1.
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance: got {tolerance!r}, expected a number in (0, 1)")
    log_z = math.log(tolerance / (1 + math.sqrt((1 - tolerance) * (1 + tolerance))))
    log_u = _log_tanh_quarter(log_gap)
    return torch.log2(log_z / log_u).ceil().clamp(min=0).long()


class _LogPowerMean(torch.autograd.Function):
    """Log M_p with both derivatives; keeps the weights and the slope in p, nothing else."""

    @staticmethod
    def forward(ctx, d: Tensor, mask: Tensor, p: Tensor) -> Tensor:
        value, weights = _mean_and_weights(d, mask, p)
        ctx.save_for_backward(
            weights if ctx.needs_input_grad[0] else None,
            _slope(d, mask, p) if ctx.needs_input_grad[2] else None,
        )
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]  (one output, one gradient)
        weights, slope = ctx.saved_tensors
        grad_d = None if weights is None else grad.unsqueeze(1) * weights
        grad_p = None if slope is None else grad * slope
        return grad_d, None, grad_p


def prepare(
    log_ratio: Tensor, mask: Tensor, p: float | int | Tensor, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Log ratios (B, T) with padding set to 0, and one exponent per row (B,), to compute with.

    Both are float32, or float64 for float64 log ratios. Takes and raises what `log_power_mean`
    does.
    """
    if log_ratio.ndim != 2 or log_ratio.shape[1] == 0 or not log_ratio.is_floating_point():
        raise ShapeError(
            f"log_ratio: got {log_ratio.dtype} {tuple(log_ratio.shape)}, "
            "expected float (B, T) with T >= 1"
        )
    if mask.shape != log_ratio.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"mask: got {mask.dtype} {tuple(mask.shape)}, "
            f"expected bool {tuple(log_ratio.shape)} like log_ratio"
        )
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    rows = log_ratio.shape[0]
    if not isinstance(p, Tensor):
        if not math.isfinite(p):
            raise ConfigError(f"p: got {p!r}, expected a finite number")
        exponent = torch.full((rows,), float(p), dtype=dtype, device=log_ratio.device)
    elif p.shape in ((), (rows,)):
        exponent = p.to(device=log_ratio.device, dtype=dtype).expand(rows)
    else:
        raise ShapeError(f"p: got {tuple(p.shape)}, expected () or ({rows},)")
    d = log_ratio.to(dtype)
    return d if padded else without_padding(d, mask), exponent


def _length(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens per row, at least 1."""
    return mask.sum(1).clamp(min=1).to(dtype)


def _centred(d: Tensor, mask: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of d, and d minus it with 0 on padding."""
    centre = d.sum(1) / length
    return centre, (d - centre.unsqueeze(1)).masked_fill(~mask, 0)


def _anchored(d: Tensor, mask: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The token where p d is largest, and exp(p (d - that)) with 0 on padding."""
    highest = d.masked_fill(~mask, -math.inf).amax(1)
    lowest = d.masked_fill(~mask, math.inf).amin(1)
    anchor = torch.where(p >= 0, highest, lowest).masked_fill(~mask.any(1), 0)
    z = p.unsqueeze(1) * (d - anchor.detach().unsqueeze(1))
    return anchor, torch.exp(z.masked_fill(~mask, -math.inf))


def _weights(d: Tensor, mask: Tensor, p: Tensor) -> Tensor:
    """Token weights softmax(p d), differentiable."""
    if not (d.requires_grad or p.requires_grad):
        return _mean_and_weights(d, mask, p)[1]
    power = _anchored(d, mask, p)[1]
    return power / power.sum(1, keepdim=True).masked_fill(~mask.any(1, keepdim=True), 1)


def _mean_and_weights(d: Tensor, mask: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Log M_p and the token weights softmax(p d) of each row; `d` holds 0 on padding.

    With z = p (d - reference). The reference is the mean of the row or, where some |z| exceeds
    `EXPM1_LIMIT`, its dominating token, to which a difference is exact. In place and without
    selecting by the mask, which costs more than the exponentials.
    """
    counts = mask.to(d.dtype)
    tokens = counts.sum(1)
    length = tokens.clamp(min=1)
    sign = torch.ones_like(p).copysign_(p)
    outside = (counts - 1).mul_(torch.finfo(d.dtype).max)
    anchor = outside.addcmul_(d, sign.unsqueeze(1)).amax(1).mul(sign)
    del outside
    centre = d.sum(1) / length
    e = (d - centre.unsqueeze(1)).mul_(counts)
    rest = e.sum(1) / length
    near = torch.maximum(e.amax(1), -e.amin(1)) * p.abs() <= EXPM1_LIMIT
    reference = torch.where(near, centre, anchor)
    z = torch.sub(d, reference.unsqueeze(1), out=e).mul_(p.unsqueeze(1)).mul_(counts)
    power = z.exp().mul_(counts)
    total = power.sum(1)
    excess = z.expm1_().sum(1)
    del counts, e, z

    limit = p.abs() < math.sqrt(torch.finfo(d.dtype).tiny)
    divisor = p.masked_fill(limit, 1)
    centred = centre + torch.where(limit, rest, torch.log1p(excess / length) / divisor)
    value = torch.where(near, centred, anchor + torch.log(total / length) / divisor)
    return value, power.div_(total.masked_fill(tokens == 0, 1).unsqueeze(1))


def _near(z: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Rows with max |z| <= limit, and z with 0 in the other rows."""
    near = z.abs().amax(1) <= limit
    return near, z.masked_fill(~near.unsqueeze(1), 0)


def _slope(d: Tensor, mask: Tensor, p: Tensor) -> Tensor:
    """Slope of log M_p in p: KL(w || uniform) / p^2, at p = 0 its limit.

    With z = p e, q = mean(exp z - 1 - z), v = mean(z expm1 z) and g = mean expm1 z, the
    divergence is (v - q - ((1 + g) log1p g - g)) / (1 + g): every term is of second order in z,
    none the small difference of large ones. Where a term dominates, the anchored form is used;
    below z = sqrt(eps) the first two cumulants.
    """
    length = _length(mask, d.dtype)
    e = _centred(d, mask, length)[1]
    z = p.unsqueeze(1) * e
    tiny = _near(z, math.sqrt(torch.finfo(d.dtype).eps))[0]
    near, z = _near(z, EXPM1_LIMIT)
    series = (e**2).sum(1) / length / 2 + p * (e**3).sum(1) / length / 3

    u = torch.expm1(z)
    q, v, g = ((x.sum(1) / length) for x in (exp_minus_tangent(z), z * u, u))
    centred = (v - q - ((1 + g) * torch.log1p(g) - g)) / (1 + g)
    anchor, power = _anchored(e, mask, p)
    total = power.sum(1).masked_fill(~mask.any(1), 1)
    tilted = p * (power * (e - anchor.unsqueeze(1))).sum(1) / total
    divergence = torch.where(near, centred, tilted - torch.log(total / length))
    return torch.where(tiny, series, divergence / p.masked_fill(tiny, 1).square())


def _log_tanh_quarter(log_gap: Tensor) -> Tensor:
    """Log tanh(g / 4) = log((1 - q) / (1 + q)) with q = exp(-g / 2), for any g >= 0."""
    half = log_gap / 2
    small = torch.log(-torch.expm1(-half))
    large = torch.log1p(-torch.exp(-half))
    return torch.where(half < 1, small, large) - torch.log1p(torch.exp(-half))
