"""The exponent that has a wanted effective sample size, by a bracketed secant iteration.

With K(p) = log mean_t exp(p d_t) the size of the weights softmax(p d), as a share of the L tokens,
is exp(2K(p) - K(2p)) = 1 / (1 + CV^2), CV the coefficient of variation of exp(p d). It falls
strictly with |p| unless all ratios are equal, and sqrt(-log of it) is nearly linear in |p|.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.errors import ConfigError
from hmpo.objective.means import EXPM1_LIMIT, prepare

ROOT_STEPS = 60
"""Most secant or bisection steps of `solve_exponent`; two or three are needed."""


def solve_exponent(
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    target: float | int | Float[Tensor, ""] | Float[Tensor, " B"],
    *,
    p_max: float,
    sign: int = 1,
    relative: bool = False,
) -> Float[Tensor, " B"]:
    """Exponent of the given sign whose effective sample size is `target` (no gradient).

    2K(p) - K(2p) falls strictly with |p| unless all ratios are equal, so a bracketed secant
    iteration finds the root. Where even `p_max` leaves the size above `target`, and where all
    ratios are equal (every p gives the same mean), the answer is sign * p_max. A row with a
    non-finite counted token gives NaN.

    Args:
        log_ratio: natural log ratios (nat).
        mask: True on the tokens that count.
        target: wanted `effective_sample_size`, in (0, 1].
        p_max: largest |p| allowed, > 0.
        sign: 1 or -1.
        relative: `target`, in [0, 1], is the share of the way from the size at `p_max` to 1;
            0 gives sign * p_max and 1 gives 0, exactly.

    Raises:
        ShapeError: shapes do not fit.
        ConfigError: `target`, `p_max` or `sign` is out of its range.
    """
    if sign not in (1, -1):
        raise ConfigError(f"sign: got {sign!r}, expected 1 or -1")
    if not (math.isfinite(p_max) and p_max > 0):
        raise ConfigError(f"p_max: got {p_max!r}, expected a finite number > 0")
    with torch.no_grad():
        d, goal = prepare(log_ratio, mask, target)
        inside = goal >= 0 if relative else goal > 0
        if not bool(inside.logical_and_(goal <= 1).all()):
            raise ConfigError(f"target: got {target!r}, expected numbers in (0, 1]")
        return sign * solve_size(sign * d, mask, goal, p_max=float(p_max), relative=relative)


def solve_size(
    log_ratio: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    target: Float[Tensor, " B"],
    *,
    p_max: float,
    relative: bool,
) -> Float[Tensor, " B"]:
    """`solve_exponent` without its checks: an exponent x in [0, p_max] with ESS(x) = target.

    `log_ratio` holds 0 on padding. s(x) = sqrt(-log ESS) is nearly linear in x, with slope sigma
    at 0. The parabola through both ends with that slope is the first guess; from there the secant
    method, held in a bracket.
    """
    ratios = _CentredRatios.of(log_ratio, mask)
    right = torch.full_like(target, p_max)
    within = ratios.reach * p_max <= EXPM1_LIMIT
    near = None if bool(within.all()) else within
    end = ratios.minus_log_size(right, near)
    log_size = torch.log1p((1 - target) * torch.expm1(-end)) if relative else target.log()
    goal, end = log_size.neg_().sqrt_(), end.sqrt_()
    done = ratios.flat | (target == 0 if relative else end <= goal)

    sigma = torch.linalg.vector_norm(ratios.e, dim=1).div_(ratios.length.sqrt())
    bend = (end / p_max - sigma).mul_(4 / p_max)
    root = torch.addcmul(sigma * sigma, bend, goal).clamp_(min=0).sqrt_()
    x = torch.minimum(2 * goal / (sigma + root), right)
    left, last, gap_before = torch.zeros_like(x), right, end - goal
    # The next error of the secant method is the last two errors times s'' / 2 s', which the
    # parabola puts at bend / (4 sigma); 0.1 covers what it does not see.
    curvature = bend.abs_().div_(sigma).add_(0.1 / p_max)
    tolerance = 16 * torch.finfo(target.dtype).eps
    for _ in range(ROOT_STEPS):
        gap = ratios.minus_log_size(x, near).sqrt_().sub_(goal)
        hit = gap == 0
        way = x - last
        step = (gap * way).div_((gap - gap_before).masked_fill_(hit, 1))
        error = way.mul_(step).abs_().mul_(curvature)
        if bool(((error <= tolerance * x) | hit | done).all()):
            x = torch.clamp(x - step, left, right)
            break
        left, right = torch.where(gap < 0, x, left), torch.where(gap < 0, right, x)
        last, gap_before, x = x, gap, x - step
        inside = (x > left) & (x < right) | hit
        x = torch.where(inside, x, 0.5 * (left + right))
    x = torch.where(done, p_max, x)
    if relative:
        x.masked_fill_(target == 1, 0)
    return x.add_(0 * ratios.reach)  # a row with a NaN or an infinity gives NaN


class _CentredRatios(NamedTuple):
    """Log ratios around the mean of their row, and what the sample sizes need of them."""

    e: Tensor
    """Log ratios minus their row's mean (B, T) in nat, 0 on padding."""
    counts: Tensor
    """1 on tokens, 0 on padding (B, T)."""
    length: Tensor
    """Tokens of each row (B,), at least 1."""
    top: Tensor
    """Largest e of each row (B,)."""
    reach: Tensor
    """Largest |e| of each row (B,)."""
    flat: Tensor
    """Rows whose ratios are equal up to rounding (B,)."""

    @classmethod
    def of(cls, d: Tensor, mask: Tensor) -> "_CentredRatios":
        """From log ratios with 0 on padding; a row of equal ratios may be off by rounding."""
        counts = mask.to(d.dtype)
        length = counts.sum(1).clamp_(min=1)
        centre = d.sum(1).div_(length)
        e = (d - centre.unsqueeze(1)).mul_(counts)
        top = e.amax(1)
        reach = torch.maximum(top, -e.amin(1))
        flat = reach <= centre.abs_().mul_(4 * torch.finfo(d.dtype).eps)
        return cls(e, counts, length, top, reach, flat)

    def minus_log_size(self, x: Tensor, near: Tensor | None) -> Tensor:
        """Minus log of the effective sample size as a share of the tokens, at an exponent x >= 0.

        It is log(1 + CV^2) with CV the weights' coefficient of variation. With u = expm1(x e)
        that is exact for small x e too; the other rows (`near` tells; None if there are none)
        use the powers themselves.
        """
        z = self.e * x.unsqueeze(1)
        power = None
        if near is not None:
            power = (z - (x * self.top).unsqueeze(1)).exp_().mul_(self.counts)
        u = z.expm1_()
        total = u.sum(1)
        square = torch.linalg.vector_norm(u, dim=1).square_().mul_(self.length)
        spread = square.addcmul_(total, total, value=-1)
        small = spread.div_(total.add_(self.length).square_()).log1p_()
        small = small.clamp_(min=0)
        if near is None or power is None:
            return small
        total, norm = power.sum(1), torch.linalg.vector_norm(power, dim=1)
        large = torch.log(self.length) - 2 * torch.log(total / norm)
        return torch.where(near, small, large.clamp_(min=0))
