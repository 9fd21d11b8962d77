"""Group-relative advantages: a response's reward against the other answers to its prompt.

    A_i = (r_i - mean_group r) / std_group r        GRPO, arXiv 2402.03300, section 4.1
    A_i =  r_i - mean_group r                       Dr.GRPO, arXiv 2503.20783

No epsilon stands in the denominator. A group whose rewards are equal up to rounding carries no
signal, and its advantages are exactly 0.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hmpo.errors import ConfigError, NonFiniteError, ShapeError


def group_advantages(
    rewards: Float[Tensor, " N"],
    group_size: int,
    *,
    scale: Literal["std", "none"] = "std",
    std_ddof: Literal[0, 1] = 1,
    valid: Bool[Tensor, " N"] | None = None,
    tol: float = 1e-6,
) -> Float[Tensor, " N"]:
    """Advantages of responses whose groups lie in adjacent rows.

    Args:
        rewards: one reward per response; NaN or infinite only where `valid` is False.
        group_size: responses per prompt, at least 2.
        scale: divide by the group's standard deviation, or not.
        std_ddof: 0 population, 1 unbiased standard deviation.
        valid: False leaves a response out of mean and deviation and gives it advantage 0.
        tol: rewards of a group that differ by at most tol * max(|r|, 1) count as equal.

    Returns:
        Advantages in the dtype of `rewards` (float32 for half precision), accumulated in float64.
        Exactly 0 in groups of equal rewards and in groups with fewer than two valid responses.

    Raises:
        ShapeError: N is no multiple of `group_size`, or `valid` does not fit.
        ConfigError: `group_size` < 2, or an unknown `scale`, `std_ddof` or `tol`.
        NonFiniteError: a valid reward is NaN or infinite.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), 2, scale="none")
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000])
    """
    if scale not in ("std", "none"):
        raise ConfigError(f'scale: got {scale!r}, expected "std" or "none"')
    if std_ddof not in (0, 1):
        raise ConfigError(f"std_ddof: got {std_ddof!r}, expected 0 or 1")
    groups, counted = _groups(rewards, group_size, valid)
    count = counted.sum(1, keepdim=True).clamp(min=2)
    centred = (groups - groups.sum(1, keepdim=True) / count).masked_fill(~counted, 0)
    equal = _equal(groups, counted, tol).unsqueeze(1)
    if scale == "std":
        variance = centred.square().sum(1, keepdim=True) / (count - std_ddof)
        centred = centred / variance.masked_fill(equal, 1).sqrt()
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return centred.masked_fill(equal, 0).reshape(-1).to(dtype)


def zero_variance_groups(
    rewards: Float[Tensor, " N"],
    group_size: int,
    *,
    valid: Bool[Tensor, " N"] | None = None,
    tol: float = 1e-6,
) -> Bool[Tensor, " n_groups"]:
    """Groups without a signal: all valid rewards equal, or fewer than two of them.

    Takes and raises what `group_advantages` does.
    """
    groups, counted = _groups(rewards, group_size, valid)
    return _equal(groups, counted, tol)


def _groups(rewards: Tensor, group_size: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards (n_groups, group_size) in float64 with 0 where invalid, and the valid mask."""
    if group_size < 2:
        raise ConfigError(f"group_size: got {group_size!r}, expected an integer >= 2")
    if rewards.ndim != 1 or rewards.shape[0] % group_size or not rewards.is_floating_point():
        raise ShapeError(
            f"rewards: got {rewards.dtype} {tuple(rewards.shape)}, "
            f"expected float (N,) with N a multiple of group_size = {group_size}"
        )
    if valid is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    if valid.shape != rewards.shape or valid.dtype != torch.bool:
        raise ShapeError(
            f"valid: got {valid.dtype} {tuple(valid.shape)}, expected bool {tuple(rewards.shape)}"
        )
    bad_rows = (valid & ~rewards.isfinite()).nonzero().flatten().tolist()
    if bad_rows:
        raise NonFiniteError(
            f"rewards: got NaN or infinity in rows {bad_rows[:8]}, expected finite rewards "
            "(set valid = False there to leave them out)"
        )
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    finite = torch.where(valid, rewards.detach(), torch.zeros_like(rewards)).to(wide)
    return finite.reshape(-1, group_size), valid.reshape(-1, group_size)


def _equal(groups: Tensor, counted: Tensor, tol: float) -> Tensor:
    """Groups whose counted rewards differ by at most tol * max(|r|, 1)."""
    if not tol >= 0:
        raise ConfigError(f"tol: got {tol!r}, expected a number >= 0")
    highest = groups.masked_fill(~counted, -torch.inf).amax(1)
    lowest = groups.masked_fill(~counted, torch.inf).amin(1)
    size = groups.abs().amax(1).clamp(min=1)
    return (highest - lowest <= tol * size) | (counted.sum(1) < 2)
