"""Steps to a target of runs that may never reach it: Kaplan-Meier and log-rank.

Here the event is good news: `survival` is the share of runs that have not reached the target yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.inputs import Values, level_of, number, special, vector
from hmpo.lab.statistics.intervals import Estimate, score_interval


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier curve of one method; arrays of shape [events], one entry per event time."""

    times: np.ndarray
    """Times at which at least one run reached the target, ascending."""
    survival: np.ndarray
    """Share that has not reached it by then, in [0, 1], not increasing."""
    low: np.ndarray
    high: np.ndarray
    median: Estimate | None
    """Time by which half have reached it; None where less than half have. `high` None: open."""
    n: int
    reached: int


def kaplan_meier(times: Values, reached: Values, level: float = 0.95) -> Survival:
    """Share of runs that have not reached the target, by time, with intervals.

    Args:
        times: when a run reached the target, or how far it was watched, shape [n], >= 0.
        reached: true where it reached it, shape [n]; false: censored (a run that crashed will
            never reach it: give it the horizon, not the moment of its crash).
        level: nominal coverage of the intervals, at each time by itself.

    The intervals are Wilson's, with the number of trials to which Greenwood's variance amounts;
    the median's ends are order statistics, interpolated where times are not tied, because a step
    from one to the next would cover 98 % or 89 % with ten runs; but not within the step at which
    the curve passes one half, which is where the median is.

    Source: E. L. Kaplan and P. Meier (1958), JASA 53, 457-481; Rothman (1978), as cited at
    `score_interval`; T. P. Hettmansperger and S. J. Sheather (1986), Statistics & Probability
    Letters 4, 75-79.
    """
    t, hit = _runs("", times, reached)
    level = level_of("level", level)
    moments, deaths, at_risk = _table(t, hit)
    survival = np.cumprod(1 - deaths / at_risk)
    survival[np.abs(survival - 0.5) < 1e-12] = 0.5  # a product of fractions; the median needs it
    size = _effective_size(survival, deaths, at_risk, t.size)
    low, high = score_interval(survival, size, float(special.ndtri(0.5 + level / 2)))
    tied = bool((deaths > 1).any())
    median = _median(moments, survival, size, level, t.size, tied)
    bands = np.asarray(low), np.asarray(high)
    return Survival(moments, survival, *bands, median, t.size, int(hit.sum()))


def log_rank(groups: Sequence[tuple[Values, Values]]) -> tuple[float, float]:
    """Whether the times to the target differ between methods.

    Args:
        groups: (times, reached) of two or more methods, as in `kaplan_meier`.

    Returns:
        chi-square with len(groups) - 1 degrees of freedom, p value. No event at all: (0, 1).

    Source: N. Mantel (1966), Cancer Chemotherapy Reports 50, 163-170; R. Peto and J. Peto (1972),
    JRSS A 135, 185-207.
    """
    if len(groups) < 2:
        raise StatisticsError(f"log_rank: got {len(groups)} methods, expected at least 2")
    data = [_runs(f"group {i}: ", *group) for i, group in enumerate(groups)]
    t, hit = (np.concatenate(parts) for parts in zip(*data))
    moments, deaths, at_risk = _table(t, hit)
    here = np.array([[np.count_nonzero(own >= m) for m in moments] for own, _ in data], float)
    here = here.reshape(len(data), -1)
    excess = np.array([own.sum() for _, own in data]) - (here * deaths / at_risk).sum(1)
    spread = np.divide(at_risk - deaths, at_risk - 1, out=np.zeros_like(deaths), where=at_risk > 1)
    share = here / at_risk
    weight = deaths * spread
    covariance = np.diag((weight * share).sum(1)) - (weight * share) @ share.T
    # One group follows from the others; a pseudo-inverse also bears groups nobody is at risk in.
    inverse = np.linalg.pinv(covariance[:-1, :-1], hermitian=True)
    chi2 = float(excess[:-1] @ inverse @ excess[:-1])
    return chi2, float(special.chdtrc(len(data) - 1, max(chi2, 0.0)))


