"""Curves of a cell: one for each seed, their mean and its band."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hmpo.lab.statistics.intervals import t_interval
from hmpo.lab.study.analysis import COMPARED, Run, Study, block_of
from hmpo.lab.study.outcomes import Outcome
from hmpo.lab.study.plan import Cell
from hmpo.lab.study.scores import evaluated

Points = tuple[Sequence[int], Sequence[float | None]]


@dataclass(frozen=True)
class Curve:
    """One cell's curves of one quantity."""

    label: str
    """Level of the compared factor, or the cell's name."""
    cell: str
    steps: tuple[int, ...]
    """Updates at which any seed has a value."""
    mean: tuple[float, ...]
    low: tuple[float | None, ...]
    """Lower end of Student's interval; None with one seed."""
    high: tuple[float | None, ...]
    seeds: Mapping[int, Points]


@dataclass(frozen=True)
class Quantity:
    """Something that is drawn against updates."""

    name: str
    title: str
    unit: str
    of: Callable[[Outcome], Points]
    share: bool = False


def _curve(name: str) -> Callable[[Outcome], Points]:
    def found(outcome: Outcome) -> Points:
        return outcome.curves.get("step", []), outcome.curves.get(name, [])

    return found


QUANTITIES = (
    Quantity("success", "Success on held-out prompts", "sampled success", evaluated, True),
    Quantity(
        "reward",
        "Reward in training",
        "mean reward",
        lambda outcome: (outcome.reward.get("step", []), outcome.reward.get("mean", [])),
    ),
    Quantity("g", "Log gap", "log M_1 - log M_-1, nat", _curve("g")),
    Quantity("kl3", "KL, old policy to new", "k3, nat/token", _curve("kl3")),
    Quantity("clip_pos", "Clipped with A > 0", "share above the bound", _curve("clip_pos")),
    Quantity("clip_neg", "Clipped with A < 0", "share below the bound", _curve("clip_neg")),
    Quantity("entropy", "Entropy", "nat/token", _curve("entropy")),
    Quantity("max_qk", "Largest attention logit", "logit", _curve("max_qk")),
)
"""What is drawn against updates, first the endpoint."""


def blocks(study: Study) -> dict[str, list[Cell]]:
    """Compared cells by block, named by its levels; then those that have a cell to be held against.

    A suite without blocks has one, named "".
    """
    found: dict[str, list[Cell]] = {}
    for cell in study.cells(*COMPARED):
        name = ", ".join(level for _, level in block_of(study.plan, cell) if level)
        found.setdefault(name, []).append(cell)
    others = study.cells("again", "negative", "positive", "placebo")
    if others:
        bases = {cell.against for cell in others}
        held = [cell for cell in study.cells() if cell.name in bases and cell not in others]
        found["controls"] = [*held, *others]
    return found


def label_of(study: Study, cell: Cell, within: Sequence[Cell]) -> str:
    """The level of the compared factor where it tells the cells apart, else the cell's name."""
    factor = study.plan.factor
    levels = [other.levels.get(factor) for other in within if not other.against]
    level = cell.levels.get(factor)
    alone = (
        level is not None
        and levels.count(level) == 1
        and cell.role in COMPARED
        and not cell.against
    )
    return level if alone and level is not None else cell.name


def curves_of(study: Study, cells: Sequence[Cell], quantity: Quantity) -> list[Curve]:
    """Curves of the cells in which any run has values of this quantity."""
    found = []
    for cell in cells:
        seeds = {seed: _known(quantity.of(run.outcome)) for seed, run in _runs(study, cell)}
        seeds = {seed: points for seed, points in seeds.items() if points[0]}
        if seeds:
            found.append(_banded(label_of(study, cell, cells), cell.name, seeds, study))
    return found


def _runs(study: Study, cell: Cell) -> list[tuple[int, Run]]:
    return list(study.runs[cell.name].items())


def _known(points: Points) -> tuple[list[int], list[float]]:
    pairs = [(step, value) for step, value in zip(*points) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _banded(
    label: str, cell: str, seeds: Mapping[int, tuple[list[int], list[float]]], study: Study
) -> Curve:
    steps = sorted({step for points, _ in seeds.values() for step in points})
    table = np.full((len(seeds), len(steps)), np.nan)
    place = {step: i for i, step in enumerate(steps)}
    for row, (points, values) in zip(table, seeds.values()):
        row[[place[step] for step in points]] = values
    mean, low, high = np.nanmean(table, 0), np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    counts = np.isfinite(table).sum(0)
    for count in set(counts.tolist()) - {1}:
        here = np.flatnonzero(counts == count)
        values = np.stack([column[np.isfinite(column)] for column in table[:, here].T])
        _, low[here], high[here], _ = t_interval(values, 1 - study.plan.alpha)
    return Curve(
        label, cell, tuple(steps), tuple(mean.tolist()), _ends(low), _ends(high), dict(seeds)
    )


def _ends(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else value for value in values.tolist())
