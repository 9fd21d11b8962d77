"""What the judges of a protocol's hypotheses share: a row, its words, and intervals as text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from study_rates import STUDIES, missing, read_study

from hmpo.lab.statistics.intervals import Estimate
from hmpo.lab.study.analysis import Study
from hmpo.lab.study.outcomes import Outcome

HELD, NOT, UNDECIDED = "held", "**did not hold**", "undecided"
READY = "not run"
Reader = Callable[[str], Study | None]
"""A suite's complete study by name; None while runs are missing."""
ONE = ("p1", "p0", "p-1")


@dataclass(frozen=True)
class Found:
    """One row: where it was looked, what was measured, and what follows."""

    place: str
    measured: str
    word: str


def awaited(*names: str) -> list[Found]:
    """The row of a hypothesis whose suites have not run."""
    suites = " and ".join(f"`{name}`" for name in names)
    return [Found("", f"{suites}: runs are missing", READY)]


def of_cell(study: Study, cell: str) -> dict[int, Outcome]:
    """Outcomes by seed."""
    return {seed: run.outcome for seed, run in study.runs.get(cell, {}).items()}


def ratio(e: Estimate) -> str:
    """A ratio with its interval, from those of its logarithm."""
    ends = [None if end is None else math.exp(end) for end in (e.low, e.high)]
    return f"{math.exp(e.value):.2f} ({span(*ends, form='.2f')})"


def span(low: float | None, high: float | None, scale: float = 1.0, form: str = "+.1f") -> str:
    """Both ends of an interval."""
    if low is None or high is None:
        return "no interval"
    return f"{low * scale:{form}} to {high * scale:{form}}"


def above(low: float | None, high: float | None) -> str:
    """Whether a number is above 0 by its interval."""
    if low is None or high is None:
        return UNDECIDED
    return HELD if low > 0 else NOT if high <= 0 else UNDECIDED


def within(low: float | None, high: float | None, least: float, most: float) -> str:
    """Whether a number is between two others by its interval."""
    if low is None or high is None:
        return UNDECIDED
    if least < low and high < most:
        return HELD
    return NOT if low >= most or high <= least else UNDECIDED


def metric_of(study: Study, cell: str, name: str) -> dict[int, float]:
    """A metric by seed, of the runs that have it."""
    found = {seed: o.metrics.get(name) for seed, o in of_cell(study, cell).items()}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def complete_study(name: str) -> Study | None:
    """A suite of studies/ whose runs all have a committed outcome; else None."""
    if not (STUDIES / f"{name}.toml").exists():
        return None
    study = read_study(name)
    return None if missing(study) else study
