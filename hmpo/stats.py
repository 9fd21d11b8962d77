"""Intervals and estimators for success rates, in closed form (standard library only)."""

import math
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate.

    Args:
        successes: number of successes, 0 <= successes <= trials.
        trials: number of independent trials; 0 gives the vacuous interval (0, 1).
        confidence: coverage, in (0, 1).

    Returns:
        (low, high), both in [0, 1].

    Source: E. B. Wilson (1927), JASA 22, 209-212.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in [0, trials], got {successes=} {trials=}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends centre -/+ half is exact only up to rounding; the true bound is the end itself.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of `k` samples succeeds.

    Args:
        successes: successful samples of one prompt.
        samples: samples drawn for that prompt, at least `k`.
        k: size of the draw, at least 1.

    Source: Chen et al. (2021), arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in [1, samples], got {k=} {samples=}")
    if not 0 <= successes <= samples:
        raise ValueError(f"successes must lie in [0, samples], got {successes=} {samples=}")
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)
