"""From a pilot's paired differences to the seeds that a study needs."""

from dataclasses import dataclass

from hmpo.lab.statistics.power import (
    Pilot,
    detectable,
    detectable_margin,
    pilot,
    seeds_for_equivalence,
    seeds_needed,
)
from hmpo.lab.study.analysis import Contrast, Study, endpoints

POWER = 0.8
"""Chance to see what is there."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one comparison of a suite needs, from the differences that its seeds have shown.

    Example: with a standard deviation of 4 points, a difference of 2 needs 34 seeds.
    """

    cell: str
    against: str
    found: Pilot
    at: int
    """Seeds that the two next figures are for."""
    detectable: float
    """Smallest difference that this many seeds see with chance `POWER`."""
    margin: float
    """Smallest margin within which they show methods that do not differ as equivalent."""
    seeds: int | None
    """Seeds that the wanted difference needs; None: more than 1000."""
    seeds_upper: int | None
    """The same at the upper limit of the standard deviation."""
    equivalence: int | None
    """Seeds that show equivalence within the wanted difference."""


def needs(study: Study, difference: float | None = None, seeds: int | None = None) -> list[Need]:
    """What each comparison of a suite needs.

    Args:
        study: with at least two shared seeds in a comparison.
        difference: success that matters; None takes the protocol's smallest.
        seeds: how many the detectable differences are for; None takes those there are.

    Returns:
        One entry for each comparison that has two shared seeds, in the order of the plan.
    """
    wanted = study.plan.smallest if difference is None else difference
    return [
        _need(study, contrast, wanted, seeds)
        for contrast in (*study.contrasts, *study.others)
        if len(contrast.seeds) > 1
    ]


def _need(study: Study, contrast: Contrast, wanted: float, seeds: int | None) -> Need:
    one, other = (endpoints(study.runs[name]) for name in (contrast.cell, contrast.against))
    found = pilot([one[seed] - other[seed] for seed in contrast.seeds])
    at, alpha = seeds or found.n, study.plan.alpha
    return Need(
        cell=contrast.cell,
        against=contrast.against,
        found=found,
        at=at,
        detectable=detectable(found.sd, at, POWER, alpha),
        margin=detectable_margin(found.sd, at, POWER, alpha),
        seeds=seeds_needed(found.sd, wanted, POWER, alpha),
        seeds_upper=seeds_needed(found.sd_upper, wanted, POWER, alpha),
        equivalence=seeds_for_equivalence(found.sd, wanted, 0.0, POWER, alpha),
    )
