"""Curves: sigmoid of reward against compute, learning-rate envelopes, reward at equal KL."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.inputs import Array, Values, level_of, matrix, optimize, vector
from hmpo.lab.statistics.intervals import Estimate, paired_t

STEEPEST = 20.0
"""Largest exponent B of a fit; a step between two points fits any larger one as well."""


@dataclass(frozen=True)
class Sigmoid:
    """R(C) = start + (top - start) / (1 + (middle / C)^slope)."""

    start: float
    top: float
    """A, the asymptote. Not constrained to [0, 1]: an absurd one says that the fit is."""
    middle: float
    """C_mid, the compute at which half of the gain is made."""
    slope: float
    """B, > 0."""
    residual: float
    """Root of the summed squared residuals over (points - fitted numbers): one point's noise."""

    def at(self, compute: Values) -> np.ndarray:
        """The curve at each compute, shape [K]."""
        return self.start + (self.top - self.start) * _rise(
            vector("compute", compute), self.middle, self.slope
        )


def fit_sigmoid(compute: Values, reward: Values, start: float | None = None) -> Sigmoid:
    """Least-squares sigmoid of reward against compute.

    Args:
        compute: updates or tokens, shape [K], > 0, at least 5 different.
        reward: mean success at each, shape [K].
        start: R0 where it is known (the evaluation before training); None fits it too.

    `start` and `top` follow linearly from `middle` and `slope`, so only these two are searched:
    a grid, then Gauss-Newton from its best points. `middle` stays within a tenth of the smallest
    and ten times the largest compute, `slope` in [0.1, 20].

    Source: D. Khatri et al. (2025), The art of scaling reinforcement learning compute for LLMs,
    arXiv 2510.13786.
    """
    c, r = vector("compute", compute, 5), vector("reward", reward, 5)
    if c.shape != r.shape:
        raise StatisticsError(f"reward: got {r.size} numbers, expected {c.size} as compute has")
    if c.min() <= 0 or np.unique(c).size < 5:
        raise StatisticsError("compute: expected numbers > 0, at least 5 different")
    if start is not None and not math.isfinite(start):
        raise StatisticsError(f"start: got {start}, expected a finite number")
    low = np.array([math.log(c.min() / 10), math.log(0.1)])
    high = np.array([math.log(c.max() * 10), math.log(STEEPEST)])
    grid = np.stack(
        np.meshgrid(np.linspace(low[0], high[0], 41), np.linspace(low[1], high[1], 21)), -1
    ).reshape(-1, 2)
    cost = (_linear(c, r, start, grid[:, :1], grid[:, 1:])[1] ** 2).sum(-1)
    tried = [
        optimize.least_squares(
            lambda x: _linear(c, r, start, x[0], x[1])[1],
            np.clip(grid[i], low + 1e-9, high - 1e-9),
            bounds=(low, high),
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        for i in np.argsort(cost, kind="stable")[:3]
    ]
    best = min(tried, key=lambda result: result.cost)
    (first, top), rest = _linear(c, r, start, *best.x)
    first, top = float(first), float(top)
    slack = c.size - (4 if start is None else 3)
    residual = math.sqrt(float(rest @ rest) / slack)
    middle, slope = (float(v) for v in np.exp(best.x))
    return Sigmoid(first, top, middle, slope, residual)


@dataclass(frozen=True)
class SigmoidCheck:
    """A sigmoid fitted on the first half of a curve against its second half."""

    fit: Sigmoid
    error: float
    """Root mean square of the second half less the prediction."""
    bias: float
    """Mean of the second half less the prediction: > 0 where training went further."""
    noise: float
    """Standard deviation of one point about the truth."""

    @property
    def sentence(self) -> str:
        """What the fit foretold, in points of success."""
        return (
            f"a sigmoid fitted on the first half misses the second by {100 * self.error:.1f} "
            f"points (mean {100 * self.bias:+.1f}); one point's own noise is "
            f"{100 * self.noise:.1f}"
        )


def sigmoid_check(
    compute: Values,
    reward: Values,
    start: float | None = None,
    noise: float | None = None,
) -> SigmoidCheck:
    """Fit on the first half of the points by compute, test on the second.

    Args:
        compute: shape [K], > 0, at least 10 points.
        reward: shape [K].
        start: as in `fit_sigmoid`.
        noise: standard deviation of a point where it is known (over seeds, or
            sqrt(p (1 - p) / prompts)); None takes the residual of a fit of the whole curve.
    """
    c, r = vector("compute", compute, 10), vector("reward", reward, 10)
    if c.shape != r.shape:
        raise StatisticsError(f"reward: got {r.size} numbers, expected {c.size} as compute has")
    order = np.argsort(c, kind="stable")
    c, r = c[order], r[order]
    half = (c.size + 1) // 2
    fit = fit_sigmoid(c[:half], r[:half], start)
    off = r[half:] - fit.at(c[half:])
    own = fit_sigmoid(c, r, start).residual if noise is None else float(noise)
    return SigmoidCheck(fit, math.sqrt(float(np.mean(off**2))), float(off.mean()), own)


def _rise(compute: np.ndarray, middle: float, slope: float) -> np.ndarray:
    """1 / (1 + (middle / C)^slope) without overflow, in [0, 1]."""
    return 0.5 * (1 + np.tanh(0.5 * slope * (np.log(compute) - math.log(middle))))


def _linear(
    c: np.ndarray, r: np.ndarray, start: float | None, log_middle: Array, log_slope: Array
) -> tuple[tuple[Array, Array], np.ndarray]:
    """(start, top) by least squares for a given middle and slope, and the residuals [K].

    Middle and slope of shape [n, 1] give (start, top) of shape [n, 1] and residuals [n, K].
    """
    rise = 0.5 * (1 + np.tanh(0.5 * np.exp(log_slope) * (np.log(c) - log_middle)))
    level = np.zeros_like(rise[..., :1]) if start is not None else rise.mean(-1, keepdims=True)
    base = float(r.mean()) if start is None else float(start)
    centred, about = rise - level, r - base
    below = (centred**2).sum(-1, keepdims=True)
    gain = (centred * about).sum(-1, keepdims=True)
    gain = np.divide(gain, below, out=np.zeros_like(below), where=below > 1e-24)
    first = base - gain * level
    rest = r - first - gain * rise
    if rise.ndim == 1:
        return (first[0], first[0] + gain[0]), rest
    return (first, first + gain), rest


def draw_weights(cells: int, draws: int, replace: bool = False) -> np.ndarray:
    """Chance that the best of `draws` random cells of a grid is its i-th worst, shape [cells].

    Args:
        cells: size of the grid, N >= 1.
        draws: k >= 1; without replacement at most N.
        replace: a cell may be drawn more than once: (i/N)^k - ((i-1)/N)^k; otherwise
            C(i-1, k-1) / C(N, k).

    Source: J. Dodge et al. (2019), arXiv 1909.03004 (with replacement); R. Tang et al. (2020),
    arXiv 2005.00770 (without).
    """
    if cells < 1 or draws < 1 or (not replace and draws > cells):
        raise StatisticsError(f"draws: got {draws} of {cells} cells, expected 1 to {cells}")
    rank = range(1, cells + 1)
    if replace:
        return np.array([(i / cells) ** draws - ((i - 1) / cells) ** draws for i in rank])
    return np.array([math.comb(i - 1, draws - 1) / math.comb(cells, draws) for i in rank])


def expected_best(
    scores: Values, draws: int, replace: bool = False, level: float = 0.95
) -> Estimate:
    """Expected validation score of the best of k random cells of a tuning grid.

    Args:
        scores: shape [cells, seeds], the same tuning seeds in every cell.
        draws: k, the tuning budget in cells.
        replace: whether a cell may be drawn twice (see `draw_weights`).
        level: nominal coverage for new seeds on this grid.

    The best of noisy means looks better than it is. So each seed is scored by the cells that the
    other seeds would choose, and the interval is Student's over these scores; from one seed the
    plain formula, without an interval.
    """
    estimate = paired_t(expected_best_by_seed(scores, draws, replace), level_of("level", level))
    return dataclasses.replace(estimate, p_value=None)


def expected_best_by_seed(scores: Values, draws: int, replace: bool = False) -> np.ndarray:
    """The same for each seed, shape [seeds]; two methods' differences of it are paired."""
    return best_by_seed(matrix("scores", scores), draws, replace)


def best_by_seed(scores: np.ndarray, draws: int, replace: bool = False) -> np.ndarray:
    """The same along the last two axes, [..., cells, seeds] -> [..., seeds]."""
    cells, seeds = scores.shape[-2:]
    weights = draw_weights(cells, draws, replace)
    total = scores.sum(-1, keepdims=True)
    ranking = (total - scores) / (seeds - 1) if seeds > 1 else scores
    # [..., seeds, cells]: equal cells share the weights of their ranks.
    ranking = np.round(np.swapaxes(ranking, -1, -2), 12)
    ordered = np.sort(ranking, -1)
    heap = np.concatenate([[0.0], np.cumsum(weights)])
    below = (ordered[..., None, :] < ranking[..., :, None]).sum(-1)
    upto = (ordered[..., None, :] <= ranking[..., :, None]).sum(-1)
    share = (heap[upto] - heap[below]) / (upto - below)
    return (share * np.swapaxes(scores, -1, -2)).sum(-1)


@dataclass(frozen=True)
class EqualKL:
    """Paired difference of reward at equal KL from the reference; one entry per KL."""

    kl: np.ndarray
    reward_a: np.ndarray
    reward_b: np.ndarray
    differences: list[Estimate]
    """a - b at each KL, over the seeds whose runs both reach it."""
    mean: Estimate
    """Of the difference averaged over the KLs that all runs reach."""


def reward_at_kl(
    a: Sequence[tuple[Values, Values]],
    b: Sequence[tuple[Values, Values]],
    kl: Values | None = None,
    level: float = 0.95,
) -> EqualKL:
    """Reward of two methods at equal distance from the reference, paired by seed.

    Args:
        a: (kl, reward) of each run along training, both of shape [K of the run], KL >= 0.
        b: the same of the other method, the i-th run on the same seed as the i-th of `a`.
        kl: where to compare; None: ten values up to the largest KL that every run reaches.
        level: nominal coverage.

    A run's reward at a KL is interpolated where it first reaches it. Runs that stay below are
    left out there with their partner, and `n` of the estimate says how many are left: such a
    comparison is of the seeds that went far, not of all.
    """
    if len(a) != len(b) or not a:
        raise StatisticsError(f"reward_at_kl: got {len(a)} and {len(b)} runs, expected pairs")
    runs = [[_path(f"run {i}", *run) for i, run in enumerate(side)] for side in (a, b)]
    reach = min(path.max() for side in runs for path, _ in side)
    floor = max(path[0] for side in runs for path, _ in side)
    if kl is None:
        if reach <= floor:
            raise StatisticsError("reward_at_kl: the runs share no range of KL; give kl")
        grid = floor + (reach - floor) * np.arange(1, 11) / 10
    else:
        grid = vector("kl", kl)
    at = np.array([[_first_at(*run, grid) for run in side] for side in runs])
    both = ~np.isnan(at).any(0)
    if not both.any(0).all():
        raise StatisticsError(f"kl: no pair of runs spans {grid[~both.any(0)][0]:g}; give less")
    rows, whole = range(grid.size), both.all(0)
    if not whole.any():
        raise StatisticsError("kl: expected at least one KL that every run reaches")
    gaps = at[0] - at[1]
    differences = [paired_t(gaps[both[:, k], k], level) for k in rows]
    means = [[float(side[both[:, k], k].mean()) for k in rows] for side in at]
    overall = paired_t(gaps[:, whole].mean(1), level)
    return EqualKL(grid, np.array(means[0]), np.array(means[1]), differences, overall)


def _path(name: str, kl: Values, reward: Values) -> tuple[np.ndarray, np.ndarray]:
    x, y = vector(f"{name}: kl", kl), vector(f"{name}: reward", reward)
    if x.shape != y.shape:
        raise StatisticsError(f"{name}: got {x.size} KLs and {y.size} rewards, expected as many")
    return x, y


def _first_at(path: np.ndarray, reward: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Reward where the path first reaches each KL of the grid; NaN where it does not."""
    if path.size == 1:
        return np.where(grid == path[0], reward[0], np.nan)
    i = np.searchsorted(np.maximum.accumulate(path), grid, side="left")
    inside = (i < path.size) & (grid >= path[0])
    i = np.clip(i, 1, path.size - 1)
    span = path[i] - path[i - 1]
    share = np.divide(grid - path[i - 1], span, out=np.zeros(grid.size), where=span > 0)
    value = reward[i - 1] + np.clip(share, 0.0, 1.0) * (reward[i] - reward[i - 1])
    return np.where(inside, value, np.nan)
