"""How many seeds a question needs, and which differences a number of seeds can see.

Everything is for paired differences: `sd` is the standard deviation of a difference of two
methods on a shared seed, in the unit of the score.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from hmpo.errors import StatisticsError
from hmpo.lab.statistics.inputs import Values, level_of, number, optimize, special, vector

MOST = 1000
"""Seeds beyond which the answer is "more than 1000"."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def power_paired(sd: float, n: int, difference: float, alpha: float = 0.05) -> float:
    """Chance that a two-sided paired t test with n seeds sees a true difference.

    Args:
        sd: > 0, or 0 (then 1 for every difference but 0).
        n: seeds, >= 2.
        difference: the true mean difference.
        alpha: error of the test.

    The tail of the noncentral t, by Gauss-Legendre quadrature over the distribution of the
    sample's sd, which holds where scipy's own function fails (large shifts).

    Source: J. Cohen (1988), Statistical Power Analysis, chapter 2.
    """
    sd, df = number("sd", sd, strict=False), _seeds(n) - 1
    if sd == 0:
        return 1.0 if difference else level_of("alpha", alpha)
    shift = abs(difference) / sd * math.sqrt(n)
    edge = float(special.stdtrit(df, 1 - level_of("alpha", alpha) / 2))
    s, weights = _spread(df)
    seen = special.ndtr(shift - edge * s) + special.ndtr(-shift - edge * s)
    return float(min(np.sum(weights * seen), 1.0))


def power_equivalence(
    sd: float, n: int, margin: float, difference: float = 0.0, alpha: float = 0.05
) -> float:
    """Chance that two one-sided paired t tests with n seeds show equivalence.

    Args:
        sd: >= 0.
        n: seeds, >= 2.
        margin: smallest difference that matters, > 0.
        difference: the true mean difference; at the margin or beyond the chance is at most alpha.
        alpha: error of each test.

    The chance that the mean lies within margin - t s / sqrt(n), over the distribution of the
    sample's s, by Gauss-Legendre quadrature.

    Source: K. F. Phillips (1990), Journal of Pharmacokinetics and Biopharmaceutics 18, 137-144.
    """
    sd, margin = number("sd", sd, strict=False), number("margin", margin)
    df = _seeds(n) - 1
    if sd == 0:
        return 1.0 if abs(difference) < margin else 0.0
    edge = float(special.stdtrit(df, 1 - level_of("alpha", alpha)))
    unit = math.sqrt(n) / sd
    s, weights = _spread(df, margin * unit / edge)
    inside = special.ndtr((margin - difference) * unit - edge * s) - special.ndtr(
        (-margin - difference) * unit + edge * s
    )
    return float(np.clip(np.sum(weights * np.maximum(inside, 0.0)), 0.0, 1.0))


def _spread(df: int, top: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """Nodes s and weights whose sum is an expectation over a sample's sd, s < `top`, at sd 1."""
    bottom = math.sqrt(special.chdtri(df, 1 - 1e-15) / df)
    top = max(bottom, min(top, math.sqrt(special.chdtri(df, 1e-16) / df)))
    s = bottom + (top - bottom) * (NODES + 1) / 2
    log_density = df / 2 * math.log(df / 2) - math.lgamma(df / 2) + math.log(2)
    log_density = log_density + (df - 1) * np.log(s) - df * s**2 / 2
    return s, (top - bottom) / 2 * WEIGHTS * np.exp(log_density)


def detectable(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that a paired t test with n seeds sees with chance `power`.

    Args:
        sd: >= 0; 0 gives 0.
        n: seeds, >= 2.
        power: wanted chance, in (alpha, 1).
        alpha: error of the test.
    """
    sd, power = number("sd", sd, strict=False), _power(power, alpha)
    edge = float(special.stdtrit(_seeds(n) - 1, 1 - alpha / 2))
    if sd == 0:
        return 0.0
    top = sd * (10 + 10 * edge) / math.sqrt(n)
    return _root(lambda d: power_paired(sd, n, d, alpha) - power, top)


def detectable_margin(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest margin within which n seeds show methods that do not differ as equivalent."""
    sd, power = number("sd", sd, strict=False), _power(power, alpha)
    edge = float(special.stdtrit(_seeds(n) - 1, 1 - alpha))
    if sd == 0:
        return 0.0
    top = sd * (10 + 10 * edge) / math.sqrt(n)
    return _root(lambda m: power_equivalence(sd, n, max(m, 1e-300), 0.0, alpha) - power, top)


def seeds_needed(
    sd: float, difference: float, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Seeds with which a paired t test sees a true difference with chance `power`.

    Args:
        sd: >= 0.
        difference: not 0.
        power: wanted chance, in (alpha, 1).
        alpha: error of the test.

    Returns:
        at least 2; None where more than `MOST` are needed.
    """
    difference = number("difference", abs(difference))
    power = _power(power, alpha)
    return _first(lambda n: power_paired(sd, n, difference, alpha) >= power)


def seeds_for_equivalence(
    sd: float, margin: float, difference: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Seeds with which two one-sided tests show equivalence; None: more than `MOST`, or never.

    Args:
        sd: >= 0.
        margin: smallest difference that matters, > 0.
        difference: the true difference, 0 where the methods do not differ.
        power: wanted chance, in (alpha, 1).
        alpha: error of each test.
    """
    power = _power(power, alpha)
    return _first(lambda n: power_equivalence(sd, n, margin, difference, alpha) >= power)


@dataclass(frozen=True)
class Pilot:
    """What a pilot's paired differences say of a study to come."""

    n: int
    sd: float
    sd_upper: float
    """Upper limit of the sd at `confidence`: few seeds tell the sd badly."""
    confidence: float

    @property
    def sentence(self) -> str:
        """The sd with its uncertainty, in points."""
        return (
            f"sd of the paired difference {100 * self.sd:.1f} points from {self.n} seeds "
            f"(below {100 * self.sd_upper:.1f} with {100 * self.confidence:.0f} % confidence)"
        )


def pilot(differences: Values, confidence: float = 0.8) -> Pilot:
    """The sd of paired differences and its upper limit by chi-square.

    Args:
        differences: one per seed of the pilot, shape [n], n >= 2.
        confidence: of the one-sided upper limit; plans that use it reach their power with about
            this chance.

    Source: R. H. Browne (1995), Statistics in Medicine 14, 1933-1940, which advises .8.
    """
    d = vector("differences of the pilot", differences, 2)
    sd = float(d.std(ddof=1))
    below = float(special.chdtri(d.size - 1, level_of("confidence", confidence)))
    return Pilot(d.size, sd, sd * math.sqrt((d.size - 1) / below), confidence)


def seeds_text(n: int | None) -> str:
    """`12 seeds`, or `more than 1000 seeds`."""
    return f"more than {MOST} seeds" if n is None else f"{n} seed{'s' * (n != 1)}"


def _first(enough: Callable[[int], bool]) -> int | None:
    """Smallest n in [2, MOST] that is enough, for a power that grows with n."""
    if not enough(MOST):
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _root(excess: Callable[[float], float], top: float) -> float:
    root = optimize.brentq(excess, 0.0, top, xtol=1e-12 * top, rtol=1e-12, full_output=False)
    return cast(float, root)


def _seeds(n: int) -> int:
    if n < 2:
        raise StatisticsError(f"n: got {n} seeds, expected at least 2")
    return n


def _power(power: float, alpha: float) -> float:
    if not level_of("alpha", alpha) < power < 1:
        raise StatisticsError(f"power: got {power}, expected a number between alpha and 1")
    return power