def _runs(name: str, times: Values, reached: Values) -> tuple[np.ndarray, np.ndarray]:
    """Checked times and which of them are events."""
    t, hit = vector(f"{name}times", times), vector(f"{name}reached", reached)
    if t.shape != hit.shape:
        raise StatisticsError(f"{name}got {t.size} times and {hit.size} marks, expected as many")
    number(f"{name}times", float(t.min()), strict=False)
    if not np.isin(hit, (0.0, 1.0)).all():
        raise StatisticsError(f"{name}reached: expected true or false for each run")
    return t, hit > 0


def _table(t: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Event times, events at them and runs still watched just before them, each [events]."""
    moments = np.unique(t[hit])
    deaths = np.array([np.count_nonzero(t[hit] == m) for m in moments], float)
    at_risk = np.array([np.count_nonzero(t >= m) for m in moments], float)
    return moments, deaths, at_risk


def _effective_size(
    survival: np.ndarray, deaths: np.ndarray, at_risk: np.ndarray, n: int
) -> np.ndarray:
    """Independent runs to which Greenwood's variance amounts; n where nothing is censored."""
    size = np.full(survival.shape, float(n))
    left = at_risk - deaths
    alive = left > 0
    spread = np.cumsum(deaths[alive] / (at_risk[alive] * left[alive]))
    size[alive] = (1 - survival[alive]) / (survival[alive] * spread)
    if not alive.all() and alive.any():
        size[~alive] = size[alive][-1]  # nobody is left: as many as just before
    return size


def _median(
    moments: np.ndarray, survival: np.ndarray, size: np.ndarray, level: float, n: int, tied: bool
) -> Estimate | None:
    """First time at which half have reached the target, with an interval.

    Its ends are interpolated where no two runs reached the target at the same time. Ties tell of
    a grid of evaluations, on which the truth lies too: there the ends are event times. So is an
    end in the step that passes one half: where most runs are censored, the last few make that step
    several runs high, and between its ends the test says nothing.
    """
    if not survival.size or survival[-1] > 0.5:
        return None
    at = int(np.argmax(survival <= 0.5))
    flat = int(survival[at] == 0.5 and at + 1 < moments.size)  # any time of that step halves them
    value = float(moments[at] + moments[at + flat]) / 2
    before = np.concatenate([[1.0], survival[:-1]])
    sizes = np.concatenate([[float(n)], size[:-1]])
    tail = (1 - level) / 2
    # Chance of so few events were the median later, and of so many were it earlier.
    early = special.betainc(sizes * before, sizes * (1 - before) + 1, 0.5)
    late = special.betainc(size * (1 - survival), size * survival + 1, 0.5)
    low = _crossing(moments, early, sizes * (1 - before) + 1, sizes, tail, 0 if tied else at)
    back = slice(None, None, -1)
    ranks, last = (size * survival)[back] + 1, moments.size - 1
    high = _crossing(
        moments[back], late[back], ranks, size[back], tail, 0 if tied else last - at - flat
    )
    if late[-1] > tail:
        high = None  # so few have reached it that the end is not in sight
    return Estimate(value, 0.0 if low is None else low, high, level, n)


def _crossing(
    moments: np.ndarray,
    chance: np.ndarray,
    rank: np.ndarray,
    size: np.ndarray,
    tail: float,
    smooth: int,
) -> float | None:
    """Where the rising `chance` passes `tail`, between order statistics of the given `rank`.

    Only the first `smooth` steps are interpolated; in later ones it is the moment before.
    """
    inside = np.flatnonzero(chance > tail)
    if not inside.size:
        return float(moments[-1])
    i = int(inside[0])
    if i == 0:
        return None
    if i > smooth:
        return float(moments[i - 1])
    share = (tail - chance[i - 1]) / (chance[i] - chance[i - 1])
    d, n = rank[i - 1], size[i - 1]
    share = (n - d) * share / (d + (n - 2 * d) * share)
    return float(moments[i - 1] + share * (moments[i] - moments[i - 1]))
