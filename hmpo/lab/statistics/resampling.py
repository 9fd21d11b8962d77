"""Scores over several tasks, and over seeds and prompts at once.

With ten seeds the percentiles of a bootstrap cover 90 to 94 % where they promise 95, and
resampling seeds and prompts together up to 100 %: it counts the noise of single answers three
times. Here the bootstrap gives the standard error, corrected for both, and Student's t with the
degrees of freedom that seeds (and prompts) leave gives the width (Hesterberg, 2015, The American
Statistician 69, 371-386, sections 4 and 5). benchmarks/statistics_coverage.py has the coverage.

Functions on arrays work along the last axes and over any number of axes before them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.inputs import Array, Values, level_of, matrix, special, strata, vector
from hmpo.lab.statistics.intervals import Estimate, score_interval, t_from

Tasks = Sequence[Values] | dict[str, Values]
"""Scores of each task's runs; the tasks are the strata."""
CUT = 0.25
"""Share that an interquartile mean leaves out at each end."""
LEAST_SHARE = 0.75
"""Of the variance of placements: no more than a quarter is taken off as noise of pairs."""


def iqm(values: Values) -> float:
    """Mean of the middle half: floor(n / 4) of the n values are left out at each end.

    Source: R. Agarwal et al. (2021), arXiv 2108.13264.
    """
    return float(trimmed_mean(vector("values", values)))


def trimmed_mean(values: np.ndarray) -> Array:
    """The interquartile mean along the last axis."""
    ordered, cut = np.sort(values, -1), int(CUT * values.shape[-1])
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def stratified_iqm(
    by_task: Tasks,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    against: Tasks | None = None,
) -> Estimate:
    """Interquartile mean over all runs of all tasks, seeds resampled within each task.

    Args:
        by_task: scores of each task, at least 2 runs in each.
        draws: bootstrap draws.
        seed: of the draws; the same seed gives the same interval.
        level: nominal coverage.
        against: scores of another method on the same tasks and seeds, in the same order; the
            estimate is then the difference of both interquartile means, and p belongs to it.

    Source: Agarwal et al. (2021); the width by t: see the module.
    """
    a = _tasks("by_task", by_task)
    b = _tasks("against", against) if against is not None else None
    if b is not None and [x.size for x in a] != [x.size for x in b]:
        raise StatisticsError("against: expected the same tasks with as many seeds each")
    mean, low, high, p = (float(x) for x in iqm_interval(a, b, _draws(draws), seed, level))
    tested = None if b is None else p
    return Estimate(mean, low, high, level_of("level", level), min(x.size for x in a), tested)


def iqm_interval(
    a: list[np.ndarray], b: list[np.ndarray] | None, draws: int, seed: int, level: float
) -> tuple[Array, ...]:
    """Value, low, high, p of an interquartile mean, or of a difference of two.

    Args:
        a: per task, scores of shape [..., n of the task].
        b: the same of the other method, paired by seed, or None.
        draws: bootstrap draws, the same for all leading axes.
        seed: of the draws.
        level: nominal coverage.
    """
    rng = np.random.default_rng(seed)
    sides = [a] if b is None else [a, b]
    value = _difference([trimmed_mean(np.concatenate(side, -1)) for side in sides])
    drawn = np.empty((draws, *value.shape))
    for k in range(draws):
        rows = [rng.integers(0, task.shape[-1], task.shape[-1]) for task in a]
        picked = [np.concatenate([x[..., i] for x, i in zip(side, rows)], -1) for side in sides]
        drawn[k] = _difference([trimmed_mean(side) for side in picked])
    # Rare draws with more than a quarter of crashes do not stretch these percentiles.
    low, high = np.quantile(drawn, special.ndtr([-1.0, 1.0]), axis=0)
    sizes = np.array([task.shape[-1] for task in a])
    # A bootstrap's variance is (n - 1)/n of what it should be, within each task.
    error = (high - low) / 2 * math.sqrt(np.mean(sizes / (sizes - 1)))
    return t_from(value, error, _iqm_freedom(sides, sizes), level)


def _difference(sides: list) -> Array:
    return sides[0] if len(sides) == 1 else sides[0] - sides[1]


