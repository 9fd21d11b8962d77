"""Distributions with a known truth for benchmarks/statistics_coverage.py.

Success rates are of 256 prompts: a seed moves the log odds of both methods by a common normal
effect and of each by one of its own, and answers are drawn on top.
"""

from collections.abc import Callable

import numpy as np
from scipy import special

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
PROMPTS = 256


def success(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    odds: np.ndarray | float,
    common: np.ndarray | float = 0.0,
    own: float = 0.2,
    crash: float = 0.0,
) -> np.ndarray:
    """Success rates of one method, 0 where the run crashed."""
    chance = special.expit(odds + common + own * rng.normal(size=shape))
    rate = rng.binomial(PROMPTS, chance) / PROMPTS
    return np.where(rng.random(shape) < crash, 0.0, rate) if crash else rate


def two_methods(odds: float, gain: float = 0.0, crash: tuple[float, float] = (0.0, 0.0)) -> Draw:
    """Paired differences of two success rates."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        common = 0.3 * rng.normal(size=shape)
        ours = success(rng, shape, odds + gain, common, crash=crash[0])
        return ours - success(rng, shape, odds, common, crash=crash[1])

    return draw


def mean_rate(odds: float, crash: float = 0.0) -> float:
    """Expectation of `success` with both seed effects, by Gauss-Hermite quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(80)
    spread = np.hypot(0.3, 0.2)
    return (1 - crash) * float(special.expit(odds + spread * x) @ w / w.sum())


def gain_of(odds: float, gain: float, crash: tuple[float, float] = (0.0, 0.0)) -> float:
    """Expectation of `two_methods`."""
    return mean_rate(odds + gain, crash[0]) - mean_rate(odds, crash[1])


def gamma(shape: float) -> Draw:
    """Centred gamma of variance 1; its skewness is 2 / sqrt(shape)."""
    return lambda rng, size: (rng.gamma(shape, size=size) - shape) / np.sqrt(shape)


DIFFERENCES: dict[str, tuple[Draw, float, bool]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0, True),
    "success rates near .5, true gain": (two_methods(0.0, 0.3), gain_of(0.0, 0.3), True),
    "success rates near .05, true gain": (two_methods(-3.0, 0.5), gain_of(-3.0, 0.5), True),
    "success rates, 5 % crashes in both": (two_methods(0.0, 0.0, (0.05, 0.05)), 0.0, False),
    "success rates, 10 % crashes in both": (two_methods(0.0, 0.0, (0.1, 0.1)), 0.0, False),
    "moderately skewed (skewness 1)": (gamma(4.0), 0.0, True),
    "exponential (skewness 2)": (gamma(1.0), 0.0, False),
    "extremely skewed (lognormal, 6.2)": (
        lambda rng, size: np.exp(rng.normal(size=size)) - np.exp(0.5), 0.0, False,
    ),
    "success rates, 10 % crashes in one method only": (
        two_methods(0.0, 0.0, (0.1, 0.0)), gain_of(0.0, 0.0, (0.1, 0.0)), False,
    ),
}  # fmt: skip
"""Paired differences: how to draw, the true mean, whether Student's t is meant for them."""


def apart(first: Draw, second: Draw) -> Draw:
    """Two independent samples, stacked."""
    return lambda rng, size: np.array([first(rng, size), second(rng, size)])


def single(odds: float, crash: float = 0.0) -> Draw:
    """Success rates of one method on its own seeds."""
    return lambda rng, size: success(
        rng, size, odds, 0.3 * rng.normal(size=size), crash=crash
    )  # fmt: skip


UNPAIRED: dict[str, tuple[Draw, float, bool]] = {
    "normal, equal variances": (apart(gamma(1e6), gamma(1e6)), 0.0, True),
    "normal, sd 1 and 3": (
        apart(
            lambda rng, size: rng.normal(size=size), lambda rng, size: 3.0 * rng.normal(size=size)
        ),
        0.0,
        True,
    ),
    "success rates near .5 and .57": (
        apart(single(0.3), single(0.0)), gain_of(0.0, 0.3), True,
    ),
    "exponential and normal": (
        apart(gamma(1.0), lambda rng, size: rng.normal(size=size)), 0.0, False,
    ),
}  # fmt: skip
"""Unpaired samples, the true difference of means."""


