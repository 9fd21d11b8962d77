"""Estimators of advantages over groups of any size, each with what it says where a group is silent.

    group_std              (r - mean_group) / std_group                 GRPO, arXiv 2402.03300
    group                  r - mean_group                               Dr.GRPO, arXiv 2503.20783
    batch_std              (r - mean_group) / std_batch                 arXiv 2508.08221; TRL
    rloo                   r - mean of the others of its group          arXiv 2402.14740
    reinforce_pp           (r - mean_batch) / std_batch                 arXiv 2501.03262
    reinforce_pp_baseline  r - mean_group, whitened over the batch      arXiv 2501.03262
    max_rl                 (r - mean_group) / mean_group                arXiv 2602.02710
    pass_at_k              best less second best, to the best alone     arXiv 2503.19595
    gdpo                   `group_std` of each reward, weighed, summed,
                           whitened over the batch                      arXiv 2601.05242

Dropped rewards count nowhere and have advantage 0. A group that is left with one reward has no
baseline: its advantage is 0, but in `reinforce_pp`, which has no groups. A group of equal rewards
has advantage 0 in all others. No epsilon stands in a denominator; what would be divided by 0 is 0.
Statistics of the batch are over its responses, or over their tokens where `lengths` are given, as
in verl.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hmpo.config.advantages import ESTIMATORS, Estimator
from hmpo.errors import ConfigError, NonFiniteError, ShapeError

__all__ = ["ESTIMATORS", "Advantages", "Estimator", "estimate_advantages"]


class Advantages(NamedTuple):
    """Advantages, and how many groups and rewards say nothing.

    Example: rewards [1, 0 | 1, 1 | 1, NaN], the NaN dropped, under `rloo`: `values`
    [1, -1, 0, 0, 0, 0], `groups` 3, `equal` 1, `single` 1, `empty` 0, `dropped` 1, `dead` 2.
    """

    values: Float[Tensor, " N"]
    """One per response; 0 where it was dropped."""
    groups: int
    equal: int
    """Groups of two or more rewards, all equal."""
    single: int
    """Groups with one reward left."""
    empty: int
    """Groups with none left."""
    dropped: int
    """Responses whose reward is left out."""
    dead: int
    """Groups whose advantages are all 0."""


def estimate_advantages(
    rewards: Float[Tensor, " N"] | Float[Tensor, "N K"],
    groups: Int[Tensor, " N"],
    estimator: Estimator,
    *,
    valid: Bool[Tensor, " N"] | Bool[Tensor, "N K"] | None = None,
    lengths: Int[Tensor, " N"] | None = None,
    weights: Float[Tensor, " K"] | None = None,
    std_ddof: Literal[0, 1] = 1,
    tol: float = 1e-6,
) -> Advantages:
    """Advantages of responses whose groups may have any size and stand in any order.

    Args:
        rewards: one per response, or one per response and reward function for `gdpo`.
        groups: which prompt each response answers, any integers.
        estimator: one of `ESTIMATORS`.
        valid: False leaves a response out; only there may a reward be NaN or infinite. `gdpo` takes
            it for each reward, too: one left out is 0 in the sum, and in no statistic of its own.
        lengths: tokens per response, which then weigh it in statistics of the batch.
        weights: of the rewards of `gdpo`; None weighs all alike, and one of weight 0 says nothing.
        std_ddof: 0 population, 1 unbiased standard deviation, of groups and batch.
        tol: rewards of a group that differ by at most tol * max(|r|, 1) count as equal.

    Raises:
        ShapeError: shapes do not fit.
        ConfigError: an unknown estimator, or rewards below 0 for `max_rl`.
        NonFiniteError: a valid reward is NaN or infinite.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator: got {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    valid = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    _check(rewards, groups, estimator, valid)
    table = rewards.detach().double().reshape(len(rewards), -1)
    given = valid.reshape(len(rewards), -1).expand_as(table)
    table, valid = table.masked_fill(~given, 0), given.any(1)
    among = _Groups(groups, valid, std_ddof, tol)
    tokens = valid.double() if lengths is None else lengths.double() * valid
    if estimator == "gdpo":
        shares = [1.0] * table.shape[1] if weights is None else weights.tolist()
        heard = [k for k, share in enumerate(shares) if share != 0]
        each = [_Groups(groups, given[:, k], std_ddof, tol) for k in heard]
        total, equal = _weighed_sum(each, table[:, heard], [shares[k] for k in heard])
        values = _whitened(total, tokens, std_ddof)
    else:
        r = table[:, 0]
        values, equal = _one_reward(r, among, tokens, estimator, std_ddof), among.equal(r)
    if estimator != "reinforce_pp":
        values = values.masked_fill((equal | (among.count < 2))[among.index], 0)
    values = values.masked_fill(~valid, 0)
    dead = ~torch.zeros_like(equal).index_put((among.index,), values != 0, accumulate=True)
    return Advantages(
        values=values.to(torch.promote_types(rewards.dtype, torch.float32)),
        groups=len(among.count),
        equal=int((equal & (among.count > 1)).sum()),
        single=int((among.count == 1).sum()),
        empty=int((among.count == 0).sum()),
        dropped=int((~valid).sum()),
        dead=int(dead.sum()),
    )


def _one_reward(r: Tensor, among: "_Groups", tokens: Tensor, estimator: str, ddof: int) -> Tensor:
    """Every estimator of a single reward (N,), before silent groups are told."""
    centred = among.centred(r)
    if estimator == "group":
        return centred
    if estimator == "group_std":
        return among.scaled(r)
    if estimator == "batch_std":
        return _ratio(centred, _deviation(r, tokens, ddof))
    if estimator == "rloo":
        count = among.count.clamp(min=2).double()[among.index]
        return centred * count / (count - 1)
    if estimator == "max_rl":
        return _ratio(centred, among.mean(r)[among.index])
    if estimator == "pass_at_k":
        return _ratio(among.lead(r), among.deviation(r)[among.index])
    return _whitened(r if estimator == "reinforce_pp" else centred, tokens, ddof)


def _weighed_sum(
    each: Sequence["_Groups"], table: Tensor, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Sum of the scaled rewards of each column (N,), and the groups that are equal in all."""
    columns = list(zip(each, table.T, shares, strict=True))
    total = torch.stack([share * one.scaled(r) for one, r, share in columns]).sum(0)
    return total, torch.stack([one.equal(r) for one, r, _ in columns]).all(0)


class _Groups:
    """Statistics of groups; dropped rewards hold 0 and count nowhere.

    Args:
        groups: which group each response is of (N,).
        valid: False where it is left out.
        ddof: 0 population, 1 unbiased standard deviation.
        tol: relative distance of equal rewards.
    """

    def __init__(self, groups: Tensor, valid: Tensor, ddof: int, tol: float) -> None:
        self.index = torch.unique(groups, return_inverse=True)[1]
        self.valid, self.ddof, self.tol = valid, ddof, tol
        self.size = int(self.index.max()) + 1 if len(groups) else 0
        self.count = self.total(valid.double()).long()

    def total(self, x: Tensor) -> Tensor:
        """Sum of each group."""
        return x.new_zeros(self.size).index_add(0, self.index, x)

    def mean(self, r: Tensor) -> Tensor:
        """Mean reward of each group."""
        return self.total(r) / self.count.clamp(min=1)

    def centred(self, r: Tensor) -> Tensor:
        """Rewards less their group's mean; 0 where dropped."""
        return (r - self.mean(r)[self.index]) * self.valid

    def deviation(self, r: Tensor) -> Tensor:
        """Standard deviation of each group."""
        square = self.total(self.centred(r).square())
        return (square / (self.count - self.ddof).clamp(min=1)).sqrt()

    def scaled(self, r: Tensor) -> Tensor:
        """Centred rewards over their group's deviation, 0 where that is rounding."""
        deviation = self.deviation(r).masked_fill(self.equal(r), 0)
        return _ratio(self.centred(r), deviation[self.index])

    def extreme(self, r: Tensor, sign: float) -> Tensor:
        """Largest (sign 1) or least (-1) reward of each group; -inf or inf of none."""
        worst = torch.full((self.size,), -torch.inf, dtype=r.dtype, device=r.device)
        x = (sign * r).masked_fill(~self.valid, -torch.inf)
        return sign * worst.scatter_reduce(0, self.index, x, "amax")

    def equal(self, r: Tensor) -> Tensor:
        """Groups whose rewards differ by at most the tolerance."""
        size = self.extreme(r.abs(), 1.0).clamp(min=1)
        return self.extreme(r, 1.0) - self.extreme(r, -1.0) <= self.tol * size

    def lead(self, r: Tensor) -> Tensor:
        """How far the first best of a group is ahead of the second best; 0 for the others."""
        order = torch.argsort(r.masked_fill(~self.valid, -torch.inf), descending=True, stable=True)
        out = torch.zeros_like(r)
        for group in range(self.size):
            best = order[self.index[order] == group][:2]
            if len(best) == 2 and bool(self.valid[best].all()):
                out[best[0]] = r[best[0]] - r[best[1]]
        return out


def _deviation(r: Tensor, tokens: Tensor, ddof: int) -> Tensor:
    """Standard deviation over the batch, each response as often as it has tokens."""
    count = tokens.sum()
    mean = (r * tokens).sum() / count.clamp(min=1)
    return (((r - mean).square() * tokens).sum() / (count - ddof).clamp(min=1)).sqrt()


def _whitened(r: Tensor, tokens: Tensor, ddof: int) -> Tensor:
    """Mean 0 and deviation 1 over the batch."""
    mean = (r * tokens).sum() / tokens.sum().clamp(min=1)
    return _ratio(r - mean, _deviation(r, tokens, ddof))


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """X / y, and 0 where y is 0."""
    return torch.where(y == 0, 0, x / y.masked_fill(y == 0, 1))


def _check(rewards: Tensor, groups: Tensor, estimator: str, valid: Tensor) -> None:
    """Shapes, finite rewards, and rewards that an estimator is made for."""
    known = {"groups": (groups, [rewards.shape[:1]])}
    known["valid"] = (valid, [rewards.shape[:1], rewards.shape])
    for name, (tensor, shapes) in known.items():
        if tensor.shape not in shapes:
            shape, expected = tuple(tensor.shape), tuple(shapes[0])
            raise ShapeError(f"{name}: got {shape}, expected {expected}")
    if (rewards.ndim == 2) != (estimator == "gdpo"):
        expected = "(N, K)" if estimator == "gdpo" else "(N,)"
        raise ShapeError(f"rewards: got {tuple(rewards.shape)}, expected {expected}")
    counted = rewards[valid]
    if not bool(counted.isfinite().all()):
        table = rewards.reshape(len(rewards), -1)
        bad = valid.reshape(len(rewards), -1) & ~table.isfinite()
        rows = bad.any(1).nonzero().flatten()
        raise NonFiniteError(
            f"rewards: got NaN or infinity in rows {rows[:8].tolist()}, expected finite rewards "
            "(set valid = False there to leave them out)"
        )
    if estimator == "max_rl" and bool((counted < 0).any()):
        lowest = float(counted.min())
        raise ConfigError(f'rewards: got {lowest:g}, expected none below 0 for "max_rl"')
