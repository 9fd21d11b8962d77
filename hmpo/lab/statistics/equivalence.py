"""Equivalence of two methods by two one-sided paired t tests."""

import math
from dataclasses import dataclass

import numpy as np

from hmpo.lab.statistics.inputs import Array, Values, level_of, number, special, vector
from hmpo.lab.statistics.intervals import Estimate, t_interval


@dataclass(frozen=True)
class Equivalence:
    """Whether two methods differ by less than a margin."""

    equivalent: bool
    """The interval lies inside of (-margin, margin); False where there is none."""
    p_value: float | None
    """The larger of the two one-sided p values; None from one seed."""
    margin: float
    interval: Estimate
    """Of level 1 - 2 alpha (90 % at alpha = .05)."""


def two_one_sided(differences: Values, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided paired t tests of |mean difference| >= margin.

    Args:
        differences: one per shared seed, shape [n]; n = 1 decides nothing.
        margin: smallest difference that matters, > 0.
        alpha: error of each test.

    Source: D. J. Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15, 657-680.
    """
    d, margin = vector("differences", differences), number("margin", margin)
    level = 1 - level_of("twice alpha", 2 * alpha)
    if d.size == 1:
        return Equivalence(False, None, margin, Estimate(float(d[0]), None, None, level, 1))
    mean, low, high, p = (float(x) for x in t_interval(d, level))
    worst = float(one_sided(d, margin))
    estimate = Estimate(mean, low, high, level, d.size, p)
    return Equivalence(worst < alpha, worst, margin, estimate)


def one_sided(values: np.ndarray, margin: float) -> Array:
    """The larger of both one-sided p values along the last axis, shape [...]."""
    n = values.shape[-1]
    room = margin - np.abs(values.mean(-1))
    error = values.std(-1, ddof=1) / math.sqrt(n)
    t = np.divide(room, error, out=np.where(room > 0, np.inf, -np.inf), where=error > 0)
    return special.stdtr(n - 1, -t)