def answers(seed: float, prompt: float, crash: float = 0.0, skewed: bool = False) -> Draw:
    """Passes [simulations, seeds, prompts] of a method; drawn twice, the true difference is 0.

    Args:
        seed: sd of a seed's own effect on the log odds.
        prompt: sd of the method's own effect on a prompt.
        crash: share of seeds that pass nothing.
        skewed: the seed's effect is exponential.
    """

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        sims, n, prompts = shape
        hard = np.linspace(-3.0, 3.0, prompts)
        effect = gamma(1.0)(rng, (sims, n, 1)) if skewed else rng.normal(size=(sims, n, 1))
        odds = hard + seed * effect + prompt * rng.normal(size=(sims, 1, prompts))
        passed = rng.random(shape) < special.expit(odds)
        return np.where(rng.random((sims, n, 1)) < crash, 0.0, passed)

    return draw


ANSWERS: dict[str, tuple[Draw, bool]] = {
    "effects of seeds and prompts": (answers(0.3, 0.5), True),
    "effects of prompts mostly": (answers(0.05, 0.7), True),
    "effects of seeds only": (answers(0.3, 0.0), True),
    "no effects, noise of answers only": (answers(0.0, 0.0), True),
    "skewed effects of seeds": (answers(0.3, 0.3, skewed=True), True),
    "5 % crashes in both": (answers(0.3, 0.3, crash=0.05), False),
}


def tasks(odds: tuple[float, ...], crash: float = 0.0) -> Callable:
    """Two methods that do not differ, paired by seed: for each, a list of [simulations, n]."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> list[list[np.ndarray]]:
        common = [0.3 * rng.normal(size=shape) for _ in odds]
        return [
            [success(rng, shape, o, c, crash=crash) for o, c in zip(odds, common)] for _ in "ab"
        ]

    return draw


TASKS: dict[str, tuple[Callable, bool]] = {
    "one task": (tasks((0.0,)), True),
    "three tasks of like difficulty": (tasks((-0.4, -0.2, 0.0)), True),
    "three tasks of unlike difficulty": (tasks((-1.4, 0.0, 1.7)), True),
    "four tasks of unlike difficulty": (tasks((-1.4, -0.4, 0.4, 1.7)), True),
    "three tasks, 10 % crashes": (tasks((-0.8, 0.0, 0.8), 0.1), True),
}


def times(scale: float, horizon: float, drop: float = 0.0, grid: float = 0.0) -> Callable:
    """Exponential times to the target, censored at the horizon, or earlier by chance."""

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        t = rng.exponential(scale, n)
        t = np.ceil(t / grid) * grid if grid else t
        end = np.minimum(rng.exponential(drop, n), horizon) if drop else np.full(n, horizon)
        return np.minimum(t, end), (t <= end).astype(float)

    return draw


def shares(scale: float, *at: float) -> list[tuple[float, float]]:
    """(time, share that has not reached it)."""
    return [(t, float(np.exp(-t / scale))) for t in at]


AT = shares(1.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TIMES: dict[str, tuple[Callable, list[tuple[float, float]], float, bool]] = {
    "exponential, all reach it": (times(1.0, 100.0), AT, float(np.log(2)), True),
    "exponential, a quarter never": (times(1.0, float(np.log(4))), AT, float(np.log(2)), True),
    "exponential, censored by chance": (times(1.0, 3.0, 3.0), AT, float(np.log(2)), True),
    "evaluated ten times only (ties)": (
        times(1.0, 2.5, grid=0.25), AT, 0.75, False,
    ),
}  # fmt: skip
"""How to draw, where to look, the true median, whether the intervals are meant for it (with ties
the median's is wider than promised)."""

GRIDS: dict[str, tuple[tuple[float, ...], float, bool]] = {
    "one best rate": ((0.2, 0.35, 0.5, 0.4, 0.1), 0.03, True),
    "two nearly equal": ((0.2, 0.49, 0.5, 0.4, 0.1), 0.03, True),
    "all equal": ((0.4, 0.4, 0.4, 0.4, 0.4), 0.03, False),
}
"""True means of five learning rates, the sd of a seed's common and own effects, whether meant."""


def block(source: Draw) -> Draw:
    """Differences of eight methods to one baseline, [simulations, 8, n]: its noise is shared."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        sims, _, n = shape
        return source(rng, shape) - source(rng, (sims, 1, n))

    return draw


NULLS: dict[str, tuple[Draw, bool]] = {
    "normal": (block(lambda rng, size: 0.03 * rng.normal(size=size)), True),
    "success rates near .5": (block(single(0.0)), True),
    "success rates near .05": (block(single(-3.0)), True),
    "success rates, 5 % crashes": (block(single(0.0, 0.05)), True),
    "skewed scores (exponential)": (
        block(lambda rng, size: 0.03 * gamma(1.0)(rng, size)), True,
    ),
    "skewed differences (exponential)": (
        lambda rng, size: -0.03 * gamma(1.0)(rng, size), False,
    ),
}  # fmt: skip
"""Methods that do not differ from their baseline."""
