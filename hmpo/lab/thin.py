"""Long series in few points, so that a plot costs the same however long the run was."""

import math
from collections.abc import Sequence

MOST = 1000
"""Stretches that a series is cut into; it is drawn by at most two points of each."""
LARGEST = 1e100
"""Largest size that is drawn: the axes of larger values cannot be worked out in floats."""


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The lowest and the highest value of each of `MOST` stretches, at their steps.

    Short series stay as they are. NaN stands for what is not drawn: a stretch without a number,
    and values beyond `LARGEST`.
    """
    values = [value if abs(value) <= LARGEST else math.nan for value in values]
    if len(values) <= 2 * MOST:
        return list(steps), values
    kept: list[int] = []
    for first, end in _stretches(len(values), MOST):
        known = [i for i in range(first, end) if not math.isnan(values[i])] or [first]
        kept += sorted({min(known, key=values.__getitem__), max(known, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean of the finite values among `window` neighbours.

    NaN where there are none, and at the ends, where the window would not be full.
    """
    return [_mean(values, i, window) for i in range(len(values))]


def smoothed(
    steps: Sequence[int], values: Sequence[float], window: int
) -> tuple[list[int], list[float]]:
    """`moving_average` at no more than `MOST` of the steps, evenly spaced."""
    values = [value if abs(value) <= LARGEST else math.nan for value in values]
    places = evenly(len(values), MOST)
    return [steps[i] for i in places], [_mean(values, i, window) for i in places]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to count - 1, evenly spaced, the last one among them."""
    if count <= most:
        return list(range(count))
    return [end - 1 for _, end in _stretches(count, most)]


def _stretches(count: int, parts: int) -> list[tuple[int, int]]:
    return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def _mean(values: Sequence[float], place: int, window: int) -> float:
    first, last = place - window // 2, place + (window + 1) // 2
    if first < 0 or last > len(values):
        return math.nan
    near = [v for v in values[first:last] if math.isfinite(v)]
    return sum(near) / len(near) if near else math.nan


def strips(
    points: Sequence[tuple[int, str]], end: int, most: int = 400
) -> list[tuple[int, int, str]]:
    """A state over time as few strips: first step, last step (excluded), and the state.

    Args:
        points: step and state, in order.
        end: where the last strip ends.
        most: strips; where the state changes more often, each is a stretch with its commonest.
    """
    merged: list[tuple[int, str]] = []
    for step, state in points:
        if not merged or merged[-1][1] != state:
            merged.append((step, state))
    if len(merged) > most:
        parts = [points[first:last] for first, last in _stretches(len(points), most)]
        merged = [(part[0][0], _commonest([state for _, state in part])) for part in parts]
    ends = [step for step, _ in merged[1:]] + [end]
    return [(step, until, state) for (step, state), until in zip(merged, ends)]


def _commonest(states: Sequence[str]) -> str:
    return max(sorted(set(states)), key=states.count)
