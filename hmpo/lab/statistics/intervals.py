"""Intervals in closed form: means, differences, rates.

Functions on arrays (`t_interval`, `score_interval`) work along the last axis, so that
benchmarks/statistics_coverage.py simulates the very code that a report uses.
"""

import math
from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.inputs import Array, Values, level_of, special, vector
from hmpo.stats import wilson_interval


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float | None
    """None: no interval can be given (one seed)."""
    high: float | None
    """None: no interval, or, of a time to target, open above."""
    level: float
    """Nominal coverage."""
    n: int
    """Seeds (or trials) it rests on."""
    p_value: float | None = None
    """Two-sided, of the value 0; None where no test belongs to the interval."""

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def t_interval(values: np.ndarray, level: float) -> tuple[Array, ...]:
    """Student's t of the mean along the last axis.

    Args:
        values: shape [..., n], n >= 2, finite.
        level: nominal coverage.

    Returns:
        mean, low, high, p (two-sided, of mean 0), each of shape [...]. Where all n values are
        the same the interval is that value, and p is 1 at 0 and 0 elsewhere.
    """
    n = values.shape[-1]
    mean = values.mean(-1)
    error = values.std(-1, ddof=1) / math.sqrt(n)
    return t_from(mean, error, np.asarray(n - 1.0), level)


def t_from(mean: Array, error: Array, df: Array, level: float) -> tuple[Array, ...]:
    """The same from means, standard errors and degrees of freedom."""
    half = special.stdtrit(df, 0.5 + level / 2) * error
    size = np.abs(mean)
    t = np.divide(size, error, out=np.where(size > 0, np.inf, 0.0), where=error > 0)
    return mean, mean - half, mean + half, 2 * special.stdtr(df, -t)


def paired_t(differences: Values, level: float = 0.95) -> Estimate:
    """Mean of paired differences with Student's interval and p value.

    Args:
        differences: one per shared seed, shape [n]; n = 1 gives neither interval nor p.
        level: nominal coverage, in (0, 1).

    Raises:
        StatisticsError: NaN or infinity among the differences, or none.

    Source: Student (1908), Biometrika 6, 1-25.
    """
    d, level = vector("differences", differences), level_of("level", level)
    if d.size == 1:
        return Estimate(float(d[0]), None, None, level, 1)
    mean, low, high, p = (float(x) for x in t_interval(d, level))
    return Estimate(mean, low, high, level, d.size, p)


def welch_interval(a: np.ndarray, b: np.ndarray, level: float) -> tuple[Array, ...]:
    """Welch's interval of mean(a) - mean(b) along the last axes; returns as `t_interval`."""
    n, m = a.shape[-1], b.shape[-1]
    u, v = a.var(-1, ddof=1) / n, b.var(-1, ddof=1) / m
    below = u**2 / (n - 1) + v**2 / (m - 1)
    df = np.divide((u + v) ** 2, below, out=np.full(below.shape, n + m - 2.0), where=below > 0)
    return t_from(a.mean(-1) - b.mean(-1), np.sqrt(u + v), df, level)


def welch(a: Values, b: Values, level: float = 0.95) -> Estimate:
    """mean(a) - mean(b) of unpaired runs whose variances may differ.

    Args:
        a: scores of one method, shape [n], n >= 2.
        b: scores of the other, shape [m], m >= 2.
        level: nominal coverage.

    Source: B. L. Welch (1947), Biometrika 34, 28-35.
    """
    a, b, level = vector("a", a, 2), vector("b", b, 2), level_of("level", level)
    mean, low, high, p = (float(x) for x in welch_interval(a, b, level))
    return Estimate(mean, low, high, level, min(a.size, b.size), p)


def holm(p_values: Values) -> np.ndarray:
    """Holm's adjusted p values of a family, in the order given, shape [m].

    A hypothesis is rejected at family-wise error alpha where its adjusted p is below alpha.

    Source: S. Holm (1979), Scandinavian Journal of Statistics 6, 65-70.
    """
    p = vector("p_values", p_values)
    if p.min() < 0 or p.max() > 1:
        raise StatisticsError(f"p_values: got {p.min():g} to {p.max():g}, expected [0, 1]")
    return holm_adjusted(p)


def holm_adjusted(p: np.ndarray) -> np.ndarray:
    """Holm along the last axis, shape [..., m]."""
    order = np.argsort(p, axis=-1, kind="stable")
    factor = np.arange(p.shape[-1], 0, -1)
    raised = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factor, axis=-1)
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(raised, 1.0), -1)
    return out


def rate(successes: int, trials: int, level: float = 0.95) -> Estimate:
    """A share (of collapsed runs, say) with Wilson's interval."""
    _counts("successes", successes, trials)
    low, high = wilson_interval(successes, trials, level_of("level", level))
    return Estimate(successes / trials, low, high, level, trials)


def rate_difference(k: int, n: int, j: int, m: int, level: float = 0.95) -> Estimate:
    """k/n - j/m of independent trials, by Newcombe's hybrid of two Wilson intervals.

    Source: R. G. Newcombe (1998), Statistics in Medicine 17, 873-890, method 10.
    """
    _counts("k of n", k, n)
    _counts("j of m", j, m)
    p, q = k / n, j / m
    (l1, u1), (l2, u2) = (
        wilson_interval(k, n, level_of("level", level)),
        wilson_interval(j, m, level),
    )
    low = p - q - math.hypot(p - l1, u2 - q)
    high = p - q + math.hypot(u1 - p, q - l2)
    return Estimate(p - q, max(low, -1.0), min(high, 1.0), level, min(n, m))


def score_interval(share: Array, size: Array, quantile: Array | float) -> tuple[Array, Array]:
    """Wilson's score interval of a share that is worth `size` independent trials.

    Args:
        share: in [0, 1].
        size: effective number of trials, share (1 - share) / variance.
        quantile: of the normal or of t at 1/2 + level/2.

    Returns:
        low, high, both in [0, 1].

    Source: K. J. Rothman (1978), Journal of Chronic Diseases 31, 557-560, for survival;
    E. L. Korn and B. I. Graubard (1998), Survey Methodology 24, 193-201, for surveys.
    """
    z2 = quantile**2 / size
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    low = np.where(share <= 0, 0.0, np.maximum(centre - half, 0.0))
    high = np.where(share >= 1, 1.0, np.minimum(centre + half, 1.0))
    return low, high


def _counts(name: str, successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise StatisticsError(
            f"{name}: got {successes} of {trials}, expected 0 <= successes <= trials, trials >= 1"
        )