def _iqm_freedom(sides: list[list[np.ndarray]], sizes: np.ndarray) -> Array:
    """Satterthwaite's degrees of freedom from the tasks' winsorised variances.

    A task that lies outside of the middle half says nothing of the variance, however many seeds
    it has.
    """
    parts = []
    for t, n in enumerate(sizes):
        inside = []
        for side in sides:
            ordered = np.sort(np.concatenate(side, -1), -1)
            cut = int(CUT * ordered.shape[-1])
            low, high = ordered[..., [cut]], ordered[..., [ordered.shape[-1] - cut - 1]]
            inside.append(np.clip(side[t], low, high))
        parts.append(n * _difference(inside).var(-1, ddof=1))
    part = np.array(parts)
    below = (part**2 / (sizes - 1).reshape(-1, *[1] * (part.ndim - 1))).sum(0)
    least = np.full(below.shape, float(sizes.min() - 1))
    return np.divide(part.sum(0) ** 2, below, out=least, where=below > 0)


def two_level_bootstrap(
    a: Values,
    b: Values | None = None,
    draws: int = 4000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean over seeds and held-out prompts, or the difference of two methods that share both.

    Args:
        a: passes or scores, shape [seeds, prompts], at least 2 of each.
        b: the same of another method on the same seeds and prompts; the estimate is a - b.
        draws: bootstrap draws: seeds are resampled, then prompts.
        seed: of the draws.
        level: nominal coverage for new seeds and new prompts of the same kind. A paired t
            interval speaks of new seeds on these very prompts and is narrower.

    Source: A. B. Owen (2007), Annals of Applied Statistics 1, 386-411 (the plain bootstrap and
    its threefold noise); F. E. Satterthwaite (1946), Biometrics Bulletin 2, 110-114.
    """
    d = matrix("a", a, 2)
    if b is not None:
        other = matrix("b", b, 2)
        if other.shape != d.shape:
            raise StatisticsError(f"b: got shape {other.shape}, expected {d.shape} as a has")
        d = d - other
    level = level_of("level", level)
    rng = np.random.default_rng(seed)
    seeds, prompts = d.shape
    value, rows, columns, df = two_level_effects(d)
    picked = rng.multinomial(seeds, np.full(seeds, 1 / seeds), _draws(draws)) / seeds
    asked = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts
    error = (picked @ rows + asked @ columns).std()
    mean, low, high, p = (float(x) for x in t_from(value, error, df, level))
    return Estimate(mean, low, high, level, seeds, None if b is None else p)


def two_level_effects(d: np.ndarray) -> tuple[Array, ...]:
    """Mean, effects of seeds and of prompts to resample, degrees of freedom.

    Args:
        d: shape [..., S, P].

    Returns:
        mean [...], rows [..., S], columns [..., P], df [...]. The mean of resampled rows plus
        that of resampled columns has the variance (MS_seeds + MS_prompts - MS_rest) / (S P) of
        the two-way analysis of variance: rows carry the noise of single answers once, columns
        are shrunk by theirs, to 0 where they show no more than noise.
    """
    s, p = d.shape[-2:]
    mean = d.mean((-1, -2))
    rows = d.mean(-1) - mean[..., None]
    columns = d.mean(-2) - mean[..., None]
    rest = d - mean[..., None, None] - rows[..., :, None] - columns[..., None, :]
    by_seed = p * (rows**2).sum(-1) / (s - 1)
    by_prompt = s * (columns**2).sum(-1) / (p - 1)
    noise = (rest**2).sum((-1, -2)) / ((s - 1) * (p - 1))
    extra = np.maximum(by_prompt - noise, 0.0)
    shrunk = (p - 1) / p * np.where(by_prompt > 0, by_prompt, 1.0)
    columns = columns * np.sqrt(extra / shrunk)[..., None]
    rows = rows * math.sqrt(s / (s - 1))
    of_prompts = by_prompt**2 / (p - 1) + noise**2 / ((s - 1) * (p - 1))
    below = by_seed**2 / (s - 1) + np.where(extra > 0, of_prompts, 0.0)
    least = np.full(below.shape, s - 1.0)
    return mean, rows, columns, np.divide(
        (by_seed + extra) ** 2, below, out=least, where=below > 0
    )  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Share of runs above each threshold, tasks with equal weight; arrays of shape [thresholds]."""

    thresholds: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray


def performance_profile(by_task: Tasks, thresholds: Values, level: float = 0.95) -> Profile:
    """Share of runs whose score is above each threshold, with a band.

    Args:
        by_task: scores of each task.
        thresholds: shape [K], in any order.
        level: nominal coverage at each threshold by itself.

    The band is Wilson's with the number of runs to which the strata amount; resampling would
    give a band of width 0 wherever all runs lie on one side.

    Source: Agarwal et al. (2021), section 4.3; Korn and Graubard (1998) as at `score_interval`.
    """
    tasks, tau = strata("by_task", by_task), vector("thresholds", thresholds)
    above = np.array([(task[:, None] > tau).sum(0) for task in tasks])
    sizes = np.array([task.size for task in tasks])
    share, low, high = stratified_share(above, sizes[:, None], level_of("level", level))
    return Profile(tau, *(np.asarray(x) for x in (share, low, high)))


def stratified_share(
    counts: np.ndarray, sizes: np.ndarray, level: float
) -> tuple[Array, Array, Array]:
    """Mean share over strata (first axis) with Wilson's interval of effective size."""
    share = (counts / sizes).mean(0)
    smooth = (counts + 0.25) / (sizes + 0.5)  # a stratum that all or none pass has a variance too
    variance = (smooth * (1 - smooth) / sizes).sum(0) / len(counts) ** 2
    middle = smooth.mean(0)
    return share, *score_interval(
        share, middle * (1 - middle) / variance, float(special.ndtri(0.5 + level / 2))
    )


def probability_of_improvement(
    a: Tasks, b: Tasks, paired: bool = True, level: float = 0.95
) -> Estimate:
    """Chance that a run of one method scores above a run of the other, mean over tasks.

    Args:
        a: scores of each task, at least 2 runs in each.
        b: scores of the other method on the same tasks, in the same order.
        paired: the i-th runs of both share a seed; otherwise they are independent.
        level: nominal coverage.

    Ties count half, and all pairs of runs are compared, not only those that share a seed. The
    interval is made on the logit scale; where one method is above the other in every pair it is
    Wilson's of as many trials as there are seeds.

    Source: Agarwal et al. (2021); the variance: E. R. DeLong et al. (1988), Biometrics 44,
    837-845, less the noise of single pairs, which it counts twice.
    """
    x, y = _tasks("a", a), _tasks("b", b)
    if len(x) != len(y) or (paired and [u.size for u in x] != [u.size for u in y]):
        raise StatisticsError("a, b: expected the same tasks, paired runs with as many seeds each")
    value, low, high = (float(v) for v in improvement(x, y, paired, level_of("level", level)))
    return Estimate(value, low, high, level, min(u.size for u in [*x, *y]))


def improvement(
    a: list[np.ndarray], b: list[np.ndarray], paired: bool, level: float
) -> tuple[Array, Array, Array]:
    """Value, low, high of the probability of improvement, scores per task [..., n] and [..., m]."""
    shares, variances, slack = [], [], []
    for x, y in zip(a, b):
        n, m = x.shape[-1], y.shape[-1]
        sign = np.sign(x[..., :, None] - y[..., None, :])
        wins = (1 + sign) / 2
        share = wins.mean((-1, -2))
        of_a, of_b = wins.mean(-1) - share[..., None], wins.mean(-2) - share[..., None]
        rest = wins - share[..., None, None] - of_a[..., :, None] - of_b[..., None, :]
        noise = (rest**2).sum((-1, -2)) / ((n - 1) * (m - 1) * n * m)
        if paired:
            plain = ((of_a + of_b) ** 2).sum(-1) / ((n - 1) * n)
        else:
            plain = (of_a**2).sum(-1) / ((n - 1) * n) + (of_b**2).sum(-1) / ((m - 1) * m)
        shares.append(share)
        variances.append(np.maximum(plain - noise, LEAST_SHARE * plain))
        slack.append(2 * n - 2)
    value, part = np.mean(shares, 0), np.array(variances)
    variance = part.sum(0) / len(a) ** 2
    split = (value > 0) & (value < 1) & (variance > 0)
    inner = np.where(split, value, 0.5)
    if paired:
        weight = np.array(slack).reshape(-1, *[1] * (part.ndim - 1))
        below = (part**2 / weight).sum(0)
        df = np.divide(part.sum(0) ** 2, below, out=np.ones_like(below), where=below > 0)
        quantile = special.stdtrit(df, 0.5 + level / 2)
    else:
        quantile = special.ndtri(0.5 + level / 2)  # the logit's interval is wide enough without t
    half = quantile * np.sqrt(variance) / (inner * (1 - inner))
    middle = special.logit(inner)
    trials = np.full(value.shape, float(sum(min(x.shape[-1], y.shape[-1]) for x, y in zip(a, b))))
    low, high = score_interval(value, trials, float(special.ndtri(0.5 + level / 2)))
    return (
        value,
        np.where(split, special.expit(middle - half), low),
        np.where(split, special.expit(middle + half), high),
    )


def _tasks(name: str, by_task: Tasks) -> list[np.ndarray]:
    tasks = strata(name, by_task)
    if min(task.size for task in tasks) < 2:
        raise StatisticsError(f"{name}: got a task with one run, expected at least 2 in each")
    return tasks


def _draws(draws: int) -> int:
    if draws < 100:
        raise StatisticsError(f"draws: got {draws}, expected at least 100")
    return draws
