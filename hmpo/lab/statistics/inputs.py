"""What every estimate takes: scipy, and finite numbers of the right shape."""

from collections.abc import Sequence

import numpy as np

from hmpo.errors import MissingDependencyError, StatisticsError

try:
    from scipy import optimize, special
except ImportError:
    raise MissingDependencyError(
        "the lab's statistics need scipy: pip install 'hmpo[lab]'"
    ) from None

__all__ = [
    "Array",
    "Values",
    "level_of",
    "matrix",
    "number",
    "optimize",
    "special",
    "strata",
    "vector",
]

Values = Sequence | np.ndarray
"""Numbers in a list, a tuple or an array."""
Array = np.ndarray | np.float64
"""An array, or the number that numpy makes of one without axes."""


def vector(name: str, values: Values, least: int = 1) -> np.ndarray:
    """`values` as finite float64 of shape [n], n >= `least`, or `StatisticsError`."""
    return _finite(name, values, 1, least)


def matrix(name: str, values: Values, least: int = 1) -> np.ndarray:
    """`values` as finite float64 of shape [rows, columns], both >= `least`."""
    return _finite(name, values, 2, least)


def strata(name: str, by_task: Sequence[Values] | dict[str, Values]) -> list[np.ndarray]:
    """The scores of each task as vectors; tasks in order, at least one."""
    rows = list(by_task.values()) if isinstance(by_task, dict) else list(by_task)
    if not rows:
        raise StatisticsError(f"{name}: no task; give the scores of each task")
    return [vector(f"{name}, task {i}", row) for i, row in enumerate(rows)]


def number(name: str, value: float, low: float = 0.0, strict: bool = True) -> float:
    """`value` if it is finite and > `low` (>= where not `strict`)."""
    value = float(value)
    if not np.isfinite(value) or value < low or (strict and value == low):
        sign = ">" if strict else ">="
        raise StatisticsError(f"{name}: got {value}, expected a finite number {sign} {low:g}")
    return value


def level_of(name: str, value: float) -> float:
    """`value` if it lies in (0, 1)."""
    if not 0.0 < value < 1.0:
        raise StatisticsError(f"{name}: got {value}, expected a number in (0, 1)")
    return float(value)


def _finite(name: str, values: Values, axes: int, least: int) -> np.ndarray:
    """float64 with `axes` axes of at least `least` each, all finite."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise StatisticsError(f"{name}: expected numbers in {axes} axes of even length") from None
    if array.ndim != axes:
        raise StatisticsError(f"{name}: got shape {array.shape}, expected {axes} axes")
    if min(array.shape) < least:
        raise StatisticsError(f"{name}: got shape {array.shape}, expected at least {least} each")
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise StatisticsError(
            f"{name}: {bad} of {array.size} numbers are NaN or infinite; "
            "score a crash as an outcome, or leave its seed out of both sides"
        )
    return array
