"""Windows, trends, latches: the small statistics that every controller is built from.

Pure functions of what was pushed, in float64. Sums are exact (`math.fsum`), so that they do not
depend on the interpreter's way of summing. Every state is a dict of plain values whose size
does not grow.

    trend        x_i = a + b t_i + r_i by least squares,  rho = sum r_i r_{i+1} / sum r_i^2
                 s^2 = sum r_i^2 / (n - 2),  n_eff = max(3, n (1 - rho+) / (1 + rho+))
                 t = b / sqrt(s^2 / S_tt * n / n_eff),  rho+ = rho held to [0, 0.95]
    oscillation  max(0, -rho) where |rho| > 2 / sqrt(n), else 0
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

Number = int | float

NEVER = -1_000_000
"""Step of what has not happened yet."""
CERTAIN = 1e6
"""Stands for an infinite t or effect: a slope without any residual."""
ROUNDING = 1e-12
"""Spreads below this share of the largest value are rounding, not data."""
LARGEST = 1e150
"""Largest size of a value that counts: squares of larger ones have no float."""


def usable(value: Number) -> bool:
    """Whether a value can enter sums and squares; NaN, infinities and the immense cannot."""
    return abs(value) <= LARGEST


class Window:
    """The last `size` usable values with their steps; others are counted, not kept.

    Args:
        size: values kept, at least 1.
        block: consecutive values that are averaged into one entry; 1 keeps each.
    """

    def __init__(self, size: int, block: int = 1) -> None:
        self.block = block
        self.steps: deque[Number] = deque(maxlen=size)
        self.values: deque[Number] = deque(maxlen=size)
        self.open: list[tuple[Number, Number]] = []
        self.bad = 0
        self.fit: Trend | None = None
        """The trend of the present entries once somebody asked for it."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def full(self) -> bool:
        """Whether the next value drops the oldest."""
        return len(self.values) == self.values.maxlen

    def push(self, step: Number, value: Number) -> bool:
        """Keep the pair; returns whether an entry was added."""
        if not usable(value):
            self.bad += 1
            return False
        if self.block > 1:
            self.open.append((step, value))
            if len(self.open) < self.block:
                return False
            step = math.fsum(s for s, _ in self.open) / self.block
            value = math.fsum(v for _, v in self.open) / self.block
            self.open = []
        self.steps.append(step)
        self.values.append(value)
        self.fit = None
        return True

    def clear(self) -> None:
        """Forget the values; the count of bad ones stays."""
        self.steps.clear()
        self.values.clear()
        self.open = []
        self.fit = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        steps, values = list(self.steps), list(self.values)
        return {"steps": steps, "values": values, "open": list(self.open), "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.clear()
        self.steps.extend(state["steps"])
        self.values.extend(state["values"])
        self.open = [(step, value) for step, value in state["open"]]
        self.bad = state["bad"]


class EwStat:
    """Exponentially weighted mean and variance, bias-corrected: no start value enters.

    Args:
        halflife: updates after which a value counts half.
    """

    def __init__(self, halflife: Number) -> None:
        self.decay = 2.0 ** (-1.0 / halflife)
        self.bad = 0
        self.clear()

    def clear(self) -> None:
        """Forget the values; the count of bad ones stays."""
        self.weight = self.mean = self.sum = 0.0
        self.n = 0

    def push(self, value: Number) -> bool:
        """Take in a value; one that is not usable is only counted."""
        if not usable(value):
            self.bad += 1
            return False
        self.weight = self.decay * self.weight + 1.0
        delta = value - self.mean
        self.mean += delta / self.weight
        self.sum = self.decay * self.sum + delta * (value - self.mean)
        self.n += 1
        return True

    @property
    def var(self) -> float:
        """Weighted population variance; 0 before the first value."""
        return self.sum / self.weight if self.weight else 0.0

    @property
    def sd(self) -> float:
        """Its root."""
        return math.sqrt(max(0.0, self.var))

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("weight", "mean", "sum", "n", "bad")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        for name in ("weight", "mean", "sum", "n", "bad"):
            setattr(self, name, state[name])


class Latch:
    """On after `confirm` values in a row >= enter; off at a value <= exit, after `dwell` values.

    Args:
        enter: level that turns it on.
        exit: level that turns it off, below `enter`.
        confirm: values in a row that it takes.
        dwell: values that it stays on at least.
    """

    def __init__(self, enter: Number, exit: Number, confirm: int = 1, dwell: int = 0) -> None:
        self.enter, self.exit, self.confirm, self.dwell = enter, exit, confirm, dwell
        self.on = False
        self.run = 0
        self.since = 0

    def push(self, value: Number) -> bool:
        """State after this value; NaN counts as neither high nor low."""
        self.run = self.run + 1 if value >= self.enter else 0
        if self.on:
            self.since += 1
            if value <= self.exit and self.since >= self.dwell:
                self.on, self.run = False, 0
        elif self.run >= self.confirm:
            self.on, self.since = True, 0
        return self.on

    def clear(self) -> None:
        """Off, as new."""
        self.on, self.run, self.since = False, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"on": self.on, "run": self.run, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.on, self.run, self.since = state["on"], state["run"], state["since"]


class Multiplier:
    """A factor in [low, high] that moves by at most a factor of `step` at a time.

    Args:
        low: smallest factor, > 0.
        high: largest factor.
        step: largest change in one move, > 1.
    """

    def __init__(self, low: Number, high: Number, step: Number) -> None:
        self.low, self.high, self.step = low, high, step
        self.value = 1.0

    def moved(self, delta: Number) -> float:
        """The factor after a change of `delta` in its log, limited; the state stays.

        Values that the bounds would cut are the bounds themselves, not their exp(log).
        """
        limit = math.log(self.step)
        value = self.value * math.exp(max(-limit, min(limit, delta)))
        return max(self.low, min(self.high, value))

    def set(self, value: Number) -> None:
        """Take a factor as applied, whatever was proposed.

        The factor may lie outside the bounds, as somebody else may have set it; the next move
        brings it back.
        """
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.value = state["value"]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Least-squares line through a window.

    Example: `trend(window).t >= 3` for a rise that noise with memory rarely fakes.
    """

    n: int
    """Values."""
    slope: float
    """Per step."""
    t: float
    """Slope over its standard error, corrected for residuals that remember the last one."""
    rise: float
    """Slope times the steps from first to last value."""
    effect: float
    """Rise in residual standard deviations."""
    sd: float
    """Residual standard deviation."""
    rho: float
    """Lag-1 autocorrelation of the residuals, as it is."""

    @property
    def oscillation(self) -> float:
        """Strength of an alternation from one value to the next, in [0, 1]; 0 for noise."""
        return max(0.0, -self.rho) if abs(self.rho) > 2 / math.sqrt(self.n) else 0.0


def trend(window: Window) -> Trend | None:
    """Trend of a window, worked out once for its entries; None of fewer than three values."""
    if window.fit is None:
        window.fit = line(window.steps, window.values)
    return window.fit


def line(steps: Sequence[Number], values: Sequence[Number]) -> Trend | None:
    """Trend of values at steps; None of fewer than three values or of a single step."""
    n = len(values)
    if n < 3:
        return None
    t_mean, x_mean = math.fsum(steps) / n, math.fsum(values) / n
    t = [s - t_mean for s in steps]
    x = [v - x_mean for v in values]
    t_square = math.fsum(map(mul, t, t))
    if t_square == 0.0:
        return None
    slope = math.fsum(map(mul, t, x)) / t_square
    r = [b - slope * a for a, b in zip(t, x)]
    r_square = math.fsum(map(mul, r, r))
    sd = math.sqrt(r_square / (n - 2))
    span = t[-1] - t[0]
    floor = ROUNDING * max(max(values), -min(values))
    if abs(slope * span) <= floor:
        slope = 0.0
    if sd <= floor:
        certain = math.copysign(CERTAIN, slope) if slope else 0.0
        rise = slope * span
        return Trend(n=n, slope=slope, t=certain, rise=rise, effect=certain, sd=0.0, rho=0.0)
    rho = math.fsum(map(mul, r, r[1:])) / r_square  # the shorter one ends it
    memory = min(0.95, max(0.0, rho))
    n_eff = max(3.0, n * (1 - memory) / (1 + memory))
    error = sd / math.sqrt(t_square) * math.sqrt(n / n_eff)
    rise = slope * span
    return Trend(
        n=n,
        slope=slope,
        t=held(slope / error, CERTAIN),
        rise=rise,
        effect=held(rise / sd, CERTAIN),
        sd=sd,
        rho=rho,
    )


def held(value: Number, limit: Number) -> float:
    """The value held to [-limit, limit]."""
    return max(-limit, min(limit, value))


def median(values: Iterable[Number]) -> Number:
    """Middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def centre_and_scale(values: Iterable[Number], floor: Number) -> tuple[Number, Number]:
    """Median, and 1.4826 times the median absolute deviation or `floor` if that is more."""
    values = list(values)
    middle = median(values)
    return middle, max(1.4826 * median([abs(v - middle) for v in values]), floor)


def robust_z(value: Number, reference: Iterable[Number], floor: Number) -> float:
    """How many robust standard deviations `value` lies above the median of the reference."""
    middle, scale = centre_and_scale(reference, floor)
    return (value - middle) / scale


def rank(value: float, reference: Iterable[Number]) -> float:
    """Share of the reference that lies below the value, ties by half; 0.5 of an empty one."""
    values = list(reference)
    if not values:
        return 0.5
    below, ties = sum(map(value.__gt__, values)), sum(map(value.__eq__, values))
    return (below + 0.5 * ties) / len(values)
